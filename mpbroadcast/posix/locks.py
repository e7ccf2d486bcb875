"""Locks for ``with`` that an interrupt never leaves held.

On Python 3.14 an exception from a signal handler can come between the return of ``__enter__`` and the range that ``__exit__``
protects, and a handler that raises nothing can run there; neither on 3.13 nor on 3.15 (cpython#148874). The lock is then held
for ever, or held while the handler runs. Other Pythons have the plain lock, which is faster.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Final

from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import TimedOut


class InterruptSafe:
    """A lock that is taken without a point at which the interpreter checks for signals, up to the end of ``__enter__``."""

    __slots__ = ("__exit__", "acquire", "release")

    def __init__(self, lock: Any) -> None:
        self.acquire = lock.acquire
        self.release = lock.release
        self.__exit__ = lock.__exit__  # a function in C: there is no check before it

    def __enter__(self) -> None:
        [_] = map(self.acquire, (True,))  # unpacking is no call, so no check follows; nothing may stand behind this line


class within:
    """Hold ``lock`` in a ``with`` statement, safe with interrupts.

    :raises TimedOut: at the start of the statement, if another thread holds it until ``deadline``.
    """

    __slots__ = ("__exit__", "_acquire", "_deadline")

    def __init__(self, lock: Any, deadline: Deadline) -> None:
        self._acquire = lock.acquire
        self._deadline = deadline
        self.__exit__ = lock.__exit__

    def __enter__(self) -> None:
        seconds = self._deadline.remaining()
        limit = -1 if seconds is None else min(seconds, threading.TIMEOUT_MAX)
        [is_held] = map(self._acquire, (True,), (limit,))  # as above: nothing is called behind this line if it is held
        if not is_held:
            raise TimedOut("another thread waits for the broker's reply, which did not come in time")


_NEEDED: Final = sys.version_info[:2] == (3, 14)


def lock() -> threading.Lock | InterruptSafe:
    """Return a new ``threading.Lock``, safe with interrupts."""
    return InterruptSafe(threading.Lock()) if _NEEDED else threading.Lock()


def rlock() -> threading.RLock | InterruptSafe:
    """Return a new ``threading.RLock``, safe with interrupts."""
    return InterruptSafe(threading.RLock()) if _NEEDED else threading.RLock()
