"""Files: a report in Markdown, all figures as CSV, and the plots."""

from __future__ import annotations

import csv
import pathlib
import statistics
from collections.abc import Sequence

from benchmarks.plots import draw
from benchmarks.running import RowResults
from benchmarks.tables import Table


def write(
    folder: pathlib.Path,
    about: Sequence[str],
    peers: Sequence[tuple[str, str, str, str]],
    skipped: Sequence[str],
    tables: Sequence[Table],
    results: Sequence[RowResults],
) -> list[str]:
    """Write it all into ``folder``; what there is to say about it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "benchmarks.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "peer", "metric", "figure", "lowest", "highest", "rounds"])
        writer.writerows(line for one in results for line in _lines(one))
    lines = ["# Benchmarks", "", *(f"- {line}" for line in about), ""]
    head = ["", "version", "setting", "limits"]
    lines += [Table("Peers", head, list(peers), list(skipped)).markdown().replace("---:", "---")]
    lines += [table.markdown() for table in tables]
    report = folder / "benchmarks.md"
    report.write_text("\n".join(lines), encoding="utf-8")  # first without the plots: should one fail, the figures are there
    drawn, notes = draw(folder, results)
    report.write_text("\n".join([*lines, *(f"![{name}]({name}.svg)\n" for name in drawn)]), encoding="utf-8")
    return [f"written: {folder}/benchmarks.md, benchmarks.csv", *notes]


def _lines(results: RowResults) -> list[list[str]]:
    lines = []
    for peer in results.measured:
        for metric in results.row.metrics:
            values = results.values(peer, metric)
            figures = [f"{value:.6g}" for value in (results.figure(peer, metric), min(values), max(values))]
            lines.append([results.row.name, peer.name, metric.name, *figures, str(len(values))])
    if results.copies:
        rates = [1 / seconds for seconds in results.copies]
        figures = [f"{value:.6g}" for value in (statistics.median(rates), min(rates), max(rates))]
        lines.append([results.row.name, "one plain copy", "messages/s", *figures, str(len(rates))])
    return lines
