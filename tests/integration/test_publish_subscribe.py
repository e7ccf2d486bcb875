"""Publishing and subscribing: when it takes effect, iterables and sizes, waiting for subscribers, and the statistics."""

import dataclasses
import os
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, TimedOut, connect, publish, subscribe, unsubscribe
from mpbroadcast.testing import drain
from tests.support import workers
from tests.support.helpers import DEADLINE, Background, Children, Pipe, answer, fill, finish, rest, take, wait_until

Bus = Broadcaster[Any]


def test_functions_mean_the_same_as_the_methods(bus: Bus) -> None:
    channel = subscribe(bus)
    publish(bus, "hello")
    assert channel.recv(timeout=DEADLINE) == "hello"
    unsubscribe(bus, channel)
    publish(bus, "too late")
    assert rest(channel) == []


def test_no_slow_joiner(bus: Bus, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """Once ``subscribe`` has returned, the next message of any process reaches the channel, and nothing that was before."""
    child = children(fork, workers.publish_on_order, bus, pipe[1])
    assert answer(pipe[0]) == "started"
    for number in range(0, 100, 2):
        bus.publish_many(["before"] * 20)
        with bus.subscribe() as channel:
            bus.publish(number)
            assert channel.recv(timeout=DEADLINE) == number
            pipe[0].send(number + 1)
            assert channel.recv(timeout=DEADLINE) == number + 1
        assert answer(pipe[0]) == "published"
    pipe[0].send(None)
    finish(child)


def test_flush_puts_a_parent_before_its_child(bus: Bus, children: Children, fork: BaseContext) -> None:
    channel = bus.subscribe()
    for turn in range(10):
        bus.publish(("parent", turn))
        bus.flush(timeout=DEADLINE)
        finish(children(fork, workers.publish_one, bus, ("child", turn)))
        assert take(channel, 2) == [("parent", turn), ("child", turn)]


def test_publish_many_takes_any_iterable_and_counts(bus: Bus) -> None:
    """An error of the iterable itself comes out unchanged, with ``sent``, and what it gave before is published."""

    def numbers() -> Iterator[int]:
        yield from range(2001, 2051)
        raise workers.Boom("no more")

    channel = bus.subscribe("t")
    assert bus.publish_many([1, 2, 3], topic="t") == 3
    assert bus.publish_many((number for number in range(4, 2001)), topic="t") == 1997
    assert bus.publish_many([], topic="t") == 0
    with pytest.raises(workers.Boom) as caught:
        bus.publish_many(numbers(), topic="t")
    assert caught.value.sent == 50  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="timeout") as wrong:
        bus.publish_many([0], topic="t", timeout=-1)
    assert wrong.value.sent == 0  # type: ignore[attr-defined]
    assert drain(bus, channel) == list(range(1, 2051))


@pytest.mark.parametrize("topic", [None, "room:1"])
def test_wait_for_subscribers(topic: str | None, bus: Bus, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """Return at once with as many as there are, else when the last one comes; count those that would get the topic."""
    channels = [bus.subscribe(), bus.subscribe("room:*"), bus.subscribe("room:1", "room:?")]
    if topic is not None:
        channels.append(bus.subscribe("other"))
    for channel in channels:
        channel.fileno()  # opened before the fork, they stay this process's own
    for count in (0, 3):
        bus.wait_for_subscribers(count, topic=topic, timeout=0)
    for timeout in (0, 0.05):
        with pytest.raises(TimedOut):
            bus.wait_for_subscribers(4, topic=topic, timeout=timeout)
    child = children(fork, workers.subscribe_on_order, bus, ("x", "room:[1]"), pipe[1])
    waiting = Background(bus.wait_for_subscribers, 4, topic=topic, timeout=DEADLINE)
    waiting.wait_until_blocked("wait_for_subscribers")
    pipe[0].send("subscribe")
    waiting.result()
    waiting = Background(bus.wait_for_subscribers, 2, topic="another", timeout=DEADLINE)
    waiting.wait_until_blocked("wait_for_subscribers")
    channels[1].subscribe("another")
    waiting.result()
    pipe[0].send("end")
    finish(child)


def test_stats_describe_broker_and_subscriptions(bus: Bus) -> None:
    """List each live subscription, in a snapshot that cannot be changed; count publishers until they close."""
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
    with connect(bus.address) as publisher:
        publisher.publish("another", topic="no channel")
        publisher.flush(timeout=DEADLINE)
        assert bus.stats().publishers == stats.publishers + 1
    wait_until(lambda: bus.stats().publishers == stats.publishers)
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
    for snapshot, name in ((stats, "published"), (first, "missed")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(snapshot, name, 7)
    bus.unsubscribe(channel)
    other.close()
    assert bus.stats().subscribers == ()  # though there is something unread
    assert rest(channel) == ["message"] * 2
    wait_until(lambda: bus.stats().memory == 0)


def test_stats_have_a_row_for_each_publisher(bus: Bus) -> None:
    """How much was received from it, in shared memory too, and the subscription that it waits for."""
    with connect(bus.address) as other:
        for _ in range(10):
            other.publish(bytes(100_000))
            other.flush(timeout=DEADLINE)
        (row,) = bus.stats().publisher_rows
        assert (row.pid, row.waiting_bytes, row.waits_for, row.waited) == (os.getpid(), 0, None, 0)
        assert 1_000_000 < row.bytes < 1_100_000
        with bus.subscribe("full", capacity=1) as channel:
            assert not bus.stats().subscribers[0].is_open
            fill(bus, topic="full", timeout=0.1)
            rows = {row.id: row for row in bus.stats().publisher_rows}
            assert rows.pop(row.id) == row
            (mine,) = rows.values()
            assert (mine.pid, mine.waits_for, mine.waited > 0, mine.waiting_bytes > 0) == (os.getpid(), channel.id, True, True)
            channel.recv(timeout=DEADLINE)
            assert bus.stats().subscribers[0].is_open
