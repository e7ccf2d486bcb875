"""``python -m benchmarks``: mpbroadcast and its peers, on the same work, in the same run.

Each row is a question: so many publishers, so many subscribers, messages of one kind; every subscriber gets every message
(but for the topic rows). Throughput is counted from before the first publish until the last subscriber has unpickled the
last message, latency from before the publish until after the unpickling. Publishers and subscribers are new processes each
time, started in the same way for all; all have heard each other once before the clock runs, and nothing else warms them up.
The peers take turns, round after round; a figure is the median of the rounds, with the lowest and the highest, and a ratio
is the median of the rounds' ratios. What was lost is counted, over all rounds. The CPU seconds are the user and system time
of all processes together, polling included. ``pickle.loads alone`` is what the CPUs could do for all subscribers if that was
all that there is to do: no message can be received faster. The ``relay that does nothing`` is that for the latency: a process
between a pipe and pipes, and no peer. All pickle with protocol 5 but Queue, Pipe and Manager, which use Python's default.

With ``--policies`` it is this library alone, once with each overflow policy. ``--latest`` measures how old the message is that
a slow consumer gets under ``latest``, as the last table of a complete run does. With ``--against`` it is this library alone,
too: that of this tree and that of another checkout take turns, and the table has the ratio of their medians. ``--busy``
measures beside one spinning process a core: six rows, unless others are named.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from types import FrameType

from benchmarks import against
from benchmarks.busy import busy_note, spinning
from benchmarks.freshness import freshness_table
from benchmarks.machine import machine, versions
from benchmarks.peers import OWN, PEERS, Peer
from benchmarks.policies import policy_tables
from benchmarks.report import write
from benchmarks.rows import BUSY, ROWS, Row, smaller
from benchmarks.running import Options, RowResults, run_row
from benchmarks.session import Failed
from benchmarks.tables import Table, table


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _rows(text: str) -> list[Row]:
    chosen = []
    for name in text.split(","):
        found = [row for row in ROWS if name.strip().lower() in (row.name.lower(), row.family.lower())]
        if not found:
            families = dict.fromkeys(row.family for row in ROWS)
            raise argparse.ArgumentTypeError(
                f"there is no row {name!r}: there are {', '.join(families)}, or one of them, as small-4"
            )
        chosen += found
    return [row for row in ROWS if row in chosen]


def _peers(text: str) -> list[type[Peer]]:
    words = [word.strip().lower() for word in text.split(",")]
    found = [peer for peer in PEERS if any(word in peer.name.lower() for word in words)]
    if not found:
        raise argparse.ArgumentTypeError(
            f"no peer has {text!r} in its name: there are {'; '.join(peer.name for peer in PEERS)}"
        )
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _factor(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--rows", type=_rows, metavar="NAME,...", help=f"only these, as small,1MiB-4; with --busy {BUSY}")
    parser.add_argument("--peers", type=_peers, metavar="WORD,...", help="only those with one of these words in the name")
    parser.add_argument("--rounds", type=_count, metavar="R", help="rounds; the median counts; 3, or 7 with --against")
    parser.add_argument("--scale", type=_factor, default=1.0, metavar="F", help="so many times the messages")
    parser.add_argument("--patience", type=_factor, default=30.0, metavar="S", help="seconds to wait for who hangs")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", help="write Markdown, CSV and plots into it")
    parser.add_argument("--list", action="store_true", help="the rows and the peers, and whether these can be measured here")
    parser.add_argument("--policies", action="store_true", help="the overflow policies against each other, and no peers")
    parser.add_argument("--latest", action="store_true", help="the age of what a slow consumer gets, beside ZeroMQ's CONFLATE")
    parser.add_argument("--against", type=against.checkout, metavar="PATH", help="this library, and that of another checkout")
    parser.add_argument("--busy", action="store_true", help="measure beside one spinning process a core")
    parser.add_argument("--smoke", action="store_true", help="few messages, one round: shows that it runs, measures nothing")
    arguments = parser.parse_args(argv)
    if arguments.against and arguments.policies:
        parser.error("--against and --policies are two comparisons: give one of them")
    arguments.whole = arguments.rows is None and arguments.peers is None
    arguments.rows = arguments.rows or (_rows(BUSY) if arguments.busy else ROWS)
    return arguments


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)  # so that everything that was started is ended


def _say(text: str) -> None:
    """What is being measured, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table for each row."""
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, _terminate)
    context = multiprocessing.get_context()
    missing = {peer: why for peer in PEERS if (why := peer.missing())}
    peers = [peer for peer in arguments.peers or PEERS if peer not in missing]
    skipped = [f"skipped: {peer.name}: {why}" for peer, why in missing.items()]
    if arguments.list:
        print(
            "\n".join(
                [*(f"{row.name:12}{row.title}" for row in ROWS), "", *(f"{p.name}: {p.setting}" for p in peers), *skipped]
            )
        )
        return
    rounds = 1 if arguments.smoke else arguments.rounds or (7 if arguments.against else 3)
    options = Options(rounds, arguments.scale, arguments.patience, arguments.smoke)
    spinners = (os.cpu_count() or 1) if arguments.busy else 0
    about = [*machine(context), f"{options.rounds} round(s){busy_note(spinners)}"]
    print("\n".join(about))
    with spinning(spinners):
        if arguments.against:
            _measure_against(arguments, peers, options, about, spinners)
        else:
            _measure_peers(arguments, peers, skipped, context, options, about, spinners)


def _measure_against(
    arguments: argparse.Namespace, peers: Sequence[type[Peer]], options: Options, about: list[str], spinners: int
) -> None:
    start = time.monotonic()
    try:
        one = against.compare(_possible(arguments.rows), peers, arguments.against, options, busy_note(spinners), _say)
    except Failed as error:
        sys.exit(f"python -m benchmarks: error: {error}")
    print(f"\n{time.monotonic() - start:.0f} s")
    if arguments.output is not None:
        print(against.write(arguments.output, about, one))


def _measure_peers(
    arguments: argparse.Namespace,
    peers: Sequence[type[Peer]],
    skipped: list[str],
    context: BaseContext,
    options: Options,
    about: list[str],
    spinners: int,
) -> None:
    results: list[RowResults] = []
    tables: list[Table] = []
    if not (arguments.policies or arguments.latest):
        for name, version, setting, limits in versions(peers):
            print(f"{name} ({version}): {setting}{limits and '. Limits: '}{limits}")
        for line in skipped:
            print(line)
        start = time.monotonic()
        _measure(arguments.rows, peers, context, options, busy_note(spinners), results, tables)
        print(f"\n{time.monotonic() - start:.0f} s")
    if arguments.policies or arguments.smoke:
        for one in policy_tables(context, options):
            one.title += busy_note(spinners)
            print(f"\n{one.text()}", flush=True)
            tables.append(one)
    if arguments.latest or (arguments.whole and not arguments.policies):
        tables.append(freshness_table(context, options))
        tables[-1].title += busy_note(spinners)
        print(f"\n{tables[-1].text()}", flush=True)
    if arguments.output is not None:
        print("\n".join(write(arguments.output, about, versions(peers), skipped, tables, results)))


def _measure(
    rows: Sequence[Row],
    peers: Sequence[type[Peer]],
    context: BaseContext,
    options: Options,
    busy: str,
    results: list[RowResults],
    tables: list[Table],
) -> None:
    for place, row in enumerate(_possible(rows)):
        among = peers
        if options.smoke:
            row = smaller(row)  # noqa: PLW2901
            fit = [peer for peer in peers if peer.unfit(row.shape) is None]
            others = [peer for peer in fit if peer not in OWN]
            if place and others:  # all of them in the first row, then two of the others a row, in turn
                chosen = {others[(2 * place + next_) % len(others)] for next_ in range(2)}
                among = [peer for peer in fit if peer in OWN or peer in chosen]
        one = run_row(row, among, context, options, lambda name, row=row: _say(f"{row.name}: {name}"))  # type: ignore[misc]
        _say("")
        if one.measured or one.notes:
            results.append(one)
            tables.append(table(one))
            tables[-1].title += busy
            print(f"\n{tables[-1].text()}", flush=True)


def _possible(rows: Sequence[Row]) -> Iterator[Row]:
    """Those that can be measured here."""
    for row in rows:
        if row.shape.kind == "array" and importlib.util.find_spec("numpy") is None:
            print(f"\nskipped: {row.name}: the package numpy is not installed")
        else:
            yield row


if __name__ == "__main__":
    main()
