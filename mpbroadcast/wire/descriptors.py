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
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, starmap
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from mpbroadcast.arguments import Deadline

_SPACE: Final = socket.CMSG_SPACE(2 * array("i").itemsize)
_PACKET: Final = 64  # bytes of one on a descriptor socket at the most

T = TypeVar("T")
Hook = Callable[[Any], None]
Received = list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]]


class _Forks:
    """Who wants to know of forks, with what to call; and the lock that keeps forks out."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: a signal handler or finaliser may come in while its own thread has it
        self.heirless = 0  # a thread whose forks are the library's own, in which no handle is used
        self.hooks: WeakKeyDictionary[Any, tuple[Hook, Hook | None]] = WeakKeyDictionary()

    def call(self, which: int) -> None:
        for something, hooks in list(self.hooks.items()):
            hook = hooks[which]
            if hook is not None:
                with contextlib.suppress(Exception):  # one handle's error stops no other
                    hook(something)


_forks = _Forks()


def on_fork(something: T, in_child: Callable[[T], None], in_parent: Callable[[T], None] | None = None) -> None:
    """From each fork on, while ``something`` lives: call these with it, in the thread that forked. They must not block."""
    with _forks.lock:
        _forks.hooks[something] = (in_child, in_parent)


def fork_lock(ending: Callable[[], bool] = sys.is_finalizing) -> AbstractContextManager[Any]:
    """While it is held nothing forks, so that what gets a descriptor can get its hook, too. Nothing waits under it.

    At the interpreter's end nothing forks any more, and a daemon thread may have been stopped under it for good.
    """
    return _NO_LOCK if ending() else _forks.lock


_NO_LOCK: Final = contextlib.nullcontext()


def _before_fork() -> None:
    _forks.lock.acquire()


@contextlib.contextmanager
def without_heirs() -> Iterator[None]:
    """What this thread forks meanwhile uses none of this process's handles."""
    _forks.heirless = threading.get_ident()
    try:
        yield
    finally:
        _forks.heirless = 0


def _after_fork_in_parent() -> None:
    try:
        if _forks.heirless != threading.get_ident():
            _forks.call(1)
    finally:
        _forks.lock.release()


def _after_fork_in_child() -> None:
    _forks.lock = threading.RLock()
    _forks.call(0)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


class OwnedDescriptor:
    """A descriptor that is closed when nothing refers to this any more, and in a child at once."""

    __slots__ = ("__weakref__", "_number", "fd")

    def __init__(self, numbers: list[int]) -> None:
        """Take the first of ``numbers`` over; at no moment is it in both places, or in none."""
        self.fd = self._number = -1
        on_fork(self, OwnedDescriptor._in_child)
        with _forks.lock:
            self._number = numbers[0]
            del numbers[0]
            self.fd = self._number  # what to use; -1 once it is closed

    @classmethod
    def made_by(cls, make: Callable[..., int], *args: Any) -> OwnedDescriptor:
        """Of what ``make(*args)`` returns."""
        numbers: list[int] = []
        try:
            with _forks.lock:
                numbers.extend(map(make, *((arg,) for arg in args)))
                return cls(numbers)
        except BaseException:
            for number in numbers:  # an interrupt came before it was taken over
                os.close(number)
            raise

    def close(self) -> None:
        """Close it, unless that has been done."""
        self.fd = -1
        self._give_back()

    def _in_child(self) -> None:
        self.fd = -1
        self._give_back()

    def _give_back(self) -> None:
        with fork_lock():  # so that a child has a copy of it only while this knows of it; nothing waits under this lock
            number, self._number = self._number, -1
            if number >= 0:
                os.close(number)

    def __del__(self) -> None:
        if hasattr(self, "_number"):  # else an interrupt came before there was one
            self._give_back()


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
        ends: list[int] = []
        closing = map(os.close, ends)  # here, as there is one call in the end, and so no interrupt before it
        try:
            with contextlib.suppress(OSError):  # no descriptor is left: then it stays open until nothing refers to it
                ends.extend(chain.from_iterable(starmap(os.pipe, ((),))))  # one step, as far as an interrupt can see
                os.dup2(ends[0], fd, inheritable=False)
        finally:
            deque(closing, maxlen=0)


def receive(connection: socket.socket, size: int, received: Received, numbers: list[int]) -> tuple[bytes, bool]:
    """What is there, at once, and whether descriptors were lost; those that came with it are in ``numbers``.

    ``received`` is a list that is empty in between: an interrupt leaves there what it kept from getting into ``numbers``.

    :raises BlockingIOError: nothing is there.
    """
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    with _forks.lock:
        # By map, so that an interrupt has no moment in which descriptors have come and are nowhere.
        received.extend(map(connection.recvmsg, (size,), (_SPACE,), (flags,)))
        data, _, got, _ = received[0]
        numbers.extend(_descriptors_in(received))
        del received[:]
    if not flags:
        for number in numbers:
            os.set_inheritable(number, False)
    return data, bool(got & socket.MSG_CTRUNC)


def close_received(received: Received, numbers: list[int]) -> None:
    """Close what has come and has not been taken over."""
    left = {*numbers, *_descriptors_in(received)}
    numbers.clear()
    received.clear()
    for number in left:
        os.close(number)


def _descriptors_in(received: Received) -> list[int]:
    """The descriptors that came with these."""
    numbers = array("i")
    for _, ancillary, _, _ in received:
        for level, kind, body in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(body[: len(body) - len(body) % numbers.itemsize])
    return numbers.tolist()


class DescriptorSocket(socket.socket):
    """The socket beside a pipe, on which descriptors travel, and small packets that belong to them. It never blocks.

    Who closes it sees to it that no other thread uses it at that moment.
    """

    def __init__(self, numbers: list[int]) -> None:
        """Take the first of ``numbers`` over."""
        self._received: Received = []
        self._io_refs, self._closed = 0, False  # as the base class has it: an interrupt may come before that is there
        self.entry: tuple[bytes, int] | None = None  # what :meth:`hear` has returned, until that is done with
        try:
            with _forks.lock:
                super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, numbers[0])
                del numbers[0]
                on_fork(self, DescriptorSocket.close)
        except BaseException:
            if self.fileno() in numbers:
                self.detach()  # who has the number there closes it
            raise
        self.setblocking(False)

    def tell(self, packet: bytes, fd: int = -1) -> bool:
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

    def hear_plain(self) -> bytes | None:
        """The next packet where none has a descriptor; ``None`` when none is there; an empty one at the end.

        :raises OSError: the other end is gone.
        """
        with contextlib.suppress(BlockingIOError):
            return self.recv(_PACKET)
        return None

    def hear(self) -> tuple[bytes, int] | None:
        """The next packet and its descriptor, or -1; ``None`` when none is there; an empty one at the end.

        It is the next one again until :meth:`done`, or until who takes the descriptor over sets :attr:`entry` to ``None``: so
        an interrupt in between costs nothing.

        :raises OSError: the other end is gone.
        """
        if self.entry is None:
            try:
                with _forks.lock:
                    if not self._received:
                        self._receive()
                    numbers = _descriptors_in(self._received)
                    entry = self._received[0][0], numbers[0] if numbers else -1
                    self.entry, self._received = entry, []  # in one step, as far as an interrupt can see
            except BlockingIOError:
                return None
            for number in numbers[1:]:  # nobody sends so many
                os.close(number)
        return self.entry

    def _receive(self) -> None:
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        try:
            self._received.extend(map(self.recvmsg, (_PACKET,), (_SPACE,), (flags,)))
        except ConnectionResetError:
            # The other end was closed before it had read all: that is said once, before what is still there.
            self._received.extend(map(self.recvmsg, (_PACKET,), (_SPACE,), (flags,)))

    def done(self) -> None:
        """Be done with what was heard."""
        entry = self.entry
        self.entry = None
        if entry is not None and entry[1] >= 0:
            os.close(entry[1])

    def close(self) -> None:
        """Close it; it can be called again."""
        super().close()
        self.done()
        close_received(self._received, [])

    def __del__(self) -> None:
        if hasattr(self, "entry"):
            self.close()
