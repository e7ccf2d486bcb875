"""The last messages of each topic: which are kept, which are forgotten, and which a replay gets."""

from array import array
from collections.abc import Iterable
from fnmatch import fnmatchcase
from random import Random
from typing import NamedTuple

import pytest

from mpbroadcast.broker.core.history import Entry, History
from mpbroadcast.broker.core.limits import OverBudget
from mpbroadcast.broker.core.patterns import Patterns
from mpbroadcast.broker.core.policies import new_backlog
from mpbroadcast.protocol.frames import FRAME_OVERHEAD, Batch, frame_head
from mpbroadcast.protocol.runs import run_of
from tests.support.own_broker import complete

ALL = 1 << 40


class Message(NamedTuple):
    """One that was published, with its position in the order of all."""

    position: int
    topic: str
    size: int

    @property
    def payload(self) -> bytes:
        return b"%d." % self.position + bytes(self.size)

    @property
    def charge(self) -> int:
        return len(self.payload) + len(self.topic.encode()) + FRAME_OVERHEAD


class Plain:
    """A history, and what it should keep, in the simplest manner: a list of messages."""

    def __init__(self, length: int = 100, most_topics: int = 100, most_bytes: int = ALL) -> None:
        self.history = History(length, most_topics, most_bytes)
        self.length, self.most_topics, self.most_bytes = length, most_topics, most_bytes
        self.published = 0
        self.all: list[Message] = []
        self.kept: list[Message] = []
        self.recent: list[str] = []  # topics, the one published to the longest ago first
        self.forgotten = 0

    @property
    def charge(self) -> int:
        return sum(message.charge for message in self.kept)

    def add(self, topic: str, *sizes: int) -> None:
        """Publish messages of these sizes, as one batch."""
        added = [Message(number, topic, size) for number, size in enumerate(sizes, self.published)]
        frames = [frame_head(len(message.payload), topic.encode()) + message.payload for message in added]
        batch = Batch(b"".join(frames), array("I", map(len, frames)), topic.encode(), 0, 8 + len(topic.encode()))
        self.history.add(self.published, batch)
        self.published += len(sizes)
        self.recent = [other for other in self.recent if other != topic] + [topic]
        self.kept += added
        self.all += added
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
        found: list[Message] = []
        for message in reversed([one for one in self.kept if any(fnmatchcase(one.topic, own) for own in topics)]):
            total = sum(other.charge for other in found) + message.charge
            if len(found) == count or (found and total > capacity):
                break
            found.append(message)
        return [message.position for message in reversed(found)]

    def replayed(self, topics: list[str], count: int, capacity: int) -> list[int]:
        """Return the positions of what the history has for a replay."""
        found: list[int] = []
        backlog = new_backlog(capacity)
        for position, batch in self.history.last(complete(self.history.matching(topics)), count):
            assert isinstance(batch, Batch)
            assert batch.sizes
            start = len(batch.frames)
            for size in reversed(batch.sizes):
                start -= size
                found.insert(0, int(batch.frames[start + batch.skip : start + size].partition(b".")[0]))
            assert start == 0
            assert found[0] == position
            if backlog.put_first(run_of(batch, position)) < len(batch.sizes):
                break
        return found[len(found) - backlog.waiting :]

    def check_resuming(self, topics: list[str], after: int, count: int) -> None:
        """What is behind ``after`` is found from both ends, and what is gone of that is counted, or not known."""
        published = [one for one in self.all if one.position > after and any(fnmatchcase(one.topic, own) for own in topics)]
        kept = [one.position for one in published if one in self.kept]
        missing = len(published) - len(kept)
        names: set[bytes] = complete(self.history.matching(topics, former=True))
        found = self.history.missing(names, after)
        assert found == missing or (found is None and missing)
        assert after >= 0 or found is not None
        assert positions(self.history.last(names, len(self.all), after), reverse=True) == kept
        assert positions(self.history.last(names, count, after), reverse=True) == kept[len(kept) - min(count, len(kept)) :]
        assert positions(self.history.first(names, count, after)) == kept[:count]


def positions(entries: Iterable[Entry], *, reverse: bool = False) -> list[int]:
    """Return the positions of all messages, of which each must have that of its payload."""
    found: list[int] = []
    for position, batch in [*entries][:: -1 if reverse else 1]:
        assert isinstance(batch, Batch)
        start = 0
        for number, size in enumerate(batch.sizes, position):
            assert batch.frames[start + batch.skip : start + size].startswith(b"%d." % number)
            start += size
            found.append(number)
    return found


TOPICS = ["", "a", "b", "a:1", "a:2", "*"]
ASKED = [*TOPICS, "a*", "a:?", "[*]", "unknown"]


def test_a_history_keeps_what_a_plain_list_keeps() -> None:
    """Whatever was published, each replay gets what the list has for it, and the bounds hold all the time."""
    for seed in range(300):
        choose = Random(seed)
        plain = Plain(choose.randint(1, 12), choose.randint(1, 5), choose.choice([1, 1000, 5000, 20_000, ALL]))
        history = plain.history
        for _ in range(choose.randint(1, 15)):
            plain.add(choose.choice(TOPICS), *choose.choices([0, 1, 10, 500, 2000], k=choose.randint(1, 8)))
            assert history.charge == plain.charge <= plain.most_bytes
            assert history.topics == len(plain.recent) <= plain.most_topics
            assert history.forgotten == plain.forgotten
            asked = choose.sample(ASKED, choose.randint(0, 4))
            last = plain.last(asked, choose.randint(1, 9), ALL)
            exact = sum(message.charge for message in plain.kept if message.position in last)
            for capacity in (1, exact - 1, exact, ALL):
                count = choose.randint(0, 12)
                assert plain.replayed(asked, count, capacity) == plain.last(asked, count, capacity)
            plain.check_resuming(asked, choose.randint(-1, plain.published), choose.randint(1, 9))


def test_only_so_much_is_known_of_forgotten_topics() -> None:
    """A channel of other topics resumes without a gap, until very many topics were forgotten behind its id."""
    plain = Plain(most_topics=1)
    plain.add("first", 0)
    for number in range(1 << 14):
        plain.add(str(number), 0)
    assert [plain.history.missing([name], -1) for name in (b"first", b"7", b"other")] == [1, 1, 0]
    for number in range(10):
        plain.add(f"more {number}", 0)
    assert [plain.history.missing([b"other"], after) for after in (-1, 8, 9)] == [None, None, 0]


def test_a_gap_between_messages_of_other_topics_is_counted_where_it_can_be() -> None:
    """From before the first of the topic that was forgotten, and anywhere if no other topic's lie between."""
    plain = Plain(length=1)
    for topic in ("other", "a", "a", "a", "b", "other", "b", "b"):
        plain.add(topic, 0)
    missing = plain.history.missing
    assert [missing([b"a"], after) for after in (0, 1, 2, 3)] == [2, 1, 0, 0]
    assert [missing([b"b"], after) for after in (0, 3, 4, 5, 6)] == [2, 2, None, None, 0]
    assert [missing([b"a", b"b"], after) for after in (1, 4)] == [3, None]


@pytest.mark.parametrize("length", [1, 100])
def test_what_is_kept_holds_no_larger_bytes(length: int) -> None:
    """A message that is kept does not keep the batch that it came in."""
    plain = Plain(length)
    plain.add("a", *[1000] * 200)
    kept = plain.history.last([b"a"], 1000)
    assert sum(len(batch.frames) for _, batch in kept if isinstance(batch, Batch)) < length * 1100


@pytest.mark.parametrize("second", ["a", "b"])
def test_a_history_keeps_as_many_bytes_as_it_may(second: str) -> None:
    """What fits exactly is kept; one byte more, and what was published the longest ago is forgotten."""
    for more, kept in ((0, [0, 1]), (1, [1])):
        plain = Plain(most_bytes=2 * Message(0, "a", 0).charge - more)
        plain.add("a", 0)
        plain.add(second, 0)
        assert plain.replayed(["*"], 2, ALL) == kept


@pytest.mark.parametrize(
    ("patterns", "topics", "parts"),
    [(0, 300, 0), (1, 256, 0), (1, 257, 1), (1, 600, 2), (1023, 0, 0), (1024, 0, 1), (2048, 0, 2)],
)
def test_a_replay_is_matched_in_parts(patterns: int, topics: int, parts: int) -> None:
    """So many patterns are made ready in a part, and so many topics are tried; names are looked up."""
    plain = Plain(most_topics=topics)
    for number in range(topics):
        plain.add(str(number), 0)
    asked = [f"*{number}" for number in range(patterns)]
    assert len([*plain.history.matching(["7", *asked])]) == parts


@pytest.mark.parametrize(("topics", "parts"), [(5, 0), (6, 1), (10, 1), (11, 2), (32, 6)])
def test_a_part_of_a_replay_has_so_many_steps(topics: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five topics of 2**20 steps are more than a part has, and 33 of them are too many."""
    monkeypatch.setattr(Patterns, "steps", lambda *_: 1 << 20)
    plain = Plain()
    for number in range(topics):
        plain.add(str(number), 0)
    assert len([*plain.history.matching(["*"])]) == parts
    for number in range(33):
        plain.add(str(number), 0)
    with pytest.raises(OverBudget):
        complete(plain.history.matching(["*"]))


def test_what_is_published_between_two_parts_is_matched() -> None:
    """And what is forgotten meanwhile is not."""
    plain = Plain(most_topics=300)
    for number in range(300):
        plain.add(str(number), 0)
    parts = plain.history.matching(["*9"])
    next(parts)
    for number in (309, 300, 301, 302, 303, 304, 305, 306, 307, 308):
        plain.add(str(number), 0)
    assert complete(parts) == {b"%d" % number for number in range(19, 310, 10)}
