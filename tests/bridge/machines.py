"""Machines for tests of bridges: a bus each, with a bridge over a common engine."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil

from mpbroadcast import BridgeStats, Broadcaster, Channel, Lagged, start_broadcaster
from mpbroadcast.bridge import Bridge, bridge
from tests.support.helpers import DEADLINE, wait_until

KEY = "the key of all machines"
STREAM = "mpbroadcast"


@contextlib.contextmanager
def machine(url: str, *, restart: bool = False, **options: Any) -> Iterator[tuple[Broadcaster[Any], Bridge]]:
    """A bus with a bridge, both ended at the end."""
    with start_broadcaster(restart=restart) as bus, linked(bus, url, **options) as link:
        yield bus, link


def linked(bus: Broadcaster[Any], url: str, **options: Any) -> Bridge:
    """Return a bridge of this bus."""
    return bridge(bus, url, **{"key": KEY, "start_timeout": DEADLINE, **options})


@contextlib.contextmanager
def machines(url: str, count: int = 2, **options: Any) -> Iterator[list[Broadcaster[Any]]]:
    """Buses that are linked."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(machine(url, **options))[0] for _ in range(count)]


def row(bus: Broadcaster[Any], stream: str = STREAM) -> BridgeStats:
    """Return the statistics of a bridge."""
    return bus.stats().bridges[stream]


def pid_at_work(bus: Broadcaster[Any], stream: str = STREAM, but: int | None = None) -> int:
    """Wait for a bridge's process, other than ``but``, and return its ID."""

    def look() -> int | None:
        found = bus.stats().bridges.get(stream)
        return found.pid if found is not None and found.pid not in (None, but) else None

    return int(wait_until(look, DEADLINE))


def kill_bridge(bus: Broadcaster[Any], stream: str = STREAM) -> None:
    """Kill the bridge's process at work."""
    os.kill(pid_at_work(bus, stream), signal.SIGKILL)


def until_up(bus: Broadcaster[Any], stream: str = STREAM) -> None:
    """Wait until the bridge is up."""
    wait_until(lambda: row(bus, stream).state == "up", DEADLINE)


def until_gone(pid: int) -> None:
    """Wait until a process has ended."""
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, DEADLINE)


def receive(channel: Channel[Any], count: int) -> list[Any]:
    """Return so many messages, and the word "gap" for each error between them."""
    found: list[Any] = []
    deadline = time.monotonic() + DEADLINE
    while sum(one != "gap" for one in found) < count:
        assert time.monotonic() < deadline, found[-10:]
        try:
            found.append(channel.recv(timeout=DEADLINE))
        except Lagged:
            found.append("gap")
    return found
