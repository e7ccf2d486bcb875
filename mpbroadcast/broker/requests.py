"""The requests that the broker answers over a control connection: a handler for each.

Those that make a subscription are in ``subscription_requests.py``, those of bridges in ``bridge_requests.py``, the
checks of fields in ``request_fields.py``.

Every value comes from another process: none is trusted. A handler replies, now or later, or raises :class:`Refused`. One that
takes long is a generator: between two of its steps the broker has a round, so what it has looked up may be gone after a
``yield``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from mpbroadcast.broker import bridge_requests
from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.limits import MOST_CONNECTIONS, OverBudget
from mpbroadcast.broker.core.linger import Linger
from mpbroadcast.broker.members import Group, Subscription
from mpbroadcast.broker.request_fields import (
    Refused,
    checked,
    find_publisher,
    find_subscription,
    in_use,
    integer,
    own_publisher,
    refuse_when_stopping,
    session_of,
    until_routed,
)
from mpbroadcast.broker.server import WAIT, Broker, Parts
from mpbroadcast.broker.statistics import encoded_stats
from mpbroadcast.broker.subscription_requests import add_topics, drop_topics, history, subscribe
from mpbroadcast.protocol.control import frame_of
from mpbroadcast.validation import encode_topic

# That are replied. From Python 3.12 on, a context manager of contextlib would leave each in a cycle, for the garbage collector.
_ERRORS: Final = (OverBudget, Refused, OSError)


def answer(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    """Do what is requested, and reply to it, now or later."""
    do = message.get("do")
    handler = _HANDLERS.get(do) if isinstance(do, str) else None
    try:
        if handler is None:
            raise Refused("value", f"the broker does not know how to {do!r}: is it of another version?")
        if connection.peer.connections > MOST_CONNECTIONS:
            text = f"this process has more than {MOST_CONNECTIONS} connections to the broker: use fewer handles"
            raise Refused("value", text)
        parts = handler(broker, connection, message)
        if parts is not None:
            broker.do(_while_open(connection, parts))
    except _ERRORS as error:
        _reply_error(connection, error)


def _while_open(connection: ControlConnection, parts: Parts) -> Parts:
    """Do what takes long, unless the connection is closed meanwhile."""
    try:
        for waits in parts:
            yield waits
            if connection.is_closed:
                break
    except _ERRORS as error:
        _reply_error(connection, error)


def _reply_error(connection: ControlConnection, error: OverBudget | Refused | OSError) -> None:
    if isinstance(error, OverBudget):
        connection.reply({"error": "value", "text": str(error)})
    elif isinstance(error, Refused):
        connection.reply({"error": error.kind, "text": str(error), **error.more})
    else:
        no_descriptors = error.errno in (errno.EMFILE, errno.ENFILE)
        text = "the broker has no descriptor left for another pipe" if no_descriptors else str(error)
        connection.reply({"error": "system", "text": text, "errno": error.errno})


def _attach(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    if connection.session is not None:
        raise Refused("value", "this connection is a session's already")
    session = broker.registry.new_session(connection)
    if broker.linger is not None:
        broker.linger.begin_anew()
    identity, generation, journal = broker.succession
    connection.reply({"session": session.id, "broker": identity, "number": generation, "restarts": journal is not None})


def _detach(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    session, connection.session = connection.session, None
    if message.get("end"):
        broker.linger = Linger(0.0)
    if session is not None:
        broker.registry.end_session(session, clean=True)
    connection.no_reply()


def _publisher(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    refuse_when_stopping(broker)
    session, reader = session_of(broker, connection, message), None
    if message.get("reader") is not None:
        reader = bridge_requests.find_reader(broker, connection, message)
        if reader is None or reader.outbox.reader is not reader:
            raise Refused("lost", "this session of a bridge is not at work any more")
    publisher, descriptor = broker.traffic.intake.add(broker.registry.new_id(), session)
    if reader is not None:
        broker.bridges.add_publisher(reader, publisher)
    connection.reply({"publisher": publisher.id}, descriptor)


def _fd_socket(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    publisher = own_publisher(broker, connection, message)
    if publisher is None or publisher.is_closed:  # what it shared now, nothing would release
        raise Refused("lost", "the broker does not know this publisher any more")
    connection.reply({"fd_socket": True}, broker.traffic.memory.add(publisher))


def _retire(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    publisher = own_publisher(broker, connection, message)
    if publisher is not None:
        yield from broker.traffic.intake.finish(publisher)
    connection.reply({})


def _flush(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Parts:
    publisher = find_publisher(broker, message)
    delivered, now = bool(message.get("delivered")), bool(message.get("now"))
    if publisher is None or (now and not publisher.all_routed):
        connection.reply({"done": publisher is None})
        return
    routed: list[dict[Subscription, int]] = []  # once it is: what has entered each backlog by then
    publisher.after_written(lambda: routed.append({**publisher.last_in} if delivered else {}))
    while not routed:
        yield WAIT
    (entered,) = routed
    while entered:  # one that waits on is enough: there may be thousands
        subscription, position = entered.popitem()
        is_there = subscription.id in broker.registry.subscriptions
        if isinstance(subscription, Group):
            is_there = bool(subscription.shares.members)
            if subscription.backlog.departed >= position:  # what it has given out may not be in the members' pipes yet
                entered.update((member, member.backlog.entered) for member in subscription.shares.members)
        if subscription.backlog.departed < position and is_there:
            entered[subscription] = position
            if now:
                break
            yield WAIT
    connection.reply({"done": not entered})


def _open(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    subscription = find_subscription(broker, connection, message)
    opening = broker.registry.openings.get(subscription)
    if opening is not None and opening.peer is connection.peer:
        broker.registry.unopen(subscription)  # it was interrupted, and begins again
        opening = None
    if opening is not None or subscription.is_open:
        raise in_use(subscription.pid if opening is None else opening.peer.pid)
    if subscription.owner not in (None, connection.peer.pid):
        raise in_use(subscription.pid)
    session_of(broker, connection, message)
    ends = broker.registry.begin_opening(subscription, connection, shared=bool(message.get("shared")))
    flags = {
        "fd_socket": subscription.window is not None,
        "reports": subscription.group is not None,
        "newest": subscription.backlog.keeps_newest_only,
    }
    connection.reply({"token": subscription.pipe.token, **flags}, *ends)


def _opened(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    subscription = find_subscription(broker, connection, message)
    is_there = message.get("token") == subscription.pipe.token and subscription.pipe.fd >= 0
    if is_there and not subscription.is_open:
        session = session_of(broker, connection, message)
        is_last = broker.shutdown is not None and session.peer is broker.shutdown.by
        try:
            broker.registry.confirm_open(subscription, session, is_abandoned=is_last)
        except BrokenPipeError:  # the process has closed its end meanwhile
            broker.registry.unopen(subscription)
            is_there = False
    connection.reply({"opened": is_there})  # else what was begun has been taken back: begin again


def _newest(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    """Reply how many messages wait for a reader that is to get the newest one only; the newest of them is written at once."""
    subscription = find_subscription(broker, connection, message)
    waiting = 0
    if subscription.owner == connection.peer.pid and message.get("token") == subscription.pipe.token:
        waiting = subscription.backlog.waiting
        broker.traffic.mark(subscription)
    connection.reply({"waiting": waiting})


def _unsubscribe(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    subscription = broker.registry.subscriptions.get(integer(message, "subscription"))
    if subscription is not None:
        session_of(broker, connection, message)
        yield from broker.traffic.take_in()
        broker.registry.unsubscribe(subscription)
    connection.reply({})


def _close(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    """Remove a channel that was closed or collected: it cannot be opened, or received from, any more."""
    id = integer(message, "subscription")
    subscription = broker.registry.subscriptions.get(id)
    if subscription is None:
        broker.registry.dropped_early.append(id)
    elif subscription.owner in (None, connection.peer.pid):
        broker.registry.close(subscription, "its channel was closed or collected")
    if message["do"] == "close":
        connection.reply({})
    else:
        connection.no_reply()


def _wait(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Parts:
    count = integer(message, "count")
    topic = message.get("topic")
    encoded = None if topic is None else checked(encode_topic, topic)
    yield from until_routed(find_publisher(broker, message))
    while (there := (yield from broker.registry.counting(encoded))) < count:
        if message.get("now"):
            break
        yield WAIT
    connection.reply({"done": there >= count, "there": there})


def _stats(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    parts = yield from encoded_stats(broker)
    connection.reply_encoded(frame_of(*parts))


def _settle(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    is_all = yield from broker.traffic.take_in()
    connection.reply({"done": is_all})


def _probe(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    """Probe whether the reader of a channel asks for more, once it has read everything."""
    subscription = broker.registry.subscriptions.get(integer(message, "subscription"))
    size = 0
    if subscription is not None and subscription.backlog.is_empty and not subscription.backlog.ended:
        size = subscription.pipe.write_probe()
        subscription.refresh()
    connection.reply({"written": size > 0, "published": 0 if subscription is None else subscription.backlog.published})


def _stop(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    timeout = message.get("timeout")
    if timeout is not None and (type(timeout) not in (int, float) or not 0 <= timeout <= _FOREVER):
        raise Refused("value", f"timeout must be 0 or more seconds, not {timeout!r}")
    seconds = _FOREVER if timeout is None else float(timeout)
    shutdown = broker.stop(seconds, connection.peer)
    shutdown.shorten(seconds)  # requested again: after an interrupted close(), the next one may have less time
    connection.reply({"pid": os.getpid(), "left": shutdown.time_left})


_FOREVER: Final = 1e9
_HANDLERS: Final[dict[str, Callable[[Broker, ControlConnection, dict[str, Any]], Parts | None]]] = {
    "attach": _attach,
    "detach": _detach,
    "publisher": _publisher,
    "fd_socket": _fd_socket,
    "retire": _retire,
    "flush": _flush,
    "subscribe": subscribe,
    "history": history,
    "add topics": add_topics,
    "drop topics": drop_topics,
    "open": _open,
    "opened": _opened,
    "newest": _newest,
    "unsubscribe": _unsubscribe,
    "close": _close,
    "drop": _close,
    "wait": _wait,
    "stats": _stats,
    "settle": _settle,
    "probe": _probe,
    "bridge": bridge_requests.bridge,
    "bridge end": bridge_requests.end,
    "bridge report": bridge_requests.report,
    "bridge flushed": bridge_requests.flushed,
    "bridge forget": bridge_requests.forget,
    "stop": _stop,
}
