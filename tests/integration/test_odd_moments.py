"""Moments that are seldom met: the next broker at the same address, which message waits behind which, a stopped broker."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, ClosedError, connect, start_broadcaster, trap_points
from tests.support.helpers import DEADLINE, Background, rest, stopped, wait_until
from tests.support.victims import alive
from tests.support.victims import stopped as is_stopped

Bus = Broadcaster[Any]


def test_a_large_message_that_waits_for_room_is_not_overtaken(bus: Bus) -> None:
    """However many small ones others publish."""
    channel = bus.subscribe(capacity=60_000)
    channel.poll(0)
    ended = threading.Event()

    def publish_small() -> None:
        while not ended.is_set():
            small.publish(b"s" * 50)

    with connect(bus.address) as other, connect(bus.address) as small:
        flood = Background(publish_small)
        large = Background(other.publish, b"L" * 59_000)
        while channel.recv(timeout=DEADLINE)[:1] != b"L":
            pass
        large.result()
        ended.set()
        bus.unsubscribe(channel)
        flood.result()
        rest(channel)


BRIEF = 0.1
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


def timed(call: Callable[..., object], *arguments: Any) -> tuple[object, float]:
    """Return what a call returns, or the name of its error, and how many seconds it took."""
    start = time.monotonic()
    try:
        outcome = call(*arguments)
    except Exception as error:
        outcome = type(error).__name__
    return outcome, time.monotonic() - start


def test_a_timeout_holds_while_the_broker_is_stopped(bus: Bus) -> None:
    """Of a handle and a channel that are not open yet, in all calls at once; both can be used when the broker goes on."""
    channel = bus.subscribe()
    with stopped(bus.stats().pid):
        calling = {name: Background(timed, call, bus, channel) for name, call in CALLS.items()}
        outcomes = {name: thread.result() for name, thread in calling.items()}
    bus.publish("goes on")
    assert channel.recv(timeout=DEADLINE) == "goes on"
    assert {name: outcome for name, (outcome, _) in outcomes.items()} == dict.fromkeys(CALLS, "TimedOut") | {"poll": False}
    assert max(seconds for _, seconds in outcomes.values()) < BRIEF + LATE, outcomes


def test_a_clock_that_jumps_changes_nothing(fork: BaseContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the time of day goes an hour back and forth, here and in the broker: timeouts are on another clock."""
    now, hours = time.time, itertools.cycle((0, -3600, 3600))
    monkeypatch.setattr(time, "time", lambda: now() + next(hours))
    with start_broadcaster(context=fork) as bus, bus.subscribe() as channel:
        for number in range(50):
            bus.publish(number, timeout=DEADLINE)
            assert channel.recv(timeout=DEADLINE) == number
            bus.flush(timeout=DEADLINE, delivered=True)
        assert 0 <= bus.stats().uptime < DEADLINE
        outcome, seconds = timed(channel.recv, BRIEF)
        assert outcome == "TimedOut"
        assert BRIEF <= seconds < BRIEF + LATE


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
            assert max(timed(channel.recv, BRIEF)[1], timed(channel.poll)[1]) < BRIEF + LATE
            if moment == "opening":
                assert timed(channel.close)[1] < CLOSING + LATE
        channel.close()
        assert isinstance(receiving.error(), ClosedError)


@pytest.mark.parametrize(("timeout", "restart"), [(0.0, False), (0.2, True)])
def test_closing_a_broker_that_is_stopped(timeout: float, restart: bool) -> None:
    """Take a second more than the timeout at the most, though nothing replies; also where ``close`` only detaches."""
    bus: Bus = start_broadcaster(restart=restart)
    other: Bus = connect(bus.address)
    other.publish(1)
    channels = [bus.subscribe() for _ in range(3)]
    broker = bus.stats().pid
    os.kill(broker, signal.SIGSTOP)
    wait_until(lambda: is_stopped(broker))
    seconds = [timed(handle.close, timeout)[1] for handle in (other, bus)]
    assert max(seconds) < timeout + LATE, seconds
    wait_until(lambda: not alive(broker))
    for channel in channels:
        channel.close()
