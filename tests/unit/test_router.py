"""Which subscriptions get what is published to a topic: exact topics, patterns, and what changes meanwhile."""

import tracemalloc
from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpbroadcast.broker.core.patterns import Patterns, is_pattern, matcher
from mpbroadcast.broker.core.router import Router

PLAIN = ["", "a", "b", "room:1", "a[", "]", "a\nb", "ü", "\\", "."]
PARTS = [*PLAIN, "*", "?", "a*", "*:1", "[*]", "[?]", "[[]", "[ab]", "[!a]"]
TOPICS = st.sampled_from(["a", "b", "a*", "*"]) | st.lists(st.sampled_from(PARTS), min_size=1, max_size=2).map("".join)
ACTIONS: st.SearchStrategy[tuple[str, int, list[str]]] = st.tuples(
    st.sampled_from(["add", "drop", "drop own", "remove"]), st.integers(0, 3), st.lists(TOPICS, max_size=3)
)
STEADY = settings(max_examples=200, derandomize=True, database=None, deadline=None)


def test_very_many_topics() -> None:
    """What was found is kept for a bounded number of topics, and is right for all of them."""
    router: Router[str] = Router()
    router.add("all", ["*"])
    router.add("one", ["7"])
    most = []
    tracemalloc.start()
    try:
        for first in (0, 17_000):
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
    steps = [router.steps]
    for topic in (b"ab", b"ab", b"ac", b"ab"):
        router.targets(topic)
        steps.append(router.steps)
    assert steps[0] == 0
    assert 200 <= steps[1] == steps[2] < 300
    assert steps[3] == steps[4] == 2 * steps[1]


def test_a_topic_that_is_no_text_is_an_error() -> None:
    """Bytes that are not UTF-8 raise, each time, and break nothing."""
    router: Router[str] = Router()
    router.add("all", ["*"])
    for _ in range(2):
        with pytest.raises(UnicodeDecodeError):
            router.targets(b"\xff")
    assert sorted(router.targets(b"a")) == ["all"]


@STEADY
@given(
    st.text(alphabet="ab*?[]!-\n", max_size=9).filter(is_pattern),
    st.lists(st.text(alphabet="ab[]*\n", max_size=9), min_size=1, max_size=20),
)
@example("a*", ["b"])
@example("a*a", ["a", "aa", "aba"])
@example("a*b*a", ["aaa", "aba"])
@example("*b*b", ["aab", "bab"])
@example("*a*a*", ["ab", "aab"])
@example("*b*a*", ["aab", "baa"])
def test_patterns_match_as_in_the_standard_library(pattern: str, topics: list[str]) -> None:
    """Each pattern matches as ``fnmatch.fnmatchcase`` does, also those that are matched without ``re``."""
    for topic in topics:
        assert bool(matcher(pattern).match(topic)) == fnmatchcase(topic, pattern)


@STEADY
@given(actions=st.lists(ACTIONS, max_size=15), asked=st.lists(TOPICS, min_size=1, max_size=4))
@example([("add", 0, ["a"]), ("add", 1, ["a"]), ("drop", 0, ["a"])], ["a"])
def test_any_changes_lead_where_a_plain_list_leads(actions: list[tuple[str, int, list[str]]], asked: list[str]) -> None:
    """After each change, all that is asked leads to those of whose topics one matches, each once."""
    router: Router[int] = Router()
    plain: dict[int, list[str]] = {}
    for action, number, topics in actions:
        own = plain.get(number, [])
        if action == "add":
            router.add(number, topics)
            plain[number] = [*dict.fromkeys(own + topics)]
        elif action == "remove":
            router.remove(number)
            plain.pop(number, None)
        else:
            dropped = own[::2] if action == "drop own" else topics
            router.drop(number, dropped)
            own[:] = [topic for topic in own if topic not in dropped]
        for topic in asked:
            expected = [other for other, own in plain.items() if any(fnmatchcase(topic, each) for each in own)]
            assert sorted(router.targets(topic.encode())) == sorted(expected)
        assert {other: router.topics(other) for other in plain} == {other: tuple(own) for other, own in plain.items()}


def test_nothing_is_left_of_patterns_that_were_dropped() -> None:
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
