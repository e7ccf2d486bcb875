"""``python -m benchmarks.overview DIR``: one picture of all rows, this library as a ratio to the best of the others.

Reads the sentences that ``python -m benchmarks --output DIR`` has written into ``DIR/benchmarks.md``, and, where there is a
``DIR/busy/benchmarks.md`` (measured with ``--busy``), those as well; measures nothing. Of a row whose metric is better when it
is lower, the picture has the inverse, so a bar to the right is always in this library's favour. A ratio is that of the same
round, in the median.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import re
from typing import Any, NamedTuple

_TITLE = re.compile(r"^### ([\w-]+): (.*)$")
_SENTENCE = re.compile(r"^- mpbroadcast, recv(?:_many)?\(\): ([\d.]+) times the (.*?) of the best other, (.*?)(?:;.*)?$")
_LOWER_IS_BETTER = ("µs", "CPU s/1M")
_LABELS = {
    "latency-1": "latency (p50) to 1, idle",
    "latency-4": "latency (p50) to 4, idle",
    "load-1": "latency (p50) to 1, beside 10,000 messages/s",
    "load-4": "latency (p50) to 4, beside 10,000 messages/s",
    "topics": "10,000 topics, by name",
    "patterns": "10,000 topics, by pattern",
    "cpu": "CPU time for a delivery, small dict, to 4",
}
_LEFT_OUT = ("memory", "start")  # not of messages: docs/benchmarks.md has them


class Ratio(NamedTuple):
    """How many times as good this library is in a row as ``other``, the best peer there."""

    row: str
    title: str
    times: float
    other: str


def ratios(path: pathlib.Path) -> list[Ratio]:
    """Return the ratio of each row of a report, of the first sentence of the row."""
    found: list[Ratio] = []
    title = ("", "")
    for line in path.read_text(encoding="utf-8").splitlines():
        if heading := _TITLE.match(line):
            title = heading[1], heading[2]
        elif title[0] not in ("", *_LEFT_OUT) and (sentence := _SENTENCE.match(line)):
            value = float(sentence[1])
            lower = any(word in sentence[2] for word in _LOWER_IS_BETTER)
            found.append(Ratio(*title, 1 / value if lower else value, sentence[3]))
            title = ("", "")
    return found


def draw(folder: pathlib.Path) -> pathlib.Path:
    """Draw ``overview.svg`` from the reports in ``folder``; return its path."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    pyplot.rcParams["svg.hashsalt"] = "mpbroadcast"
    idle = ratios(folder / "benchmarks.md")[::-1]
    busy_report = folder / "busy" / "benchmarks.md"
    busy = {one.row: one for one in ratios(busy_report)} if busy_report.is_file() else {}
    figure, axes = pyplot.subplots(figsize=(9, 0.24 * len(idle) + 1), layout="constrained")
    for index, one in enumerate(idle):
        axes.barh(index, one.times - 1, left=1, height=0.6, color="seagreen" if one.times >= 1 else "indianred")
        axes.text(2.6, index, f"{one.times:.2f}  {one.other.replace('multiprocessing.', '')}", va="center", fontsize=7.5)
        if one.row in busy:
            axes.plot(busy[one.row].times, index, "kD", markersize=4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(idle)), [_LABELS.get(one.row, one.title) for one in idle], fontsize=7.5)
    axes.set_ylim(-0.7, len(idle) - 0.3)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.14, 9)
    ticks = (0.25, 0.5, 1, 2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("times as good as the best of the others in each row" + ("; diamond: on busy CPUs" if busy else ""))
    axes.grid(axis="x", alpha=0.3)
    path = folder / "overview.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def main() -> None:
    """Draw the picture of the folder that is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overview", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR", help="what `python -m benchmarks --output DIR` has written")
    print(f"written: {draw(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
