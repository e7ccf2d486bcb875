"""The answer to ``stats()``. A new field is added here, and in ``mpbroadcast/stats.py``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from typing import Any, Final

from mpbroadcast.broker.bridges import Bridge
from mpbroadcast.broker.members import Group, Publisher, Subscription
from mpbroadcast.broker.server import Broker

_PART: Final = 1 << 15  # characters to encode at once, or parked items to count: some milliseconds


def encoded_stats(broker: Broker) -> Generator[None, None, list[bytes]]:
    """Return the statistics as JSON, made in parts: the broker has a round between two of them."""
    parts = [b'{"subscribers": [']
    rows: list[str] = []
    room = _PART
    for subscription in list(broker.registry.subscriptions.values()):
        subscription.refresh()  # what its reader has read does not count as memory
        if subscription.is_live:
            rows.append(json.dumps(_row(broker, subscription)))
            room -= len(rows[-1])
        if room < 0:
            room = _PART
            parts.append(", ".join(rows).encode())
            rows = [""]  # so that the next part begins with a comma
            yield
    parts.append(", ".join(rows if rows != [""] else ()).encode())
    history = broker.traffic.routing.history
    parts.append(b'], "publisher_rows": [')
    held = yield from _add_publishers(broker, parts)
    rest = {
        "pid": os.getpid(),
        "uptime": time.monotonic() - broker.started,
        "published": broker.traffic.routing.routed,
        "publishers": len(broker.traffic.publishers),
        "memory": held + _held_elsewhere(broker),
        "history_topics": history.topics if history is not None else 0,
        "groups": {group.name: _group_row(group) for group in broker.registry.groups},
        "bridges": {bridge.stream: _bridge_row(bridge) for bridge in broker.bridges},
        "history_forgotten": history.forgotten if history is not None else 0,
    }
    return [*parts, b"], ", json.dumps(rest)[1:].encode()]


def memory(broker: Broker) -> Generator[None, None, int]:
    """Return the bytes of messages that are here, of what is still to be read of publishers' rings, and of what is asked."""
    return (yield from _add_publishers(broker, [])) + _held_elsewhere(broker)


def _held_elsewhere(broker: Broker) -> int:
    return broker.traffic.memory.held + broker.registry.budget.memory + broker.peers.asked


def _add_publishers(broker: Broker, parts: list[bytes]) -> Generator[None, None, int]:
    """Append the rows of all publishers, as JSON. Return the bytes that are received from them and not routed.

    Messages are counted in parts, as publishers that are blocked may have many messages here.
    """
    parked, room, comma = 0, _PART, b""
    for publisher in list(broker.traffic.publishers.values()):
        row = _publisher_row(publisher)
        parts.append(comma + json.dumps(row).encode())
        comma = b", "
        parked += row["waiting_bytes"]
        room -= len(parts[-1]) + len(publisher.parked)
        if room < 0:
            room = _PART
            yield
    return parked


def _publisher_row(publisher: Publisher) -> dict[str, Any]:
    blocked = publisher.blocked
    waits_for = None if blocked is None else blocked.name or blocked.id
    return {
        "id": publisher.id,
        "pid": publisher.pid,
        "bytes": publisher.pipe.position + publisher.referred,
        "waiting_bytes": publisher.held,
        "waits_for": waits_for,
        "waited": 0.0 if blocked is None else time.monotonic() - publisher.blocked_since,
    }


def _row(broker: Broker, subscription: Subscription) -> dict[str, Any]:
    backlog, is_member = subscription.backlog, subscription.group is not None
    return {
        "id": subscription.id,
        "name": subscription.label,
        "pid": subscription.pid,
        "topics": broker.router.topics(subscription.target),
        "overflow": subscription.target.policy,
        "capacity": backlog.capacity,
        "published": backlog.published,
        "delivered": backlog.published if is_member else backlog.delivered,  # a part of the last one may not be in its pipe yet
        "missed": backlog.missed,
        "waiting": 0 if is_member else backlog.waiting,
        "waiting_bytes": 0 if is_member else backlog.waiting_charge,
        "stalls": [publisher.pid for publisher in subscription.target.waiters],
        "unread": subscription.pipe.unread() if subscription.is_open else 0,
        "is_open": subscription.is_open,
        "group": subscription.target.name if isinstance(subscription.target, Group) else None,
    }


def _bridge_row(bridge: Bridge) -> dict[str, Any]:
    outbox, inbound, outbound = bridge.outbox, bridge.inbound, bridge.outbox.outbound
    out = {"sent": outbound.sent, "waiting": outbound.waiting, "waiting_bytes": outbound.waiting_charge}
    into = {"received": inbound.received, "missed": inbound.missed, "duplicates": inbound.duplicates}
    return {
        "stream": bridge.stream,
        "pid": None if outbox.reader is None else outbox.reader.pid,
        "topics": bridge.topics,
        "overflow": outbox.policy,
        "capacity": outbox.backlog.capacity,
        "dropped": outbox.backlog.missed,
        **out,
        **into,
        **bridge.reported,
    }


def _group_row(group: Group) -> dict[str, int]:
    backlog, shares = group.backlog, group.shares
    figures = {"delivered": backlog.delivered, "lost": shares.lost, "dropped": backlog.missed}
    return {"members": len(shares), "waiting": backlog.waiting, **figures}
