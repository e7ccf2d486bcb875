"""Threads and signal handlers that share a handle, and publishers that wait because a backlog is full."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import psutil
import pytest

from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, ClosedError, TimedOut, connect, start_broadcaster, trap_points
from mpbroadcast.client import pipe_writer
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.pipe_writer import PipeWriter
from mpbroadcast.deadline import Deadline
from mpbroadcast.posix.descriptors import descendants, fork_lock, without_heirs
from mpbroadcast.posix.pipes import PipeEnd, new_pipe
from mpbroadcast.protocol.frames import PIPE_BUF, abort
from mpbroadcast.testing import drain
from tests.support.helpers import DEADLINE, Background, fill, pattern, take, wait_until
from tests.support.interrupting import Moment, before_line, interrupting

Bus = Broadcaster[Any]


def numbers_of(received: list[Any], source: str) -> list[int]:
    """Return the numbers of one source's messages ``(source, number, bytes)``, each of which must be whole."""
    numbers = [(number, data) for name, number, data in received if name == source]
    assert all(data == pattern(number, len(data)) for number, data in numbers)
    return [number for number, _ in numbers]


def test_no_thread_is_started(bus: Bus) -> None:
    """Publishing, subscribing and receiving start no thread in this process."""
    before = len(os.listdir("/proc/self/task"))
    with bus.subscribe() as channel:
        bus.publish_many(range(100))
        assert take(channel, 100) == list(range(100))
        bus.stats()
        assert len(os.listdir("/proc/self/task")) == before
        assert threading.active_count() <= before


def test_threads_share_one_handle(bus: Bus) -> None:
    """Threads publish, subscribe and request through one handle: no bytes and no replies are mixed."""
    counts = {20: 2000, 4090: 500, 100_000: 60}

    def publish(size: int) -> None:
        messages = ((str(size), number, pattern(number, size)) for number in range(counts[size]))
        assert bus.publish_many(messages, topic="all") == counts[size]

    def subscribe(name: str) -> None:
        for number in range(50):
            with bus.subscribe(name) as channel:
                bus.publish((name, number), topic=name)
                assert bus.stats().pid > 0
                assert channel.recv(timeout=DEADLINE) == (name, number)

    with bus.subscribe("all") as channel:
        threads = [Background(publish, size) for size in counts]
        threads += [Background(subscribe, name) for name in ("a", "b")]
        received = take(channel, sum(counts.values()))
        for thread in threads:
            thread.result()
        for size, count in counts.items():
            assert numbers_of(received, str(size)) == list(range(count))
    assert bus.stats().subscribers == ()


def test_threads_that_run_out_of_time_withdraw_only_their_own(bus: Bus, inline: None) -> None:
    """Threads whose large messages run out of time half-way: what raised never comes, what returned comes once, in order."""
    published: dict[str, list[int]] = {name: [] for name in "abc"}
    last = ("last", 0, b"")

    def publish(name: str) -> None:
        for number in range(60):
            with suppress(TimeoutError):
                bus.publish((name, number, pattern(number, 60_000 + number)), timeout=(number % 3) * 0.002)
                published[name].append(number)

    with bus.subscribe(capacity=300_000) as channel:
        receiving = Background(list, iter(partial(channel.recv, DEADLINE), last))
        threads = [Background(publish, name) for name in published]
        for thread in threads:
            thread.result()
        bus.publish(last, timeout=DEADLINE)
        received = receiving.result()
    assert sum(map(len, published.values())) < 3 * 60
    for name, numbers in published.items():
        assert numbers_of(received, name) == numbers
    wait_until(lambda: bus.stats().memory == 0)


@contextmanager
def handler(function: Callable[..., Any], *numbers: int) -> Iterator[None]:
    """Handle signals by this function for the length of a block."""
    before = {number: signal.signal(number, function) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@pytest.mark.parametrize("size", [20, 5000, 30_000])
def test_signal_handlers_publish_in_the_middle_of_publishes(bus: Bus, size: int) -> None:
    """Signals that interrupt a publish and the handlers of other signals, each publishing: all come exactly once, and whole."""
    signals = depth = deepest = count = 0

    def publish_too(*_: Any) -> None:
        nonlocal signals, depth, deepest
        if depth > 5:
            return
        depth += 1
        deepest = max(deepest, depth)
        number, signals = signals, signals + 1
        bus.publish(("handler", number, pattern(number, size)))
        depth -= 1

    ended = threading.Event()

    def send_signals() -> None:
        while not ended.wait(0.0001):
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                signal.pthread_kill(threading.main_thread().ident or 0, number)

    with bus.subscribe(capacity=1 << 30) as channel:
        with handler(publish_too, signal.SIGUSR1, signal.SIGUSR2):
            sending = Background(send_signals)
            while signals < 100 or deepest < 2:
                bus.publish(("main", count, pattern(count, size)))
                count += 1
            ended.set()
            sending.result()
        received = drain(bus, channel)
    assert numbers_of(received, "main") == list(range(count))
    assert sorted(numbers_of(received, "handler")) == list(range(signals))
    assert {len(data) for _, _, data in received} == {size}


@pytest.mark.parametrize("size", [1000, 100_000])
def test_signal_handler_publishes_while_publish_waits(bus: Bus, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler may publish while its own thread waits for room: no deadlock, and both messages come, each once."""
    channel = bus.subscribe(capacity=2 * size + 50_000)
    published = fill(bus, size=size)
    receiving: list[Background] = []

    def publish_too(*_: Any) -> None:
        receiving.append(Background(take, channel, len(published) + 2))
        bus.publish(("handler", bytes(size)))

    def reach(name: str, subject: object = None) -> None:
        if name == "waiting for room" and not receiving:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(trap_points, "reach", reach)
    with handler(publish_too, signal.SIGUSR1):
        bus.publish(("main", bytes(size)), timeout=DEADLINE)
    names = [name for name, _ in receiving[0].result()]
    assert names[:-2] == published
    assert sorted(names[-2:]) == ["handler", "main"]


def test_a_handler_publishes_in_the_middle_of_a_call_that_keeps_forks_out(bus: Bus) -> None:
    """While it waits for room, another thread receives what needs a descriptor."""
    channel = bus.subscribe(capacity=5_000_000)
    channel.poll(0)
    sizes = [3_000_000, *[1_000] * 10_000]
    with handler(lambda *_: bus.publish_many(map(bytes, sizes)), signal.SIGUSR1), fork_lock():
        receiving = Background(take, channel, len(sizes))
        signal.raise_signal(signal.SIGUSR1)
    assert list(map(len, receiving.result())) == sizes


@pytest.mark.parametrize("size", [100, 3000, 100_000, 3 << 20])
def test_publish_that_ran_out_of_time_is_never_delivered(bus: Bus, size: int) -> None:
    """A full backlog makes ``publish`` wait, and ``TimeoutError`` means: not published now, and never will be."""
    channel = bus.subscribe(capacity=200_000)
    published = fill(bus, size=size)
    for timeout in (0, 0.01):
        with pytest.raises(TimedOut):
            bus.publish((-1, bytes(size)), timeout=timeout)
    receiving = Background(take, channel, len(published) + 1)
    bus.publish(("last", b""), timeout=DEADLINE)
    assert [number for number, _ in receiving.result()] == [*published, "last"]
    assert drain(bus, channel) == []


@pytest.mark.parametrize("call", ["requests", "close", "detach"])
def test_other_calls_work_while_publish_waits(bus: Bus, call: str) -> None:
    """Requests of other threads are answered; ``close`` ends a publish that waits, with an error, and no other handle's."""
    full, other = bus.subscribe("full", capacity=50_000), bus.subscribe("other")
    full.fileno()
    handle = connect(bus.address) if call == "detach" else bus
    published = fill(handle, topic="full")
    publishing = Background(handle.publish, ("waited", bytes(1000)), topic="full")
    publishing.wait_until_blocked("publish")
    if call == "requests":
        assert [row.waiting > 0 for row in bus.stats().subscribers] == [True, False]
        with bus.subscribe("more"):
            assert len(bus.stats().subscribers) == 3
        bus.unsubscribe(other)
        assert [row.topics for row in bus.stats().subscribers] == [("full",)]
        assert publishing.is_alive()
        bus.unsubscribe(full)
        assert publishing.result() is None
        assert bus.stats().subscribers == ()
        return
    broker = psutil.Process(bus.stats().pid)
    handle.close(timeout=1.0)
    assert isinstance(publishing.error(), (ClosedError, BrokerLost))
    assert broker.is_running() == (call == "detach")
    if call == "detach":
        receiving = Background(take, full, len(published) + 1)
        bus.publish(("goes on", b""), topic="full", timeout=DEADLINE)
        assert [name for name, _ in receiving.result()] == [*published, "goes on"]
    full.close()
    other.close()


def test_full_backlog_stalls_only_its_own_publishers(bus: Bus) -> None:
    """A publisher whose messages the full channel does not get goes on, through a connection of its own."""
    full, other = bus.subscribe("full", capacity=50_000), bus.subscribe("other")
    published = fill(bus, topic="full")
    with connect(bus.address) as second:
        for number in range(500):
            second.publish(number, topic="other", timeout=DEADLINE)
            assert other.recv(timeout=DEADLINE) == number
        with pytest.raises(TimeoutError):
            bus.publish((-1, bytes(1000)), topic="full", timeout=0)
    assert [number for number, _ in take(full, len(published))] == published


@pytest.mark.parametrize("late", ["channel", "topic"])
def test_what_waits_for_a_full_backlog_was_published_before(bus: Bus, late: str) -> None:
    """A new channel, or a new topic, brings nothing of what its handle had published before, though it waited still."""
    full, other = bus.subscribe("t", capacity=50_000), bus.subscribe("other")
    published = fill(bus, topic="t")
    if late == "channel":
        other = bus.subscribe("t")
    else:
        other.subscribe("t")
    reading = Background(take, full, len(published) + 1)
    bus.publish(("after", b""), topic="t", timeout=DEADLINE)
    assert [name for name, _ in reading.result()] == [*published, "after"]
    assert [name for name, _ in drain(bus, other)] == ["after"]


def test_broker_does_not_grow_under_a_slow_subscriber(bus: Bus) -> None:
    """While 100 times the capacity passes through, the broker's memory stays where it was."""
    count, size = 3200, 16_000
    with bus.subscribe(capacity=500_000) as channel:
        channel.fileno()
        memory = psutil.Process(bus.stats().pid).memory_info
        highest = before = memory().rss
        publishing = Background(bus.publish_many, ((number, pattern(number, size)) for number in range(count)))
        for expected in range(count):
            assert channel.recv(timeout=DEADLINE) == (expected, pattern(expected, size))
            if expected % 20 == 0:
                highest = max(highest, memory().rss)
        assert publishing.result() == count
        assert highest - before < 32_000_000
        assert channel.missed == 0


@pytest.mark.parametrize("count", range(12))
def test_threads_that_withdraw_messages_at_once_do_not_disturb_each_other(count: int) -> None:
    """Messages that were given up while the pipe was full are withdrawn by whichever thread writes next."""
    reader, end = new_pipe(PIPE_BUF)
    os.write(end, bytes(PIPE_BUF))
    writer = PipeWriter(BrokerClient(""), cast(Any, None), PipeEnd(end), 1)
    writer.due_aborts += (1, 2)
    os.read(reader, PIPE_BUF)
    moment, others = before_line(count, pipe_writer.__file__), list[Background]()

    def another_comes_first(frame: FrameType, event: str) -> bool:
        if moment.is_here(frame, event) and not others:
            others.append(Background(writer.write, b"other", Deadline(0), []))
            others[0].result()
        return False

    interrupting(Moment(another_comes_first), writer.write, b"one", Deadline(0), [])
    written = os.read(reader, PIPE_BUF)
    os.close(reader)
    assert written.endswith(b"one")
    assert all(abort(message_id) in written for message_id in (1, 2))


def test_threads_subscribe_while_another_one_closes(leaves_nothing: None) -> None:
    """Their channels do not disturb it."""
    bus: Bus = start_broadcaster()
    channels = [bus.subscribe() for _ in range(2)]

    def subscribe() -> None:
        with suppress(BroadcastError):
            channels.append(bus.subscribe())

    def another_comes_first(frame: FrameType, event: str) -> bool:
        if "weakref" in frame.f_code.co_filename and frame.f_code.co_name in ("__iter__", "valuerefs"):
            Background(subscribe).result()
        return False

    interrupting(Moment(another_comes_first), bus.close)
    assert bus.closed


def test_a_thread_publishes_for_the_first_time_while_another_one_closes(bus: Bus) -> None:
    """The close ends it, though it waits for room."""
    channel = bus.subscribe(capacity=1)
    fill(bus)
    other: Bus = connect(bus.address)
    publishing: list[Background] = []

    def another_comes_first(frame: FrameType, event: str) -> bool:
        if "limit" in frame.f_locals and not publishing:
            publishing.append(Background(other.publish_many, [bytes(1000)] * 1000))
            publishing[0].wait_until_blocked("block")
        return False

    interrupting(Moment(another_comes_first), other.close)
    assert isinstance(publishing[0].error(), ClosedError)
    channel.close()


def test_threads_start_brokers_at_once() -> None:
    """None of them counts as a process that could open a channel of this one."""
    begun, ended = threading.Event(), threading.Event()
    heirs = descendants()

    def fork() -> None:
        begun.set()
        assert ended.wait(DEADLINE)
        if (child := os.fork()) == 0:
            signal.pause()
        children.append(child)

    children: list[int] = []
    forking = Background(without_heirs, fork)
    assert begun.wait(DEADLINE)
    without_heirs(lambda: None)
    ended.set()
    forking.result()
    is_heir = heirs.live()
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    assert not is_heir


@pytest.mark.parametrize("is_handler", [False, True], ids=["thread", "handler"])
def test_a_handle_is_closed_twice_at_once(is_handler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread returns when it is closed; a signal handler closes it itself."""
    closing: list[Background] = []

    def reach(name: str, subject: object = None) -> None:
        if name == "ending the broker" and not closing:
            closing.append(Background(bus.close) if not is_handler else Background(int))
            if is_handler:
                bus.close()

    bus: Bus = start_broadcaster()
    pid = bus.stats().pid
    monkeypatch.setattr(trap_points, "reach", reach)
    bus.close()
    closing[0].result()
    assert not psutil.pid_exists(pid)
