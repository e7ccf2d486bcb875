"""The books that each subscription of ``python -m benchmarks.load`` keeps, to check what it receives.

A message is ``(publisher, topic, number, size, body)``. Each publisher counts the messages of each topic by themselves, so that
what is missing is known without the other topics; and it keeps in shared memory up to which number it has begun to publish, has
published, and has flushed. From these, read before and after a subscription is made and ended, follow bounds for its first
and last message that hold whatever else goes on: what was flushed before does not come, and what is begun later does. What must
come between these is the model's: ``promises.py``.
"""

from __future__ import annotations

import contextlib
import os
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, Final, cast

from benchmarks.promises import POLICIES, Broken, Ledger, is_body
from mpbroadcast import Broadcaster, BrokerLost, Channel, Lagged, Overflowed, TimedOut

RUN, DRAIN, END = range(3)  # phases: all go on; publishers end, and no subscriber is slow any more; subscribers end
DELIVERED, MISSED, LOST, WRONG, ENDED, EXACT, OVERFLOWED = range(7)  # what each subscriber process counts
_FIELDS: Final = 8
_GROUPS: Final = 10  # topics are "g3.t13": the pattern "g3.*" matches a tenth of them
_PATIENCE: Final = 120.0  # seconds after which a message that should come is missing
Message = tuple[int, int, int, int, Any]


def topic_name(topic: int) -> str:
    """The name of a topic, which starts with its group's."""
    return f"g{topic % _GROUPS}.t{topic}"


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
        """Draw one: most have one or two topics, ``wide`` of them a group, and a tenth of that everything."""
        overflow = rng.choice(POLICIES)
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
    ledger: Ledger = field(init=False)
    books: Books | None = None

    def __post_init__(self) -> None:
        overflow, capacity = self.wish.overflow, self.wish.capacity or 64 << 20
        self.ledger = Ledger(overflow, capacity, has_one_row=False, may_drop=overflow != "block")

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
        self.books.count(DELIVERED)
        row = f"publisher {publisher}, topic {topic}"
        if not is_body(content, publisher, topic, number, size):
            self._report(f"{row}, number {number}: not the {size} bytes that were sent")
        if topic not in self.wish.topics:
            self._report(f"topic {topic} was not subscribed to")
            return
        index = self.wish.topics.index(topic) * self.columns + publisher
        first = max(self.before[index], min(self.after[index], number - 1)) + 1
        with self._reporting():
            self.ledger.count(self.channel.missed)
            self.ledger.message(row, number, first=first)

    def meet(self, error: Exception) -> None:
        """Check what receiving raised instead of a message."""
        assert self.books is not None
        with self._reporting():
            if isinstance(error, Lagged):
                missed = error.missed or 0  # it is None only where a channel with `after` begins
                self.books.count(MISSED, missed)
                self.ledger.lag(missed)
            elif isinstance(error, Overflowed):
                self.books.count(OVERFLOWED)
                self.ledger.overflow_once()
            elif isinstance(error, EOFError):
                self.ledger.ended = True
            elif isinstance(error, BrokerLost):
                raise error
            else:
                self._report(f"receiving raised {error!r}")

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
        while not self.ledger.ended:
            if not self.receive(None, _PATIENCE):
                self._report(f"no end came within {_PATIENCE} s of its unsubscription")
                break
        self.channel.close()
        if self.wish.overflow == "latest":
            self.books.count(MISSED, self.channel.missed)
        least = sum(max(0, low - high) for low, high in zip(flushed, self.after, strict=True))
        most = sum(high - low for high, low in zip(begun, self.before, strict=True))
        with self._reporting():
            self.ledger.count(self.channel.missed)
        self.books.count(ENDED)
        if not self.ledger.ended or self.ledger.overflowed:
            return
        for index, number in enumerate(flushed):
            position, publisher = divmod(index, self.columns)
            row = f"publisher {publisher}, topic {self.wish.topics[position]}"
            start = self.ledger.next.get(row, self.after[index] + 1)
            if start <= number:
                with self._reporting():
                    self.ledger.leave_out(row, start, number + 1)
        with self._reporting():
            self.ledger.end(least, most)
        if least == most:
            self.books.count(EXACT)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Report a promise that is found broken meanwhile."""
        try:
            yield
        except Broken as error:
            self._report(str(error), error.lost)

    def _report(self, text: str, lost: int = 0) -> None:
        assert self.books is not None
        self.books.count(LOST if lost else WRONG, lost or 1)
        wish = self.wish
        self.books.report(
            f"{wish.overflow}, capacity {wish.capacity}, {', '.join(wish.names) or 'everything'} "
            f"(subscription {self.channel.id}, {self.ledger.received} received): {text}"
        )


class Books:
    """What a subscriber process counts, and reports to the main process."""

    def __init__(self, board: Board, index: int, pipe: Connection) -> None:
        self._tallies = board.tallies
        self._start = index * _FIELDS
        self._pipe = pipe
        self._reports = 0

    def count(self, kind: int, more: int = 1) -> None:
        """Add to a counter."""
        self._tallies[self._start + kind] += more

    def report(self, text: str) -> None:
        """Send to the main process what is wrong; the first 20 of each process."""
        self._reports += 1
        if self._reports <= 20:
            self._pipe.send(f"process {os.getpid()}: {text}"[:1500])
