"""The states of publishers, subscriptions, their pipes and channels: a transition is listed, or raises."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest

from mpbroadcast.broker.channel_pipe import ChannelPipe
from mpbroadcast.broker.core.states import IllegalTransition, PipeState, PublisherState, State, SubscriptionState
from mpbroadcast.client import pipe_ownership

CHANNEL = {state.name: [to.name for to in following] for state, following in pipe_ownership.TRANSITIONS.items()}
BROKER = [{state.name: state.following for state in kind} for kind in (PublisherState, PipeState, SubscriptionState)]


@pytest.mark.parametrize(
    ("kind", "table", "to", "error"),
    [
        (PublisherState, BROKER[0], State.to, IllegalTransition),
        (PipeState, BROKER[1], State.to, IllegalTransition),
        (SubscriptionState, BROKER[2], State.to, IllegalTransition),
        (pipe_ownership.ChannelState, CHANNEL, pipe_ownership.transition, pipe_ownership.IllegalTransition),
    ],
)
def test_only_the_transitions_that_are_listed(
    kind: type[Enum], table: dict[str, list[str]], to: Callable[[Any, Any], Any], error: type[Exception]
) -> None:
    """Each pair of states is legal, and returned, or raises with both names. Only the last is final, each can be reached."""
    for state in kind:
        for other in kind:
            if other.name in table[state.name]:
                assert to(state, other) is other
            else:
                with pytest.raises(error, match=rf"{state.name}.* {other.name}$"):
                    to(state, other)
    first, *_, last = table
    assert [name for name, following in table.items() if not following] == [last]
    assert {*table} - {name for following in table.values() for name in following} <= {first}


def test_an_illegal_transition_changes_nothing() -> None:
    """A pipe that is not being opened cannot be open, and stays as it is."""
    pipe = ChannelPipe()
    before = dict(vars(pipe))
    with pytest.raises(IllegalTransition):
        pipe.open()
    assert vars(pipe) == before
