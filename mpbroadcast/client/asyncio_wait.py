"""Tasks of asyncio that wait for a descriptor, several tasks in several loops, or for a call that blocks.

``asyncio`` is imported by the first task that waits, as it takes as long to import as all of this package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


class AsyncWaiters:
    """The tasks that wait for one source, whose descriptor may change."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[tuple[Any, int], set[Any]] = {}  # loop and descriptor -> futures

    async def readable(self, fd: int) -> None:
        """Wait until the descriptor is readable, or until :meth:`wake`."""
        from asyncio import get_running_loop

        loop = get_running_loop()
        waiter = loop.create_future()
        waiters = self._waiters.setdefault((loop, fd), set())
        if not waiters:
            loop.add_reader(fd, _wake, waiters)
        waiters.add(waiter)
        try:
            await waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get((loop, fd)) is waiters:
                loop.remove_reader(fd)
                self._waiters.pop((loop, fd), None)

    def wake(self) -> None:
        """Wake all tasks, from any thread: the descriptor that they wait for is not the source's any more."""
        if not self._waiters:
            return
        from asyncio import get_running_loop

        for loop, fd in list(self._waiters):
            waiters = self._waiters.pop((loop, fd), set())
            with contextlib.suppress(RuntimeError):  # this thread runs no loop
                if get_running_loop() is loop:
                    _release(loop, fd, waiters)
                    continue
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_release, loop, fd, waiters)


async def give_turn() -> None:
    """Let the other tasks of this loop run."""
    from asyncio import sleep

    await sleep(0)


async def in_thread(call: Callable[..., object], *arguments: Any) -> None:
    """Call this in a thread of its own, which ends with the call, also when the task is cancelled. Raise what it raises."""
    from asyncio import get_running_loop
    from concurrent.futures import ThreadPoolExecutor

    executor = ThreadPoolExecutor(1)
    try:
        await get_running_loop().run_in_executor(executor, call, *arguments)
    finally:
        executor.shutdown(wait=False)


def _release(loop: Any, fd: int, waiters: set[Any]) -> None:
    loop.remove_reader(fd)
    _wake(waiters)


def _wake(waiters: set[Any]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
