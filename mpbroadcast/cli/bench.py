"""Measure throughput and latency on this machine, next to multiprocessing.Queue. Takes less than a minute."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from mpbroadcast import start_broadcaster
from mpbroadcast.cli import output
from mpbroadcast.cli.text import encode

EXAMPLE = "mpbroadcast bench"

_SECONDS: Final = 1.0  # about, of one measurement
_FIRST: Final = 32  # messages that show how many fit into that
_MOST: Final = 400_000
_LATENCIES: Final = 300  # messages, each alone
_PAUSE: Final = 0.001  # seconds between two of them
_DEADLINE: Final = 60.0  # seconds until a reader must have read


class Case(NamedTuple):
    """A message, and the number of its readers."""

    title: str
    message: Any
    readers: int


_SMALL: Final = {"id": 12345, "name": "message", "value": 0.5}
CASES: Final = (
    Case("a small dict", _SMALL, 1),
    Case("a small dict", _SMALL, 4),
    Case("64 KiB of bytes", bytes(1 << 16), 1),
    Case("64 KiB of bytes", bytes(1 << 16), 4),
    Case("4 MiB of bytes", bytes(1 << 22), 4),
)


def _read(receive: Callable[[], Any], orders: Connection) -> None:
    """Receive as many messages as is ordered, and answer with how long the last ones took that are times, in nanoseconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    while count := orders.recv():
        late = []
        for _ in range(count):
            message = receive()
            if type(message) is int:
                late.append(time.monotonic_ns() - message)
        orders.send(late)


class _Readers:
    """Processes that read, each from a source of its own."""

    def __init__(self, send: Callable[[Any], None], sources: list[Callable[[], Any]]) -> None:
        self._send = send
        self._processes = []
        self._orders: list[Connection] = []
        for source in sources:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=_read, args=(source, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._orders.append(ours)

    def send(self, message: Any, count: int, pause: float = 0.0) -> tuple[float, list[int]]:
        """Send so many messages to all. Return the seconds until all have them, and how long those took that are times."""
        for orders in self._orders:
            orders.send(count)
        start = time.monotonic()
        for _ in range(count):
            self._send(message if pause == 0.0 else time.monotonic_ns())
            if pause:
                time.sleep(pause)
        late: list[int] = []
        for orders in self._orders:
            if not orders.poll(_DEADLINE):
                raise TimeoutError(f"a reader did not get its messages within {_DEADLINE:.0f} s")
            late += orders.recv()
        return time.monotonic() - start, late

    def end(self) -> None:
        """End the processes."""
        for process, orders in zip(self._processes, self._orders, strict=True):
            process.kill()
            process.join()
            orders.close()


@contextlib.contextmanager
def _channels(count: int) -> Iterator[_Readers]:
    with start_broadcaster() as bus:
        readers = _Readers(bus.publish, [bus.subscribe().recv for _ in range(count)])
        try:
            yield readers
        finally:
            readers.end()


@contextlib.contextmanager
def _queues(count: int) -> Iterator[_Readers]:
    queues: list[multiprocessing.Queue[Any]] = [multiprocessing.Queue() for _ in range(count)]

    def put(message: Any) -> None:
        for queue in queues:
            queue.put(message)

    readers = _Readers(put, [queue.get for queue in queues])
    try:
        yield readers
    finally:
        readers.end()
        for queue in queues:
            queue.cancel_join_thread()
            queue.close()


def rate(readers: _Readers, message: Any) -> float:
    """Return the messages per second that reach all readers, measured for about a second."""
    readers.send(message, _FIRST)  # processes start, rings are made
    count = _FIRST
    seconds, _ = readers.send(message, count)
    while seconds < _SECONDS / 4 and count < _MOST:
        count = min(_MOST, count * 8, int(count * _SECONDS / max(seconds, 1e-6)) + 1)
        seconds, _ = readers.send(message, count)
    return count / seconds


def latencies(readers: _Readers) -> tuple[float, float]:
    """Return the median, and what 99 of 100 messages stay below, in microseconds, of messages that come alone."""
    readers.send(None, _FIRST)
    _, late = readers.send(None, _LATENCIES, _PAUSE)
    return statistics.median(late) / 1000, statistics.quantiles(late, n=100)[98] / 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the measurements are always the same."""


def run(options: argparse.Namespace) -> int:
    """Print a row for each measurement as soon as it is there, and return the exit code."""
    _print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}", "")
    _print("messages per second", "readers", "mpbroadcast", "Queues", "ratio")
    for title, message, count in CASES:
        figures = []
        for kind in (_channels, _queues):
            with kind(count) as readers:
                figures.append(rate(readers, message))
        ours, theirs = figures
        _print(title, str(count), f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}")
    _print("microseconds of one that comes alone", "", "", "", "")
    both = []
    for kind in (_channels, _queues):
        with kind(1) as readers:
            both.append(latencies(readers))
    for title, (ours, theirs) in zip(("median", "99 of 100"), zip(*both, strict=True), strict=True):
        _print(title, "1", f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}")
    return 0


def _print(title: str, *cells: str) -> None:
    output.write(encode(f"{title:<20}{''.join(f'{cell:>12}' for cell in cells)}".rstrip() + "\n"))
