"""Event loops for tests of calls in tasks: the same test under asyncio, uvloop and trio; and a call that is cancelled at one of
its steps."""

import asyncio
import contextlib
import importlib.util
import itertools
import os
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from types import coroutine
from typing import Any

import pytest

from tests.support.helpers import DEADLINE

Call = Callable[[], Awaitable[Any]]


class Cancelled(Exception):
    """The outcome of a task that was cancelled."""


class AsyncioTask:
    """A task that was started beside others."""

    def __init__(self, call: Call) -> None:
        self._task: asyncio.Task[Any] = asyncio.ensure_future(call())

    def cancel(self) -> None:
        self._task.cancel()

    async def result(self) -> Any:
        """Return what the call returns, or raise what it raises, within a deadline; ``Cancelled``, if it was cancelled."""
        await asyncio.wait([self._task], timeout=DEADLINE)
        if self._task.cancelled():
            raise Cancelled
        return self._task.result()


class AsyncioLoop:
    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, main: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        async def run() -> Any:
            return await main(*args)

        if self.name == "uvloop":
            import uvloop

            return uvloop.run(run())
        return asyncio.run(run())

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def start(self, call: Call) -> AsyncioTask:
        return AsyncioTask(call)

    async def cancelling(self, call: Callable[[Callable[[], object]], Awaitable[Any]]) -> Any:
        """Await what the call returns, which gets a function that cancels it. Raise ``Cancelled`` if it was cancelled."""

        async def start() -> Any:
            task = asyncio.current_task()
            assert task is not None
            return await call(task.cancel)

        return await AsyncioTask(start).result()


class TrioTask:
    def __init__(self, nursery: Any, call: Call) -> None:
        import trio

        self._scope = trio.CancelScope()
        self._done = trio.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        nursery.start_soon(self._run, call)

    async def _run(self, call: Call) -> None:
        try:
            with self._scope:
                self._value = await call()
                return
            self._error = Cancelled()
        except Exception as error:
            self._error = error
        finally:
            self._done.set()

    def cancel(self) -> None:
        self._scope.cancel()

    async def result(self) -> Any:
        import trio

        with trio.fail_after(DEADLINE):
            await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value


class TrioLoop:
    name = "trio"

    def __init__(self) -> None:
        self._nursery: Any = None

    def run(self, main: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        import trio

        async def run() -> Any:
            async with trio.open_nursery() as nursery:
                loop._nursery = nursery
                value = await main(*args)
                nursery.cancel_scope.cancel()
                return value

        loop = self
        try:
            return trio.run(run)
        except BaseExceptionGroup as group:
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise

    async def sleep(self, seconds: float) -> None:
        import trio

        await trio.sleep(seconds)

    def start(self, call: Call) -> TrioTask:
        return TrioTask(self._nursery, call)

    async def cancelling(self, call: Callable[[Callable[[], object]], Awaitable[Any]]) -> Any:
        import trio

        with trio.CancelScope() as scope:
            return await call(scope.cancel)
        raise Cancelled


Loop = AsyncioLoop | TrioLoop
IS_ALL = os.environ.get("MPBROADCAST_FAULTS") == "all"
LOOPS = ["asyncio", "uvloop", "trio"] if IS_ALL else ["asyncio", "trio"]


def made(name: str) -> Loop:
    """Return the loop of this name, or skip the test where it is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return TrioLoop() if name == "trio" else AsyncioLoop(name)


@pytest.fixture(scope="module", autouse=True)
def uvloop_has_its_pipe() -> None:
    """The first loop of libuv in a process makes a pipe that no test may count as left behind."""
    with contextlib.suppress(pytest.skip.Exception):
        made("uvloop").run(made("uvloop").sleep, 0)


@coroutine
def _stepwise(call: Awaitable[Any], at_step: Callable[[int], object], late: int | None) -> Generator[Any, Any, Any]:
    """Await ``call``. Call ``at_step`` with a number each time before it suspends. At the step ``late`` it is cancelled, as
    asyncio does, in the moment before it would go on, when what it waits for has come."""
    steps = call.__await__()
    resume: Callable[[], Any] = partial(next, steps)
    for count in itertools.count():
        try:
            yielded = resume()
        except StopIteration as done:
            return done.value
        at_step(count)
        try:
            value = yield yielded
        except BaseException as error:
            resume = partial(steps.throw, error)
        else:
            resume = partial(steps.send, value)
            if count == late:
                resume = partial(steps.throw, asyncio.CancelledError())


async def cancelled_at(
    loop: Loop, step: int, call: Call, meanwhile: Callable[[], object] = bool, *, late: bool = False
) -> tuple[bool, Any]:
    """Cancel a call at its step of this number, where it suspends; ``late``: where it would go on. Call ``meanwhile`` at its
    first step. Return whether it came to the step, and what the call has returned, or the error that it has raised."""
    came = False

    async def run(cancel: Callable[[], object]) -> Any:
        def at_step(count: int) -> None:
            nonlocal came
            if not count:
                meanwhile()
            if count == step:
                came = True
                if not late:
                    cancel()

        return await _stepwise(call(), at_step, step if late else None)

    try:
        return came, await loop.cancelling(run)
    except Exception as error:
        return came, error
