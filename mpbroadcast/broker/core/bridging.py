"""The positions of messages that go out over a bridge, and of those that come in. Pure: no descriptor, no clock, no process.

Out: each message that enters an outbox has a position in this bus's stream, from 1 on, also one that the policy drops. A
position is not written anywhere: it follows from the order, in which a note has the number of those that were dropped. What a
session was given is kept until it acknowledges it, counts against the capacity, and is given again to the next session.

In: the messages of another bus have positions of that bus. What was had is dropped, and a gap is found once. So a log may have
each message more than once, and a session may be killed at any moment.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection
from typing import Final, NamedTuple

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.patterns import Matcher, is_pattern, matcher
from mpbroadcast.protocol.runs import GAP, Run, note_run

MOST_ORIGINS: Final = 4096  # whose positions are kept, of one stream
_MOST_GIVEN: Final = 4 << 20  # bytes of charge that a session may have and not have acknowledged
_SPECIAL: Final = re.compile(r"[*?[]")
_MOST_TOPICS: Final = 1 << 14  # that are kept with whether they are wanted
_MOST_COMPARED: Final = 1 << 14  # pairs of topics


class Outbound:
    """The part of a backlog that a session has been given, and its positions."""

    def __init__(self, backlog: Backlog) -> None:
        self.backlog = backlog
        self.given = 0  # the last position that a session was given, be it in the number of a note
        self.acknowledged = 0  # the last position that is in the log, or that was dropped before it
        self.sent = 0  # messages that are in the log
        self._kept: deque[tuple[int, Run]] = deque()  # that were given and are not acknowledged, with their first positions
        # At most half of the capacity, so that, of a full outbox, the newest are not all dropped.
        self._most = min(_MOST_GIVEN, max(1, backlog.capacity // 2))

    @property
    def target(self) -> int:
        """The last position so far."""
        return self.backlog.published

    @property
    def settled(self) -> int:
        """The position up to which all is in the log, or was dropped."""
        return self.acknowledged if self._kept else self.given + self.backlog.missing_first

    @property
    def waiting(self) -> int:
        """Messages that are not in the log, and were not dropped."""
        return self.backlog.published - self.backlog.missed - self.sent

    @property
    def waiting_charge(self) -> int:
        """The bytes that they count."""
        return self.backlog.waiting_charge + self.backlog.referred

    @property
    def has_unacknowledged(self) -> bool:
        return bool(self._kept)

    def give(self) -> Run | None:
        """Return what comes next for the session: messages, a note of some that were dropped, or the end; ``None`` for now."""
        run = self.backlog.take_first(self._most - self.backlog.referred, at_least_one=not self._kept)
        if run is not None and (run.count or run.is_gap):
            self._kept.append((self.given + 1, run))
            self.given += run.count + run.missed
            self.backlog.referred += run.charge
        return run

    def give_again(self) -> list[Run]:
        """Return all that was given and is not acknowledged, for the next session."""
        runs = []
        for first, run in self._kept:
            had = max(0, self.acknowledged + 1 - first)
            if not had:
                runs.append(run)
            else:
                runs.append(run.part(had, run.count) if run.count else note_run(GAP, run.missed - had))
        return runs

    def acknowledge(self, position: int) -> None:
        """Release all that is not behind ``position``, whatever a session reports."""
        position = min(position, self.given)
        while self._kept and position > self.acknowledged:
            first, run = self._kept[0]
            last = first + run.count + run.missed - 1
            if run.count:
                self.sent += min(position, last) - max(self.acknowledged, first - 1)
            self.acknowledged = min(position, last)
            if last > position:
                break
            self._kept.popleft()
            self.backlog.referred -= run.charge


class Begun(NamedTuple):
    """The steps to take before the messages of an origin are routed."""

    has_gap: bool  # channels are to be shown that something is missing
    ahead: int  # the position that may be routed next without another one of these; 0 if nothing is new
    forgotten: bytes | None  # an origin whose position is not kept any more


class Inbound:
    """How far each other origin has been taken."""

    def __init__(self) -> None:
        self.received = 0  # messages that were routed
        self.missed = 0  # positions that never came
        self.duplicates = 0
        self._positions: dict[bytes, tuple[int, int]] = {}  # incarnation and position; the one that was used last is the last
        self._resumed: set[bytes] = set()  # origins whose next gap is in one that channels were shown already

    def restore(self, origin: bytes, incarnation: int, position: int) -> None:
        """Begin behind what the broker before this one may have routed."""
        self._positions[origin] = incarnation, position

    def position(self, origin: bytes) -> tuple[int, int]:
        """Return the incarnation and the last position of an origin; (0, 0) if it is not known."""
        return self._positions.get(origin, (0, 0))

    def begin(self, origin: bytes, incarnation: int, first: int, count: int) -> Begun:
        """Take up an origin, of which ``count`` messages come next, the first at the position ``first``."""
        known = self._positions.pop(origin, None)
        last = first + count - 1
        if known is None:  # it begins here
            self._positions[origin] = incarnation, first - 1
            forgotten = next(iter(self._positions)) if len(self._positions) > MOST_ORIGINS else None
            if forgotten is not None:
                del self._positions[forgotten]
                self._resumed.discard(forgotten)
            return Begun(False, last, forgotten)
        if incarnation < known[0]:  # a copy from a broker that has died since
            self._positions[origin] = known
            return Begun(False, 0, None)
        position = known[1]
        is_successor = incarnation > known[0]  # what the broker before it had not sent is lost
        if is_successor:
            position = first - 1
        is_missing = first > position + 1
        if is_missing:
            self.missed += first - 1 - position
            position = first - 1
        self._positions[origin] = incarnation, position
        is_new = is_successor or last > position or (not count and last == position)
        has_gap = (is_missing or is_successor) and origin not in self._resumed
        if is_new and count:
            self._resumed.discard(origin)
        elif has_gap:  # nothing of it comes here: what is missing behind it is the same gap
            self._resumed.add(origin)
        return Begun(has_gap, last if is_new else 0, None)

    def note_gap(self) -> None:
        """Note that channels are shown a gap here: what each known origin sends next is behind it."""
        self._resumed.update(self._positions)

    def take(self, origin: bytes, incarnation: int, position: int) -> None:
        """Note that all of an origin up to ``position`` is routed, or dropped."""
        if origin in self._positions:
            self._positions[origin] = incarnation, position


class Misannounced(Exception):
    """Messages without positions: no session of this package sends them."""


class Arrivals:
    """The messages that come through one session's pipe: those that were announced, and which position is next."""

    def __init__(self, inbound: Inbound) -> None:
        self.inbound = inbound
        self._origin = b""
        self._incarnation = 0
        self._next = 0  # position
        self._left = 0  # messages that were announced and have not come

    def begin(self, origin: bytes, incarnation: int, first: int, count: int) -> Begun:
        """Take up what comes next, as :meth:`Inbound.begin`."""
        self._origin, self._incarnation, self._next, self._left = origin, incarnation, first, count
        return self.inbound.begin(origin, incarnation, first, count)

    def drop_had(self, count: int) -> int:
        """Drop those of the next ``count`` messages that were had. Return how many, which are the first.

        :raises Misannounced: not so many were announced.
        """
        if count > self._left:
            raise Misannounced
        incarnation, position = self.inbound.position(self._origin)
        had = count if self._incarnation < incarnation else min(count, max(0, position + 1 - self._next))
        self._next += had
        self._left -= had
        self.inbound.duplicates += had
        return had

    def take(self, count: int) -> None:
        """Note that the next ``count`` messages are routed, or not wanted here."""
        self._next += count
        self._left -= count
        self.inbound.take(self._origin, self._incarnation, self._next - 1)


class Topics:
    """The topics and patterns of a stream; none: all."""

    def __init__(self, topics: Collection[str]) -> None:
        self._exact = frozenset(topics)
        self._patterns: list[tuple[str, Matcher]] = [(topic, matcher(topic)) for topic in topics if is_pattern(topic)]
        self._has_all = not topics or "*" in self._exact
        self._wanted: dict[bytes, bool] = {}

    def wants(self, topic: bytes) -> bool:
        """Return whether a message of this topic belongs to the stream; not if it is not UTF-8."""
        found = self._wanted.get(topic)
        if found is None:
            try:
                text = topic.decode()
                found = self._has_all or text in self._exact or any(made.match(text) for _, made in self._patterns)
            except UnicodeDecodeError:
                found = False
            if len(self._wanted) >= _MOST_TOPICS:
                self._wanted.clear()
            self._wanted[topic] = found
        return found

    def may_reach(self, topics: Collection[str]) -> bool:
        """Return whether a message of the stream may have one of these topics, or match one of these patterns.

        Of two patterns, and of very many topics, it may be True though none can.
        """
        if self._has_all or "*" in topics or not self._exact.isdisjoint(topics):
            return True
        if len(topics) * len(self._exact) > _MOST_COMPARED:
            return True
        return any(self._may_match(topic) for topic in topics)

    def _may_match(self, topic: str) -> bool:
        if not is_pattern(topic):
            return any(made.match(topic) for _, made in self._patterns)
        made, beginning = matcher(topic), _beginning(topic)
        literal = (one for one in self._exact if not is_pattern(one))
        return any(made.match(one) for one in literal) or any(
            _overlap(beginning, _beginning(pattern)) for pattern, _ in self._patterns
        )


def _beginning(pattern: str) -> str:
    return _SPECIAL.split(pattern, maxsplit=1)[0]


def _overlap(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)
