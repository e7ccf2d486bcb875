"""The last messages of each topic, for subscriptions with a replay. Pure: no descriptor, no clock."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Final

from mpbroadcast.broker.core.patterns import Patterns, is_pattern
from mpbroadcast.protocol.frames import OVERHEAD, Batch, MemfdMessage

MOST_TOPICS: Final = 4096
MOST_BYTES: Final = 64 << 20  # of charge, in all


class _Topic:
    __slots__ = ("batches", "charge", "count")

    def __init__(self) -> None:
        self.batches: deque[tuple[int, Batch | MemfdMessage]] = deque()  # each with its position in the order of all
        self.count = 0
        self.charge = 0


class History:
    """The last ``length`` messages of each topic. Of too many topics, those published to the longest ago are forgotten."""

    def __init__(self, length: int, most_topics: int = MOST_TOPICS, most_bytes: int = MOST_BYTES) -> None:
        self.length = length
        self.charge = 0
        self.forgotten = 0  # topics, so far
        self._most_topics = most_topics
        self._most_bytes = most_bytes
        self._topics: OrderedDict[bytes, _Topic] = OrderedDict()

    @property
    def topics(self) -> int:
        """How many topics have a history now."""
        return len(self._topics)

    def add(self, position: int, batch: Batch | MemfdMessage) -> None:
        """Keep messages that were routed; ``position`` is that of the first in the order of all."""
        topic = self._topics.get(batch.topic)
        if topic is None:
            topic = self._topics[batch.topic] = _Topic()
        self._topics.move_to_end(batch.topic)
        topic.batches.append((position, batch))
        topic.count += len(batch.sizes)
        topic.charge += batch.charge
        self.charge += batch.charge
        while topic.count > self.length:
            self._drop_first(topic, topic.count - self.length)
        while len(self._topics) > self._most_topics or (self.charge > self._most_bytes and len(self._topics) > 1):
            _, oldest = self._topics.popitem(last=False)
            self.charge -= oldest.charge
            self.forgotten += 1
        while self.charge > self._most_bytes:
            self._drop_first(topic, 1)

    def _drop_first(self, topic: _Topic, most: int) -> None:
        position, first = topic.batches.popleft()
        dropped = min(most, len(first.sizes))
        charge = first.charge
        if dropped < len(first.sizes):
            first = first.cut(dropped)[1]
            topic.batches.appendleft((position, first))
            charge -= first.charge
        topic.count -= dropped
        topic.charge -= charge
        self.charge -= charge

    def steps(self, topics: Iterable[str]) -> int:
        """Return the most steps that :meth:`last` takes for these topics and patterns."""
        patterns = _patterns_of(topics)
        return 0 if patterns is None else sum(patterns.steps(name.decode()) for name in self._topics)

    def last(self, topics: Iterable[str], count: int, capacity: int) -> list[Batch | MemfdMessage]:
        """Return the last ``count`` messages that these topics and patterns match, in the order of all, cut at ``capacity``."""
        wanted = set(topics)
        patterns = _patterns_of(wanted)
        names = {topic.encode() for topic in wanted} & self._topics.keys()  # looked up; only patterns are tried
        if patterns is not None:
            names.update(name for name in self._topics if any(patterns.matching(name.decode())))
        entries = (entry for name in names for entry in self._topics[name].batches)
        found = heapq.nlargest(count, entries, key=lambda entry: entry[0])
        batches: list[Batch | MemfdMessage] = []
        for _, batch in found:
            fits, room = 0, capacity
            for size in reversed(batch.sizes):
                room -= size + OVERHEAD
                if fits == count or (room < 0 and (fits or batches)):
                    break
                fits += 1
            if fits:
                batches.append(batch.cut(len(batch.sizes) - fits)[1])
                capacity -= batches[-1].charge
                count -= fits
            if fits < len(batch.sizes):
                break
        batches.reverse()
        return batches


def _patterns_of(topics: Iterable[str]) -> Patterns[None] | None:
    patterns: Patterns[None] = Patterns()
    found = [topic for topic in topics if is_pattern(topic)]
    for pattern in found:
        patterns.add(pattern, None)
    return patterns if found else None
