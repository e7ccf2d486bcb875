"""Threads and signal handlers that share a handle, and publishers that wait because a backlog is full."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, BrokerLost, ClosedError, TimedOut, connect
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    everything,
    fill,
    pattern,
    readable,
    take,
    wait_until,
)

Bus = Broadcaster[Any]
MEBIBYTE = 1_048_576

Seen = list[tuple[str, int, int]]


def numbers_of(seen: Seen, source: str) -> list[int]:
    """The numbers that came from one source, in the order in which they came."""
    return [number for name, number, _ in seen if name == source]


def subscribe_elsewhere(bus: Bus, children: Children, context: BaseContext) -> Callable[[], Seen]:
    """Start a process that receives numbered messages; the returned function stops it and says what it has seen."""
    results, theirs = context.Pipe()
    children(context, workers.receive_numbered, bus.subscribe(), theirs)
    assert answer(results) == "open"

    def stop() -> Seen:
        bus.publish(("stop", 0, b""))
        seen: Seen = answer(results, 2 * DEADLINE)
        return seen

    return stop


# --- threads ----------------------------------------------------------------------------------------------------------


def test_no_thread_is_started(bus: Bus) -> None:
    """Publishing, subscribing and receiving start no thread in this process."""
    before = len(os.listdir("/proc/self/task"))
    channel = bus.subscribe()
    bus.publish_many(range(100))
    assert take(channel, 100) == list(range(100))
    bus.stats()
    assert len(os.listdir("/proc/self/task")) == before
    assert threading.active_count() <= before
    channel.close()


def test_threads_share_one_handle(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Threads that publish through one handle, small and in pieces, mix no bytes and keep each its own order."""
    stop = subscribe_elsewhere(bus, children, fork)
    sizes = {"small": 20, "page": 4090, "pieces": 100_000}
    counts = {"small": 2000, "page": 500, "pieces": 60}

    def publish(name: str) -> None:
        if name == "small":
            assert bus.publish_many((name, number, pattern(number, 20)) for number in range(counts[name])) == counts[name]
            return
        for number in range(counts[name]):
            bus.publish((name, number, pattern(number, sizes[name])))

    for thread in [Background(publish, name) for name in sizes]:
        thread.result(3 * DEADLINE)
    seen = stop()
    for name, size in sizes.items():
        assert numbers_of(seen, name) == list(range(counts[name]))
        assert {length for source, _, length in seen if source == name} == {size}
    assert len(seen) == sum(counts.values())


def test_threads_subscribe_and_ask_at_once(bus: Bus) -> None:
    """Requests of several threads through one handle do not get each other's answers."""

    def live(name: str) -> None:
        for number in range(50):
            with bus.subscribe(name) as channel:
                bus.publish((name, number), topic=name)
                assert bus.stats().pid > 0
                assert channel.recv(timeout=DEADLINE) == (name, number)

    for thread in [Background(live, name) for name in ("a", "b", "c")]:
        thread.result(2 * DEADLINE)
    assert bus.stats().subscribers == ()


def test_threads_that_run_out_of_time_withdraw_only_their_own(bus: Bus, inline: None) -> None:
    """Threads whose large messages run out of time half-way: what raised never comes, what returned comes once, in order."""
    channel = bus.subscribe(capacity=300_000)
    outcomes: dict[str, list[int]] = {name: [] for name in "abc"}
    failures = 0

    def publish(name: str) -> None:
        nonlocal failures
        for number in range(60):
            try:
                bus.publish((name, number, pattern(number, 60_000 + number)), timeout=(number % 3) * 0.002)
            except TimeoutError:
                failures += 1
            else:
                outcomes[name].append(number)

    received: list[Any] = []
    threads = [Background(publish, name) for name in outcomes]
    while any(thread.is_alive() for thread in threads):
        try:
            received.append(channel.recv(timeout=0.02))
            if len(received) % 4 == 0:
                wait_until(lambda: not any(thread.is_alive() for thread in threads) or readable(channel))
        except TimeoutError:
            continue
    for thread in threads:
        thread.result()
    publishing = Background(bus.publish, ("end", 0, b""), timeout=DEADLINE)
    while not received or received[-1][0] != "end":
        received.append(channel.recv(timeout=DEADLINE))
    publishing.result()
    assert failures
    for name, numbers in outcomes.items():
        assert [number for source, number, _ in received if source == name] == numbers
    assert [data == pattern(number, 60_000 + number) for _, number, data in received[:-1]] == [True] * (len(received) - 1)
    wait_until(lambda: bus.stats().memory == 0)


# --- signal handlers --------------------------------------------------------------------------------------------------


@contextmanager
def handler(number: int, function: Callable[..., Any]) -> Iterator[None]:
    """A signal handler for the length of a block."""
    before = signal.signal(number, function)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("size", [20, 5000, 30_000])
def test_signal_handlers_publish_in_the_middle_of_publishes(bus: Bus, children: Children, fork: BaseContext, size: int) -> None:
    """Signals that interrupt a publish and the handlers of other signals, each publishing: all come exactly once, and whole."""
    stop = subscribe_elsewhere(bus, children, fork)
    signals = 0
    depth = 0

    def publish_too(*_: Any) -> None:
        nonlocal signals, depth
        if depth > 5:
            return
        depth += 1
        number, signals = signals, signals + 1
        bus.publish(("handler", number, pattern(number, size)))
        depth -= 1

    orders, theirs = fork.Pipe()
    count = 0
    with handler(signal.SIGUSR1, publish_too), handler(signal.SIGUSR2, publish_too):
        storm = [
            children(fork, workers.signal_until_order, os.getpid(), number, theirs)
            for number in (signal.SIGUSR1, signal.SIGUSR2)
        ]
        while signals < 100:
            bus.publish(("main", count, pattern(count, size)))
            count += 1
        orders.send("stop")
        for process in storm:
            process.join(DEADLINE)
    seen = stop()
    assert numbers_of(seen, "main") == list(range(count))
    assert sorted(numbers_of(seen, "handler")) == list(range(signals))
    assert {length for _, _, length in seen} == {size}


@pytest.mark.parametrize("size", [1000, 100_000])
def test_signal_handler_publishes_while_publish_waits(bus: Bus, size: int) -> None:
    """A handler may publish while its own thread waits for room: no deadlock, and both messages come, each once."""
    channel = bus.subscribe(capacity=2 * size + 50_000)
    published = fill(bus, size=size)
    entered = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def publish_too(*_: Any) -> None:
        entered.set()
        bus.publish(("handler", bytes(size)))

    def interrupt_and_then_receive() -> list[Any]:
        wait_until(lambda: main_waits_in("publish"))
        signal.pthread_kill(main, signal.SIGUSR1)
        assert entered.wait(DEADLINE)
        return take(channel, len(published) + 2)

    with handler(signal.SIGUSR1, publish_too):
        receiving = Background(interrupt_and_then_receive)
        bus.publish(("main", bytes(size)), timeout=DEADLINE)
        names = [name for name, _ in receiving.result(2 * DEADLINE)]
    assert names[:-2] == published
    assert sorted(names[-2:]) == ["handler", "main"]


def main_waits_in(function: str) -> bool:
    """Whether the main thread sleeps in the kernel somewhere below the function of this name."""
    main = threading.main_thread()
    frame = sys._current_frames().get(main.ident or 0)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    stat = Path(f"/proc/self/task/{main.native_id}/stat").read_text()
    return frame is not None and stat.rpartition(")")[2].split()[0] == "S"


# --- a full backlog ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 3000, 100_000])
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
    assert everything(bus, channel) == []


def test_other_calls_work_while_publish_waits(bus: Bus) -> None:
    """While one thread's publish waits, ``stats``, ``subscribe`` and ``unsubscribe`` work for another one."""
    full, other = bus.subscribe("full", capacity=50_000), bus.subscribe("other")
    fill(bus, topic="full")
    publishing = Background(bus.publish, ("waited", bytes(1000)), topic="full")
    publishing.wait_until_blocked("publish")
    stats = {subscriber.topics[0]: subscriber for subscriber in bus.stats().subscribers}
    assert stats["full"].waiting > 0
    with bus.subscribe("more"):
        assert len(bus.stats().subscribers) == 3
    bus.unsubscribe(other)
    assert [list(subscriber.topics) for subscriber in bus.stats().subscribers] == [["full"]]
    assert publishing.is_alive()
    bus.unsubscribe(full)
    assert publishing.result() is None
    assert bus.stats().subscribers == ()


@pytest.mark.parametrize("end", ["close", "die"])
def test_waiting_publish_goes_on_when_the_full_subscription_ends(
    bus: Bus, children: Children, fork: BaseContext, end: str
) -> None:
    """A publisher waits for nobody who has closed the channel, or died."""
    orders, theirs = fork.Pipe()
    channel = bus.subscribe(capacity=50_000)
    child = children(fork, workers.open_and_hold, channel, theirs) if end == "die" else None
    if child:
        assert answer(orders) == child.pid
    fill(bus)
    publishing = Background(bus.publish, ("waited", bytes(1000)))
    publishing.wait_until_blocked("publish")
    if child:
        child.kill()
    else:
        channel.close()
    assert publishing.result(3.0) is None  # at once, and not when the broker wakes for something else
    wait_until(lambda: bus.stats().subscribers == ())
    wait_until(lambda: bus.stats().memory == 0)


def test_close_works_while_publish_waits(bus: Bus) -> None:
    """``close`` from another thread ends a publish that waits, with an error, and the broker too."""
    channel = bus.subscribe(capacity=50_000)
    channel.fileno()
    fill(bus)
    broker = psutil.Process(bus.stats().pid)
    publishing = Background(bus.publish, ("never", bytes(1000)))
    publishing.wait_until_blocked("publish")
    bus.close(timeout=1.0)
    assert isinstance(publishing.error(), (ClosedError, BrokerLost))
    assert not broker.is_running()
    channel.close()


def test_detaching_works_while_publish_waits(bus: Bus) -> None:
    """``close`` of a handle that is no starter's ends a publish that waits in another thread, and nobody else's."""
    channel = bus.subscribe(capacity=50_000)
    other = connect(bus.address)
    published = fill(other)
    publishing = Background(other.publish, ("never", bytes(1000)))
    publishing.wait_until_blocked("publish")
    other.close(timeout=1.0)
    assert isinstance(publishing.error(), (ClosedError, BrokerLost))
    receiving = Background(take, channel, len(published) + 1)
    bus.publish(("goes on", b""), timeout=DEADLINE)
    names = [name for name, _ in receiving.result()]
    assert [name for name in names if name != "goes on"] == published


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
    assert [name for name, _ in everything(bus, other)] == ["after"]


def test_slow_subscriber_does_not_hold_up_a_quick_one(bus: Bus) -> None:
    """What a full channel's publisher got out before it had to wait reaches the quick subscribers at once."""
    full, quick = bus.subscribe(capacity=50_000), bus.subscribe()
    receiving = Background(take, quick, 10)
    published = fill(bus)
    assert [number for number, _ in receiving.result()] == published[:10]
    reading = Background(take, full, len(published))
    assert [number for number, _ in take(quick, len(published) - 10)] == published[10:]
    assert [number for number, _ in reading.result()] == published


# --- memory -----------------------------------------------------------------------------------------------------------


def test_broker_does_not_grow_under_a_slow_subscriber(bus: Bus, children: Children, fork: BaseContext) -> None:
    """While 100 times the capacity passes through, the broker's memory stays where it was."""
    channel = bus.subscribe(capacity=MEBIBYTE // 2)
    channel.fileno()
    broker = psutil.Process(bus.stats().pid)
    before = broker.memory_info().rss
    count, size = 3200, 16_000
    publishing = Background(bus.publish_many, ((number, pattern(number, size)) for number in range(count)))
    highest = before
    for expected in range(count):
        number, data = channel.recv(timeout=DEADLINE)
        assert number == expected
        assert data == pattern(number, size)
        if expected % 20 == 0:
            highest = max(highest, broker.memory_info().rss)
    assert publishing.result() == count
    assert highest - before < 32 * MEBIBYTE
    assert channel.missed == 0
