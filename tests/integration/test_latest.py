"""``latest``: each receive that may wait returns the newest message that was routed when it was called, or a later one."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import numpy
import pytest

from mpbroadcast import Broadcaster, BrokerRestarted, Channel, Selector, TimedOut, channel_to_selector, start_broadcaster
from tests.support.helpers import DEADLINE, kill_broker, readable, stopped, wait_until
from tests.support.loops import LOOPS, made

Bus = Broadcaster[Any]


async def _first(source: Any) -> Any:
    return await anext(source)


SYNC: dict[str, Callable[[Channel[Any]], Any]] = {
    "recv": lambda channel: channel.recv(DEADLINE),
    "recv without a limit": lambda channel: channel.recv(),
    "recv_many": lambda channel: channel.recv_many(None, DEADLINE)[-1],
    "for": lambda channel: next(iter(channel)),
    "messages": lambda channel: next(iter(channel.messages())),
    "selector": lambda channel: channel_to_selector(channel).receive(DEADLINE),
}
TASKS: dict[str, Callable[[Channel[Any]], Awaitable[Any]]] = {
    "arecv": lambda channel: channel.arecv(DEADLINE),
    "arecv_many": lambda channel: channel.arecv_many(None, DEADLINE),
    "async for": _first,
    "async for of a selector": lambda channel: _first(channel_to_selector(channel)),
}


def behind(bus: Bus, channel: Channel[Any], last: int = 9, size: int = 0) -> None:
    """Let the first message be in the pipe of a channel, and the others, up to ``last``, be routed behind it."""
    bus.publish((0, bytes(size)))
    wait_until(lambda: readable(channel))
    for number in range(1, last + 1):
        bus.publish((number, bytes(size)))
    bus.flush()


@pytest.mark.parametrize("size", [0, 3000, 20_000, 3 << 20])
@pytest.mark.parametrize("call", SYNC)
def test_a_receive_returns_the_newest(call: str, size: int, bus: Bus) -> None:
    """Whatever was in the pipe before, and of whatever size; what was passed over is counted."""
    with bus.subscribe(overflow="latest") as channel:
        for _ in range(3):
            before = channel.missed
            behind(bus, channel, 9, size)
            number, data = SYNC[call](channel)
            assert (number, len(data), channel.missed - before) == (9, size, 9)
            with pytest.raises(TimedOut):
                channel.recv(0)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("call", TASKS)
def test_a_receive_in_a_task_returns_the_newest(call: str, name: str, bus: Bus) -> None:
    """The same in tasks."""

    async def main() -> None:
        async with await bus.asubscribe(overflow="latest") as channel:
            channel.poll(0)
            for _ in range(3):
                await bus.apublish((0, b""))
                wait_until(lambda: readable(channel))
                for number in range(1, 10):
                    await bus.apublish((number, b""))
                await bus.aflush()
                got = await TASKS[call](channel)
                assert (got[-1] if isinstance(got, list) else got) == (9, b"")

    made(name).run(main)


def test_a_call_that_does_not_wait_returns_what_is_there(bus: Bus) -> None:
    """With ``timeout=0``, that is the message in the pipe, also by a selector; the newest follows."""
    with bus.subscribe(overflow="latest") as channel:
        selector = channel_to_selector(channel)
        for receive in (channel.recv, lambda timeout: channel.recv_many(1, timeout)[0], selector.receive):
            behind(bus, channel)
            assert receive(0)[0] == 0
            assert receive(DEADLINE)[0] == 9


def test_the_descriptor_is_readable_while_there_is_something(bus: Bus) -> None:
    """Before a message is taken it is, and behind the newest it is not."""
    with bus.subscribe(overflow="latest") as channel:
        behind(bus, channel)
        assert channel.poll(0)
        assert readable(channel)
        assert channel.recv()[0] == 9
        assert not readable(channel)
        behind(bus, channel)
        assert channel.recv(0)[0] == 0
        wait_until(lambda: readable(channel))
        assert channel.recv(0)[0] == 9


@pytest.mark.parametrize("timeout", [None, 0.02, DEADLINE])
def test_a_stopped_broker_does_not_hold_up_what_has_arrived(timeout: float | None, bus: Bus) -> None:
    """The message at hand is returned then, by each kind of call."""
    pid = bus.stats().pid
    with bus.subscribe(overflow="latest") as channel:
        selector: Selector[Any] = channel_to_selector(channel)
        for receive in (channel.recv, lambda limit: asyncio.run(channel.arecv(limit)), selector.receive):
            behind(bus, channel)
            with stopped(pid):
                assert receive(timeout)[0] == 0
            assert receive(DEADLINE)[0] == 9


def test_what_has_arrived_is_received_when_the_broker_is_lost(bus: Bus) -> None:
    """Also where something newer was in the broker, which died with it."""
    with start_broadcaster() as other, other.subscribe(overflow="latest") as channel:
        behind(other, channel)
        os.kill(other.stats().pid, signal.SIGKILL)
        assert channel.recv(DEADLINE)[0] == 0
        with pytest.raises(ConnectionError):
            channel.recv(DEADLINE)


def test_it_is_so_behind_a_restart() -> None:
    """The next broker is asked as the one before."""
    with start_broadcaster(restart=True) as bus, bus.subscribe(overflow="latest") as channel:
        behind(bus, channel)
        kill_broker(bus)
        assert channel.recv(DEADLINE)[0] == 0
        with pytest.raises(BrokerRestarted):
            channel.recv(DEADLINE)
        for number in range(3):
            bus.publish(number)
        with pytest.raises(BrokerRestarted):
            bus.flush()
        assert channel.recv(DEADLINE) == 2


def test_an_array_is_the_newest(bus: Bus) -> None:
    """Arrays, which are mapped, are superseded, too."""
    with bus.subscribe(overflow="latest") as channel:
        bus.publish(numpy.zeros(1 << 20))
        wait_until(lambda: readable(channel))
        for number in range(1, 5):
            bus.publish(numpy.full(1 << 20, number))
        bus.flush()
        assert channel.recv()[0] == 4
