"""Which subscriptions get what is published to a topic: exact topics, patterns, and what changes meanwhile."""

import tracemalloc
from collections.abc import Generator
from fnmatch import fnmatchcase
from itertools import islice, pairwise
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpbroadcast.broker.core import router as module
from mpbroadcast.broker.core.patterns import Patterns, is_pattern, matcher
from mpbroadcast.broker.core.router import Router

PLAIN = ["", "a", "b", "room:1", "a[", "]", "a\nb", "ü", "\\", "."]
PARTS = [*PLAIN, "*", "?", "a*", "*:1", "[*]", "[?]", "[[]", "[ab]", "[!a]"]
TOPICS = st.sampled_from(["a", "b", "a*", "*"]) | st.lists(st.sampled_from(PARTS), min_size=1, max_size=2).map("".join)
ACTIONS: st.SearchStrategy[tuple[str, int, list[str]]] = st.tuples(
    st.sampled_from(["add", "drop", "drop own", "remove"]), st.integers(0, 3), st.lists(TOPICS, max_size=3)
)
STEADY = settings(max_examples=200, derandomize=True, database=None, deadline=None)


def advance(parts: Generator[None, None, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Do one more part. Return what is found, if that was the last."""
    try:
        next(parts)
    except StopIteration as done:
        found: tuple[int, ...] = done.value
        return found
    return None


def targets(router: Router[Any], topic: bytes) -> tuple[Any, ...]:
    """Look it up until all is done."""
    found = router.targets(topic)
    if found is None:
        parts = router.look_up(topic)
        while (done := advance(parts)) is None:
            pass
        found = done
    return found


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
                assert sorted(targets(router, b"%d" % number)) == (["all", "one"] if number == 7 else ["all"])
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
    assert sorted(targets(router, b"a")) == ["all"]


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
@example([("add", 0, ["[ab]"])], ["a"])
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
            assert sorted(targets(router, topic.encode())) == sorted(expected)
            router.found.clear()
            with mock.patch.object(module, "PART", 0):
                assert sorted(targets(router, topic.encode())) == sorted(expected)
        assert {other: router.topics(other) for other in plain} == {other: tuple(own) for other, own in plain.items()}


SLOW = ["a*b", "a*c", "a?b", "*b", "b*"]  # each is a part of its own here
CHANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.sampled_from(["ab", *SLOW])), max_size=8)


def matches(topics: tuple[str, ...], name: bytes) -> bool:
    return any(fnmatchcase(name.decode(), topic) for topic in topics)


@STEADY
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["ab", *SLOW])), max_size=8), CHANGES)
def test_what_changes_while_topics_are_looked_up(topics: list[tuple[int, str]], changes: list[tuple[bool, int, str]]) -> None:
    """What has subscribed by the end is found, and nothing else; the last one goes on when another one is done."""
    router: Router[int] = Router()
    for number, topic in topics:
        router.add(number, [topic])
    with mock.patch.object(module, "PART", 0), mock.patch.object(module, "MOST_LOOKED_UP", 2):
        lookups = {name: router.look_up(name) for name in (b"ab", b"acb", b"a?c")}
        to_come = iter(changes)
        while lookups:
            for name, lookup in list(lookups.items()):
                if (found := advance(lookup)) is not None:
                    subscribed = [number for number in range(4) if matches(router.topics(number), name)]
                    assert sorted(found) == sorted(targets(router, name)) == subscribed
                    del lookups[name]
            for is_new, number, topic in islice(to_come, 1):
                (router.add if is_new else router.drop)(number, [topic])


def test_a_topic_that_takes_long_is_looked_up_in_parts() -> None:
    """Each takes little more steps than a part; what is closed before the end makes room for another one."""
    router: Router[int] = Router()
    router.add(1, [f"*[ab]{'?' * 900}{number}" for number in range(16)])
    router.add(2, ["*"])
    begun = [router.look_up(b"a" * 1000 + b"%d" % number) for number in range(module.MOST_LOOKED_UP)]
    late_topic = b"b" * 1000 + b"1"
    late, latest = router.look_up(late_topic), router.look_up(late_topic)
    assert router.targets(late_topic) is None
    assert not any(map(advance, begun))
    before = router.steps
    assert not any(map(advance, (late, late)))
    assert router.steps == before
    begun.pop().close()
    steps = [before]
    while (found := advance(late)) is None:
        steps.append(router.steps)
        assert advance(latest) is None
        assert router.steps == steps[-1]
    taken = [more - less for less, more in pairwise(steps)]
    assert (len(taken) > 4, min(taken) > module.PART, max(taken) < 2 * module.PART) == (True, True, True)
    assert sorted(found) == sorted(router.targets(late_topic) or ()) == [1, 2]
    for lookup in begun:
        lookup.close()


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
    assert len([*patterns.matching_in_parts("ab", 0, [])]) == 3
    for pattern in ("a?", "a*", "b*"):
        patterns.drop(pattern, 1)
    assert (held(router), held(patterns)) == empty
