"""What can be measured: a row is one question, put to every peer that has an answer."""

from __future__ import annotations

import math
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.context import BaseContext
from typing import Any

import psutil

from benchmarks.peers.base import Peer, Shape
from benchmarks.session import Result, Session
from benchmarks.works import Arrays, Blocks, Paced, Topics, Work, topics_of

_KIB, _MIB = 1 << 10, 1 << 20
_TOPICS = 10_000
_LOAD = 10_000  # messages a second


@dataclass(frozen=True)
class Metric:
    """A column. ``best`` says whether the highest or the lowest value is best."""

    name: str
    digits: int = 0
    best: Callable[[list[float]], float] | None = None
    total: bool = False  # of the rounds, instead of their median


@dataclass
class Measured:
    """What one measurement gave: a value for each metric, and what else is worth keeping."""

    values: dict[str, float]
    seconds: float = 0.0
    latencies: array[int] = field(default_factory=lambda: array("q"))
    gave_up: bool = False


@dataclass(frozen=True)
class Row:
    """One question. The first metric is the one that is compared; ``count`` is the most messages of one measurement."""

    name: str
    family: str
    title: str
    shape: Shape
    metrics: tuple[Metric, ...]
    ask: Callable[[Row, type[Peer], BaseContext, int, float], Measured]
    count: int = 0
    least: int = 0
    work: Callable[[int], Work] = Work

    @property
    def yardstick(self) -> bool:
        """Whether a plain copy of the same size is measured, too."""
        return self.shape.kind == "array"

    @property
    def floor(self) -> bool:
        """Whether unpickling alone is measured, too."""
        return self.metrics[0] is RATE and self.shape.kind in ("small", "bytes", "publishers")


RATE = Metric("messages/s", best=max)
P50 = Metric("p50 µs", 1, best=min)
_MIB_RATE = Metric("MiB/s")
CPU = Metric("deliveries/CPU s", best=max)  # of all processes together
_LOST = Metric("lost", total=True)
_COUNT = Metric("messages")
COPIES = Metric("copies", 2)
_SMALL_METRICS = (RATE, CPU, _LOST, _COUNT)
_BYTES_METRICS = (RATE, _MIB_RATE, CPU, _LOST, _COUNT)
_ARRAY_METRICS = (replace(RATE, digits=2), _MIB_RATE, COPIES, replace(CPU, digits=1), _LOST, _COUNT)
_LATENCY_METRICS = (P50, Metric("p99 µs", 1), Metric("p99.9 µs", 1), Metric("max µs", 1), _LOST)
_CPU_METRICS = (
    Metric("CPU s/1M", 2, best=min),
    Metric("publisher", 2),
    Metric("broker", 2),
    Metric("subscribers", 2),
    _LOST,
)
_MEMORY_METRICS = (Metric("KiB a subscriber", 1, best=min), Metric("MiB at rest", 1), Metric("RSS MiB at rest", 1))
_START_METRICS = (Metric("total ms", 1, best=min), Metric("start ms", 1), Metric("subscribe ms", 1), Metric("heard ms", 1))


def _run(row: Row, peer: type[Peer], context: BaseContext, count: int, patience: float) -> Result:
    with Session(peer, context, row.shape, patience) as session:
        session.join()
        return session.run(row.work(count))


def throughput(row: Row, peer: type[Peer], context: BaseContext, count: int, patience: float) -> Measured:
    """Messages a second, until the last subscriber has unpickled the last message."""
    result = _run(row, peer, context, count, patience)
    values = {
        "messages/s": result.rate,
        "MiB/s": result.rate * row.shape.size / _MIB,
        CPU.name: 1e6 / (result.cpu_per_million or math.nan),
        "lost": result.lost,
        "messages": result.published,
        "publish/s": result.publish_rate,
    }
    return Measured(values, result.seconds, gave_up=result.gave_up)


def _cpu(row: Row, peer: type[Peer], context: BaseContext, count: int, patience: float) -> Measured:
    """CPU seconds, and whose, for a million deliveries."""
    result = _run(row, peer, context, count, patience)
    values = {
        "CPU s/1M": result.cpu_per_million,
        "publisher": result.per_million(result.publisher_cpu),
        "broker": result.per_million(result.broker_cpu),
        "subscribers": result.per_million(result.subscriber_cpu),
        "lost": result.lost,
    }
    return Measured(values, result.seconds, gave_up=result.gave_up)


def _latency(row: Row, peer: type[Peer], context: BaseContext, count: int, patience: float) -> Measured:
    """From before ``publish`` is called until after the message was unpickled, in every subscriber."""
    result = _run(row, peer, context, count, patience)
    ordered = sorted(result.latencies)
    values = {f"p{share} µs": percentile(ordered, share) / 1000 for share in (50, 99, 99.9)}
    values["max µs"] = percentile(ordered, 100) / 1000
    values["lost"] = result.lost
    values["load/s"] = result.load / row.shape.subscribers / result.seconds
    return Measured(values, result.seconds, result.latencies, result.gave_up)


def percentile(ordered: list[int], share: float) -> float:
    """The smallest value that at least ``share`` percent are not above; not a number, when there is none."""
    if not ordered:
        return math.nan
    return ordered[max(0, min(len(ordered) - 1, -int(-len(ordered) * share // 100) - 1))]


def _memory(row: Row, peer: type[Peer], context: BaseContext, count: int, patience: float) -> Measured:
    """What the broker has written for itself before anybody connects, and how much more for each subscriber then."""
    with Session(peer, context, row.shape, patience) as session:
        time.sleep(0.2)  # until it has come to rest
        rest, resident = private_bytes(session.brokers()), sum(process.memory_info().rss for process in session.brokers())
        session.join()
        more = private_bytes(session.brokers()) - rest
    values = {
        "KiB a subscriber": more / _KIB / row.shape.subscribers,
        "MiB at rest": rest / _MIB,
        "RSS MiB at rest": resident / _MIB,
    }
    return Measured(values)


def private_bytes(processes: list[psutil.Process]) -> int:
    """The memory that these processes have for themselves. On Linux, what they have written: the unique set size also has the
    pages of libraries that nobody else happens to use."""
    total = 0
    for process in processes:
        maps: list[Any] = process.memory_maps() if hasattr(process, "memory_maps") else []
        total += sum(part.private_dirty for part in maps) if maps else process.memory_full_info().uss
    return total


def _start(row: Row, peer: type[Peer], context: BaseContext, count: int, patience: float) -> Measured:
    """Starting the peer, with its broker; subscribing; and subscribing until the first message has come."""
    with Session(peer, context, row.shape, patience) as session:
        session.join()
        heard = statistics.median(session.heard_seconds)
        values = {
            "total ms": 1000 * (session.start_seconds + heard),
            "start ms": 1000 * session.start_seconds,
            "subscribe ms": 1000 * statistics.median(session.open_seconds),
            "heard ms": 1000 * heard,
        }
    return Measured(values)


def _rows() -> list[Row]:
    rows: list[Row] = []
    for n, count in ((1, 1_000_000), (4, 300_000), (16, 100_000)):
        shape = Shape(subscribers=n)
        rows.append(Row(f"small-{n}", "small", f"small dict, to {n}", shape, _SMALL_METRICS, throughput, count, 200))
    for size, text, count in (
        (1, "1KiB", 600_000),
        (4, "4KiB", 400_000),
        (16, "16KiB", 200_000),
        (64, "64KiB", 100_000),
        (1024, "1MiB", 6_000),
    ):
        for n in (1, 4):
            rows.append(_blocks(f"{text}-{n}", text, n, size * _KIB, max(count // n, 10)))
    for size, text in ((64, "64MiB"), (256, "256MiB")):
        for n in (1, 4):
            rows.append(_arrays(f"{text}-{n}", text, n, size * _MIB, 4096 // size))
    for publishers, family, title in ((1, "latency", ""), (2, "load", f", while another publishes {_LOAD:,} a second")):
        metrics = _LATENCY_METRICS if publishers == 1 else (*_LATENCY_METRICS, Metric("load/s"))
        for n in (1, 4):
            shape = Shape(publishers, n, kind="latency")
            what = f"one-way latency at 1,000 messages a second, to {n}{title}"
            rows.append(Row(f"{family}-{n}", family, what, shape, metrics, _latency, 1000, 1000, _paced))
    shape = Shape(4, 4, kind="publishers")
    rows.append(Row("publishers", "publishers", "small dict, from 4 to 4", shape, _SMALL_METRICS, throughput, 100_000, 100))
    for name, patterns in (("topics", False), ("patterns", True)):
        shape = Shape(1, 4, kind="topics", topics=topics_of(4, _TOPICS, patterns))
        how = "25 patterns of 100 topics each" if patterns else "2,500 topics by name"
        what = f"small dict, to the next of {_TOPICS:,} topics; 4 subscribers, each to {how}"
        rows.append(Row(name, name, what, shape, _SMALL_METRICS, throughput, 300_000, 400, _topics))
    shape = Shape(subscribers=4)
    rows.append(
        Row("cpu", "cpu", "CPU seconds for a million deliveries, small dict, to 4", shape, _CPU_METRICS, _cpu, 300_000, 200)
    )
    shape = Shape(subscribers=16, kind="memory")
    rows.append(Row("memory", "memory", "the broker's memory, with 16 subscribers", shape, _MEMORY_METRICS, _memory))
    shape = Shape(subscribers=4, kind="start")
    rows.append(Row("start", "start", "start, and subscribe, 4 subscribers", shape, _START_METRICS, _start))
    return rows


def _paced(count: int) -> Work:
    return Paced(count, 1000, _LOAD)


def _topics(count: int) -> Work:
    return Topics(count - count % 4, _TOPICS, 4)


def _blocks(name: str, family: str, n: int, size: int, count: int) -> Row:
    return Row(
        name, family, f"{family} bytes, to {n}", Shape(1, n, size, "bytes"), _BYTES_METRICS, throughput, count, 10,
        lambda count: Blocks(count, size),
    )  # fmt: skip


def _arrays(name: str, family: str, n: int, size: int, count: int) -> Row:
    least = min(count, 12)  # a stream, not the beginning of one
    return Row(
        name, family, f"{family} float64 array, to {n}", Shape(1, n, size, "array"), _ARRAY_METRICS, throughput, count, least,
        lambda count: Arrays(count, size),
    )  # fmt: skip


def smaller(row: Row) -> Row:
    """The same with few and small messages, to see that it runs."""
    if row.shape.kind == "array":
        return _arrays(row.name, row.family, row.shape.subscribers, _MIB, 2)
    if row.shape.kind == "latency":
        return replace(row, count=50, least=50)
    return replace(row, count=row.least)


ROWS: tuple[Row, ...] = tuple(_rows())
BUSY = "small-1,small-4,small-16,64KiB-4,latency"  # what is measured beside spinning processes, if nothing else is named
