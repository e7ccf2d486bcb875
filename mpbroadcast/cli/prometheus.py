"""A snapshot of the broker in the text format of Prometheus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Final

from mpbroadcast import BrokerStats

_Row = dict[str, Any]
_BROKER: Final = (
    ("uptime_seconds", "gauge", "Seconds since the broker started.", "uptime"),
    ("published_messages_total", "counter", "Messages routed.", "published"),
    ("publishers", "gauge", "Handles that have published or can.", "publishers"),
    ("memory_bytes", "gauge", "Bytes in backlogs and in unread parts of publishers' rings.", "memory"),
    ("history_topics", "gauge", "Topics that have a history.", "history_topics"),
    ("history_forgotten_topics_total", "counter", "Topics whose history was dropped.", "history_forgotten"),
)
_SUBSCRIPTION: Final = (
    ("subscription_published_messages_total", "counter", "Messages published to the subscription.", "published"),
    ("subscription_delivered_messages_total", "counter", "Messages moved into its pipe.", "delivered"),
    ("subscription_missed_messages_total", "counter", "Messages dropped by its policy.", "missed"),
    ("subscription_waiting_messages", "gauge", "Messages in its backlog.", "waiting"),
    ("subscription_waiting_bytes", "gauge", "Bytes in its backlog.", "waiting_bytes"),
    ("subscription_capacity_bytes", "gauge", "Bytes that its backlog may have.", "capacity"),
    ("subscription_stalled_publishers", "gauge", "Publishers that wait for room in its backlog.", "stalls"),
    ("subscription_unread_bytes", "gauge", "Bytes in its pipe that its process has not read.", "unread"),
    ("subscription_open", "gauge", "1 if a process has opened it.", "is_open"),
)
_PUBLISHER: Final = (
    ("publisher_received_bytes_total", "counter", "Bytes received from the publisher.", "bytes"),
    ("publisher_waiting_bytes", "gauge", "Bytes received from it and not routed yet.", "waiting_bytes"),
    ("publisher_waited_seconds", "gauge", "Seconds for which a full backlog has blocked it.", "waited"),
)
_GROUP: Final = (
    ("group_members", "gauge", "Members of the group.", "members"),
    ("group_waiting_messages", "gauge", "Messages in its backlog.", "waiting"),
    ("group_delivered_messages_total", "counter", "Messages moved into its members' pipes.", "delivered"),
    ("group_lost_messages_total", "counter", "Messages that members had and did not finish.", "lost"),
    ("group_dropped_messages_total", "counter", "Messages dropped by its policy.", "dropped"),
)
_BRIDGE: Final = (
    ("bridge_up", "gauge", "1 if the bridge is up.", "up"),
    ("bridge_sent_messages_total", "counter", "Messages that the engine has acknowledged.", "sent"),
    ("bridge_received_messages_total", "counter", "Messages of other machines that were routed.", "received"),
    ("bridge_waiting_messages", "gauge", "Messages that wait for the engine.", "waiting"),
    ("bridge_waiting_bytes", "gauge", "Bytes of those.", "waiting_bytes"),
    ("bridge_capacity_bytes", "gauge", "Bytes that may wait for the engine.", "capacity"),
    ("bridge_dropped_messages_total", "counter", "Messages dropped before the engine had them.", "dropped"),
    ("bridge_missed_messages_total", "counter", "Messages of other machines that never came.", "missed"),
    ("bridge_duplicate_messages_total", "counter", "Messages that came again and were dropped.", "duplicates"),
    ("bridge_refused_entries_total", "counter", "Entries of the log that were not signed by a key.", "refused"),
    ("bridge_lag_entries", "gauge", "Entries of the log that were not read yet, about; absent if unknown.", "lag"),
)


def exposition(stats: BrokerStats) -> str:
    """Return the snapshot in Prometheus' text format."""
    whole = dataclasses.asdict(stats)
    groups = [{"group": name, **row} for name, row in whole["groups"].items()]
    bridges = [{"up": row["state"] == "up", **row} for row in whole["bridges"].values()]
    lines: list[str] = []
    for metrics, rows, labels in (
        (_BROKER, [whole], _no_labels),
        (_SUBSCRIPTION, whole["subscribers"], _subscription_labels),
        (_PUBLISHER, whole["publisher_rows"], _publisher_labels),
        (_GROUP, groups, _group_labels),
        (_BRIDGE, bridges, _bridge_labels),
    ):
        lines += _metrics(metrics, rows, labels)
    return "".join(f"{line}\n" for line in lines)


def _metrics(metrics: Iterable[tuple[str, str, str, str]], rows: list[_Row], labels: Callable[[_Row], str]) -> Iterable[str]:
    for name, kind, text, field in metrics:
        yield f"# HELP mpbroadcast_{name} {text}"
        yield f"# TYPE mpbroadcast_{name} {kind}"
        for row in rows:
            value = row[field]
            if value is None:
                continue
            number = len(value) if isinstance(value, tuple) else int(value) if isinstance(value, bool) else value
            yield f"mpbroadcast_{name}{labels(row)} {number}"


def _no_labels(row: _Row) -> str:
    return ""


def _subscription_labels(row: _Row) -> str:
    group = row["group"] or ""
    return _labels(
        id=row["id"],
        pid=row["pid"],
        topics=" ".join(row["topics"]),
        overflow=row["overflow"],
        group=group,
        name=row["name"] or "",
    )


def _publisher_labels(row: _Row) -> str:
    return _labels(id=row["id"], pid=row["pid"])


def _group_labels(row: _Row) -> str:
    return _labels(group=row["group"])


def _bridge_labels(row: _Row) -> str:
    return _labels(stream=row["stream"], url=row["url"], topics=" ".join(row["topics"]))


def _labels(**values: object) -> str:
    parts = []
    for name, value in values.items():
        escaped = str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        parts.append(f'{name}="{escaped}"')
    return f"{{{','.join(parts)}}}"
