"""The states of publishers, subscriptions, their pipes and channels: a transition is listed, or raises."""

from collections.abc import Generator
from unittest.mock import Mock

import pytest

from mpbroadcast.broker.channel_pipe import ChannelPipe
from mpbroadcast.broker.core.states import PipeState, PublisherState, SubscriptionState
from mpbroadcast.client.pipe_ownership import ChannelState, PipeOwnership
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import ChannelInUse, ClosedError
from mpbroadcast.states import IllegalTransition, State


@pytest.mark.parametrize("kind", [PublisherState, PipeState, SubscriptionState, ChannelState])
def test_only_the_transitions_that_are_listed(kind: type[State]) -> None:
    """Each pair of states is legal, and returned, or raises with both names. Only the last is final, each can be reached."""
    for state in kind:
        for other in kind:
            if other.name in state.following:
                assert state.to(other) is other
            else:
                with pytest.raises(IllegalTransition, match=f"{state.name} -> {other.name}$"):
                    state.to(other)
    first, *_, last = kind
    assert [state for state in kind if not state.following] == [last]
    assert {state.name for state in kind} - {name for state in kind for name in state.following} <= {first.name}


def test_an_illegal_transition_changes_nothing() -> None:
    """A pipe that is not being opened cannot be open, and stays as it is."""
    pipe = ChannelPipe()
    before = dict(vars(pipe))
    with pytest.raises(IllegalTransition):
        pipe.open()
    assert vars(pipe) == before


def test_a_close_comes_before_the_reply_that_another_process_is_the_owner() -> None:
    """Of a channel that another thread closes meanwhile, ``open`` raises ClosedError."""

    def requesting(*_: object, **__: object) -> Generator[None, None, None]:
        ownership.close_pipe(0)
        raise ChannelInUse("", 1)
        yield

    ownership = PipeOwnership(Mock(requesting=requesting), 1, True)
    with pytest.raises(ClosedError):
        ownership.open(Deadline(None))
