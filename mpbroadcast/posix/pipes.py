"""Pipes: making them, their ends, how much is in them.

The calls on the data path are the system's own functions under these names, so that nothing is called in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import termios
from array import array

from mpbroadcast.deadline import Deadline
from mpbroadcast.posix.descriptors import OwnedDescriptor, fork_lock
from mpbroadcast.posix.event_loops import running_loop, warn_of_blocking
from mpbroadcast.posix.poller import is_ready

read, write, readv = os.read, os.write, os.readv
ioctl, FIONREAD = fcntl.ioctl, termios.FIONREAD


def new_pipe(size: int) -> tuple[int, int]:
    """Make a pipe, not blocking and not inherited at either end, of that size as far as the system allows."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        # Best effort: all pipes of a user share a limit.
        with contextlib.suppress(OSError):
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, size)
    return ends


def size_of_pipe(fd: int) -> int | None:
    """Return its size in bytes, if the system gives it."""
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) if hasattr(fcntl, "F_GETPIPE_SZ") else None


def unread(fd: int) -> int:
    """Return how many bytes are in a pipe, asked at either end."""
    count = array("i", (0,))
    ioctl(fd, FIONREAD, count)
    return count[0]


def replace_with_dead_pipe(fd: int) -> None:
    """Close a descriptor, and put a pipe with no other end under its number, so that the number is not free yet.

    If no descriptor is left, do nothing.
    """
    with contextlib.suppress(OSError), fork_lock():  # a child's copy of the other end would let a waiting thread wait on
        reader, writer = os.pipe()
        try:
            os.dup2(reader, fd, inheritable=False)
        finally:
            os.close(reader)
            os.close(writer)


class PipeEnd(OwnedDescriptor):
    """One end of a pipe, closed safely while other threads use it, without a lock.

    A call that was given ``fd`` may still be on its way into the kernel when another thread closes this end. So the number is
    not free at once, for the user's next file to get it: :meth:`close` puts a dead pipe under it, and the number is freed when
    nothing refers to this object any more, such as a thread that is using it.
    """

    __slots__ = ()

    def wait(self, events: int, deadline: Deadline) -> bool:
        """Return True if one of ``events``, or an error, or the closing of either end, came before the deadline.

        A thread that waits is woken by the broker's closing of the other end: a caller of :meth:`close` requests that.
        """
        fd = self.fd
        if fd < 0:
            return True
        milliseconds = deadline.milliseconds()
        if milliseconds != 0 and (loop := running_loop()) is not None and not is_ready(fd, events, 0):
            warn_of_blocking(loop)
        return is_ready(fd, events, milliseconds)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            replace_with_dead_pipe(fd)
