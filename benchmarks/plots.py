"""Plots, with matplotlib: throughput against the subscribers, throughput against the size, and how latency is distributed."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.peers import OWN, PEERS, Peer
from benchmarks.rows import RATE
from benchmarks.running import RowResults

_MARKERS = "os^vD<>pPX*hd"


def draw(folder: pathlib.Path, results: Sequence[RowResults]) -> tuple[list[str], list[str]]:
    """Draw what the results have, as SVG and PNG: the names, and what there is to say."""
    if importlib.util.find_spec("matplotlib") is None:
        return [], ["no plots: matplotlib is not installed"]
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    drawn: list[str] = []

    def save(name: str, fill: Callable[[Any], None]) -> None:
        figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
        fill(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for ending in ("svg", "png"):
            figure.savefig(folder / f"{name}.{ending}", dpi=120)
        pyplot.close(figure)
        drawn.append(name)

    small = [one for one in results if one.row.family == "small"]
    if len(small) > 1:
        save("throughput-subscribers", lambda axes: _lines(axes, small, lambda one: one.row.shape.subscribers, "subscribers"))
    for n in (1, 4):
        sized = [one for one in results if one.row.shape.kind in {"bytes", "array"} and one.row.shape.subscribers == n]
        if len(sized) > 1:
            save(f"throughput-size-{n}", _sizes(sized, n))
    for one in results:
        if one.row.shape.kind == "latency" and one.measured:
            save(one.row.name, _distribution(one))
    return drawn, [f"plots: {', '.join(drawn)}"] if drawn else []


def _style(peer: type[Peer]) -> dict[str, Any]:
    own = peer in OWN
    return {
        "label": peer.name,
        "linewidth": 2.5 if own else 1.0,
        "color": ("black", "dimgray", "gray", "darkgray")[OWN.index(peer)] if own else _shade(PEERS.index(peer)),
    }


def _shade(place: int) -> Any:
    cm: Any = importlib.import_module("matplotlib")
    return cm.colormaps["tab20"]((place * 7 % 20) / 20 + 0.01)


def _lines(axes: Any, rows: Sequence[RowResults], where: Callable[[RowResults], int], label: str) -> None:
    peers = list(dict.fromkeys(peer for one in rows for peer in one.measured))
    for peer in peers:
        points = [(where(one), rate) for one in rows if peer in one.measured and (rate := one.figure(peer, RATE)) > 0]
        if points:
            marker = _MARKERS[PEERS.index(peer) % len(_MARKERS)]
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, **_style(peer))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("messages/s, each to all subscribers")


def _sizes(rows: Sequence[RowResults], n: int) -> Callable[[Any], None]:
    def fill(axes: Any) -> None:
        _lines(axes, rows, lambda one: one.row.shape.size, "bytes a message (float64 arrays from 64 MiB on)")
        axes.set_title(f"to {n}")
        copied = [(one.row.shape.size, 1 / min(one.copies)) for one in rows if one.copies]
        if copied:
            axes.plot(*zip(*copied, strict=True), "r--", linewidth=1, label="one plain copy")

    return fill


def _distribution(one: RowResults) -> Callable[[Any], None]:
    def fill(axes: Any) -> None:
        for peer, rounds in one.measured.items():
            ordered = sorted(value / 1000 for measured in rounds for value in measured.latencies)
            rest = [1 - rank / len(ordered) for rank in range(len(ordered))]
            axes.plot(ordered, rest, **_style(peer))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("µs")
        axes.set_ylabel("share of the messages that took longer")
        axes.set_title(one.row.title, fontsize=9)

    return fill
