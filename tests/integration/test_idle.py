"""A broker that has nothing to do does nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from multiprocessing import Pipe
from multiprocessing.context import BaseContext
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, start_broadcaster
from tests.support import victims
from tests.support.helpers import DEADLINE, Background, Children, answer, fill, take, wait_until

MOST_CPU = 0.02  # seconds: one tick or two
MOST_WAKE_UPS = 5  # a second


def assert_idle(pid: int, window: float = 0.6) -> None:
    """For ``window`` seconds a process uses no measurable CPU time, and wakes up less than five times a second.

    The watch may be repeated: what was still under way when it began is no idling.
    """
    process = psutil.Process(pid)
    for _ in range(3):
        cpu, switches = process.cpu_times(), process.num_ctx_switches()
        time.sleep(window)
        cpu_after, switches_after = process.cpu_times(), process.num_ctx_switches()
        used = cpu_after.user + cpu_after.system - cpu.user - cpu.system
        woken = sum(switches_after) - sum(switches)
        print(f"{used:.3f} s of CPU and {woken} wake-ups in {window} s")
        if used <= MOST_CPU and woken <= MOST_WAKE_UPS * window:
            return
    pytest.fail(f"process {pid} is not idle: {used:.3f} s of CPU and {woken} wake-ups in {window} s")


def test_an_idle_broker_with_twenty_channels(bus: Broadcaster[Any]) -> None:
    """Twenty open channels and no traffic cost no measurable CPU, and under five wake-ups a second."""
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(bus.subscribe()) for _ in range(20)]
        for number in range(100):
            bus.publish(number)
        for channel in channels:
            assert take(channel, 100) == list(range(100))
        assert_idle(bus.stats().pid, 1.2)


def test_a_broker_with_a_full_backlog_is_idle(bus: Broadcaster[Any]) -> None:
    """A publisher that waits for a reader that does not read keeps nobody busy: neither the broker nor itself."""
    with bus.subscribe(capacity=100_000) as channel:
        fill(bus)
        waiting = Background(bus.publish, (-1, bytes(1000)))
        waiting.wait_until_blocked("publish")
        assert_idle(bus.stats().pid)
        assert_idle(psutil.Process().pid)
        while channel.recv(DEADLINE)[0] >= 0:
            pass
        waiting.result()


def test_unopened_and_ended_channels_leave_the_broker_idle(bus: Broadcaster[Any]) -> None:
    """Messages that wait for a channel nobody has opened, and ends nobody has read, wake nobody up."""
    with bus.subscribe() as unopened, bus.subscribe() as ended:
        ended.poll(0)
        for _ in range(3000):
            bus.publish(bytes(1000))
        bus.flush(DEADLINE)
        bus.unsubscribe(ended)
        assert_idle(bus.stats().pid)
        assert not unopened.closed


def test_silent_clients_leave_the_broker_idle_and_are_sent_away(
    leaves_nothing: None, fork: BaseContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends nothing, or half of something, wakes nobody up, and cannot keep its connection for ever."""
    monkeypatch.setattr("mpbroadcast.broker.acceptor.HANDSHAKE_TIMEOUT", 1.5)
    with start_broadcaster(context=fork) as bus, socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as half:
        for client in (silent, half):
            client.connect(bus.address)
            client.settimeout(2 * DEADLINE)
        half.sendall(b"\0\0")
        assert_idle(bus.stats().pid)
        for client in (silent, half):
            with contextlib.suppress(ConnectionError):
                while client.recv(1000):
                    pass


def test_a_subscriber_that_waits_is_idle(bus: Broadcaster[Any], fork: BaseContext, children: Children) -> None:
    """A process that waits in ``recv`` sleeps."""
    mine, theirs = Pipe()
    reader = children(fork, victims.subscriber, bus, theirs)
    pid = answer(mine)
    bus.publish("one")
    wait_until(lambda: victims.asleep(pid))
    assert_idle(pid)
    bus.publish(None)
    assert answer(mine) == ["one"]
    reader.join(DEADLINE)
    mine.close()
    theirs.close()
