"""``python -m benchmarks.thresholds``: which way a message of some size travels fastest; the library's thresholds come from it.

For each size and number of subscribers, all messages go one way: through the pipes, through the ring, or each in memory of
its own. The clock runs from before the first publish until the last subscriber has received the last message. The ways take
turns, and a figure is the median of the rounds. ``bytes`` are copied by whoever unpickles them; an array (of numpy, where that
is installed) in memory of its own is not, and its first and last element are read.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from mpbroadcast import Channel, start_broadcaster

_SHARED_FROM = (
    "mpbroadcast.client.publishing.SHARED_FROM",
    "mpbroadcast.client.shared_writer.SHARED_FROM",
    "mpbroadcast.client.publishing.SHORT",  # the fast path into the pipe
)
_LONGEST = "mpbroadcast.client.shared_writer.LONGEST"
_MEMORY_FROM = "mpbroadcast.client.shared_writer.MEMORY_FROM"
WAYS: dict[str, dict[str, int]] = {
    "pipe": dict.fromkeys(_SHARED_FROM[:2], 1 << 40),
    "ring": {**dict.fromkeys(_SHARED_FROM, 1), _LONGEST: 1 << 22, _MEMORY_FROM: 1 << 40},
    "memory": {**dict.fromkeys(_SHARED_FROM, 1), _LONGEST: 0, _MEMORY_FROM: 1},
}
SIZES = [1 << power for power in range(9, 25)]


@contextmanager
def _only(way: str) -> Iterator[None]:
    patches = [mock.patch(name, value) for name, value in WAYS[way].items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _subscriber(channel: Channel[Any], report: Connection, count: int) -> None:
    channel.poll(0)
    report.send(None)
    seen = 0
    while seen < count:
        for message in channel.recv_many():
            assert message[0] == message[-1]
            seen += 1
    report.send(time.monotonic())


def measure(way: str, message: Any, subscribers: int, count: int) -> float:
    """Messages a second."""
    context = multiprocessing.get_context()
    with start_broadcaster() as bus:
        reports = []
        processes = []
        for _ in range(subscribers):
            report, end = context.Pipe(duplex=False)
            process = context.Process(target=_subscriber, args=(bus.subscribe(), end, count), daemon=True)
            process.start()
            processes.append(process)
            reports.append(report)
        for report in reports:
            report.recv()
        with _only(way):
            start = time.monotonic()
            for _ in range(count):
                bus.publish(message)
            ends: list[float] = [report.recv() for report in reports]
        for process in processes:
            process.join()
    return count / (max(ends) - start)


def _array(size: int) -> Any:
    import numpy

    return numpy.ones(max(1, size // 8))


def main() -> None:
    """Measure, and print a table for each kind of message and number of subscribers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.thresholds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="roughly, for one measurement")
    parser.add_argument("--sizes", help="bytes, with commas between them", default=",".join(map(str, SIZES)))
    options = parser.parse_args()
    kinds: dict[str, Callable[[int], Any]] = {"bytes": lambda size: b"a" * size}
    if importlib.util.find_spec("numpy"):
        kinds["array"] = _array
    print(f"Python {'.'.join(map(str, __import__('sys').version_info[:3]))}, {os.cpu_count()} CPUs; messages/s")
    for kind, make in kinds.items():
        for subscribers in (1, 4):
            print(f"\n{kind}, {subscribers} subscriber(s)\n{'size':>10} " + "".join(f"{way:>12}" for way in WAYS))
            for size in map(int, options.sizes.split(",")):
                message = make(size)
                rates: dict[str, list[float]] = {way: [] for way in WAYS}
                for _ in range(options.rounds):
                    for way in WAYS:
                        rough = 5e9 / (size * (subscribers + 1) + 2e4 * (subscribers + 1))
                        rates[way].append(measure(way, message, subscribers, max(20, int(rough * options.seconds / 2))))
                figures = {way: statistics.median(found) for way, found in rates.items()}
                best = max(figures.values())
                print(
                    f"{size:>10} "
                    + "".join(f"{figure:>11,.0f}{'*' if figure == best else ' '}" for figure in figures.values()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
