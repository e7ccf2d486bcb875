"""The full screen of ``top``, as lines: keys change the view; the view and the figures make the lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from mpbroadcast.cli.figures import (
    SUBSCRIPTIONS,
    Column,
    Row,
    cut,
    matching,
    sorted_rows,
    summary,
    table,
    tables_below,
)

_KEY: Final = re.compile(r"\x1b(?:\[[0-9;]*[~A-Za-z]|O[A-Za-z])?|.", re.DOTALL)
_NAMES: Final = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1bOH": "home",
    "\x1b[1~": "home",
    "\x1b[F": "end",
    "\x1bOF": "end",
    "\x1b[4~": "end",
    "\x1b": "escape",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "erase",
    "\x08": "erase",
}
_SORTS: Final = {column.key: column.title for column in SUBSCRIPTIONS}
_FAR: Final = 1 << 30  # rows: farther than any


class Line(NamedTuple):
    """A line of the screen. ``style`` is one of :mod:`~mpbroadcast.cli.screen`'s; none: plain."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class View:
    """How the figures are shown: the key of the column to sort by, the filter, and the first row of the subscriptions.

    ``is_typing`` is True while keys are the filter's text.
    """

    sort: str = "b"
    is_reversed: bool = False
    filter: str = ""
    is_typing: bool = False
    first: int = 0


def keys_in(data: bytes) -> list[str]:
    """Return the keys that a terminal has sent: characters and names."""
    keys: list[str] = _KEY.findall(data.decode("utf-8", "ignore"))
    return [_NAMES.get(key, key) for key in keys]


def changed(view: View, key: str, page: int) -> View | None:
    """Return the view after a key was pressed, where ``page`` rows are a page; ``None`` is the end."""
    if view.is_typing:
        return _typed(view, key)
    moves = {"up": -1, "down": 1, "page up": -page, "page down": page, "home": -_FAR, "end": _FAR}
    if key == "q":
        return None
    if key in moves:
        return replace(view, first=max(0, view.first + moves[key]))
    if key == "/":
        return replace(view, is_typing=True, filter="", first=0)
    if key == "escape":
        return replace(view, filter="", first=0)
    if key == "r":
        return replace(view, is_reversed=not view.is_reversed)
    if key in _SORTS:
        return replace(view, sort=key, is_reversed=False, first=0)
    return view


def _typed(view: View, key: str) -> View:
    if key == "enter":
        return replace(view, is_typing=False)
    if key == "escape":
        return replace(view, is_typing=False, filter="")
    if key == "erase":
        return replace(view, filter=view.filter[:-1])
    return replace(view, filter=view.filter + key) if len(key) == 1 and key.isprintable() else view


def screen(whole: Row, address: str, view: View, width: int, height: int) -> tuple[list[Line], View]:
    """Return the lines of a screen of this size, and the view with a first row that there is.

    Publishers, groups and bridges have half of it at most, below the subscriptions.
    """
    head = [Line(cut(text, width), "summary") for text in summary(whole, address)]
    below: list[Line] = []
    for columns, rows in tables_below(whole):
        lines = _table(columns, rows, view, width)
        if len(lines) > 1:
            below += [Line(""), *lines[: 1 + max(1, height // 6 - 2)]]
    lines = _table(SUBSCRIPTIONS, whole["subscribers"], view, width)
    page = max(1, height - len(head) - len(below) - 2)
    first = max(0, min(view.first, len(lines) - 1 - page))
    shown = lines[1 + first : 1 + first + page]
    middle = [lines[0], *shown, *[Line("")] * (page - len(shown))]
    everything = [*head, *middle, *below][: height - 1]
    footer = Line(cut(_footer(view, first, len(shown), len(lines) - 1), width).ljust(width), "footer")
    return [*everything, footer], replace(view, first=first)


def _footer(view: View, first: int, shown: int, rows: int) -> str:
    if view.is_typing:
        return f"filter: {view.filter}_   Enter keeps it, Esc drops it"
    order = f"{_SORTS[view.sort]}{' reversed' if view.is_reversed else ''}"
    found = f"{first + 1 if rows else 0}-{first + shown} of {rows} by {order}"
    kept = f", with {view.filter!r}" if view.filter else ""
    return f"{found}{kept}   q quit  / filter  r reverse  sort: {' '.join(_SORTS)}"


def _table(columns: Sequence[Column], rows: Sequence[Row], view: View, width: int) -> list[Line]:
    """Return the title and the rows that match, in the view's order."""
    found = sorted_rows(matching(rows, columns, view.filter), columns, view.sort, is_reversed=view.is_reversed)
    title, *texts = table(columns, found, width)
    return [Line(title.ljust(width), "title"), *(Line(text, _style(row)) for text, row in zip(texts, found, strict=True))]


def _style(row: Row) -> str:
    """Return the style of a row: an alarm where a publisher waits, a process is dead or a bridge is not up; a notice where
    nothing reads, or something is missing."""
    if row.get("stalls") or row.get("waits_for") is not None or row.get("state") in ("dead", "connecting", "down"):
        return "alarm"
    if row.get("state") == "unopened" or row.get("missed") or ("refused" in row and (row["dropped"] or row["refused"])):
        return "notice"
    return ""
