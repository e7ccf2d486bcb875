"""Messages of each size do the same, whatever route they take: the pipe, a ring, or memory of their own.

So they do in test_overflow.py, test_replay.py and test_flush_delivered.py.
"""

from __future__ import annotations

import contextlib
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, connect, start_broadcaster
from tests.support.helpers import DEADLINE, Background, Children, take, wait_until
from tests.support.large_workers import SIZES, ReaderProcess, Size, number_of, numbers, numbers_until_end
from tests.support.victims import Program
from tests.support.workers import Boom, CannotBePickled, CannotBeUnpickled

Bus = Broadcaster[Any]
SMALL = SIZES["100"]


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
        wait_until(lambda: bus.stats().memory == 0)


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
        wait_until(lambda: bus.stats().memory == 0)


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
    with Program("-W", "ignore", "-c", SHORT_PIPES) as program:
        assert program.end()[0] == 0
