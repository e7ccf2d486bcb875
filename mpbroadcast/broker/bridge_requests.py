"""Requests of bridges and their sessions: handlers for ``requests.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from mpbroadcast.broker.bridges import Bridge, Candidate
from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.limits import SESSION, Cost
from mpbroadcast.broker.outbox import BridgeReader
from mpbroadcast.broker.request_fields import (
    Refused,
    checked,
    find_publisher,
    integer,
    refuse_when_stopping,
    session_of,
    until_routed,
)
from mpbroadcast.broker.server import Broker, Parts
from mpbroadcast.broker.subscription_requests import prepare
from mpbroadcast.validation import check_count, check_outbox, check_stream

_LONGEST: Final = 1 << 12  # characters of what a session reports
_MOST: Final = 1 << 62


def bridge(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    """Make a bridge, or find that it is there as it is wanted; with ``turn``, reply when the session is at work."""
    stream = checked(check_stream, message.get("stream"))
    topics = message.get("topics")
    if not isinstance(topics, list) or len(topics) > SESSION.topics or {*map(type, topics)} - {str}:
        raise Refused("value", "topics must be a list of topics and patterns")
    capacity = checked(check_count, message.get("capacity"), "capacity", 1)
    policy = checked(check_outbox, message.get("overflow"))
    topics = [*dict.fromkeys(topics)]
    cost, _matchers = (yield from prepare(session_of(broker, connection, message), topics, 1)) if topics else (Cost(1), [])
    refuse_when_stopping(broker)
    session = session_of(broker, connection, message)
    made = checked(broker.bridges.declare, stream, topics, cost, capacity, policy)
    if message.get("turn"):
        broker.bridges.stand_by(made, Candidate(connection, session, bool(message.get("shared"))))
    else:
        connection.reply({})


def end(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    """End a session, behind what it has handed on; with ``forget``, all that is kept of its stream, if no other stands by."""
    found, reader = _find(broker, message), find_reader(broker, connection, message)
    if reader is not None:
        if reader.publisher is not None:
            yield from broker.traffic.intake.finish(reader.publisher)
            broker.traffic.run_until_idle()
        broker.registry.remove(reader, "its session has ended")
        broker.bridges.work_off()
    if found is not None and message.get("forget") and _is_idle(found):
        broker.bridges.forget(found)
    connection.reply({})


def report(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    reader, found = find_reader(broker, connection, message), _find(broker, message)
    url, state, error, lag = (message.get(name) for name in ("url", "state", "error", "lag"))
    refused = integer(message, "refused")
    is_right = type(url) is str and state in ("up", "connecting") and type(error) in (str, type(None))
    if not is_right or not 0 <= refused < _MOST or not (lag is None or (type(lag) is int and 0 <= lag < _MOST)):
        raise Refused("value", "this is no report of a bridge")
    if reader is not None and found is not None and found.outbox.reader is reader:
        error = None if error is None else error[:_LONGEST]
        reported = {"url": str(url)[:_LONGEST], "state": state, "error": error, "refused": refused, "lag": lag}
        broker.bridges.report(found, reported)
    connection.reply({})


def flushed(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Parts:
    """Reply with the last position so far, and the one up to which all is in the log or was dropped."""
    yield from until_routed(find_publisher(broker, message))
    found = _find(broker, message)
    outbound = None if found is None else found.outbox.outbound
    connection.reply({"positions": None if outbound is None else [outbound.target, outbound.settled]})


def forget(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    found = _find(broker, message)
    if found is not None:
        if not _is_idle(found):
            raise Refused("value", f"bridge {found.stream!r} is at work: close it first")
        broker.bridges.forget(found)
    connection.reply({"done": found is not None})


def find_reader(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> BridgeReader | None:
    """Return the pipe of the session that the request is about, if it is one of this process."""
    found = broker.registry.subscriptions.get(integer(message, "reader"))
    return found if isinstance(found, BridgeReader) and found.pid == connection.peer.pid else None


def _find(broker: Broker, message: dict[str, Any]) -> Bridge | None:
    return broker.bridges.find(checked(check_stream, message.get("stream")))


def _is_idle(bridge: Bridge) -> bool:
    return bridge.outbox.reader is None and all(one.connection.is_closed for one in bridge.standing_by)
