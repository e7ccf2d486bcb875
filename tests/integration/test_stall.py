"""Back-pressure: a full ``block`` channel makes its own publishers wait, no other one, and no longer than it is full."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, Lagged, Overflowed, start_broadcaster
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.validation import POLICIES
from tests.support.helpers import DEADLINE, Background, Children, only_subscriber, take, wait_until
from tests.support.large_workers import ReaderProcess, hold, publish_counted
from tests.support.victims import shared_counter

Bus = Broadcaster[Any]
Publishers = Callable[[Bus, str], tuple[BaseProcess, memoryview]]
TIMEOUT = 0.2  # seconds until a warning


@pytest.fixture
def publishers(children: Children, fork: BaseContext) -> Iterator[Publishers]:
    """Start processes that publish to a topic for ever; kill them at the end."""
    started: list[BaseProcess] = []

    def start(bus: Bus, topic: str) -> tuple[BaseProcess, memoryview]:
        counter = shared_counter()
        started.append(children(fork, publish_counted, bus, counter, topic))
        return started[-1], counter

    yield start
    for process in started:
        process.kill()


def stalls(bus: Bus) -> dict[tuple[str, ...], set[int | None]]:
    """Return the IDs of the processes that wait, by the topics of the full channel that each waits for."""
    return {row.topics: set(row.stalls) for row in bus.stats().subscribers if row.stalls}


def read_at(channel: Channel[Any], pace: str) -> None:
    """Read a message now and then, or all, whatever was dropped, until the end; or nothing."""
    if pace == "stopped":
        hold(channel)
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
    count, size = 900, 16_000
    with start_broadcaster() as bus:
        channels = [bus.subscribe(overflow=policy, capacity=5 << 20) for policy in POLICIES[1:]]
        readers = [ReaderProcess(channel, children, fork, read_at, pace) for channel in channels]
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


@pytest.mark.parametrize("end", ["killed", "stopped and killed", "unsubscribed", "closed", "topic dropped"])
def test_publishers_go_on_at_once_when_the_slow_one_goes(
    end: str, bus: Bus, children: Children, publishers: Publishers, fork: BaseContext
) -> None:
    """When it dies, is unsubscribed, closes, or gives up the topic; each publisher is listed for as long as it waits."""
    channel = bus.subscribe("t", capacity=20_000)
    if "killed" in end:
        reader = ReaderProcess(channel, children, fork, hold)
    else:
        channel.fileno()
    (one, first), (two, second) = publishers(bus, "t"), publishers(bus, "t")
    wait_until(lambda: stalls(bus) == {("t",): {one.pid, two.pid}})
    before = first[0], second[0]
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
    wait_until(lambda: first[0] > before[0] + 1000 and second[0] > before[1] + 1000)
    assert stalls(bus) == {}


def next_warning(capfd: pytest.CaptureFixture[str]) -> str:
    """Return the only line that a broker writes to standard error from now on, until one does."""
    line: str = wait_until(lambda: capfd.readouterr().err)
    assert line.count("\n") == 1
    return line


def has_number(line: str, number: int | None) -> bool:
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
