"""What a session may have, and all sessions together: costs, budgets, and what matching patterns takes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpbroadcast.broker.core.limits import MOST_STEPS, Budget, Cost, OverBudget, cost_of
from mpbroadcast.broker.core.patterns import Patterns, is_pattern, steps, steps_of_all
from mpbroadcast.validation import MAX_TOPIC
from tests.support.frames_made import STEADY

COSTS = st.builds(Cost, *[st.integers(0, 5)] * 4)


@STEADY
@given(
    costs=st.lists(st.tuples(st.integers(0, 1), COSTS), max_size=12),
    own=st.builds(Cost, *[st.integers(0, 12)] * 4),
    together=st.builds(Cost, *[st.integers(0, 20)] * 4),
)
def test_no_session_has_more_than_its_budget_nor_all_sessions_theirs(
    costs: list[tuple[int, Cost]], own: Cost, together: Cost
) -> None:
    """What would be too much of anything is refused, by name, and what is given back can be spent again."""
    whole = Budget(together)
    parts = [Budget(own, whole), Budget(own, whole)]
    spent = [Cost(), Cost()]
    for index, cost in costs:
        wanted = spent[index].plus(cost)
        fits = all(map(int.__le__, wanted, own))
        if fits and all(map(int.__le__, wanted.plus(spent[1 - index]), together)):
            parts[index].check(cost)
            parts[index].spend(cost)
            spent[index] = wanted
        else:
            with pytest.raises(OverBudget, match="all processes together would" if fits else "this process would"):
                parts[index].check(cost)
        assert [part.spent for part in parts] == spent
        assert whole.spent == spent[0].plus(spent[1])
    for part, cost in zip(parts, spent, strict=True):
        part.release(cost)
    assert whole.spent == parts[0].spent == Cost()


def test_an_error_names_what_there_is_too_much_of() -> None:
    """And how much it would be, and may be."""
    names = ("subscriptions", "topics and patterns", "bytes of topics", "steps of matching its patterns")
    for field, name in zip(Cost._fields, names, strict=True):
        with pytest.raises(OverBudget, match=f"would have 3 {name}, and may have 2"):
            Budget(Cost(2, 2, 2, 2)).check(Cost()._replace(**{field: 3}))


def test_an_ordinary_program_takes_no_memory() -> None:
    """Less than a quarter of a MiB does not show; of more, each subscription, topic and byte counts."""
    budget = Budget(Cost())
    budget.spend(Cost(1, 500, 2048, 1 << 20))
    assert budget.memory == 0
    budget.spend(Cost(3, 5, 1 << 18, 0))
    assert budget.memory == 4 * 4096 + 505 * 512 + 2048 + (1 << 18) - (1 << 18)


def test_costs_are_of_different_kinds() -> None:
    """A subscription's topics and patterns are counted, with their bytes, and with what matching the patterns takes."""
    topics = ["é", "a*b", "?"]
    assert cost_of(topics, 2) == Cost(2, 3, 2 + 3 + 1, steps_of_all(topics))


@STEADY
@given(st.lists(st.text("ab*?[]", max_size=5), max_size=8, unique=True), st.text("ab", max_size=5))
def test_what_a_topic_takes_is_that_of_the_patterns_that_begin_as_it_does(patterns: list[str], topic: str) -> None:
    """The estimate counts each such pattern, whatever else has come and gone; and those that match are found."""
    found: Patterns[int] = Patterns()
    topic *= 200
    chosen = [pattern for pattern in patterns if is_pattern(pattern)]
    for member, pattern in enumerate(chosen):
        for each in (member, member, -1):
            found.add(pattern, each)
        found.drop(pattern, -1)
    for gone in ("a*b", "[a]", "aaaa?"):
        if gone not in chosen:
            found.add(gone, 7)
            found.drop(gone, 7)
    alike: dict[str, list[str]] = {}
    for pattern in chosen:
        alike.setdefault(re.split(r"[*?[]", pattern)[0], []).append(pattern)
    expected = len({*map(len, alike)})
    for beginning, group in alike.items():
        if topic.startswith(beginning):
            expected += 100 * len(group) + sum(map(steps, group)) * len(topic) // MAX_TOPIC
    assert found.steps(topic) == expected


def test_what_is_slow_to_match_counts_so() -> None:
    """What stands behind a star is looked for at each position of the topic; without ``re`` in a tenth of the time, with some
    for each position, and at one only if it is the end. Many short patterns are as much as a few long ones."""
    found = {"ab*c*": MAX_TOPIC * 6 // 10, "*c*d*": MAX_TOPIC * 8 // 10, "a*bc?": MAX_TOPIC * 3, "a*[b]*": MAX_TOPIC * 3}
    patterns = {"abc?": 4, "abc*": 0, "*": 0, "a**bcd": 0, **found}
    assert {pattern: steps(pattern) for pattern in patterns} == patterns
    assert steps_of_all(["abc", "a?", "*x*"]) == 2 * 100 + 2 + MAX_TOPIC * 6 // 10
    for length, fit in ((900, 180), (6, 13_000), (1, 22_000)):
        pattern = "*" + "a" * length + "*"
        assert steps_of_all([pattern] * fit) < MOST_STEPS < steps_of_all([pattern] * (fit + fit // 10))
