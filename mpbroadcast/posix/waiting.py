"""Calls that wait, without the waiting: a core is a generator that yields what it waits for, and a driver waits.

- :func:`run` drives a core in a thread, which blocks meanwhile; ``client/tasks.py`` drives the same core in a task of an event
  loop. A core itself never blocks. It holds no lock over a ``yield``, as tasks of one thread would share it.
- What ends a wait (an interrupt, a cancellation) is raised in the core, at its ``yield``: so the core cleans up, and does not
  wait any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Final, NamedTuple, Protocol, TypeVar

from mpbroadcast.deadline import Deadline
from mpbroadcast.posix.event_loops import running_loop, warn_of_blocking
from mpbroadcast.posix.poller import is_any_ready

T = TypeVar("T")

_SOON: Final = 0.005  # seconds
_BRIEF: Final = 0.02  # seconds that a call may block an event loop without a warning


class Source(Protocol):
    """An object with a descriptor; one that is closed returns -1."""

    def fileno(self) -> int: ...


class Descriptor(NamedTuple):
    """A source that is a descriptor's number only."""

    fd: int

    def fileno(self) -> int:
        return self.fd


class Wakers:
    """The functions that wake the tasks that wait in calls of one object, each from any thread."""

    __slots__ = ("_wakers", "is_closed")

    def __init__(self) -> None:
        self._wakers: dict[object, Callable[[], None]] = {}
        self.is_closed = False

    def add(self, key: object, waker: Callable[[], None]) -> None:
        self._wakers[key] = waker

    def remove(self, key: object) -> None:
        self._wakers.pop(key, None)

    def wake(self) -> None:
        """Wake all tasks: what they wait for is not the object's any more."""
        if self._wakers:
            for waker in self._wakers.copy().values():
                waker()

    def close(self) -> None:
        """Wake all tasks for good: the object is closed."""
        self.is_closed = True
        self.wake()


class Wait:
    """Until one of ``sources`` has one of ``events``, or an error, or is closed; or until the deadline.

    Without sources, it is a pause. A task is also woken by ``wakers``; a thread, which they do not wake, looks again soon.
    """

    __slots__ = ("deadline", "events", "sources", "wakers")

    def __init__(self, deadline: Deadline, events: int = 0, *sources: Source, wakers: tuple[Wakers, ...] = ()) -> None:
        self.deadline = deadline
        self.events = events
        self.sources = sources
        self.wakers = wakers

    def block(self) -> bool:
        """Block until then. Return False if it was the deadline that came."""
        if not self.sources:
            deadline = self.deadline.at_most(_SOON) if self.wakers else self.deadline
            time.sleep(deadline.remaining() or 0.0)
            return False
        fds = [source.fileno() for source in self.sources]
        if min(fds) < 0:
            return True
        if self.deadline.remaining() != 0 and (loop := running_loop()) is not None:
            # A reply mostly comes within microseconds: to warn of that would be a matter of chance.
            if is_any_ready(fds, self.events, self.deadline.at_most(_BRIEF).milliseconds()):
                return True
            warn_of_blocking(loop)
        return is_any_ready(fds, self.events, self.deadline.milliseconds())


Steps = Generator[Wait, bool, T]
"""A core: it yields what it waits for, is sent what :meth:`Wait.block` returns, and returns the result of the call."""


def run(steps: Steps[T]) -> T:
    """Drive a core in this thread. Return what it returns; block while it waits."""
    try:
        wait = next(steps)
        while True:
            wait = steps.send(wait.block())
    except StopIteration as done:
        result: T = done.value
        return result
    except BaseException as error:
        steps.throw(error)  # if it comes from the core, that has ended, and this raises it as it is
        raise
