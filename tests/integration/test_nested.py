"""Messages that receive, while they are unpickled, from the channel that they come from."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, ChannelBusy, channel_to_selector
from tests.support.helpers import DEADLINE, readable, wait_until
from tests.support.loops import LOOPS, made

Bus = Broadcaster[Any]
Receive = Callable[[Channel[Any]], Any]

# No call has a limit: one that waits hangs until the test's own limit.
WAYS: dict[str, Receive] = {
    "recv": lambda channel: channel.recv(),
    "recv_many": lambda channel: channel.recv_many(),
    "for": lambda channel: next(iter(channel)),
    "messages": lambda channel: next(iter(channel.messages())),
    "poll": lambda channel: channel.poll(None),
    "selector": lambda channel: channel_to_selector(channel).receive(),
    "arecv": lambda channel: asyncio.run(channel.arecv()),
    "arecv_many": lambda channel: asyncio.run(channel.arecv_many()),
    "async for": lambda channel: asyncio.run(_first(channel)),
    "async for of a selector": lambda channel: asyncio.run(_first(channel_to_selector(channel))),
}


class Now:
    """What the messages do."""

    channel: Channel[Any]
    receive: Receive


async def _first(source: Any) -> Any:
    return await anext(source)


class Receiver:
    """It receives the message behind it when it is unpickled."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getstate__(self) -> bytes:
        return bytes(self.size)

    def __setstate__(self, state: bytes) -> None:
        self.got = Now.receive(Now.channel)


@pytest.mark.parametrize(("size", "behind"), [(1, 0), (1 << 20, 3)])
@pytest.mark.parametrize("inner", WAYS)
@pytest.mark.parametrize("outer", ["recv", "recv_many", "selector"])
def test_the_inner_call_fails_at_once(outer: str, inner: str, size: int, behind: int, bus: Bus) -> None:
    """So the message fails as any that cannot be unpickled, and the next ones come."""
    Now.receive = WAYS[inner]
    with bus.subscribe() as channel:
        Now.channel = channel
        bus.publish_many([Receiver(size), *range(behind)])
        wait_until(lambda: readable(channel))
        with pytest.raises(RuntimeError) as raised:
            WAYS[outer](channel)
        assert isinstance(raised.value.__cause__, ChannelBusy)
        assert "is being unpickled" in str(raised.value.__cause__)
        bus.publish("last")
        assert [channel.recv(DEADLINE) for _ in range(behind + 1)] == [*range(behind), "last"]


@pytest.mark.parametrize("overflow", ["block", "latest"])
@pytest.mark.parametrize("name", LOOPS)
def test_in_a_task(name: str, overflow: Any, bus: Bus) -> None:
    """The same where the message arrives in a task."""
    Now.receive = WAYS["recv"]

    async def main() -> None:
        async with await bus.asubscribe(overflow=overflow) as channel:
            Now.channel = channel
            channel.poll(0)
            await bus.apublish(Receiver(1))
            with pytest.raises(RuntimeError) as raised:
                await channel.arecv(DEADLINE)
            assert isinstance(raised.value.__cause__, ChannelBusy)
            await bus.apublish("last")
            assert await channel.arecv(DEADLINE) == "last"

    made(name).run(main)


def test_of_another_channel(bus: Bus) -> None:
    """That is no business of this one."""
    Now.receive = WAYS["recv"]
    with bus.subscribe("outer") as outer, bus.subscribe("inner") as Now.channel:
        bus.publish("within", topic="inner")
        bus.publish(Receiver(1), topic="outer")
        assert outer.recv(DEADLINE).got == "within"
