"""``python -m benchmarks``: messages a second of mpbroadcast and of its peers, on the same work, in the same run.

The work: one process publishes small dicts, one by one, to 1, 4 and 16 subscriber processes, each of which gets every
message. The clock runs from before the first publish until the last subscriber has unpickled the last message. The
peers take turns, round after round, so that what else the machine does meets all of them; a figure is the median of the
rounds, with the lowest and the highest, and a ratio is the median of the rounds' ratios.

With ``--policies`` it is this library alone, once with each overflow policy, its subscribers keeping up, against
``block``. Under ``latest`` a subscriber gets what is newest when it looks, so only the publishing is compared.

All start their processes in the same way. mpbroadcast and ZeroMQ pickle with protocol 5, Queue and Pipe with Python's
default protocol, which they leave no choice of; for a small dict the two differ in the version byte only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
from collections.abc import Sequence
from multiprocessing.context import BaseContext

from benchmarks.harness import Result, measure
from benchmarks.peers import PEERS, Peer
from benchmarks.peers.broadcast import Broadcast, BroadcastSingly
from benchmarks.peers.policies import POLICIES, Block, Latest

_OWN = (Broadcast, BroadcastSingly)
Results = dict[type[Peer], list[Result]]


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not one or more whole numbers from 1 on, with commas between them")
    return [int(part) for part in parts]


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=_Formatter)
    parser.add_argument(
        "--messages", type=_positive, default=300_000, metavar="M", help="published to one subscriber, 2M/(N+1) to N"
    )
    parser.add_argument("--rounds", type=_positive, default=3, metavar="R", help="rounds; the median counts")
    parser.add_argument("--subscribers", type=_numbers, metavar="N,...", help="how many (1,4,16; with --policies 1,4)")
    parser.add_argument("--patience", type=float, default=60.0, metavar="S", help="seconds to wait for what may be lost")
    parser.add_argument("--policies", action="store_true", help="the overflow policies against each other, and no peers")
    parser.add_argument("--smoke", action="store_true", help="small counts, one round: shows that it runs, measures nothing")
    options = parser.parse_args(argv)
    if options.smoke:
        options.messages, options.rounds = 2_000, 1
    return options


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _table(results: Results) -> str:
    rows: list[tuple[str, ...]] = [("", "messages/s", "lowest", "highest", "lost", *(f"{own.name} is" for own in _OWN))]
    for peer, measured in results.items():
        figures = _figures([result.rate for result in measured])
        ratios = [_ratio(results[own], measured) for own in _OWN] if peer not in _OWN else [""] * len(_OWN)
        rows.append((peer.name, *figures, f"{sum(result.lost for result in measured):,}", *ratios))
    return _columns(rows)


def _policy_table(results: Results) -> str:
    block = results[Block]
    rows: list[tuple[str, ...]] = [
        ("", "messages/s", "lowest", "highest", "of block's", "publish/s", "lowest", "highest", "of block's", "not received")
    ]
    for peer, measured in results.items():
        rates = [result.rate for result in measured]
        delivering = ["", "", "", ""] if peer is Latest else [*_figures(rates), _share(rates, [one.rate for one in block])]
        rates = [result.publish_rate for result in measured]
        publishing = [*_figures(rates), _share(rates, [one.publish_rate for one in block])]
        rows.append((peer.name, *delivering, *publishing, f"{sum(result.lost for result in measured):,}"))
    return _columns(rows)


def _figures(rates: list[float]) -> list[str]:
    return [f"{figure:,.0f}" for figure in (statistics.median(rates), min(rates), max(rates))]


def _share(rates: list[float], others: list[float]) -> str:
    return f"{statistics.median(rate / other for rate, other in zip(rates, others, strict=True)):.2f}"


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def _ratio(own: list[Result], peer: list[Result]) -> str:
    ratio = statistics.median(a.rate / b.rate for a, b in zip(own, peer, strict=True))
    return f"{ratio:.2f} times this"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table for each number of subscribers."""
    options = _arguments(argv)
    context = multiprocessing.get_context()
    peers: list[type[Peer]] = []
    for peer in () if options.policies else PEERS:
        if why := peer.missing():
            print(f"skipped: {peer.name}: {why}")
        else:
            peers.append(peer)
    print(
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {os.cpu_count()} CPUs, "
        f"start method {context.get_start_method()}, {options.rounds} round(s)"
    )
    if not options.policies:
        for subscribers in options.subscribers or [1, 4, 16]:
            results, count = _rounds(peers, context, subscribers, options)
            print(f"\n{subscribers} subscriber(s), {count:,} messages to each\n{_table(results)}", flush=True)
    if options.policies or options.smoke:
        for subscribers in options.subscribers or [1, 4]:
            results, count = _rounds(POLICIES, context, subscribers, options)
            print(f"\noverflow policies, {subscribers} subscriber(s), {count:,} messages to each")
            print(_policy_table(results), flush=True)


def _rounds(
    peers: Sequence[type[Peer]], context: BaseContext, subscribers: int, options: argparse.Namespace
) -> tuple[Results, int]:
    """Measure each, round after round, each time from another one on; the results, and how many messages it were."""
    count = max(2 * options.messages // (subscribers + 1), 1)
    results: Results = {peer: [] for peer in peers}
    for turn in range(options.rounds):
        for place in range(len(peers)):
            peer = peers[(place + turn) % len(peers)]
            results[peer].append(measure(peer, context, subscribers, count, options.patience))
    return results, count


if __name__ == "__main__":
    main()
