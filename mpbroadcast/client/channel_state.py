"""The states of a channel in one process, and which may follow which. Pure.

::

    UNOPENED --> OPENING --> OPEN <--> RECONNECTING
        ^___________|

UNOPENED, OPENING, OPEN and RECONNECTING can become ELSEWHERE; each state but CLOSED can become CLOSING, then CLOSED.
Another process that opens a channel, and each fork of a process that has it open, lead to ELSEWHERE, for good.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final


class ChannelState(Enum):
    """What a channel is in one process."""

    UNOPENED = auto()  # no pipe: the first process that receives opens the channel
    OPENING = auto()  # the broker has sent the pipe, and has not confirmed that this process is the owner
    OPEN = auto()  # this process is the owner, and receives
    RECONNECTING = auto()  # the broker has died; the pipe of the one that takes over is not confirmed yet
    ELSEWHERE = auto()  # another process is the owner
    CLOSING = auto()  # close() has begun; after an interrupt it can be called again
    CLOSED = auto()  # the broker knows, or the next request will show it


UNOPENED, OPENING, OPEN, RECONNECTING, ELSEWHERE, CLOSING, CLOSED = ChannelState

TRANSITIONS: Final[dict[ChannelState, tuple[ChannelState, ...]]] = {
    UNOPENED: (OPENING, ELSEWHERE, CLOSING),
    OPENING: (OPEN, UNOPENED, ELSEWHERE, CLOSING),
    OPEN: (RECONNECTING, ELSEWHERE, CLOSING),
    RECONNECTING: (OPEN, ELSEWHERE, CLOSING),
    ELSEWHERE: (CLOSING,),
    CLOSING: (CLOSED,),
    CLOSED: (),
}


class IllegalTransition(RuntimeError):
    """A state that cannot follow the one before it."""


def transition(state: ChannelState, to: ChannelState) -> ChannelState:
    """Return ``to``, if it may follow ``state``.

    :raises IllegalTransition: it may not.
    """
    if to not in TRANSITIONS[state]:
        raise IllegalTransition(f"a channel that is {state.name} cannot become {to.name}")
    return to
