"""Who gets what is published to a topic: exact topics, patterns, order, and what changes meanwhile."""

from __future__ import annotations

import tracemalloc
from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpbroadcast.broker.core.patterns import Patterns, is_pattern, matcher
from mpbroadcast.broker.core.router import Router, matches

PLAIN = ["", "a", "b", "room:1", "a[", "]", "a\nb", "ü", "\\", "."]
PARTS = [*PLAIN, "*", "?", "a*", "*:1", "[*]", "[?]", "[[]", "[ab]", "[!a]"]
TOPICS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=2).map("".join)


def plainly_matches(topics: list[str], topic: str) -> bool:
    """Whether one of them matches, as the standard library has it; what is no pattern matches itself only."""
    return any(fnmatchcase(topic, own) for own in topics)


def test_very_many_topics() -> None:
    """What was found is kept for a bounded number of topics, and is right for all of them."""
    router: Router[str] = Router()
    router.add("all", ["*"])
    router.add("one", ["7"])
    tracemalloc.start()
    most = []
    try:
        for first in (0, 17_000, 34_000):
            for number in range(first, first + 17_000):
                assert sorted(router.targets(b"%d" % number)) == (["all", "one"] if number == 7 else ["all"])
            most.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert most[-1] < 1.5 * most[0]


def test_what_trying_patterns_takes_is_counted() -> None:
    """Once for a topic, as what was found is kept: so many steps, by which a publisher's turn is measured."""
    router: Router[int] = Router()
    router.add(1, ["a*", "a?", "b*"])
    assert router.steps == 0
    for _ in range(2):
        router.targets(b"ab")
        assert 200 <= router.steps < 300
    router.targets(b"ac")
    assert 400 <= router.steps < 600


def test_a_topic_that_is_no_text_is_told() -> None:
    """Bytes that are not UTF-8 raise an error, each time, and break nothing."""
    router: Router[str] = Router()
    router.add("all", ["*"])
    for _ in range(2):
        with pytest.raises(UnicodeDecodeError):
            router.targets(b"\xff")
    assert sorted(router.targets(b"a")) == ["all"]


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(topics=st.lists(TOPICS, max_size=4), topic=TOPICS)
def test_matching_is_that_of_the_standard_library(topics: list[str], topic: str) -> None:
    """Topics and patterns hear what fnmatchcase says, whichever way it is found out."""
    router: Router[str] = Router()
    router.add("me", topics)
    expected = plainly_matches(topics, topic)
    assert matches(topics, topic.encode()) == expected
    assert bool(router.targets(topic.encode())) == expected
    assert all(is_pattern(own) or own == topic for own in topics if fnmatchcase(topic, own))


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(
    st.text(alphabet="ab*?[]!-\n", max_size=9).filter(is_pattern),
    st.lists(st.text(alphabet="ab[]*\n", max_size=9), min_size=1, max_size=20),
)
@example("a*a", ["a", "aa", "aba"])
@example("a*b*a", ["aaa", "aba"])
@example("*b*b", ["aab", "bab"])
@example("*a*a*", ["ab", "aab"])
@example("*b*a*", ["aab", "baa"])
def test_patterns_match_as_in_the_standard_library(pattern: str, topics: list[str]) -> None:
    """Each pattern matches what ``fnmatch.fnmatchcase`` says, also those that are matched without ``re``."""
    for topic in topics:
        assert bool(matcher(pattern).match(topic)) == fnmatchcase(topic, pattern)


FEW = st.sampled_from(["a", "b", "a*", "*"]) | TOPICS
ACTIONS: st.SearchStrategy[tuple[str, int, list[str]]] = st.one_of(
    st.tuples(st.sampled_from(["add", "drop"]), st.integers(0, 3), st.lists(FEW, max_size=3)),
    st.tuples(st.sampled_from(["drop own", "remove"]), st.integers(0, 3), st.just([])),
)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=15), asked=st.lists(FEW, min_size=1, max_size=4))
@example([("add", 0, ["a"]), ("add", 1, ["a"]), ("drop", 0, ["a"])], ["a"])
def test_any_changes_lead_where_a_plain_list_leads(actions: list[tuple[str, int, list[str]]], asked: list[str]) -> None:
    """After each change, all that is asked leads to those of whose topics one matches, each once."""
    router: Router[int] = Router()
    plain: list[tuple[int, list[str]]] = []
    for action, number, topics in actions:
        own = next((own for other, own in plain if other == number), None)
        if action == "add":
            router.add(number, topics)
            if own is None:
                own = []
                plain.append((number, own))
            own += [topic for topic in dict.fromkeys(topics) if topic not in own]
        elif action == "remove":
            router.remove(number)
            plain = [(other, own) for other, own in plain if other != number]
        else:
            dropped = own[::2] if own and action == "drop own" else topics
            router.drop(number, dropped)
            if own is not None:
                own[:] = [topic for topic in own if topic not in dropped]
        for topic in asked:
            expected = sorted(other for other, own in plain if plainly_matches(own, topic))
            assert sorted(router.targets(topic.encode())) == expected
        assert [router.topics(other) for other, _ in plain] == [tuple(own) for _, own in plain]


def test_nothing_is_left_of_patterns_that_nobody_has() -> None:
    """Patterns that came and went leave nothing behind, however many there were."""

    def held(one: object) -> dict[str, object]:
        return {name: dict(value) for name, value in vars(one).items() if isinstance(value, dict)}

    router, patterns = Router[int](), Patterns[int]()
    empty = held(router), held(patterns)
    router.add(0, ["a*", "a?", "ab*", "b"])
    router.drop(0, ["a*", "ab*"])
    router.remove(0)
    for pattern in ("a*", "a?", "b*"):
        patterns.add(pattern, 1)
    for pattern in ("a?", "a*", "b*"):
        patterns.drop(pattern, 1)
    assert (held(router), held(patterns)) == empty
