"""Back-pressure: a full ``block`` channel makes its own publishers wait, no other one, and no longer than it is full."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, Lagged, Overflowed, TimedOut, connect, start_broadcaster
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.validation import POLICIES
from tests.support.helpers import DEADLINE, Background, Children, fill, only_subscriber, rest, take, wait_until
from tests.support.large_workers import ReaderProcess, hold, numbers, publish_counted
from tests.support.victims import Counter, stalled

Bus = Broadcaster[Any]
Publishers = Callable[[Bus, str], tuple[BaseProcess, Counter]]
TIMEOUT = 0.2  # seconds until a warning


@pytest.fixture
def publishers(children: Children, fork: BaseContext) -> Iterator[Publishers]:
    """Start processes that publish to a topic for ever; kill them at the end."""
    started: list[BaseProcess] = []

    def start(bus: Bus, topic: str) -> tuple[BaseProcess, Counter]:
        counter = Counter()
        started.append(children(fork, publish_counted, bus, counter, [1000], topic))
        return started[-1], counter

    yield start
    for process in started:
        process.kill()


def stalls(bus: Bus) -> dict[tuple[str, ...], set[int | None]]:
    """Return the IDs of the processes that wait, by the topics of the full channel that each waits for."""
    return {row.topics: set(row.stalls) for row in bus.stats().subscribers if row.stalls}


# --- which wait -------------------------------------------------------------------------------------------------------


def read_at(channel: Channel[Any], report: Connection, pace: str) -> None:
    """Open it and report that; then read a message now and then, or all, whatever was dropped, until the end."""
    channel.fileno()
    report.send("open")
    with contextlib.suppress(EOFError):
        while True:
            with contextlib.suppress(Lagged, Overflowed):
                channel.recv_many(1 if pace == "slow" else None)
            if pace == "slow":
                time.sleep(0.002)


@pytest.mark.parametrize("through", ["ring", "pipe"])
@pytest.mark.parametrize("pace", ["stopped", "slow", "quick"])
def test_no_publisher_waits_where_the_policy_is_not_to_wait(
    pace: str, through: str, monkeypatch: pytest.MonkeyPatch, children: Children, fork: BaseContext
) -> None:
    """Readers of all other policies, at any pace: a publisher goes on, and a quick ``block`` reader beside them gets all."""
    monkeypatch.setenv("MPBROADCAST_INLINE", str(int(through == "pipe")))
    count, size = 1500, 16_000
    with start_broadcaster() as bus:
        channels = [bus.subscribe(overflow=policy, capacity=5 << 20) for policy in POLICIES[1:]]
        target = hold if pace == "stopped" else partial(read_at, pace=pace)
        readers = [ReaderProcess(channel, children, fork, target) for channel in channels]
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


def test_a_full_channel_makes_its_own_publishers_wait(bus: Bus, publishers: Publishers) -> None:
    """Each is listed at the channel that it waits for, and no longer than it waits; what it had sent reaches the others."""
    channels = {topic: bus.subscribe(topic, capacity=20_000) for topic in ("a", "b", "c")}
    quick = bus.subscribe("a")
    pids: dict[tuple[str, ...], set[int | None]] = {("a",): set(), ("b",): set()}
    assert stalls(bus) == {}
    for topic in ("a", "b", "b"):
        pids[(topic,)].add(publishers(bus, topic)[0].pid)
    wait_until(lambda: stalls(bus) == pids)
    given = {row.published for row in bus.stats().subscribers if row.topics == ("a",)}
    assert len(given) == 1
    count = given.pop()
    assert numbers(take(quick, count)) == list(range(count))
    with pytest.raises(TimedOut):
        quick.recv(timeout=0)
    reading = Background(take, channels["a"], 1000)
    assert numbers(take(quick, 1000 - count)) == list(range(count, 1000))
    assert numbers(reading.result()) == list(range(1000))
    bus.unsubscribe(channels["b"])
    wait_until(lambda: stalls(bus).keys() <= {("a",)})
    for channel in (quick, *channels.values()):
        channel.fileno()  # it was there for children to open
        channel.close()


def test_two_full_channels_hold_up_one_publisher(bus: Bus) -> None:
    """A message for two full channels waits for both: when one is read, it still waits for the other."""
    channels = [bus.subscribe("t", capacity=20_000) for _ in range(2)]
    published = fill(bus, topic="t", timeout=0.2)
    publishing = Background(bus.publish, ("last", bytes(1000)), topic="t")
    publishing.wait_until_blocked("publish")
    (given,) = {row.published for row in bus.stats().subscribers}
    first = [number for number, _ in take(channels[0], given)]
    with pytest.raises(TimedOut):
        channels[0].recv(timeout=0.1)
    assert publishing.is_alive()
    reading = Background(take, channels[1], len(published) + 1)
    first += [number for number, _ in take(channels[0], len(published) + 1 - len(first))]
    assert first == [number for number, _ in reading.result()] == [*published, "last"]
    publishing.result()


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["killed", "stopped and killed", "unsubscribed", "closed", "topic dropped"])
def test_publishers_go_on_at_once_when_the_slow_one_goes(
    end: str, bus: Bus, children: Children, publishers: Publishers, fork: BaseContext
) -> None:
    """Publisher processes that wait go on when the subscriber dies, is unsubscribed, closes, or gives up the topic."""
    channel = bus.subscribe("t", capacity=20_000)
    if "killed" in end:
        reader = ReaderProcess(channel, children, fork, hold)
    else:
        channel.fileno()
    counters = [publishers(bus, "t")[1] for _ in range(2)]
    wait_until(lambda: len(only_subscriber(bus).stalls) == 2)
    before = [counter.value for counter in counters]
    if "stopped" in end:
        reader.stop()
    if "killed" in end:
        reader.kill()
    elif end == "unsubscribed":
        bus.unsubscribe(channel)
    elif end == "closed":
        channel.close()
    else:
        channel.unsubscribe("t")
    wait_until(lambda: all(counter.value > number + 1000 for counter, number in zip(counters, before, strict=True)))
    assert stalls(bus) == {}


def test_all_that_a_publisher_killed_while_it_waits_had_published_is_delivered(bus: Bus, publishers: Publishers) -> None:
    """Whole and in order; another publisher that waits behind it goes on."""
    channel = bus.subscribe(capacity=20_000)
    victim, counter = publishers(bus, "")
    wait_until(lambda: only_subscriber(bus).stalls == (victim.pid,))
    wait_until(lambda: stalled(victim.pid or 0))
    victim.kill()
    victim.join(DEADLINE)
    count = counter.value
    after = Background(bus.publish, (1 << 20, b""))
    received = take(channel, count + 1)
    after.result()
    bus.flush(timeout=DEADLINE)
    assert only_subscriber(bus).stalls == ()
    bus.unsubscribe(channel)
    found = numbers([*received, *rest(channel)])
    found.remove(1 << 20)
    assert found == list(range(len(found)))
    assert count <= len(found) <= count + 1


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


def next_warning(capfd: pytest.CaptureFixture[str]) -> str:
    """Return the only line that a broker writes to standard error from now on, until one does."""
    line: str = wait_until(lambda: capfd.readouterr().err)
    assert line.count("\n") == 1
    return line


def has_number(line: str, number: int | None) -> bool:
    """Return True if the number stands in the line."""
    return re.search(rf"\b{number}\b", line) is not None


def test_each_publisher_that_waits_is_named_once(
    capfd: pytest.CaptureFixture[str], children: Children, publishers: Publishers, fork: BaseContext
) -> None:
    """However long each waits, one warning, with the reader's process, its topics, and what waits."""
    with start_broadcaster(stall_timeout=TIMEOUT) as bus:
        channel = bus.subscribe("sensor:*", "door", capacity=20_000)
        reader = ReaderProcess(channel, children, fork, hold)
        waiting = []
        for _ in range(3):  # while one waits until it is named, those before it wait on
            waiting.append(publishers(bus, "sensor:7")[0].pid)
            line = next_warning(capfd)
            assert [has_number(line, pid) for pid in waiting] == [pid == waiting[-1] for pid in waiting]
            assert has_number(line, reader.pid)
            assert has_number(line, only_subscriber(bus).waiting_bytes)
            assert all(text in line for text in ("WARNING", "sensor:*", "door"))
            assert not any(text in line for text in ("never opened", "same process"))
        reader.kill()


@pytest.mark.parametrize("is_open", [True, False])
def test_a_process_that_waits_for_itself_is_warned_of_that(is_open: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Also of a channel that was never opened. Without a ``stall_timeout``, and before it is over, nothing is written."""
    with contextlib.ExitStack() as stack:
        for options in ({"stall_timeout": None}, {}, {"stall_timeout": TIMEOUT}):
            bus: Bus = stack.enter_context(start_broadcaster(**options))
            channel = bus.subscribe(capacity=20_000)
            if is_open:
                channel.fileno()
            publishing = Background(bus.publish_many, [bytes(1000)] * 5000)
            stack.callback(publishing.result)
            stack.callback(bus.unsubscribe, channel)
            wait_until(partial(stalls, bus))
        line = next_warning(capfd)
        assert "same process" in line
        assert has_number(line, bus.stats().pid)
        assert has_number(line, os.getpid())
        assert has_number(line, only_subscriber(bus).waiting_bytes)
        assert ("never opened" in line) == (not is_open)


def test_slow_but_going_on_is_no_stall(capfd: pytest.CaptureFixture[str]) -> None:
    """A reader that is slow, and reads all the time, makes publishers wait for moments, and there is no warning."""
    with start_broadcaster(stall_timeout=2 * TIMEOUT) as bus:
        channel = bus.subscribe(capacity=20_000)
        channel.fileno()

        def read() -> None:
            with contextlib.suppress(EOFError):
                while channel.recv():
                    time.sleep(0.001)

        reading = Background(read)
        end = time.monotonic() + 5 * TIMEOUT
        while time.monotonic() < end:
            bus.publish(bytes(1000))
        assert only_subscriber(bus).waiting
        channel.close()
        reading.error()
    assert capfd.readouterr().err == ""
