"""Calls in tasks of asyncio, uvloop and trio: what they give, and what is left when one is cancelled at any of its steps."""

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import (
    Broadcaster,
    BroadcastError,
    BrokerLost,
    BrokerRestarted,
    ChannelBusy,
    ClosedError,
    Lagged,
    Selector,
    TimedOut,
    channel_to_selector,
    connect,
    start_broadcaster,
)
from tests.support import victims, workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    Pipe,
    answer,
    fill,
    finish,
    kill_broker,
    pattern,
    stopped,
    take,
)
from tests.support.large_workers import descriptors_left, limited
from tests.support.loops import IS_ALL, LOOPS, Cancelled, Loop, made, uvloop_has_its_pipe

__all__ = ["uvloop_has_its_pipe"]

Bus = Broadcaster[Any]
ENOUGH = 8192  # descriptors for a thousand channels, in the process and in its broker
SIZES = [100, 60_000, 3 << 20]  # bytes of messages in the pipe, in a ring, and in memory of their own


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Loop:
    return made(request.param)


async def given(iterator: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in iterator]


@pytest.mark.parametrize("size", SIZES)
def test_each_call(loop: Loop, bus: Bus, size: int) -> None:
    """Each does what its synchronous sibling does."""

    async def main() -> None:
        handle: Bus = connect(bus.address)
        async with handle, await handle.asubscribe("t", "end", with_topic=True) as channel:
            await handle.await_for_subscribers(1, topic="t", timeout=DEADLINE)
            await handle.apublish(pattern(1, size), topic="t")
            assert await channel.arecv() == ("t", pattern(1, size))
            several = [pattern(2, length) for length in (size, 0, 5000, size)]
            assert await handle.apublish_many(several, topic="t", timeout=DEADLINE) == 4
            received: list[Any] = []
            while len(received) < 4:
                received += await channel.arecv_many(3, DEADLINE)
            assert received == [("t", message) for message in several]
            await handle.apublish("not for it", topic="t", exclude=channel)
            await handle.aflush(DEADLINE, delivered=True)
            assert (await handle.astats()).subscribers[0].delivered == 5
            with pytest.raises(TimedOut):
                await channel.arecv(timeout=0)
            with pytest.raises(TimedOut):
                await channel.arecv_many(timeout=0.01)
            with pytest.raises(TimedOut):
                await handle.await_for_subscribers(2, timeout=0.01)
            await handle.apublish_many(range(200), topic="end")
            await handle.aunsubscribe(channel)
            assert await given(channel) == [("end", number) for number in range(200)]
            with pytest.raises(EOFError):
                await channel.arecv()
            for call in (channel.aclose, channel.aclose, handle.aclose):
                await call()
        assert channel.closed
        assert handle.closed
        with pytest.raises(ClosedError):
            await channel.arecv()
        with pytest.raises(ClosedError):
            await handle.apublish(1)

    threads = threading.active_count()
    loop.run(main)
    assert threading.active_count() == threads


def test_wrong_arguments(loop: Loop, bus: Bus) -> None:
    """Raise the errors of the synchronous calls, at once."""

    async def main() -> None:
        channel = bus.subscribe()
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: bus.apublish(1, timeout=-1),
            lambda: bus.apublish(1, topic="\0"),
            lambda: bus.asubscribe(capacity=0),
            lambda: bus.aflush(-1),
            lambda: bus.await_for_subscribers(-1),
            lambda: channel.arecv(-1),
            lambda: channel.arecv_many(0),
            lambda: bus.aclose(-1),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"must be|NUL"):
                await call()
        with pytest.raises(workers.Boom):
            await bus.apublish(workers.CannotBePickled())
        with pytest.raises(workers.Boom) as raised:
            await bus.apublish_many([1, 2, workers.CannotBePickled()])
        assert raised.value.sent == 2  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="timeout") as wrong:
            await bus.apublish_many([0], timeout=-1)
        assert wrong.value.sent == 0  # type: ignore[attr-defined]
        assert take(channel, 2) == [1, 2]

    loop.run(main)


def test_the_starter_ends_its_broker(loop: Loop) -> None:
    """``aclose`` drains, and the loop runs on meanwhile; a broker that is stopped does not block it."""

    async def main() -> None:
        bus = start_broadcaster()
        channel = await bus.asubscribe()
        await bus.apublish_many(range(1000))
        closing = loop.start(bus.aclose)
        assert await given(channel) == [*range(1000)]
        await closing.result()
        bus = start_broadcaster()
        os.kill(bus.stats().pid, signal.SIGSTOP)
        closing = loop.start(lambda: bus.aclose(0.2))
        for _ in range(10):
            await loop.sleep(0.001)
        await closing.result()
        await channel.aclose()

    loop.run(main)


def test_less_time_for_the_end(loop: Loop, fork: BaseContext, children: Children, pipe: Pipe) -> None:
    """``close`` behind a cancelled ``aclose`` has its own timeout, though the broker drains already."""
    bus = start_broadcaster()
    other = connect(bus.address)
    reader = children(fork, victims.slow_reader, bus.subscribe(), pipe[1], None)
    assert answer(pipe[0]) == "open"
    bus.publish_many((number, bytes(1900)) for number in range(1000))

    async def main() -> None:
        closing = loop.start(lambda: bus.aclose(None))
        with contextlib.suppress(BrokerLost):
            while True:  # until the broker has the request
                other.publish((0, b""))
                await loop.sleep(0.01)
        closing.cancel()
        with pytest.raises(Cancelled):
            await closing.result()

    loop.run(main)
    Background(bus.close, 0.1).result()
    other.close()
    pipe[0].send("go on")
    assert answer(pipe[0])[1] == BrokerLost.__name__
    finish(reader)


def test_selectors(loop: Loop, bus: Bus) -> None:
    """Give what comes from each source until none is left. An error leaves the loop, and the next one goes on behind it."""
    slow, other = bus.subscribe("a", overflow="drop_oldest", capacity=1), bus.subscribe("b")
    selector: Selector[Any] = Selector[Any]().select(slow, lambda item: ("slow", item)).select(other)
    for number in range(300):
        bus.publish((number, bytes(3000)), topic="a")
    bus.publish("other", topic="b")
    for channel in (slow, other):
        bus.unsubscribe(channel)

    async def main() -> list[Any]:
        found: list[Any] = []
        while True:
            try:
                async for item in selector:
                    found.append(item)
                return found
            except Lagged as error:
                found.append(error.missed)

    found = loop.run(main)
    gaps = [item for item in found if isinstance(item, int)]
    assert found.count("other") == 1
    assert len(found) - len(gaps) - 1 + sum(gaps) == 300
    assert gaps
    assert [*selector] == []


def test_a_selector_waits_for_all_kinds(loop: Loop, bus: Bus) -> None:
    """It is woken by the one that has something; a channel that is closed meanwhile is removed."""
    ours, theirs = multiprocessing.Pipe()

    async def main() -> None:
        first, second = bus.subscribe("1"), bus.subscribe("2")
        selector: Selector[Any] = Selector[Any]().select(first).select(ours).select(second)
        for send, value in [
            (lambda: theirs.send("by a connection"), "by a connection"),
            (lambda: bus.publish("by a channel", topic="2"), "by a channel"),
        ]:
            waiting = loop.start(lambda: anext(selector))
            await loop.sleep(0.01)
            assert isinstance((await outcome(first.arecv(0))), ChannelBusy)
            send()
            assert await waiting.result() == value
        waiting = loop.start(lambda: given(selector))
        await loop.sleep(0.01)
        first.close()
        second.close()
        theirs.close()
        assert await waiting.result() == []

    with ours, theirs:
        loop.run(main)


async def outcome(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except Exception as error:
        return error


def test_one_task_at_a_time_receives(loop: Loop, bus: Bus) -> None:
    """A second one, and a synchronous call, get ``ChannelBusy`` at once; the first goes on. Afterwards all can receive."""

    async def main() -> None:
        channel = bus.subscribe()
        for first in (channel.arecv, channel.arecv_many, lambda: anext(channel)):
            waiting = loop.start(first)
            await loop.sleep(0.005)
            for second in (channel.arecv, lambda: channel.arecv(0), channel.arecv_many, lambda: anext(channel)):
                error = await outcome(second())
                assert isinstance(error, ChannelBusy)
                assert isinstance(error, BroadcastError)
                assert isinstance(error, RuntimeError)
                assert error.channel is channel
            for call in (channel.recv, channel.recv_many):
                with pytest.raises(ChannelBusy):
                    call(timeout=0)
            bus.publish(1)
            assert await waiting.result() in (1, [1])
        bus.publish_many([2, 3])
        assert (await channel.arecv(DEADLINE), channel.recv(DEADLINE)) == (2, 3)

    loop.run(main)


@pytest.mark.parametrize("by", ["task", "thread", "kill"])
def test_closed_meanwhile(loop: Loop, bus: Bus, by: str) -> None:
    """What tasks wait for on a channel or handle that is closed, in this loop or by another thread, raises ``ClosedError``; and
    ``BrokerLost``, if the broker is killed."""

    async def main() -> None:
        channel, handle = bus.subscribe("c"), connect(bus.address)
        full, selector = bus.subscribe("full", capacity=1), channel_to_selector(bus.subscribe("c"))
        fill(handle, topic="full")
        calls: list[Callable[[], Awaitable[Any]]] = [
            channel.arecv,
            lambda: handle.apublish(bytes(1500), topic="full"),
            lambda: handle.await_for_subscribers(9),
            (lambda: anext(selector)) if by == "kill" else handle.aflush,
        ]
        waiting = [loop.start(call) for call in calls]
        await loop.sleep(0.02)
        if by == "kill":
            os.kill(bus.stats().pid, signal.SIGKILL)
        for closed in (channel, handle) if by != "kill" else ():
            if by == "task":
                await closed.aclose()
            else:
                Background(closed.close).result()
        for task in waiting:
            with pytest.raises(BrokerLost if by == "kill" else ClosedError):
                await task.result()
        for each in (channel, handle, full):
            each.close()

    loop.run(main)


def test_a_stopped_broker_does_not_block_the_loop(loop: Loop, bus: Bus) -> None:
    """Nor do requests of a process that has no connection yet; each call ends at its timeout, or when it is cancelled."""

    async def main() -> None:
        other: Bus = pickle.loads(pickle.dumps(bus))
        channel = bus.subscribe()
        with stopped(bus.stats().pid):
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: channel.arecv(timeout=0.1),
                lambda: other.apublish(1, timeout=0.1),
                lambda: other.aflush(0.1),
                bus.asubscribe,
                bus.astats,
            ]
            tasks = [loop.start(call) for call in calls]
            for _ in range(10):
                await loop.sleep(0.002)
            for task in tasks[3:]:
                task.cancel()
            found = [await outcome(task.result()) for task in tasks]
        assert [type(one) for one in found] == [TimedOut, TimedOut, type(None), Cancelled, Cancelled]
        channel.close()
        assert not bus.stats().subscribers

    loop.run(main)


def test_two_loops_in_two_threads_use_one_handle(loop: Loop, bus: Bus) -> None:
    """They publish and receive at once, small and large messages; then both go on in another loop, and in synchronous calls."""
    channels = [bus.subscribe(f"{thread}") for thread in range(2)]
    messages = [pattern(number, size) for number, size in enumerate([10, 3000, 100_000] * 20)]

    async def exchange(own: Loop, thread: int) -> list[Any]:
        publishing = own.start(lambda: bus.apublish_many(messages, topic=f"{1 - thread}"))
        received = [await channels[thread].arecv(DEADLINE) for _ in messages]
        assert await publishing.result() == len(messages)
        return received

    for _ in range(2):
        threads = [Background(own.run, exchange, own, thread) for thread, own in enumerate([made(loop.name), made("asyncio")])]
        assert [thread.result() for thread in threads] == [messages] * 2
    bus.publish(1, topic="0")
    assert channels[0].recv(DEADLINE) == 1


@pytest.mark.parametrize("size", SIZES)
def test_tasks_that_publish_at_once(loop: Loop, bus: Bus, size: int) -> None:
    """Several wait for room in the pipe of one handle; each message comes once, whole."""

    async def main() -> None:
        channel = bus.subscribe(capacity=1)
        published = fill(bus, size=1000)
        others = [*range(1_000_000, 1_000_004)]
        tasks = [loop.start(partial(bus.apublish, (number, pattern(number, size)))) for number in others]
        await loop.sleep(0.02)
        receiving = Background(take, channel, len(published) + len(tasks))
        for task in tasks:
            await task.result()
        numbers = [number for number, data in receiving.result() if number not in others or data == pattern(number, size)]
        assert sorted(numbers) == [*published, *others]

    loop.run(main)


def test_a_synchronous_publish_beside_a_waiting_task(loop: Loop, bus: Bus) -> None:
    """It never waits for ever in the thread whose task waits: it is done, or raises a ``BroadcastError``."""

    async def main() -> None:
        channel = bus.subscribe(capacity=1)
        published = fill(bus)
        waiting = loop.start(lambda: bus.apublish((-1, bytes(1000))))
        await loop.sleep(0.02)
        more = 0
        for size in (10, 3000, 300_000):
            with contextlib.suppress(BroadcastError):  # there may be room
                bus.publish((-2, bytes(size)))
                more += 1
        with pytest.raises(BroadcastError) as raised:
            bus.publish_many([(-2, bytes(1000))] * 100)
        more += raised.value.sent  # type: ignore[attr-defined]
        receiving = Background(take, channel, len(published) + more + 1)
        await waiting.result()
        assert sorted(number for number, _ in receiving.result()) == [*[-2] * more, -1, *published]
        bus.publish("and then")
        assert channel.recv(DEADLINE) == "and then"

    loop.run(main)


@pytest.mark.parametrize("opened", [False, True])
def test_a_broker_is_replaced_while_tasks_wait(loop: Loop, opened: bool) -> None:
    """The channel raises ``BrokerRestarted`` and goes on, a publish that waits is sent to the next broker."""

    async def main(bus: Bus) -> None:
        channel, full = bus.subscribe("c"), bus.subscribe("full", capacity=1)
        if opened:
            channel.fileno()
        fill(bus, topic="full")
        receiving = loop.start(channel.arecv)
        publishing = loop.start(lambda: bus.apublish(bytes(1500), topic="full"))
        await loop.sleep(0.02)
        kill_broker(bus)
        await publishing.result()
        with pytest.raises(BrokerRestarted):
            await receiving.result()
        with pytest.raises(BrokerRestarted):
            await bus.aflush()
        await bus.apublish("next", topic="c")
        assert await anext(channel) == "next"
        full.close()

    with start_broadcaster(restart=True) as bus:
        loop.run(main, bus)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("loop", LOOPS if IS_ALL else LOOPS[:1], indirect=True)
def test_a_thousand_channels_in_one_loop(loop: Loop) -> None:
    """Each gets what is published; where the limit of descriptors is lower, the call that needs one raises a clear error."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < ENOUGH:
        pytest.skip("the system allows no process so many descriptors")

    async def main(bus: Bus) -> None:
        before = len(os.listdir("/dev/fd"))
        channels = [await bus.asubscribe() for _ in range(1000)]
        tasks = [loop.start(channel.arecv) for channel in channels]
        await loop.sleep(0)
        await bus.apublish("to all")
        assert {await task.result() for task in tasks} == {"to all"}
        # A pipe and a socket each; the requests have shared a few connections.
        assert len(os.listdir("/dev/fd")) < before + 2 * len(channels) + 500
        channel = await bus.asubscribe()
        with descriptors_left(0):
            error = await outcome(channel.arecv())
        assert isinstance(error, OSError)
        assert "no descriptor is left" in str(error)

    with limited(resource.RLIMIT_NOFILE, ENOUGH), start_broadcaster() as bus:
        loop.run(main, bus)
