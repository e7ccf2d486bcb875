"""When a broker ends that belongs to no process: some time after nothing needs it any more."""

from __future__ import annotations

from typing import Final

_TICK: Final = 1e-3  # seconds: a timer may be early by a rounding


class Linger:
    """The end of a broker that is not needed for ``seconds``, by any session or subscription.

    Before the first session, it is at least ``first`` seconds: the process that has started the broker connects to it then.
    """

    def __init__(self, seconds: float, *, first: float = 0.0) -> None:
        self._seconds = seconds
        self._next = max(seconds, first)
        self._end: float | None = None  # None: it is needed, as far as the last look has shown

    def begin_anew(self) -> None:
        """Note that it is needed: a session has begun, which may have ended before the next look."""
        self._end = None
        self._next = self._seconds

    def look(self, now: float) -> float | None:
        """Return the seconds until the end of a broker that is not needed ``now``; 0 if it has come.

        ``None``: an earlier look has returned them, and nothing has changed since.
        """
        if self._end is None:
            self._end = now + self._next
            return self._next
        return 0.0 if self._end - now < _TICK else None
