"""A broker that has nothing to do does nothing."""

import contextlib
import socket
import time
from multiprocessing.context import BaseContext
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, start_broadcaster
from tests.support.helpers import DEADLINE, Background, Children, fill, take, wait_until
from tests.support.large_workers import ReaderProcess, Size
from tests.support.victims import asleep

MOST_CPU = 0.02  # seconds: one tick or two
MOST_WAKE_UPS = 5  # a second


def assert_idle(*pids: int, window: float = 0.6) -> None:
    """Expect that for ``window`` seconds each process uses no measurable CPU time, and wakes up less than five times a second.
    The watch may be repeated: what was still in progress when it began is no idling."""
    processes = [psutil.Process(pid) for pid in pids]

    def used() -> list[tuple[float, int]]:
        found = []
        for process in processes:
            cpu = process.cpu_times()
            found.append((cpu.user + cpu.system, sum(process.num_ctx_switches())))
        return found

    for _ in range(3):
        before = used()
        time.sleep(window)
        differences = [(after[0] - one[0], after[1] - one[1]) for one, after in zip(before, used(), strict=True)]
        print(f"seconds of CPU, and wake-ups, in {window} s: {differences}")
        if all(cpu <= MOST_CPU and woken <= MOST_WAKE_UPS * window for cpu, woken in differences):
            return
    pytest.fail(f"not idle: {differences}")


def test_an_idle_broker_with_twenty_channels(bus: Broadcaster[Any], fork: BaseContext, children: Children) -> None:
    """Nor is one woken up by messages that wait for an unopened channel, and ends that are not read; a reader sleeps, too."""
    reader = ReaderProcess(bus.subscribe(), children, fork)
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(bus.subscribe()) for _ in range(20)]
        ended, _unopened = (stack.enter_context(bus.subscribe()) for _ in range(2))
        ended.poll(0)
        bus.publish_many(map(Size(1000).message, range(1000)))
        for channel in channels:
            take(channel, 1000)
        bus.unsubscribe(ended)
        wait_until(lambda: asleep(reader.pid))
        assert_idle(bus.stats().pid, reader.pid, window=1.0)
    bus.unsubscribe(reader.channel)
    assert reader.result() == (list(range(1000)), "EOFError")


def test_what_waits_leaves_the_broker_idle(leaves_nothing: None, fork: BaseContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher that waits for a full backlog, and clients that send nothing, or half of something; these are closed."""
    monkeypatch.setattr("mpbroadcast.broker.acceptor.HANDSHAKE_TIMEOUT", 1.5)
    with start_broadcaster(context=fork) as bus, bus.subscribe(capacity=100_000) as channel, contextlib.ExitStack() as stack:
        fill(bus)
        waiting = Background(bus.publish, (-1, bytes(1000)))
        waiting.wait_until_blocked("publish")
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        for client in clients:
            client.connect(bus.address)
            client.settimeout(2 * DEADLINE)
        clients[0].sendall(b"\0\0")
        assert_idle(bus.stats().pid, psutil.Process().pid)
        for client in clients:
            with contextlib.suppress(ConnectionError):
                while client.recv(1000):
                    pass
        while channel.recv(DEADLINE)[0] >= 0:
            pass
        waiting.result()
