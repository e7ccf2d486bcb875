"""Waiting in a task of asyncio, or of a loop with its interface, such as uvloop's.

``asyncio`` is imported by the first task that waits, as it takes as long to import as all of this package.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.waiting import Wait, Wakers

# The futures that wait for one descriptor, by loop, descriptor and events: a loop has room for one callback only.
_waiting: dict[tuple[Any, int, int], list[Any]] = {}


async def give_turn() -> None:
    from asyncio import sleep

    await sleep(0)


async def wait_for(wait: Wait, wakers: tuple[Wakers, ...]) -> bool:
    from asyncio import get_running_loop

    loop = get_running_loop()
    future = loop.create_future()
    timer = None
    keys: list[tuple[Any, int, int]] = []
    try:
        for each in wakers:
            each.add(future, partial(_wake, loop, future))
        for source in wait.sources:  # behind the wakers: what is closed from now on wakes this task
            fd = source.fileno()
            if fd < 0:
                return True
            keys.append(_register(loop, fd, wait.events, future))
        remaining = wait.deadline.remaining()
        if remaining is not None:
            timer = loop.call_later(remaining, _set_result, [future], False)
        is_ready: bool = await future
        return is_ready
    finally:
        for each in wakers:
            each.remove(future)
        for key in keys:
            _unregister(key, future)
        if timer is not None:
            timer.cancel()


def _register(loop: Any, fd: int, events: int, future: Any) -> tuple[Any, int, int]:
    key = loop, fd, events
    futures = _waiting.setdefault(key, [])
    futures.append(future)
    if len(futures) == 1:
        try:
            (loop.add_reader if events == IN else loop.add_writer)(fd, _set_result, futures, True)
        except BaseException:
            del _waiting[key]
            raise
    return key


def _unregister(key: tuple[Any, int, int], future: Any) -> None:
    futures = _waiting[key]
    futures.remove(future)
    if not futures:
        loop, fd, events = key
        del _waiting[key]
        if loop.is_closed():
            return  # the task was still there at the loop's end
        (loop.remove_reader if events == IN else loop.remove_writer)(fd)


def _wake(loop: Any, future: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed
        loop.call_soon_threadsafe(_set_result, [future], True)


def _set_result(futures: list[Any], is_ready: bool) -> None:
    for future in futures:
        if not future.done():
            future.set_result(is_ready)
