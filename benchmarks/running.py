"""Rounds: the peers take turns, so that what else the machine does meets all of them.

A first, short measurement of each finds how many messages fit into about half a second. It does not count, unless
that is no more than it has measured. Processes and brokers are new each time, so it warms nothing up. Who needs long for the
least that can be measured is measured once.
"""

from __future__ import annotations

import math
import os
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext

from benchmarks.peers.base import PROTOCOL, Peer
from benchmarks.rows import COPIES, Measured, Metric, Row
from benchmarks.session import Failed

_TARGET = 0.5  # seconds that one measurement is to take, without starting and ending the processes
_TOO_LONG = 1.5  # seconds of the shortest measurement, which then is the only one
FIRST_PART = 20  # of the most messages is what the first measurement takes


@dataclass(frozen=True)
class Options:
    """How long to measure, and how."""

    rounds: int = 3
    scale: float = 1.0
    patience: float = 30.0
    smoke: bool = False


@dataclass
class RowResults:
    """What all peers answered in one row.

    ``copies`` are the seconds of a plain copy of the message, in each round; ``floors`` the messages a second that all
    subscribers could unpickle if the CPUs did nothing else.
    """

    row: Row
    measured: dict[type[Peer], list[Measured]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)

    def values(self, peer: type[Peer], metric: Metric) -> list[float]:
        """One for each round."""
        return [measured.values.get(metric.name, 0.0) for measured in self.measured[peer]]

    def figure(self, peer: type[Peer], metric: Metric) -> float:
        """The median of the rounds, or their sum."""
        values = self.values(peer, metric)
        return sum(values) if metric.total else statistics.median(values)

    @property
    def floor(self) -> float:
        """The median of the rounds' floors."""
        return statistics.median(self.floors)

    def best(self, peers: Sequence[type[Peer]] | None = None) -> type[Peer] | None:
        """Return which is best, of these. A floor is not compared."""
        main = self.row.metrics[0]
        among = [peer for peer in (self.measured if peers is None else peers) if peer in self.measured and not peer.is_floor]
        if main.best is None or not among:
            return None
        figures = {peer: figure for peer in among if not math.isnan(figure := self.figure(peer, main))}
        if not figures:
            return None
        wanted = main.best(list(figures.values()))
        return next(peer for peer, figure in figures.items() if figure == wanted)

    @property
    def relay(self) -> type[Peer] | None:
        """Return the relay that does nothing, where it was measured."""
        return next((peer for peer in self.measured if peer.is_floor), None)

    def ratio(self, peer: type[Peer], other: type[Peer]) -> float:
        """The median of the rounds' ratios."""
        main = self.row.metrics[0]
        mine, others = self.values(peer, main), self.values(other, main)
        if len(mine) != len(others):
            mine, others = [statistics.median(mine)], [statistics.median(others)]
        return statistics.median(a / b if b else 0.0 for a, b in zip(mine, others, strict=True))


def run_row(
    row: Row, peers: Sequence[type[Peer]], context: BaseContext, options: Options, say: Callable[[str], None]
) -> RowResults:
    """Ask every peer, round after round, each time from another one on."""
    results = RowResults(row)
    counts: dict[type[Peer], int] = {}
    unfit: dict[str, list[str]] = {}
    for peer in peers:
        why = peer.unfit(row.shape)
        if why is None:
            counts[peer] = max(row.least, int(row.count * options.scale))
        elif why:
            unfit.setdefault(why, []).append(peer.name)
    results.notes += [f"not here ({why}): {'; '.join(names)}" for why, names in unfit.items()]
    out: set[type[Peer]] = set()
    if row.least < row.count and not options.smoke:
        for peer in list(counts):
            say(peer.name)
            tried = max(row.least, row.count // FIRST_PART)
            measured = _ask(results, peer, context, tried, options)
            if measured is None:
                out.add(peer)
                continue
            if measured.gave_up or (measured.seconds > _TOO_LONG and tried == row.least):
                results.measured[peer] = [measured]
                out.add(peer)
                if not measured.gave_up:
                    results.notes.append(f"measured once: {peer.name}, which takes long")
            wanted = int(tried / measured.seconds * _TARGET * options.scale)
            counts[peer] = min(max(row.least, wanted), counts[peer])
            if counts[peer] == tried:
                results.measured[peer] = [measured]
    order = list(counts)
    for turn in range(options.rounds):
        if row.yardstick:
            results.copies.append(copy_seconds(row.shape.size))
        if row.floor:
            results.floors.append(_floor(row))
        for place in range(len(order)):
            peer = order[(place + turn) % len(order)]
            if peer in out or len(results.measured.get(peer, ())) == options.rounds:
                continue
            say(peer.name)
            measured = _ask(results, peer, context, counts[peer], options)
            if measured is not None:
                results.measured.setdefault(peer, []).append(measured)
            if measured is None or measured.gave_up:
                out.add(peer)
    _count_copies(results)
    results.measured = {peer: results.measured[peer] for peer in peers if peer in results.measured}
    return results


def _ask(results: RowResults, peer: type[Peer], context: BaseContext, count: int, options: Options) -> Measured | None:
    """Measure; who fails has a second try, and both are noted."""
    row = results.row
    for attempt in ("failed, and tried again", "failed"):
        try:
            measured = row.ask(row, peer, context, count, options.patience)
            break
        except Failed as error:
            results.notes.append(f"{attempt}: {peer.name}: {error}")
    else:
        return None
    if measured.gave_up:
        results.notes.append(
            f"given up after {options.patience:.0f} s: {peer.name}, {measured.values['lost']:,.0f} not received"
        )
    return measured


def copy_seconds(size: int) -> float:
    """One plain copy of ``size`` bytes into fresh memory; the median of three."""
    view = memoryview(bytearray(b"x") * size)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        copy = bytes(view)
        times.append(time.perf_counter() - start)
        del copy
    return statistics.median(times)


def _floor(row: Row) -> float:
    """Messages a second, when the subscribers have nothing to do but unpickle them."""
    pickled = pickle.dumps(next(row.work(2).messages(0)), PROTOCOL)
    count = max(3, 2_000_000 // (len(pickled) + 100))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            pickle.loads(pickled)
        times.append((time.perf_counter() - start) / count)
    subscribers = row.shape.subscribers
    return min(os.cpu_count() or 1, subscribers) / subscribers / statistics.median(times)


def _count_copies(results: RowResults) -> None:
    """How many plain copies could have been made in the time of a message."""
    if results.copies:
        copy = statistics.median(results.copies)
        for rounds in results.measured.values():
            for measured in rounds:
                rate = measured.values["messages/s"]
                measured.values[COPIES.name] = 1 / rate / copy if rate else math.nan
