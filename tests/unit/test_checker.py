"""The checker of the bridges' chaos run: it passes what bridges may do, and finds everything else."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bridge.checker import (
    COUNTED,
    ERROR,
    FOREIGN,
    LAGGED,
    RESTARTED,
    SPOILED,
    Channel,
    Layout,
    Log,
    Reasons,
    Source,
    check,
    check_figures,
)

ALL = frozenset({"room", "via", "local"})
LAYOUT = Layout(
    {
        "main": {"A": frozenset({"room", "via"}), "B": ALL, "C": frozenset({"room"})},
        "side": {"B": frozenset({"room", "via"}), "C": frozenset({"room", "via"})},
    }
)
SOURCES = [
    Source("A", 0, "room"),
    Source("A", 1, "room"),
    Source("A", 0, "via"),
    Source("A", 0, "local"),
    Source("C", 0, "room"),
]
MARKS = {"~": LAGGED, "#": RESTARTED, "?": FOREIGN, "*": SPOILED, "!": ERROR, "=": COUNTED}
KILLED = Reasons(kills={"A": 1})
DROPPED = Reasons(drops=frozenset({("main", "A")}))
A = "a0 a1 b0 a2 v0 l0 c0 a3"
B = "a0 a1 b0 c0 a2 v0 a3"
C = "a0 a1 b0 c0 a2 a3"


def log(text: str) -> Log:
    """Return what a channel was given: a letter for the source and a number, or a mark."""
    made = Log()
    for word in text.split():
        if word in MARKS:
            made.add(MARKS[word])
        else:
            made.message("abvlc".index(word[0]), int(word[1:]))
    return made


def verdict(a: str = A, b: str = B, c: str = C, outside: str = "l0", reasons: Reasons | None = None) -> set[str]:
    """Return the kinds of what is wrong with the channels of three machines, where A is that of the origin."""
    last = {"A": " a4 b1 v1 l1 c1", "B": " a4 b1 v1 c1", "C": " a4 b1 c1"}
    channels = [Channel(name, name, ALL, log(text + last[name])) for name, text in (("A", a), ("B", b), ("C", c))]
    channels.append(Channel("A's local topics", "A", frozenset({"local"}), log(outside + " l1")))
    return {*check(dict(zip(SOURCES, (5, 2, 2, 2, 2), strict=True)), channels, LAYOUT, reasons)}


def test_what_is_right_passes() -> None:
    """Each machine has its own order of origins; local messages stay, and so do those that would need two bridges."""
    assert not verdict()
    assert not verdict(c="c0 a0 a1 b0 a2 a3", b="a0 a1 b0 a2 v0 a3 c0")


@pytest.mark.parametrize(
    ("channels", "wrong"),
    [
        ({"c": "a0 b0 c0 a2 a3"}, {"lost"}),
        ({"c": "a0 a1 b0 c0 a2"}, {"lost"}),
        ({"c": ""}, {"lost"}),
        ({"a": "a1 b0 a2 v0 l0 c0 a3"}, {"lost"}),
        ({"c": "a0 a1 a1 b0 c0 a2 a3"}, {"doubled"}),
        ({"c": "a0 a1 b0 c0 a2 a0 a3"}, {"doubled"}),
        ({"a": "a0 a1 b0 a2 a1 v0 l0 c0 a3"}, {"echoed"}),
        ({"c": "a0 a2 b0 c0 a1 a3"}, {"reordered", "not in the order of the origin"}),
        ({"c": "a0 b0 a1 c0 a2 a3"}, {"not in the order of the origin"}),
        ({"c": "a0 a1 a7 b0 c0 a2 a3"}, {"forged"}),
        ({"c": "a0 a1 ? b0 c0 a2 a3"}, {"forged"}),
        ({"a": "a0 a1 b0 a9 a2 v0 l0 c0 a3"}, {"forged"}),
        ({"c": "a0 a1 * b0 c0 a2 a3"}, {"spoiled"}),
        ({"c": "a0 a1 ! b0 c0 a2 a3"}, {"error"}),
        ({"c": "a0 a1 b0 c0 v0 a2 a3"}, {"transit"}),
        ({"b": "a0 a1 b0 l0 c0 a2 v0 a3"}, {"not bridged"}),
        ({"outside": "l0 a0"}, {"wrong topic"}),
        ({"c": "a0 a1 ~ b0 c0 a2 a3"}, {"gap announced without reason"}),
        ({"outside": "~ l0"}, {"gap announced without reason"}),
        ({"a": "a0 # a1 b0 a2 v0 l0 c0 a3"}, {"restart announced without reason"}),
    ],
)
def test_what_is_wrong_is_found(channels: dict[str, Any], wrong: set[str]) -> None:
    """Where nothing happened that may cost messages, each fault has its name."""
    assert verdict(**channels) == wrong


@pytest.mark.parametrize(
    ("c", "wrong"),
    [
        ("a0 ~ c0 a2 a3", set()),  # one gap of two sources
        ("a0 c0 ~ a2 a3", set()),
        ("~ a2 c0 a3", set()),
        ("a0 ~ b0 c0 ~ a3", set()),
        ("a0 a1 b0 c0 a2 ~ a3", set()),  # what C does not get can be what was dropped
        ("a0 c0 a2 a3", {"gap not announced"}),
        ("a0 ~ b0 c0 a3", {"gap not announced"}),
        ("a0 ~ ~ b0 c0 a2 a3", {"gap announced twice"}),
        ("a0 a1 b0 ~ ~ ~ c0 a3", {"gap announced twice"}),
        ("a0 ~ a2 a3", {"lost"}),  # the message of C, which drops nothing
        ("a0 c0 a2 ~ a3", {"gap not announced"}),
        ("a0 = c0 a2 a3", {"gap with a number"}),
        ("a0 a1 ~ b0 c0 a2 a3", {"gap announced without reason"}),
    ],
)
def test_a_gap_has_one_mark_between_its_neighbours(c: str, wrong: set[str]) -> None:
    """Of the origin whose outbox drops messages may be missing, where they are announced, once."""
    assert verdict(c=c, reasons=DROPPED) == wrong


@pytest.mark.parametrize(
    ("channels", "wrong"),
    [
        ({"a": "a0 # a2 v0 l0 c0 a3", "b": "a0 a1 b0 c0 ~ a2 v0 a3", "c": "a0 a1 b0 ~ c0 a2 a3"}, set()),
        ({"a": "a0 # a2 v0 l0 c0 a3", "b": "a0 ~ a2 c0 v0 a3", "c": "a0 ~ c0 a2 a3"}, set()),
        ({"a": "a0 a2 v0 l0 c0 # a3"}, {"gap not announced"}),
        ({"a": "a0 # a2 v0 l0 c0 a3", "b": "a0 c0 a2 v0 ~ a3"}, {"gap not announced"}),
        ({"a": "a0 # a2 v0 l0 c0 a3", "b": B}, {"takeover not announced"}),
        ({"a": A}, {"restart not announced"}),
        ({"a": "# a0 # a1 b0 a2 v0 l0 c0 a3"}, {"restart announced without reason"}),
        ({"a": "a0 # a1 b0 a2 v0 l0 a3"}, set()),  # the machine's own broker may lose what comes from others
        ({"outside": "# ~ l0"}, {"gap announced without reason"}),
        ({"c": "# a0 a1 b0 c0 a2 a3"}, {"restart announced without reason"}),
    ],
)
def test_a_broker_that_dies_costs_messages_that_are_announced(channels: dict[str, str], wrong: set[str]) -> None:
    """Its own channels have ``BrokerRestarted``, those of other machines ``Lagged``, whether or not something is missing."""
    usual = {"a": "# " + A, "b": "~ " + B, "c": "~ " + C, "outside": "# l0"}
    assert verdict(**{**usual, **channels}, reasons=KILLED) == wrong


def test_a_log_that_lost_its_end_is_announced_once() -> None:
    """Each loss is one mark for each stream of a channel, whatever is missing."""
    lost = Reasons(losses=1)
    assert not verdict(c="a0 ~ c0 a2 a3", reasons=lost)
    assert not verdict(c="a0 ~ a1 b0 c0 a2 a3", reasons=lost)
    assert verdict(c="a0 c0 a2 a3", reasons=lost) == {"gap not announced"}
    assert verdict(c="a0 ~ ~ ~ ~ a1 b0 c0 a2 a3", reasons=lost) == {"gap announced without reason"}


@dataclass
class Row:
    """The figures of a stream on one machine."""

    sent: int
    received: int
    dropped: int = 0
    missed: int = 0
    waiting: int = 0


def test_figures_agree_with_what_was_published() -> None:
    """What is sent, or dropped, is all that goes out over a stream; what others drop is missed."""
    published = dict(zip(SOURCES, (4, 3, 2, 7, 5), strict=True))  # of A 9 over "main", of C 5
    right = {"A": Row(9, 5), "B": Row(0, 14), "C": Row(5, 7)}
    assert not check_figures(published, {"main": right, "side": {}}, LAYOUT)
    assert not check_figures(published, {"main": {"A": Row(6, 5, dropped=3), "B": Row(0, 11, missed=3)}}, LAYOUT)
    for wrong in (Row(8, 5), Row(9, 6), Row(9, 5, missed=1), Row(9, 5, waiting=1), Row(8, 5, dropped=1)):
        assert check_figures(published, {"main": {**right, "A": wrong}}, LAYOUT)
    assert not check_figures(published, {"main": {**right, "A": Row(1, 1)}}, LAYOUT, KILLED)


ROOMS = [Source("A", 0, "room"), Source("A", 1, "room"), Source("B", 0, "room")]
PAIR = Layout({"main": {"A": frozenset({"room"}), "B": frozenset({"room"})}})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.booleans()), min_size=1), st.data())
def test_any_history_passes_and_any_change_of_it_does_not(steps: list[tuple[int, bool, bool]], data: st.DataObject) -> None:
    """An origin's messages are dropped at random, each gap with a mark; then one message or mark is removed, or comes twice."""
    counts = [0, 0, 0]
    origin, other = Log(), Log()
    was_dropped = False
    for source, is_dropped, is_interrupted in [*steps, (0, False, False), (1, False, False)]:
        origin.message(source, counts[source])
        if is_interrupted:
            other.message(2, counts[2])
            counts[2] += 1
        if was_dropped and not is_dropped:
            other.add(LAGGED)
        if not is_dropped:
            other.message(source, counts[source])
        was_dropped = is_dropped
        counts[source] += 1
    for number in range(counts[2]):
        origin.message(2, number)
    reasons = Reasons(drops=frozenset({("main", "A")}))

    def found(given: Log) -> set[str]:
        channels = [Channel("A", "A", frozenset({"room"}), origin), Channel("B", "B", frozenset({"room"}), given)]
        return {*check(dict(zip(ROOMS, counts, strict=True)), channels, PAIR, reasons)}

    assert not found(other)
    index = data.draw(st.integers(0, len(other.records) - 1))
    records = [*other.records]
    if records[index] >> 56 or not any(is_dropped for _, is_dropped, _ in steps):  # else it may extend a gap
        assert found(Log(records[:index] + records[index + 1 :]))
    assert found(Log([*records[: index + 1], *records[index:]]))
