"""Messages in shared memory between real processes: a slow, stopped, killed or new reader neither loses nor spoils any."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Callable, Iterable
from itertools import count, islice
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from random import Random
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, ChannelInUse, connect
from mpbroadcast.client.shared_writer import SHARED_FROM
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.protocol.frames import PIPE_BUF
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS, LONGEST
from tests.support import large_workers
from tests.support.helpers import DEADLINE, Background, Children, answer, only_subscriber, rest, take, wait_until
from tests.support.large_workers import ReaderProcess, Size, number_of, publish_counted
from tests.support.victims import Counter, memories, shared_maps, written

Bus = Broadcaster[Any]
MakeReader = Callable[..., ReaderProcess]

pytestmark = pytest.mark.skipif(not available(), reason="there is no memory to share here")

RING = CHUNK * CHUNKS
RINGS = 4  # of one publisher at the most
SIZE = 16_000  # bytes of a usual message here
USUAL = Size(SIZE)
PRIME = 1 << 20  # the number of messages that only bring the ring into use
LAST = PRIME + 1  # the number of the last of them


def numbers(received: Iterable[Any]) -> list[int]:
    """Return the numbers of messages that must be whole, without those that bring a ring into use."""
    return [number for number in large_workers.numbers(received) if number < PRIME]


def prime(bus: Bus, *pids: int, channels: Iterable[Channel[Any]] = (), maps: int = 1, topic: str = "") -> None:
    """Publish until each of these processes has so many maps of rings; the channels, of this process, are read meanwhile.

    Nothing of it is left in them.
    """

    def ready() -> bool:
        bus.publish(USUAL.message(PRIME), topic=topic)
        for channel in channels:
            drained(channel)
        return all(shared_maps(pid) >= maps for pid in pids)

    wait_until(ready)
    bus.publish(Size(10).message(LAST), topic=topic)
    for channel in channels:
        while channel.recv(timeout=DEADLINE)[0] != LAST:
            pass


def drained(channel: Channel[Any]) -> list[Any]:
    """Return the messages that are there."""
    with contextlib.suppress(TimeoutError):
        return channel.recv_many(timeout=0)
    return []


def uses_ring(bus: Bus, channel: Channel[Any]) -> bool:
    """Return True if ten messages, which the channel takes, take next to nothing of this process's pipe."""
    before = written(os.getpid())
    for _ in range(10):
        bus.publish(USUAL.message(PRIME))
        assert number_of(channel.recv(timeout=DEADLINE)) == PRIME
    return written(os.getpid()) - before < SIZE


def all_numbers(reader: ReaderProcess) -> list[int]:
    """Return the numbers of all that it has read, up to the clean end."""
    found, end = reader.result()
    assert end == "EOFError"
    return [number for number in found if number < PRIME]


@pytest.fixture
def reader(bus: Bus, children: Children, fork: BaseContext) -> MakeReader:
    """Start processes that read all."""
    return lambda **options: ReaderProcess(bus.subscribe(**options), children, fork)


# ---------------------------------------------------------------------------------------------------- slow readers


def test_a_reader_that_is_stopped_killed_or_unopened_holds_up_no_other(bus: Bus, reader: MakeReader) -> None:
    """Readers stopped at four places of the ring: a fifth goes on; all get all, also one that is opened late or gets little."""
    late, quick, rare = bus.subscribe(), bus.subscribe(), bus.subscribe("rare")
    others = [reader() for _ in range(4)]
    prime(bus, os.getpid(), channels=[quick, rare], maps=3, topic="rare")
    prime(bus, *(other.pid for other in others), channels=[quick])
    fresh = count()
    large = Size(4 * SIZE)

    def publish(size: int) -> None:
        for number in islice(fresh, size // large.length):
            bus.publish(large.message(number), topic="" if number % 25 else "rare")
            assert number_of(quick.recv(timeout=DEADLINE)) == number

    for other in others:
        publish(RING // 6)
        other.stop()
    publish(3 * RING // 2)
    others[0].kill()
    for other in others[1:]:
        other.go()
    publish(RING // 2)
    wait_until(lambda: uses_ring(bus, quick))
    bus.flush(timeout=DEADLINE)
    for channel in (late, quick, rare, *(other.channel for other in others)):
        bus.unsubscribe(channel)
    total = list(range(next(fresh)))
    for other in others[1:]:
        assert all_numbers(other) == total
    assert numbers(rest(late)) == total
    assert numbers(rest(rare)) == total[::25]
    assert numbers(rest(quick)) == []


def test_a_full_ring_is_no_limit(bus: Bus, reader: MakeReader) -> None:
    """With all readers stopped, publishing goes on up to the capacity; nothing is lost, and then the ring is used again."""
    capacity = 2 * RING
    others = [reader(capacity=capacity), reader(capacity=capacity)]
    prime(bus, *(other.pid for other in others))
    for other in others:
        other.stop()
    published = 0
    with contextlib.suppress(TimeoutError):
        for published in count():
            bus.publish(USUAL.message(published), timeout=0.3)
    # The rest is in the ring, and in others if the broker is so slow that no chunk of it seems free.
    assert capacity * 0.7 < published * SIZE < capacity + RINGS * RING + (1 << 20)
    for other in others:
        other.go()
    with bus.subscribe() as channel:
        prime(bus, os.getpid(), channels=[channel], maps=2)
        wait_until(lambda: uses_ring(bus, channel))
    bus.flush(timeout=DEADLINE)
    for other in others:
        bus.unsubscribe(other.channel)
        assert all_numbers(other) == list(range(published))


def test_a_channel_that_has_been_read_blocks_no_publisher(bus: Bus) -> None:
    """However the broker learns that a full channel was read, also while another publisher begins to wait for it."""
    broker = bus.stats().pid
    size = Size(100_000)
    with (
        connect(bus.address) as one,
        connect(bus.address) as two,
        connect(bus.address) as small,
        bus.subscribe("all", capacity=4 << 20) as channel,
    ):
        channel.fileno()
        small.publish("", topic="none")
        small.flush(timeout=DEADLINE)

        def first() -> bool:
            for handle in (one, two):
                handle.publish(size.message(PRIME), topic="all")
                handle.flush(timeout=DEADLINE)
                drained(channel)
            return shared_maps(os.getpid()) >= 4

        for _ in range(3):
            wait_until(first)
            published = 0
            while not (row := bus.stats().subscribers[0]).stalls:
                handle = (one, two)[published % 2]
                handle.publish(size.message(published), topic="all")
                with contextlib.suppress(TimeoutError):
                    handle.flush(timeout=0)
                published += 1
            assert row.published
            os.kill(broker, signal.SIGSTOP)
            received = []
            while more := drained(channel):
                received += more
            asking = Background(bus.stats)  # which looks at what was read, before that lets any publisher go on
            asking.wait_until_blocked("stats")
            small.publish(Size(10).message(published), topic="all")
            os.kill(broker, signal.SIGCONT)
            asking.result()
            while len(numbers(received)) < published + 1:
                received.append(channel.recv(timeout=DEADLINE / 4))
            assert sorted(numbers(received)) == list(range(published + 1))


def test_unread_messages_of_an_unsubscribed_channel_are_kept(bus: Bus) -> None:
    """A flood does not spoil what an unsubscribed channel has not read yet; what a closed one has not read is used again."""
    flood, gone, closed = (bus.subscribe() for _ in range(3))
    prime(bus, os.getpid(), channels=[flood, gone, closed], maps=4)
    for number in range(20):
        bus.publish(USUAL.message(number))
        assert numbers(take(flood, 1)) == [number]
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(gone)
    closed.close()
    burst = RING // 2 // SIZE + 40  # unread, so that it takes more than half of the ring
    for _ in range(4):
        for number in range(burst):
            bus.publish(USUAL.message(number))
        assert numbers(take(flood, burst)) == list(range(burst))
    assert numbers(rest(gone)) == list(range(20))
    wait_until(lambda: uses_ring(bus, flood))


def test_every_size_comes_in_order(bus: Bus) -> None:
    """Around each size from which on a message takes another route."""
    channel = bus.subscribe()
    prime(bus, os.getpid(), channels=[channel], maps=2)
    limits = [SHARED_FROM, PIPE_BUF, CHUNK, LONGEST, RING]
    sizes = [60, *(limit + off for limit in limits for off in (-1, 0, 1)), 3 * CHUNK, 100, 5000]
    Random(1).shuffle(sizes)

    def publish() -> None:
        for number, size in enumerate(sizes):
            around = len(pickle.dumps(Size(size).message(number), 5)) - size
            one = Size(size - around).message(number)
            assert len(pickle.dumps(one, 5)) == size
            bus.publish(one)

    publishing = Background(publish)
    assert numbers(take(channel, len(sizes))) == list(range(len(sizes)))
    publishing.result()


# ------------------------------------------------------------------------------------------- the end of a publisher


def test_what_a_killed_publisher_had_published_is_delivered(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Killed at any moment: all that it had published comes from the ring after its death, in order, and nothing torn."""
    with bus.subscribe() as channel:
        broker = bus.stats().pid
        for attempt in range(3):
            counter = Counter()
            child = children(fork, publish_counted, bus, counter, [1000, 20_000, 3000, 100_000, 300_000])
            received: list[Any] = []
            while not shared_maps(os.getpid()):
                received += drained(channel)
            enough = counter.value + 20 + 11 * attempt
            while counter.value < enough:
                pass
            child.kill()
            child.join(DEADLINE)
            assert child.exitcode == -signal.SIGKILL
            published = counter.value
            wait_until(lambda: bus.stats().publishers == min(attempt, 1))  # noqa: B023  # this process is one
            bus.publish(Size(10).message(PRIME))
            while not received or received[-1][0] != PRIME:
                received += channel.recv_many(timeout=DEADLINE)
            got = numbers(received)
            assert got == list(range(len(got)))
            assert published <= len(got) <= published + 1
            wait_until(lambda: not drained(channel) and shared_maps(os.getpid()) == 0)
            wait_until(lambda: shared_maps(broker) == memories(broker) == 0)
            assert memories(os.getpid()) == 0


def test_a_publisher_that_closes_takes_its_memory_along(bus: Bus, reader: MakeReader) -> None:
    """Once all has been read, no process has a map or a descriptor of it: not the publisher, the broker, or a reader."""
    one = reader()
    pids = (os.getpid(), bus.stats().pid, one.pid)
    with connect(bus.address) as other:
        prime(other, *pids)
        for number, length in enumerate([SIZE, 2 * LONGEST, SIZE]):
            other.publish(Size(length).message(number))
    wait_until(lambda: [shared_maps(pid) + memories(pid) for pid in pids] == [0, 0, 0])
    bus.unsubscribe(one.channel)
    assert all_numbers(one) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------- forks

AMOUNT = 60


def publish_from(bus: Bus, source: int) -> None:
    """Publish messages of all sizes for which a ring is made, numbered from ``source`` on."""
    random = Random(source)
    for number in range(source, source + AMOUNT):
        bus.publish(Size(random.choice([100, 3000, 20_000, 20_000, 100_000, 200_000])).message(number))


def publish_after_a_look(bus: Bus, channel: Channel[Any], source: int, report: Connection) -> None:
    """In a child: the parent's channel is not for it, but it can publish, in a ring of its own."""
    try:
        channel.recv(timeout=0)
    except ChannelInUse as error:
        report.send(error.pid)
    publish_from(bus, source)
    report.send(shared_maps(os.getpid()))


def test_publisher_and_subscriber_fork_in_the_middle(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Parent, its threads, and children that are made meanwhile all publish, in rings of their own; none spoils another."""
    channel = bus.subscribe()
    prime(bus, os.getpid(), channels=[channel], maps=2)
    bus.publish(USUAL.message(PRIME))  # unread when it forks
    thread = Background(publish_from, bus, 0)
    reports = []
    for source in (1000, 2000):
        here, there = fork.Pipe()
        children(fork, publish_after_a_look, bus, channel, source, there)
        there.close()
        reports.append(here)
        publish_from(bus, 10 * source)
    sources = [0, 1000, 2000, 10_000, 20_000]
    found: list[int] = []
    while len(found) < len(sources) * AMOUNT:
        found += numbers(channel.recv_many(timeout=DEADLINE))
    for source in sources:
        assert [number for number in found if source <= number < source + AMOUNT] == list(range(source, source + AMOUNT))
    thread.result()
    for report in reports:
        assert answer(report) == os.getpid()
        assert answer(report) == 1
        report.close()
    channel.close()


def test_a_close_does_not_wait_for_messages_that_its_own_channel_has_not_read(bus: Bus, own_memory: None) -> None:
    """The pipe has room, and gets no more before some are read; the process that closes has the channel open itself."""
    channel = bus.subscribe()
    channel.poll(0)
    bus.publish_many([bytes(10_000)] * 100)
    bus.flush()
    assert 0 < only_subscriber(bus).delivered < 100
    Background(bus.close, None).result()
