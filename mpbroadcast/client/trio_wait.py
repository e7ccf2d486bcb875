"""Waiting in a task of trio."""

from __future__ import annotations

import contextlib
import math

import trio

from mpbroadcast.posix.descriptors import duplicate
from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.waiting import Source, Wait, Wakers


async def give_turn() -> None:
    await trio.lowlevel.checkpoint()


async def wait_for(wait: Wait, wakers: tuple[Wakers, ...]) -> bool:
    remaining = wait.deadline.remaining()
    token = trio.lowlevel.current_trio_token()
    is_ready = False

    def end() -> None:
        nonlocal is_ready
        is_ready = True
        scope.cancel()

    def wake() -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(end, idempotent=True)

    with trio.CancelScope(deadline=math.inf if remaining is None else trio.current_time() + remaining) as scope:
        try:
            for each in wakers:
                each.add(scope, wake)
            await _first_of(wait.sources, wait.events)  # behind the wakers: what is closed from now on wakes this task
            is_ready = True
        finally:
            for each in wakers:
                each.remove(scope)
    return is_ready


async def _first_of(sources: tuple[Source, ...], events: int) -> None:
    if not sources:
        await trio.sleep_forever()
    if len(sources) == 1:
        await _wait(sources[0], events)
        return

    async def one(source: Source) -> None:
        await _wait(source, events)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for source in sources:
            nursery.start_soon(one, source)


async def _wait(source: Source, events: int) -> None:
    """Wait for an event of one source. An error is an event, too: the next call for the source meets it."""
    fd = source.fileno()
    if fd < 0:
        return
    wait = trio.lowlevel.wait_readable if events == IN else trio.lowlevel.wait_writable
    with contextlib.suppress(OSError, trio.ClosedResourceError):
        try:
            await wait(fd)
        except trio.BusyResourceError:  # trio has room for one task a descriptor
            with contextlib.closing(duplicate(fd)) as copy:
                await wait(copy.fd)
