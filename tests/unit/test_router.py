"""Who gets what is published to a topic: exact topics, patterns, order, and what changes meanwhile."""

from __future__ import annotations

import tracemalloc
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpbroadcast.broker.core.patterns import is_pattern
from mpbroadcast.broker.core.router import Router, matches

PLAIN = ["", "a", "b", "room:1", "a[", "]", "a\nb", "ü", "\\", "."]
PARTS = [*PLAIN, "*", "?", "a*", "*:1", "[*]", "[?]", "[[]", "[ab]", "[!a]"]
TOPICS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=2).map("".join)


def plainly_matches(topics: list[str], topic: str) -> bool:
    """Whether one of them matches, as the standard library has it; what is no pattern matches itself only."""
    return any(fnmatchcase(topic, own) for own in topics)


def test_an_exact_topic_leads_to_who_has_it() -> None:
    """Nobody else gets it, and a topic that nobody has leads nowhere."""
    router: Router[str] = Router()
    router.add("one", ["a", "b"])
    router.add("two", ["b"])
    assert sorted(router.targets(b"a")) == ["one"]
    assert sorted(router.targets(b"b")) == ["one", "two"]
    assert sorted(router.targets(b"c")) == []
    assert sorted(router.targets(b"")) == []
    assert sorted(router.targets(b"A")) == []


def test_the_empty_topic_is_one_like_any_other() -> None:
    """What is published without a topic reaches who has the empty one, and who hears everything."""
    router: Router[str] = Router()
    router.add("none", [""])
    router.add("all", ["*"])
    router.add("other", ["a"])
    assert sorted(router.targets(b"")) == ["all", "none"]


@pytest.mark.parametrize(
    ("pattern", "heard", "not_heard"),
    [
        ("*", ["", "a", "a\nb", "*"], []),
        ("room:*", ["room:", "room:1", "room:1:2"], ["room", "Room:1", "aroom:1"]),
        ("room:?", ["room:1", "room:ü", "room:?"], ["room:", "room:12"]),
        ("room:[12]", ["room:1", "room:2"], ["room:3", "room:[12]", "room:12"]),
        ("room:[!12]", ["room:3"], ["room:1", "room:"]),
        ("room:[*]", ["room:*"], ["room:1", "room:[*]", "room:"]),
        ("[[]a]", ["[a]"], ["a", "[[]a]"]),
        ("a[", ["a["], ["a", "ab"]),
        ("a.c", ["a.c"], ["abc"]),
        ("a.*", ["a.", "a.b"], ["ab"]),
    ],
)
def test_patterns(pattern: str, heard: list[str], not_heard: list[str]) -> None:
    """A pattern hears what it matches, case and all, and a star in brackets is a star."""
    router: Router[str] = Router()
    router.add("me", [pattern])
    for topic in [*heard, *not_heard]:
        assert router.targets(topic.encode()) == (("me",) if topic in heard else ())
        assert matches([pattern], topic.encode()) == (topic in heard)


def test_each_gets_it_once() -> None:
    """However many of its topics match, and however often one was added."""
    router: Router[str] = Router()
    router.add("one", ["a", "a", "*", "?", "[a]"])
    router.add("one", ["a", "*"])
    assert sorted(router.targets(b"a")) == ["one"]
    assert router.topics("one") == ("a", "*", "?", "[a]")


def test_what_changes_is_seen_at_once() -> None:
    """A topic that was asked for before leads elsewhere as soon as somebody comes, changes or goes."""
    router: Router[str] = Router()
    assert sorted(router.targets(b"a")) == []
    router.add("one", ["a"])
    assert sorted(router.targets(b"a")) == ["one"]
    router.add("two", ["*"])
    assert sorted(router.targets(b"a")) == ["one", "two"]
    router.drop("one", ["a"])
    assert sorted(router.targets(b"a")) == ["two"]
    router.add("one", ["?"])
    assert sorted(router.targets(b"a")) == ["one", "two"]
    router.remove("one")
    assert sorted(router.targets(b"a")) == ["two"]
    router.drop("two", ["*"])
    assert sorted(router.targets(b"a")) == []
    assert router.topics("two") == ()


def test_dropping_one_topic_leaves_the_others() -> None:
    """Also those that match the same, and those of others; what one does not have is passed over."""
    router: Router[str] = Router()
    router.add("one", ["a", "*"])
    router.add("two", ["a"])
    router.add("three", ["*"])
    router.drop("one", ["a", "b", "?", "a"])
    router.drop("nobody", ["a"])
    assert sorted(router.targets(b"a")) == ["one", "three", "two"]
    router.drop("one", ["*"])
    assert sorted(router.targets(b"a")) == ["three", "two"]
    router.remove("nobody")
    router.remove("one")
    router.remove("one")
    assert router.topics("one") == ()
    assert sorted(router.targets(b"a")) == ["three", "two"]


def test_very_many_topics() -> None:
    """What was found is kept for a bounded number of topics, and is right for all of them."""
    router: Router[str] = Router()
    router.add("all", ["*"])
    router.add("one", ["7"])
    tracemalloc.start()
    most = []
    try:
        for first in (0, 20_000, 40_000):
            for number in range(first, first + 20_000):
                for _ in range(2):
                    assert sorted(router.targets(b"%d" % number)) == (["all", "one"] if number == 7 else ["all"])
            most.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert most[-1] < 1.5 * most[0]


def test_a_topic_that_is_no_text_is_told() -> None:
    """Bytes that are not UTF-8 raise an error, each time, and break nothing."""
    router: Router[str] = Router()
    router.add("all", ["*"])
    for _ in range(2):
        with pytest.raises(UnicodeDecodeError):
            router.targets(b"\xff")
    assert sorted(router.targets(b"a")) == ["all"]


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(topics=st.lists(TOPICS, max_size=4), topic=TOPICS)
def test_matching_is_that_of_the_standard_library(topics: list[str], topic: str) -> None:
    """Topics and patterns hear what fnmatchcase says, whichever way it is found out."""
    router: Router[str] = Router()
    router.add("me", topics)
    expected = plainly_matches(topics, topic)
    assert matches(topics, topic.encode()) == expected
    assert bool(router.targets(topic.encode())) == expected
    assert all(is_pattern(own) or own == topic for own in topics if fnmatchcase(topic, own))


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 4), st.lists(TOPICS, max_size=3)),
    st.tuples(st.just("drop"), st.integers(0, 4), st.lists(TOPICS, max_size=3)),
    st.tuples(st.just("drop own"), st.integers(0, 4), st.lists(TOPICS, max_size=0)),
    st.tuples(st.just("remove"), st.integers(0, 4), st.lists(TOPICS, max_size=0)),
)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=15), asked=st.lists(TOPICS, min_size=1, max_size=4))
def test_any_changes_lead_where_a_plain_list_leads(actions: list[tuple[str, int, list[str]]], asked: list[str]) -> None:
    """After each change, all that is asked leads to those of whose topics one matches, in the order of their coming."""
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
            expected = tuple(other for other, own in plain if plainly_matches(own, topic))
            assert router.targets(topic.encode()) == expected
        assert [router.topics(other) for other, _ in plain] == [tuple(own) for _, own in plain]


def test_nothing_is_left_of_patterns_that_nobody_has() -> None:
    """Patterns that came and went leave nothing behind, however many there were."""
    router: Router[int] = Router()
    empty = {name: dict(value) for name, value in vars(router).items() if isinstance(value, dict)}
    router.add(0, ["a*", "a?", "ab*", "b"])
    router.drop(0, ["a*", "ab*"])
    router.remove(0)
    assert {name: dict(value) for name, value in vars(router).items() if isinstance(value, dict)} == empty
