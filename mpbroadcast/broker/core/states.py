"""The states of publishers, subscriptions and their pipes, and the transitions between them. Pure."""

from __future__ import annotations

from mpbroadcast.states import State


class PublisherState(State):
    """Of the pipe of a publisher, in the broker."""

    READING = "read whenever the poller reports bytes", "NAPPING", "PAUSED", "DRAINING"
    NAPPING = "read after a nap, without the poller: it is busy", "READING", "PAUSED", "DRAINING"
    PAUSED = "not read: what was read is not all routed, as a backlog is full, or its turn is over", "READING", "DRAINING"
    DRAINING = "closed: what was read is still to be routed", "GONE"
    GONE = ("closed, and all of it routed",)


class PipeState(State):
    """Of the pipe of a subscription, in the broker."""

    UNOPENED = "any process may open it", "OPENING", "RESERVED", "GONE"
    RESERVED = "one process may open it, which had it open before the broker was restarted", "OPENING", "GONE"
    OPENING = "its descriptors are on their way to a process", "OPEN", "UNOPENED", "RESERVED", "GONE"
    OPEN = "it has a reader", "GONE"
    GONE = ("it is closed",)


class SubscriptionState(State):
    """Of a subscription, whatever its pipe is: a channel that was unsubscribed can still be opened and read."""

    ACCEPTING = "messages are routed to it", "ENDED"
    ENDED = ("no more messages are routed to it",)
