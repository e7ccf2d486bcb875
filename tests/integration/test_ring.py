"""Messages in shared memory between real processes: who is slow, stopped, killed or new neither loses nor spoils any."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from random import Random
from typing import Any, NamedTuple

import pytest

from mpbroadcast import Broadcaster, BroadcastError, Channel, ChannelInUse, connect, start_broadcaster
from mpbroadcast.client.shared_writer import SHARED_FROM
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.protocol.frames import PIPE_BUF
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS, LONGEST
from tests.support.helpers import DEADLINE, Background, Children, answer, only_subscriber, pattern, rest, take, wait_until
from tests.support.victims import Counter, memories, shared_maps, stopped, written

Bus = Broadcaster[Any]

pytestmark = pytest.mark.skipif(not available(), reason="there is no memory to share here")

RING = CHUNK * CHUNKS
RINGS = 4  # of one publisher at the most
SIZE = 16_000  # bytes of a usual message here
PRIME = "prime"  # the source of messages that only bring the ring into use
LAST = 1 << 20  # the number of the last of them


def message(number: int, size: int = SIZE, source: Any = "") -> tuple[Any, int, bytes]:
    """Return a message with its source and number, in which that a wrong or torn byte shows in."""
    return source, number, pattern(number, size)


def checked(received: Iterable[Any]) -> list[tuple[Any, int]]:
    """Sources and numbers of messages that must be whole, without those that bring a ring into use."""
    found = []
    for source, number, data in received:
        assert data == pattern(number, len(data)), f"message {number} of {source!r} is spoilt"
        if source != PRIME:
            found.append((source, number))
    return found


def numbers(received: Iterable[Any]) -> list[int]:
    """The numbers of these messages, each of which must be whole."""
    return [number for _, number in checked(received)]


def prime(bus: Bus, *pids: int, channels: Iterable[Channel[Any]] = (), maps: int = 1, topic: str = "") -> None:
    """Publish until each of these processes has so many maps of rings; the channels, of this process, are read meanwhile.

    Nothing of it is left in them.
    """

    def ready() -> bool:
        bus.publish(message(0, source=PRIME), topic=topic)
        for channel in channels:
            drained(channel)
        return all(shared_maps(pid) >= maps for pid in pids)

    wait_until(ready)
    bus.publish(message(LAST, 10, PRIME), topic=topic)
    for channel in channels:
        while True:
            (one,) = take(channel, 1)
            if LAST in (one[1], one[-1][1]):  # the second, if it came with its topic
                break


def drained(channel: Channel[Any]) -> list[Any]:
    """What is there."""
    with contextlib.suppress(TimeoutError):
        return channel.recv_many(timeout=0)
    return []


def uses_ring(bus: Bus, channel: Channel[Any]) -> bool:
    """Whether ten messages, which the channel takes, take next to nothing of this process's pipe."""
    before = written(os.getpid())
    for _ in range(10):
        bus.publish(message(0, source=PRIME))
        checked(take(channel, 1))
    return written(os.getpid()) - before < SIZE


def read_all(channel: Channel[Any], report: Connection) -> None:
    """Open it, report that, and check all that comes; send home the sources and numbers, or what was wrong."""
    try:
        channel.fileno()
        report.send(os.getpid())
        found = []
        while True:
            try:
                found += checked(channel.recv_many(timeout=DEADLINE))
            except EOFError:
                break
        report.send(found)
    except BaseException as error:
        report.send(repr(error))


class Reader(NamedTuple):
    """A process that reads all."""

    pid: int
    report: Connection
    process: BaseProcess
    channel: Channel[Any]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Stop it, and wait until it is."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: stopped(self.pid))

    def numbers(self) -> list[int]:
        """All that it has read."""
        found = answer(self.report)
        assert isinstance(found, list), found
        return [number for _, number in found]


@pytest.fixture
def reader(bus: Bus, children: Children, fork: BaseContext) -> Iterator[Callable[..., Reader]]:
    """Starts processes that read all."""
    started: list[Reader] = []

    def start(*topics: str, **options: Any) -> Reader:
        channel = bus.subscribe(*topics, **options)
        here, there = fork.Pipe()
        process = children(fork, read_all, channel, there)
        there.close()
        started.append(Reader(answer(here), here, process, channel))
        return started[-1]

    yield start
    for one in started:
        if one.process.is_alive():
            one.signal(signal.SIGCONT)
        one.report.close()


# ---------------------------------------------------------------------------------------------------- slow readers


def next_of(channel: Channel[Any]) -> int:
    """The number of its next message."""
    while not (found := numbers(take(channel, 1))):
        pass
    return found[0]


def test_who_is_stopped_killed_or_not_there_holds_up_nobody(bus: Bus, reader: Callable[..., Reader]) -> None:
    """Readers stopped at four places of the ring: a fifth goes on; all get all, also one that is opened late or gets little."""
    late, quick, rare = bus.subscribe(), bus.subscribe(), bus.subscribe("rare")
    others = [reader() for _ in range(4)]
    prime(bus, os.getpid(), channels=[quick, rare], maps=3, topic="rare")
    prime(bus, *(other.pid for other in others), channels=[quick])
    fresh = count()

    def publish(size: int) -> None:
        for number in islice(fresh, size // SIZE):
            bus.publish(message(number), topic="" if number % 100 else "rare")
            assert next_of(quick) == number

    for other in others:
        publish(RING // 6)
        other.stop()
    publish(2 * RING)
    others[0].signal(signal.SIGKILL)
    others[0].process.join(DEADLINE)
    for other in others[1:]:
        other.signal(signal.SIGCONT)
    publish(RING // 2)
    wait_until(lambda: uses_ring(bus, quick))
    bus.flush(timeout=DEADLINE)
    for channel in (late, quick, rare, *(other.channel for other in others)):
        bus.unsubscribe(channel)
    total = list(range(next(fresh)))
    for other in others[1:]:
        assert other.numbers() == total
    assert numbers(rest(late)) == total
    assert numbers(rest(rare)) == total[::100]
    assert numbers(rest(quick)) == []


def test_a_full_ring_is_no_limit(bus: Bus, reader: Callable[..., Reader]) -> None:
    """With all readers stopped, publishing goes on up to the capacity; nothing is lost, and then the ring is used again."""
    capacity = 2 * RING
    others = [reader(capacity=capacity), reader(capacity=capacity)]
    prime(bus, *(other.pid for other in others))
    for other in others:
        other.stop()
    published = 0
    with contextlib.suppress(TimeoutError):
        for published in count():
            bus.publish(message(published), timeout=0.3)
    # The rest is in the ring, and in others if the broker is so slow that no chunk of it seems free.
    assert capacity * 0.7 < published * SIZE < capacity + RINGS * RING + (1 << 20)
    for other in others:
        other.signal(signal.SIGCONT)
    with bus.subscribe() as channel:
        prime(bus, os.getpid(), channels=[channel], maps=2)
        wait_until(lambda: uses_ring(bus, channel))
    bus.flush(timeout=DEADLINE)
    for other in others:
        bus.unsubscribe(other.channel)
        assert other.numbers() == list(range(published))


def test_who_has_read_all_is_not_waited_for(bus: Bus) -> None:
    """However the broker learns that a full channel was read, also while another one begins to wait for it: all go on."""
    broker = bus.stats().pid
    size = 100_000
    with (
        connect(bus.address) as one,
        connect(bus.address) as two,
        connect(bus.address) as small,
        bus.subscribe("all", capacity=4 << 20) as channel,
    ):
        channel.fileno()
        small.publish(message(0, 10), topic="nobody")
        small.flush(timeout=DEADLINE)

        def first() -> bool:
            for handle in (one, two):
                handle.publish(message(0, size, PRIME), topic="all")
                handle.flush(timeout=DEADLINE)
                drained(channel)
            return shared_maps(os.getpid()) >= 4

        for _ in range(3):
            wait_until(first)
            published = 0
            while not (row := bus.stats().subscribers[0]).stalls:
                handle = (one, two)[published % 2]
                handle.publish(message(published, size), topic="all")
                with contextlib.suppress(TimeoutError):
                    handle.flush(timeout=0)
                published += 1
            assert row.published
            os.kill(broker, signal.SIGSTOP)
            received = []
            while more := drained(channel):
                received += more
            asking = Background(bus.stats)  # which looks at what was read, before that lets anybody go on
            asking.wait_until_blocked("stats")
            small.publish(message(published, 10), topic="all")
            os.kill(broker, signal.SIGCONT)
            asking.result()
            while len(numbers(received)) < published + 1:
                received.append(channel.recv(timeout=DEADLINE / 4))
            assert sorted(numbers(received)) == list(range(published + 1))


def test_what_is_unread_is_kept_for_who_was_unsubscribed(bus: Bus) -> None:
    """A flood does not spoil what an unsubscribed channel has not read yet; what a closed one has not read is used again."""
    flood, gone, closed = (bus.subscribe() for _ in range(3))
    prime(bus, os.getpid(), channels=[flood, gone, closed], maps=4)
    for number in range(20):
        bus.publish(message(number))
        assert next_of(flood) == number
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(gone)
    closed.close()
    burst = RING // 2 // SIZE + 40  # unread, so that it takes more than half of the ring
    for _ in range(4):
        for number in range(burst):
            bus.publish(message(number))
        assert [next_of(flood) for _ in range(burst)] == list(range(burst))
    assert numbers(rest(gone)) == list(range(20))
    wait_until(lambda: uses_ring(bus, flood))


# ------------------------------------------------------------------------------------------------------ every size


def sized(number: int, size: int) -> tuple[str, int, bytes]:
    """A message whose pickle has that many bytes."""
    length = 2 * size - len(pickle.dumps(message(number, size), 5))
    assert len(pickle.dumps(message(number, length), 5)) == size
    return message(number, length)


def test_every_size_comes_in_its_place(bus: Bus) -> None:
    """Around each size from which on a message goes another way: whole, in order, with topics and exclusions."""
    everything, excluded, some = bus.subscribe(with_topic=True), bus.subscribe(), bus.subscribe("even")
    prime(bus, os.getpid(), channels=[everything, excluded], maps=3)
    limits = [SHARED_FROM, PIPE_BUF, CHUNK, LONGEST, RING]
    sizes = [60, *(limit + off for limit in limits for off in (-1, 0, 1)), 3 * CHUNK]
    Random(1).shuffle(sizes)
    messages = [sized(number, size) for number, size in enumerate([*sizes, 100, 5000])]

    def publish() -> None:
        for one in messages:
            number = one[1]
            bus.publish(one, topic="odd" if number % 2 else "even", exclude=None if number % 3 else excluded)

    publishing = Background(publish)
    got = [one for one in take(everything, len(messages)) if one[1][0] != PRIME]
    publishing.result()
    assert [topic for topic, _ in got] == ["even" if number % 2 == 0 else "odd" for number in range(len(messages))]
    assert numbers(one for _, one in got) == list(range(len(messages)))
    assert numbers(take(some, (len(messages) + 1) // 2)) == list(range(0, len(messages), 2))
    wanted = [number for number in range(len(messages)) if number % 3]
    assert numbers(take(excluded, len(wanted))) == wanted
    bus.flush()
    assert not any(channel.poll() for channel in (everything, excluded, some))


# ------------------------------------------------------------------------------------------- the end of a publisher


def wait_for_publishers(bus: Bus, amount: int) -> None:
    """Wait until the broker has so many."""
    wait_until(lambda: bus.stats().publishers == amount)


def publish_for_ever(bus: Bus, counter: Counter, seed: int) -> None:
    """Publish numbered messages, and count those whose ``publish`` has returned."""
    random = Random(seed)
    for number in count():
        bus.publish(message(number, random.choice([1000, 3000, 20_000, 100_000, 300_000])))
        counter.value = number + 1


def test_what_a_killed_publisher_had_published_is_delivered(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Killed at any moment: all that it had published comes from the ring after its death, in order, and nothing torn."""
    with bus.subscribe() as channel:
        broker = bus.stats().pid
        for attempt in range(3):
            counter = Counter()
            child = children(fork, publish_for_ever, bus, counter, attempt)
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
            wait_for_publishers(bus, min(attempt, 1))  # this process is one
            bus.publish(message(0, 10, PRIME))
            while not received or received[-1][0] != PRIME:
                received += channel.recv_many(timeout=DEADLINE)
            got = numbers(received)
            assert got == list(range(len(got)))
            assert published <= len(got) <= published + 1
            wait_until(lambda: not drained(channel) and shared_maps(os.getpid()) == 0)
            wait_until(lambda: shared_maps(broker) == memories(broker) == 0)
            assert memories(os.getpid()) == 0


def test_a_publisher_that_closes_takes_its_memory_along(bus: Bus, reader: Callable[..., Reader]) -> None:
    """Once all has been read, no process has a map or a descriptor of it: not the publisher, the broker, or a reader."""
    one = reader()
    pids = (os.getpid(), bus.stats().pid, one.pid)
    with connect(bus.address) as other:
        prime(other, *pids)
        for number, size in enumerate([SIZE, 2 * LONGEST, SIZE]):
            other.publish(message(number, size))
    wait_until(lambda: [shared_maps(pid) + memories(pid) for pid in pids] == [0, 0, 0])
    bus.unsubscribe(one.channel)
    assert one.numbers() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------- forks


def publish_from(bus: Bus, source: str, amount: int) -> None:
    """Publish this many messages of every kind of size."""
    random = Random(source)
    for number in range(amount):
        bus.publish(message(number, random.choice([100, 3000, 20_000, 20_000, 100_000, 600_000]), source))


def publish_after_a_look(bus: Bus, channel: Channel[Any], source: str, amount: int, report: Connection) -> None:
    """In a child: the parent's channel is not for it, but it can publish, in a ring of its own."""
    try:
        channel.recv(timeout=0)
    except ChannelInUse as error:
        report.send(error.pid)
    publish_from(bus, source, amount)
    report.send(shared_maps(os.getpid()))


def test_publisher_and_subscriber_fork_in_the_middle(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Parent, its threads, and children that are made meanwhile all publish, in rings of their own; none spoils another."""
    channel = bus.subscribe()
    prime(bus, os.getpid(), channels=[channel], maps=2)
    bus.publish(message(0, source=PRIME))  # unread when it forks
    amount = 60  # nobody reads meanwhile
    thread = Background(publish_from, bus, "thread", amount)
    reports = []
    for name in ("first", "second"):
        here, there = fork.Pipe()
        children(fork, publish_after_a_look, bus, channel, name, amount, there)
        there.close()
        reports.append(here)
        publish_from(bus, f"parent of {name}", amount)
    found = by_source([])
    sources = ["thread", "first", "second", "parent of first", "parent of second"]
    while sum(map(len, found.values())) < len(sources) * amount:
        by_source(channel.recv_many(timeout=DEADLINE), found)
    assert found == {source: list(range(amount)) for source in sources}
    thread.result()
    for report in reports:
        assert answer(report) == os.getpid()
        assert answer(report) == 1
        report.close()
    channel.close()


def by_source(received: Iterable[Any], found: dict[Any, list[int]] | None = None) -> dict[Any, list[int]]:
    """The numbers of each source, behind those that were there already."""
    result: dict[Any, list[int]] = {} if found is None else found
    for source, number in checked(received):
        result.setdefault(source, []).append(number)
    return result


# -------------------------------------------------------------------------------------------------------- all at once

TOPICS = ("a", "b", "c", "rare")


def soak_size(random: Random) -> int:
    return int(random.choice([50, 3000, 3000, 20_000, 20_000, 100_000, 400_000, 2_500_000 if random.random() < 0.1 else 1900]))


def soak_publish(bus: Bus, name: str, seed: int, stop: Counter, report: Connection | None) -> None:
    """Publish ``(name and topic, number, pattern)`` until ``stop`` is set; fork now and then, and let the child do it, too."""
    random = Random(seed)
    following = dict.fromkeys(TOPICS, 0)
    forks: list[int] = []

    def publish(topic: str, size: int) -> None:
        bus.publish(message(following[topic], size, (name, topic)), topic=topic)
        following[topic] += 1

    while not stop.value if report is not None else following["a"] < 30:
        publish("rare" if random.random() < 0.01 else random.choice("abc"), soak_size(random))
        if report is not None and random.random() < 0.001:
            pid = os.fork()
            if not pid:
                with contextlib.suppress(BroadcastError):
                    soak_publish(bus, f"{name}.{len(forks)}", random.randrange(1 << 30), stop, None)
                os._exit(0)
            forks.append(pid)
    for topic in TOPICS:
        publish(topic, 3000)
    for pid in forks:
        os.waitpid(pid, 0)
    if report is not None:
        bus.flush()
        report.send({(name, topic): number - 1 for topic, number in following.items()})


def soak_read(channel: Channel[Any], seed: int, report: Connection) -> None:
    """Check that each message is whole and follows the one before it; send home the last one of each source."""
    random = Random(seed)
    last: dict[Any, int] = {}
    received = 0
    try:
        while True:
            for source, number, data in channel.recv_many(random.choice([None, 1, 7]), timeout=2 * DEADLINE):
                assert data == pattern(number, len(data)), f"message {number} of {source} is spoilt"
                assert number == last.get(source, number - 1) + 1, f"{number} of {source} came behind {last[source]}"
                last[source] = number
                received += 1
            if random.random() < 0.002:
                time.sleep(random.choice([0.001, 0.05]))
    except EOFError:
        report.send((received, last))
    except BaseException as error:
        report.send(repr(error))


@pytest.mark.soak
@pytest.mark.timeout(int(float(os.environ.get("MPBROADCAST_SOAK", "3"))) + 120)
def test_all_at_once(children: Children, fork: BaseContext) -> None:
    """Random sizes, topics, kills, stops and forks, for ``MPBROADCAST_SOAK`` seconds: nothing is lost, doubled or spoilt."""
    seconds = float(os.environ.get("MPBROADCAST_SOAK", "1.5"))
    seed = int(os.environ.get("MPBROADCAST_SEED", time.time_ns() % 1_000_000_007))
    print(f"MPBROADCAST_SEED={seed}")
    random = Random(seed)
    stop = Counter()
    names = count()
    received = 0
    publishers: list[tuple[BaseProcess, Connection]] = []
    readers: list[tuple[BaseProcess, Connection, tuple[str, ...], Channel[Any]]] = []
    with start_broadcaster() as bus:

        def add_publisher() -> None:
            here, there = fork.Pipe()
            publishers.append(
                (children(fork, soak_publish, bus, f"p{next(names)}", random.randrange(1 << 30), stop, there), here)
            )
            there.close()

        def add_reader() -> None:
            here, there = fork.Pipe()
            topics = random.choice([(), (), ("a", "rare"), ("rare",), ("b", "c")])
            channel = bus.subscribe(*topics, capacity=random.choice([64, 16, 5]) << 20)
            process = children(fork, soak_read, channel, random.randrange(1 << 30), there)
            readers.append((process, here, topics or TOPICS, channel))
            there.close()

        def pids() -> list[int]:
            return [process.pid or 0 for process in (*(one[0] for one in publishers), *(one[0] for one in readers))]

        for _ in range(2):
            add_publisher()
            add_reader()
        add_reader()
        stopped: list[int] = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(random.uniform(0.0, 0.2))
            for _, report, *_ in readers:
                assert not report.poll(0), report.recv()
            what = random.random()
            if what < 0.15:
                process, report = publishers.pop(random.randrange(len(publishers)))
                process.kill()
                report.close()
                add_publisher()
            elif what < 0.3:
                process, report, _, channel = readers.pop(random.randrange(len(readers)))
                if random.random() < 0.5:
                    process.kill()
                else:
                    bus.unsubscribe(channel)  # it has its end, when it goes on
                    os.kill(process.pid or 0, signal.SIGCONT)
                    sent = answer(report, 2 * DEADLINE)
                    assert isinstance(sent, tuple), sent
                    received += sent[0]
                report.close()
                del channel  # a reader that was killed before it had opened its channel leaves it to this process
                add_reader()
            elif what < 0.6:
                stopped.append(random.choice(pids()))
                os.kill(stopped[-1], signal.SIGSTOP)
            else:
                for pid in stopped:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                stopped.clear()
        for pid in pids():
            os.kill(pid, signal.SIGCONT)
        stop.value = 1
        finals: dict[Any, int] = {}
        for _, report in publishers:
            finals |= answer(report, 3 * DEADLINE)
            report.close()
        for *_, channel in readers:
            bus.unsubscribe(channel)
        for _, report, topics, _ in readers:
            sent = answer(report, 3 * DEADLINE)
            assert isinstance(sent, tuple), sent
            assert {source: sent[1].get(source) for source in finals if source[1] in topics} == {
                source: number for source, number in finals.items() if source[1] in topics
            }
            received += sent[0]
            report.close()
    print(f"{received} messages")
    assert received


def test_a_close_does_not_wait_for_messages_that_its_own_channel_has_not_read(bus: Bus, own_memory: None) -> None:
    """The pipe has room, and gets no more before some are read; the process that closes has the channel open itself."""
    channel = bus.subscribe()
    channel.poll(0)
    bus.publish_many([bytes(10_000)] * 100)
    bus.flush()
    assert 0 < only_subscriber(bus).delivered < 100
    Background(bus.close, None).result()
