"""Which entries an engine may remove: by what this bridge has read of the log, and when. Pure.

The engine's clock has no part in it: when that one jumps forward, all entries are old by it. What was in the log before this
bridge began to read counts as read at that moment. So after a time without any bridge it may stay for ``max_age`` seconds more,
and the log may have twice ``max_bytes``.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar

Position = TypeVar("Position", int, tuple[int, int])
_PARTS: Final = 32
_OVERHEAD: Final = 64  # bytes an entry takes in an engine beside its own


class Retention(Generic[Position]):
    """The log as one bridge has read it, in parts of some 1/32 of what is kept.

    :param max_bytes: How many bytes of entries are kept.
    :param max_age: How many seconds an entry is kept.
    """

    def __init__(self, max_bytes: int, max_age: float) -> None:
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._parts: deque[tuple[Position, float, int]] = deque()  # its first entry, when that was read, bytes in front of it
        self._bytes = 0
        self._last: Position | None = None

    def reset(self) -> None:
        """Forget the log: it is another one than it was, or has lost its end."""
        self._parts.clear()
        self._last = None

    def add(self, position: Position, size: int, now: float) -> None:
        """Note that an entry was read. One that was read before, by the connection before this one, has no effect.

        :param now: Seconds of a monotonic clock.
        """
        if self._last is not None and position <= self._last:
            return
        self._last = position
        if (
            not self._parts
            or now - self._parts[-1][1] >= self._max_age / _PARTS
            or self._bytes - self._parts[-1][2] >= self._max_bytes // _PARTS
        ):
            self._parts.append((position, now, self._bytes))
        self._bytes += size + _OVERHEAD

    def cut(self, now: float) -> Position | None:
        """Return the position in front of which all is to be removed; ``None`` if there is nothing. The newest part stays."""
        found = None
        while len(self._parts) > 1:
            (_, since, _), (following, _, before) = self._parts[0], self._parts[1]
            if self._bytes - before < self._max_bytes and now - since < self._max_age:
                break
            found = following
            self._parts.popleft()
        return found


@lru_cache(maxsize=16)
def retention_of(url: str, stream: str, max_bytes: int, max_age: float) -> Retention[Any]:
    """Return the one of this process and log, which outlives a connection."""
    return Retention(max_bytes, max_age)
