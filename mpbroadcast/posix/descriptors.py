"""Descriptors that a process owns: safe with forks, with other threads, and with interrupts.

Everything here that owns a descriptor has a hook for forks, and gets it under the lock that ``os.fork`` takes. So a child
closes all its inherited copies, whatever another thread was doing.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import sys
import threading
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from operator import methodcaller
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from mpbroadcast.deadline import Deadline
from mpbroadcast.posix import locks

_SPACE: Final = socket.CMSG_SPACE(2 * array("i").itemsize)
_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_PACKET: Final = 64  # bytes of one on a descriptor socket at the most

T = TypeVar("T")
Hook = Callable[[Any], None]
Received = tuple[bytes, list[tuple[int, int, bytes]], int, Any]  # as `recvmsg` returns it


class _Forks:
    """Who wants to know of forks, with what to call; and the lock that keeps forks out."""

    def __init__(self) -> None:
        self.renew()
        self.heirless = 0  # a thread whose forks are the library's own, in which no handle is used
        self.hooks: WeakKeyDictionary[Any, Hook] = WeakKeyDictionary()
        self.ends: tuple[int, ...] = ()  # of a pipe whose write end only the process has that is being forked
        self.next = Descendants()
        self.last: WeakSet[Descendants] = WeakSet()  # those before it

    def renew(self) -> None:
        self.lock = locks.rlock()  # reentrant: a signal handler or finaliser may come in while its own thread has it
        self.acquire, self.release = self.lock.acquire, self.lock.release

    def call(self) -> None:
        for something, hook in list(self.hooks.items()):
            with contextlib.suppress(Exception):  # one handle's error stops no other
                hook(something)

    def note(self) -> None:
        """One has been forked."""
        ends, self.ends = self.ends, ()
        for one in list(self.last):  # so that nothing is kept of those that have ended
            one.live()
        before, self.next = self.next, Descendants()
        self.last.add(before)
        if ends:
            os.close(ends[1])
        before.begin(OwnedDescriptor(ends[0]) if ends else None, self.next)


class Descendants:
    """The processes that are forked from now on, and those that they fork.

    Each fork has a pipe of its own: the new process, and what that forks, keep its write end for as long as they live. What is
    forked later is in a chain of these, which is as long as something in front of it is held.
    """

    __slots__ = ("__weakref__", "_end", "_later")

    def __init__(self) -> None:
        self._end: OwnedDescriptor | None = None  # of the first one's pipe; None: no descriptor was left for it
        self._later: Descendants | None = None  # None: nothing has been forked since

    def begin(self, end: OwnedDescriptor | None, later: Descendants) -> None:
        """The first one has been forked."""
        self._end, self._later = end, later

    def live(self) -> bool:
        """Whether one of them may live."""
        while (later := self._later) is not None:
            if self._end is None:
                return True
            if self._end.fd >= 0:
                poll = select.poll()
                poll.register(self._end.fd, 0)
                if not poll.poll(0):
                    return True
                self._end.close()  # the first has ended
            if later._later is None:
                return False
            self._end, self._later = later._end, later._later
        return False


def descendants() -> Descendants:
    """Those of this process from now on."""
    return _forks.next


_forks = _Forks()


def on_fork(something: T, in_child: Callable[[T], None]) -> None:
    """From each fork on, while ``something`` lives: call this with it in the child, in the thread that forked."""
    with _forks.lock:
        _forks.hooks[something] = in_child


def fork_lock(ending: Callable[[], bool] = sys.is_finalizing) -> AbstractContextManager[Any]:
    """While it is held nothing forks, so that what gets a descriptor can get its hook, too. Nothing waits under it.

    At the interpreter's end nothing forks any more, and a daemon thread may have been stopped under it for good.
    """
    return _NO_LOCK if ending() else _forks.lock


_NO_LOCK: Final = contextlib.nullcontext()


def _before_fork() -> None:
    if _forks.heirless != threading.get_ident() and _forks.hooks:
        with contextlib.suppress(OSError):
            _forks.ends = os.pipe()


def without_heirs(call: Callable[[], None]) -> None:
    """Call this; the processes that this thread forks meanwhile use none of this process's handles."""
    try:
        _forks.heirless = threading.get_ident()
        call()
    finally:
        _forks.heirless = 0


def _after_fork_in_parent() -> None:
    if _forks.heirless != threading.get_ident():
        _forks.note()


def _after_fork_in_child() -> None:
    _forks.renew()
    ends, _forks.ends = _forks.ends, ()
    if ends:
        os.close(ends[0])  # and the other is closed by the end of this process, and of all that it forks
    _forks.next, _forks.last = Descendants(), WeakSet()
    _forks.call()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
# The lock is taken before, and released after it, by functions in C: an interrupt at the start of a hook in Python skips it.
os.register_at_fork(before=partial(methodcaller("acquire"), _forks), after_in_parent=partial(methodcaller("release"), _forks))


class OwnedDescriptor:
    """A descriptor that is closed when nothing refers to this any more, and in a child at once.

    An interrupt between the call that returns a descriptor and the end of this constructor leaks it, as anywhere in Python.
    """

    __slots__ = ("__weakref__", "_number", "fd")

    def __init__(self, number: int) -> None:
        """Take it over. Whoever has just received or made it does so under the same :func:`fork_lock`."""
        self.fd = self._number = number  # `fd` is what to use; -1 once it is closed
        on_fork(self, OwnedDescriptor.close)

    def close(self) -> None:
        """Close it, unless that has been done."""
        self.fd = -1
        with fork_lock():  # so that a child has a copy of it only while this knows of it; nothing waits under this lock
            number, self._number = self._number, -1  # before it is closed: an interrupt may leak it, never close it twice
            if number >= 0:
                os.close(number)

    def __del__(self) -> None:
        if hasattr(self, "_number"):  # else an interrupt came before there was one
            OwnedDescriptor.close(self)


class PipeEnd(OwnedDescriptor):
    """One end of a pipe, closed safely while other threads use it, without a lock.

    A call that was given ``fd`` may still be on its way into the kernel when another thread closes this end. So the number is
    not given back at once, for somebody else's file to get it: :meth:`close` lets go of the pipe by putting another, dead
    pipe in its place, and the number goes when nothing refers to this object any more, such as a thread that is using it.
    """

    __slots__ = ()

    def wait(self, events: int, deadline: Deadline) -> bool:
        """Whether one of ``events``, or an error, or the closing of either end, came before the deadline.

        A thread that waits is woken by the broker's closing of the other end: who calls :meth:`close` has to ask it for that.
        """
        poll = select.poll()
        fd = self.fd
        if fd < 0:
            return True
        poll.register(fd, events)
        return bool(poll.poll(deadline.milliseconds()))

    def close(self) -> None:
        """Let go of the pipe."""
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        with contextlib.suppress(OSError):  # no descriptor is left: then it stays open until nothing refers to it
            reader, writer = os.pipe()
            try:
                os.dup2(reader, fd, inheritable=False)
            finally:
                os.close(reader)
                os.close(writer)


def receive(connection: socket.socket, size: int) -> Received:
    """What is there, with descriptors, which get an owner under the same :func:`fork_lock`.

    :raises BlockingIOError: nothing is there.
    """
    return connection.recvmsg(size, _SPACE, _CLOEXEC)


def taken_apart(received: Received) -> tuple[bytes, list[int], bool]:
    """The data, the descriptors that came with it, and whether others were lost."""
    data, ancillary, flags, _ = received
    numbers = array("i")
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(body[: len(body) - len(body) % numbers.itemsize])
    if not _CLOEXEC:
        for number in numbers:
            os.set_inheritable(number, False)
    return data, numbers.tolist(), bool(flags & socket.MSG_CTRUNC)


class DescriptorSocket(socket.socket):
    """The socket beside a pipe, on which descriptors travel, and small packets that belong to them. It never blocks.

    Who closes it sees to it that no other thread uses it at that moment.
    """

    def __init__(self, number: int) -> None:
        """Take the descriptor over; see :class:`OwnedDescriptor`."""
        super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, number)
        on_fork(self, DescriptorSocket.close)
        self.setblocking(False)

    def send_packet(self, packet: bytes, fd: int = -1) -> bool:
        """Send a packet, and a descriptor with it; whether there was room for it.

        :raises OSError: the other end is gone, or the system does not take a descriptor.
        """
        with contextlib.suppress(BlockingIOError):
            self.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))] if fd >= 0 else [])
            return True
        return False

    def wait(self, seconds: float) -> bool:
        """Whether something is there, or the other end gone, within that time, rounded up to whole milliseconds."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return bool(poll.poll(math.ceil(seconds * 1000)))

    def receive_packet(self) -> bytes | None:
        """As :meth:`hear`, where no packet has a descriptor."""
        with contextlib.suppress(BlockingIOError):
            return self.recv(_PACKET)
        return None

    def receive_packet_with_fd(self) -> tuple[bytes, OwnedDescriptor | None] | None:
        """The next packet and its descriptor; ``None`` when none is there; an empty one at the end.

        :raises OSError: the other end is gone.
        """
        received: list[Received] = []
        with contextlib.suppress(BlockingIOError), fork_lock():
            self.receive(received)
            packet, numbers, _ = taken_apart(received[0])
            owned = list(map(OwnedDescriptor, numbers))  # nobody sends more than one; no loop under a lock
            return packet, owned[0] if owned else None
        return None

    def receive(self, received: list[Received]) -> None:
        """Append the next packet, as :func:`receive` returns it: in one step, so that an interrupt comes before or after."""
        # When the other end was closed before it had read all, that is said once, before what is still there.
        with contextlib.suppress(ConnectionResetError):
            received.extend(map(self.recvmsg, (_PACKET,), (_SPACE,), (_CLOEXEC,)))
            return
        received.extend(map(self.recvmsg, (_PACKET,), (_SPACE,), (_CLOEXEC,)))

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupt came before it was made
            self.close()
