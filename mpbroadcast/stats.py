"""A snapshot of the broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SubscriberStats:
    """One live subscription: always delivered + missed + waiting = published.

    ``published``, ``delivered``, ``missed`` and ``waiting`` are messages: routed to it, moved into its pipe, dropped, and in
    its backlog. ``capacity`` and ``waiting_bytes`` are bytes, with the fixed overhead of each message. ``pid`` is the process
    that has it open (``is_open``), else the one that has subscribed. ``stalls`` are the process IDs of publishers that wait for
    it. ``group`` is the name of its group, or ``None``.
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
    is_open: bool
    group: str | None


@dataclass(frozen=True)
class PublisherStats:
    """One handle that has published or can. ``pid`` is its process, ``bytes`` what the broker has received from it.

    ``waiting_bytes`` are messages that are received and not routed yet. ``waits_for`` is the id of the subscription, or
    the name of the group, whose full backlog blocks it, and ``waited`` the seconds since it has; ``None`` and 0 if none.
    """

    id: int
    pid: int
    bytes: int
    waiting_bytes: int
    waits_for: int | str | None
    waited: float


@dataclass(frozen=True)
class GroupStats:
    """One group (``subscribe(group=...)``): delivered + waiting + dropped is what was published to it.

    ``members`` are its subscriptions. The others are messages: ``waiting`` in its backlog, ``delivered`` into members' pipes,
    ``dropped`` by its policy. ``lost`` are those of the delivered ones that a member had not finished when it died, or not
    received when it was closed.
    """

    members: int
    waiting: int
    delivered: int
    lost: int
    dropped: int


@dataclass(frozen=True)
class BrokerStats:
    """The broker at one moment.

    ``pid`` is its process, ``uptime`` its seconds of life, ``published`` the messages routed, ``publishers`` the handles that
    have published or can, each in ``publisher_rows``, ``subscribers`` the live subscriptions, and ``groups`` theirs by name; of
    many, not all are of the same moment.

    ``memory`` is in bytes: backlogs (what several hold counts once), the unread parts of publishers' rings in chunks of 256
    KiB, and subscriptions, topics and unfinished requests beyond 256 KiB. ``history_topics`` have a history now, and
    ``history_forgotten`` were forgotten so far, because there were too many or they held too much.
    """

    pid: int
    uptime: float
    published: int
    publishers: int
    subscribers: tuple[SubscriberStats, ...]
    memory: int
    history_topics: int
    history_forgotten: int
    groups: dict[str, GroupStats]
    publisher_rows: tuple[PublisherStats, ...]


def snapshot(reply: dict[str, Any]) -> BrokerStats:
    """Return the snapshot in a reply of the broker."""
    rows = tuple(
        SubscriberStats(**{**row, "topics": tuple(row["topics"]), "stalls": tuple(row["stalls"])})
        for row in reply.pop("subscribers")
    )
    groups = {name: GroupStats(**fields) for name, fields in reply.pop("groups").items()}
    publishers = tuple(PublisherStats(**row) for row in reply.pop("publisher_rows"))
    return BrokerStats(subscribers=rows, groups=groups, publisher_rows=publishers, **reply)
