"""The states of a channel: the table of transitions, and that nothing else happens."""

from __future__ import annotations

import pytest

from mpbroadcast.client.pipe_ownership import TRANSITIONS, ChannelState, IllegalTransition, transition

LEGAL = {
    ("UNOPENED", "OPENING"),
    ("UNOPENED", "ELSEWHERE"),
    ("OPENING", "OPEN"),
    ("OPENING", "UNOPENED"),
    ("OPENING", "ELSEWHERE"),
    ("OPEN", "RECONNECTING"),
    ("OPEN", "ELSEWHERE"),
    ("RECONNECTING", "OPEN"),
    ("RECONNECTING", "ELSEWHERE"),
    *((state, "CLOSING") for state in ("UNOPENED", "OPENING", "OPEN", "RECONNECTING", "ELSEWHERE")),
    ("CLOSING", "CLOSED"),
}


@pytest.mark.parametrize("to", ChannelState)
@pytest.mark.parametrize("state", ChannelState)
def test_each_transition_is_in_the_table_or_raises(state: ChannelState, to: ChannelState) -> None:
    """A transition that is listed returns the new state; any other one raises, and names both states."""
    if (state.name, to.name) in LEGAL:
        assert transition(state, to) is to
        return
    with pytest.raises(IllegalTransition, match=f"{state.name} cannot become {to.name}"):
        transition(state, to)


def test_each_state_has_its_row() -> None:
    """Only CLOSED is final, and each state can be reached."""
    assert set(TRANSITIONS) == set(ChannelState)
    assert [state for state, following in TRANSITIONS.items() if not following] == [ChannelState.CLOSED]
    assert {to for following in TRANSITIONS.values() for to in following} == set(ChannelState)
