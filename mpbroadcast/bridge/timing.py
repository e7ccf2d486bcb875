"""When to try again, and when a process is hung. Pure: the caller has the clock."""

from __future__ import annotations

from typing import Final

SILENCE: Final = 30.0
"""Seconds without a sign of life after which a bridge's process is killed and replaced."""


class BackOff:
    """The pauses between tries that fail, each twice as long as the one before, up to ``longest`` seconds."""

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def pause(self) -> float:
        """Return how many seconds to wait before the next try."""
        pause, self._next = self._next, min(self._longest, 2 * self._next)
        return pause

    def reset(self) -> None:
        """Begin again with the shortest pause, behind a try that has succeeded."""
        self._next = self._first


class Watch:
    """How long a process has given no sign of life.

    Only the time counts in which the watching process has run itself, one ``interval`` of seconds for each look at the most:
    where all processes are stopped together, and continue together, none is hung.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._looked = 0.0
        self._silent = 0.0

    def begin(self, now: float) -> None:
        """Start, or note a sign of life."""
        self._looked = now
        self._silent = 0.0

    def silence(self, now: float) -> float:
        """Return the seconds without a sign of life. Call it once in each interval."""
        self._silent += min(now - self._looked, 2 * self._interval)
        self._looked = now
        return self._silent


class RateLimit:
    """Lets one of each kind pass every ``pause`` seconds."""

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._passed: dict[str, float] = {}

    def passes(self, kind: str, now: float) -> bool:
        """Return True if the last one of this kind has passed long enough ago, and note that this one does."""
        is_due = now - self._passed.get(kind, -self._pause) >= self._pause
        if is_due:
            self._passed[kind] = now
        return is_due
