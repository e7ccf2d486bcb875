"""The books that each subscription of ``python -m benchmarks.load`` keeps, to check what it receives.

A message is ``(publisher, topic, number, size, body)``. Each publisher counts the messages of each topic by themselves, so that
whoever hears a topic can tell what is missing; and it says in shared memory up to which number it has begun to publish, has
published, and has flushed. From these, read before and after a subscription is made and ended, follow bounds for its first
and last message that hold whatever else goes on: what was flushed before does not come, and what is begun later does. The body
is ``size`` bytes of one random block, from a place in it that follows from publisher, topic and number.
"""

from __future__ import annotations

import os
import random
from array import array
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, Final, cast

from mpbroadcast import Broadcaster, BrokerLost, Channel, Lagged, Overflowed, TimedOut

RUN, DRAIN, END = range(3)  # phases: all go on; publishers end, and nobody is slow any more; subscribers end
DELIVERED, MISSED, LOST, WRONG, ENDED, EXACT, OVERFLOWED = range(7)  # what each subscriber process counts
MOST: Final = 8 << 20  # bytes of a body
_FIELDS: Final = 8
_GROUPS: Final = 10  # topics are "g3.t13": a pattern "g3.*" hears a tenth of them
_BLOCK: Final = random.Random(1).randbytes(4099)
_PATTERN: Final = _BLOCK * (MOST // len(_BLOCK) + 2)
_PATIENCE: Final = 120.0  # seconds after which what should come is said to be missing
Message = tuple[int, int, int, int, Any]


def topic_name(topic: int) -> str:
    """The name of a topic, which starts with its group's."""
    return f"g{topic % _GROUPS}.t{topic}"


def body(publisher: int, topic: int, number: int, size: int) -> bytes:
    """What this message contains."""
    start = _start(publisher, topic, number)
    return _PATTERN[start : start + size]


def _start(publisher: int, topic: int, number: int) -> int:
    return (publisher * 1009 + topic * 9176 + number * 271) % len(_BLOCK)


class Board:
    """What all processes share: counters, each with one writer, and the phase, which the main process sets."""

    def __init__(self, context: BaseContext, topics: int, publishers: int, subscribers: int) -> None:
        self.topics = topics
        self.publishers = publishers
        self.begun = context.RawArray("Q", topics * publishers)
        self.done = context.RawArray("Q", topics * publishers)
        self.flushed = context.RawArray("Q", topics * publishers)
        self.published = context.RawArray("Q", publishers)
        self.timeouts = context.RawArray("Q", publishers)
        self.longest = context.RawArray("Q", publishers)  # microseconds that a publish took
        self.longest_flush = context.RawArray("Q", publishers)
        self.since = context.RawArray("d", publishers)  # time.monotonic() when what is under way began; or 0
        self.tallies = context.RawArray("Q", subscribers * _FIELDS)
        self.phase = context.RawValue("i", RUN)

    def total(self, kind: int) -> int:
        """The sum over all subscriber processes."""
        return sum(self.tallies[kind::_FIELDS])

    def numbers(self, which: Any, topics: tuple[int, ...]) -> array[int]:
        """The numbers of these topics, of each topic those of all publishers."""
        found = array("Q")
        for topic in topics:
            found.extend(which[topic * self.publishers : (topic + 1) * self.publishers])
        return found


@dataclass
class Wish:
    """What to subscribe to, and how."""

    names: tuple[str, ...]  # none: everything
    topics: tuple[int, ...]  # all that these names match
    overflow: str
    capacity: int | None  # bytes

    @staticmethod
    def drawn(rng: random.Random, topics: int, wide: float = 0.01) -> Wish:
        """A random one: most hear one or two topics, ``wide`` of them a group, and a tenth of that everything."""
        overflow = rng.choice(("block", "block", "drop_oldest", "drop_newest", "latest", "disconnect"))
        # A small one is a small pipe: a large message takes long through it, and publishers are not to wait for that.
        capacity = rng.choice((1 << 20, 4 << 20, None) if overflow == "block" else (20_000, 200_000, 4 << 20, None))
        kind = rng.random()
        if kind < wide / 10:
            return Wish((), tuple(range(topics)), overflow, capacity)
        if kind < wide:
            group = rng.randrange(_GROUPS)
            return Wish((f"g{group}.*",), tuple(range(group, topics, _GROUPS)), overflow, capacity)
        chosen = tuple(rng.sample(range(topics), rng.choice((1, 1, 2))))
        return Wish(tuple(map(topic_name, chosen)), chosen, overflow, capacity)


@dataclass
class Account:
    """The books of one subscription. It can be handed on with its channel, until that is opened."""

    wish: Wish
    channel: Channel[Message]
    before: array[int]  # flushed before it was there: does not come
    after: array[int]  # begun before it was there for certain: what is later comes
    columns: int
    last: dict[int, int] = field(default_factory=dict)
    received: int = 0
    missed: int = 0
    holes: int = 0
    overflowed: bool = False
    ended: bool = False
    books: Books | None = None

    @staticmethod
    def opened(bus: Broadcaster[Message], board: Board, wish: Wish) -> Account:
        """Subscribe."""
        before = board.numbers(board.flushed, wish.topics)
        channel = bus.subscribe(*wish.names, overflow=cast(Any, wish.overflow), capacity=wish.capacity)
        return Account(wish, channel, before, board.numbers(board.begun, wish.topics), board.publishers)

    def take(self, message: Message) -> None:
        """Check one message against those before it."""
        publisher, topic, number, size, content = message
        assert self.books is not None
        self.received += 1
        self.books.count(DELIVERED)
        if len(content) != size or not _PATTERN.startswith(content, _start(publisher, topic, number)):
            self._say(WRONG, 1, f"publisher {publisher}, topic {topic}, number {number}: not the {size} bytes that were sent")
        place = topic * self.columns + publisher
        last = self.last.get(place)
        if last is None:
            if topic not in self.wish.topics:
                self._say(WRONG, 1, f"topic {topic} was not subscribed to")
                return
            row = self.wish.topics.index(topic) * self.columns + publisher
            last = max(self.before[row], min(self.after[row], number - 1))
        if number <= last:
            self._say(WRONG, 1, f"publisher {publisher}, topic {topic}: number {number} after {last}")
        elif number > last + 1:
            self._hole(publisher, topic, last, number)
        self.last[place] = number

    def _hole(self, publisher: int, topic: int, last: int, number: int) -> None:
        self.holes += number - last - 1
        what = f"publisher {publisher}, topic {topic}: {last + 1} to {number - 1} did not come"
        if self.wish.overflow in ("block", "disconnect"):
            self._say(LOST, number - last - 1, what)
        elif self.wish.overflow != "latest" and self.holes > self.missed:
            self._say(LOST, self.holes - self.missed, f"{what}: {self.holes} so far, and {self.missed} were said to be missing")
            self.holes = self.missed

    def meet(self, error: Exception) -> None:
        """What receiving raised in the place of a message."""
        assert self.books is not None
        if isinstance(error, Lagged) and self.wish.overflow in ("drop_oldest", "drop_newest"):
            self.missed += error.missed
            self.books.count(MISSED, error.missed)
        elif isinstance(error, Overflowed) and self.wish.overflow == "disconnect" and not self.overflowed:
            self.overflowed = True
            self.books.count(OVERFLOWED)
        elif isinstance(error, EOFError):
            self.ended = True
        elif isinstance(error, BrokerLost):
            raise error
        else:
            self._say(WRONG, 1, f"receiving raised {error!r}")

    def receive(self, limit: int | None, timeout: float) -> bool:
        """Take what there is, within ``timeout`` seconds: whether there was something."""
        try:
            for message in [self.channel.recv(timeout)] if limit == 1 else self.channel.recv_many(limit, timeout):
                self.take(message)
        except TimedOut:
            return False
        except Exception as error:
            self.meet(error)
        return True

    def end(self, bus: Broadcaster[Message], board: Board) -> None:
        """Unsubscribe, receive what is left, and draw the balance."""
        assert self.books is not None
        flushed = board.numbers(board.flushed, self.wish.topics)
        bus.unsubscribe(self.channel)
        begun = board.numbers(board.begun, self.wish.topics)
        while not self.ended:
            if not self.receive(None, _PATIENCE):
                self._say(WRONG, 1, f"no end came within {_PATIENCE} s of its unsubscription")
                break
        self.channel.close()
        if self.wish.overflow == "latest":
            self.missed = self.channel.missed
            self.books.count(MISSED, self.missed)
        elif self.missed != self.channel.missed:
            self._say(WRONG, 1, f"channel.missed is {self.channel.missed}, and Lagged said {self.missed}")
        self.books.count(ENDED)
        if self.overflowed or not self.ended:
            return
        if self.wish.overflow in ("block", "disconnect"):
            self._complete(flushed)
        least = sum(max(0, low - high) for low, high in zip(flushed, self.after, strict=True))
        most = sum(high - low for high, low in zip(begun, self.before, strict=True))
        if not least <= self.received + self.missed <= most:
            text = (
                f"received {self.received} + missed {self.missed} is not within {least} to {most}, which were published to it"
            )
            self._say(LOST, max(1, least - self.received - self.missed), text)
        if least == most:
            self.books.count(EXACT)

    def _complete(self, flushed: array[int]) -> None:
        """Nothing is missing at the end."""
        for row, number in enumerate(flushed):
            place, publisher = divmod(row, self.columns)
            topic = self.wish.topics[place]
            last = self.last.get(topic * self.columns + publisher, self.after[row])
            if last < number:
                self._say(LOST, number - last, f"publisher {publisher}, topic {topic}: {last + 1} to {number} did not come")

    def _say(self, kind: int, count: int, text: str) -> None:
        assert self.books is not None
        self.books.count(kind, count)
        wish = self.wish
        self.books.say(
            f"{wish.overflow}, capacity {wish.capacity}, {', '.join(wish.names) or 'everything'} "
            f"(subscription {self.channel.id}, {self.received} received): {text}"
        )


class Books:
    """What a subscriber process counts, and says to the main process."""

    def __init__(self, board: Board, place: int, pipe: Connection) -> None:
        self._tallies = board.tallies
        self._start = place * _FIELDS
        self._pipe = pipe
        self._said = 0

    def count(self, kind: int, more: int = 1) -> None:
        """Add to a counter."""
        self._tallies[self._start + kind] += more

    def say(self, text: str) -> None:
        """Tell the main process what is wrong; the first 20 of each process."""
        self._said += 1
        if self._said <= 20:
            self._pipe.send(f"process {os.getpid()}: {text}"[:1500])
