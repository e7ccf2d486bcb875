"""The limits of one session, and of all sessions together. Pure: no descriptor, no clock.

A session is one process, with all its handles. A subscription beyond its budget is refused, by an error in that call. What
only a program that does not use this package sends (half requests, connections without end) closes the connection. Messages
are not counted here: each backlog has a capacity.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple

from mpbroadcast.broker.core.patterns import steps_of_all

MOST_CONNECTIONS: Final = 1024  # of a process: one for each session, and one for each request at the same moment
MOST_ASKED: Final = 128 << 20  # bytes of a process's requests that are not whole
MOST_STEPS: Final = 1 << 24  # some 40 ms, of a session's patterns against one topic
_PER_SUBSCRIPTION: Final = 4096  # bytes, about
_PER_TOPIC: Final = 512
_UNCOUNTED: Final = 1 << 18  # bytes, of all sessions: what an ordinary program subscribes to does not show in the statistics


class OverBudget(Exception):
    """A request would cost more memory, or time for matching, than a session, or all sessions together, may have."""


class Cost(NamedTuple):
    """The cost of subscriptions: their number, topics and patterns, the bytes of these, and the steps of matching."""

    subscriptions: int = 0
    topics: int = 0
    bytes: int = 0
    steps: int = 0

    def plus(self, more: Cost) -> Cost:
        return Cost(*map(sum, zip(self, more, strict=True)))

    def negated(self) -> Cost:
        return Cost(*(-value for value in self))


def cost_of(topics: Collection[str], subscriptions: int) -> Cost:
    """Return the cost of these topics and patterns, which differ."""
    return Cost(subscriptions, len(topics), sum(map(len, map(str.encode, topics))), steps_of_all(topics))


SESSION: Final = Cost(1 << 14, 1 << 15, 24 << 20, MOST_STEPS)
TOGETHER: Final = Cost(1 << 17, 1 << 18, 1 << 26, 4 * MOST_STEPS)
_NAMES: Final = ("subscriptions", "topics and patterns", "bytes of topics", "steps of matching its patterns")


class Budget:
    """A budget with a limit, which is spent; what is spent of it is also spent of ``whole``."""

    def __init__(self, limit: Cost, whole: Budget | None = None) -> None:
        self.limit = limit
        self.spent = Cost()
        self._whole = whole

    def check(self, cost: Cost) -> None:
        """Check that ``cost`` fits into what is left of this budget, and of the one that it is a part of.

        :raises OverBudget: it does not.
        """
        for name, spent, more, most in zip(_NAMES, self.spent, cost, self.limit, strict=True):
            if spent + more > most:
                owner = "this process" if self._whole is not None else "all processes together"
                raise OverBudget(f"{owner} would have {spent + more} {name}, and may have {most}: close some channels first")
        if self._whole is not None:
            self._whole.check(cost)

    def spend(self, cost: Cost) -> None:
        """Add ``cost`` to what is spent, without a check."""
        self.spent = self.spent.plus(cost)
        if self._whole is not None:
            self._whole.spend(cost)

    def release(self, cost: Cost) -> None:
        self.spend(cost.negated())

    @property
    def memory(self) -> int:
        """Bytes that it takes, about, beyond what is not counted."""
        spent = self.spent
        taken = spent.subscriptions * _PER_SUBSCRIPTION + spent.topics * _PER_TOPIC + spent.bytes
        return max(0, taken - _UNCOUNTED)
