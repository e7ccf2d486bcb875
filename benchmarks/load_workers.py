"""The processes of ``python -m benchmarks.load``: publishers and subscribers."""

from __future__ import annotations

import math
import os
import pickle
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from benchmarks.load_books import END, RUN, WRONG, Account, Board, Books, Message, Wish, topic_name
from benchmarks.promises import MOST, body
from mpbroadcast import Broadcaster, Channel, Overflowed, Selector, TimedOut

READERS: Final = ("recv", "recv_many", "wait", "selector")


@dataclass
class Manner:
    """How a subscriber process behaves."""

    seed: int
    subscriptions: int
    reader: str  # one of READERS
    pause: float  # mean seconds that it sleeps between two messages, now and then; 0: it is quick
    stay: float  # mean seconds that a subscription lasts before another takes its place; 0: to the end
    wide: float  # how many of its subscriptions have more than two topics


def _quiet() -> None:
    """Leave it to the main process when to end: Ctrl-C comes to all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def subscribe_and_check(
    bus: Broadcaster[Message], board: Board, place: int, manner: Manner, handed: list[Account], pipe: Connection
) -> None:
    """A subscriber process: it receives, checks, and makes new subscriptions, until the main process ends it."""
    _quiet()
    books = Books(board, place, pipe)
    starter = os.getppid()
    try:
        _Subscriber(bus, board, manner, books).run(handed)
    except Exception as error:
        if os.getppid() == starter:
            books.count(WRONG)
            books.report(f"ended with {error!r}")


class _Subscriber:
    def __init__(self, bus: Broadcaster[Message], board: Board, manner: Manner, books: Books) -> None:
        self._bus = bus
        self._board = board
        self._manner = manner
        self._books = books
        self._rng = random.Random(manner.seed)
        self._accounts: dict[Channel[Message], Account] = {}
        self._selector: Selector[None] = Selector()
        self._sleepy = 0.0  # when it sleeps next

    def run(self, handed: list[Account]) -> None:
        for account in handed:
            self._add(account)
        self._fill_up()
        change = self._next_change()
        while self._board.phase.value != END:
            busy = self._receive()
            if busy:
                for account in [account for account in self._accounts.values() if account.ledger.ended]:
                    self._remove(account)
            if self._board.phase.value != RUN:
                continue
            if busy and self._manner.pause:
                self._sleep()
            if time.monotonic() > change and self._accounts:
                self._remove(self._rng.choice(list(self._accounts.values())))
                change = self._next_change()
            self._fill_up()
        for account in list(self._accounts.values()):
            self._remove(account)

    def _sleep(self) -> None:
        now = time.monotonic()
        if now > self._sleepy:
            time.sleep(min(self._rng.expovariate(1 / self._manner.pause), 3.0))
            # A subscriber that makes publishers wait does so for a small part of the time, or nothing would ever be published.
            waited_for = any(account.wish.overflow == "block" for account in self._accounts.values())
            self._sleepy = now + self._rng.expovariate(1 / (50 * self._manner.pause if waited_for else 0.01))

    def _next_change(self) -> float:
        stay = self._manner.stay / self._manner.subscriptions
        return time.monotonic() + self._rng.expovariate(1 / stay) if stay else math.inf

    def _fill_up(self) -> None:
        while len(self._accounts) < self._manner.subscriptions and self._board.phase.value == RUN:
            self._add(Account.opened(self._bus, self._board, Wish.drawn(self._rng, self._board.topics, self._manner.wide)))

    def _add(self, account: Account) -> None:
        account.books = self._books
        self._accounts[account.channel] = account
        account.channel.poll(0)  # opens it
        if self._manner.reader == "selector":
            self._selector.select(account.channel, account.take)

    def _remove(self, account: Account) -> None:
        self._selector.deselect(account.channel)
        account.end(self._bus, self._board)
        del self._accounts[account.channel]

    def _receive(self) -> bool:
        """Receive for a fraction of a second: whether there was something."""
        accounts = list(self._accounts.values())
        if not accounts:
            time.sleep(0.1)
            return False
        if self._manner.reader == "selector":
            return self._select()
        if len(accounts) == 1 and self._manner.reader != "wait":
            return accounts[0].receive(1 if self._manner.reader == "recv" else None, 0.5)
        ready = wait(_channels(accounts), 0.5)
        for channel in ready:
            self._accounts[channel].receive(self._rng.choice((None, 1, 5)), 0)  # type: ignore[index]
        return bool(ready)

    def _select(self) -> bool:
        try:
            for _ in range(64):
                self._selector.receive(0.5)
        except TimedOut:
            return False
        except EOFError:  # none of its sources is left
            for account in self._accounts.values():
                account.receive(1, 0)
        except Exception as error:
            channel: Channel[Message] | None = getattr(error, "channel", None)
            if channel is None:
                raise
            account = self._accounts[channel]
            account.meet(error)
            if isinstance(error, Overflowed):
                account.receive(1, 1.0)  # its end
        return True


def _channels(accounts: list[Account]) -> list[Any]:
    """Their channels, in the type that ``connection.wait`` takes."""
    return [account.channel for account in accounts]


def publish(bus: Broadcaster[Message], board: Board, place: int, seed: int, rate: float, pipe: Connection) -> None:
    """A publisher process: some ``rate`` messages a second, now more and now less, until the main process ends it."""
    _quiet()
    starter = os.getppid()
    try:
        _Publisher(bus, board, place, seed).run(rate)
    except Exception as error:
        if os.getppid() == starter:
            pipe.send(f"publisher {place}, process {os.getpid()}: ended with {error!r}"[:1500])


class _Publisher:
    def __init__(self, bus: Broadcaster[Message], board: Board, place: int, seed: int) -> None:
        self._bus = bus
        self._board = board
        self._place = place
        self._rng = random.Random(seed)

    def run(self, rate: float) -> None:
        changed, factor, flushed, due = -math.inf, 1.0, time.monotonic(), time.monotonic()
        while self._board.phase.value == RUN:
            now = time.monotonic()
            if now - changed > 3:
                changed, factor = now, self._rng.lognormvariate(-0.3, 0.8)  # 1 on average
            count = self._rng.choice((1,) * 19 + (30,))
            self._publish(count)
            if now - flushed > 0.2:
                self._flush()
                flushed = now
            # What was late is made up for, but not more than a second of it.
            due = max(due, now - 1.0) + min(self._rng.expovariate(rate * factor / count), 2.0)
            while (left := due - time.monotonic()) > 0 and self._board.phase.value == RUN:
                time.sleep(min(left, 0.2))
        self._flush()

    def _size(self) -> int:
        kind = self._rng.random()
        if kind < 0.93:
            return self._rng.randrange(10, 500)
        if kind < 0.98:
            return self._rng.randrange(500, 64 << 10)
        if kind < 0.998:
            return self._rng.randrange(64 << 10, 1 << 20)
        return self._rng.randrange(1 << 20, MOST)

    def _message(self, topic: int, number: int, most: int) -> Message:
        size = min(self._size(), most)
        content: Any = body(self._place, topic, number, size)
        kind = self._rng.random()
        if kind < 0.3:
            content = bytearray(content)
        elif kind < 0.6:
            content = _wrapped(content)
        return (self._place, topic, number, size, content)

    def _publish(self, count: int) -> None:
        board, place = self._board, self._place
        topic = self._rng.randrange(board.topics)
        row = topic * board.publishers + place
        first = board.done[row] + 1
        messages = [self._message(topic, first + index, MOST if count == 1 else 20_000) for index in range(count)]
        timeout = self._rng.choice((None,) * 9 + (self._rng.expovariate(20),))
        board.begun[row] = max(board.begun[row], first + count - 1)
        start = time.monotonic()
        board.since[place] = start
        sent = count
        try:
            if count == 1:
                self._bus.publish(messages[0], topic=topic_name(topic), timeout=timeout)
            else:
                self._bus.publish_many(iter(messages), topic=topic_name(topic), timeout=timeout)
        except TimedOut as error:
            sent = getattr(error, "sent", 0)
            board.timeouts[place] += 1
        board.since[place] = 0.0
        board.longest[place] = max(board.longest[place], int(1e6 * (time.monotonic() - start)))
        board.done[row] += sent
        board.published[place] += sent

    def _flush(self) -> None:
        """Wait until what is published up to now has been routed, and note that."""
        board, place = self._board, self._place
        published = board.done[place :: board.publishers]
        start = time.monotonic()
        board.since[place] = start
        self._bus.flush()
        board.since[place] = 0.0
        board.longest_flush[place] = max(board.longest_flush[place], int(1e6 * (time.monotonic() - start)))
        board.flushed[place :: board.publishers] = published


def _wrapped(content: bytes) -> Any:
    return pickle.PickleBuffer(content) if len(content) >= 64 << 10 else content
