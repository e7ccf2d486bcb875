"""Tables, for the terminal and for Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.peers import OWN
from benchmarks.running import RowResults


@dataclass
class Table:
    """A title, a head and rows of text, and what is to be said below."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]]
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For the terminal."""
        cells = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *lines, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        """For a file."""
        lines = [self.head, ["---", *("---:" for _ in self.head[1:])], *self.rows]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(row)} |" for row in lines), "", *notes, ""])


def number(value: float, digits: int) -> str:
    """With commas; a dash, when it is not a number."""
    if math.isnan(value):
        return "-"
    return f"{value:,.{digits}f}"


def table(results: RowResults) -> Table:
    """Return that of one row: the first metric with its lowest and highest, the others with their median, and the ratios."""
    row = results.row
    main, *others = row.metrics
    compared = {"of the best": results.best()}
    if results.relay is not None:
        compared["of the relay"] = results.relay
    head = ["", main.name, "lowest", "highest", *(metric.name for metric in others), *compared]
    rows: list[Sequence[str]] = []
    for peer in results.measured:
        values = results.values(peer, main)
        rows.append([
            peer.name,
            *(number(value, main.digits) for value in (statistics.median(values), min(values), max(values))),
            *(number(results.figure(peer, metric), metric.digits) for metric in others),
            *("" if other is None else number(results.ratio(peer, other), 2) for other in compared.values()),
        ])  # fmt: skip
    if results.copies:
        rates = [1 / seconds for seconds in results.copies]
        figures = [number(value, 2) for value in (statistics.median(rates), min(rates), max(rates))]
        rest = {"MiB/s": number(statistics.median(rates) * row.shape.size / (1 << 20), 0), "copies": "1.00"}
        rows.append(["one plain copy", *figures, *(rest.get(metric.name, "") for metric in others), ""])
    if results.floors:
        figures = [number(one, main.digits) for one in (results.floor, min(results.floors), max(results.floors))]
        rows.append(["pickle.loads alone", *figures, *("" for _ in others), ""])
    return Table(f"{row.name}: {row.title}", head, rows, [*_sentences(results), *results.notes])


def _sentences(results: RowResults) -> list[str]:
    """How this package stands to the best of the others."""
    others = [peer for peer in results.measured if peer not in OWN]
    other = results.best([peer for peer in others if peer.waits])
    ring = results.best([peer for peer in others if not peer.waits])
    if other is None:
        return []
    what = results.row.metrics[0].name
    sentences = []
    for peer in OWN:
        if peer in results.measured:
            sentence = f"{peer.name}: {results.ratio(peer, other):.2f} times the {what} of the best other, {other.name}"
            if results.floors:
                sentence += f"; {results.figure(peer, results.row.metrics[0]) / results.floor:.0%} of pickle.loads alone"
            if results.relay is not None:
                sentence += f"; {results.ratio(peer, results.relay):.2f} times that of a {results.relay.name}"
            if ring is not None:
                sentence += f"; {results.ratio(peer, ring):.2f} times that of {ring.name}, which polls or overwrites"
            sentences.append(sentence)
    return sentences
