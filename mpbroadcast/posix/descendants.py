"""The processes that are forked from this one: whether one of them may still live.

Each fork has a pipe of its own, whose write end only the new process, and what that forks, keeps for as long as it lives. The
pipe is made before the fork; afterwards the parent closes the write end, and the child the read end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from weakref import WeakSet

from mpbroadcast.posix.descriptors import OwnedDescriptor
from mpbroadcast.posix.forks import has_hooks, hold_lock
from mpbroadcast.posix.poller import is_ready


class Descendants:
    """The processes that are forked from now on, and those that they fork, if :func:`descendants` returns it."""

    __slots__ = ("__weakref__", "ends")

    def __init__(self) -> None:
        self.ends: dict[OwnedDescriptor | None, None] = {}  # of each fork's pipe; None: no descriptor was left for it

    def live(self) -> bool:
        """Return True if one of them may live."""
        for end in list(self.ends):
            if end is not None and (end.fd < 0 or is_ready(end.fd, 0, 0)):
                self.ends.pop(end, None)  # a descriptor is closed when nothing refers to it any more
        return bool(self.ends)


class _Pipes:
    """The pipe of the fork that is being made, and all that were returned by :func:`descendants`."""

    def __init__(self) -> None:
        self.thread_without_heirs = 0  # its forks are the library's own, and no handle is used in them
        self.ends: tuple[int, ...] = ()
        self.next = Descendants()
        self.before: WeakSet[Descendants] = WeakSet()

    def make(self) -> None:
        if self.thread_without_heirs != threading.get_ident() and has_hooks():
            with contextlib.suppress(OSError):
                self.ends = os.pipe()

    def keep_read_end(self) -> None:
        if self.thread_without_heirs == threading.get_ident():
            return
        ends, self.ends = self.ends, ()
        end = OwnedDescriptor(ends[0]) if ends else None
        self.before.add(self.next)
        self.next = Descendants()
        for one in list(self.before):
            one.live()  # so that nothing is kept of those that have ended
            one.ends[end] = None
        if ends:
            os.close(ends[1])

    def keep_write_end(self) -> None:
        ends, self.ends = self.ends, ()
        if ends:
            os.close(ends[0])  # the end of this process, and of all that it forks, closes the other one
        self.next, self.before = Descendants(), WeakSet()


_pipes = _Pipes()


def descendants() -> Descendants:
    """Return those of this process from now on."""
    return _pipes.next


def without_heirs(call: Callable[[], None]) -> None:
    """Call this; the processes that this thread forks meanwhile use none of this process's handles."""
    try:
        _pipes.thread_without_heirs = threading.get_ident()
        call()
    finally:
        _pipes.thread_without_heirs = 0


os.register_at_fork(before=_pipes.make, after_in_parent=_pipes.keep_read_end, after_in_child=_pipes.keep_write_end)
hold_lock()
