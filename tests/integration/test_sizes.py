"""Messages of each size do the same, whatever route they take: the pipe, a ring, or memory of their own.

So they do in test_overflow.py, test_replay.py and test_flush_delivered.py.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, connect, start_broadcaster
from tests.support.helpers import DEADLINE, Background, Children, everything, finish, readable, take, wait_until
from tests.support.large_workers import (
    SIZES,
    ReaderProcess,
    Size,
    number_of,
    numbers,
    numbers_until_end,
    publish_back,
    receive_by,
)
from tests.support.workers import Boom, CannotBePickled, CannotBeUnpickled

Bus = Broadcaster[Any]
SMALL = SIZES["100"]


def nothing_is_held(bus: Bus) -> None:
    """Wait until the broker keeps nothing of what has been read."""
    wait_until(lambda: bus.stats().memory == 0)


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
            assert [number_of(message) for _, _, message in messages] == [position // 2 for _, position, _ in messages]
            orders.append([message[:2] for message in messages])
        assert orders[0] == orders[1]
        for name in ("bus", "other"):
            assert [position for source, position in orders[0] if source == name] == list(range(2 * count))
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


def test_block_loses_nothing(transport: Size, bus: Bus) -> None:
    """Publishing waits while a backlog is full, with ``publish`` and ``publish_many``; what had to wait too long has never been
    published, and all else comes."""
    capacity = max(7 * transport.charge // 2, 4 << 20 if transport.length > 1000 else 0)
    count = (capacity + (24 << 20)) // transport.length + 3000  # more than that takes, with the publisher's pipe and ring
    channel = bus.subscribe(capacity=capacity)
    channel.fileno()
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
        with contextlib.suppress(TimeoutError):
            bus.publish(transport.message(number), timeout=0)
            published.append(number)
    reading = Background(numbers_until_end, channel)
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    assert reading.result() == (published, "EOFError")


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


def test_each_call_that_receives(transport: Size, bus: Bus) -> None:
    """``recv_many``, ``async for``, an iteration, and a selector give messages of each size, whole and in order."""
    calls = ["recv_many", "for", "async for", "selector"]
    channels = [bus.subscribe(capacity=8 * transport.charge + (4 << 20)) for _ in calls]
    for channel in channels:
        channel.fileno()
    bus.publish_many(map(transport.message, range(5)))
    bus.flush()
    for channel, call in zip(channels, calls, strict=True):
        bus.unsubscribe(channel)
        received: list[Any] = []
        receive_by(call, channel, received.append)
        assert numbers(received) == list(range(5))


def test_messages_that_cannot_be_pickled_or_unpickled(transport: Size, bus: Bus) -> None:
    """They raise where they stand, ``sent`` counts those before, and the others come."""
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


def test_each_start_method(every_context: BaseContext, bus: Bus, children: Children) -> None:
    """A channel that is handed on unopened has what was published before; a child receives and publishes each size."""
    channel, back = bus.subscribe("there"), bus.subscribe("back")
    sizes = list(SIZES.values())
    for number, size in enumerate(sizes):
        bus.publish(size.message(number), topic="there")
    process = children(every_context, publish_back, bus, channel)
    for number, size in enumerate(sizes, len(sizes)):
        bus.publish(size.message(number), topic="there")
    messages = take(back, 2 * len(sizes))
    assert numbers(messages) == list(range(2 * len(sizes)))
    assert [len(data) for _, data in messages] == 2 * [size.length for size in sizes]
    bus.unsubscribe(channel)
    finish(process)
    back.close()


def test_close_drains(transport: Size, fork: BaseContext, children: Children) -> None:
    """Closing the broadcaster delivers what was published, and then there is a clean end."""
    with start_broadcaster() as bus:
        reader = ReaderProcess(bus.subscribe(), children, fork)
        bus.publish_many(map(transport.message, range(6)))
    assert reader.result() == (list(range(6)), "EOFError")


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
