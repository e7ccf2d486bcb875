"""Calls in a task of an event loop: the driver of their cores, by which the loop runs on while they wait.

``asyncio_wait.py`` (asyncio, uvloop) and ``trio_wait.py`` have what differs between the loops: one wait, and one turn. Neither
loop is imported before it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from mpbroadcast.errors import BroadcastError
from mpbroadcast.posix.waiting import Steps, Wait, Wakers

T = TypeVar("T")

TURN: Final = 64  # calls that need not wait, until one lets other tasks run


class _Loop(Protocol):
    """A module that waits in the tasks of one kind of loop."""

    async def give_turn(self) -> None:
        """Let other tasks run."""

    async def wait_for(self, wait: Wait, wakers: tuple[Wakers, ...]) -> bool:
        """Return False if the deadline came, and True at the event, or when one of ``wakers`` has woken the task."""


def _running() -> _Loop:
    """Return the module for the loop that runs in this thread. Where trio is a guest of asyncio, it depends on the task."""
    if (trio := sys.modules.get("trio")) is not None:
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            pass
        else:
            from mpbroadcast.client import trio_wait

            return trio_wait
    from mpbroadcast.client import asyncio_wait

    return asyncio_wait


async def give_turn() -> None:
    """Let the other tasks of this loop run."""
    await _running().give_turn()


async def drive(
    steps: Steps[T], wakers: Wakers | None = None, closed_error: Callable[[], BroadcastError] = BroadcastError
) -> T:
    """Drive a core in this task. Return what it returns.

    When ``wakers`` are closed, whatever it waits for, ``closed_error()`` is raised in it.
    """
    wakers = wakers or Wakers()
    loop: _Loop | None = None
    try:
        wait = next(steps)
        while True:
            if wait.deadline.remaining() == 0:
                is_ready = wait.block()  # which does not block
            else:
                loop = loop or _running()
                is_ready = await loop.wait_for(wait, (wakers, *wait.wakers))
            wait = steps.throw(closed_error()) if wakers.is_closed else steps.send(is_ready)
    except StopIteration as done:
        result: T = done.value
        return result
    except BaseException as error:
        steps.throw(error)  # if it comes from the core, that has ended, and this raises it as it is
        raise
