"""The requests that the broker answers over a control connection: a handler for each.

Every value comes from another process: none is trusted. A handler replies, now or later, or raises :class:`_Refused`. One that
takes long is a generator: between two of its steps the broker has a round, so what it has looked up may be gone after a
``yield``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterator
from typing import Any, Final

from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.limits import MOST_CONNECTIONS, SESSION, Cost, OverBudget, cost_of
from mpbroadcast.broker.core.patterns import Matcher, is_pattern, matcher
from mpbroadcast.broker.members import Publisher, Session, Subscription
from mpbroadcast.broker.server import WAIT, Broker, Parts
from mpbroadcast.broker.statistics import encoded_stats
from mpbroadcast.protocol.control import frame_of
from mpbroadcast.validation import check_count, check_overflow, encode_topic


class _Refused(Exception):
    def __init__(self, kind: str, text: str, **more: Any) -> None:
        super().__init__(text)
        self.kind = kind
        self.more = more


# That are replied. From Python 3.12 on, a context manager of contextlib would leave each in a cycle, for the garbage collector.
_ERRORS: Final = (OverBudget, _Refused, OSError)


def answer(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    """Do what is requested, and reply to it, now or later."""
    do = message.get("do")
    handler = _HANDLERS.get(do) if isinstance(do, str) else None
    try:
        if handler is None:
            raise _Refused("value", f"the broker does not know how to {do!r}: is it of another version?")
        if connection.peer.connections > MOST_CONNECTIONS:
            text = f"this process has more than {MOST_CONNECTIONS} connections to the broker: use fewer handles"
            raise _Refused("value", text)
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


def _reply_error(connection: ControlConnection, error: OverBudget | _Refused | OSError) -> None:
    if isinstance(error, OverBudget):
        connection.reply({"error": "value", "text": str(error)})
    elif isinstance(error, _Refused):
        connection.reply({"error": error.kind, "text": str(error), **error.more})
    else:
        no_descriptors = error.errno in (errno.EMFILE, errno.ENFILE)
        text = "the broker has no descriptor left for another pipe" if no_descriptors else str(error)
        connection.reply({"error": "system", "text": text, "errno": error.errno})


def _attach(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    if connection.session is not None:
        raise _Refused("value", "this connection is a session's already")
    session = broker.registry.new_session(connection)
    identity, generation, journal = broker.succession
    connection.reply({"session": session.id, "broker": identity, "number": generation, "restarts": journal is not None})


def _detach(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    session, connection.session = connection.session, None
    if message.get("end"):
        broker.ends_unneeded = True
    if session is not None:
        broker.registry.end_session(session, clean=True)
    connection.no_reply()


def _publisher(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    _refuse_when_stopping(broker)
    publisher, descriptor = broker.traffic.intake.add(broker.registry.new_id(), _session(broker, connection, message))
    connection.reply({"publisher": publisher.id}, descriptor)


def _fd_socket(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    publisher = _own_publisher(broker, connection, message)
    if publisher is None or publisher.is_closed:  # what it shared now, nothing would release
        raise _Refused("lost", "the broker does not know this publisher any more")
    connection.reply({"fd_socket": True}, broker.traffic.memory.add(publisher))


def _retire(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    publisher = _own_publisher(broker, connection, message)
    if publisher is not None:
        yield from broker.traffic.intake.finish(publisher)
    connection.reply({})


def _flush(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Parts:
    publisher = _find_publisher(broker, message)
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
        if subscription.backlog.departed < position and subscription.id in broker.registry.subscriptions:
            entered[subscription] = position
            if now:
                break
            yield WAIT
    connection.reply({"done": not entered})


def _subscribe(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    topics = [*dict.fromkeys(_topics(message))]
    cost, _matchers = yield from _prepare(_session(broker, connection, message), topics, 1)
    capacity = _checked(check_count, message.get("capacity"), "capacity", 1)
    policy = _checked(check_overflow, message.get("overflow"))
    replay = _checked(check_count, message.get("replay"), "replay", 0)
    registry, history = broker.registry, broker.traffic.routing.history
    if replay and history is None:
        raise _Refused("value", "replay needs a broker that keeps a history: start_broadcaster(history=...)")
    if replay and history is not None:
        yield from broker.traffic.take_in()  # so that it is in the history
        published = yield from history.matching(topics)
    _refuse_when_stopping(broker)
    session = _session(broker, connection, message)
    id = _integer(message, "subscription")
    if id in registry.dropped_early:
        raise _Refused("closed", "this subscription was dropped before it was made")
    known = registry.subscriptions.get(id)
    if known is not None and known.session.peer.pid == connection.peer.pid:  # the reply was lost, perhaps with the broker
        there = {*registry.topics(known)}
        missing = [topic for topic in topics if topic not in there]
        if missing:  # of a request in parts that was cut off; or others, so they cost again
            registry.spend(known, cost._replace(subscriptions=0))
        yield from _route(broker, known, missing)
    elif known is not None or id in registry.to_remove or not 0 < id <= _MOST:
        raise _Refused("value", f"subscription must be a new ID of 48 bits, not {id}")
    elif replay:
        subscription = registry.add_subscription(id, session, capacity, policy, cost)
        registry.route(subscription, topics)  # at once, so that nothing is missing behind what is replayed
        is_done = False
        try:
            yield from broker.traffic.routing.replay(subscription, published, replay)
            is_done = True
        finally:
            if not is_done:  # the connection has ended in between: requested again, it must be whole
                registry.close(subscription, "its request was cut off")
    else:
        subscription = registry.add_subscription(id, session, capacity, policy, cost)
        publisher = _find_publisher(broker, message)
        if publisher is not None:
            registry.begin_behind(publisher, subscription)
        yield from _route(broker, subscription, topics)
    connection.reply({})


def _route(broker: Broker, subscription: Subscription, topics: list[str]) -> Iterator[None]:
    """Route these topics to it, in parts: of other handles it may get messages that were published a moment before."""
    for start in range(0, len(topics), _TOPICS):
        if start:
            yield
        _check_live(subscription)
        end = start + _TOPICS
        broker.registry.route(subscription, topics[start:end], is_last=end >= len(topics))


def _add_topics(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    subscription = _find_subscription(broker, connection, message)
    there = {*broker.registry.topics(subscription)}
    topics = [topic for topic in dict.fromkeys(_topics(message)) if topic not in there]
    cost, _matchers = yield from _prepare(subscription.session, topics, 0)
    subscription = _find_subscription(broker, connection, message)
    _check_live(subscription)
    session, before = _session(broker, connection, message), broker.registry.topics(subscription)
    broker.registry.spend(subscription, cost)
    for publisher in session.publishers:  # they begin behind what the session has published until now
        broker.registry.begin_behind(publisher, subscription, before)
    is_done = False
    try:
        yield from _route(broker, subscription, topics)
        is_done = True
    finally:
        if not is_done:  # the connection has ended in between
            broker.registry.recount(subscription)
    connection.reply({})


def _drop_topics(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    topics = [*dict.fromkeys(_topics(message))]
    subscription = _find_subscription(broker, connection, message)
    _check_live(subscription)
    _session(broker, connection, message)
    yield from broker.traffic.take_in()  # so that they are dropped behind what has been published
    for start in range(0, len(topics), _TOPICS):
        if start:
            yield
        if subscription.is_live:  # else its reader was found to be gone
            end = start + _TOPICS
            broker.registry.drop_topics(subscription, topics[start:end], is_last=end >= len(topics))
    connection.reply({})


def _check_live(subscription: Subscription) -> None:
    if not subscription.is_live:
        raise _Refused("closed", "this channel was unsubscribed: subscribe again for a new one")


def _open(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    subscription = _find_subscription(broker, connection, message)
    opening = broker.registry.openings.get(subscription)
    if opening is not None and opening.peer is connection.peer:
        broker.registry.unopen(subscription)  # it was interrupted, and begins again
        opening = None
    if opening is not None or subscription.is_open:
        raise _in_use(subscription.pid if opening is None else opening.peer.pid)
    if subscription.owner not in (None, connection.peer.pid):
        raise _in_use(subscription.pid)
    _session(broker, connection, message)
    ends = broker.registry.begin_opening(subscription, connection, shared=bool(message.get("shared")))
    connection.reply({"token": subscription.pipe.token, "fd_socket": len(ends) > 1}, *ends)


def _opened(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    subscription = _find_subscription(broker, connection, message)
    is_there = message.get("token") == subscription.pipe.token and subscription.pipe.fd >= 0
    if is_there and not subscription.is_open:
        session = _session(broker, connection, message)
        is_last = broker.shutdown is not None and session.peer is broker.shutdown.by
        try:
            broker.registry.confirm_open(subscription, session, is_abandoned=is_last)
        except BrokenPipeError:  # the process has closed its end meanwhile
            broker.registry.unopen(subscription)
            is_there = False
    connection.reply({"opened": is_there})  # else what was begun has been taken back: begin again


def _unsubscribe(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    subscription = broker.registry.subscriptions.get(_integer(message, "subscription"))
    if subscription is not None:
        _session(broker, connection, message)
        yield from broker.traffic.take_in()
        broker.registry.unsubscribe(subscription)
    connection.reply({})


def _close(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    """Remove a channel that was closed or collected: it cannot be opened, or received from, any more."""
    id = _integer(message, "subscription")
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
    count = _integer(message, "count")
    topic = message.get("topic")
    encoded = None if topic is None else _checked(encode_topic, topic)

    while (there := broker.router.count if encoded is None else len((yield from broker.router.look_up(encoded)))) < count:
        if message.get("now"):
            break
        yield WAIT
    connection.reply({"done": there >= count, "there": there})


def _stats(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    parts = yield from encoded_stats(broker)
    connection.reply_encoded(frame_of(*parts))


def _stop(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> None:
    timeout = message.get("timeout")
    if timeout is not None and (type(timeout) not in (int, float) or not 0 <= timeout <= _FOREVER):
        raise _Refused("value", f"timeout must be 0 or more seconds, not {timeout!r}")
    shutdown = broker.stop(_FOREVER if timeout is None else float(timeout), connection.peer)
    connection.reply({"pid": os.getpid(), "left": shutdown.time_left})  # requested again, it is what is left now


_FOREVER: Final = 1e9
_MOST: Final = (1 << 48) - 1

_PART: Final = 2048  # characters of patterns to compile: some milliseconds
_TOPICS: Final = 1024  # that are routed to a subscription in the same time

_HANDLERS: Final[dict[str, Callable[[Broker, ControlConnection, dict[str, Any]], Parts | None]]] = {
    "attach": _attach,
    "detach": _detach,
    "publisher": _publisher,
    "fd_socket": _fd_socket,
    "retire": _retire,
    "flush": _flush,
    "subscribe": _subscribe,
    "add topics": _add_topics,
    "drop topics": _drop_topics,
    "open": _open,
    "opened": _opened,
    "unsubscribe": _unsubscribe,
    "close": _close,
    "drop": _close,
    "wait": _wait,
    "stats": _stats,
    "stop": _stop,
}


def _refuse_when_stopping(broker: Broker) -> None:
    if broker.shutdown is not None:
        raise _Refused("lost", "the broker is being closed: nothing more can be published or subscribed to")


def _integer(message: dict[str, Any], name: str) -> int:
    value = message.get(name)
    if type(value) is not int:
        raise _Refused("value", f"{name} must be a whole number, not {value!r}")
    return value


def _session(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Session:
    session = broker.registry.sessions.get(_integer(message, "session"))
    if session is None or session.peer.pid != connection.peer.pid:
        raise _Refused(
            "unknown",
            "the broker does not know this process any more: connect() again",
        )
    return session


def _find_publisher(broker: Broker, message: dict[str, Any]) -> Publisher | None:
    return broker.traffic.publishers.get(_integer(message, "publisher")) if message.get("publisher") is not None else None


def _own_publisher(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Publisher | None:
    publisher = _find_publisher(broker, message)
    return publisher if publisher is not None and publisher.pid == connection.peer.pid else None


def _find_subscription(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Subscription:
    id = _integer(message, "subscription")
    subscription = broker.registry.subscriptions.get(id)
    if subscription is None:
        owner = broker.registry.former_owners.get(id, connection.peer.pid)
        if owner != connection.peer.pid:
            raise _in_use(owner)
        raise _Refused("closed", "this channel was unsubscribed or closed, or its process has ended: subscribe again")
    return subscription


def _in_use(pid: int) -> _Refused:
    process = f"process {pid}" if pid > 0 else "a process of another PID namespace"
    text = f"{process} has opened this channel, and only that one can receive from it: subscribe here for another"
    return _Refused("in use", text, pid=pid)


def _topics(message: dict[str, Any]) -> list[str]:
    topics = message.get("topics")
    if not isinstance(topics, list) or not topics:
        raise _Refused("value", "topics must be a list of at least one")
    if len(topics) > SESSION.topics:
        raise _Refused("value", f"a session may have {SESSION.topics} topics and patterns, and these are {len(topics)}")
    for kind in {*map(type, topics)} - {str}:
        raise _Refused("value", f"a topic must be a str, not {kind.__name__}")
    return topics


def _prepare(session: Session, topics: list[str], subscriptions: int) -> Generator[None, None, tuple[Cost, list[Matcher]]]:
    """Check topics, in parts. Return their cost, and the matchers of their patterns, to be kept until they are routed.

    :raises OverBudget: the session has no room for them.
    """
    cost = Cost(subscriptions, len(topics))
    session.budget.check(cost)
    matchers: list[Matcher] = []
    part: list[str] = []  # is checked, and its patterns compiled, in some milliseconds
    room = _PART
    for count, topic in enumerate(topics, 1):
        _checked(encode_topic, topic)
        part.append(topic)
        room -= len(topic) if is_pattern(topic) else 4
        if room < 0 or count == len(topics):
            cost = cost.plus(cost_of(part, 0)._replace(topics=0))
            session.budget.check(cost)
            matchers += map(matcher, filter(is_pattern, part))
            if count < len(topics):
                yield
            part, room = [], _PART
    return cost, matchers


def _checked(check: Callable[..., Any], *args: object) -> Any:
    try:
        return check(*args)
    except (TypeError, ValueError) as error:
        raise _Refused("value", str(error)) from None
