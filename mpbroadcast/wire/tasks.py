"""Tasks of asyncio that wait for a descriptor; several may, in several loops."""

from __future__ import annotations

import asyncio
import contextlib

__all__ = ["Tasks"]


class Tasks:
    """Those that wait for one descriptor."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[asyncio.AbstractEventLoop, set[asyncio.Future[None]]] = {}

    async def readable(self, fd: int) -> None:
        """Wait until it is, or until :meth:`wake`."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        waiters = self._waiters.setdefault(loop, set())
        if not waiters:
            loop.add_reader(fd, _wake, waiters)
        waiters.add(waiter)
        try:
            await waiter
        finally:
            waiters.discard(waiter)
            if not waiters:
                loop.remove_reader(fd)
                self._waiters.pop(loop, None)

    def wake(self) -> None:
        """Let all of them look, from any thread: what they wait for is not there any more."""
        for loop, waiters in list(self._waiters.items()):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_wake, waiters)


def _wake(waiters: set[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
