"""A call that blocks an event loop is a ``RuntimeWarning`` that names the form which does not, once for each place."""

import asyncio
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, channel_to_selector, connect, start_broadcaster
from tests.support.helpers import DEADLINE, readable, wait_until
from tests.support.loops import LOOPS, Loop, made, uvloop_has_its_pipe

__all__ = ["uvloop_has_its_pipe"]

Bus = Broadcaster[Any]

RECEIVING: dict[str, Callable[[Channel[Any]], Any]] = {
    "await arecv()": lambda channel: channel.recv(DEADLINE),
    "await arecv_many()": lambda channel: channel.recv_many(None, DEADLINE),
    "async for": lambda channel: next(iter(channel)),
    "await areceive()": lambda channel: channel_to_selector(channel).receive(DEADLINE),
}
ASKING: dict[str, Callable[[Bus], Any]] = {
    "await asubscribe()": lambda bus: bus.subscribe(),
    "await aflush()": lambda bus: bus.flush(),
    "await astats()": lambda bus: bus.stats(),
    "await ahistory()": lambda bus: bus.history(),
    "await asubscriber_count()": lambda bus: bus.subscriber_count(),
    "await await_for_subscribers()": lambda bus: bus.wait_for_subscribers(0),
    "await aconnect()": lambda bus: connect(bus.address),
    "await aclose()": lambda bus: bus.close(),
}


@pytest.fixture(params=[*LOOPS, "uvloop"])
def loop(request: pytest.FixtureRequest) -> Loop:
    return made(request.param)


def publish_soon(bus: Bus) -> threading.Timer:
    timer = threading.Timer(0.05, bus.publish, (1,))
    timer.start()
    return timer


@pytest.mark.parametrize("form", RECEIVING)
def test_a_receive_that_waits(form: str, loop: Loop, bus: Bus) -> None:
    """It warns once, also where all warnings are shown; one that need not wait does not warn."""

    async def main() -> None:
        async with bus.asubscribe() as channel:
            channel.poll(0)
            await bus.apublish(0)
            wait_until(lambda: readable(channel))
            RECEIVING[form](channel)
            for _ in range(3):
                timer = publish_soon(bus)
                RECEIVING[form](channel)
                timer.join()

    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        loop.run(main)
    (warning,) = recorded
    assert f"`{form}`" in str(warning.message)
    assert (warning.category, warning.filename) == (RuntimeWarning, __file__)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("form", ASKING)
def test_a_request_waits(form: str, name: str) -> None:
    """For the reply of a broker that takes long: one that is stopped for a moment."""

    async def main(handle: Bus) -> None:
        pid = handle.stats().pid
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(0.2, os.kill, (pid, signal.SIGCONT))
        timer.start()
        ASKING[form](handle)
        timer.join()

    with start_broadcaster(history=1) as bus:
        handle = connect(bus.address)
        handle.publish(1)
        handle.flush()
        with pytest.warns(RuntimeWarning) as recorded:
            made(name).run(main, handle)
        handle.close()
    assert f"`{form}`" in str(recorded[0].message)


def test_a_publish_that_waits(loop: Loop, bus: Bus) -> None:
    """For room in the backlog of a channel. One that finds room does not warn; as an error, the warning publishes nothing."""

    async def main() -> int:
        for count in itertools.count():
            try:
                bus.publish(bytes(1000), timeout=DEADLINE)
            except RuntimeWarning:
                return count
        raise AssertionError

    with bus.subscribe(capacity=10_000) as channel, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        count = loop.run(main)
        assert len([channel.recv(DEADLINE) for _ in range(count)]) == count
        bus.publish("last")
        assert channel.recv(DEADLINE) == "last"


def test_what_loses_nothing(bus: Bus) -> None:
    """As an error, the warning comes before anything has happened."""

    async def main() -> None:
        async with bus.asubscribe() as channel:
            channel.poll(0)
            with pytest.raises(RuntimeWarning):
                channel.recv(DEADLINE)
            await bus.apublish(1)
            assert await channel.arecv(DEADLINE) == 1

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        asyncio.run(main())


def test_what_does_not_warn(loop: Loop) -> None:
    """The forms for tasks, calls in other threads, calls that do not wait, and what has no such form."""

    async def main() -> None:
        async with start_broadcaster(history=1) as bus, bus.asubscribe() as channel:
            channel.poll(0)
            await bus.apublish(1)
            await bus.aflush()
            assert await channel.arecv(DEADLINE) == 1
            with pytest.raises(TimeoutError):
                channel.recv(0)
            bus.publish(2)
            done: list[Any] = []
            thread = threading.Thread(target=lambda: done.append(bus.stats()))
            thread.start()
            while thread.is_alive():
                await loop.sleep(0.001)
            assert done

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loop.run(main)
