"""Tasks of asyncio that wait for a descriptor; several may, in several loops."""

from __future__ import annotations

import asyncio
import contextlib


class AsyncWaiters:
    """Those that wait for what is a descriptor at a time."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[tuple[asyncio.AbstractEventLoop, int], set[asyncio.Future[None]]] = {}

    async def readable(self, fd: int) -> None:
        """Wait until it is, or until :meth:`wake`."""
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
        """Let all of them look, from any thread: what they wait for is not there any more."""
        for loop, fd in list(self._waiters):
            waiters = self._waiters.pop((loop, fd), set())
            with contextlib.suppress(RuntimeError):  # it is not in a loop, or that is closed
                if asyncio.get_running_loop() is loop:
                    _let_go(loop, fd, waiters)
                    continue
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_let_go, loop, fd, waiters)


def _let_go(loop: asyncio.AbstractEventLoop, fd: int, waiters: set[asyncio.Future[None]]) -> None:
    loop.remove_reader(fd)
    _wake(waiters)


def _wake(waiters: set[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
