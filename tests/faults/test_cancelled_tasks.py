"""Calls in tasks that are cancelled at each of their steps in turn: a step is where a call lets the loop run. Under asyncio, a
call can also be cancelled when what it waits for has come, before it goes on."""

import contextlib
import itertools
import os
import pickle
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, BrokerRestarted, Channel, Selector, connect, start_broadcaster
from tests.support.helpers import DEADLINE, Background, fill, kill_broker, pattern, wait_until
from tests.support.loops import IS_ALL, Cancelled, Loop, cancelled_at, made, uvloop_has_its_pipe

__all__ = ["uvloop_has_its_pipe"]

Bus = Broadcaster[Any]


ALL = ["asyncio", "asyncio, late", "uvloop", "uvloop, late", "trio"]


@pytest.fixture(params=ALL if IS_ALL else ["asyncio, late", "trio"])
def loop(request: pytest.FixtureRequest) -> tuple[Loop, bool]:
    """Return a loop, and whether calls are cancelled late."""
    name, _, late = request.param.partition(", ")
    return made(name), bool(late)


def each_step(loop: tuple[Loop, bool], turn: Callable[["Step"], Awaitable[None]]) -> None:
    """Await ``turn`` with one step after the other, until a call is over before its step."""

    async def main() -> None:
        for number in itertools.count():
            step = Step(*loop, number)
            await turn(step)
            if not step.came:
                assert number > 0
                return

    loop[0].run(main)


class Step:
    """The step of a call at which it is cancelled. ``came`` is True if it came to that."""

    def __init__(self, loop: Loop, late: bool, number: int) -> None:
        self.loop = loop
        self.came = False
        self._late = late
        self.number = number

    async def cancel(self, call: Callable[[], Awaitable[Any]], meanwhile: Callable[[], object] = bool) -> Any:
        """Return what the call returns, or the error that it raises. Call ``meanwhile`` at its first step."""
        self.came, outcome = await cancelled_at(self.loop, self.number, call, meanwhile, late=self._late)
        return outcome

    async def cancel_request(self, bus: Bus, call: Callable[[], Awaitable[Any]]) -> Any:
        """Do as :meth:`cancel`. The broker is stopped until the first step, so that there is one."""
        pid = bus.stats().pid
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
            return await self.cancel(call, lambda: os.kill(pid, signal.SIGCONT))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


LAST = ("last", b"")


def up_to_last(channel: Channel[Any]) -> list[Any]:
    """Return all messages before ``LAST``."""
    return [*iter(lambda: channel.recv(DEADLINE), LAST)]


def another(bus: Bus) -> Bus:
    """Return a handle that has no pipe yet, of a process that has a connection."""
    other: Bus = pickle.loads(pickle.dumps(bus))
    return other


@pytest.mark.parametrize("size", [100, 60_000, 600_000])
def test_a_first_publish(loop: tuple[Loop, bool], bus: Bus, size: int) -> None:
    """A handle's first message has happened whole, or never will; its next one follows."""
    channel = bus.subscribe()

    async def turn(step: Step) -> None:
        handle = another(bus)
        outcome = await step.cancel_request(bus, lambda: handle.apublish(pattern(1, size)))
        await handle.apublish("next")
        await handle.aflush(DEADLINE)
        received = await channel.arecv(DEADLINE)
        if outcome is None:
            assert received == pattern(1, size)
            received = await channel.arecv(DEADLINE)
        assert isinstance(outcome, Cancelled | None)
        assert received == "next"
        handle.close()

    each_step(loop, turn)


@pytest.mark.parametrize("size", [1_900, 60_000, 3 << 20])
@pytest.mark.parametrize("inline", [False, True])
def test_a_publish_that_waits(loop: tuple[Loop, bool], size: int, inline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does one that waits for room: for its only write, between its pieces, or for memory."""
    if inline:
        monkeypatch.setenv("MPBROADCAST_INLINE", "1")
    with start_broadcaster() as bus:

        async def turn(step: Step) -> None:
            channel = bus.subscribe(capacity=1)
            published = fill(bus, size=1900, timeout=0.05)
            receiving: list[Background] = []

            def receive() -> None:
                receiving.append(Background(up_to_last, channel))

            if step.number >= 3:  # more steps of waiting come while the backlog is read
                receive()
            outcome = await step.cancel(lambda: bus.apublish((-1, pattern(1, size))), receive if not receiving else bool)
            if not receiving:
                receive()
            await bus.apublish(LAST)
            received = receiving[0].result()
            numbers = [number for number, _ in received]
            if outcome is None:
                assert received[-1] == (-1, pattern(1, size))
                del numbers[-1]
            else:
                assert isinstance(outcome, Cancelled)
            assert numbers == published
            channel.close()

        each_step(loop, turn)


def test_many_that_are_published(loop: tuple[Loop, bool], bus: Bus) -> None:
    """``sent`` is exact, whatever size the messages have."""
    sizes = [100, 1500, 100, 60_000, 3 << 20, 1500, 300_000, 100]

    async def turn(step: Step) -> None:
        channel = bus.subscribe(capacity=1)
        receiving: list[Background] = []
        sent: list[int] = []

        async def call() -> None:
            try:
                sent.append(await bus.apublish_many([(number, pattern(number, size)) for number, size in enumerate(sizes)]))
            except BaseException as error:
                sent.append(error.sent)  # type: ignore[attr-defined]
                raise

        await step.cancel(call, lambda: receiving.append(Background(up_to_last, channel)))
        receiving = receiving or [Background(up_to_last, channel)]
        await bus.apublish(LAST)
        received = receiving[0].result()
        assert received == [(number, pattern(number, size)) for number, size in enumerate(sizes[: sent[0]])]
        assert step.came or sent == [len(sizes)]
        channel.close()

    each_step(loop, turn)


def test_many_that_are_cancelled_in_the_turn_of_others(loop: tuple[Loop, bool], bus: Bus) -> None:
    """A task that never blocks gives turns to others: cancelled in one, it has published nothing, and ``sent`` has that."""
    channel = bus.subscribe()
    sent: list[int] = []

    async def call(cancel: Callable[[], object]) -> None:
        cancel()
        try:
            sent.append(await bus.apublish_many([len(sent), len(sent)]))
        except BaseException as error:
            sent.append(error.sent)  # type: ignore[attr-defined]
            raise

    async def main() -> None:
        bus.publish(LAST)
        assert await channel.arecv(DEADLINE) == LAST
        while 0 not in sent:
            with contextlib.suppress(Cancelled):
                await loop[0].cancelling(call)
        await bus.apublish(LAST)

    loop[0].run(main)
    assert up_to_last(channel) == [number for number, count in enumerate(sent) for _ in range(count)]


CALLS: dict[str, Callable[[Channel[Any]], Callable[[], Awaitable[Any]]]] = {
    "arecv": lambda channel: channel.arecv,
    "arecv_many": lambda channel: channel.arecv_many,
    "async for": lambda channel: lambda: anext(channel),
    "selector": lambda channel: lambda: anext(Selector[Any]().select(channel)),
}


@pytest.mark.parametrize("call", CALLS)
def test_receiving(loop: tuple[Loop, bool], bus: Bus, call: str) -> None:
    """A call that is cancelled while it opens the channel, or while it waits, has lost nothing."""

    async def turn(step: Step) -> None:
        with bus.subscribe() as channel:
            outcome = await step.cancel(CALLS[call](channel), lambda: bus.publish_many([1, 2]))
            received = [] if isinstance(outcome, Cancelled) else outcome if isinstance(outcome, list) else [outcome]
            while len(received) < 2:
                received.append(await channel.arecv(DEADLINE))
            assert received == [1, 2]

    each_step(loop, turn)


def test_receiving_over_a_restart(loop: tuple[Loop, bool]) -> None:
    """A call that is cancelled while the channel goes over to another broker has lost neither a message nor the gap."""

    async def turn(step: Step) -> None:
        with start_broadcaster(restart=True) as bus, bus.subscribe() as channel:
            channel.fileno()
            bus.publish("first")
            bus.flush(timeout=DEADLINE)
            assert channel.recv(DEADLINE) == "first"
            kill_broker(bus)
            gap = await step.cancel(channel.arecv)
            if isinstance(gap, Cancelled):
                with pytest.raises(BrokerRestarted):
                    await channel.arecv(DEADLINE)
            else:
                assert isinstance(gap, BrokerRestarted)
            bus.publish("next")
            assert await channel.arecv(DEADLINE) == "next"

    each_step(loop, turn)


def test_subscribing(loop: tuple[Loop, bool], bus: Bus) -> None:
    """A call that is cancelled leaves no subscription."""

    async def turn(step: Step) -> None:
        outcome = await step.cancel_request(bus, bus.asubscribe)
        if isinstance(outcome, Cancelled):
            assert not bus.stats().subscribers
        else:
            assert len(bus.stats().subscribers) == 1
            outcome.close()

    each_step(loop, turn)


def test_other_requests(loop: tuple[Loop, bool], bus: Bus) -> None:
    """They can be repeated after they were cancelled."""
    calls: dict[str, Callable[[Bus, Channel[Any]], Awaitable[Any]]] = {
        "unsubscribe": lambda bus, channel: bus.aunsubscribe(channel),
        "flush": lambda bus, channel: bus.aflush(DEADLINE),
        "wait": lambda bus, channel: bus.await_for_subscribers(1, timeout=DEADLINE),
        "stats": lambda bus, channel: bus.astats(),
    }
    for name, call in calls.items():

        async def turn(step: Step, call: Any = call, name: str = name) -> None:
            with bus.subscribe() as channel, another(bus) as handle:
                await handle.apublish(1)
                outcome = await step.cancel_request(bus, lambda: call(handle, channel))
                assert not isinstance(outcome, Exception) or isinstance(outcome, Cancelled)
                await call(handle, channel)
                if name == "unsubscribe":
                    assert await channel.arecv() == 1
                    with pytest.raises(EOFError):
                        await channel.arecv(DEADLINE)

        each_step(loop, turn)


@pytest.mark.parametrize("opened", [False, True])
def test_closing_a_channel(loop: tuple[Loop, bool], bus: Bus, opened: bool) -> None:
    """A channel whose ``aclose`` was cancelled is ended by ``close``."""

    async def turn(step: Step) -> None:
        channel = bus.subscribe()
        if opened:
            channel.fileno()
        await step.cancel_request(bus, channel.aclose)
        channel.close()
        assert channel.closed
        assert not bus.stats().subscribers

    each_step(loop, turn)


@pytest.mark.parametrize("starter", [False, True])
def test_closing_a_broadcaster(loop: tuple[Loop, bool], bus: Bus, starter: bool) -> None:
    """A handle whose ``aclose`` was cancelled is ended by ``close``: no broker is left, and all that was published arrives."""

    async def turn(step: Step) -> None:
        handle: Bus = start_broadcaster() if starter else connect(bus.address)
        channel = handle.subscribe()
        channel.fileno()
        handle.publish_many(range(10))
        await step.cancel_request(handle, handle.aclose)
        handle.close()
        assert handle.closed
        assert [await channel.arecv(DEADLINE) for _ in range(10)] == [*range(10)]
        channel.close()

    each_step(loop, turn)
