"""A moment that a call waits until."""

from __future__ import annotations

import time


class Deadline:
    """A moment on the monotonic clock, ``timeout`` seconds from now; ``None`` is never."""

    __slots__ = ("_at",)

    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Return the seconds until then, never negative; ``None`` for no limit."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    def milliseconds(self) -> int | None:
        """Return :meth:`remaining` as ``poll`` takes it, rounded up so that a loop does not spin in the last millisecond."""
        if self._at is None:
            return None
        seconds = max(0.0, self._at - time.monotonic())
        return min(int(seconds * 1000) + (seconds > 0), 2**31 - 1)

    def at_most(self, seconds: float) -> Deadline:
        """Return a deadline in ``seconds``, or at this one if that comes first."""
        remaining = self.remaining()
        return Deadline(seconds if remaining is None else min(remaining, seconds))

    def at_least(self, seconds: float) -> Deadline:
        """Return a deadline in ``seconds``, or at this one if that comes later."""
        remaining = self.remaining()
        return Deadline(None if remaining is None else max(remaining, seconds))
