"""The states of publishers, subscriptions and their pipes: each transition is in the table, or raises and changes nothing."""

from __future__ import annotations

import pytest

from mpbroadcast.broker.channel_pipe import ChannelPipe
from mpbroadcast.broker.core.states import IllegalTransition, PipeState, PublisherState, State, SubscriptionState

KINDS: list[type[State]] = [PublisherState, PipeState, SubscriptionState]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_transitions_that_are_listed(kind: type[State]) -> None:
    """Each pair of states is legal, and returned, or raises with both names."""
    for state in kind:
        for other in kind:
            if other.name in state.following:
                assert state.to(other) is other
            else:
                with pytest.raises(IllegalTransition, match=f"{state.name} -> {other.name}"):
                    state.to(other)


def test_each_state_can_be_reached_and_left() -> None:
    """No state is a dead end but the last, and none is never entered but the first ones."""
    for kind in KINDS:
        states = list(kind)
        entered = {name for state in states for name in state.following}
        assert [state for state in states if not state.following] == [states[-1]]
        assert {state for state in states if state.name not in entered} <= {states[0], PipeState.RESERVED}


def test_an_illegal_transition_changes_nothing() -> None:
    """A pipe that is not being opened cannot be open, and stays as it is."""
    pipe = ChannelPipe()
    before = dict(vars(pipe))
    with pytest.raises(IllegalTransition):
        pipe.open()
    assert vars(pipe) == before
