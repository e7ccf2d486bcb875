"""``python -m benchmarks.scaling``: what a delivery by mpbroadcast costs as there is more of everything.

Three tables. ``subscribers``: small dicts from one process to N subscriber processes, until the last one has unpickled the
last message; the time, and the CPU time of all processes, for each delivery. ``subscriptions``: so many open channels of one
process in one broker; what one more costs, what the broker has for itself, how fast messages are that only one of them gets,
and one that all get. ``topics``: one channel that is subscribed to so many topics, or patterns; how fast messages to one
after the other of them come.

To each, a law is fitted by least squares, and it is said from where on it costs more than that.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import multiprocessing
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any

import psutil

from benchmarks.machine import machine
from benchmarks.peers.base import Shape
from benchmarks.peers.broadcast import Broadcast
from benchmarks.rows import private_bytes
from benchmarks.session import Failed, measure
from benchmarks.tables import Table, number
from benchmarks.works import Work
from mpbroadcast import Broadcaster, Channel, start_broadcaster

_SPARE = 200  # descriptors, for all else
_FEW = 32  # subscriber processes
Points = list[tuple[float, float]]


def subscribers(context: BaseContext, scale: float, smoke: bool) -> tuple[Table, dict[str, Points]]:
    """Cost for each delivery, to 1, 2, 4, ... 256 subscriber processes."""
    rows: list[Sequence[str]] = []
    notes: list[str] = []
    wall: Points = []
    cpu: Points = []
    for n in (1, 2, 4) if smoke else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        count = 100 if smoke else max(100, int(1_200_000 * scale) // (n + 1))
        try:
            result = measure(Broadcast, context, Shape(subscribers=n), Work(count), 60.0)
        except Failed as error:
            notes.append(f"to {n}: {error}")
            continue
        delivered = max(result.deliveries - result.lost, 1)
        wall.append((n, 1e6 * result.seconds / delivered))
        cpu.append((n, result.cpu_per_million))
        parts = [part / delivered * 1e6 for part in (result.publisher_cpu, result.broker_cpu, result.subscriber_cpu)]
        rows.append(
            [
                str(n),
                number(count, 0),
                number(result.rate, 0),
                number(result.rate * n, 0),
                number(wall[-1][1], 2),
                *(number(part, 2) for part in (cpu[-1][1], *parts)),
                str(result.lost),
            ]
        )
    head = [
        "subscribers", "messages", "messages/s", "deliveries/s", "µs a delivery",
        "CPU µs", "publisher", "broker", "subscribers", "lost",
    ]  # fmt: skip
    few = [(n, cost) for n, cost in cpu if n <= _FEW]
    each, once = _fitted(few, lambda n: 1 / n)
    law = [(n, each + once / n) for n, _ in cpu]
    notes.append(
        f"fitted up to {_FEW}: {each:.2f} + {once:.2f} / N µs of CPU a delivery, so {once:.2f} µs to publish and route a "
        f"message, and {each:.2f} µs for each who gets it"
    )
    notes.append(
        f"{_knee(cpu, law)}: so many processes share the CPUs that each runs seldom and briefly, in cold caches, and what it "
        "costs each to get going is shared by fewer messages here, the more subscribers there are"
    )
    lines = {"µs a delivery": wall, "CPU µs a delivery": cpu, "fitted": law}
    return Table("subscribers: small dict, to N", head, rows, notes), lines


@contextmanager
def _broker(context: BaseContext) -> Iterator[Broadcaster[Any]]:
    bus: Broadcaster[Any] = start_broadcaster(context=context)
    try:
        yield bus
    finally:
        bus.close(timeout=0)


def _memory(bus: Broadcaster[Any]) -> float:
    """The broker's own memory, in KiB."""
    return private_bytes([psutil.Process(bus.stats().pid)]) / 1024


def _rate(bus: Broadcaster[Any], channel: Channel[Any], topics: Sequence[str], count: int) -> float:
    """Messages a second that this process publishes, each to the next topic, and then receives."""
    start = time.monotonic()
    for sequence in range(count):
        bus.publish({"sequence": sequence, "sensor": "north", "value": 21.5}, topic=topics[sequence % len(topics)])
    left = count
    while left:
        left -= len(channel.recv_many(timeout=60))
    return count / (time.monotonic() - start)


def subscriptions(context: BaseContext, scale: float, smoke: bool) -> tuple[Table, dict[str, Points]]:
    """Up to 5,000 channels in one broker."""
    rows: list[Sequence[str]] = []
    notes: list[str] = []
    costs: Points = []
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 100 if smoke else max(100, int(20_000 * scale))
    with _files(hard), _broker(context) as bus:
        probe = bus.subscribe("probe")
        probe.poll(0)
        channels: list[Channel[Any]] = []
        _rate(bus, probe, ["probe"], count)
        empty = _memory(bus)
        for n in (10, 20) if smoke else (10, 100, 1000, 2000, 5000):
            if hard != resource.RLIM_INFINITY and n > (hard - _SPARE) // 3:
                notes.append(f"{n:,} not measured: a process may have {hard:,} descriptors")
                continue
            start, before = time.monotonic(), len(channels)
            while len(channels) < n:
                channel = bus.subscribe(f"idle.{len(channels)}", "every")
                channel.poll(0)
                channels.append(channel)
            each = 1e6 * (time.monotonic() - start) / (n - before)
            memory = _memory(bus)
            start = time.monotonic()
            bus.stats()
            asking = 1000 * (time.monotonic() - start)
            rate = _rate(bus, probe, ["probe"], count)
            start = time.monotonic()
            bus.publish("to all", topic="every")
            for channel in channels:
                channel.recv(timeout=60)
            to_all = 1e6 * (time.monotonic() - start) / n
            costs.append((n, to_all))
            rows.append(
                [
                    number(n, 0),
                    number(each, 0),
                    number(memory / 1024, 1),
                    number((memory - empty) / n, 1),
                    number(asking, 1),
                    number(rate, 0),
                    number(to_all, 1),
                ]
            )
        for channel in channels:
            channel.close()
    head = [
        "channels",
        "µs to subscribe",
        "broker MiB",
        "KiB a channel",
        "stats() ms",
        "messages/s to one",
        "µs a delivery to all",
    ]
    each, once = _fitted(costs, lambda n: 1 / n)
    law = [(n, each + once / n) for n, _ in costs]
    notes.append(
        f"fitted: {each:.1f} µs for each channel that a message goes to, and {once:.0f} µs once; {_knee(costs, law)}. Most "
        "of it is the system's: a write into each channel's pipe, a poll and two reads of it"
    )
    lines = {"µs a delivery": costs, "fitted": law}
    return Table("subscriptions: open channels of one process, each with two topics", head, rows, notes), lines


@contextmanager
def _files(hard: int) -> Iterator[None]:
    """As many descriptors as there may be."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def topics(context: BaseContext, scale: float, smoke: bool) -> tuple[Table, dict[str, Points]]:
    """One channel with up to 100,000 topics, or 1,000 patterns."""
    rows: list[Sequence[str]] = []
    lines: dict[str, Points] = {"topics": [], "patterns": []}
    count = 100 if smoke else max(100, int(20_000 * scale))
    for kind, numbers in (("topics", (1, 100, 10_000, 100_000)), ("patterns", (1, 10, 100, 1000))):
        for n in numbers[:2] if smoke else numbers:
            with _broker(context) as bus:
                first: Channel[Any] = bus.subscribe("first")
                _rate(bus, first, ["first"], count)
                empty = _memory(bus)
                names = [f"g{index:06}" for index in range(n)]
                heard = [f"{name}.*" for name in names] if kind == "patterns" else names
                start = time.monotonic()
                channel: Channel[Any] = bus.subscribe(heard[0])
                for place in range(1, n, 1000):
                    channel.subscribe(*heard[place : place + 1000])
                subscribing = 1e6 * (time.monotonic() - start) / n
                channel.poll(0)
                memory = _memory(bus) - empty
                rate = _rate(bus, channel, [f"{name}.x" for name in names] if kind == "patterns" else names, count)
            lines[kind].append((n, rate))
            rows.append([f"{n:,} {kind}", number(subscribing, 1), number(1024 * memory / n, 0), number(rate, 0)])
    head = ["", "µs to subscribe", "bytes in the broker", "messages/s"]
    notes = []
    for kind, rates in list(lines.items()):
        costs = [(n, 1e6 / rate) for n, rate in rates]
        lines[kind] = costs
        base, more = _fitted(costs, math.log10)
        law = [(n, base + more * math.log10(n)) for n, _ in costs]
        lines[f"fitted, {kind}"] = law
        notes.append(f"{kind}, fitted: {base:.1f} + {more:.2f} log10(number) µs a message; {_knee(costs, law)}")
    notes.append(
        "the step is behind the first: neighbours that go to one topic travel as one run, others each as one; from 16,384 "
        "topics on, those that were looked up last are forgotten"
    )
    return Table("topics: of one channel; for each topic, and messages to all in turn", head, rows, notes), lines


def _fitted(points: Points, law: Callable[[float], float]) -> tuple[float, float]:
    """``a`` and ``b`` of ``a + b * law(x)``, by least squares."""
    xs, ys = [law(x) for x, _ in points], [y for _, y in points]
    if len(set(xs)) < 2:
        return (ys[0] if ys else math.nan), 0.0
    fit = statistics.linear_regression(xs, ys)
    return fit.intercept, fit.slope


def _knee(measured: Points, law: Points) -> str:
    """From where on it costs more than the law says."""
    above = [cost > 1.25 * expected for (_, cost), (_, expected) in zip(measured, law, strict=True)]
    for place, (n, _) in enumerate(measured):
        if all(above[place:]):
            return f"the knee is at {n:,.0f}"
    return "no knee is seen"


_PARTS: dict[str, Callable[[BaseContext, float, bool], tuple[Table, dict[str, Points]]]] = {
    "subscribers": subscribers,
    "subscriptions": subscriptions,
    "topics": topics,
}


def _draw(file: pathlib.Path, title: str, lines: dict[str, Points]) -> None:
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for label, points in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), "--" if label.startswith("fitted") else "-o", label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    for ending in ("svg", "png"):
        figure.savefig(file.with_suffix(f".{ending}"), dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these of {', '.join(_PARTS)}")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="so many times the messages")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", help="write the tables and plots into it")
    parser.add_argument("--smoke", action="store_true", help="little of everything: shows that it runs, measures nothing")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(_PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: there are {', '.join(_PARTS)}")
    context = multiprocessing.get_context()
    print("\n".join(machine(context)))
    plots = arguments.output is not None and importlib.util.find_spec("matplotlib") is not None
    written = [f"- {line}" for line in machine(context)] + [""]
    for name in arguments.parts or _PARTS:
        table, lines = _PARTS[name](context, arguments.scale, arguments.smoke)
        print(f"\n{table.text()}", flush=True)
        written.append(table.markdown())
        if plots:
            arguments.output.mkdir(parents=True, exist_ok=True)
            _draw(arguments.output / f"scaling-{name}", table.title, lines)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "scaling.md").write_text("\n".join(["# Scaling", "", *written]), encoding="utf-8")
        print(f"written: {arguments.output}/scaling.md" + ("" if plots else "; no plots: matplotlib is not installed"))


if __name__ == "__main__":
    main()
