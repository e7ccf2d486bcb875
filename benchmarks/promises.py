"""The promises to one subscription as a model: one order, nothing lost, each gap counted, nothing dropped before it is full.

``tests/properties/test_model.py`` and ``python -m benchmarks.load`` compare with it what real channels return. It stands in
the benchmarks, as these run without pytest and may not import the tests, while a test may import a benchmark; neither is
installed with the package.

The messages of a subscription form rows, each numbered without a gap in the order that was promised. A schedule whose driver
knows the order of all messages has one row; the load, whose processes know only their own, has one for each publisher and
topic. A broken promise is raised when the model has already moved on, so that the next one is found, too.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Final

from mpbroadcast import SubscriberStats

DROPPING: Final = ("drop_oldest", "drop_newest")  # these count a gap in Lagged; "latest" counts in Channel.missed only
POLICIES: Final = ("block", "block", *DROPPING, "latest", "disconnect")  # to draw from
MOST: Final = 8 << 20  # bytes of a body
_BLOCK: Final = random.Random(1).randbytes(4099)
_PATTERN: Final = _BLOCK * (MOST // len(_BLOCK) + 2)


def _start(publisher: int, topic: int, number: int) -> int:
    return (publisher * 1009 + topic * 9176 + number * 271) % len(_BLOCK)


def body(publisher: int, topic: int, number: int, size: int) -> bytes:
    """Return the content of this message: a part of one random block, which begins where no other near it does."""
    start = _start(publisher, topic, number)
    return _PATTERN[start : start + size]


def is_body(content: bytes, publisher: int, topic: int, number: int, size: int) -> bool:
    """Return whether this is the content of that message, without a copy."""
    return len(content) == size and _PATTERN.startswith(content, _start(publisher, topic, number))


class Broken(AssertionError):
    """A promise was not kept. ``lost`` messages are missing and not counted; 0: it is wrong in another way."""

    def __init__(self, text: str, lost: int = 0) -> None:
        super().__init__(text)
        self.lost = lost


def check_balance(row: SubscriberStats) -> None:
    """Raise :exc:`Broken` unless what was published to a subscription was delivered, was missed, or waits."""
    if row.delivered + row.missed + row.waiting != row.published:
        raise Broken(f"stats(): delivered + missed + waiting is not published: {row}")


class Ledger:
    """What one subscription has received and missed, against what was published to it.

    ``has_one_row``: a gap then stands exactly where it was counted. ``may_drop`` is whether it may have been full; where the
    capacity is not followed by :meth:`expect` and :meth:`release`, it is true from the beginning.
    """

    def __init__(self, overflow: str, capacity: int, *, has_one_row: bool, may_drop: bool) -> None:
        self.overflow = overflow
        self.capacity = capacity  # bytes
        self.has_one_row = has_one_row
        self.may_drop = may_drop
        self.next: dict[Hashable, int] = {}  # of each row, the number behind the last one received
        self.received = 0
        self.missed = 0
        self.gap = 0  # missed, and not yet seen as a hole in a row
        self.overflowed = False
        self.ended = False
        self.waiting = 0  # messages at most, and what these count
        self.charge = 0

    # --- the capacity

    def expect(self, charge: int) -> None:
        """One more message may wait for it."""
        self.waiting += 1
        self.charge += charge
        self.may_drop = self.may_drop or (self.is_full() and self.overflow != "block")

    def release(self, count: int, charge: int) -> None:
        """So many do not wait any more."""
        self.waiting -= count
        self.charge -= charge

    def is_full(self, count: int = 0, charge: int = 0) -> bool:
        """Return whether so much more may find no room; at up to half of the capacity it has some, as has a single message."""
        return self.waiting + count > 1 and 2 * (self.charge + charge) > self.capacity

    # --- what the channel returns

    def message(self, row: Hashable, number: int, *, first: int = 0, certain: int | None = None) -> None:
        """Receive a message. ``first`` is the number with which its row began.

        Of those of its row that were left out before it, ``certain`` were for this subscription without doubt; default: all.
        """
        last = self.next.get(row, first) - 1
        self.received += 1
        if number <= last:
            raise Broken(f"{row}: number {number} after {last}")
        self.next[row] = number + 1
        self.leave_out(row, last + 1, number, certain)

    def leave_out(self, row: Hashable, start: int, stop: int, certain: int | None = None) -> None:
        """The messages from ``start`` to before ``stop`` did not come: they must have been counted."""
        gap, least = self.gap, stop - start if certain is None else certain
        self.gap = 0 if self.has_one_row else max(0, gap - least)
        if gap < least:
            missing = f"{row}: {start} to {stop - 1} did not come"
            raise Broken(f"{missing}: {least} of them, and {gap} were counted as missing", least - gap)
        if self.has_one_row and gap > stop - start:
            raise Broken(f"{row}: {gap} were counted as missing before {stop}, and there were only {stop - start}")

    def lag(self, missed: int) -> None:
        """``Lagged`` was raised."""
        self.gap += missed
        self.missed += missed
        if missed < 1 or self.overflow not in DROPPING or not self.may_drop:
            raise Broken(f"Lagged({missed}) was raised, and nothing could be dropped")

    def count(self, missed: int) -> None:
        """``Channel.missed`` is this: what ``Lagged`` and ``Overflowed`` have counted, or, under "latest", what was skipped."""
        before, self.missed = self.missed, missed
        if self.overflow == "latest":
            self.gap += missed - before
        if missed < before or (missed > before and self.overflow != "latest"):
            raise Broken(f"channel.missed is {missed} after {before}")

    def overflow_once(self) -> None:
        """``Overflowed`` was raised."""
        before, self.overflowed = self.overflowed, True
        self.missed += 1
        if before or self.overflow != "disconnect" or not self.may_drop:
            raise Broken("Overflowed was raised, and nothing could overflow")

    def end(self, least: int, most: int) -> None:
        """The channel has ended, and from ``least`` to ``most`` were published to it, unless it has overflowed."""
        self.ended = True
        total = self.received + self.missed
        if not self.overflowed and not least <= total <= most:
            text = f"received {self.received} + missed {self.missed} is not within {least} to {most}, which were published"
            raise Broken(text, max(1, least - total))
