"""Every exception of this package that a user can meet.

They are split by who acted: you closed it (:class:`ClosedError`), the broker went (:class:`BrokerLost`), you were too slow
(:class:`Lagged`, :class:`Overflowed`), it would have blocked for too long (:class:`TimedOut`). A clean end is the built-in
``EOFError``. Wrong arguments raise the built-in ``TypeError`` and ``ValueError``, a message that cannot be pickled raises
whatever its pickling raises.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mpbroadcast.client.channel import Channel


class BroadcastError(Exception):
    """The base of all exceptions of this package.

    ``channel`` is the channel that the error concerns, or ``None``. Pickled, an error leaves its channel behind, and has a note
    (``__notes__``) that names it, and the process.
    """

    channel: Channel[Any] | None = None

    def __reduce__(self) -> Any:
        made, arguments, *_ = cast(tuple[Any, ...], super().__reduce__())
        return made, arguments, _without_channel(vars(self))


def concerns(error: Exception, channel: Channel[Any]) -> None:
    """Let an error carry a channel, and be pickled without it, also when it is none of this package's."""
    with contextlib.suppress(Exception):  # a user's exception may have no room for it
        if not isinstance(error, BroadcastError):
            # As it is now: a reference to the error would make a cycle, and keep the channel until a collection.
            made, arguments, *more = cast(tuple[Any, ...], error.__reduce_ex__(4))
            reduced = made, arguments, _without_channel({**(more[0] if more else {}), "channel": channel}), *more[1:]
            error.__reduce_ex__ = lambda protocol: reduced  # type: ignore[method-assign]
        error.channel = channel  # type: ignore[attr-defined]


def _without_channel(attributes: dict[str, Any]) -> dict[str, Any]:
    """With a note that names it, and this process."""
    state = dict(attributes)
    channel = state.pop("channel", None)
    if channel is not None:
        state["__notes__"] = [*state.get("__notes__", ()), f"in process {os.getpid()}, from {channel!r}"]
    return state


class StartError(BroadcastError, RuntimeError):
    """The broker could not be started; nothing is left behind. ``__cause__`` has the reason where there is one."""


class AddressError(BroadcastError, OSError, ValueError):
    """An address that no socket can have: too long, empty, with a NUL byte, or in a folder that does not exist."""


class AuthenticationFailed(BroadcastError, multiprocessing.AuthenticationError):
    """The broker and this process do not have the same key, or not the same user."""


class BrokerLost(BroadcastError, ConnectionError):
    """The broker has ended without a clean end for this handle: it was killed, closed, or never there."""


class BrokerCrashed(BroadcastError):
    """A bug in the broker: its traceback. It is the cause (``__cause__``) of the :class:`BrokerLost` that follows."""


class BrokerRestarted(BroadcastError):
    """The broker has died, and another one has taken over (``restart=True``).

    From a channel: messages may be missing in this place, nobody knows how many; receiving goes on. From ``flush``: what this
    handle had published before may not have reached everybody; publishing goes on.
    """


class ClosedError(BroadcastError, OSError):
    """This handle was closed in this process, by ``close()``, by ``with``, or because its broadcaster was closed."""


class ChannelInUse(BroadcastError, RuntimeError):
    """Another process has opened this channel, and only that one can receive from it. ``pid`` is its process ID."""

    def __init__(self, message: str, pid: int = 0) -> None:
        super().__init__(message, pid)
        self.pid = pid

    def __str__(self) -> str:
        return str(self.args[0])


class Lagged(BroadcastError):
    """This subscriber was too slow, and exactly ``missed`` messages were dropped in this place; receiving goes on."""

    def __init__(self, missed: int) -> None:
        super().__init__(missed)
        self.missed = missed

    def __str__(self) -> str:
        return (
            f"{self.missed} message(s) were dropped here because this channel's backlog was full; the next receive goes on "
            "behind the gap. Receive faster, or subscribe with a larger capacity or another overflow policy"
        )


class Overflowed(BroadcastError):
    """This channel's backlog was full under ``overflow="disconnect"``, and so it was unsubscribed."""


class TimedOut(BroadcastError, TimeoutError):
    """The call's ``timeout`` has run out before it could be done."""
