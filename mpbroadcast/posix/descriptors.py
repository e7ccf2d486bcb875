"""Descriptors that a process owns: safe with forks, with other threads, and with interrupts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from mpbroadcast.posix.forks import fork_lock, on_fork

close_fd = os.close


class OwnedDescriptor:
    """A descriptor that is closed when nothing refers to this object any more, and in a child at once.

    An interrupt between the call that returns a descriptor and the end of this constructor leaks it, as anywhere in Python.
    """

    __slots__ = ("__weakref__", "_fd", "fd")

    def __init__(self, fd: int) -> None:
        """Take it over, under the same :func:`fork_lock` under which it was received or made."""
        self.fd = self._fd = fd  # `fd` is the one to use; -1 once it is closed
        on_fork(self, OwnedDescriptor.close)

    def close(self) -> None:
        self.fd = -1
        with fork_lock():  # so that a child has a copy of it only while this object knows of it
            fd, self._fd = self._fd, -1  # before it is closed: an interrupt may leak it, never close it twice
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        # Without `_fd` an interrupt came before there was one; without `fork_lock` the interpreter has cleared this module.
        if hasattr(self, "_fd") and fork_lock is not None:
            OwnedDescriptor.close(self)


class Reserve:
    """One descriptor that is kept so that another one can be received when none is left."""

    def __init__(self) -> None:
        self._fd = -1
        self._open()

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def room_for_one(self) -> Iterator[bool]:
        """Have room for one more descriptor in the block. Yield True if it can be kept."""
        has_room = False
        with contextlib.suppress(OSError):  # none is left, or the reserve is not there
            os.close(os.dup(self._fd))
            has_room = True
        if not has_room and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        try:
            yield has_room
        finally:
            if not has_room:
                self._open()
