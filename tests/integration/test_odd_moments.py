"""Moments that are seldom met: plain forks, a restart at the same address, who waits behind whom."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, BrokerLost, Channel, ClosedError, TimedOut, connect, start_broadcaster, trap_points
from tests.support.helpers import DEADLINE, Background, Children, answer, finish, rest, stopped, take, wait_until

Bus = Broadcaster[Any]


def test_a_plain_forks_child_that_ends_leaves_its_parents_broker_alone(bus: Bus) -> None:
    """A child of ``os.fork()`` that runs its exit handlers does not end the broker that its parent has started."""
    pid = os.fork()
    if not pid:
        try:
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # what the end of the child's program does
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with bus.subscribe() as channel:
        bus.publish("still there")
        assert channel.recv(timeout=DEADLINE) == "still there"


def test_who_does_not_own_a_channel_cannot_close_it(bus: Bus, fork: BaseContext, children: Children) -> None:
    """``close()`` in a process that has not opened the channel closes that handle only."""
    channel = bus.subscribe()
    channel.poll(0)
    finish(children(fork, channel.close))
    bus.publish(1)
    assert channel.recv(timeout=DEADLINE) == 1
    channel.close()


def test_who_waits_is_not_overtaken(bus: Bus) -> None:
    """A large message that waits for room gets it, however many small ones others publish."""
    channel = bus.subscribe(capacity=60_000)
    channel.poll(0)
    ended = threading.Event()
    other, small = connect(bus.address), connect(bus.address)

    def publish_small() -> None:
        while not ended.is_set():
            small.publish(b"s" * 50)

    flood = Background(publish_small)
    large = Background(other.publish, b"L" * 59_000)
    while channel.recv(timeout=DEADLINE)[:1] != b"L":
        pass
    large.result()
    ended.set()
    bus.unsubscribe(channel)
    flood.result()
    for _ in channel:
        pass
    other.close()
    small.close()


def test_every_thread_that_receives_gets_the_clean_end(bus: Bus) -> None:
    """However many threads receive from a channel, each message comes once, in each thread in order, and all have the end."""
    for count in (20, 20, 20, 3000):
        channel = bus.subscribe()
        channel.poll(0)
        threads = [Background(rest, channel) for _ in range(6)]
        bus.publish_many(range(count))
        bus.flush()
        bus.unsubscribe(channel)
        parts = [thread.result() for thread in threads]
        assert all(part == sorted(part) for part in parts)
        assert sorted(itertools.chain(*parts)) == list(range(count))
        channel.close()


def test_a_small_backlog_goes_on_when_one_message_has_been_read(bus: Bus) -> None:
    """Who waits for a backlog of a few messages goes on when the reader has taken one, and not only when it has all."""
    channel = bus.subscribe(capacity=1000)
    channel.poll(0)
    for _ in range(4):
        bus.publish(b"x" * 33)
    assert channel.recv(timeout=DEADLINE) == b"x" * 33
    bus.flush(timeout=DEADLINE)
    assert len(take(channel, 3)) == 3
    channel.close()


def test_closing_without_waiting_still_ends_cleanly_what_is_done() -> None:
    """``close(timeout=0)`` gives a clean end to who has received all, or can from its pipe."""
    bus = start_broadcaster()
    with bus.subscribe() as channel:
        channel.poll(0)
        bus.publish("last")
        bus.flush()
        bus.close(timeout=0)
        assert channel.recv(timeout=DEADLINE) == "last"
        with pytest.raises(EOFError):
            channel.recv(timeout=DEADLINE)


def use_each(pipe: Connection) -> None:
    kept = []
    while (bus := pipe.recv()) is not None:
        kept.append(bus)
        try:
            bus.publish(1)
            pipe.send("published")
        except (BrokerLost, ClosedError) as error:
            pipe.send(repr(error))


def test_a_process_can_use_the_next_broker_at_the_same_address(
    temporary_folder: Path, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """A process that still holds a handle on a broker that has ended can use the one that took its address over."""
    children(fork, use_each, pipe[1])
    address = temporary_folder / "again"
    for _ in range(2):
        with start_broadcaster(address=address) as bus:
            pipe[0].send(bus)
            assert answer(pipe[0]) == "published"
    pipe[0].send(None)


# ------------------------------------------------------------------------------------------------------ a stopped broker

BRIEF = 0.2
CLOSING = 5.0
LATE = 2.0  # seconds: the one that is promised, and one for a busy machine
CALLS: dict[str, Callable[[Bus, Channel[Any]], object]] = {
    "recv": lambda bus, channel: channel.recv(timeout=BRIEF),
    "recv_many": lambda bus, channel: channel.recv_many(timeout=BRIEF),
    "poll": lambda bus, channel: channel.poll(0),
    "publish": lambda bus, channel: bus.publish(1, timeout=BRIEF),
    "publish_many": lambda bus, channel: bus.publish_many([1], timeout=0),
    "a large publish": lambda bus, channel: bus.publish(bytes(1 << 20), timeout=BRIEF),
    "wait_for_subscribers": lambda bus, channel: bus.wait_for_subscribers(9, timeout=0),
}


def outcomes_of_calls(bus: Bus, channel: Channel[Any]) -> dict[str, tuple[object, float]]:
    """What each call comes to, and how long it took."""
    outcomes: dict[str, tuple[object, float]] = {}
    for name, call in CALLS.items():
        start = time.monotonic()
        try:
            outcome = call(bus, channel)
        except Exception as error:
            outcome = type(error).__name__
        outcomes[name] = outcome, time.monotonic() - start
    return outcomes


def report_outcomes(bus: Bus, channel: Channel[Any], report: Connection) -> None:
    report.send(outcomes_of_calls(bus, channel))
    report.recv()
    bus.publish("goes on")
    report.send(channel.recv(timeout=DEADLINE))


@pytest.mark.parametrize("where", ["attached", "child"])
def test_a_timeout_holds_while_the_broker_is_stopped(where: str, bus: Bus, fork: BaseContext, children: Children) -> None:
    """Of a handle and a channel that are not open yet, here and in a child; both can be used when it goes on."""
    channel = bus.subscribe()
    broker = bus.stats().pid
    ours, theirs = fork.Pipe()
    with ours, theirs:
        if where == "child":
            with stopped(broker):
                process = children(fork, report_outcomes, bus, channel, theirs)
                outcomes = answer(ours)
            ours.send("go on")
            assert answer(ours) == "goes on"
            finish(process)
        else:
            with stopped(broker):
                outcomes = outcomes_of_calls(bus, channel)
            bus.publish("goes on")
            assert channel.recv(timeout=DEADLINE) == "goes on"
    print(outcomes)
    assert {name: outcome for name, (outcome, _) in outcomes.items()} == dict.fromkeys(CALLS, "TimedOut") | {"poll": False}
    assert max(seconds for _, seconds in outcomes.values()) < BRIEF + LATE


@pytest.mark.parametrize("moment", ["opening", "reconnecting"])
def test_a_thread_that_waits_for_a_stopped_broker_delays_no_other(
    moment: str, leaves_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread opens a channel, or reconnects, without a timeout; those of the other threads hold, and ``close`` returns."""
    waits = threading.Event()

    def reach(name: str, subject: object = None) -> None:
        if name == "waiting for a reply":
            waits.set()

    monkeypatch.setattr(trap_points, "reach", reach)
    with start_broadcaster(restart=True) as bus:
        channel = bus.subscribe()
        if moment == "reconnecting":
            channel.poll(0)
            broker = bus.stats().pid
            os.kill(broker, signal.SIGKILL)
            wait_until(lambda: bus.stats().pid != broker)
        with stopped(bus.stats().pid):
            waits.clear()
            receiving = Background(channel.recv)
            assert waits.wait(DEADLINE)
            seconds = []
            for call in (partial(channel.recv, timeout=BRIEF), channel.poll, channel.close):
                start = time.monotonic()
                with contextlib.suppress(TimedOut):
                    call()
                seconds.append(time.monotonic() - start)
        assert isinstance(receiving.error(), ClosedError)
    assert max(seconds[:2]) < BRIEF + LATE
    assert seconds[2] < CLOSING + LATE


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("timeout", [0.0, 0.5])
def test_closing_a_broker_that_is_stopped(timeout: float, restart: bool) -> None:
    """``close`` takes a second more than its timeout at the most, though nothing answers; so does one that detaches."""
    bus: Bus = start_broadcaster(restart=restart)
    other: Bus = connect(bus.address)
    other.publish(1)
    channels = [bus.subscribe() for _ in range(3)]
    broker = psutil.Process(bus.stats().pid)
    os.kill(broker.pid, signal.SIGSTOP)
    wait_until(lambda: broker.status() == psutil.STATUS_STOPPED)
    seconds = []
    for handle in (other, bus):
        start = time.monotonic()
        handle.close(timeout=timeout)
        seconds.append(time.monotonic() - start)
    print(seconds)
    assert max(seconds) < timeout + LATE
    wait_until(lambda: not broker.is_running() or broker.status() == psutil.STATUS_ZOMBIE)
    for channel in channels:
        channel.close()
