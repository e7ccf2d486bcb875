"""The pure parts of the command line: figures, tables, keys, Prometheus' format, bars, help texts, scripts for shells."""

import dataclasses
import fcntl
import io
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpbroadcast import BridgeStats, BrokerStats, GroupStats, PublisherStats, SubscriberStats
from mpbroadcast.cli import main
from mpbroadcast.cli.figures import (
    GROUPS,
    PUBLISHERS,
    SUBSCRIPTIONS,
    Process,
    Row,
    columns_of,
    cut,
    figures,
    matching,
    report,
    short,
    sorted_rows,
    table,
)
from mpbroadcast.cli.processes import shortened
from mpbroadcast.cli.progress import Progress, bar
from mpbroadcast.cli.prometheus import exposition
from mpbroadcast.cli.pub import Splitter
from mpbroadcast.cli.text import decode, encode, json_line, plain_line
from mpbroadcast.cli.view import View, changed, keys_in, screen
from tests.support.pages import ROOT

SUBSCRIBER = SubscriberStats(1, 10, ("room:*",), "drop_oldest", 1000, 50, 40, 3, 7, 900, (11,), True, None, 0, None)
PUBLISHER = PublisherStats(5, 11, 1000, 20, 1, 3.25)
STATS = BrokerStats(9, 3700.5, 60, 1, (SUBSCRIBER,), 4096, 2, 0, {}, (PUBLISHER,))
BRIDGE = BridgeStats(
    *("main", "redis://db:6379/0", 12, "up", None, ("room:*",), "drop_oldest", 64_000_000),
    *(50, 7, 900, 3, 40, 2, 1, 4, 6),
)
PROCESSES = {10: Process("python app.py", True), 11: Process("", False)}


def later(seconds: float, messages: int, **changes: Any) -> BrokerStats:
    """Return the snapshot of some seconds and messages later."""
    row = dataclasses.replace(SUBSCRIBER, published=50 + messages, delivered=40 + messages // 2)
    publisher = dataclasses.replace(PUBLISHER, bytes=1000 + 100 * messages)
    fields = {
        "uptime": STATS.uptime + seconds,
        "published": 60 + messages,
        "subscribers": (row,),
        "publisher_rows": (publisher,),
    }
    return dataclasses.replace(STATS, **{**fields, **changes})


def many(count: int) -> Row:
    """Return the figures of so many subscriptions."""
    topics = [(f"room:{n}",) for n in range(count)]
    rows = (
        dataclasses.replace(SUBSCRIBER, id=n, pid=1000 + n, topics=topics[n], waiting_bytes=n, missed=n) for n in range(count)
    )
    return figures(dataclasses.replace(STATS, subscribers=tuple(rows)), None, {})


def test_rates_are_the_differences_of_two_snapshots() -> None:
    """Of the same broker and the same row; a row that is new counts from its beginning."""
    whole = figures(later(2.0, 100), STATS, PROCESSES)
    (row,), (publisher,) = whole["subscribers"], whole["publisher_rows"]
    assert (whole["rate"], row["rate_in"], row["rate_out"], publisher["rate"]) == (50, 50, 25, 5000)
    assert (row["command"], row["state"], publisher["state"]) == ("python app.py", "open", "dead")
    new = dataclasses.replace(SUBSCRIBER, id=2, is_open=False, pid=12)
    (row,) = figures(later(2.0, 0, subscribers=(new,)), STATS, PROCESSES)["subscribers"]
    assert (row["rate_in"], row["state"], row["command"]) == (25, "unopened", "")
    assert (figures(later(0.5, 100), STATS, {})["rate"], figures(later(0.5, 0), STATS, {})["rate"]) == (200, 0)
    for before in (None, dataclasses.replace(STATS, pid=8)):
        whole = figures(later(2.0, 100), before, PROCESSES)
        assert (whole["rate"], whole["subscribers"][0]["rate_in"]) == (None, None)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (999.5, "1k"),
        (1234, "1.23k"),
        (99_940, "99.9k"),
        (99_960, "100k"),
        (67_108_864, "67.1M"),
        (1e18, "1000P"),
    ],
)
def test_numbers_are_short(number: float | None, text: str) -> None:
    assert short(number) == text


@given(number=st.floats(min_value=0, max_value=1e17))
def test_no_number_is_long(number: float) -> None:
    assert len(short(number)) <= 5


@given(text=st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=30), width=st.integers(0, 20))
def test_a_text_is_cut_to_its_columns(text: str, width: int) -> None:
    """Also one with wide and combining characters."""
    assert columns_of(cut(text, width)) <= width
    assert cut(text, columns_of(text)) == text


CUT = {("abcdef", 4): "abc…", ("abcdef", 1): "…", ("abcdef", 0): "", ("日本語", 4): "日…"}


def test_as_much_as_possible_is_left_of_a_text() -> None:
    assert {case: cut(*case) for case in CUT} == CUT
    assert columns_of("e\u0301") == 1


def test_the_report_has_a_row_for_each() -> None:
    """With its topics, its policy, what it misses, and what it waits for; nothing in it moves a terminal's cursor."""
    group = {"work\x1b[2J": GroupStats(2, 5, 100, 1, 0)}
    row = dataclasses.replace(SUBSCRIBER, topics=("a\\\nb", "日本"), group="work\x1b[2J")
    lines = report(figures(later(2.0, 100, groups=group, subscribers=(row,)), STATS, PROCESSES), "/run/bus", 100)
    assert lines == [
        "broker 9 up 1:01:42, published 160, 50/s, memory 4.1k, /run/bus",
        "1 subscriptions, 1 publishers (1 waiting), 1 groups, history of 2 topics",
        "",
        "PID COMMAND       TOPICS                   POLICY      IN/s OUT/s BACKLOG MISSED STALLS",
        r" 10 python app.py a\\nb 日本 [work\x1b[2J] drop_oldest    0     0  900/1k      3      1",
        "",
        "PID COMMAND  BYTES/s BYTES UNROUTED WAITS FOR",
        " 11 (dead) ?      5k   11k       20 1 3.2 s",
        "",
        "GROUP       MEMBERS WAITING DELIVERED LOST DROPPED",
        r"work\x1b[2J       2       5       100    1       0",
    ]
    lines = report(many(2), "/run/bus", 100)
    assert [line.split()[0] for line in lines[2:] if line] == ["PID", "1001", "1000", "PID", "11"]


def test_the_report_has_a_row_for_each_bridge() -> None:
    """With its rates, what waits, what is missing, and the error of its engine."""
    before = dataclasses.replace(STATS, bridges={"main": BRIDGE})
    down = dataclasses.replace(BRIDGE, stream="other", state="connecting", error="OSError: no\nroute", lag=None, refused=0)
    bridges = {"main": dataclasses.replace(BRIDGE, sent=250, received=140), "other": down}
    whole = figures(later(2.0, 0, bridges=bridges, subscribers=(), publisher_rows=()), before, {})
    lines = report(whole, "/run/bus", 120)
    assert lines[1] == "0 subscriptions, 0 publishers, 0 groups, history of 2 topics, 2 bridges (1 not up)"
    assert lines[3:] == [
        "BRIDGE STATE      SENT OUT/s RECEIVED IN/s  OUTBOX LAG DROPPED MISSED REFUSED ENGINE",
        "main   up          250   100      140   50 900/64M   6       3      2       4 redis://db:6379/0",
        r"other  connecting   50    25       40   20 900/64M   -       3      2       0 redis://db:6379/0: OSError: no\nroute",
    ]
    shown, _ = screen(whole, "/run/bus", View(), 100, 24)
    assert {line.text[:6]: line.style for line in shown if line.text[:5] in ("main ", "other")} == {
        "main  ": "notice",
        "other ": "alarm",
    }


def test_a_table_fits_its_width() -> None:
    """What can be cut is, the longest first, and no more than must be."""
    long = figures(STATS, None, {10: Process("python " + "x" * 200, True)})["subscribers"]
    for width in range(5, 200, 5):
        lines = table(SUBSCRIPTIONS, long, width)
        assert max(map(columns_of, lines)) == width
        assert lines[1].endswith("3      1") or width < 70
    least = " 10 python … room:* drop_oldest    -     -  900/1k      3      1"
    assert [table(SUBSCRIPTIONS, long, width)[1] for width in (64, 55)] == [least, least[:54] + "…"]


def test_each_column_sorts() -> None:
    """The largest number first, words from A, and the other way round."""
    rows = many(3)["subscribers"]
    for column in SUBSCRIPTIONS:
        forth = sorted_rows(rows, SUBSCRIPTIONS, column.key, is_reversed=False)
        back = sorted_rows(rows, SUBSCRIPTIONS, column.key, is_reversed=True)
        assert [column.order(row) for row in back] == [column.order(row) for row in forth][::-1]
    assert [row["id"] for row in sorted_rows(rows, SUBSCRIPTIONS, "b", is_reversed=False)] == [2, 1, 0]
    assert [row["id"] for row in sorted_rows(rows, SUBSCRIPTIONS, "t", is_reversed=False)] == [0, 1, 2]
    assert [row["id"] for row in sorted_rows(rows, SUBSCRIPTIONS, "m", is_reversed=False)] == [2, 1, 0]
    assert sorted_rows(rows, GROUPS, "y", is_reversed=False) == [*rows]


def test_rows_are_found_by_words_and_process_ids() -> None:
    """In any case, and not by other numbers."""
    rows = many(12)["subscribers"]
    found = {text: [row["id"] for row in matching(rows, SUBSCRIPTIONS, text)] for text in ("ROOM:1", "1003", "1k", "")}
    assert found == {"ROOM:1": [1, 10, 11], "1003": [3], "1k": [], "": [*range(12)]}


def pressed(keys: bytes, view: View | None = None) -> View | None:
    """Return the view after these bytes have come from a terminal."""
    view = view or View()
    for key in keys_in(keys):
        after = changed(view, key, 10)
        if after is None:
            return None
        view = after
    return view


KEYS = {
    b"q": None,
    b"m": View(sort="m"),
    b"mr": View(sort="m", is_reversed=True),
    b"mrt": View(sort="t"),
    b"\x1b[B\x1b[B\x1b[A": View(first=1),
    b"\x1b[6~\x1bOB": View(first=11),
    b"\x1b[6~\x1b[5~\x1b[5~": View(first=0),
    b"\x1b[B\x1b[H": View(first=0),
    b"/room:q\r": View(filter="room:q"),
    b"/roo": View(filter="roo", is_typing=True),
    b"/ab\x7fc\x1b[A\x01\r": View(filter="ac"),
    "/ü\r".encode(): View(filter="ü"),
    b"/a\x1b": View(),
    b"/a\r\x1b": View(),
    b"\x1b[99;5Z?\xff": View(),
}


@pytest.mark.parametrize("keys", KEYS)
def test_keys_change_the_view(keys: bytes) -> None:
    assert pressed(keys) == KEYS[keys]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 10), (1, 1)])
@pytest.mark.parametrize("count", [0, 5, 500])
def test_a_screen_is_filled_and_no_more(width: int, height: int, count: int) -> None:
    """Whatever its size and however many rows there are; from the first row to the last."""
    whole = many(count)
    for keys in (b"", b"\x1b[6~", b"\x1b[F", b"/room:4\r", b"/nothing\r"):
        view = pressed(keys)
        assert view
        lines, view = screen(whole, "/run/bus", view, width, height)
        assert len(lines) == height
        assert max(columns_of(line.text) for line in lines) <= max(width, 60 if count else 1)
        if (height, count, keys) == (24, 500, b"\x1b[F"):
            shown = [line.text for line in lines if "room:" in line.text]
            assert "room:0" in shown[-1]
            assert view.first == 500 - len(shown)
            assert "PUBLISHERS" not in lines[-1].text
            assert any("WAITS FOR" in line.text for line in lines)
        if keys == b"/room:4\r" and height > 10 and count:
            assert all("room:4" in line.text for line in lines if "room:" in line.text and line.style != "footer")


def screen_of(view: View, height: int, publishers: int = 2) -> list[str]:
    """Return the lines of a screen of subscriptions in each state, with the style of each."""
    states: list[dict[str, Any]] = [{}, {"pid": 11}, {"is_open": False, "pid": 12}, {"missed": 7}, {}]
    rows = []
    for n, state in enumerate(states):
        usual = {"id": n, "missed": 0, "stalls": (11,) if n == 0 else (), "waiting_bytes": 9 - n, "topics": (f"{n}",)}
        rows.append(dataclasses.replace(SUBSCRIBER, **(usual | state)))
    writers = [dataclasses.replace(PUBLISHER, id=n, pid=10, waits_for=None if n else 1) for n in range(publishers)]
    groups = {"work": GroupStats(1, 2, 3, 4, 5)} if publishers else {}
    whole = dataclasses.replace(STATS, subscribers=tuple(rows), publisher_rows=tuple(writers), groups=groups)
    lines, _ = screen(figures(whole, None, PROCESSES), "/run/bus", view, 90, height)
    return [f"{line.style}|{line.text.rstrip()}" for line in lines]


def test_a_screen_has_all_with_its_style() -> None:
    """A process that is dead or waited for is an alarm, and what is not read a notice."""
    assert screen_of(View(), 20) == [
        "summary|broker 9 up 1:01:40, published 60, memory 4.1k, /run/bus",
        "summary|5 subscriptions (2 not open), 2 publishers (1 waiting), 1 groups, history of 2 topics",
        "title|PID COMMAND       TOPICS POLICY      IN/s OUT/s BACKLOG MISSED STALLS",
        "alarm| 10 python app.py 0      drop_oldest    -     -    9/1k      0      1",
        "alarm| 11 (dead) ?      1      drop_oldest    -     -    8/1k      0",
        "notice| 12 (unopened) ?  2      drop_oldest    -     -    7/1k      0",
        "notice| 10 python app.py 3      drop_oldest    -     -    6/1k      7",
        "| 10 python app.py 4      drop_oldest    -     -    5/1k      0",
        *["|"] * 6,
        "title|PID COMMAND       BYTES/s BYTES UNROUTED WAITS FOR",
        "alarm| 10 python app.py       -    1k       20 1 3.2 s",
        "|",
        "title|GROUP MEMBERS WAITING DELIVERED LOST DROPPED",
        "|work        1       2         3    4       5",
        "footer|1-5 of 5 by BACKLOG   q quit  / filter  r reverse  sort: p c t y i o b m s",
    ]
    assert screen_of(View(), 20, 0)[1] == "summary|5 subscriptions (2 not open), 0 publishers, 0 groups, history of 2 topics"


@pytest.mark.parametrize(
    ("view", "height", "footer"),
    [
        (View(), 6, "1-1 of 5 by BACKLOG   q"),
        (View(first=99), 13, "3-5 of 5 by BACKLOG   q"),
        (View(filter="none"), 20, "0-0 of 0 by BACKLOG, with 'none'   q"),
        (View(sort="t", is_reversed=True), 20, "1-5 of 5 by TOPICS reversed   q"),
        (View(filter="p", is_typing=True), 20, "filter: p_   Enter"),
    ],
)
def test_the_last_line_has_what_is_shown(view: View, height: int, footer: str) -> None:
    assert screen_of(view, height)[-1].startswith(f"footer|{footer}")


@pytest.mark.parametrize(("height", "shown"), [(6, 0), (16, 1), (24, 2), (60, 8)])
def test_publishers_have_a_part_of_the_screen(height: int, shown: int) -> None:
    lines = screen_of(View(), height, 9)
    assert sum("       20" in line for line in lines) == shown
    assert sum("3.2 s" in line for line in lines) == min(shown, 1)
    assert not [line for line in screen_of(View(), height, 0) if "WAITS" in line or "GROUP" in line]


SAMPLE = re.compile(r'(mpbroadcast_\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? ([-+.\de]+)')


def test_the_format_of_prometheus() -> None:
    """Each metric has its HELP and TYPE before its samples, a counter's name ends in _total, and labels are escaped."""
    row = dataclasses.replace(SUBSCRIBER, topics=('a "b"\n\\', "c"), group="g")
    bridge = dataclasses.replace(BRIDGE, lag=None)
    groups = {'x"y': GroupStats(1, 2, 3, 4, 5)}
    text = exposition(dataclasses.replace(STATS, subscribers=(row,), groups=groups, bridges={"main": bridge}))
    lines = text.splitlines()
    assert text.endswith("\n")
    assert 'mpbroadcast_subscription_missed_messages_total{id="1",pid="10",topics="a \\"b\\"\\n\\\\ c",' in text
    assert 'mpbroadcast_subscription_stalled_publishers{id="1",pid="10"' in text
    assert 'overflow="drop_oldest",group="g",name=""} 1\n' in text
    assert 'mpbroadcast_group_lost_messages_total{group="x\\"y"} 4' in lines
    assert {"mpbroadcast_published_messages_total 60", "mpbroadcast_uptime_seconds 3700.5"} < {*lines}
    assert 'overflow="drop_oldest",group="",name=""} 1\n' in exposition(STATS)
    labels = '{stream="main",url="redis://db:6379/0",topics="room:*"}'
    assert {f"mpbroadcast_bridge_up{labels} 1", f"mpbroadcast_bridge_refused_entries_total{labels} 4"} <= {*lines}
    assert not [line for line in lines if line.startswith("mpbroadcast_bridge_lag_entries{")]  # it is not known
    kinds: dict[str, str] = {}
    for line in lines:
        if line.startswith("# TYPE"):
            _, _, name, kinds[name] = line.split()
        elif not line.startswith("# HELP"):
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert (kinds[found[1]] == "counter") == found[1].endswith("_total")
    fields = {*dataclasses.asdict(SUBSCRIBER)} - {"id", "pid", "topics", "overflow", "group", "name"}
    assert len([name for name in kinds if "subscription" in name]) == len(fields)
    fields = {*dataclasses.asdict(BRIDGE)} - {"stream", "url", "pid", "error", "topics", "overflow"}
    assert len([name for name in kinds if "bridge" in name]) == len(fields)


@given(
    lines=st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=10),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_lines_come_however_they_are_cut(lines: list[bytes], cuts: list[int]) -> None:
    """The last one with or without its end; and as the same bytes again, whatever they are."""
    for data in (b"".join(line + b"\n" for line in lines), b"\n".join(lines)):
        splitter = Splitter(b"\n")
        found: list[str] = []
        positions = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for start, end in pairwise(positions):
            found += splitter.lines(data[start:end])
        found += splitter.last()
        expected = data.split(b"\n")
        assert found == [decode(line) for line in (expected if expected[-1] else expected[:-1])]
        assert [encode(line) for line in found] == data.removesuffix(b"\n").split(b"\n")[: len(found)]


@given(message=st.text() | st.lists(st.text() | st.floats() | st.binary(), max_size=3))
def test_a_message_is_one_line(message: Any) -> None:
    """Of UTF-8, or of the bytes that surrogates stand for; as JSON always of UTF-8."""
    for line in (plain_line(message), json_line({"message": message, "id": 1})):
        assert len(line.decode("utf-8", "replace").splitlines()) == 1
        assert line.endswith(b"\n")
    json_line({"message": message}).decode()


def test_a_command_line_shows_no_password() -> None:
    """Of a URL that a user has given in it; else it is as it is, without the program's folder."""
    words = ["/usr/bin/mpbroadcast", "bridge", "redis://me:s@cret/x@db:6379/0?password=s&x=1", "--topics", "a@b", "//c"]
    assert shortened(words) == "mpbroadcast bridge redis://db:6379/0?password=&x=1 --topics a@b //c"
    assert shortened([]) == ""


def test_a_line_has_its_message() -> None:
    """What has no form in JSON is its ``repr``; a text has its own letters, and its line breaks are escaped."""
    for message, plain, of_json in (
        ("é\nb", "é\\nb", '"é\\nb"'),
        ([1], "[1]", "[1]"),
        (float("nan"), "nan", '"nan"'),
        ({(1, "é"): 2}, "{(1, 'é'): 2}", "\"{(1, 'é'): 2}\""),
    ):
        assert plain_line(message) == f"{plain}\n".encode()
        assert json_line({"id": 1, "message": message}) == f'{{"id": 1, "message": {of_json}}}\n'.encode()


BARS = {
    (0, 100, 60): "[................................]   0%  0 messages, 0/s, -",
    (50, 100, 60): "[#########..........]  50%  1,000 messages, 500/s, 2 s left",
    (50, 100, 200): f"[{'#' * 20}{'.' * 20}]  50%  1,000 messages, 500/s, 2 s left",
    (100, 100, 43): "[] 100%  2,000 messages, 1,000/s, 0 s left",
    (100, 100, 30): "[] 100%  2,000 messages, 1,00",
    (0, 0, 90): f"[{'#' * 40}] 100%  0 messages, 0/s, 0 s left",
}


def test_a_bar_fits_its_line() -> None:
    """From the first byte to the last."""
    found = {case: bar(case[0], case[1], 20 * case[0], 2.0, case[2]) for case in BARS}
    assert found == BARS


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Now and then, and at the end, on one line; and not where nothing is to be done, or in a file."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    clock = Mock()
    monkeypatch.setattr(time, "monotonic", clock)
    with open(ours, "rb", buffering=0) as shown, open(theirs, "w") as terminal, io.StringIO() as file:
        for stream, total in ((file, 100), (terminal, 0), (terminal, 100)):
            monkeypatch.setattr(sys, "stderr", stream)
            clock.return_value = 5.0
            with Progress(total) as progress:
                for clock.return_value in (5.0, 5.05, 5.1, 7.0):
                    progress.add(1, 25)
        bars = [bar(25, 100, 1, 0.0, 60), bar(75, 100, 3, 0.1, 60), bar(100, 100, 4, 2.0, 60), bar(100, 100, 4, 2.0, 60)]
        expected = "".join(f"\r\x1b[K{one}" for one in bars) + "\r\n"
        found = b""
        while not found.endswith(b"\n"):  # a terminal may give it in parts
            found += shown.read(1000)
        assert (found.decode(), file.getvalue()) == (expected, "")


def test_each_help_fits_a_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 lines of 80 columns, with an example; and the list of commands names each."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("", *main.COMMANDS):
        with pytest.raises(SystemExit) as ended:
            main.main([name, "--help"] if name else ["--help"])
        text = capsys.readouterr().out
        lines = text.splitlines()
        assert ended.value.code == 0
        assert len(lines) <= 40, name
        assert max(map(len, lines)) < 80, name
        assert re.search(rf"^example: mpbroadcast {name}\b|^example: .*\| mpbroadcast {name}\b", text, re.MULTILINE) or not name
        if not name:
            assert [one for one in main.COMMANDS if not re.search(rf"^ +{one} ", text, re.MULTILINE)] == []


# Words as bash splits them, the last of which is completed.
COMPLETED = [
    ("mpbroadcast st", "stats"),
    ("mpbroadcast sub --t", "--timeout"),
    ("mpbroadcast pub x", ""),
    ("mpbroadcast run --no", "--no-restart"),
    ("mpbroadcast run --res", ""),  # hidden
    ("mpbroadcast run --topi", "--topics"),
    ("mpbroadcast run no_such", "no_such_command"),
    ("mpbroadcast run --history 1 --address = x no_such", "no_such_command"),
    ("mpbroadcast run --bridge redis : //db/0 no_such", "no_such_command"),
    ("mpbroadcast run --bridge no_such", "no_such_command"),
    ("mpbroadcast run --topics a no_such", ""),
    ("mpbroadcast run --topics a b -- no_such", "no_such_command"),
    ("mpbroadcast run --history no_such", ""),
]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_option_is_completed(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Of each command; bash completes with the script, also the command of ``run``."""
    assert main.main(["completion", shell]) == 0
    script = capfd.readouterr().out
    fish = ("-l timeout -r -d 'exit", "-s 0 -d")
    for word in (*main.COMMANDS, *(fish if shell == "fish" else ("--timeout",)), "interval", "prometheus"):
        assert word in script
    if shell == "bash":
        script += "no_such_command() { :; }\n"
        for words, _ in COMPLETED:
            script += f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _mpbroadcast; echo "${{COMPREPLY[@]}}"\n'
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert dict(zip((words for words, _ in COMPLETED), done.stdout.splitlines(), strict=True)) == dict(COMPLETED)


TOOK = "put -- before COMMAND, because --topics takes every word up to the next option"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--topics a b uvicorn app:app --workers 4", f"unrecognized arguments: --workers; if it belongs to COMMAND, {TOOK}"),
        ("--topics a b uvicorn app:app -w 4", f"unrecognized arguments: -w; if it belongs to COMMAND, {TOOK}"),
        ("--topics a b uvicorn app:app", f"no COMMAND: {TOOK}"),
        (
            "--topics a b --histroy 1 true",
            f"unrecognized arguments: --histroy; did you mean --history? If it belongs to COMMAND, {TOOK}",
        ),
        ("--topics a b --histroy -- true", "unrecognized arguments: --histroy; did you mean --history?"),
        ("--histroy 1 true", "unrecognized arguments: --histroy; did you mean --history?"),
        ("--history 1", "no COMMAND: give it after the options"),
        ("--topics a b --", "no COMMAND: give it after the options"),
    ],
)
def test_a_command_that_an_option_took(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``run`` names ``--`` if ``--topics`` may have taken words of the command, and only then."""
    with pytest.raises(SystemExit) as ended:
        main.main(["run", *words.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"mpbroadcast run: error: {error}"


SIZES = {"65536": 1 << 16, "64K": 1 << 16, "64k": 1 << 16, "64M": 1 << 26, "64MiB": 1 << 26, "64MB": 1 << 26, "2G": 1 << 31}


@pytest.mark.parametrize("text", SIZES)
@pytest.mark.parametrize("command", [("bridge",), ("serve", "--bridge"), ("run", "--bridge")])
def test_sizes_of_a_bridge(text: str, command: tuple[str, ...]) -> None:
    """``--capacity`` and ``--max-bytes`` are bytes, or a number with a power of 1024."""
    words = [*command, "--capacity", text, f"--max-bytes={text}", *(["true"] if command[0] == "run" else [])]
    options, _ = main.parse(words)
    assert (options.capacity, options.max_bytes) == (SIZES[text], SIZES[text])


@pytest.mark.parametrize("text", ["", "M", "64 M", "1.5M", "-1", "64T", "0x10"])
@pytest.mark.parametrize("option", ["--capacity", "--max-bytes"])
def test_a_wrong_size(text: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.parse(["bridge", f"{option}={text}"])
    assert ended.value.code == 2
    assert f"argument {option}: {text!r} is not a size in bytes, such as 65536, 64K or 1M" in capsys.readouterr().err


def test_the_picture_of_top_is_that_of_today() -> None:
    """docs/top.svg has each title, and the keys."""
    texts = (ROOT / "docs" / "top.svg").read_text().replace("&#160;", " ")
    for columns in (SUBSCRIPTIONS, PUBLISHERS, GROUPS):
        for column in columns:
            assert column.title in texts
    assert "q quit  / filter  r reverse" in texts
    assert " drop_oldest " in texts
