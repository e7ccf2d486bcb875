"""Requests that make a subscription or change its topics: handlers for ``requests.py``."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Final

from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.history import ALL, History
from mpbroadcast.broker.core.limits import SESSION, Cost, cost_of
from mpbroadcast.broker.core.patterns import Matcher, is_pattern, matcher
from mpbroadcast.broker.core.states import SubscriptionState
from mpbroadcast.broker.members import Session, Subscription
from mpbroadcast.broker.request_fields import (
    Refused,
    checked,
    find_publisher,
    find_subscription,
    integer,
    refuse_when_stopping,
    session_of,
    until_routed,
)
from mpbroadcast.broker.server import Broker, Parts
from mpbroadcast.validation import check_count, check_group, check_name, check_overflow, encode_topic

_MOST: Final = (1 << 48) - 1
_NO_LIMIT: Final = 1 << 62  # bytes

_PART: Final = 2048  # characters of patterns to compile: some milliseconds
_TOPICS: Final = 1024  # that are routed to a subscription in the same time


def subscribe(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    topics = [*dict.fromkeys(_topics(message))]
    cost, _matchers = yield from prepare(session_of(broker, connection, message), topics, 1)
    capacity = checked(check_count, message.get("capacity"), "capacity", 1)
    policy = checked(check_overflow, message.get("overflow"))
    replay = checked(check_count, message.get("replay"), "replay", 0)
    name = checked(check_group, message.get("group"))
    prefetch = checked(check_count, message.get("prefetch", 1), "prefetch", 1)
    label = checked(check_name, message.get("name"))
    after = _after(message)
    registry, history = broker.registry, None
    if replay or after is not None:
        history = _history_of(broker, "replay" if replay else "after")
        yield from broker.traffic.take_in()  # so that it is in the history
        published = yield from history.matching(topics, former=after is not None)
    session, id, known = _identity(broker, connection, message)
    if known is not None:
        there = {*registry.topics(known)}
        if known.group is not None and not known.group.topics.issuperset(topics):
            _check_alone(known)
        missing = [topic for topic in topics if topic not in there]
        if missing:  # of a request in parts that was cut off; or others, so they cost again
            registry.spend(known, cost._replace(subscriptions=0))
        yield from _route(broker, known, missing)
    elif name is not None and (group := checked(registry.groups.find, name, topics, capacity, policy)) is not None:
        subscription = registry.add_subscription(id, session, capacity, "block", cost)
        subscription.label = label
        registry.groups.join(group, subscription, prefetch)  # which has begun: no replay, and nothing to begin behind
        registry.route(subscription, [])
        there = {*broker.router.topics(group)}  # all, unless the request of the first member was cut off
        yield from _route(broker, subscription, [topic for topic in topics if topic not in there])
    else:
        subscription = registry.add_subscription(id, session, capacity, policy if name is None else "block", cost)
        subscription.label = label
        if name is not None:
            registry.groups.join(registry.groups.add(name, session, topics, capacity, policy), subscription, prefetch)
        target = subscription.target
        if history is not None:
            registry.route(subscription, topics)  # at once, so that nothing is missing behind what is replayed
            routing = broker.traffic.routing
            is_done, target.is_starting = False, True
            try:
                if after is None:
                    yield from routing.put_first(target, history.last(published, replay))
                else:
                    yield from routing.resume(target, history, published, after, has_all="*" in topics)
                is_done = True
            finally:
                target.is_starting = False
                broker.traffic.mark(target)
                if not is_done:  # the connection has ended in between: requested again, it must be whole
                    registry.close(subscription, "its request was cut off")
        else:
            publisher = find_publisher(broker, message)
            if publisher is not None:
                registry.begin_behind(publisher, target)
            yield from _route(broker, subscription, topics)
    connection.reply({})


def _identity(
    broker: Broker, connection: ControlConnection, message: dict[str, Any]
) -> tuple[Session, int, Subscription | None]:
    """Return session and ID of a new subscription, and the subscription if the reply to this request was lost.

    Then it is there, whole, or of a broker before this one.
    """
    refuse_when_stopping(broker)
    session, id, registry = session_of(broker, connection, message), integer(message, "subscription"), broker.registry
    if id in registry.dropped_early:
        raise Refused("closed", "this subscription was dropped before it was made")
    known = registry.subscriptions.get(id)
    if known is not None and known.session.peer.pid == connection.peer.pid:
        return session, id, known
    if known is not None or id in registry.to_remove or not 0 < id <= _MOST:
        raise Refused("value", f"subscription must be a new ID of 48 bits, not {id}")
    return session, id, None


def history(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Parts:
    """Make a subscription that gets what the history has, and ends behind that: nothing is routed to it."""
    topics = [*dict.fromkeys(_topics(message))]
    cost, _matchers = yield from prepare(session_of(broker, connection, message), topics, 1)
    limit = ALL if message.get("limit") is None else checked(check_count, message.get("limit"), "limit", 0)
    after = _after(message)
    kept, routing, registry = _history_of(broker, "history()"), broker.traffic.routing, broker.registry
    yield from until_routed(find_publisher(broker, message))
    yield from broker.traffic.take_in()
    names = yield from kept.matching(topics)
    session, id, known = _identity(broker, connection, message)
    if known is None:
        subscription = registry.add_subscription(id, session, _NO_LIMIT, "block", cost)
        subscription.state = subscription.state.to(SubscriptionState.ENDED)
        is_done = False
        try:
            start = 0 if after is None or not routing.knows(after) else after
            if after is None or limit == ALL:
                yield from routing.put_first(subscription, kept.last(names, limit, start))
            else:
                yield from routing.put_last(subscription, kept.first(names, limit, start))
            is_done = True
        finally:
            if not is_done:
                registry.close(subscription, "its request was cut off")
        subscription.backlog.end()
        registry.note_ended(subscription)
    connection.reply({})


def _after(message: dict[str, Any]) -> int | None:
    after = message.get("after")
    return None if after is None else int(checked(check_count, after, "after", 0))


def _history_of(broker: Broker, argument: str) -> History:
    history = broker.traffic.routing.history
    if history is None:
        raise Refused("value", f"{argument} needs a broker that keeps a history: start_broadcaster(history=...)")
    return history


def _route(broker: Broker, subscription: Subscription, topics: list[str]) -> Iterator[None]:
    """Route these topics to it, in parts: of other handles it may get messages that were published a moment before."""
    for start in range(0, len(topics), _TOPICS):
        if start:
            yield
        _check_live(subscription)
        end = start + _TOPICS
        broker.registry.route(subscription, topics[start:end], is_last=end >= len(topics))


def add_topics(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    subscription = find_subscription(broker, connection, message)
    _check_alone(subscription)
    there = {*broker.registry.topics(subscription)}
    topics = [topic for topic in dict.fromkeys(_topics(message)) if topic not in there]
    cost, _matchers = yield from prepare(subscription.session, topics, 0)
    subscription = find_subscription(broker, connection, message)
    _check_live(subscription)
    session, before = session_of(broker, connection, message), broker.registry.topics(subscription)
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


def drop_topics(broker: Broker, connection: ControlConnection, message: dict[str, Any]) -> Iterator[None]:
    topics = [*dict.fromkeys(_topics(message))]
    subscription = find_subscription(broker, connection, message)
    _check_alone(subscription)
    _check_live(subscription)
    session_of(broker, connection, message)
    yield from broker.traffic.take_in()  # so that they are dropped behind what has been published
    for start in range(0, len(topics), _TOPICS):
        if start:
            yield
        if subscription.is_live:  # else its reader was found to be gone
            end = start + _TOPICS
            broker.registry.drop_topics(subscription, topics[start:end], is_last=end >= len(topics))
    connection.reply({})


def _check_alone(subscription: Subscription) -> None:
    if subscription.group is not None:
        text = f"this channel is a member of the group {subscription.group.name!r}, whose members have the same topics"
        raise Refused("value", f"{text}: subscribe another channel to others")


def _check_live(subscription: Subscription) -> None:
    if not subscription.is_live:
        raise Refused("closed", "this channel was unsubscribed: subscribe again for a new one")


def _topics(message: dict[str, Any]) -> list[str]:
    topics = message.get("topics")
    if not isinstance(topics, list) or not topics:
        raise Refused("value", "topics must be a list of at least one")
    if len(topics) > SESSION.topics:
        raise Refused("value", f"a session may have {SESSION.topics} topics and patterns, and these are {len(topics)}")
    for kind in {*map(type, topics)} - {str}:
        raise Refused("value", f"a topic must be a str, not {kind.__name__}")
    return topics


def prepare(session: Session, topics: list[str], subscriptions: int) -> Generator[None, None, tuple[Cost, list[Matcher]]]:
    """Check topics, in parts. Return their cost, and the matchers of their patterns, to be kept until they are routed.

    :raises OverBudget: the session has no room for them.
    """
    cost = Cost(subscriptions, len(topics))
    session.budget.check(cost)
    matchers: list[Matcher] = []
    part: list[str] = []  # is checked, and its patterns compiled, in some milliseconds
    room = _PART
    for count, topic in enumerate(topics, 1):
        checked(encode_topic, topic)
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
