"""How fast a publisher sends: whether its pipe is read after naps, or whenever the poller reports bytes.

A publisher is busy for :data:`HOLD` seconds from when one read has had more than :data:`MANY` of its messages, or much in
bytes, and from when :data:`MANY` messages, however they were read, came within :data:`SPAN` seconds. The second rule finds a
stream whose every message wakes the broker: each is then read alone. The hold outlasts a pause, as a busy publisher makes
while another process has its CPU: behind a pause that ends the naps, messages are read one by one again.
"""

from __future__ import annotations

from typing import Final

MANY: Final = 16  # messages
SPAN: Final = 1e-3  # seconds
HOLD: Final = 4e-3  # seconds


class Pace:
    """The pace of one publisher. ``count`` has its messages since the last look at how long they took."""

    __slots__ = ("_busy_until", "_since", "count")

    def __init__(self) -> None:
        self.count = 0
        self._since = 0.0
        self._busy_until = 0.0

    def is_busy(self, now: float, *, has_much: bool = False) -> bool:
        """Return whether it is busy ``now``, behind a read that ``has_much`` or not, whose messages are in ``count``."""
        if self.count >= MANY:
            has_much = has_much or now - self._since < SPAN
            self.count, self._since = 0, now
        if has_much:
            self._busy_until = now + HOLD
        return now < self._busy_until
