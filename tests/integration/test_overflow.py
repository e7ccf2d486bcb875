"""A slow subscriber under each overflow policy: exact counts, gaps in their place, bounded memory. Real processes."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import signal
import termios
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import psutil
import pytest

from mpbroadcast import (
    Broadcaster,
    BrokerStats,
    Channel,
    Lagged,
    Overflowed,
    TimedOut,
)
from mpbroadcast.validation import POLICIES, Policy
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    everything,
    fill,
    finish,
    in_place,
    only_subscriber,
    pattern,
    readable,
    record,
    take,
    wait_until,
)

Bus = Broadcaster[Any]
Events = list[tuple[str, int]]
MEBIBYTE = 1 << 20
DROPPING = ["drop_oldest", "drop_newest"]


class Reader:
    """A channel that is not read until ``go()``."""

    def __init__(self, channel: Channel[Any]) -> None:
        self._channel = channel
        self._reading: Background | None = None

    def go(self) -> None:
        """Read from now on, to the clean end."""
        self._reading = Background(record, self._channel)

    def result(self) -> tuple[Events, int]:
        """What it was given, and its ``missed``."""
        assert self._reading
        return self._reading.result(), self._channel.missed


class StoppedReader(Reader):
    """A process that has opened the channel and was then stopped by a signal."""

    def __init__(self, channel: Channel[Any], children: Children, context: BaseContext) -> None:
        super().__init__(channel)
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self.process = children(context, workers.record_channel, channel, theirs)
        theirs.close()
        assert answer(self._pipe) == "open"
        self.signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid
        os.kill(self.process.pid, number)

    def go(self) -> None:
        self.signal(signal.SIGCONT)

    def result(self) -> tuple[Events, int]:
        events, missed = answer(self._pipe)
        finish(self.process)
        return events, missed


MakeReader = Callable[[Channel[Any]], Reader]


@pytest.fixture(params=["stopped", "unread", "unopened"])
def slow(request: pytest.FixtureRequest, children: Children, fork: BaseContext) -> MakeReader:
    """Makes a reader that does not read: stopped by a signal, with an unread channel, or an unopened one."""

    def make(channel: Channel[Any]) -> Reader:
        if request.param == "stopped":
            return StoppedReader(channel, children, fork)
        if request.param == "unread":
            channel.fileno()
        return Reader(channel)

    return make


def check(before: BrokerStats | None, now: BrokerStats) -> None:
    """What holds for every subscription at every moment, and since the moment before."""
    earlier = {row.id: row for row in before.subscribers} if before else {}
    for row in now.subscribers:
        assert row.delivered + row.missed + row.waiting == row.published
        # One that is larger than the capacity waits alone; a state may be half in the pipe when the next one comes.
        assert row.waiting_bytes <= row.capacity or row.waiting <= (2 if row.overflow == "latest" else 1)
        assert (row.waiting == 0) == (row.waiting_bytes == 0)
        assert row.missed == 0 or row.overflow in (*DROPPING, "latest")
        assert not row.stalls or row.overflow == "block"
        if row.id in earlier:
            for name in ("published", "delivered", "missed"):
                assert getattr(row, name) >= getattr(earlier[row.id], name), name


def watch(bus: Bus, until: Callable[[BrokerStats], Any]) -> None:
    """Take snapshots without pause and check each, until one is as it should be."""
    before: BrokerStats | None = None
    deadline = time.monotonic() + DEADLINE
    while True:
        now = bus.stats()
        check(before, now)
        before = now
        if until(now):
            return
        assert time.monotonic() < deadline, now


def numbered(first: int, count: int, size: int) -> list[tuple[int, bytes]]:
    """Messages with a number and bytes that belong to it."""
    return [(number, pattern(number, size)) for number in range(first, first + count)]


def publish_all(bus: Bus, messages: list[Any]) -> None:
    """Publish them, one by one."""
    for message in messages:
        bus.publish(message, timeout=DEADLINE)


def unread(channel: Channel[Any]) -> int:
    """Bytes in the channel's pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(channel.fileno(), termios.FIONREAD, count)
    return count[0]


def end(bus: Bus, channel: Channel[Any]) -> Events:
    """End the subscription behind what was published, and return all that the channel was given."""
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    return record(channel)


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", POLICIES)
def test_all_is_accounted_for_at_every_moment(bus: Bus, slow: MakeReader, overflow: Policy) -> None:
    """Delivered + missed + waiting = published in each snapshot under traffic; the reader counts the same."""
    channel = bus.subscribe(overflow=overflow, capacity=40_000)
    reader = slow(channel)
    count = 1500
    messages = numbered(0, 2 * count, 500)
    publishing = Background(publish_all, bus, messages[:count])
    watch(bus, lambda stats: not publishing.is_alive() or any(row.stalls for row in stats.subscribers))
    assert publishing.is_alive() == (overflow == "block")
    reader.go()
    watch(bus, lambda stats: not publishing.is_alive())
    publishing.result()
    publishing = Background(publish_all, bus, messages[count:])
    watch(bus, lambda stats: not publishing.is_alive())
    publishing.result()
    bus.flush(timeout=DEADLINE)
    last = bus.stats()
    bus.unsubscribe(channel)
    events, missed = reader.result()

    numbers, place = in_place(events) if overflow != "latest" else ([number for _, number in events], 0)
    if overflow == "disconnect":
        assert not last.subscribers
        assert numbers == list(range(len(numbers)))
        assert events[len(numbers) :] == [("overflowed", 0)]
        return
    assert last.subscribers[0].published == last.published == 2 * count
    if overflow == "block":
        assert numbers == list(range(2 * count))
        assert missed == 0
    elif overflow == "latest":
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == 2 * count - 1
        assert len(numbers) + missed == 2 * count
    else:
        assert place == 2 * count
        assert len(numbers) + missed == 2 * count
        assert missed == last.subscribers[0].missed > 0


# --- drop_oldest and drop_newest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", DROPPING)
def test_a_dropping_policy_keeps_what_it_is_named_for(bus: Bus, slow: MakeReader, overflow: Policy) -> None:
    """After a pause ``drop_oldest`` gives the newest behind the gaps, ``drop_newest`` the oldest and then the gap."""
    channel = bus.subscribe(overflow=overflow, capacity=40_000)
    reader = slow(channel)
    publish_all(bus, numbered(0, 20, 500))  # they fit, whatever is in the pipe
    bus.publish_many(numbered(20, 980, 500), timeout=DEADLINE)
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    reader.go()
    events, missed = reader.result()
    numbers, place = in_place(events)
    assert place == 1000
    assert 20 < len(numbers) <= 40_000 // 500
    assert missed == 1000 - len(numbers)
    if overflow == "drop_oldest":
        assert numbers[-20:] == list(range(980, 1000))
    else:
        assert numbers[:20] == list(range(20))
        assert events[-1][0] == "lagged"


def test_a_gap_at_the_end_is_readable_and_then_there_is_room_again(bus: Bus) -> None:
    """While ``recv`` would raise ``Lagged``, ``poll`` is true and the descriptor readable; what comes then is received."""
    channel = bus.subscribe(overflow="drop_newest", capacity=20_000)
    bus.publish_many(numbered(0, 200, 500), timeout=DEADLINE)
    bus.flush(timeout=DEADLINE)
    missed = only_subscriber(bus).missed
    assert 100 < missed < 190
    assert [number for number, _ in take(channel, 200 - missed)] == list(range(200 - missed))
    wait_until(lambda: readable(channel))
    for _ in range(2):
        assert channel.poll(0)
        assert readable(channel)
    with pytest.raises(Lagged) as caught:
        channel.recv(timeout=0)
    assert (caught.value.missed, caught.value.channel) == (missed, channel)
    assert not readable(channel)
    assert not channel.poll(0)
    bus.publish_many(numbered(200, 10, 500), timeout=DEADLINE)
    assert end(bus, channel) == [("message", number) for number in range(200, 210)]
    assert channel.missed == missed


@pytest.mark.parametrize("way", ["recv_many", "for", "async for"])
def test_each_way_to_receive_goes_on_after_a_gap(bus: Bus, way: str) -> None:
    """What came before a gap is given first, then ``Lagged`` is raised in its place; begun again, it goes on behind it."""
    channel = bus.subscribe(overflow="drop_oldest", capacity=20_000)
    channel.fileno()
    bus.publish_many(numbered(0, 500, 500), timeout=DEADLINE)
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    events: Events = []

    def receive_many() -> None:
        with contextlib.suppress(EOFError):
            while True:
                events.extend(("message", number) for number, _ in channel.recv_many(timeout=DEADLINE))

    def iterate() -> None:
        for number, _ in channel:
            events.append(("message", number))

    async def iterate_async() -> None:
        async for number, _ in channel:
            events.append(("message", number))

    ended = False
    while not ended:
        try:
            if way == "async for":
                asyncio.run(asyncio.wait_for(iterate_async(), DEADLINE))
            else:
                (iterate if way == "for" else receive_many)()
            ended = True
        except Lagged as error:
            events.append(("lagged", error.missed))
    numbers, place = in_place(events)
    assert (place, numbers[-1]) == (500, 499)
    assert channel.missed == 500 - len(numbers) > 0


# --- latest -----------------------------------------------------------------------------------------------------------


def test_latest_after_each_of_many_pauses(bus: Bus) -> None:
    """Pause after pause: the first is what was newest when the last was taken, the next is the newest, then nothing."""
    channel = bus.subscribe(overflow="latest")
    bus.publish("first")
    assert channel.recv(timeout=DEADLINE) == "first"
    received = 1
    for turn in range(20):
        publish_all(bus, [(turn, number) for number in range(50)])
        bus.flush(timeout=DEADLINE)
        assert only_subscriber(bus).delivered <= received + 1
        states = [channel.recv(timeout=DEADLINE)]
        while states[-1] != (turn, 49):
            states.append(channel.recv(timeout=DEADLINE))
        assert len(states) <= 2
        assert all(state[0] == turn for state in states)
        received += len(states)
        with pytest.raises(TimedOut):
            channel.recv(timeout=0)
        assert received + channel.missed == only_subscriber(bus).published == 1 + 50 * (turn + 1)


def test_latest_raises_nothing_and_is_readable_in_time(bus: Bus) -> None:
    """What ``latest`` skips is no error; each newest state makes the descriptor readable, and what is read, quiet."""
    channel = bus.subscribe(overflow="latest")
    channel.fileno()
    for number in range(1, 200):
        bus.publish(number)
        bus.publish(-number)
        wait_until(lambda: readable(channel))
        got = channel.recv(timeout=DEADLINE)
        if got != -number:
            assert got == number
            assert channel.recv(timeout=DEADLINE) == -number
        assert not readable(channel)
    assert everything(bus, channel) == []


# --- disconnect -------------------------------------------------------------------------------------------------------


def test_overflowed_is_no_lag(bus: Bus) -> None:
    """``Overflowed`` names its channel, is readable in time, comes once, and is no ``Lagged``; ``EOFError`` stays."""
    assert not issubclass(Overflowed, Lagged)
    channel = bus.subscribe(overflow="disconnect", capacity=1000)
    channel.fileno()
    bus.publish((0, bytes(2000)))  # alone it passes
    bus.publish((1, bytes(2000)))
    bus.flush(timeout=DEADLINE)
    assert channel.recv(timeout=DEADLINE)[0] == 0
    wait_until(lambda: readable(channel))
    assert channel.poll(0)
    with pytest.raises(Overflowed, match="disconnect") as caught:
        channel.recv(timeout=DEADLINE)
    assert caught.value.channel is channel
    for _ in range(2):
        with pytest.raises(EOFError):
            channel.recv(timeout=DEADLINE)
    assert list(channel) == []


def test_the_disconnected_is_not_waited_for(bus: Bus) -> None:
    """One that was disconnected counts as no subscriber, and one that keeps up stays."""
    slow, quick = bus.subscribe(overflow="disconnect", capacity=1000), bus.subscribe(overflow="disconnect")
    slow.fileno()
    bus.publish_many(numbered(0, 20, 500))
    bus.flush(timeout=DEADLINE)
    bus.wait_for_subscribers(1, timeout=0)
    with pytest.raises(TimeoutError):
        bus.wait_for_subscribers(2, timeout=0)
    assert end(bus, quick) == [("message", number) for number in range(20)]
    slow.close()


# --- larger than the capacity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", DROPPING)
def test_of_many_larger_than_the_capacity_one_is_kept(bus: Bus, overflow: Policy) -> None:
    """Of messages that are each larger than the backlog one waits at a time; the others are in the gap."""
    channel = bus.subscribe(overflow=overflow, capacity=10_000)
    for number in range(20):
        bus.publish((number, pattern(number, 50_000)), timeout=DEADLINE)
        bus.flush(timeout=DEADLINE)
        stats = bus.stats()
        check(None, stats)
        assert stats.subscribers[0].waiting == 1
    numbers, place = in_place(end(bus, channel))
    assert place == 20
    assert len(numbers) == 1


# --- several subscribers ----------------------------------------------------------------------------------------------


def test_each_policy_for_itself_on_one_topic(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Slow readers of all policies and a quick one share a topic: each gets what its own policy gives."""
    channels = {overflow: bus.subscribe("t", overflow=overflow, capacity=20_000) for overflow in POLICIES[1:]}
    readers = {overflow: StoppedReader(channel, children, fork) for overflow, channel in channels.items()}
    quick = bus.subscribe("t", capacity=20_000)
    receiving = Background(record, quick)
    publishing = Background(bus.publish_many, numbered(0, 2000, 200), topic="t")
    watch(bus, lambda stats: not publishing.is_alive())
    publishing.result()
    bus.flush(timeout=DEADLINE)
    check(None, bus.stats())
    for channel in (*channels.values(), quick):
        bus.unsubscribe(channel)
    assert receiving.result() == [("message", number) for number in range(2000)]
    found = {}
    for overflow, reader in readers.items():
        reader.go()
        found[overflow] = reader.result()
    assert in_place(found["drop_oldest"][0])[1] == in_place(found["drop_newest"][0])[1] == 2000
    assert found["drop_oldest"][0][-1] == ("message", 1999)
    assert found["drop_newest"][0][-1][0] == "lagged"
    assert found["latest"][0][-1] == ("message", 1999)
    assert found["disconnect"][0][-1] == ("overflowed", 0)


def test_topics_and_exclude_count_for_whom_they_reach(bus: Bus) -> None:
    """``published`` counts what is for a subscription, and neither other topics nor what it was excluded from."""
    channel = bus.subscribe("a", overflow="drop_newest", capacity=10_000)
    for number in range(300):
        bus.publish((number, bytes(100)), topic="a")
        bus.publish("not for it", topic="b")
        bus.publish("not for it", topic="a", exclude=channel)
    bus.flush(timeout=DEADLINE)
    row = only_subscriber(bus)
    check(None, bus.stats())
    assert row.published == 300
    assert row.missed > 0
    bus.unsubscribe(channel)
    received = [channel.recv(timeout=DEADLINE)[0] for _ in range(300 - row.missed)]
    assert received == list(range(300 - row.missed))
    with pytest.raises(Lagged) as caught:
        channel.recv(timeout=DEADLINE)
    assert caught.value.missed == row.missed


# --- bounded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5_000])
@pytest.mark.parametrize("overflow", ["block", *DROPPING])
def test_what_is_unread_in_the_pipe_counts_as_backlog(bus: Bus, overflow: Policy, size: int) -> None:
    """What waits in the broker, with 256 bytes for each message, and what is unread in the pipe are one capacity."""
    capacity = 60_000
    channel = bus.subscribe(overflow=overflow, capacity=capacity)

    def backlog() -> int:
        return only_subscriber(bus).waiting_bytes + unread(channel)

    def fill_up() -> bool:
        bus.publish_many(numbered(0, 1000, size), timeout=DEADLINE)
        bus.flush(timeout=DEADLINE)
        return backlog() > capacity // 2

    channel.fileno()
    if overflow == "block":
        fill(bus, size=size, timeout=0.2)
    else:
        # What waits is written into the pipe until that is full, and counts for less there: then there is room again.
        wait_until(fill_up)
    row = only_subscriber(bus)
    assert row.waiting > 0
    assert row.waiting_bytes + unread(channel) >= row.waiting * (256 + size)
    # A run that is partly in the pipe, of one page here, counts as waiting until all of it is; and so does the record of a gap.
    assert capacity // 2 < backlog() <= capacity + 4096 + 64
    channel.close()


def test_shared_bytes_count_once(bus: Bus) -> None:
    """Four unread channels that hold the same 5 MiB hold 5 MiB, not 20, until the last of them is gone."""
    channels = [bus.subscribe() for _ in range(4)]
    for number in range(50):
        bus.publish(pattern(number, 100_000), timeout=DEADLINE)
    bus.flush(timeout=DEADLINE)
    stats = bus.stats()
    assert [row.waiting for row in stats.subscribers] == [50] * 4
    assert sum(row.waiting_bytes for row in stats.subscribers) > 20_000_000
    assert 5_000_000 < stats.memory < 5_500_000
    for channel in channels[:3]:
        channel.close()
        assert 5_000_000 < bus.stats().memory < 5_500_000
    channels[3].close()
    assert bus.stats().memory == 0


def growth(bus: Bus, before: int) -> int:
    """How many bytes the broker's memory has grown."""
    return psutil.Process(bus.stats().pid).memory_info().rss - before


def warm(bus: Bus) -> int:
    """The broker's memory once it has done all that it does."""
    with bus.subscribe(capacity=100_000) as channel:
        bus.publish_many(range(2000))
        take(channel, 2000)
    bus.flush(timeout=DEADLINE)
    return psutil.Process(bus.stats().pid).memory_info().rss


@pytest.mark.parametrize("overflow", ["block", "drop_oldest", "drop_newest", "disconnect"])
def test_tiny_messages_are_counted_with_their_overhead(bus: Bus, overflow: Policy) -> None:
    """Tiny messages for a channel that nobody opens take little more of the broker's memory than its capacity."""
    before = warm(bus)
    channel = bus.subscribe(overflow=overflow, capacity=MEBIBYTE)
    published = 0
    try:
        for _ in range(12_000):
            bus.publish(None, timeout=0.3)
            published += 1
    except TimedOut:
        assert overflow == "block"
    if overflow != "block":
        bus.flush(timeout=DEADLINE)
    assert growth(bus, before) < 8 * MEBIBYTE
    for row in bus.stats().subscribers:
        assert MEBIBYTE // 2 < row.waiting_bytes <= MEBIBYTE
        assert row.waiting <= MEBIBYTE // 256
    assert published == 12_000 or overflow == "block"
    channel.close()


def test_a_giant_message_again_and_again_to_a_full_channel(bus: Bus) -> None:
    """A large message that cannot be taken is not gathered in the broker, however often it is tried."""
    before = warm(bus)
    channel = bus.subscribe("t", capacity=20_000)
    channel.fileno()
    published = fill(bus, topic="t", timeout=0.2)
    giant = bytes(64 * MEBIBYTE)
    highest = 0
    for _ in range(5):
        with pytest.raises(TimedOut):
            bus.publish((-1, giant), topic="t", timeout=0.1)
        highest = max(highest, growth(bus, before))
    assert highest < 140 * MEBIBYTE
    assert [number for number, _ in take(channel, len(published))] == published
    with pytest.raises(TimedOut):
        channel.recv(timeout=0.05)


@pytest.mark.parametrize("overflow", [*DROPPING, "latest"])
def test_giant_messages_to_who_drops(bus: Bus, children: Children, fork: BaseContext, overflow: Policy) -> None:
    """Large messages, one after the other, leave a few of them in the broker's memory, and no more with each."""
    size = 4 * MEBIBYTE
    before = warm(bus)
    channel = bus.subscribe(overflow=overflow, capacity=20_000)
    reader = StoppedReader(channel, children, fork)
    grown = []
    for number in range(12):
        bus.publish((number, pattern(number, size)), timeout=DEADLINE)
        bus.flush(timeout=DEADLINE)
        assert bus.stats().memory < 3 * size
        grown.append(growth(bus, before))
    assert max(grown) < max(grown[:4]) + 2 * size
    bus.unsubscribe(channel)
    reader.go()
    events, missed = reader.result()
    assert sum(kind == "message" for kind, _ in events) + missed == 12


# --- arguments, and what comes with the channel -----------------------------------------------------------------------


def test_with_topic_under_each_policy(bus: Bus) -> None:
    """Gaps and the end are the same for a channel that gives the topic, too."""
    for overflow in POLICIES[1:]:
        channel = bus.subscribe("room:*", overflow=overflow, capacity=5000, with_topic=True)
        channel.fileno()
        bus.publish_many(range(200), topic="room:1")
        bus.flush(timeout=DEADLINE)
        bus.unsubscribe(channel)
        with contextlib.suppress(Overflowed):
            received = [topic for topic, _ in everything_but_gaps(channel)]
            assert set(received) == {"room:1"}
            assert len(received) + channel.missed == 200


def everything_but_gaps(channel: Channel[Any]) -> Iterator[Any]:
    """Yield each message up to the clean end."""
    ended = False
    while not ended:
        with contextlib.suppress(Lagged):
            yield from channel
            ended = True
