"""Messages of each size do the same, whatever route they take: the pipe, a ring, or memory of their own."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import (
    Broadcaster,
    Channel,
    Selector,
    SubscriberStats,
    connect,
    start_broadcaster,
)
from mpbroadcast.validation import POLICIES, Policy
from tests.support import large_workers as workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    everything,
    finish,
    in_place,
    only_subscriber,
    readable,
    record,
    take,
    wait_until,
)
from tests.support.large_workers import SIZES, Size, number_of, numbers_until_end
from tests.support.workers import Boom, CannotBePickled, CannotBeUnpickled

Bus = Broadcaster[Any]
SMALL = SIZES["100"]


def numbers(messages: list[Any]) -> list[int]:
    """The numbers of messages that are whole."""
    return [number_of(message) for message in messages]


def nothing_is_held(bus: Bus) -> None:
    """The broker keeps nothing of what has been read."""
    wait_until(lambda: bus.stats().memory == 0)


def adds_up(row: SubscriberStats) -> SubscriberStats:
    """What holds for each subscription at each moment."""
    assert row.delivered + row.missed + row.waiting == row.published
    return row


def row_of(bus: Bus, topic: str) -> SubscriberStats:
    """The statistics of the subscription to this topic."""
    return adds_up(next(row for row in bus.stats().subscribers if row.topics == (topic,)))


# ------------------------------------------------------------------------------------------------------ order and topics


def test_one_order_for_all(transport: Size, bus: Bus) -> None:
    """Mixed with small messages, of several publishers: one order for all, first in first out for each of them."""
    count = 6

    def publish(handle: Bus, name: str) -> None:
        for number in range(count):
            handle.publish((name, 2 * number, transport.message(number)))
            handle.publish((name, 2 * number + 1, SMALL.message(number)))

    with bus.subscribe() as one, bus.subscribe() as two, connect(bus.address) as other:
        publishing = Background(publish, other, "other")
        publish(bus, "bus")
        publishing.result()
        orders = []
        for channel in (one, two):
            messages = take(channel, 4 * count)
            assert [number_of(message) for _, _, message in messages] == [place // 2 for _, place, _ in messages]
            orders.append([(name, place) for name, place, _ in messages])
        assert orders[0] == orders[1]
        for name in ("bus", "other"):
            assert [place for who, place in orders[0] if who == name] == list(range(2 * count))
        nothing_is_held(bus)


def test_topics_patterns_and_exclusion(transport: Size, bus: Bus) -> None:
    """Each channel gets what matches its topics, once, and not what excludes it; ``with_topic`` gives the one that matched."""
    with (
        bus.subscribe() as all_of_it,
        bus.subscribe("room:1") as one_room,
        bus.subscribe("room:*", "room:[0-9]", with_topic=True) as rooms,
    ):
        for number, topic in enumerate(["room:1", "room:2", "hall", "", "room:1"]):
            bus.publish(transport.message(number), topic=topic)
        bus.publish(transport.message(5), topic="room:1", exclude=rooms)
        bus.publish_many([transport.message(6), transport.message(7)], topic="room:1", exclude=all_of_it)
        received = everything(bus, rooms)
        assert [(topic, number_of(message)) for topic, message in received] == [
            ("room:1", 0), ("room:2", 1), ("room:1", 4), ("room:1", 6), ("room:1", 7),
        ]  # fmt: skip
        assert numbers(everything(bus, one_room)) == [0, 4, 5, 6, 7]
        assert numbers(everything(bus, all_of_it)) == [0, 1, 2, 3, 4, 5]


def test_replay(transport: Size) -> None:
    """A broker with a history replays messages of each size, in order, and what comes next follows without a gap."""
    with start_broadcaster(history=4) as bus:
        early = bus.subscribe()
        for number in range(6):
            bus.publish(transport.message(number), topic=f"topic:{number % 2}")
        late, latest = bus.subscribe(replay=5), bus.subscribe("topic:0", replay=9, overflow="latest")
        bus.publish(transport.message(6), topic="topic:1")
        assert numbers(everything(bus, late)) == [1, 2, 3, 4, 5, 6]
        assert numbers(everything(bus, latest)) == [4]
        assert numbers(everything(bus, early)) == list(range(7))
        again = bus.subscribe("topic:0", replay=9)
        assert numbers(everything(bus, again)) == [0, 2, 4]


# -------------------------------------------------------------------------------------------------------------- overflow


def capacity_for(size: Size) -> int:
    """One that takes at least three messages; where it can be done, one with which messages go in shared memory."""
    return max(7 * size.charge // 2, 4 << 20 if size.length > 1000 else 0)


WARM = 6


def warm_up(bus: Bus, channel: Channel[Any], topic: str = "") -> None:
    """Let so many messages through one by one, so that the next ones may go in shared memory, where there is some."""
    for number in range(WARM):
        bus.publish(Size(5000).message(number), topic=topic)
        assert number_of(channel.recv(timeout=DEADLINE)) == number
        bus.flush()


def far_too_many(size: Size) -> int:
    """How many messages are more than that capacity takes, with the publisher's pipe and ring before it."""
    return (capacity_for(size) + (24 << 20)) // size.length + 3000


@pytest.mark.parametrize("policy", POLICIES)
def test_overflow_counts_exactly(policy: Policy, transport: Size, bus: Bus) -> None:
    """For who does not read: delivered, missed and waiting are what was published, gaps are in their places, and the capacity
    counts the messages' real bytes, wherever these are."""
    capacity = capacity_for(transport)
    fitting = capacity // transport.charge
    channel = bus.subscribe("topic", overflow=policy, capacity=capacity)
    warm_up(bus, channel, "topic")
    count = fitting * 3 // 2 + 30
    publishing = Background(bus.publish_many, map(transport.message, range(count)), topic="topic")
    if policy == "block":
        row = wait_until(lambda: row_of(bus, "topic").stalls and row_of(bus, "topic"))
    else:
        publishing.result()
        bus.flush(timeout=DEADLINE)
        rows = bus.stats().subscribers
        row = adds_up(rows[0]) if rows else None
    if policy == "disconnect":
        assert row is None
    else:
        kept = row.delivered + row.waiting - WARM
        assert row.waiting_bytes <= capacity
        if policy == "latest":
            assert kept <= 2
        else:
            assert fitting // 2 <= kept <= capacity // transport.length
        assert row.missed == (0 if policy == "block" else count - kept)
    reading = Background(record, channel)
    if policy != "disconnect":
        publishing.result()
        bus.flush(timeout=DEADLINE)
        bus.unsubscribe(channel)
    events = reading.result()
    received = [number for kind, number in events if kind == "message"]
    if policy == "block":
        assert events == [("message", number) for number in range(count)]
    elif policy == "disconnect":
        assert events[-1] == ("overflowed", 0)
        assert received == list(range(len(received)))
        assert fitting // 2 <= len(received) <= capacity // transport.length
    else:
        assert len(received) == kept
        assert channel.missed == count - kept > 0
        if policy == "latest":
            assert received[-1] == count - 1
        else:
            assert in_place(events)[1] == count
    channel.close()
    nothing_is_held(bus)


def test_block_loses_nothing(transport: Size, bus: Bus) -> None:
    """Publishing waits while a backlog is full, with ``publish`` and ``publish_many``; what had to wait too long has never been
    published, and all else comes."""
    count = far_too_many(transport)
    channel = bus.subscribe(capacity=capacity_for(transport))
    warm_up(bus, channel)
    bus.publish(transport.message(0), timeout=DEADLINE)
    with pytest.raises(TimeoutError) as caught:
        bus.publish_many(map(transport.message, range(1, count)), timeout=0.1)
    sent: int = 1 + caught.value.sent  # type: ignore[attr-defined]
    assert sent < count
    for timeout in (0, 0.02):
        with contextlib.suppress(TimeoutError):
            while sent < count:
                bus.publish(transport.message(sent), timeout=timeout)
                sent += 1
        assert sent < count
    waiting = Background(lambda: bus.publish(transport.message(sent)))
    assert numbers(take(channel, sent)) == list(range(sent))
    waiting.result()
    published = [sent]
    for number in range(sent + 1, sent + 20):  # without waiting, each is published whole or not at all
        try:
            bus.publish(transport.message(number), timeout=0)
        except TimeoutError:
            continue
        published.append(number)
    reading = Background(numbers_until_end, channel)
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    assert reading.result() == (published, "EOFError")


def test_one_that_is_larger_than_the_capacity(transport: Size, bus: Bus) -> None:
    """It passes when nothing else is there, under each policy; under ``block`` the next one waits until it has been read."""
    for policy in POLICIES:
        with bus.subscribe(policy, overflow=policy, capacity=transport.length // 2) as channel:
            channel.fileno()
            if policy == "block":
                publishing = Background(bus.publish_many, map(transport.message, range(3)), topic=policy)
                wait_until(lambda: row_of(bus, "block").stalls)
                assert row_of(bus, policy).published == 1
                assert numbers(take(channel, 3)) == [0, 1, 2]
                publishing.result()
            else:
                for number in range(3):
                    bus.publish(transport.message(number), topic=policy)
                    assert number_of(channel.recv(timeout=DEADLINE)) == number
            assert not channel.poll(0)
    nothing_is_held(bus)


def test_flush_until_delivered(transport: Size, bus: Bus) -> None:
    """``flush(delivered=True)`` waits while a message of any size is in a backlog, and not for longer."""
    channel = bus.subscribe()
    for number in range(3):
        bus.publish(transport.message(number))
    with pytest.raises(TimeoutError):
        bus.flush(0.02, delivered=True)
    flushing = Background(lambda: bus.flush(DEADLINE, delivered=True))
    assert numbers(take(channel, 3)) == [0, 1, 2]
    flushing.result()
    row = adds_up(only_subscriber(bus))
    assert (row.published, row.delivered, row.waiting, row.waiting_bytes) == (3, 3, 0, 0)
    nothing_is_held(bus)
    channel.close()


# ------------------------------------------------------------------------------------------------------------- receiving


def test_the_descriptor_is_honest(transport: Size, bus: Bus) -> None:
    """The descriptor is readable as long as there is something to receive, and quiet afterwards; again and again."""
    with bus.subscribe() as channel:
        assert not readable(channel)
        for _ in range(2):
            for number in range(3):
                bus.publish(transport.message(number))
            bus.flush()
            for number in range(3):
                wait_until(lambda: readable(channel))
                assert channel.poll(DEADLINE)
                assert readable(channel)
                assert number_of(channel.recv(timeout=DEADLINE)) == number
                if number < 2:
                    assert channel.poll(DEADLINE)
                    assert readable(channel)
            wait_until(lambda: not channel.poll(0) and not readable(channel))
            with pytest.raises(TimeoutError):
                channel.recv(timeout=0)
        nothing_is_held(bus)


def test_each_way_to_receive(transport: Size, bus: Bus) -> None:
    """``recv_many``, ``async for``, an iteration, and a selector give messages of each size, whole and in order."""
    channels: list[Channel[Any]] = [bus.subscribe(capacity=8 * transport.charge + (4 << 20)) for _ in range(4)]
    for channel in channels:
        channel.fileno()
    bus.publish_many(transport.message(number) for number in range(5))
    bus.flush()
    for channel in channels:
        bus.unsubscribe(channel)
    many, iterated, in_loop, selected = channels

    got: list[Any] = []
    with contextlib.suppress(EOFError):
        while True:
            got += many.recv_many(limit=2, timeout=DEADLINE)
    assert numbers(got) == list(range(5))
    assert numbers(list(iterated)) == list(range(5))

    async def collect() -> list[int]:
        return [number_of(message) async for message in in_loop]

    assert asyncio.run(collect()) == list(range(5))
    selector: Selector[int] = Selector()
    selector.select(selected, number_of)
    assert [selector.receive(timeout=DEADLINE) for _ in range(5)] == list(range(5))
    with pytest.raises(EOFError):
        selector.receive(timeout=DEADLINE)


def test_messages_that_cannot_be_pickled_or_unpickled(transport: Size, bus: Bus) -> None:
    """They raise in their places, ``sent`` counts those before, and the others come."""
    with bus.subscribe() as channel, bus.subscribe() as other:
        with pytest.raises(Boom):
            bus.publish((transport.message(9), CannotBePickled()))
        with pytest.raises(Boom) as caught:
            bus.publish_many([*map(transport.message, (0, 1)), (transport.message(9), CannotBePickled()), transport.message(9)])
        assert caught.value.sent == 2  # type: ignore[attr-defined]
        bus.publish((transport.message(9), CannotBeUnpickled()))
        bus.publish(transport.message(2))
        bus.flush()
        for each in (channel, other):
            assert numbers(take(each, 2)) == [0, 1]
            with pytest.raises(Boom):
                each.recv(timeout=DEADLINE)
            assert number_of(each.recv(timeout=DEADLINE)) == 2
        del caught
        nothing_is_held(bus)


# ------------------------------------------------------------------------------------------------- processes, ends, deaths


def test_each_start_method(every_context: BaseContext, bus: Bus, children: Children) -> None:
    """A channel that is handed on unopened has what was published before; a child receives and publishes each size."""
    channel, back = bus.subscribe("there"), bus.subscribe("back")
    sizes = list(SIZES.values())
    for number, size in enumerate(sizes):
        bus.publish(size.message(number), topic="there")
    process = children(every_context, workers.publish_back, bus, channel)
    for number, size in enumerate(sizes, len(sizes)):
        bus.publish(size.message(number), topic="there")
    messages = take(back, 2 * len(sizes))
    assert numbers(messages) == list(range(2 * len(sizes)))
    assert [len(data) for _, data in messages] == 2 * [size.length for size in sizes]
    bus.unsubscribe(channel)
    finish(process)
    back.close()


def test_close_drains(transport: Size, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]) -> None:
    """Closing the broadcaster delivers what is on its way, and then there is a clean end."""
    bus = start_broadcaster()
    channel = bus.subscribe()
    process = children(fork, workers.report_numbers, channel, pipe[1])
    assert answer(pipe[0]) == "open"
    for number in range(6):
        bus.publish(transport.message(number))
    bus.close(timeout=DEADLINE)
    assert answer(pipe[0]) == (list(range(6)), "EOFError")
    finish(process)


SHORT_PIPES = """
import multiprocessing, select
select.PIPE_BUF = 512
from mpbroadcast import start_broadcaster

with start_broadcaster(context=multiprocessing.get_context("fork")) as bus, bus.subscribe(with_topic=True) as channel:
    for length in (0, 1, 200, 270, 400, 500, 1024):
        for size in (1, 100, 200, 230, 300):
            sent = "t" * length, bytes(size)
            bus.publish(sent[1], topic=sent[0])
            assert channel.recv(timeout=10) == sent
"""


def test_where_a_pipe_takes_512_bytes_at_once() -> None:
    """A write is atomic there, too, and within what the broker takes, also with a topic that is longer than that."""
    command = [sys.executable, "-W", "ignore", "-c", SHORT_PIPES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
