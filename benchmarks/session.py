"""One measurement: a peer, its publisher and subscriber processes, and the work they do, from start to end."""

from __future__ import annotations

import contextlib
import math
import os
import time
from array import array
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any, Self

import psutil

from benchmarks import workers
from benchmarks.peers.base import Peer, Shape
from benchmarks.works import Taken, Work

_END = 3.0  # seconds for a process to end by itself


class Failed(Exception):
    """The measurement cannot be made; the message says why."""


@dataclass(frozen=True)
class Result:
    """What one measurement gave.

    ``rate`` is in messages published a second, counting only the share of the deliveries that came; ``publish_rate`` is that
    of the publishing alone, whose clock stops when the last publish has returned. The CPU seconds are user and system time.
    """

    published: int
    deliveries: int
    lost: int
    seconds: float
    publish_seconds: float
    publisher_cpu: float = 0.0
    broker_cpu: float = 0.0
    subscriber_cpu: float = 0.0
    latencies: array[int] = field(default_factory=lambda: array("q"))
    load: int = 0
    gave_up: bool = False

    @property
    def rate(self) -> float:
        return self.published * (1 - self.lost / self.deliveries) / self.seconds

    @property
    def publish_rate(self) -> float:
        return self.published / self.publish_seconds

    @property
    def cpu_per_million(self) -> float:
        """CPU seconds of all processes for a million deliveries."""
        return self.per_million(self.publisher_cpu + self.broker_cpu + self.subscriber_cpu)

    def per_million(self, cpu: float) -> float:
        """So many seconds for a million deliveries; not a number, when nothing came."""
        received = self.deliveries - self.lost
        return 1e6 * cpu / received if received else math.nan


class Session:
    """A peer and its processes, for the length of a ``with``: then all of them are ended, and the files removed.

    Each step is waited for at most ``patience`` seconds.
    """

    def __init__(self, peer: type[Peer], context: BaseContext, shape: Shape, patience: float) -> None:
        self._class, self._context, self._shape, self._patience = peer, context, shape, patience
        self._processes: list[Any] = []
        self._publishers: list[Connection] = []
        self._subscribers: list[Connection] = []
        self._environment: dict[str, str | None] = {}
        self._peer: Peer | None = None
        self.start_seconds = 0.0
        self.open_seconds: list[float] = []
        self.heard_seconds: list[float] = []

    def __enter__(self) -> Self:
        for name, value in self._class.environment.items():
            self._environment[name] = os.environ.get(name)
            os.environ[name] = value
        try:
            start = time.monotonic()
            self._peer = self._class(self._context, self._shape)
            self.start_seconds = time.monotonic() - start
        except Exception as error:
            self._restore()
            raise Failed(f"{type(error).__name__}: {error}") from error
        return self

    def __exit__(self, *unused: object) -> None:
        try:
            self._tell([*self._publishers, *self._subscribers], None)
            deadline = time.monotonic() + _END
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
            for process in self._processes:
                process.kill()
                process.join()
            for report in (*self._publishers, *self._subscribers):
                report.close()
            if self._peer is not None:
                with contextlib.suppress(Exception):
                    self._peer.close()
        finally:
            self._restore()

    def _restore(self) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()

    def brokers(self) -> list[psutil.Process]:
        """The processes of the broker."""
        if self._peer is None:
            return []
        return [psutil.Process(pid) for pid in self._peer.broker_pids()]

    def join(self) -> None:
        """Start all processes, and return when every subscriber has heard every publisher, and nothing more is on its way."""
        peer, shape = self._peer, self._shape
        assert peer is not None
        modules, lossy = self._class.modules, self._class.lossy
        for index in range(shape.publishers):
            source = peer.source(index)
            self._publishers.append(self._start(workers.publisher, source, modules, shape, index, lossy))
        for index in range(shape.subscribers):
            endpoint = peer.endpoint(index)
            self._subscribers.append(self._start(workers.subscriber, endpoint, modules, shape, index, lossy))
        everybody = [*self._publishers, *self._subscribers]
        self._gather(everybody, "ready")
        self._tell(self._publishers, None)
        self._gather(self._publishers, "open")
        self._tell(self._subscribers, None)
        self.open_seconds = self._gather(self._subscribers, "open")
        self._tell(self._publishers, None)
        self.heard_seconds = self._gather(self._subscribers, "heard")
        self._tell(self._publishers, None)
        self._gather(self._subscribers, "begun")
        if lossy:
            self._tell(self._publishers, None)

    def _start(self, target: Any, part: Any, *arguments: Any) -> Connection:
        here, there = self._context.Pipe()
        process = self._context.Process(target=target, args=(part, there, *arguments))  # type: ignore[attr-defined]
        process.start()
        there.close()
        self._processes.append(process)
        return here

    def _tell(self, reports: list[Connection], what: Any) -> None:
        for report in reports:
            with contextlib.suppress(OSError):
                report.send(what)

    def _gather(self, reports: list[Connection], what: str) -> list[Any]:
        answers = self._answers(reports, {what}, {}, time.monotonic() + self._patience)
        if len(answers) < len(reports):
            missing = len(reports) - len(answers)
            raise Failed(f"{missing} of {len(reports)} processes did not get as far as {what!r} in {self._patience:.0f} s")
        return [answers[report] for report in reports]

    def _answers(
        self,
        reports: list[Connection],
        kinds: set[str],
        answers: dict[Connection, Any],
        deadline: float,
        also_others: bool = True,
    ) -> dict[Connection, Any]:
        """Wait for an answer of each of ``reports``, until the deadline, and take those of others that come meanwhile."""
        listened_to = {*self._publishers, *self._subscribers} if also_others else set(reports)
        while not answers.keys() >= set(reports) and (left := deadline - time.monotonic()) > 0:
            for report in wait(listened_to - answers.keys(), left):
                assert isinstance(report, Connection)
                try:
                    kind, value = report.recv()
                except (EOFError, OSError):
                    raise Failed(f"a process ended before {' or '.join(sorted(kinds))!r}") from None
                if kind == "failed":
                    raise Failed(value)
                if kind in kinds:
                    answers[report] = value
        return answers

    def run(self, work: Work) -> Result:
        """Do the work. Who is not done ``patience`` seconds after the last publish is given up; so is who publishes so long."""
        shape = self._shape
        if self._class.lossy:
            time.sleep(0.05)  # for what was repeated
        before = _cpu(self.brokers())
        self._tell([*self._subscribers, *self._publishers], work)
        kinds, answers = {"published", "taken"}, dict[Connection, Any]()
        self._answers(self._publishers, kinds, answers, time.monotonic() + self._patience)
        if all(report in answers for report in self._publishers):
            self._answers(self._subscribers, kinds, answers, time.monotonic() + self._patience)
        gave_up = len(answers) < shape.publishers + shape.subscribers
        if gave_up:
            for process in self._processes[shape.publishers :]:
                process.terminate()
            with contextlib.suppress(Failed):
                self._answers(self._subscribers, kinds, answers, time.monotonic() + 1)
        broker_cpu = _cpu(self.brokers()) - before
        published = {report: answers[report] for report in self._publishers if report in answers}
        taken = {report: answers[report] for report in self._subscribers if report in answers}
        self._tell(self._publishers, None)
        used = self._answers(list(published), {"used"}, {}, time.monotonic() + _END, also_others=False)
        return self._result(work, list(published.values()), taken, sum(used.values()), broker_cpu, gave_up)

    def _result(
        self,
        work: Work,
        published: list[tuple[float, float]],
        taken: dict[Connection, tuple[Taken, float]],
        publisher_cpu: float,
        broker_cpu: float,
        gave_up: bool,
    ) -> Result:
        shape = self._shape
        expected = [work.expected(shape, index) for index in range(shape.subscribers)]
        seen = [taken[report][0].seen if report in taken else 0 for report in self._subscribers]
        now = time.monotonic()
        start = min((began for began, _ in published), default=now - self._patience)
        end = max((one.end for one, _ in taken.values()), default=now)
        latencies = array("q")
        for one, _ in taken.values():
            latencies.extend(one.latencies)
        return Result(
            work.published(shape),
            sum(expected),
            sum(max(0, due - got) for due, got in zip(expected, seen, strict=True)),
            max(end - start, 1e-9),
            max(max((ended for _, ended in published), default=now) - start, 1e-9),
            publisher_cpu,
            broker_cpu,
            sum(cpu for _, cpu in taken.values()),
            latencies,
            sum(one.load for one, _ in taken.values()),
            gave_up,
        )


def _cpu(processes: list[psutil.Process]) -> float:
    used = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def measure(peer: type[Peer], context: BaseContext, shape: Shape, work: Work, patience: float) -> Result:
    """Start it all, do the work, end it all."""
    with Session(peer, context, shape, patience) as session:
        session.join()
        return session.run(work)
