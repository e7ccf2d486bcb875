"""The answer to ``stats()``. A new field is added here, and in ``mpbroadcast/stats.py``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from typing import Any, Final

from mpbroadcast.broker.members import Subscription
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
    rest = {
        "pid": os.getpid(),
        "uptime": time.monotonic() - broker.started,
        "published": broker.traffic.routing.routed,
        "publishers": len(broker.traffic.publishers),
        "memory": (yield from memory(broker)),
        "history_topics": history.topics if history is not None else 0,
        "history_forgotten": history.forgotten if history is not None else 0,
    }
    return [*parts, b"], ", json.dumps(rest)[1:].encode()]


def memory(broker: Broker) -> Generator[None, None, int]:
    """Return the bytes of messages that are here, of what is still to be read of publishers' rings, and of what is requested.

    Messages are counted in parts, as publishers that are blocked may have many messages here.
    """
    parked, room = 0, _PART
    for publisher in list(broker.traffic.publishers.values()):
        parked += publisher.held
        room -= 1 + len(publisher.parked)
        if room < 0:
            room = _PART
            yield
    return parked + broker.traffic.memory.held + broker.registry.budget.memory + broker.peers.asked


def _row(broker: Broker, subscription: Subscription) -> dict[str, Any]:
    backlog = subscription.backlog
    return {
        "id": subscription.id,
        "pid": subscription.pid,
        "topics": broker.router.topics(subscription),
        "overflow": subscription.policy,
        "capacity": backlog.capacity,
        "published": backlog.published,
        "delivered": backlog.delivered,
        "missed": backlog.missed,
        "waiting": backlog.waiting,
        "waiting_bytes": backlog.waiting_charge,
        "stalls": [publisher.pid for publisher in subscription.waiters],
    }
