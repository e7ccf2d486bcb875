"""Tasks of asyncio that wait for a descriptor: several tasks, in several loops."""

from __future__ import annotations

import asyncio
import contextlib


class AsyncWaiters:
    """The tasks that wait for one source, whose descriptor may change."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[tuple[asyncio.AbstractEventLoop, int], set[asyncio.Future[None]]] = {}

    async def readable(self, fd: int) -> None:
        """Wait until the descriptor is readable, or until :meth:`wake`."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
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
        for loop, fd in list(self._waiters):
            waiters = self._waiters.pop((loop, fd), set())
            with contextlib.suppress(RuntimeError):  # this thread runs no loop
                if asyncio.get_running_loop() is loop:
                    _release(loop, fd, waiters)
                    continue
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_release, loop, fd, waiters)


def _release(loop: asyncio.AbstractEventLoop, fd: int, waiters: set[asyncio.Future[None]]) -> None:
    loop.remove_reader(fd)
    _wake(waiters)


def _wake(waiters: set[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
