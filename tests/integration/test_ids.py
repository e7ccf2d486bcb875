"""Message ids: the same in every channel, growing, also over a restart of the broker; and resuming behind one."""

import contextlib
import os
import signal
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerRestarted, connect, start_broadcaster
from tests.support.helpers import DEADLINE, Background, everything
from tests.support.large_workers import Size, numbers


def publish_numbers(bus: Broadcaster[Any], size: Size, first: int) -> None:
    """Publish 30 messages, to three topics in turn."""
    for number in range(first, first + 30):
        bus.publish(size.message(number), topic=f"topic:{number % 3}")
    bus.flush(DEADLINE)


def test_an_id_is_the_same_in_each_channel_and_grows(transport: Size) -> None:
    """Of two publishers, each channel gets ids in the one order, whatever its topics, its form and its policy."""
    with start_broadcaster() as bus, connect(bus.address) as other:
        everyone = bus.subscribe(with_id=True, capacity=1 << 30)
        others = {
            bus.subscribe("topic:0", with_id=True, capacity=1 << 30): {"topic:0"},
            bus.subscribe("*:1", "topic:2", with_id=True, with_topic=True, overflow="drop_oldest", capacity=1 << 30): {
                "topic:1",
                "topic:2",
            },
            bus.subscribe("topic:*", with_id=True, overflow="drop_newest", capacity=1 << 30): {"topic:0", "topic:1", "topic:2"},
        }
        publishing = [Background(publish_numbers, handle, transport, 1000 * index) for index, handle in enumerate((bus, other))]
        for one in publishing:
            one.result()
        received = everything(bus, everyone)
        assert sorted(numbers(one.message for one in received)) == [*range(30), *range(1000, 1030)]
        ids = [one.id for one in received]
        assert ids == sorted({*ids})
        assert 0 < ids[0] < ids[-1] < 2**53
        for channel, topics in others.items():
            assert everything(bus, channel) == [one for one in received if one.topic in topics]


def test_ids_grow_from_a_broker_to_the_one_that_takes_over() -> None:
    """Each of several brokers that follow each other begins above all that those before it have given out."""
    with start_broadcaster(restart=True) as bus:
        channel = bus.subscribe("t", with_id=True)
        ids: list[int] = []
        for count in (1, 200, 3, 2):
            bus.publish_many(range(count), topic="t")
            ids += [channel.recv(DEADLINE).id for _ in range(count)]
            os.kill(bus.stats().pid, signal.SIGKILL)
            with pytest.raises(BrokerRestarted):
                channel.recv(DEADLINE)
            with contextlib.suppress(BrokerRestarted):
                bus.flush(DEADLINE)
        assert ids == sorted({*ids})
        assert ids[-1] < 2**53
