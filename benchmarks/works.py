"""What is published, and what a subscriber does with it.

Each kind of work gives the messages, and takes them in: one loop of each, the same for every peer. The last message of each
publisher is marked. A subscriber stops when it has seen the last one of all.
"""

from __future__ import annotations

import importlib
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.base import TO_ALL, Shape, Source


class GivenUp(Exception):
    """The last message has not come in time."""


@dataclass
class Taken:
    """What one subscriber got."""

    seen: int = 0
    end: float = 0.0  # on the monotonic clock, when the last message of all was unpickled and looked at
    load: int = 0  # how many of the messages were load only
    latencies: array[int] = field(default_factory=lambda: array("q"))  # nanoseconds


SENSORS = ("north", "south", "east", "west")  # one for each publisher


@dataclass(frozen=True)
class Work:
    """``count`` small dicts from each publisher."""

    count: int

    def messages(self, publisher: int) -> Iterator[Any]:
        sensor = SENSORS[publisher]
        return ({"sequence": sequence, "sensor": sensor, "value": 21.5} for sequence in range(self.count))

    def send(self, source: Source, publisher: int) -> None:
        """All messages of this publisher."""
        source.publish_all(self.messages(publisher))

    def last(self, publisher: int) -> Any:
        """The last message once more, for whom it did not reach."""
        return {"sequence": self.count - 1, "sensor": SENSORS[publisher], "value": 21.5}

    def expected(self, shape: Shape, subscriber: int) -> int:
        """How many messages this subscriber should get."""
        return self.count * shape.publishers

    def published(self, shape: Shape) -> int:
        """How many messages are published, by all."""
        return self.count * shape.publishers

    def take(self, messages: Iterable[Any], shape: Shape, subscriber: int, taken: Taken) -> None:
        """Count what comes, until the last one has come from each publisher."""
        seen, last, lasts = 0, self.count - 1, set(SENSORS[: shape.publishers])
        try:
            for message in messages:
                seen += 1
                if message["sequence"] == last:
                    lasts.discard(message["sensor"])
                    if not lasts:
                        break
        finally:
            taken.seen, taken.end = seen, time.monotonic()


@dataclass(frozen=True)
class Blocks(Work):
    """``bytes`` of a size, from one publisher: one object again and again, another at the end. Making them is not measured."""

    size: int

    def _block(self, mark: bytes) -> bytes:
        return mark + b"x" * (self.size - 1)

    def messages(self, publisher: int) -> Iterator[Any]:
        block, last = self._block(b"\0"), self._block(b"\1")
        yield from (block for _ in range(self.count - 1))
        yield last

    def last(self, publisher: int) -> Any:
        return self._block(b"\1")

    def take(self, messages: Iterable[Any], shape: Shape, subscriber: int, taken: Taken) -> None:
        seen = 0
        try:
            for message in messages:
                seen += 1
                if message[0]:
                    break
        finally:
            taken.seen, taken.end = seen, time.monotonic()


@dataclass(frozen=True)
class Arrays(Blocks):
    """``numpy`` arrays of float64. The subscriber sums the first and the last element of each."""

    def _block(self, mark: bytes) -> Any:
        numpy: Any = importlib.import_module("numpy")
        made = numpy.full(self.size // 8, 0.5)
        made[0] = mark[0]
        return made

    def take(self, messages: Iterable[Any], shape: Shape, subscriber: int, taken: Taken) -> None:
        seen = 0
        try:
            for message in messages:
                seen += 1
                if float(message[0]) + float(message[-1]) == 1.5:
                    break
                del message  # hold one at a time
        finally:
            taken.seen, taken.end = seen, time.monotonic()


GROUPS = 100  # of topics: "g00.i0000" is in the group "g00"


def topic_name(index: int) -> str:
    """Topic ``index`` of a topic row."""
    return f"g{index % GROUPS:02}.i{index // GROUPS:04}"


@dataclass(frozen=True)
class Topics(Work):
    """Small dicts, each to the next of ``topics`` topics, in turn; topic ``i`` is heard by subscriber ``i % subscribers``."""

    topics: int
    subscribers: int

    def send(self, source: Source, publisher: int) -> None:
        names = [topic_name(index) for index in range(self.topics)]
        many = self.topics
        source.publish_topics((names[i % many], message) for i, message in enumerate(self.messages(publisher)))

    def expected(self, shape: Shape, subscriber: int) -> int:
        return self.count // self.subscribers

    def take(self, messages: Iterable[Any], shape: Shape, subscriber: int, taken: Taken) -> None:
        # Not every peer keeps the order between topics, so the last to come may be any.
        seen, last = 0, self.expected(shape, subscriber)
        try:
            for message in messages:
                message["sequence"]
                seen += 1
                if seen == last:
                    break
        finally:
            taken.seen, taken.end = seen, time.monotonic()


@dataclass(frozen=True)
class Paced(Work):
    """Small dicts with the time in them, from the first publisher, ``rate`` a second; the others only make ``load``, so many
    a second, in a burst every millisecond."""

    rate: int
    load: int

    def send(self, source: Source, publisher: int) -> None:
        publish, start = source.publish, time.monotonic()
        if publisher == 0:
            for sequence in range(self.count):
                self._sleep_until(start + sequence / self.rate)
                publish({"sequence": sequence, "sensor": "north", "stamp": time.monotonic_ns()})
            return
        for turn in range(self.count * 950 // self.rate):  # it ends before the others do, so that nobody stops to listen
            if time.monotonic() > start + 0.95 * self.count / self.rate:
                break
            self._sleep_until(start + turn / 1000)
            for _ in range(self.load // 1000):
                publish({"sequence": -1, "sensor": "south", "stamp": 0})

    @staticmethod
    def _sleep_until(moment: float) -> None:
        if (left := moment - time.monotonic()) > 0:
            time.sleep(left)

    def last(self, publisher: int) -> Any:
        if publisher:
            return {"sequence": -1, "sensor": "south", "stamp": 0}
        return {"sequence": self.count - 1, "sensor": "north", "stamp": 0}

    def expected(self, shape: Shape, subscriber: int) -> int:
        return self.count

    def published(self, shape: Shape) -> int:
        return self.count

    def take(self, messages: Iterable[Any], shape: Shape, subscriber: int, taken: Taken) -> None:
        load, clock, last, note = 0, time.monotonic_ns, self.count - 1, taken.latencies.append
        try:
            for message in messages:
                now = clock()
                if message["stamp"]:
                    note(now - message["stamp"])
                else:
                    load += 1
                if message["sequence"] == last:
                    break
        finally:
            taken.seen, taken.load, taken.end = len(taken.latencies), load, time.monotonic()


def topics_of(subscribers: int, topics: int, patterns: bool) -> tuple[tuple[str, ...], ...]:
    """The topics of each subscriber of a topic row: by name, or the patterns of whole groups."""
    names: list[list[str]] = [[] for _ in range(subscribers)]
    for index in range(GROUPS if patterns else topics):
        names[index % subscribers].append(f"g{index:02}.*" if patterns else topic_name(index))
    return tuple((*of_one, TO_ALL) for of_one in names)  # at the end: who hears it hears the others, too
