"""``python -m benchmarks --against PATH``: the library of this tree and that of another checkout, on the same rows, in turn.

Each measurement has an interpreter of its own. It finds the package ``mpbroadcast`` of its tree and the benchmarks of this one
in a folder of links, and so do its child processes and the broker, whatever the start method. The two trees take turns, and
another one is first each round; both send the same number of messages, which a first run of the other tree has found. A ratio
is this tree's median by the other's, with the lowest and the highest of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.peers import OWN, Peer
from benchmarks.peers.base import end_program, folder
from benchmarks.rows import CPU, Measured, Metric, Row, smaller
from benchmarks.running import FIRST_PART, Options
from benchmarks.session import Failed
from benchmarks.tables import Table, number

_THIS = pathlib.Path(__file__).resolve().parents[1]
_TARGET = 1.0  # seconds that one measurement is to take, without starting and ending the processes
_TOLERANCE = 0.05  # a median that is further from the other one gets a verdict
_ALSO = (CPU.name, "p99 µs")  # are compared beside the first metric of a row
_HEAD = ("row", "metric", "better", "messages", "this", "other", "this/other", "lowest", "highest", "verdict")
_WIDTHS = (12, 16, 6, 9, 12, 12, 10, 7, 7, 7)


@dataclass(frozen=True)
class _Tree:
    role: str
    root: pathlib.Path
    links: str  # the folder that it is imported from


@dataclass
class _Outcome:
    """Of one row: the rounds' figures, this tree's and the other's, and what is to be said about them."""

    row: Row
    count: int = 0
    rounds: list[tuple[Measured, Measured]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[Sequence[str]]:
        """The cells of the table, a line for each metric."""
        if not self.rounds:
            return
        for metric in (self.row.metrics[0], *(metric for metric in self.row.metrics[1:] if metric.name in _ALSO)):
            pairs = [(this.values[metric.name], other.values[metric.name]) for this, other in self.rounds]
            this, other = (statistics.median(values) for values in zip(*pairs, strict=True))
            ratios = [_ratio(*pair) for pair in pairs]
            yield (
                self.row.name,
                metric.name,
                "higher" if metric.best is max else "lower",
                number(self.count, 0) if self.count else "",
                *(number(value, metric.digits) for value in (this, other)),
                *(number(ratio, 3) for ratio in (_ratio(this, other), min(ratios), max(ratios))),
                _verdict(metric, _ratio(this, other)),
            )


def _ratio(this: float, other: float) -> float:
    return this / other if other else math.nan


def _verdict(metric: Metric, ratio: float) -> str:
    loss = 1 - ratio if metric.best is max else ratio - 1
    if loss > _TOLERANCE:
        return "worse"
    return "better" if loss < -_TOLERANCE else ""


def checkout(text: str) -> pathlib.Path:
    """What ``--against`` takes."""
    root = pathlib.Path(text).resolve()
    if not (root / "mpbroadcast" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no checkout of this project: it has no mpbroadcast/__init__.py")
    return root


def compare(
    rows: Iterable[Row],
    peers: Sequence[type[Peer]],
    root: pathlib.Path,
    options: Options,
    busy: str,
    say: Callable[[str], None],
) -> Table:
    """Measure all rows with this tree and the one at ``root``, each with the first of ``peers`` that fits, and print."""
    with _linked("this", _THIS) as this, _linked("other", root) as other:
        for tree in (this, other):
            _run(tree, None, options)
        table = Table(f"{_named(_THIS)} against {_named(root)}, {options.rounds} round(s){busy}", _HEAD, [])
        print(f"\n{table.title}\n{_line(_HEAD)}", flush=True)
        for row in rows:
            peer = next((one for one in peers if one in OWN and one.unfit(row.shape) is None), None)
            if peer is None:
                continue
            outcome = _compare(row, peer, this, other, options, say)
            say("")
            lines = list(outcome.lines())
            notes = [f"{row.name}: {note}" for note in outcome.notes]
            print("\n".join([*map(_line, lines), *(f"  {note}" for note in notes)]), flush=True)
            table.rows += lines
            table.notes += notes
    return table


def write(into: pathlib.Path, about: Sequence[str], table: Table) -> str:
    """Write the table as Markdown; what there is to say about it."""
    into.mkdir(parents=True, exist_ok=True)
    lines = ["# This tree against another", "", *(f"- {line}" for line in about), "", table.markdown()]
    (into / "against.md").write_text("\n".join(lines), encoding="utf-8")
    return f"written: {into}/against.md"


def _compare(row: Row, peer: type[Peer], this: _Tree, other: _Tree, options: Options, say: Callable[[str], None]) -> _Outcome:
    if options.smoke:
        row = smaller(row)
    outcome = _Outcome(row)

    def measure(tree: _Tree, count: int) -> Measured:
        say(f"{row.name}: {tree.role}, {len(outcome.rounds) + 1} of {options.rounds}")
        request = {"row": row.name, "peer": peer.name, "count": count, "patience": options.patience, "smoke": options.smoke}
        try:
            return _run(tree, request, options)
        except Failed as error:
            outcome.notes.append(f"failed, and tried again: {error}")
        return _run(tree, request, options)

    lost: dict[str, float] = {}
    try:
        outcome.count = _count(row, options, lambda count: measure(other, count))
        for turn in range(options.rounds):
            order = (other, this) if turn % 2 else (this, other)
            measured = {tree: measure(tree, outcome.count) for tree in order}
            outcome.rounds.append((measured[this], measured[other]))
            for tree, one in measured.items():
                lost[tree.role] = lost.get(tree.role, 0) + one.values.get("lost", 0)
    except Failed as error:
        outcome.notes.append(f"failed, after {len(outcome.rounds)} round(s): {error}")
    outcome.notes += [f"lost: {role} tree, {many:,.0f} message(s)" for role, many in lost.items() if many]
    return outcome


def _count(row: Row, options: Options, measure: Callable[[int], Measured]) -> int:
    """How many messages one measurement is to have, found with a short one."""
    if options.smoke or row.least == row.count:
        return max(row.least, int(row.count * options.scale))
    tried = max(row.least, row.count // FIRST_PART)
    return max(row.least, int(tried / measure(tried).seconds * _TARGET * options.scale))


def _run(tree: _Tree, request: dict[str, object] | None, options: Options) -> Measured:
    """In an interpreter of its own, which checks where it has the package from; without a request, it does no more."""
    path = [tree.links, *filter(None, [os.environ.get("PYTHONPATH")])]
    arguments = [str(tree.root), *([] if request is None else [json.dumps(request)])]
    with tempfile.TemporaryFile() as printed:  # no pipe, which a process that is left over could keep open
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.once", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10 * options.patience)
        finally:
            end_program(process)
        printed.seek(0)
        text = printed.read()
    if process.returncode or not text:
        raise Failed(f"{tree.role} tree: the measuring process ended with {process.returncode}")
    answer = json.loads(text)
    if "failed" in answer:
        raise Failed(f"{tree.role} tree: {answer['failed']}")
    measured = Measured(answer.get("values", {}), answer.get("seconds", 0.0), gave_up=answer.get("gave_up", False))
    if measured.gave_up:
        raise Failed(f"{tree.role} tree: given up after {options.patience:.0f} s")
    return measured


@contextlib.contextmanager
def _linked(role: str, root: pathlib.Path) -> Iterator[_Tree]:
    with folder() as links:
        os.symlink(root / "mpbroadcast", os.path.join(links, "mpbroadcast"))
        os.symlink(_THIS / "benchmarks", os.path.join(links, "benchmarks"))
        yield _Tree(role, root, links)


def _named(root: pathlib.Path) -> str:
    """By its commit, or by its folder."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return root.name


def _line(cells: Sequence[str]) -> str:
    first = [cell.ljust(width) for cell, width in zip(cells[:3], _WIDTHS[:3], strict=True)]
    rest = [cell.rjust(width) for cell, width in zip(cells[3:], _WIDTHS[3:], strict=True)]
    return "  ".join([*first, *rest]).rstrip()
