"""The fields of requests, each of which is checked: none is trusted, as it comes from another process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.members import Publisher, Session, Subscription
from mpbroadcast.broker.server import WAIT, Broker, Parts


class Refused(Exception):
    def __init__(self, kind: str, text: str, **more: Any) -> None:
        super().__init__(text)
        self.kind = kind
        self.more = more


def refuse_when_stopping(broker: Broker) -> None:
    if broker.shutdown is not None:
        raise Refused("lost", "the broker is being closed: nothing more can be published or subscribed to")


def integer(message: dict[str, Any], name: str) -> int:
    value = message.get(name)
    if type(value) is not int:
        raise Refused("value", f"{name} must be a whole number, not {value!r}")
    return value


def session_of(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Session:
    session = broker.registry.sessions.get(integer(message, "session"))
    if session is None or session.peer.pid != connection.peer.pid:
        raise Refused(
            "unknown",
            "the broker does not know this process any more: connect() again",
        )
    return session


def find_publisher(broker: Broker, message: dict[str, Any]) -> Publisher | None:
    return broker.traffic.publishers.get(integer(message, "publisher")) if message.get("publisher") is not None else None


def until_routed(publisher: Publisher | None) -> Parts:
    """Wait until all that a publisher has written until now is routed."""
    routed: list[None] = []
    if publisher is not None:
        publisher.after_written(partial(routed.append, None))
        while not routed:
            yield WAIT


def own_publisher(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Publisher | None:
    publisher = find_publisher(broker, message)
    return publisher if publisher is not None and publisher.pid == connection.peer.pid else None


def find_subscription(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Subscription:
    id = integer(message, "subscription")
    subscription = broker.registry.subscriptions.get(id)
    if subscription is None:
        owner = broker.registry.former_owners.get(id, connection.peer.pid)
        if owner != connection.peer.pid:
            raise in_use(owner)
        raise Refused("closed", "this channel was unsubscribed or closed, or its process has ended: subscribe again")
    return subscription


def in_use(pid: int) -> Refused:
    process = f"process {pid}" if pid > 0 else "a process of another PID namespace"
    text = f"{process} has opened this channel, and only that one can receive from it: subscribe here for another"
    return Refused("in use", text, pid=pid)


def checked(check: Callable[..., Any], *args: object) -> Any:
    try:
        return check(*args)
    except (TypeError, ValueError) as error:
        raise Refused("value", str(error)) from None
