"""Messages of each size do the same, whatever route they take: the pipe, a ring, or memory of their own. So they do in
test_overflow.py, test_replay.py and test_flush_delivered.py."""

from typing import Any

import pytest

from mpbroadcast import Broadcaster, connect
from tests.support.helpers import DEADLINE, Background, take, wait_until
from tests.support.large_workers import SIZES, Size, number_of, numbers
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
