"""The seam between a bridge and its engine: the protocol of an engine, and the class for a URL.

An engine is a log of entries in one order, and no more: it may hold an entry twice, and lose what it has. All that must be
right in spite of that is in the broker. A bridge makes two engines, one that appends and one that reads, each of one task.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Final, Protocol, cast

from mpbroadcast.errors import BroadcastError

GROUP: Final = "mpbroadcast.engines"
"""The group of entry points in which packages offer further engines, each under the scheme of its URLs."""

_BUILT_IN: Final = {"redis": "redis", "rediss": "redis", "unix": "redis", "nats": "nats", "tls": "nats"}  # scheme -> extra
_UNCLEAR: Final = "://..."
_SERVER: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.%]+\]|[\w.-]*)(:\d+)?(/[^,]*)?", flags=re.IGNORECASE)


class EngineRefused(BroadcastError):
    """The engine answers, and will not serve: a wrong password, no permission, or something else under the stream's name.

    A bridge that starts fails with it. One that was up takes it as any other error, and tries again.
    """


class Engine(Protocol):
    """A log of entries, made as ``Class(url, stream, max_bytes, max_age)``, which does no I/O, and raises ``ValueError`` for a
    URL or a name that makes no sense.

    Every coroutine may be cancelled at any ``await``. Any error means that this object is closed, and another one is opened
    later; :class:`EngineRefused` gives a reason that will last. No error text holds a password.

    A position is a string of the engine's own, at most 200 characters, which names one entry for good: when the engine has lost
    that entry and gives the same number to another one, :meth:`seek` must notice. An entry may have several.
    """

    @property
    def max_entry(self) -> int:
        """Return how many bytes an entry may have, 2 KiB at the least; known after :meth:`open`."""

    async def open(self) -> None:
        """Connect, and make the stream if there is none. The caller gives it 10 seconds."""

    async def append(self, entry: bytes) -> str:
        """Append an entry, and return its position as soon as the engine has acknowledged it.

        It raises when it is not sure. It never appends the same call's entry again by itself.
        """

    async def seek(self, position: str) -> bool:
        """Continue reading behind ``position``, and return True, if that very entry is still there.

        Otherwise return False, and continue with what is there from the time of that entry on; if in doubt with more.
        """

    async def read(self, timeout: float) -> list[tuple[str, bytes]]:
        """Return the next entries with their positions, in order: what is there, at most some 4 MiB, or what comes within
        ``timeout`` seconds; then an empty list. A loss behind the last position returned is an error.

        What is no entry of the bridge's is returned as well: the signature shows that.
        """

    async def lag(self, position: str) -> int | None:
        """Return about how many entries there are behind ``position``; ``None`` if that is not known."""

    async def trim(self) -> None:
        """Keep about the last ``max_bytes``, at most twice that, and nothing older than ``max_age`` seconds.

        Both sides call it about once a second: that which reads knows the log, that which appends goes on when nothing is read.
        """

    async def close(self) -> None:
        """Close the connection, also one that is half open. Wait for no answer of the engine."""


def longest_entry(max_bytes: int) -> int:
    """Return how many bytes an entry has at the most in a log of ``max_bytes``, so that what is removed is never much of it."""
    return max(4096, min(1 << 19, max_bytes // 16))


EngineClass = Callable[[str, str, int, float], Engine]


def shown(url: str) -> str:
    """Return a URL without user, password and options, for logs and errors. If these are not clear, only the scheme."""
    bare = re.sub(r"//[^/?#]*@", "//", url)
    if "@" not in bare:  # else a part of the password is still there: it has a character that should have been escaped
        bare = re.split("[?#]", bare)[0]
        if all(_SERVER.fullmatch(server) for server in bare.split(",")):
            return bare
    scheme = url.partition("://")[0]
    return f"{scheme}{_UNCLEAR}" if scheme.isalnum() else "..."


def engine_class(url: str) -> EngineClass:
    """Return the class of the engine for a URL, by its scheme.

    :raises ValueError: no engine has this scheme, or it is not clear which part of the URL is the password.
    :raises ImportError: its client library is not installed; the text names the extra.
    """
    scheme = url.partition("://")[0].lower()
    if shown(url).endswith(_UNCLEAR):
        text = "special characters in a password and in options need a percent-escape (%40 is @, %2F is /)"
        raise ValueError(f"the URL {shown(url)} is not clear: {text}")
    if extra := _BUILT_IN.get(scheme):
        try:
            module = import_module(f"mpbroadcast.bridge.{extra}_engine")
        except ImportError as error:
            text = f"a bridge over {scheme}:// needs the client library for it: pip install 'mpbroadcast[{extra}]'"
            raise ImportError(text, name=error.name) from error
        return cast(EngineClass, getattr(module, f"{extra.capitalize()}Engine"))
    for point in metadata.entry_points(group=GROUP):
        if point.name == scheme:
            return cast(EngineClass, point.load())
    known = ", ".join(f"{name}://" for name in _BUILT_IN)
    raise ValueError(f"no engine for the URL {shown(url)!r}: it begins with {known}, or the name of an installed engine")
