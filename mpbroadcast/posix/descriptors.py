"""Descriptors that a process owns, and its forks: a descriptor is safe with forks, with other threads, and with interrupts.

An object that owns a descriptor has a hook, and gets it under the lock that ``os.fork`` takes. So a child closes all its
inherited copies, whatever another thread was doing at the moment of the fork. Nothing blocks under this lock. It is acquired
before all hooks and released after them by functions in C: an interrupt at the start of a hook in Python skips that hook.

Whether a descendant of this process may still live is seen at a pipe: each child has its own, whose write end only the child,
and the processes that it passes the write end on to, keep for as long as they live. A fork's pipe is made before the fork;
afterwards the parent closes the write end, and the child the read end. ``starting.py`` has those of ``spawn`` and
``forkserver``.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from operator import methodcaller
from typing import Any, Final, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from mpbroadcast.posix import locks
from mpbroadcast.posix.poller import IN, is_ready

T = TypeVar("T")
Hook = Callable[[Any], None]

close_fd = os.close


class _Forks:
    def __init__(self) -> None:
        self.renew()
        self.hooks: WeakKeyDictionary[Any, Hook] = WeakKeyDictionary()

    def renew(self) -> None:
        self.lock = locks.rlock()  # reentrant: a signal handler or finaliser may come in while its own thread has it
        self.acquire, self.release = self.lock.acquire, self.lock.release


_forks = _Forks()
_NO_LOCK: Final = contextlib.nullcontext()
_PAUSE: Final = 0.001  # seconds
_PIPE_SIZE: Final = 1 << 16  # bytes


def on_fork(owner: T, in_child: Callable[[T], None]) -> None:
    """From each fork on, while ``owner`` lives: call this with it in the child, in the thread that forked."""
    with _forks.lock:
        _forks.hooks[owner] = in_child


def fork_lock(ending: Callable[[], bool] = sys.is_finalizing) -> AbstractContextManager[Any]:
    """Return the lock that keeps forks out, so that a new descriptor and its hook come together. Nothing blocks under it.

    At the interpreter's end nothing forks any more, and a daemon thread may have been stopped under it for good.
    """
    return _NO_LOCK if ending() else _forks.lock


def pause_fork_lock() -> None:
    """Let other threads acquire the lock: a signal handler that waits may have interrupted its own thread under it.

    A child that is forked meanwhile may keep a copy of the descriptor that the interrupted call is making or closing.
    """
    depth = 0
    try:
        with contextlib.suppress(RuntimeError):  # this thread does not hold it any more
            while True:
                _forks.release()
                depth += 1
        if depth:
            time.sleep(_PAUSE)
    finally:
        for _ in range(depth):
            _forks.acquire()


def _in_child() -> None:
    _forks.renew()  # the thread that had the lock may not exist here
    for owner, hook in list(_forks.hooks.items()):
        with contextlib.suppress(Exception):  # one hook's error stops no other
            hook(owner)


class OwnedDescriptor:
    """A descriptor that is closed when nothing refers to this object any more, and in a child at once.

    An interrupt between the call that returns a descriptor and the end of this constructor leaks it, as anywhere in Python.
    """

    __slots__ = ("__weakref__", "_fd", "fd")

    def __init__(self, fd: int) -> None:
        """Take it over, under the same :func:`fork_lock` under which it was received or made."""
        self.fd = self._fd = fd  # `fd` is the one to use; -1 once it is closed
        on_fork(self, OwnedDescriptor.close)

    def fileno(self) -> int:
        return self.fd

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


def duplicate(fd: int) -> OwnedDescriptor:
    """Return another descriptor of the same open file.

    :raises OSError: no descriptor is left.
    """
    with fork_lock():
        return OwnedDescriptor(os.dup(fd))


class WriteEnd(NamedTuple):
    """The end of a child's pipe that the child keeps for life: a number only, as nothing closes it before the process ends.

    A program may close all descriptors that it does not know. So the inode shows whether the number is still this pipe's.
    """

    fd: int
    inode: int

    @classmethod
    def of(cls, fd: int) -> WriteEnd:
        return cls(fd, os.fstat(fd).st_ino)

    @property
    def is_open(self) -> bool:
        try:
            found = os.fstat(self.fd)
        except OSError:
            return False
        return stat.S_ISFIFO(found.st_mode) and found.st_ino == self.inode

    def report(self, subscription: int) -> None:
        """Report to the reader that this channel may be opened by a process that does not hold the write end."""
        if self.is_open:
            with contextlib.suppress(OSError):  # the reader has ended; or it has not read thousands of reports
                os.set_blocking(self.fd, False)
                os.write(self.fd, array("q", (subscription,)))


class ReadEnd(OwnedDescriptor):
    """The end of a child's pipe that the parent keeps, to see whether the child, or a descendant of it, may still live."""

    __slots__ = ("_reports",)

    def __init__(self, fd: int) -> None:
        self._reports: list[bytes] = []
        super().__init__(fd)

    def has_ended(self) -> bool:
        """Return True if no process holds the write end any more."""
        # Poll and read under one lock, as a read by another thread in between would let this one block.
        with fork_lock():
            if self.fd >= 0 and is_ready(self.fd, IN, 0):
                self._reports.extend(map(os.read, (self.fd,), (_PIPE_SIZE,)))  # one step: an interrupt loses nothing
        return self.fd < 0 or (bool(self._reports) and not self._reports[-1])

    @property
    def reports(self) -> array[int]:
        """The subscriptions reported by :meth:`WriteEnd.report`."""
        return array("q", b"".join(self._reports))


class Descendants:
    """Processes below this one that may open a channel: those forked from now on, if :func:`descendants` returns it.

    ``subscription`` is the channel's. One that a descendant pickled for an unknown process may be opened as long as any process
    lives.
    """

    __slots__ = ("__weakref__", "ends", "reported")

    def __init__(self) -> None:
        self.ends: dict[ReadEnd | None, None] = {}  # of each child's pipe; None: no descriptor was left for it
        self.reported: set[int] = set()

    def until_now(self, *others: Descendants) -> Descendants:
        """Return the same processes and those of ``others``, without those that are forked later."""
        made = Descendants()
        for one in (self, *others):
            made.ends.update(one.ends)
            made.reported.update(one.reported)
        return made

    def live(self, subscription: int = 0) -> bool:
        """Return True if one of them, or a process that one of them has pickled the channel for, may live."""
        for end in list(self.ends):
            if end is not None and end.has_ended():
                self.reported.update(end.reports)
                self.ends.pop(end, None)  # a descriptor is closed when nothing refers to it any more
        return bool(self.ends) or subscription in self.reported


class _Pipes:
    """The pipe of the fork that is being made, and all that were returned by :func:`descendants`."""

    def __init__(self) -> None:
        self.threads_without_heirs: set[int] = set()  # their forks are the library's own, and no handle is used in them
        self.ends: tuple[int, ...] = ()
        self.next = Descendants()
        self.before: WeakSet[Descendants] = WeakSet()  # to which each fork adds

    def make(self) -> None:
        if threading.get_ident() not in self.threads_without_heirs and _forks.hooks:  # without a hook, there is no handle
            with contextlib.suppress(OSError):
                self.ends = os.pipe()

    def keep_read_end(self) -> None:
        if threading.get_ident() in self.threads_without_heirs:
            return
        ends, self.ends = self.ends, ()
        if ends:
            os.close(ends[1])  # first: as long as it is open here, all seem to live
        end = ReadEnd(ends[0]) if ends else None
        self.before.add(self.next)
        self.next = Descendants()
        for one in list(self.before):
            one.live()  # so that nothing is kept of those that have ended
            one.ends[end] = None

    def keep_write_end(self) -> None:
        ends, self.ends = self.ends, ()
        if ends:
            os.close(ends[0])  # the end of this process, and of all that it forks, closes the other one
        self.next, self.before = Descendants(), WeakSet()


_pipes = _Pipes()


def descendants() -> Descendants:
    """Return those of this process from now on."""
    return _pipes.next


def write_end_of_fork() -> WriteEnd | None:
    """Return the write end of this process's pipe, in a function that :func:`on_fork` calls; None if there is none."""
    return WriteEnd.of(_pipes.ends[1]) if _pipes.ends else None


def without_heirs(call: Callable[[], None]) -> None:
    """Call this; the processes that this thread forks meanwhile use none of this process's handles."""
    me = threading.get_ident()
    try:
        _pipes.threads_without_heirs.add(me)
        call()
    finally:
        _pipes.threads_without_heirs.discard(me)


os.register_at_fork(after_in_child=_in_child)
os.register_at_fork(before=_pipes.make, after_in_parent=_pipes.keep_read_end, after_in_child=_pipes.keep_write_end)
# The last: what is registered later is called earlier before a fork, and later after it. A child has another lock.
os.register_at_fork(before=partial(methodcaller("acquire"), _forks), after_in_parent=partial(methodcaller("release"), _forks))
