"""The last messages of each topic, for subscriptions with a replay, and for those that resume. Pure: no descriptor, no clock.

What a channel resumes has no gap only where nothing of its topics was forgotten behind the id that it names. So the history
notes of each topic what it has forgotten: how many messages, and the positions of the first and the last.
"""

from __future__ import annotations

import heapq
import sys
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Final

from mpbroadcast.broker.core.limits import OverBudget
from mpbroadcast.broker.core.patterns import Patterns, is_pattern
from mpbroadcast.protocol.frames import Batch, MemfdMessage

MOST_TOPICS: Final = 4096
_MOST_FORGOTTEN: Final = 4 * MOST_TOPICS  # topics of which it knows what it has forgotten, beside those that it has
MOST_BYTES: Final = 64 << 20  # of charge, in all

# A part of matching, some milliseconds:
_PATTERNS: Final = 1024  # to be made ready
_TOPICS: Final = 256  # to be tried
_STEPS: Final = 1 << 22
_MOST_STEPS: Final = 8 * _STEPS  # in all


ALL: Final = sys.maxsize  # messages
Entry = tuple[int, Batch | MemfdMessage]  # with the position of its first message in the order of all


class _Forgotten:
    """The messages of one topic that were forgotten: how many messages, and the positions of the first and the last of them."""

    __slots__ = ("count", "first", "last")

    def __init__(self, first: int) -> None:
        self.first = first
        self.last = first
        self.count = 0

    def note(self, last: int, count: int) -> None:
        """Note that ``count`` more messages are forgotten, up to the position ``last``."""
        self.last = last
        self.count += count

    def behind(self, position: int) -> int | None:
        """Return how many of them were behind ``position``; ``None`` if that is not known."""
        if position >= self.last:
            return 0
        if position < self.first:
            return self.count
        is_contiguous = self.count == self.last - self.first + 1
        return self.last - position if is_contiguous else None


class _Topic:
    __slots__ = ("batches", "charge", "count", "forgotten")

    def __init__(self, forgotten: _Forgotten | None) -> None:
        self.batches: deque[Entry] = deque()
        self.count = 0
        self.charge = 0
        self.forgotten = forgotten

    def forget(self, first: int, last: int, count: int) -> None:
        """Note that ``count`` messages are forgotten, from position ``first`` to ``last``."""
        if self.forgotten is None:
            self.forgotten = _Forgotten(first)
        self.forgotten.note(last, count)

    def newest(self, count: int, after: int) -> list[Entry]:
        """Return the newest ``count`` entries, as far as they are behind ``after``, the newest first."""
        entries = list(islice(reversed(self.batches), count))
        whole = bisect_left(entries, -after, key=_descending)
        if whole < len(entries):
            position, batch = entries[whole]
            before = after + 1 - position  # how many of its messages are not behind it
            if before < len(batch.sizes):
                entries[whole] = after + 1, batch.cut(before)[1]
                whole += 1
        return entries[:whole]


def _descending(entry: Entry) -> int:
    return -entry[0]


class History:
    """The last ``length`` messages of each topic. Of too many topics, those published to the longest ago are forgotten."""

    def __init__(self, length: int, most_topics: int = MOST_TOPICS, most_bytes: int = MOST_BYTES) -> None:
        self.length = length
        self.charge = 0
        self.forgotten = 0  # topics, so far
        self._most_topics = most_topics
        self._most_bytes = most_bytes
        self._topics: OrderedDict[bytes, _Topic] = OrderedDict()
        self._former: OrderedDict[bytes, _Forgotten] = OrderedDict()  # what it knows of topics that were forgotten whole
        self._unknown = -1  # the position behind which no topic was forgotten that is not there, either

    @property
    def topics(self) -> int:
        """How many topics have a history now."""
        return len(self._topics)

    def add(self, position: int, batch: Batch | MemfdMessage) -> None:
        """Keep messages that were routed; ``position`` is that of the first in the order of all."""
        topic = self._topics.get(batch.topic)
        if topic is None:
            topic = self._topics[batch.topic] = _Topic(self._former.pop(batch.topic, None))
        self._topics.move_to_end(batch.topic)
        topic.batches.append((position, batch))
        topic.count += len(batch.sizes)
        topic.charge += batch.charge
        self.charge += batch.charge
        while topic.count > self.length:
            self._drop_first(topic, topic.count - self.length)
        while len(self._topics) > self._most_topics or (self.charge > self._most_bytes and len(self._topics) > 1):
            self._drop_topic(*self._topics.popitem(last=False))
        while self.charge > self._most_bytes:
            self._drop_first(topic, 1)

    def _drop_topic(self, name: bytes, topic: _Topic) -> None:
        self.charge -= topic.charge
        self.forgotten += 1
        if topic.batches:
            position, batch = topic.batches[-1]
            topic.forget(topic.batches[0][0], position + len(batch.sizes) - 1, topic.count)
        if topic.forgotten is not None:
            self._former[name] = topic.forgotten
        if len(self._former) > _MOST_FORGOTTEN:
            _, oldest = self._former.popitem(last=False)
            self._unknown = max(self._unknown, oldest.last)

    def _drop_first(self, topic: _Topic, most: int) -> None:
        position, first = topic.batches.popleft()
        dropped = min(most, len(first.sizes))
        charge = first.charge
        if dropped < len(first.sizes):
            first = first.cut(dropped)[1]
            topic.batches.appendleft((position + dropped, first))
            charge -= first.charge
        topic.forget(position, position + dropped - 1, dropped)
        topic.count -= dropped
        topic.charge -= charge
        self.charge -= charge

    def missing(self, topics: Iterable[bytes], after: int) -> int | None:
        """Return how many messages of these topics behind ``after`` were forgotten; ``None`` if that is not known."""
        if self._unknown > after:
            return None
        missing = 0
        for name in topics:
            topic = self._topics.get(name)
            forgotten = self._former.get(name) if topic is None else topic.forgotten
            more = 0 if forgotten is None else forgotten.behind(after)
            if more is None:
                return None
            missing += more
        return missing

    def matching(self, topics: Iterable[str], *, former: bool = False) -> Generator[None, None, set[bytes]]:
        """Return which topics these topics and patterns match, in parts of some milliseconds; with those of ``former`` times.

        Topics that are published to between two parts are matched, too.

        :raises OverBudget: that takes too many steps.
        """
        patterns: Patterns[None] = Patterns()
        count = 0
        for count, pattern in enumerate(filter(is_pattern, topics), 1):
            patterns.add(pattern, None)
            if not count % _PATTERNS:
                yield
        found: set[bytes] = set()
        tried: set[bytes] = set()
        steps = 0
        while count and (untried := self._names(former) - tried):
            if tried:
                yield
                untried = self._names(former) - tried
            end = steps + _STEPS
            for name in islice(untried, _TOPICS):
                tried.add(name)
                text = name.decode()
                steps += patterns.steps(text)
                if any(patterns.matching(text)):
                    found.add(name)
                if steps > end:
                    break
            if steps > _MOST_STEPS:
                raise OverBudget("replay of so many patterns takes too long: name topics, or begin patterns differently")
        found.update(map(str.encode, topics))  # looked up; only patterns are tried
        return found & self._names(former)

    def _names(self, former: bool) -> set[bytes]:
        return {*self._topics, *self._former} if former else {*self._topics}

    def last(self, topics: Iterable[bytes], count: int, after: int = -1) -> Iterator[Entry]:
        """Yield the last ``count`` messages of these topics behind ``after``, as they are now, the newest first."""
        # Copied, as messages are added and dropped between two steps.
        each = [self._topics[topic].newest(count, after) for topic in topics if topic in self._topics]
        for position, batch in heapq.merge(*each, key=itemgetter(0), reverse=True):
            excess = len(batch.sizes) - count
            yield (position + excess, batch.cut(excess)[1]) if excess > 0 else (position, batch)
            count -= len(batch.sizes)
            if count <= 0:
                break

    def first(self, topics: Iterable[bytes], count: int, after: int) -> Iterator[Entry]:
        """Yield the first ``count`` messages of these topics behind ``after``, as they are now, in order."""
        each = [self._topics[topic].newest(ALL, after)[: -count - 1 : -1] for topic in topics if topic in self._topics]
        for position, batch in heapq.merge(*each, key=itemgetter(0)):
            yield position, batch.cut(count)[0] if len(batch.sizes) > count else batch
            count -= len(batch.sizes)
            if count <= 0:
                break
