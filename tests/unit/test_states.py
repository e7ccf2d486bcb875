"""The states of publishers, subscriptions and their pipes: each transition is in the table, or raises and changes nothing."""

from __future__ import annotations

import pytest

from mpbroadcast.broker.channel_pipe import ChannelPipe
from mpbroadcast.broker.core.states import PIPE, PUBLISHER, SUBSCRIPTION, IllegalTransition, PipeState, State


@pytest.mark.parametrize("table", [PUBLISHER, PIPE, SUBSCRIPTION])
def test_only_the_transitions_of_the_table(table: dict[State, set[State]]) -> None:
    """Each pair of states is legal, and returned, or raises with both names."""
    for state, following in table.items():
        for other in table:
            if other in following:
                assert state.to(other) is other
            else:
                with pytest.raises(IllegalTransition, match=f"{state.name} -> {other.name}"):
                    state.to(other)


def test_each_state_can_be_reached_and_left() -> None:
    """No state is a dead end but the last, and none is never entered but the first ones."""
    for table in (PUBLISHER, PIPE, SUBSCRIPTION):
        entered = {state for following in table.values() for state in following}
        assert [state for state, following in table.items() if not following] == [list(table)[-1]]
        assert {state for state in table if state not in entered} <= {next(iter(table)), PipeState.RESERVED}


def test_an_illegal_transition_changes_nothing() -> None:
    """A pipe that is not being opened cannot be open, and stays as it is."""
    pipe = ChannelPipe()
    before = dict(vars(pipe))
    with pytest.raises(IllegalTransition):
        pipe.open()
    assert vars(pipe) == before
