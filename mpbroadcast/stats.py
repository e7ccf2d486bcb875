"""A snapshot of the broker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SubscriberStats:
    """One live subscription: always delivered + missed + waiting = published.

    ``published``, ``delivered``, ``missed`` and ``waiting`` are messages: routed to it, moved into its pipe, dropped, and in
    its backlog. ``capacity`` and ``waiting_bytes`` are bytes, with the fixed overhead of each message. ``pid`` is the process
    that has it open (``is_open``), else the one that has subscribed. ``stalls`` are the process IDs of publishers that wait for
    it. ``group`` is the name of its group, or ``None``. ``unread`` is the number of bytes in its pipe that its process has not
    read: 0 once it has handed out all that is there. ``name`` is the one that it was given, or ``None``.
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
    unread: int
    name: str | None


@dataclass(frozen=True)
class PublisherStats:
    """One handle that has published or can. ``pid`` is its process, ``bytes`` what the broker has received from it.

    ``waiting_bytes`` are messages that are received and not routed yet. ``waits_for`` is the id of the subscription, the
    name of the group, or the stream of the bridge, whose full backlog blocks it, and ``waited`` the seconds since it has;
    ``None`` and 0 if none.
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
class BridgeStats:
    """One bridge, by its stream: always sent + waiting + dropped is what was published to its topics on this bus.

    ``url`` has no password; ``pid`` is the process at work, or ``None``; ``state`` is ``"up"``, ``"connecting"`` or ``"down"``,
    and ``error`` the last one, or ``None``. ``capacity`` is the outbox's, in bytes. Out, in messages: ``sent`` are in the log,
    ``waiting`` are not (``waiting_bytes``, with the fixed overhead of each), ``dropped`` by the policy. In, in messages:
    ``received`` were routed, ``missed`` never came, ``duplicates`` came again and were dropped. ``refused`` entries were not
    signed. ``lag`` entries of the log are not read yet, about; ``None``: unknown.
    """

    stream: str
    url: str
    pid: int | None
    state: str
    error: str | None
    topics: tuple[str, ...]
    overflow: str
    capacity: int
    sent: int
    waiting: int
    waiting_bytes: int
    dropped: int
    received: int
    missed: int
    duplicates: int
    refused: int
    lag: int | None


@dataclass(frozen=True)
class BrokerStats:
    """The broker at one moment.

    ``pid`` is its process, ``uptime`` its seconds of life, ``published`` the messages routed, ``publishers`` the handles that
    have published or can, each in ``publisher_rows``, ``subscribers`` the live subscriptions, ``groups`` theirs by name, and
    ``bridges`` by stream; of many, not all are of the same moment.

    ``memory`` is in bytes: backlogs (what several hold counts once, but a part of it that a policy has cut counts anew), the
    unread parts of publishers' rings in chunks of 256 KiB, and subscriptions, topics and unfinished requests beyond 256 KiB.
    ``history_topics`` have a history now, and ``history_forgotten`` were forgotten so far, because there were too many or they
    held too much.
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
    bridges: dict[str, BridgeStats] = field(default_factory=dict)


def snapshot(reply: dict[str, Any]) -> BrokerStats:
    """Return the snapshot in a reply of the broker."""
    rows = tuple(
        SubscriberStats(**{**row, "topics": tuple(row["topics"]), "stalls": tuple(row["stalls"])})
        for row in reply.pop("subscribers")
    )
    groups = {name: GroupStats(**fields) for name, fields in reply.pop("groups").items()}
    publishers = tuple(PublisherStats(**row) for row in reply.pop("publisher_rows"))
    bridges = {stream: BridgeStats(**{**row, "topics": tuple(row["topics"])}) for stream, row in reply.pop("bridges").items()}
    return BrokerStats(subscribers=rows, groups=groups, publisher_rows=publishers, bridges=bridges, **reply)
