"""The processes of a measurement: what a publisher and a subscriber do, step by step, as the one who measures says.

1. They import what they need, and say so; no clock runs.
2. The publishers open their sources, then the subscribers their endpoints.
3. The publishers say hello, again and again, until every subscriber has heard every publisher; then each says it is about to
   begin, and the subscribers wait for that. So nobody joins too late, whatever the peer.
4. The publishers publish, the subscribers take in, and each reports.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from benchmarks.peers.base import Endpoint, Shape, Source, module
from benchmarks.works import GivenUp, Taken, Work

_HELLO_EVERY = 0.002  # seconds
_LAST_EVERY = 0.1


def cpu_seconds() -> float:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _give_up(signum: int, frame: FrameType | None) -> None:
    raise GivenUp


def _begin(report: Connection, modules: tuple[str, ...], kind: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who measures
    for name in (*modules, *(("numpy",) if kind == "array" else ())):
        module(name)
    report.send(("ready", None))
    report.recv()


def subscriber(endpoint: Endpoint, report: Connection, modules: tuple[str, ...], shape: Shape, index: int, lossy: bool) -> None:
    """The process of a subscriber."""
    with _reporting(report):
        signal.signal(signal.SIGTERM, _give_up)
        _begin(report, modules, shape.kind)
        start = time.monotonic()
        messages = endpoint.open()
        report.send(("open", time.monotonic() - start))
        heard: set[int] = set()
        for message in messages:
            heard.add(message["hello"])
            if len(heard) == shape.publishers:
                break
        report.send(("heard", time.monotonic() - start))
        _await_beginning(messages, shape.publishers)
        if lossy:  # what was repeated may still come
            messages = (message for message in messages if not (type(message) is dict and "hello" in message))
        report.send(("begun", None))
        work: Work | None = report.recv()
        if work is not None:
            used = cpu_seconds()
            taken = Taken()
            with contextlib.suppress(GivenUp, EOFError):
                work.take(messages, shape, index, taken)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            report.send(("taken", (taken, cpu_seconds() - used)))
            report.recv()
        endpoint.close()


def _await_beginning(messages: Iterator[Any], publishers: int) -> None:
    begun: set[int] = set()
    for message in messages:
        if message["begin"] is not None:
            begun.add(message["begin"])
            if len(begun) == publishers:
                return


def publisher(source: Source, report: Connection, modules: tuple[str, ...], shape: Shape, index: int, lossy: bool) -> None:
    """The process of a publisher."""
    with _reporting(report):
        _begin(report, modules, shape.kind)
        source.open()
        report.send(("open", None))
        report.recv()
        source.publish({"hello": index, "begin": None})
        _repeat(report, _HELLO_EVERY, lambda: source.publish({"hello": index, "begin": None}))
        source.publish({"hello": index, "begin": index})
        if lossy:
            _repeat(report, _HELLO_EVERY, lambda: source.publish({"hello": index, "begin": index}))
        work: Work | None = report.recv()
        if work is not None:
            used = cpu_seconds()
            start = time.monotonic()
            work.send(source, index)
            report.send(("published", (start, time.monotonic())))
            if lossy:
                _repeat(report, _LAST_EVERY, lambda: source.publish(work.last(index)))
            else:
                report.recv()
            report.send(("used", cpu_seconds() - used))
        source.close()


def _repeat(report: Connection, every: float, do: Callable[[], None]) -> None:
    """Until the one who measures says something."""
    while not report.poll(every):
        do()
    report.recv()


@contextlib.contextmanager
def _reporting(report: Connection) -> Iterator[None]:
    """Tell what went wrong."""
    try:
        yield
    except (GivenUp, EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            report.send(("failed", f"{type(error).__name__}: {error}"))
