"""The event loop: everything that the broker waits for, in one call.

A descriptor that is released in a round is closed at the round's end. So no number is used again while events for its former
owner are still to be handled.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from typing import Final

IN: Final = select.POLLIN
OUT: Final = select.POLLOUT
ERROR: Final = select.POLLERR | select.POLLHUP  # reported in any case

_FD_SETSIZE: Final = 1024
_LONGEST: Final = 1e6  # seconds: what the system calls take
Handler = Callable[[int], None]


def is_ready(fd: int | socket.socket, events: int, milliseconds: int | None) -> bool:
    """Block until one of ``events``, or an error, comes; ``None`` is for ever. Return True if one has come in time."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(milliseconds))


def is_any_ready(fds: Iterable[int], events: int, milliseconds: int | None) -> bool:
    """Do as :func:`is_ready`, for any of several descriptors."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    return bool(poll.poll(milliseconds))


class Poller:
    """Calls handlers with the events of their descriptors, and timers at their time. Descriptors are level-triggered."""

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._closing: list[int] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        epoll = select.epoll() if hasattr(select, "epoll") else None
        self._poll: select.epoll | select.poll = epoll or select.poll()
        self._second = 1 if epoll else 1000  # in the unit of its timeouts
        self._napper = epoll.fileno() if epoll and epoll.fileno() < _FD_SETSIZE else -1

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call ``handler`` with what is ready of ``events``, and with errors."""
        self._poll.register(fd, events)
        self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """From now on, wait for these events."""
        self._poll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Do not wait for it any more; do nothing if it is not waited for."""
        if self._handlers.pop(fd, None) is not None:
            # What is still registered under a number that was closed is gone already.
            with contextlib.suppress(OSError, KeyError):
                self._poll.unregister(fd)

    def close(self, fd: int) -> None:
        """Forget it, and close it at the end of this round."""
        if fd >= 0:
            self.forget(fd)
            self._closing.append(fd)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, that much later."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), callback))

    def round(self, nap: float | None = None) -> None:
        """Wait until something happens, for at most ``nap`` seconds, and handle all that has."""
        if nap is not None:
            self._nap(nap)
        for fd, events in self._poll.poll(self._until_timer() if nap is None else 0):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)
        now = time.monotonic() if self._timers else 0.0
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def close_forgotten(self) -> None:
        """Close the descriptors that :meth:`close` was called for, at the end of the round."""
        while self._closing:
            os.close(self._closing.pop())

    def _nap(self, seconds: float) -> None:
        # poll and epoll round up to a whole millisecond; select does not, but takes no descriptor above 1,023.
        if self._napper < 0:
            time.sleep(seconds)
        else:
            select.select((self._napper,), (), (), seconds)

    def _until_timer(self) -> float | None:
        if not self._timers:
            return None
        return min(max(0.0, self._timers[0][0] - time.monotonic()), _LONGEST) * self._second
