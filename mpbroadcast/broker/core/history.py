"""The last messages of each topic, for subscriptions with a replay. Pure: no descriptor, no clock."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Final

from mpbroadcast.broker.core.limits import OverBudget
from mpbroadcast.broker.core.patterns import Patterns, is_pattern
from mpbroadcast.protocol.frames import Batch, MemfdMessage

MOST_TOPICS: Final = 4096
MOST_BYTES: Final = 64 << 20  # of charge, in all

# A part of matching, some milliseconds:
_PATTERNS: Final = 1024  # to be made ready
_TOPICS: Final = 256  # to be tried
_STEPS: Final = 1 << 22
_MOST_STEPS: Final = 8 * _STEPS  # in all


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

    def matching(self, topics: Iterable[str]) -> Generator[None, None, set[bytes]]:
        """Return which topics these topics and patterns match, in parts of some milliseconds.

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
        while count and (untried := self._topics.keys() - tried):
            if tried:
                yield
                untried = self._topics.keys() - tried
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
        return found & self._topics.keys()

    def last(self, topics: Iterable[bytes], count: int) -> Iterator[Batch | MemfdMessage]:
        """Yield the last ``count`` messages of these topics as they are at the first step, the newest first."""
        # Copied, as messages are added and dropped between two steps.
        each = [tuple(islice(reversed(self._topics[topic].batches), count)) for topic in topics]
        for _, batch in heapq.merge(*each, key=lambda entry: entry[0], reverse=True):
            excess = len(batch.sizes) - count
            yield batch.cut(excess)[1] if excess > 0 else batch
            count -= len(batch.sizes)
            if count <= 0:
                break
