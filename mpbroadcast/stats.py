"""A snapshot of the broker."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BrokerStats", "SubscriberStats"]


@dataclass(frozen=True)
class SubscriberStats:
    """One live subscription: always delivered + missed + waiting = published.

    ``published``, ``delivered``, ``missed`` and ``waiting`` are messages: routed to it, moved into its pipe, dropped, and in
    its backlog. ``capacity`` and ``waiting_bytes`` are bytes, with the fixed overhead of each message. ``pid`` is the process
    that has it open, else the one that has subscribed.
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


@dataclass(frozen=True)
class BrokerStats:
    """The broker at one moment: its process, its seconds of life, messages routed, publishers that have published or can,
    live subscriptions, and the bytes that are held in backlogs."""

    pid: int
    uptime: float
    published: int
    publishers: int
    subscribers: tuple[SubscriberStats, ...]
    memory: int
