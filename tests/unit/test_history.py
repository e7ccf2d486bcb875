"""The last messages of each topic: which are kept, which are forgotten, and which a replay gets."""

from __future__ import annotations

from array import array
from fnmatch import fnmatchcase
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpbroadcast.broker.core.history import History
from mpbroadcast.protocol.frames import FRAME_OVERHEAD, Batch, MemfdMessage, frame_head

ALL = 1 << 40


class Message(NamedTuple):
    """One that was published, with its place in the order of all."""

    place: int
    topic: str
    size: int

    @property
    def payload(self) -> bytes:
        return b"%d." % self.place + bytes(self.size)

    @property
    def charge(self) -> int:
        return len(self.payload) + len(self.topic.encode()) + FRAME_OVERHEAD


def batch_of(messages: list[Message]) -> Batch:
    """These messages, which have one topic, as a batch."""
    topic = messages[0].topic.encode()
    frames = [frame_head(len(message.payload), topic) + message.payload for message in messages]
    batch = Batch(b"".join(frames), array("I", map(len, frames)), topic, 0, 8 + len(topic))
    assert batch.charge == sum(message.charge for message in messages)
    return batch


def places(batches: list[Batch | MemfdMessage]) -> list[int]:
    """Where the messages of these batches stood in the order of all."""
    found = []
    for batch in batches:
        assert isinstance(batch, Batch)
        start = 0
        for size in batch.sizes:
            found.append(int(batch.frames[start + batch.skip : start + size].partition(b".")[0]))
            start += size
        assert start == len(batch.frames)
    return found


class Publisher:
    """Adds messages to a history, numbered one by one."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.messages: list[Message] = []

    def add(self, topic: str, *sizes: int) -> list[Message]:
        """Publish messages of these sizes, as one batch."""
        place = len(self.messages)
        added = [Message(number, topic, size) for number, size in enumerate(sizes, place)]
        self.history.add(place, batch_of(added))
        self.messages += added
        return added


class Plain:
    """What a history should keep, in the simplest way: a list of messages."""

    def __init__(self, length: int, most_topics: int, most_bytes: int) -> None:
        self.length, self.most_topics, self.most_bytes = length, most_topics, most_bytes
        self.kept: list[Message] = []
        self.recent: list[str] = []  # topics, the one published to the longest ago first
        self.forgotten = 0

    @property
    def charge(self) -> int:
        return sum(message.charge for message in self.kept)

    def add(self, added: list[Message]) -> None:
        topic = added[0].topic
        self.recent = [other for other in self.recent if other != topic] + [topic]
        self.kept += added
        own = [message for message in self.kept if message.topic == topic]
        for message in own[: max(0, len(own) - self.length)]:
            self.kept.remove(message)
        while len(self.recent) > self.most_topics or (self.charge > self.most_bytes and len(self.recent) > 1):
            gone = self.recent.pop(0)
            self.forgotten += 1
            self.kept = [message for message in self.kept if message.topic != gone]
        while self.charge > self.most_bytes:
            self.kept.pop(0)

    def last(self, topics: list[str], count: int, capacity: int) -> list[int]:
        matching = [message for message in self.kept if any(fnmatchcase(message.topic, own) for own in topics)]
        found: list[Message] = []
        for message in reversed(matching):
            total = sum(other.charge for other in found) + message.charge
            if len(found) == count or (found and total > capacity):
                break
            found.append(message)
        return [message.place for message in reversed(found)]


TOPIC = st.sampled_from(["", "a", "b", "a:1", "a:2", "*"])
ASKED = st.lists(st.sampled_from(["", "a", "b", "a*", "a:?", "*", "[*]", "nobody"]), max_size=3)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(
    length=st.integers(1, 12),
    most_topics=st.integers(1, 5),
    most_bytes=st.sampled_from([1, 1000, 5000, 20_000, ALL]),
    batches=st.lists(st.tuples(TOPIC, st.lists(st.integers(0, 2000), min_size=1, max_size=8)), max_size=15),
    replays=st.lists(
        st.tuples(ASKED, st.integers(0, 30), st.sampled_from([1, 600, 3000, 10_000, ALL])), min_size=1, max_size=4
    ),
)
def test_a_history_keeps_what_a_plain_list_keeps(
    length: int,
    most_topics: int,
    most_bytes: int,
    batches: list[tuple[str, list[int]]],
    replays: list[tuple[list[str], int, int]],
) -> None:
    """Whatever was published, each replay gets what the list has for it, and the bounds hold all the time."""
    history, plain = History(length, most_topics, most_bytes), Plain(length, most_topics, most_bytes)
    publisher = Publisher(history)
    for topic, sizes in batches:
        plain.add(publisher.add(topic, *sizes))
        assert history.charge == plain.charge <= most_bytes
        assert history.topics == len(plain.recent) <= most_topics
        assert history.forgotten == plain.forgotten
        for topics, count, capacity in replays:
            assert places(history.last(topics, count, capacity)) == plain.last(topics, count, capacity)


@pytest.mark.parametrize("length", [1, 100])
def test_what_is_kept_holds_no_larger_bytes(length: int) -> None:
    """A message that is kept does not keep the batch that it came in."""
    history = History(length)
    Publisher(history).add("a", *[1000] * 200)
    kept = history.last(["a"], 1000, ALL)
    assert sum(len(batch.frames) for batch in kept if isinstance(batch, Batch)) < length * 1100


def test_a_history_keeps_as_many_bytes_as_it_may() -> None:
    """What fits exactly is kept; one byte more, and the topic that was published to the longest ago goes."""
    for more, topics in ((0, 2), (1, 1)):
        history = History(100, most_bytes=2 * Message(0, "a", 0).charge - more)
        publisher = Publisher(history)
        publisher.add("a", 0)
        publisher.add("b", 0)
        assert history.topics == topics
