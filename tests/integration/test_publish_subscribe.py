"""Publishing and subscribing: who gets what, in which order, in which sizes, and its statistics."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

import psutil
import pytest

from mpbroadcast import (
    Broadcaster,
    BrokerStats,
    SubscriberStats,
    TimedOut,
    connect,
    publish,
    start_broadcaster,
    subscribe,
    unsubscribe,
)
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    everything,
    finish,
    pattern,
    rest,
    take,
    wait_until,
)

Bus = Broadcaster[Any]

# --- who gets it ------------------------------------------------------------------------------------------------------


def test_every_subscriber_gets_every_message(bus: Bus) -> None:
    """Each message reaches each channel, in the order in which it was published."""
    channels = [bus.subscribe() for _ in range(3)]
    messages = ["text", 7, None, {"a": [1, 2.5]}, b"bytes", ("tuple",)]
    for message in messages:
        bus.publish(message)
    assert [take(channel, len(messages)) for channel in channels] == [messages] * 3


def test_broadcasters_live_side_by_side(every_context: BaseContext) -> None:
    """A process may have several broadcasters, whatever it has open with the others, and none gets another's."""
    with start_broadcaster() as first:
        opened, unopened = first.subscribe(), first.subscribe()
        first.publish("first")
        assert opened.recv(timeout=DEADLINE) == "first"
        with start_broadcaster(context=every_context) as second:
            channel = second.subscribe()
            second.publish("second")
            assert everything(second, channel) == ["second"]
        assert everything(first, opened) == []
        assert everything(first, unopened) == ["first"]


def test_functions_mean_the_same_as_the_methods(bus: Bus) -> None:
    """``subscribe``, ``publish`` and ``unsubscribe`` exist as functions, too."""
    channel = subscribe(bus)
    publish(bus, "hello")
    assert channel.recv(timeout=DEADLINE) == "hello"
    unsubscribe(bus, channel)
    publish(bus, "too late")
    assert rest(channel) == []


def test_topics_select(bus: Bus) -> None:
    """A channel receives its topics and no others; one that names none receives everything."""
    one, two, empty = bus.subscribe("one"), bus.subscribe("two"), bus.subscribe("")
    both, all_of_them = bus.subscribe("one", "two"), bus.subscribe()
    for number, topic in enumerate(["one", "two", "three", "", "one"]):
        bus.publish(number, topic=topic)
    bus.publish(5)
    assert everything(bus, one) == [0, 4]
    assert everything(bus, two) == [1]
    assert everything(bus, empty) == [3, 5]
    assert everything(bus, both) == [0, 1, 4]
    assert everything(bus, all_of_them) == [0, 1, 2, 3, 4, 5]


def test_patterns_match_as_fnmatchcase_does(bus: Bus) -> None:
    """Topics with ``*``, ``?`` or ``[...]`` are patterns, with the very meaning of ``fnmatch.fnmatchcase``."""
    patterns = ["*", "room:*", "room:?", "room:[12]", "room:[!1]", "room:[*]", "*:1", "ROOM:*", "room:1", "", "[", "a[]b"]
    topics = ["", "room:", "room:1", "room:2", "room:12", "room:*", "Room:1", "hall:1", "room", "*", "[", "a[]b", "a\n:1"]
    channels = {wanted: bus.subscribe(wanted) for wanted in patterns}
    for topic in topics:
        bus.publish(topic, topic=topic)
    for wanted, channel in channels.items():
        expected = [topic for topic in topics if fnmatch.fnmatchcase(topic, wanted)]
        assert everything(bus, channel) == expected, wanted


def test_with_topic_gives_pairs_everywhere(bus: Bus) -> None:
    """With ``with_topic=True`` each way to receive gives ``(topic, message)``."""
    channel = bus.subscribe("room:*", with_topic=True)
    for number in range(5):
        bus.publish(number, topic=f"room:{number}")
    bus.flush(timeout=DEADLINE)
    assert channel.recv(timeout=DEADLINE) == ("room:0", 0)
    assert channel.recv_many(1, timeout=DEADLINE) == [("room:1", 1)]
    assert next(iter(channel)) == ("room:2", 2)
    assert everything(bus, channel) == [("room:3", 3), ("room:4", 4)]


def test_subscriber_hears_what_it_publishes_itself(bus: Bus, children: Children, fork: BaseContext) -> None:
    """A publish from inside a subscriber reaches that subscriber too, unless it excludes its channel."""
    observer = bus.subscribe()
    results, theirs = fork.Pipe()
    child = children(fork, workers.hear_itself, bus, theirs)
    assert answer(results) == ["to all", "last"]
    finish(child)
    assert everything(bus, observer) == ["to all", "to all others", "last"]


# --- when it takes effect, and in which order -------------------------------------------------------------------------


def test_subscribe_starts_behind_what_its_handle_has_published(bus: Bus) -> None:
    """A new channel gets nothing of what the same handle has published before, and all of what it publishes then."""
    for number in range(30):
        for _ in range(20):
            bus.publish("before")
        channel = bus.subscribe()
        bus.publish(number)
        assert channel.recv(timeout=DEADLINE) == number
        channel.close()


def test_no_slow_joiner(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Once ``subscribe`` has returned, the next message of any process reaches the channel."""
    orders, theirs = fork.Pipe()
    child = children(fork, workers.publish_on_order, bus, theirs)
    assert answer(orders) == "started"
    for number in range(100):
        with bus.subscribe() as channel:
            orders.send(number)
            assert channel.recv(timeout=DEADLINE) == number
        assert answer(orders) == "published"
    orders.send(None)
    finish(child)


def test_one_order_for_all(bus: Bus, children: Children, fork: BaseContext) -> None:
    """All subscribers see one and the same order, and in it each publisher's messages in its own order."""
    names, count = ["first", "second", "third"], 2000
    pipes = []
    for _ in range(3):
        results, theirs = fork.Pipe()
        children(fork, workers.receive_until_end, bus.subscribe(), theirs)
        pipes.append(results)
    mine = bus.subscribe()
    publishers = [children(fork, workers.publish_numbers, bus, name, count) for name in names]
    for publisher in publishers:
        finish(publisher)
    seen = take(mine, len(names) * count)
    bus.close(timeout=DEADLINE)
    assert [answer(results) == seen for results in pipes] == [True] * 3
    for name in names:
        assert [number for source, number in seen if source == name] == list(range(count))


def test_flush_puts_a_parent_before_its_child(bus: Bus, children: Children, fork: BaseContext) -> None:
    """What one handle has flushed comes before what another one publishes then."""
    channel = bus.subscribe()
    for turn in range(10):
        bus.publish(("parent", turn))
        bus.flush(timeout=DEADLINE)
        finish(children(fork, workers.publish_one, bus, ("child", turn)))
        assert take(channel, 2) == [("parent", turn), ("child", turn)]


# --- publish_many -----------------------------------------------------------------------------------------------------


def test_publish_many_takes_any_iterable_and_counts(bus: Bus) -> None:
    """``publish_many`` publishes what a list or a generator gives, in order, and returns how many that were."""
    channel = bus.subscribe("t")
    assert bus.publish_many([1, 2, 3], topic="t") == 3
    assert bus.publish_many((number for number in range(4, 2001)), topic="t") == 1997
    assert bus.publish_many([], topic="t") == 0
    assert everything(bus, channel) == list(range(1, 2001))


def test_publish_many_says_how_many_were_sent_before_its_iterable_failed(bus: Bus) -> None:
    """An error of the iterable itself comes out unchanged, with ``.sent``, and what it gave before is published."""

    def numbers() -> Iterator[int]:
        yield from range(50)
        raise workers.Boom("no more")

    channel = bus.subscribe()
    with pytest.raises(workers.Boom) as caught:
        bus.publish_many(numbers())
    assert caught.value.sent == 50  # type: ignore[attr-defined]
    assert everything(bus, channel) == list(range(50))


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_messages_of_every_size_arrive_unchanged(bus: Bus) -> None:
    """Sizes from nothing to many MiB arrive whole, also where a frame just fits or just does not."""
    sizes = [*range(300), *range(4000, 4201), *range(8100, 8300), *range(65536 - 120, 65536 + 60)]
    sizes += [1_048_575, 1_048_576, 1_048_577, 0, 3_333_333, 1, 20 * 1_048_576]
    channel = bus.subscribe()
    received = Background(take, channel, len(sizes))
    for size in sizes:
        bus.publish(pattern(size, size))
    for size, message in zip(sizes, received.result(2 * DEADLINE), strict=True):
        assert message == pattern(size, size)


def test_topic_length_does_not_matter_where_a_frame_just_fits(bus: Bus) -> None:
    """The longest topics go with messages of every size around a page."""
    channel = bus.subscribe("x" * 1024, with_topic=True)
    sizes = list(range(2900, 4150, 7))
    for size in sizes:
        bus.publish(pattern(size, size), topic="x" * 1024)
    assert everything(bus, channel) == [("x" * 1024, pattern(size, size)) for size in sizes]


# --- wait_for_subscribers ---------------------------------------------------------------------------------------------


def test_wait_for_subscribers_returns_when_they_are_there(bus: Bus, children: Children, fork: BaseContext) -> None:
    """``wait_for_subscribers(n)`` returns at once with n subscriptions, and else when the n-th comes."""
    channel = bus.subscribe("mine")
    channel.fileno()  # opened before the fork, it stays this process's own
    bus.wait_for_subscribers(0, timeout=0)
    bus.wait_for_subscribers(1, timeout=0)
    orders, theirs = fork.Pipe()
    children(fork, workers.subscribe_on_order, bus, ("theirs",), theirs)
    waiting = Background(bus.wait_for_subscribers, 2, timeout=DEADLINE)
    waiting.wait_until_blocked("wait_for_subscribers")
    orders.send("subscribe")
    waiting.result()
    assert len(bus.stats().subscribers) == 2
    orders.send("end")
    channel.close()


def test_wait_for_subscribers_of_a_topic_counts_who_gets_it(bus: Bus, children: Children, fork: BaseContext) -> None:
    """With ``topic``, only those count that would get what is published to it, by whatever pattern."""
    channels = [bus.subscribe("other"), bus.subscribe("room:*"), bus.subscribe("room:1", "room:?"), bus.subscribe()]
    for channel in channels:
        channel.fileno()  # opened before the fork, they stay this process's own
    bus.wait_for_subscribers(3, topic="room:1", timeout=0)
    with pytest.raises(TimeoutError):
        bus.wait_for_subscribers(4, topic="room:1", timeout=0.05)
    orders, theirs = fork.Pipe()
    children(fork, workers.subscribe_on_order, bus, ("x", "room:[1]"), theirs)
    waiting = Background(bus.wait_for_subscribers, 4, topic="room:1", timeout=DEADLINE)
    orders.send("subscribe")
    waiting.result()
    orders.send("end")
    for channel in channels:
        channel.close()


def test_wait_for_subscribers_notices_more_topics(bus: Bus) -> None:
    """A channel that takes up a topic ends the wait for that topic's subscribers."""
    channel = bus.subscribe("a")
    waiting = Background(bus.wait_for_subscribers, 1, topic="b", timeout=DEADLINE)
    waiting.wait_until_blocked("wait_for_subscribers")
    channel.subscribe("b")
    waiting.result()


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_wait_for_subscribers_runs_out_of_time(bus: Bus, timeout: float) -> None:
    """Without enough subscribers in time there is a ``TimeoutError``, and the handle goes on."""
    with pytest.raises(TimedOut):
        bus.wait_for_subscribers(1, timeout=timeout)
    channel = bus.subscribe()
    bus.wait_for_subscribers(1, timeout=0)
    channel.close()


# --- statistics -------------------------------------------------------------------------------------------------------


def test_stats_describe_broker_and_subscriptions(bus: Bus) -> None:
    """The statistics name the broker's process, what it has routed, and each live subscription with its settings."""
    channel = bus.subscribe("a", "b*", capacity=123_456)
    other = bus.subscribe("z", overflow="latest")
    for topic in ["a", "bb", "c"]:
        bus.publish("message", topic=topic)
    bus.flush(timeout=DEADLINE)
    stats = bus.stats()
    assert psutil.Process(stats.pid).is_running()
    assert stats.pid != os.getpid()
    assert 0 <= stats.uptime < 10 * DEADLINE
    wait_until(lambda: bus.stats().uptime > stats.uptime)
    assert stats.published == 3
    assert stats.publishers >= 1
    first, second = stats.subscribers
    assert first.id != second.id
    assert (first.pid, first.overflow, first.capacity) == (os.getpid(), "block", 123_456)
    assert sorted(first.topics) == ["a", "b*"]
    assert (first.published, first.delivered, first.missed, first.waiting) == (2, 0, 0, 2)
    assert first.waiting_bytes > 0
    assert (list(second.topics), second.overflow) == (["z"], "latest")
    assert (second.published, second.waiting, second.waiting_bytes) == (0, 0, 0)
    assert second.capacity == 64 * 1_048_576
    assert stats.memory >= first.waiting_bytes
    channel.close()
    other.close()
    assert bus.stats().subscribers == ()


def test_stats_are_frozen_dataclasses(bus: Bus) -> None:
    """A snapshot cannot be changed, and has the documented fields."""
    channel = bus.subscribe()
    stats = bus.stats()
    wanted = {"pid", "uptime", "published", "publishers", "subscribers", "memory"}
    assert wanted <= {field.name for field in dataclasses.fields(BrokerStats)}
    wanted = {"id", "pid", "topics", "overflow", "capacity", "published", "delivered", "missed", "waiting"}
    assert wanted | {"waiting_bytes"} <= {field.name for field in dataclasses.fields(SubscriberStats)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.published = 7  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.subscribers[0].missed = 7  # type: ignore[misc]
    channel.close()


def test_stats_count_publishers(bus: Bus, fork: BaseContext, children: Children) -> None:
    """Each handle that publishes is counted, until it closes or its process ends."""
    bus.publish("mine")
    before = bus.stats().publishers
    with connect(bus.address) as second:
        second.publish("second")
        second.flush(timeout=DEADLINE)
        assert bus.stats().publishers == before + 1
    wait_until(lambda: bus.stats().publishers == before)
    orders, theirs = fork.Pipe()
    child = children(fork, workers.publish_on_order, bus, theirs)
    assert answer(orders) == "started"
    orders.send("third")
    assert answer(orders) == "published"
    wait_until(lambda: bus.stats().publishers == before + 1)
    child.kill()
    wait_until(lambda: bus.stats().publishers == before)


def test_stats_forget_a_subscription_that_ended(bus: Bus) -> None:
    """Only live subscriptions are listed, also while what they were given is still unread."""
    channel = bus.subscribe()
    bus.publish(bytes(1000))
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    assert bus.stats().subscribers == ()
    assert rest(channel) == [bytes(1000)]
    wait_until(lambda: bus.stats().memory == 0)
