"""Opening a handle or a channel in a task: awaited, entered with ``async with``, given to a task of its own, or cancelled."""

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable
from multiprocessing import Pipe
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, BrokerLost, Channel, ClosedError, Selector, TimedOut, aconnect, channel_to_selector
from tests.support.helpers import DEADLINE, wait_until
from tests.support.loops import IS_ALL, LOOPS, Cancelled, Loop, cancelled_at, made, uvloop_has_its_pipe

__all__ = ["uvloop_has_its_pipe"]

Bus = Broadcaster[Any]


@pytest.fixture(params=LOOPS if IS_ALL else [*LOOPS, "uvloop"])
def loop(request: pytest.FixtureRequest) -> Loop:
    return made(request.param)


def test_entered_and_awaited(loop: Loop, bus: Bus) -> None:
    """A handle and a channel can be entered at once, or awaited first: the end of the block closes them."""

    async def main() -> None:
        async with aconnect(bus.address) as handle, handle.asubscribe("room", with_topic=True) as channel:
            await handle.apublish(1, topic="room")
            assert await channel.arecv(DEADLINE) == ("room", 1)
        assert channel.closed
        assert handle.closed
        async with await aconnect(bus.address) as handle, await handle.asubscribe() as plain:
            await handle.apublish(2)
            assert await plain.arecv(DEADLINE) == 2
        assert plain.closed
        assert handle.closed
        with pytest.raises(ZeroDivisionError):
            async with bus.asubscribe() as plain:
                raise ZeroDivisionError
        assert plain.closed

    loop.run(main)
    assert not bus.stats().subscribers


def test_what_cannot_be_opened(loop: Loop, bus: Bus) -> None:
    """The error of the synchronous call comes from the await and from the block, and a second await is an error."""

    async def main() -> None:
        with pytest.raises(BrokerLost):
            await aconnect(bus.address + "-absent")
        with pytest.raises(BrokerLost):
            async with aconnect(bus.address + "-absent"):
                raise AssertionError
        with pytest.raises(ValueError, match="prefetch"):
            async with bus.asubscribe(prefetch=1):
                raise AssertionError
        opening = bus.asubscribe("room")
        async with opening:
            with pytest.raises(RuntimeError, match="already awaited"):
                await opening
            with pytest.raises(RuntimeError, match="already awaited"):
                async with opening:
                    raise AssertionError

    loop.run(main)


def test_tasks_of_their_own(bus: Bus) -> None:
    """What asks for a coroutine takes an opening."""

    async def main() -> None:
        channel = await asyncio.create_task(bus.asubscribe("a"))
        async with asyncio.TaskGroup() as group:
            task = group.create_task(bus.asubscribe("b"))
        handle, third = await asyncio.gather(aconnect(bus.address), asyncio.wait_for(bus.asubscribe("c"), DEADLINE))
        opening = bus.asubscribe("d")
        assert asyncio.iscoroutine(opening)
        assert "asubscribe" in repr(opening)
        opening.close()
        for one in (channel, task.result(), third, handle):
            await one.aclose()

    asyncio.run(main())


def test_started_by_trio(bus: Bus) -> None:
    trio = pytest.importorskip("trio")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bus.asubscribe, "room")

    trio.run(main)
    gc.collect()
    wait_until(lambda: not bus.stats().subscribers)


def test_never_awaited(bus: Bus) -> None:
    """The usual warning names the call, and nothing is left."""
    with pytest.warns(RuntimeWarning, match=r"Broadcaster\.asubscribe.* was never awaited"):
        bus.asubscribe("room")
    with pytest.warns(RuntimeWarning, match=r"aconnect.* was never awaited"):
        aconnect(bus.address)
    assert not bus.stats().subscribers


def test_cancelled_at_each_step(loop: Loop, bus: Bus) -> None:
    """It leaves no descriptor and no subscription."""
    bus.stats()
    before = psutil.Process().num_fds()
    others: set[int] = set()

    async def turn(number: int, open_one: Callable[[], Awaitable[Any]]) -> bool:
        came, outcome = await cancelled_at(loop, number, open_one)
        if not isinstance(outcome, BaseException):
            await outcome.aclose()
        return came

    async def each_step() -> None:
        others.add(psutil.Process().num_fds() - before)  # the loop's own
        for open_one in (lambda: aconnect(bus.address), lambda: bus.asubscribe("room")):
            number = 0
            while True:
                try:
                    came = await turn(number, open_one)
                except Cancelled:
                    came = True
                if not came:
                    break
                number += 1
        gc.collect()
        bus.stats()
        others.add(psutil.Process().num_fds() - before)

    loop.run(each_step)
    assert not bus.stats().subscribers
    assert max(others) - min(others) <= 1, others  # one more idle connection of the handle


def test_topics_of_a_channel(loop: Loop, bus: Bus) -> None:
    """They are added and dropped as by the synchronous calls, and take effect when the call has returned."""

    async def main() -> None:
        async with bus.asubscribe("a") as channel:
            await channel.asubscribe("b", "c*")
            await channel.aunsubscribe("a")
            for topic in ("a", "b", "cc"):
                await bus.apublish(topic, topic=topic)
            assert [await channel.arecv(DEADLINE) for _ in range(2)] == ["b", "cc"]
            with pytest.raises(ValueError, match="at least one topic"):
                await channel.asubscribe()
            with pytest.raises(ValueError, match="at least one topic"):
                await channel.aunsubscribe()
        with pytest.raises(ClosedError) as caught:
            await channel.asubscribe("d")
        assert caught.value.channel is channel

    loop.run(main)


def test_selector_receives(loop: Loop, bus: Bus) -> None:
    """``areceive`` returns what ``receive`` does, and times out; cancelled, it has received nothing."""

    async def main() -> None:
        ours, theirs = Pipe()
        with ours, theirs:
            async with bus.asubscribe("a") as channel, bus.asubscribe("b", overflow="latest") as newest:
                selector: Selector[Any] = channel_to_selector(channel).select(ours, lambda item: ("pipe", item)).select(newest)
                for timeout in (0, 0.01):
                    with pytest.raises(TimedOut, match=str(timeout)):
                        await selector.areceive(timeout)
                waiting = loop.start(selector.areceive)
                await loop.sleep(0.01)
                waiting.cancel()
                with pytest.raises(Cancelled):
                    await waiting.result()
                waiting = loop.start(selector.areceive)
                await bus.apublish(1, topic="a")
                assert await waiting.result() == 1
                theirs.send(2)
                assert await selector.areceive(DEADLINE) == ("pipe", 2)
                await bus.apublish(3, topic="b")
                await bus.aflush(DEADLINE, delivered=True)
                assert await selector.areceive(0) == 3
                await bus.aunsubscribe(channel)
                await bus.aunsubscribe(newest)
                theirs.close()
                with pytest.raises(EOFError):
                    await selector.areceive(DEADLINE)
                with pytest.raises(ValueError, match="timeout"):
                    await selector.areceive(-1)

    loop.run(main)


def test_no_warning_when_it_is_closed_unawaited(bus: Bus) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opening = bus.asubscribe("room")
        opening.close()
    channel: Channel[Any] = bus.subscribe("room")
    channel.close()
