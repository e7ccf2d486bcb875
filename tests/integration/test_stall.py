"""Back-pressure: a full ``block`` channel makes its own publishers wait, nobody else, and no longer than it is full."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, Lagged, Overflowed, TimedOut, connect, start_broadcaster
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.validation import POLICIES
from tests.support import victims, workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    fill,
    only_subscriber,
    pattern,
    rest,
    take,
    wait_until,
)
from tests.support.victims import Counter, Program

Bus = Broadcaster[Any]
Publishers = Callable[[Bus, str], tuple[BaseProcess, Counter]]
Script = Callable[[str], str]


def publish_to(bus: Bus, topic: str, counter: Counter) -> None:
    """Publishes ``(number, pattern)`` to a topic for ever, and counts those whose ``publish`` has returned."""
    number = 0
    while True:
        bus.publish((number, pattern(number, 1000)), topic=topic)
        number += 1
        counter.value = number


@pytest.fixture
def publishers(fork: BaseContext) -> Iterator[Publishers]:
    """Starts processes that publish to a topic for ever, and kills them at the end."""
    started: list[BaseProcess] = []

    def start(bus: Bus, topic: str) -> tuple[BaseProcess, Counter]:
        counter = Counter()
        process: BaseProcess = fork.Process(target=publish_to, args=(bus, topic, counter))  # type: ignore[attr-defined]
        process.start()
        started.append(process)
        return process, counter

    yield start
    for process in started:
        process.kill()
    for process in started:
        process.join(DEADLINE)
        process.close()


def stalls(bus: Bus) -> dict[tuple[str, ...], set[int]]:
    """Who waits for whom: process IDs by the topics of the full channel."""
    return {row.topics: set(row.stalls) for row in bus.stats().subscribers if row.stalls}


# --- whom it hurts ----------------------------------------------------------------------------------------------------


def read_at(channel: Channel[Any], pace: str, report: Connection) -> None:
    """Open it and report that; then read nothing, or a message now and then, or all, whatever was dropped, until the end."""
    channel.fileno()
    report.send(os.getpid())
    while pace == "stopped":
        signal.pause()
    with contextlib.suppress(EOFError):
        while True:
            with contextlib.suppress(Lagged, Overflowed):
                channel.recv_many(1 if pace == "slow" else None)
            if pace == "slow":
                time.sleep(0.002)


@pytest.mark.parametrize("through", ["ring", "pipe"])
@pytest.mark.parametrize("pace", ["stopped", "slow", "quick"])
def test_no_publisher_waits_for_who_is_not_waited_for(
    pace: str, through: str, monkeypatch: pytest.MonkeyPatch, children: Children, fork: BaseContext
) -> None:
    """Readers of all other policies, at any pace: a publisher goes on, and a quick ``block`` reader beside them gets all."""
    monkeypatch.setenv("MPBROADCAST_INLINE", str(int(through == "pipe")))
    count, size = 1500, 16_000
    with start_broadcaster() as bus:
        readers = []
        for policy in POLICIES[1:]:
            channel = bus.subscribe(overflow=policy, capacity=5 << 20)
            here, there = fork.Pipe()
            readers.append(children(fork, read_at, channel, pace, there))
            assert answer(here) == readers[-1].pid
            here.close()
            there.close()
        with bus.subscribe() as quick:
            quick.fileno()
            receiving = Background(lambda: [message[0] for message in take(quick, count)])
            publishing = Background(bus.publish_many, ((number, bytes(size)) for number in range(count)))
            while publishing.is_alive():
                assert not any(row.stalls for row in bus.stats().subscribers if row.overflow != "block")
            assert publishing.result() == count
            assert receiving.result() == list(range(count))
        for one in readers:
            one.kill()
            one.join(DEADLINE)


@pytest.mark.skipif(not available(), reason="there is no memory to share here")
def test_a_reader_that_never_empties_its_backlog_gets_references(bus: Bus) -> None:
    """Messages that were copied for it while it was not open are before it all the time: all the same, new ones are not."""
    channel = bus.subscribe()
    waiting, size = 60, 60_000
    for number in range(waiting):
        bus.publish((number, bytes(size)))
    bus.flush()
    for number in range(500):
        assert channel.recv(DEADLINE)[0] == number
        bus.publish((number + waiting, bytes(size)))
        row = only_subscriber(bus)
        if row.delivered - number > 45:  # so many are in no pipe, but references to them are
            return
        assert row.waiting > 0
    raise AssertionError("it never got any")


def test_stats_say_who_waits_for_whom(bus: Bus, publishers: Publishers) -> None:
    """Each publisher that waits is listed at the subscription that it waits for, and no longer than it waits."""
    channels = {topic: bus.subscribe(topic, capacity=20_000) for topic in ("a", "b", "c")}
    pids: dict[str, set[int]] = {"a": set(), "b": set()}
    assert stalls(bus) == {}
    for topic in ("a", "a", "b"):
        process, _ = publishers(bus, topic)
        pids[topic].add(process.pid or 0)
    wait_until(lambda: stalls(bus) == {("a",): pids["a"], ("b",): pids["b"]})
    bus.unsubscribe(channels["a"])
    wait_until(lambda: stalls(bus) == {("b",): pids["b"]})
    bus.unsubscribe(channels["b"])
    wait_until(lambda: stalls(bus) == {})
    for channel in channels.values():
        channel.fileno()  # it was there for children to open
        channel.close()


def test_what_the_waiting_one_had_sent_reaches_the_others(bus: Bus, publishers: Publishers) -> None:
    """Subscribers of the same topic have got all that the full one was given, and go on with it when it reads."""
    slow, quick = bus.subscribe("t", capacity=50_000), bus.subscribe("t")
    slow.fileno()
    waiting, _ = publishers(bus, "t")
    wait_until(lambda: stalls(bus) == {("t",): {waiting.pid}})
    given = {row.id: row.published for row in bus.stats().subscribers}
    assert len(set(given.values())) == 1
    count = next(iter(given.values()))
    assert [number for number, _ in take(quick, count)] == list(range(count))
    with pytest.raises(TimedOut):
        quick.recv(timeout=0)
    reading = Background(take, slow, 1000)
    assert [number for number, _ in take(quick, 1000 - count)] == list(range(count, 1000))
    assert [number for number, _ in reading.result()] == list(range(1000))


def test_two_full_channels_hold_up_one_publisher(bus: Bus) -> None:
    """Who would reach two full channels waits for both: when one is read, it still waits for the other."""
    channels = [bus.subscribe("t", capacity=20_000) for _ in range(2)]
    published = fill(bus, topic="t", timeout=0.2)
    publishing = Background(bus.publish, ("last", bytes(1000)), topic="t")
    publishing.wait_until_blocked("publish")
    first = [number for number, _ in take(channels[0], only_subscriber_of(bus, channels[0]))]
    with pytest.raises(TimedOut):
        channels[0].recv(timeout=0.1)
    assert publishing.is_alive()
    reading = Background(take, channels[1], len(published) + 1)
    first += [number for number, _ in take(channels[0], len(published) + 1 - len(first))]
    assert first == [number for number, _ in reading.result()] == [*published, "last"]
    publishing.result()


def only_subscriber_of(bus: Bus, channel: Channel[Any]) -> int:
    """How many messages were published to a channel so far."""
    return next(row.published for row in bus.stats().subscribers if row.id == channel.id)


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["killed", "stopped and killed", "unsubscribed", "closed", "topic dropped"])
def test_publishers_go_on_at_once_when_the_slow_one_goes(
    bus: Bus, children: Children, publishers: Publishers, fork: BaseContext, way: str
) -> None:
    """Publisher processes that wait go on when the subscriber dies, is unsubscribed, closes, or gives up the topic."""
    channel = bus.subscribe("t", capacity=20_000)
    reader = None
    if "killed" in way:
        orders, theirs = fork.Pipe()
        reader = children(fork, workers.open_and_hold, channel, theirs)
        assert answer(orders) == reader.pid
    else:
        channel.fileno()
    counters = [publishers(bus, "t")[1] for _ in range(2)]
    wait_until(lambda: len(only_subscriber(bus).stalls) == 2)
    before = [counter.value for counter in counters]
    if reader is not None:
        assert reader.pid
        if "stopped" in way:
            os.kill(reader.pid, signal.SIGSTOP)
        reader.kill()
    elif way == "unsubscribed":
        bus.unsubscribe(channel)
    elif way == "closed":
        channel.close()
    else:
        channel.unsubscribe("t")
    wait_until(lambda: all(counter.value > number + 1000 for counter, number in zip(counters, before, strict=True)))
    assert stalls(bus) == {}


def test_a_publisher_killed_while_it_waits_is_heard_to_its_end(bus: Bus, publishers: Publishers) -> None:
    """What a publisher had published before it was killed in its wait is all delivered, whole and in order."""
    channel = bus.subscribe(capacity=20_000)
    victim, counter = publishers(bus, "")
    wait_until(lambda: only_subscriber(bus).stalls == (victim.pid,))
    wait_until(lambda: victims.stalled(victim.pid or 0))
    victim.kill()
    victim.join(DEADLINE)
    count = counter.value
    after = Background(bus.publish, ("after", b""))
    received = take(channel, count + 1)
    after.result()
    bus.flush(timeout=DEADLINE)
    assert only_subscriber(bus).stalls == ()
    bus.unsubscribe(channel)
    received += rest(channel)
    numbers = [number for number, _ in received if number != "after"]
    assert numbers == list(range(len(numbers)))
    assert count <= len(numbers) <= count + 1
    assert len(received) == len(numbers) + 1
    for number, data in received:
        assert number == "after" or data == pattern(number, 1000)


def test_the_longest_wait_ends_first(bus: Bus) -> None:
    """Several publishers wait for one channel: all get through, none is forgotten, each in its own order."""
    channel = bus.subscribe(capacity=20_000)
    handles = [connect(bus.address) for _ in range(5)]
    threads = [
        Background(handle.publish_many, [(index, number, bytes(500)) for number in range(200)])
        for index, handle in enumerate(handles)
    ]
    wait_until(lambda: only_subscriber(bus).stalls)
    received = take(channel, 1000)
    for thread in threads:
        assert thread.result() == 200
    for index in range(5):
        assert [number for source, number, _ in received if source == index] == list(range(200))
    for handle in handles:
        handle.close()


# --- the warning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a program into a file; gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(text)
        return str(path)

    return write


STALL = """
import multiprocessing, os, sys
from mpbroadcast import start_broadcaster

def publish(bus, pipe, seconds):
    count = 0
    try:
        while True:
            bus.publish(bytes(1000), topic="sensor:7", timeout=seconds)
            count += 1
    except TimeoutError:
        pipe.send(os.getpid())

def hold(channel, pipe):
    channel.fileno()
    pipe.send(os.getpid())
    pipe.recv()

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    reader, publishers, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    bus = start_broadcaster(**eval(sys.argv[4]))
    channel = bus.subscribe("sensor:*", "door", capacity=20_000)
    mine, theirs = multiprocessing.Pipe()
    pid = os.getpid()
    if reader == "other":
        process = multiprocessing.Process(target=hold, args=(channel, theirs))
        process.start()
        pid = mine.recv()
    elif reader == "own":
        channel.fileno()
    print(pid, flush=True)
    if publishers:
        ends = [multiprocessing.Pipe() for _ in range(publishers)]
        children = [multiprocessing.Process(target=publish, args=(bus, end, seconds)) for _, end in ends]
        for child in children:
            child.start()
        for end, _ in ends:
            print(end.recv())
        for child in children:
            child.join()
    else:
        mine_too, theirs_too = multiprocessing.Pipe()
        publish(bus, theirs_too, seconds)
        print(mine_too.recv())
    print(bus.stats().subscribers[0].waiting_bytes)
    bus.unsubscribe(channel)
    if reader == "nobody":
        channel.fileno()
    channel.close()
    if reader == "other":
        mine.send(None)
        process.join()
    bus.close()
"""


def run(path: str, *arguments: str) -> tuple[list[int], list[str]]:
    """The numbers that the program prints, and the lines that it, or its broker, writes to standard error."""
    with Program(path, *arguments) as program:
        code, printed, errors = program.end()
        assert code == 0, errors
        return [int(line) for line in printed.split()], errors.splitlines()


def test_each_publisher_that_waits_is_named(script: Script) -> None:
    """One warning for each of two processes, however long it waits, with the reader's process, its topics, and what waits."""
    (reader, *publishers, waiting), errors = run(script(STALL), "other", "2", "0.8", "{'stall_timeout': 0.3}")
    assert len(errors) == len(publishers) == 2
    for publisher in publishers:
        (line,) = [error for error in errors if re.search(rf"\b{publisher}\b", error)]
        assert all(re.search(rf"\b{number}\b", line) for number in (reader, waiting))
        assert all(text in line for text in ("WARNING", "sensor:*", "door"))
        assert not any(text in line for text in ("never opened", "same process"))


@pytest.mark.parametrize("reader", ["own", "nobody"])
def test_a_process_that_waits_for_itself_is_told_so(script: Script, reader: str) -> None:
    """A process whose own full channel makes its own ``publish`` wait is warned of exactly that."""
    (subscriber, publisher, waiting), errors = run(script(STALL), reader, "0", "0.6", "{'stall_timeout': 0.3}")
    assert subscriber == publisher
    assert len(errors) == 1
    assert "same process" in errors[0]
    assert re.search(rf"\b{publisher}\b", errors[0])
    assert re.search(rf"\b{waiting}\b", errors[0])
    assert ("never opened" in errors[0]) == (reader == "nobody")


@pytest.mark.parametrize("options", ["{'stall_timeout': None}", "{}"])
def test_without_a_stall_timeout_nothing_is_said(script: Script, options: str) -> None:
    """``stall_timeout=None`` warns of nothing, and the default not within half a second."""
    _, errors = run(script(STALL), "own", "1", "0.5", options)
    assert errors == []


SLOW = """
import threading, time
from mpbroadcast import start_broadcaster

if __name__ == "__main__":
    bus = start_broadcaster(stall_timeout=0.4)
    channel = bus.subscribe(capacity=20_000)
    channel.fileno()
    done = threading.Event()

    def read():
        while not done.is_set():
            channel.recv()
            time.sleep(0.002)
    reader = threading.Thread(target=read)
    reader.start()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        bus.publish(bytes(1000))
    done.set()
    reader.join()
    channel.close()
    bus.close()
    print(0)
"""


def test_slow_but_going_on_is_no_stall(script: Script) -> None:
    """A reader that is slow, and reads all the time, makes publishers wait for moments, and there is no warning."""
    _, errors = run(script(SLOW))
    assert errors == []
