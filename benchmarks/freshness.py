"""The age of what a slow consumer works on: this library under ``latest`` beside ZeroMQ with ``CONFLATE``, in the same program.

A source publishes at a fixed interval; one consumer process receives a message, works on it for longer than that, and receives
the next. The age is the time from before the publish until the receive has returned. The two take turns, round by round; a
figure is the median of all messages of all rounds, and the ratio is that of the medians.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.running import Options
from benchmarks.tables import Table, number
from mpbroadcast import Channel, start_broadcaster

_WARM_UP = 2  # messages
_PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Case:
    """A source and its consumer: seconds between two messages, seconds of work on each, and bytes of a message."""

    title: str
    interval: float
    work: float
    size: int = 0

    def message(self) -> tuple[float, bytes]:
        """Return the next message: the time, and its bytes."""
        return time.monotonic(), bytes(self.size)


CASES = (
    Case("a value every 10 ms, 100 ms of work", 0.01, 0.1),
    Case("1080p frames at 30/s, 80 ms of work", 1 / 30, 0.08, 1920 * 1080 * 3),
    Case("1080p frames at 30/s, 200 ms of work", 1 / 30, 0.2, 1920 * 1080 * 3),
)


def _consume(receive: Callable[[], tuple[float, bytes]], case: Case, count: int, ready: Connection) -> None:
    ages = []
    for _ in range(_WARM_UP + count):
        published, _data = receive()
        ages.append(time.monotonic() - published)
        time.sleep(case.work)
    ready.send(ages[_WARM_UP:])


def _consume_channel(channel: Channel[Any], case: Case, count: int, ready: Connection) -> None:
    _consume(channel.recv, case, count, ready)


def _consume_socket(address: str, case: Case, count: int, ready: Connection) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.CONFLATE, 1)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(address)
        _consume(socket.recv_pyobj, case, count, ready)


@contextmanager
def _through_mpbroadcast() -> Iterator[tuple[Callable[[Any], None], Callable[..., None], Any]]:
    with start_broadcaster() as bus:
        yield bus.publish, _consume_channel, bus.subscribe(overflow="latest")


@contextmanager
def _through_zmq() -> Iterator[tuple[Callable[[Any], None], Callable[..., None], Any]]:
    import zmq

    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context, context.socket(zmq.PUB) as socket:
        address = f"ipc://{folder}/pub"
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.CONFLATE, 1)
        socket.bind(address)

        def send(message: object) -> None:
            socket.send_pyobj(message)

        yield send, _consume_socket, address


def _ages(through: Callable[[], Any], case: Case, count: int, context: BaseContext) -> list[float]:
    """Return the ages of so many messages, in seconds."""
    ours, theirs = context.Pipe(duplex=False)
    with ours, theirs, through() as (send, consume, source):
        consumer = context.Process(target=consume, args=(source, case, count, theirs), daemon=True)  # type: ignore[attr-defined]
        consumer.start()
        try:
            end = time.monotonic() + _PATIENCE
            due = time.monotonic()
            while not ours.poll(max(0.0, due - time.monotonic())):
                if time.monotonic() > end:
                    raise TimeoutError(f"the consumer of {case.title} was not done in {_PATIENCE:.0f} s")
                send(case.message())
                due += case.interval
            ages: list[float] = ours.recv()
            consumer.join()
            return ages
        finally:
            consumer.kill()
            consumer.join()


def freshness_table(context: BaseContext, options: Options) -> Table:
    """Return a row for each case."""
    ways = {"mpbroadcast": _through_mpbroadcast}
    notes = []
    if importlib.util.find_spec("zmq") is not None:
        ways["ZeroMQ CONFLATE"] = _through_zmq
    else:
        notes.append("skipped: ZeroMQ: the package pyzmq is not installed")
    rows: list[Sequence[str]] = []
    for case in CASES:
        count = 3 if options.smoke else max(3, int(4 * options.scale / case.work))
        ages: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, through in ways.items():
                ages[name] += _ages(through, case, count, context)
        medians = {name: statistics.median(found) for name, found in ages.items()}
        for name, median in medians.items():
            ratio = number(median / medians["ZeroMQ CONFLATE"], 2) if "ZeroMQ CONFLATE" in medians else "-"
            rows.append([f"{name}: {case.title}", number(median * 1e3, 1), number(max(ages[name]) * 1e3, 1), ratio])
    return Table("age of the newest message at a slow consumer", ["", "ms (median)", "highest", "of ZeroMQ's"], rows, notes)
