"""Sessions of bridges with real brokers: messages copied from one bus to another, in this process, without an engine."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from mpbroadcast import Broadcaster, start_broadcaster
from tests.support.bridging import STREAM, at_work, copied, hold, soon
from tests.support.helpers import DEADLINE, Children, Pipe, answer, take, wait_until
from tests.support.large_workers import Size, number_of

Bus = Broadcaster[Any]


@pytest.fixture
def other(leaves_nothing: None) -> Iterator[Bus]:
    """Another bus, as of another machine."""
    broadcaster: Bus = start_broadcaster()
    yield broadcaster
    broadcaster.close(timeout=2.0)


def test_messages_go_from_bus_to_bus(bus: Bus, other: Bus, transport: Size) -> None:
    """What is published to the topics arrives once, in order, however often it is handed on, and goes back over no bridge."""
    channel, local = other.subscribe("a*", with_topic=True), bus.subscribe()

    async def bridge() -> None:
        async with at_work(bus, topics=["a*", "b"]) as (here, state), at_work(other, topics=["a*"]) as (there, _):
            for number in range(6):
                bus.publish(transport.message(number), topic=("a1", "a2", "other")[number % 3])
            bus.flush(DEADLINE)
            assert await soon(here.target()) == 4
            end = 0
            while end <= 4:
                first, messages, end = await soon(here.take())
                for _ in range(2):
                    await soon(there.route(state.origin, state.incarnation, first, messages))
                here.acknowledge(end - 1)
            wait_until(lambda: bus.bridge_flushed(STREAM) == (4, 4))
            assert bus.stats().bridges[STREAM].sent == 4
            wait_until(lambda: other.stats().bridges[STREAM].duplicates == 4)
            assert other.stats().bridges[STREAM].received == 4
            assert other.bridge_flushed(STREAM) == (0, 0)

    asyncio.run(bridge())
    assert [(topic, number_of(message)) for topic, message in take(channel, 4)] == [("a1", 0), ("a2", 1), ("a1", 3), ("a2", 4)]
    assert not channel.poll()
    assert [number_of(message) for message in take(local, 6)] == [*range(6)]
    assert bus.stats().bridges == other.stats().bridges == {}


def test_a_killed_session_loses_nothing(
    bus: Bus, other: Bus, children: Children, fork: Any, pipe: Pipe, transport: Size
) -> None:
    """The next one, which stands by, is given all that the killed one has taken and not acknowledged."""
    channel = other.subscribe()
    process = children(fork, hold, bus, pipe[1], 1, {})
    assert answer(pipe[0])[0] == "turn"

    async def bridge() -> None:
        session = bus.bridge_session(STREAM)
        turn = asyncio.ensure_future(session.turn())
        for number in range(5):
            bus.publish(transport.message(number))
        assert (await asyncio.to_thread(answer, pipe[0]))[:2] == ("took", 1)
        assert not turn.done()
        assert bus.stats().bridges[STREAM].pid == process.pid
        process.kill()
        state = await soon(turn)
        async with at_work(other) as (there, _):
            await copied(session, state, there, 5)
            wait_until(lambda: bus.stats().bridges[STREAM].sent == 5)
            await session.end(forget=False)
            assert bus.stats().bridges[STREAM].state == "down"

    asyncio.run(bridge())
    assert [number_of(message) for message in take(channel, 5)] == [*range(5)]
    assert not channel.poll()
    with contextlib.suppress(ValueError):
        bus.bridge_session(STREAM, topics=["other"])
        raise AssertionError
    assert bus.forget_bridge(STREAM)
    assert not bus.forget_bridge(STREAM)
