"""The pure parts of the command line: figures, tables, keys, Prometheus' format, bars, help texts, scripts for shells."""

import dataclasses
import re
import subprocess
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpbroadcast import BrokerStats, GroupStats, PublisherStats, SubscriberStats
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
    report,
    short,
    sorted_rows,
    table,
)
from mpbroadcast.cli.progress import bar
from mpbroadcast.cli.prometheus import exposition
from mpbroadcast.cli.pub import Splitter
from mpbroadcast.cli.text import decode, encode, json_line, plain_line
from mpbroadcast.cli.view import View, changed, keys_in, screen
from tests.support.pages import ROOT

SUBSCRIBER = SubscriberStats(1, 10, ("room:*",), "drop_oldest", 1000, 50, 40, 3, 7, 900, (11,), True, None)
PUBLISHER = PublisherStats(5, 11, 1000, 20, 1, 3.25)
STATS = BrokerStats(9, 100.0, 60, 1, (SUBSCRIBER,), 4096, 2, 0, {}, (PUBLISHER,))
PROCESSES = {10: Process("python app.py", True), 11: Process("", False)}


def later(seconds: float, messages: int, **changes: Any) -> BrokerStats:
    """Return the snapshot of some seconds and messages later."""
    row = dataclasses.replace(SUBSCRIBER, published=50 + messages, delivered=40 + messages // 2)
    publisher = dataclasses.replace(PUBLISHER, bytes=1000 + 100 * messages)
    fields = {"uptime": 100.0 + seconds, "published": 60 + messages, "subscribers": (row,), "publisher_rows": (publisher,)}
    return dataclasses.replace(STATS, **{**fields, **changes})


def many(count: int) -> Row:
    """Return the figures of so many subscriptions."""
    rows = (dataclasses.replace(SUBSCRIBER, id=n, pid=1000 + n, topics=(f"room:{n}",), waiting_bytes=n) for n in range(count))
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
    for before in (None, dataclasses.replace(STATS, pid=8)):
        whole = figures(later(2.0, 100), before, PROCESSES)
        assert (whole["rate"], whole["subscribers"][0]["rate_in"]) == (None, None)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (999.7, "1k"),
        (1234, "1.23k"),
        (99_940, "99.9k"),
        (99_960, "100k"),
        (67_108_864, "67.1M"),
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


def test_the_report_has_a_row_for_each() -> None:
    """With its topics, its policy, what it misses, and what it waits for; nothing in it moves a terminal's cursor."""
    group = {"work\x1b[2J": GroupStats(2, 5, 100, 1, 0)}
    row = dataclasses.replace(SUBSCRIBER, topics=("a\nb", "日本"), group="work\x1b[2J")
    lines = report(figures(later(2.0, 100, groups=group, subscribers=(row,)), STATS, PROCESSES), "/run/bus", 100)
    assert lines == [
        "broker 9 up 0:01:42, published 160, 50/s, memory 4.1k, /run/bus",
        "1 subscriptions, 1 publishers (1 waiting), 1 groups, history of 2 topics",
        "",
        "PID COMMAND       TOPICS                  POLICY IN/s OUT/s BACKLOG MISSED STALLS",
        r" 10 python app.py a\nb 日本 [work\x1b[2J] oldest    0     0  900/1k      3      1",
        "",
        "PID COMMAND  BYTES/s BYTES UNROUTED WAITS FOR",
        " 11 (dead) ?      5k   11k       20 1 3.2 s",
        "",
        "GROUP       MEMBERS WAITING DELIVERED LOST DROPPED",
        r"work\x1b[2J       2       5       100    1       0",
    ]


def test_a_table_fits_its_width() -> None:
    """What can be cut is, the longest first."""
    long = figures(STATS, None, {10: Process("python " + "x" * 200, True)})["subscribers"]
    for width in range(70, 200, 7):
        lines = table(SUBSCRIPTIONS, long, width)
        assert max(map(columns_of, lines)) <= width
        assert lines[1].endswith("3      1")


def test_each_column_sorts() -> None:
    """The largest number first, words from A, and the other way round."""
    rows = many(3)["subscribers"]
    for column in SUBSCRIPTIONS:
        forth = sorted_rows(rows, SUBSCRIPTIONS, column.key, is_reversed=False)
        back = sorted_rows(rows, SUBSCRIPTIONS, column.key, is_reversed=True)
        assert [column.order(row) for row in back] == [column.order(row) for row in forth][::-1]
    assert [row["id"] for row in sorted_rows(rows, SUBSCRIPTIONS, "b", is_reversed=False)] == [2, 1, 0]
    assert [row["id"] for row in sorted_rows(rows, SUBSCRIPTIONS, "t", is_reversed=False)] == [0, 1, 2]


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
    b"/ab\x7f\x7fc\x1b[A\x01\r": View(filter="c"),
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


SAMPLE = re.compile(r'(mpbroadcast_\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? ([-+.\de]+)')


def test_the_format_of_prometheus() -> None:
    """Each metric has its HELP and TYPE before its samples, a counter's name ends in _total, and labels are escaped."""
    row = dataclasses.replace(SUBSCRIBER, topics=('a "b"\n\\', "c"), group="g")
    text = exposition(dataclasses.replace(STATS, subscribers=(row,), groups={'x"y': GroupStats(1, 2, 3, 4, 5)}))
    lines = text.splitlines()
    assert text.endswith("\n")
    assert 'mpbroadcast_subscription_missed_messages_total{id="1",pid="10",topics="a \\"b\\"\\n\\\\ c",' in text
    assert 'mpbroadcast_subscription_stalled_publishers{id="1",pid="10"' in text
    assert 'mpbroadcast_group_lost_messages_total{group="x\\"y"} 4' in lines
    assert "mpbroadcast_published_messages_total 60" in lines
    kinds: dict[str, str] = {}
    for line in lines:
        if line.startswith("# TYPE"):
            _, _, name, kinds[name] = line.split()
        elif not line.startswith("# HELP"):
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert (kinds[found[1]] == "counter") == found[1].endswith("_total")
    fields = {*dataclasses.asdict(SUBSCRIBER)} - {"id", "pid", "topics", "overflow", "group"}
    assert len([name for name in kinds if "subscription" in name]) == len(fields)


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


def test_a_bar_fits_its_line() -> None:
    """From the first byte to the last."""
    for columns in (20, 80, 200):
        for done in (0, 50, 100):
            assert len(bar(done, 100, 1_000_000, 3.0, columns)) < columns
    assert bar(50, 100, 1000, 2.0, 100).endswith(" 50%  1,000 messages, 500/s, 2 s left")


def test_each_help_fits_a_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 lines of 80 columns, with an example; and the list of commands names each."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("", *main.COMMANDS):
        with pytest.raises(SystemExit) as ended:
            main.main([name, "--help"] if name else ["--help"])
        text = capsys.readouterr().out
        lines = text.splitlines()
        assert ended.value.code == 0
        assert len(lines) <= 24, name
        assert max(map(len, lines)) < 80, name
        assert re.search(rf"^example: mpbroadcast {name}\b|^example: .*\| mpbroadcast {name}\b", text, re.MULTILINE) or not name
        if not name:
            assert [one for one in main.COMMANDS if not re.search(rf"^ +{one} ", text, re.MULTILINE)] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_option_is_completed(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Of each command; bash completes with the script."""
    assert main.main(["completion", shell]) == 0
    script = capfd.readouterr().out
    for word in (*main.COMMANDS, "-l timeout" if shell == "fish" else "--timeout", "interval", "prometheus"):
        assert word in script
    if shell == "bash":
        for words, position in (("mpbroadcast st", 1), ("mpbroadcast sub --t", 2), ("mpbroadcast pub x", 2)):
            script += f'COMP_WORDS=({words}); COMP_CWORD={position}; _mpbroadcast; echo "${{COMPREPLY[@]}}"\n'
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == ["stats", "--timeout", ""]


def test_the_picture_of_top_is_that_of_today() -> None:
    """docs/top.svg has each title, and the keys."""
    texts = (ROOT / "docs" / "top.svg").read_text().replace("&#160;", " ")
    for columns in (SUBSCRIPTIONS, PUBLISHERS, GROUPS):
        for column in columns:
            assert column.title in texts
    assert "q quit  / filter  r reverse" in texts
