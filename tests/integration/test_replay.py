"""History and replay: a subscriber starts with the last messages that match, and goes on without a gap or a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, TimedOut, connect, start_broadcaster
from mpbroadcast.validation import Policy
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    everything,
    fill,
    finish,
    in_place,
    only_subscriber,
    pattern,
    record,
    rest,
    take,
    wait_until,
)

Bus = Broadcaster[Any]
Start = Callable[[int], Bus]
MEBIBYTE = 1 << 20


@pytest.fixture
def start(leaves_nothing: None) -> Iterator[Start]:
    """Starts a broadcaster with a history of so many messages, and closes it at the end."""
    started: list[Bus] = []

    def begin(history: int) -> Bus:
        started.append(start_broadcaster(history=history))
        return started[-1]

    yield begin
    for bus in started:
        bus.close(timeout=2.0)


# --- what is replayed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("published", "replay", "history"),
    [(20, 5, 10), (20, 10, 10), (20, 50, 10), (3, 5, 10), (0, 5, 10), (20, 1, 1)],
)
def test_the_last_ones_come_first(start: Start, published: int, replay: int, history: int) -> None:
    """A channel starts with the last k messages, or what there is of them, and goes on with what comes."""
    bus = start(history)
    bus.publish_many(range(published))
    channel = bus.subscribe(replay=replay)
    expected = list(range(max(0, published - min(replay, history)), published))
    assert take(channel, len(expected)) == expected
    with pytest.raises(TimedOut):
        channel.recv(timeout=0.05)
    bus.publish("live")
    assert everything(bus, channel) == ["live"]


def test_without_replay_nothing_old_comes(start: Start) -> None:
    """A channel that did not ask for a replay starts with what is published from then on, history or not."""
    bus = start(10)
    bus.publish_many(range(10))
    channel, zero = bus.subscribe(), bus.subscribe(replay=0)
    bus.publish("live")
    assert everything(bus, channel) == ["live"]
    assert everything(bus, zero) == ["live"]


def test_replay_is_in_the_order_of_all(start: Start) -> None:
    """Over several topics and publishers, what is replayed comes in the order in which the live ones came."""
    bus = start(100)
    live = bus.subscribe(with_topic=True)
    handles = [bus, connect(bus.address)]
    for number in range(60):
        handles[number % 2].publish(number, topic="abc"[number * 7 % 5 % 3])
    for handle in handles:
        handle.flush(timeout=DEADLINE)
    order = take(live, 60)
    for topics, wanted in [
        ((), "abc"),
        (("a",), "a"),
        (("a", "b"), "ab"),
        (("[ab]",), "ab"),
        (("*",), "abc"),
        (("a", "[a-c]", "c"), "abc"),
        (("x",), ""),
    ]:
        expected = [(topic, number) for topic, number in order if topic in wanted]
        for replay in (1, 7, 60):
            channel = bus.subscribe(*topics, replay=replay, with_topic=True)
            assert everything(bus, channel) == expected[-replay:]
    handles[1].close()


def test_each_topic_keeps_its_own(start: Start) -> None:
    """A busy topic pushes nothing of a quiet one out; of each there are the last n."""
    bus = start(3)
    bus.publish_many(["quiet 1", "quiet 2"], topic="quiet")
    bus.publish_many(range(1000), topic="busy")
    bus.publish("quiet 3", topic="quiet")
    channel = bus.subscribe(replay=100)
    assert everything(bus, channel) == ["quiet 1", "quiet 2", 997, 998, 999, "quiet 3"]
    channel = bus.subscribe(replay=4)
    assert everything(bus, channel) == [997, 998, 999, "quiet 3"]
    channel = bus.subscribe("quiet", replay=2)
    assert everything(bus, channel) == ["quiet 2", "quiet 3"]


def test_what_excluded_another_channel_is_replayed(start: Start) -> None:
    """A message that was published with ``exclude`` is in the history like any other."""
    bus = start(10)
    other = bus.subscribe()
    bus.publish("for all")
    bus.publish("not for the other", exclude=other)
    bus.publish("last")
    channel = bus.subscribe(replay=10)
    assert everything(bus, channel) == ["for all", "not for the other", "last"]
    assert everything(bus, other) == ["for all", "last"]


def test_what_nobody_heard_is_replayed(start: Start) -> None:
    """The history holds what was published while nobody was subscribed, and what its publisher left when it went."""
    bus = start(10)
    with connect(bus.address) as other:
        other.publish_many(range(5))
    wait_until(lambda: bus.stats().published == 5)
    channel = bus.subscribe(replay=10)
    assert everything(bus, channel) == [0, 1, 2, 3, 4]


# --- no gap, no copy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [50, 6000])
def test_replayed_and_live_join_without_a_seam(start: Start, children: Children, fork: BaseContext, size: int) -> None:
    """While another process publishes without pause, each new channel gets consecutive numbers."""
    bus = start(50)
    orders, theirs = fork.Pipe()
    publisher = children(fork, workers.publish_patterns, bus, theirs, "t", size)
    assert answer(orders) == "started"
    wait_until(lambda: bus.stats().published > 100)
    for turn in range(30):
        topics = [("t",), ("*",), (), ("t", "other")][turn % 4]
        with bus.subscribe(*topics, replay=1 + turn, capacity=500_000) as channel:
            first, _ = channel.recv(timeout=DEADLINE)
            for expected in range(first + 1, first + 120):
                number, data = channel.recv(timeout=DEADLINE)
                assert (number, data) == (expected, pattern(expected, size))
    last = bus.subscribe("t", replay=50)
    orders.send("stop")
    reading = Background(rest, last)
    count = answer(orders)
    finish(publisher)
    bus.unsubscribe(last)
    numbers = [number for number, _ in reading.result()]
    assert numbers == list(range(numbers[0], count))


def test_own_messages_join_without_a_seam(start: Start) -> None:
    """What a handle has published before it subscribes is replayed, also what the broker has not routed yet."""
    bus = start(10)
    published = 0
    for turn in range(50):
        count = turn % 13 + 1
        bus.publish_many(range(published, published + count))
        published += count
        channel = bus.subscribe(replay=10)
        bus.publish_many(range(published, published + 3))
        published += 3
        assert everything(bus, channel) == list(range(max(0, published - 13), published))


def test_what_waits_for_a_full_channel_comes_once(start: Start) -> None:
    """What is held back by a full channel is not in the history yet: a new channel gets it live, once, in its order."""
    bus = start(1000)
    full = bus.subscribe("t", capacity=30_000)
    published = fill(bus, topic="t", timeout=0.2)
    late = bus.subscribe("t", replay=5)
    first = late.recv(timeout=DEADLINE)[0]
    reading = Background(take, full, len(published) + 1)
    bus.publish((len(published), b""), topic="t", timeout=DEADLINE)
    assert [number for number, _ in reading.result()] == [*published, len(published)]
    assert [number for number, _ in everything(bus, late)] == list(range(first + 1, len(published) + 1))


# --- how it counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["block", "drop_oldest", "drop_newest", "disconnect"])
def test_a_replay_counts_as_published(start: Start, overflow: Policy) -> None:
    """What is replayed counts as published to the channel, and as waiting until it is in its pipe."""
    bus = start(10)
    bus.publish_many(range(10))
    channel = bus.subscribe(replay=7, overflow=overflow)
    row = only_subscriber(bus)
    assert (row.published, row.waiting, row.delivered, row.missed) == (7, 7, 0, 0)
    assert row.waiting_bytes >= 7 * 256
    assert bus.stats().published == 10
    assert take(channel, 7) == list(range(3, 10))
    wait_until(lambda: only_subscriber(bus).delivered == 7)
    bus.publish("live")
    assert channel.recv(timeout=DEADLINE) == "live"
    assert only_subscriber(bus).published == 8


@pytest.mark.parametrize("overflow", ["block", "drop_oldest", "drop_newest", "disconnect"])
def test_a_replay_is_cut_at_the_capacity_and_has_one_message_at_the_least(start: Start, overflow: Policy) -> None:
    """Of more than the backlog takes the newest are kept, and what is cut off is neither published nor missed."""
    bus = start(100)
    bus.publish_many([(number, pattern(number, 1000)) for number in range(100)])
    channel = bus.subscribe(replay=100, capacity=20_000, overflow=overflow)
    row = only_subscriber(bus)
    assert row.missed == 0
    assert 10 < row.published == row.waiting < 20
    assert 18_000 < row.waiting_bytes <= 20_000
    bus.unsubscribe(channel)
    assert record(channel) == [("message", number) for number in range(100 - row.published, 100)]
    assert channel.missed == 0
    bus.publish((100, pattern(100, 50_000)))  # larger than the whole backlog: replayed, and nothing else
    channel = bus.subscribe(replay=3, capacity=10_000, overflow=overflow)
    assert only_subscriber(bus).published == 1
    bus.unsubscribe(channel)
    assert record(channel) == [("message", 100)]


def test_live_ones_after_a_full_replay_follow_the_policy(start: Start) -> None:
    """A channel that its replay has filled drops, like any full one, and its gaps are exact."""
    bus = start(100)
    bus.publish_many([(number, pattern(number, 1000)) for number in range(100)])
    for overflow in ("drop_oldest", "drop_newest"):
        channel = bus.subscribe(replay=10, capacity=13_500, overflow=overflow)
        bus.publish_many([(number, pattern(number, 1000)) for number in range(100, 150)])
        bus.flush(timeout=DEADLINE)
        row = only_subscriber(bus)
        assert row.published == 60
        assert row.delivered + row.missed + row.waiting == 60
        bus.unsubscribe(channel)
        events = record(channel)
        shifted = [(kind, value - 90 if kind == "message" else value) for kind, value in events]
        numbers, place = in_place(shifted)
        assert place == 60
        assert 60 - len(numbers) == channel.missed == row.missed > 0
        for number in range(100):  # the same history again
            bus.publish((number, pattern(number, 1000)))


def test_latest_is_replayed_the_newest(start: Start) -> None:
    """Under ``latest`` a replay is the newest state, whatever k is; then the live ones come."""
    bus = start(10)
    bus.publish_many(range(10))
    for replay in (1, 5, 100):
        channel = bus.subscribe(replay=replay, overflow="latest")
        row = only_subscriber(bus)
        assert row.delivered + row.missed + row.waiting == row.published
        assert row.waiting == 1
        assert channel.recv(timeout=DEADLINE) == 9
        assert 1 + channel.missed == only_subscriber(bus).published
        bus.publish(9)
        assert everything(bus, channel) == [9]


# --- handed on --------------------------------------------------------------------------------------------------------


def test_a_replay_waits_for_the_child_that_opens(start: Start, children: Children, fork: BaseContext) -> None:
    """A channel with a replay is handed to a child like any other, under each start method."""
    bus = start(20)
    bus.publish_many(range(20))
    channel = bus.subscribe(replay=5)
    results, theirs = fork.Pipe()
    child = children(fork, workers.receive_until_end, channel, theirs)
    bus.publish_many(range(20, 30))
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    assert answer(results) == list(range(15, 30))
    finish(child)


# --- bounded ----------------------------------------------------------------------------------------------------------


def test_the_number_of_topics_is_bounded(start: Start) -> None:
    """Of more than 4,096 topics those that were published to the longest ago are forgotten, and ``stats`` counts them."""
    bus = start(2)
    assert (bus.stats().history_topics, bus.stats().history_forgotten) == (0, 0)
    for number in range(4096):
        bus.publish(number, topic=f"topic {number}")
    bus.flush(timeout=DEADLINE)
    assert (bus.stats().history_topics, bus.stats().history_forgotten) == (4096, 0)
    bus.publish("again", topic="topic 0")
    for number in range(4096, 4106):
        bus.publish(number, topic=f"topic {number}")
    bus.flush(timeout=DEADLINE)
    assert (bus.stats().history_topics, bus.stats().history_forgotten) == (4096, 10)
    for topics, expected in [
        (("topic 0",), [0, "again"]),
        (("topic 1",), []),
        (("topic 10",), []),
        (("topic 11",), [11]),
        (("topic 4105",), [4105]),
    ]:
        assert everything(bus, bus.subscribe(*topics, replay=2)) == expected
    channel = bus.subscribe("topic *", replay=10_000)
    assert everything(bus, channel) == [0, *range(11, 4096), "again", *range(4096, 4106)]


def test_the_bytes_are_bounded_over_topics(start: Start) -> None:
    """More than 64 MiB in all: whole topics are forgotten, the longest unused first, and counted."""
    bus = start(5)
    for number in range(70):
        bus.publish((number, bytes(MEBIBYTE)), topic=f"topic {number}", timeout=DEADLINE)
    bus.flush(timeout=DEADLINE)
    stats = bus.stats()
    assert 60 <= stats.history_topics <= 64
    assert stats.history_topics + stats.history_forgotten == 70
    channel = bus.subscribe(replay=100, capacity=100 * MEBIBYTE)
    assert only_subscriber(bus).published == stats.history_topics
    assert channel.recv(timeout=DEADLINE)[0] == stats.history_forgotten


# --- arguments --------------------------------------------------------------------------------------------------------
