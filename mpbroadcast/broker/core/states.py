"""The states of publishers, subscriptions and their pipes, and the transitions between them. Pure.

An object has its state in one attribute, and changes it by ``self.state = self.state.to(...)``: a transition that is not in the
table raises, and changes nothing. What an object has in flags beside that is independent of its state.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Self


class IllegalTransition(RuntimeError):
    """A change of state that is not in the table."""


class State(Enum):
    """A state that knows which states can follow it."""

    def to(self, following: Self) -> Self:
        """Return ``following``.

        :raises IllegalTransition: that state cannot follow this one.
        """
        if not any(following in table.get(self, ()) for table in (PUBLISHER, PIPE, SUBSCRIPTION)):
            raise IllegalTransition(f"{type(self).__name__}: {self.name} -> {following.name}")
        return following


class PublisherState(State):
    """Of the pipe of a publisher, in the broker."""

    READING = "read whenever the poller reports bytes"
    NAPPING = "read after a nap, without the poller: it is busy"
    PAUSED = "not read: what was read before is not all routed, as a backlog is full, or its turn is over"
    DRAINING = "closed: what was read is still to be routed"
    GONE = "closed, and all of it routed"


class PipeState(State):
    """Of the pipe of a subscription, in the broker."""

    UNOPENED = "any process may open it"
    RESERVED = "one process may open it, which had it open before the broker was restarted"
    OPENING = "its descriptors are on their way to a process"
    OPEN = "it has a reader"
    GONE = "it is closed"


class SubscriptionState(State):
    """Of a subscription, whatever its pipe is: a channel that was unsubscribed can still be opened and read."""

    ACCEPTING = "messages are routed to it"
    ENDED = "no more messages are routed to it"


_P, _C, _S = PublisherState, PipeState, SubscriptionState

PUBLISHER: Final[dict[State, set[State]]] = {
    _P.READING: {_P.NAPPING, _P.PAUSED, _P.DRAINING},
    _P.NAPPING: {_P.READING, _P.PAUSED, _P.DRAINING},
    _P.PAUSED: {_P.READING, _P.DRAINING},
    _P.DRAINING: {_P.GONE},
    _P.GONE: set(),
}
PIPE: Final[dict[State, set[State]]] = {
    _C.UNOPENED: {_C.OPENING, _C.GONE},
    _C.RESERVED: {_C.OPENING, _C.GONE},
    _C.OPENING: {_C.OPEN, _C.UNOPENED, _C.RESERVED, _C.GONE},
    _C.OPEN: {_C.GONE},
    _C.GONE: set(),
}
SUBSCRIPTION: Final[dict[State, set[State]]] = {_S.ACCEPTING: {_S.ENDED}, _S.ENDED: set()}
