"""History and replay: a subscriber starts with the last messages that match, and goes on without a gap or a copy. Which
messages a history keeps, and which a replay gets of it, tests/unit/test_history.py compares with a plain list."""

from multiprocessing.context import BaseContext

import pytest

from mpbroadcast import connect, start_broadcaster
from mpbroadcast.testing import drain
from mpbroadcast.validation import Policy
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    fill,
    finish,
    only_subscriber,
    pattern,
    record,
    rest,
    take,
    wait_until,
)
from tests.support.large_workers import Size, numbers

LONG = Size(1000)


def test_the_last_ones_come_first(transport: Size) -> None:
    """A channel starts with the last k messages that match, or what there is of them, and goes on with what comes; without a
    replay it starts with that. A message that a channel was excluded from, or that none got, is in the history, too."""
    with start_broadcaster(history=4) as bus:
        with connect(bus.address) as other:
            other.publish(transport.message(0), topic="topic:0")
        wait_until(lambda: bus.stats().published == 1)
        early = bus.subscribe()
        for number in range(1, 6):
            bus.publish(transport.message(number), topic=f"topic:{number % 2}", exclude=early if number == 3 else None)
        wanted = [
            (bus.subscribe(replay=1), [5, 6]),
            (bus.subscribe(replay=3), [3, 4, 5, 6]),
            (bus.subscribe(replay=9), [0, 1, 2, 3, 4, 5, 6]),
            (bus.subscribe(), [6]),
            (bus.subscribe("topic:0", replay=2), [2, 4]),
            (bus.subscribe("none", replay=9), []),
            (bus.subscribe("topic:0", replay=9, overflow="latest"), [4]),
        ]
        bus.publish(transport.message(6), topic="topic:1")
        for channel, expected in wanted:
            assert numbers(drain(bus, channel)) == expected
        assert numbers(drain(bus, early)) == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("size", [50, 6000])
def test_replayed_and_live_join_without_a_seam(children: Children, fork: BaseContext, size: int) -> None:
    """While another process publishes without pause, each new channel gets consecutive numbers."""
    with start_broadcaster(history=50) as bus:
        orders, theirs = fork.Pipe()
        publisher = children(fork, workers.publish_patterns, bus, theirs, "t", size)
        assert answer(orders) == "started"
        wait_until(lambda: bus.stats().published > 100)
        for turn in range(30):
            topics = [("t",), ("*",), (), ("t", "other")][turn % 4]
            with bus.subscribe(*topics, replay=1 + turn, capacity=500_000) as channel:
                first, _ = channel.recv(timeout=DEADLINE)
                for expected in range(first + 1, first + 120):
                    assert channel.recv(timeout=DEADLINE) == (expected, pattern(expected, size))
        last = bus.subscribe("t", replay=50)
        orders.send("stop")
        reading = Background(rest, last)
        count = answer(orders)
        finish(publisher)
        bus.unsubscribe(last)
        found = numbers(reading.result())
        assert found == list(range(found[0], count))


def test_own_messages_join_without_a_seam() -> None:
    """What a handle has published before it subscribes is replayed, also what the broker has not routed yet."""
    with start_broadcaster(history=10) as bus:
        published = 0
        for turn in range(26):
            count = turn % 13 + 1
            bus.publish_many(range(published, published + count))
            published += count
            channel = bus.subscribe(replay=10)
            bus.publish_many(range(published, published + 3))
            published += 3
            assert drain(bus, channel) == list(range(max(0, published - 13), published))


def test_what_waits_for_a_full_channel_comes_once() -> None:
    """What is held back by a full channel is not in the history yet: a new channel gets it live, once, in its order."""
    with start_broadcaster(history=1000) as bus:
        full = bus.subscribe("t", capacity=30_000)
        published = fill(bus, topic="t", timeout=0.2)
        late = bus.subscribe("t", replay=5)
        first = late.recv(timeout=DEADLINE)[0]
        reading = Background(take, full, len(published) + 1)
        bus.publish((len(published), b""), topic="t", timeout=DEADLINE)
        assert [number for number, _ in reading.result()] == [*published, len(published)]
        assert [number for number, _ in drain(bus, late)] == list(range(first + 1, len(published) + 1))


@pytest.mark.parametrize("overflow", ["block", "drop_oldest", "drop_newest", "disconnect"])
def test_a_replay_counts_as_published_and_is_cut_at_the_capacity(overflow: Policy) -> None:
    """It waits until it is in the pipe. Of more than the backlog takes the newest are kept, and one at the least; what is cut
    off is neither published nor missed."""
    with start_broadcaster(history=100) as bus:
        bus.publish_many(map(LONG.message, range(100)))
        channel = bus.subscribe(replay=100, capacity=20_000, overflow=overflow)
        row = only_subscriber(bus)
        assert (row.delivered, row.missed, bus.stats().published) == (0, 0, 100)
        assert 10 < row.published == row.waiting < 20
        assert 18_000 < row.waiting_bytes <= 20_000
        assert numbers(take(channel, row.published)) == list(range(100 - row.published, 100))
        wait_until(lambda: only_subscriber(bus).delivered == row.published)
        bus.publish(Size(50_000).message(100))
        assert drain(bus, channel) == [Size(50_000).message(100)]
        assert channel.missed == 0
        channel = bus.subscribe(replay=3, capacity=10_000, overflow=overflow)  # the last one is larger than the whole backlog
        assert only_subscriber(bus).published == 1
        bus.unsubscribe(channel)
        assert record(channel) == [("message", 100)]


def test_the_number_of_topics_is_bounded() -> None:
    """Of more than 4,096 topics those that were published to the longest ago are forgotten, and ``stats`` counts them."""
    with start_broadcaster(history=2) as bus:
        for number in (*range(4096), 0, *range(4096, 4106)):
            bus.publish(number, topic=f"topic {number}")
        bus.flush(timeout=DEADLINE)
        assert (bus.stats().history_topics, bus.stats().history_forgotten) == (4096, 10)
        channel = bus.subscribe("topic *", replay=10_000)
        assert drain(bus, channel) == [0, *range(11, 4096), 0, *range(4096, 4106)]
