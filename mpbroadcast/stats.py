"""A snapshot of the broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SubscriberStats:
    """One live subscription: always delivered + missed + waiting = published.

    ``published``, ``delivered``, ``missed`` and ``waiting`` are messages: routed to it, moved into its pipe, dropped, and in
    its backlog. ``capacity`` and ``waiting_bytes`` are bytes, with the fixed overhead of each message. ``pid`` is the process
    that has it open, else the one that has subscribed. ``stalls`` are the process IDs of those who wait for it to publish.
    """

    id: int
    pid: int
    topics: tuple[str, ...]
    overflow: str
    capacity: int
    published: int
    delivered: int
    missed: int
    waiting: int
    waiting_bytes: int
    stalls: tuple[int, ...]


@dataclass(frozen=True)
class BrokerStats:
    """The broker at one moment.

    Its process, its seconds of life, messages routed, publishers that have published or can, live subscriptions, and the bytes
    that are held in backlogs, those that several hold counted once, with what somebody still has to read of publishers' rings,
    in chunks of 256 KiB, and with what is subscribed to or asked beyond 256 KiB. Of many subscriptions, not all are of the same
    moment. Of the history: how many topics have one now, and how many were forgotten so far, because there were too many or
    they held too much.
    """

    pid: int
    uptime: float
    published: int
    publishers: int
    subscribers: tuple[SubscriberStats, ...]
    memory: int
    history_topics: int
    history_forgotten: int


def snapshot(reply: dict[str, Any]) -> BrokerStats:
    """What the broker has replied."""
    rows = tuple(
        SubscriberStats(**{**row, "topics": tuple(row["topics"]), "stalls": tuple(row["stalls"])})
        for row in reply.pop("subscribers")
    )
    return BrokerStats(subscribers=rows, **reply)
