"""From snapshots of the broker to the rows of ``top`` and ``stats``, and from rows to lines of text."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from mpbroadcast import BrokerStats

Row = dict[str, Any]


class Process(NamedTuple):
    """A process as the system knows it: its command line, and whether it is alive."""

    command: str
    is_alive: bool


_UNKNOWN: Final = Process("", True)
_RATES: Final = {"subscribers": {"rate_in": "published", "rate_out": "delivered"}, "publisher_rows": {"rate": "bytes"}}
_BRIDGE_RATES: Final = {"rate_out": "sent", "rate_in": "received"}


def figures(now: BrokerStats, before: BrokerStats | None, processes: Mapping[int, Process]) -> Row:
    """Return the snapshot ``now`` as a dictionary, in which each row has its rates since ``before``, and its process.

    A rate is ``None`` where there is no snapshot before, or it is another broker's. ``state`` of a subscription is "open",
    "unopened", or "dead" if its process is.
    """
    whole = dataclasses.asdict(now)
    old: Row = {"subscribers": (), "publisher_rows": (), "bridges": {}}
    seconds = 0.0
    if before is not None and before.pid == now.pid:
        old, seconds = dataclasses.asdict(before), now.uptime - before.uptime
    whole["rate"] = _rate(whole, old, "published", seconds)
    for kind, rates in _RATES.items():
        earlier = {row["id"]: row for row in old[kind]}
        for row in whole[kind]:
            for name, counter in rates.items():
                row[name] = _rate(row, earlier.get(row["id"], {}), counter, seconds)
            process = processes.get(row["pid"], _UNKNOWN)
            row["command"] = process.command
            row["state"] = ("open" if row.get("is_open", True) else "unopened") if process.is_alive else "dead"
    for stream, row in whole["bridges"].items():
        for name, counter in _BRIDGE_RATES.items():
            row[name] = _rate(row, old["bridges"].get(stream, {}), counter, seconds)
    return whole


def _rate(row: Row, before: Row, counter: str, seconds: float) -> float | None:
    """Return how many a second there were; of a row that is new, since it began."""
    return max(0, row[counter] - before.get(counter, 0)) / seconds if seconds > 0 else None


def short(number: float | None) -> str:
    """Return a number in at most 5 characters: 999, 12.3k, 4.56M."""
    if number is None:
        return "-"
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or unit == "P":
            return f"{number:.0f}{unit}" if not unit or number >= 99.95 else f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError


def printable(text: str) -> str:
    """Return the text without what a terminal would take for a command."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a printable text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, width: int) -> str:
    """Return the text in at most so many columns, with an ellipsis where something is left out."""
    if columns_of(text) <= width:
        return text
    while text and columns_of(text) > width - 1:
        text = text[: max(width - 1, 0)] if len(text) > width else text[:-1]
    return text + "…" if width > 0 else ""


@dataclass(frozen=True)
class Column:
    """A column: its title, the key that sorts by it, what it shows of a row, and what it sorts by.

    ``least`` is the width down to which it may be cut; 0: not at all.
    """

    title: str
    key: str
    cell: Callable[[Row], str]
    order: Callable[[Row], Any]
    least: int = 0
    is_number: bool = True


def _backlog(row: Row) -> str:
    return f"{short(row['waiting_bytes'])}/{short(row['capacity'])}"


def _topics(row: Row) -> str:
    topics = printable(" ".join(row["topics"]))
    if row["name"] is not None:
        topics = f"{printable(row['name'])}: {topics}"
    return topics if row["group"] is None else f"{topics} [{printable(row['group'])}]"


def _command(row: Row) -> str:
    command = printable(row["command"]) or "?"
    return command if row["state"] == "open" else f"({row['state']}) {command}"


def _url(row: Row) -> str:
    return printable(row["url"] if row["error"] is None else f"{row['url']}: {row['error']}")


def _waits(row: Row) -> str:
    return "" if row["waits_for"] is None else f"{printable(str(row['waits_for']))} {row['waited']:.1f} s"


def _value(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name] or 0


def _number(name: str) -> Callable[[Row], str]:
    return lambda row: short(row[name])


SUBSCRIPTIONS: Final = (
    Column("PID", "p", lambda row: str(row["pid"]), _value("pid")),
    Column("COMMAND", "c", _command, _command, 8, False),
    Column("TOPICS", "t", _topics, _topics, 8, False),
    Column("POLICY", "y", lambda row: row["overflow"], _value("overflow"), 0, False),
    Column("IN/s", "i", _number("rate_in"), _value("rate_in")),
    Column("OUT/s", "o", _number("rate_out"), _value("rate_out")),
    Column("BACKLOG", "b", _backlog, lambda row: row["waiting_bytes"] / row["capacity"]),
    Column("MISSED", "m", _number("missed"), _value("missed")),
    Column("STALLS", "s", lambda row: str(len(row["stalls"]) or ""), lambda row: len(row["stalls"])),
)
PUBLISHERS: Final = (
    Column("PID", "p", lambda row: str(row["pid"]), _value("pid")),
    Column("COMMAND", "c", _command, _command, 8, False),
    Column("BYTES/s", "i", _number("rate"), _value("rate")),
    Column("BYTES", "o", _number("bytes"), _value("bytes")),
    Column("UNROUTED", "b", _number("waiting_bytes"), _value("waiting_bytes")),
    Column("WAITS FOR", "s", _waits, _value("waited"), 9, False),
)
GROUPS: Final = (
    Column("GROUP", "t", lambda row: printable(row["name"]), _value("name"), 8, False),
    *(
        Column(name.upper(), key, _number(name), _value(name))
        for name, key in (("members", "p"), ("waiting", "b"), ("delivered", "o"), ("lost", "m"), ("dropped", "s"))
    ),
)

BRIDGES: Final = (
    Column("BRIDGE", "t", lambda row: printable(row["stream"]), _value("stream"), 8, False),
    Column("STATE", "s", lambda row: row["state"], _value("state"), 0, False),
    Column("SENT", "", _number("sent"), _value("sent")),
    Column("OUT/s", "o", _number("rate_out"), _value("rate_out")),
    Column("RECEIVED", "", _number("received"), _value("received")),
    Column("IN/s", "i", _number("rate_in"), _value("rate_in")),
    Column("OUTBOX", "b", _backlog, lambda row: row["waiting_bytes"] / row["capacity"]),
    Column("LAG", "p", _number("lag"), _value("lag")),
    Column("DROPPED", "y", _number("dropped"), _value("dropped")),
    Column("MISSED", "m", _number("missed"), _value("missed")),
    Column("REFUSED", "", _number("refused"), _value("refused")),
    Column("ENGINE", "c", _url, _url, 9, False),
)


def matching(rows: Iterable[Row], columns: Sequence[Column], text: str) -> list[Row]:
    """Return the rows that have ``text`` in a cell of words or in their PID, in any case."""
    wanted = text.casefold()
    shown = [column for column in columns if not column.is_number or column.key == "p"]
    return [row for row in rows if any(wanted in column.cell(row).casefold() for column in shown)]


def sorted_rows(rows: Iterable[Row], columns: Sequence[Column], key: str, *, is_reversed: bool) -> list[Row]:
    """Return the rows by the column that has this key: the largest numbers first, words from A. Else as they are."""
    found = [column for column in columns if column.key == key]
    return sorted(rows, key=found[0].order, reverse=found[0].is_number != is_reversed) if found else [*rows]


def table(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[str]:
    """Return a line of titles, and one for each row, none longer than ``width``."""
    cells = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(map(columns_of, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + len(widths) - 1 > width:
        spare = [size - column.least if column.least else 0 for column, size in zip(columns, widths, strict=True)]
        if max(spare) <= 0:
            break
        widths[spare.index(max(spare))] -= 1
    lines = []
    for line in cells:
        parts = [_placed(cell, size, column) for cell, size, column in zip(line, widths, columns, strict=True)]
        lines.append(cut(" ".join(parts).rstrip(), width))
    return lines


def _placed(cell: str, width: int, column: Column) -> str:
    text = cut(cell, width)
    space = " " * (width - columns_of(text))
    return space + text if column.is_number else text + space


def summary(whole: Row, address: str) -> list[str]:
    """Return two lines on the broker, and on how many rows there are."""
    minutes, seconds = divmod(int(whole["uptime"]), 60)
    hours, minutes = divmod(minutes, 60)
    unopened = sum(row["state"] != "open" for row in whole["subscribers"])
    waiting = sum(row["waits_for"] is not None for row in whole["publisher_rows"])
    counts = [
        f"{len(whole['subscribers'])} subscriptions" + (f" ({unopened} not open)" if unopened else ""),
        f"{len(whole['publisher_rows'])} publishers" + (f" ({waiting} waiting)" if waiting else ""),
        f"{len(whole['groups'])} groups",
        f"history of {whole['history_topics']} topics",
    ]
    if bridges := whole["bridges"].values():
        down = sum(row["state"] != "up" for row in bridges)
        counts.append(f"{len(bridges)} bridges" + (f" ({down} not up)" if down else ""))
    uptime = f"up {hours}:{minutes:02}:{seconds:02}"
    published = f"published {short(whole['published'])}" + ("" if whole["rate"] is None else f", {short(whole['rate'])}/s")
    return [
        f"broker {whole['pid']} {uptime}, {published}, memory {short(whole['memory'])}, {printable(address)}",
        ", ".join(counts),
    ]


def group_rows(whole: Row) -> list[Row]:
    """Return a row for each group."""
    return [{"name": name, **group} for name, group in whole["groups"].items()]


def tables_below(whole: Row) -> tuple[tuple[Sequence[Column], Sequence[Row]], ...]:
    """Return the columns and rows of each table below the subscriptions."""
    return (PUBLISHERS, whole["publisher_rows"]), (GROUPS, group_rows(whole)), (BRIDGES, [*whole["bridges"].values()])


def report(whole: Row, address: str, width: int) -> list[str]:
    """Return all there is as lines of text: for a file, or a terminal that cannot do more."""
    lines = [cut(line, width) for line in summary(whole, address)]
    subscriptions = sorted_rows(whole["subscribers"], SUBSCRIPTIONS, "b", is_reversed=False)
    for columns, rows in ((SUBSCRIPTIONS, subscriptions), *tables_below(whole)):
        if rows:
            lines += ["", *table(columns, rows, width)]
    return lines
