"""The control connection and the pipe, as a user's process holds them.

A process is known to the broker by a :class:`Link`: a *lifeline*, a control connection that is only held open, and a pool of
control connections for requests. Each request has one of these to itself, so a request that waits for long holds up no
other, and one that is interrupted by an exception is thrown away with its connection: no lock, no reply that meets the wrong
question, in threads and in signal handlers.

Descriptors and forks: everything here that owns a descriptor has a hook for forks, and gets it under the lock that ``os.fork``
takes. So a child closes all its inherited copies, whatever another thread was doing.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import select
import socket
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from mpbroadcast.arguments import Deadline
from mpbroadcast.errors import (
    AuthenticationFailed,
    BroadcastError,
    BrokerLost,
    ChannelInUse,
    ClosedError,
    TimedOut,
)
from mpbroadcast.wire.control import (
    MAX_HANDSHAKE,
    MAX_REPLY,
    MAX_REQUEST,
    ControlError,
    Handshake,
    Inbox,
    client_handshake,
    decode,
    encode,
)

__all__ = ["CONNECT_TIMEOUT", "Link", "PipeEnd", "for_answer", "on_fork", "remember_key"]

CONNECT_TIMEOUT: Final = 10.0  # seconds for connecting and the handshake: a broker that is stopped hangs nobody for ever
_READ: Final = 1 << 16
_SPACE: Final = socket.CMSG_SPACE(array("i").itemsize)


T = TypeVar("T")
Hook = Callable[[Any], None]


class _Forks:
    """Who wants to know of forks, with what to call; and the lock that keeps forks out."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: a signal handler or finaliser may come in while its own thread has it
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


def _before_fork() -> None:
    _forks.lock.acquire()


def _after_fork_in_parent() -> None:
    try:
        _forks.call(1)
    finally:
        _forks.lock.release()


def _after_fork_in_child() -> None:
    _forks.lock = threading.RLock()
    _links.clear()
    _forks.call(0)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


class PipeEnd:
    """One end of a pipe, closed safely while other threads use it, without a lock.

    A call that was given ``fd`` may still be on its way into the kernel when another thread closes this end. So the number is
    not given back at once, for somebody else's file to get it: :meth:`close` lets go of the pipe by putting another, dead
    pipe in its place, and the number goes when nothing refers to this object any more, such as a thread that is using it.
    """

    __slots__ = ("__weakref__", "_number", "fd")

    def __init__(self, numbers: list[int]) -> None:
        """Take the first of ``numbers`` over; at no moment is it in both places, or in none."""
        self.fd = self._number = -1
        on_fork(self, PipeEnd._in_child)
        with _forks.lock:
            self._number = numbers[0]
            del numbers[0]
            self.fd = self._number  # what to use; -1 once it is closed

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
            os.close(writer)
            os.dup2(reader, fd, inheritable=False)
            os.close(reader)

    def _in_child(self) -> None:
        self.fd = -1
        self._give_back()

    def _give_back(self) -> None:
        with _forks.lock:  # so that a child has a copy of it only while this knows of it; nothing waits under this lock
            number, self._number = self._number, -1
            if number >= 0:
                os.close(number)

    def __del__(self) -> None:
        if hasattr(self, "_number"):  # else an interrupt came before there was one
            self._give_back()


class _Control:
    """A control connection of this process, behind its handshake."""

    def __init__(self, address: str, authkey: bytes, deadline: Deadline) -> None:
        self._address = address
        self._inbox = Inbox(MAX_HANDSHAKE)
        self._received: list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = []
        self._numbers: list[int] = []  # of descriptors that have come, and that nothing else has taken over yet
        with _forks.lock:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.setblocking(False)
            on_fork(self, _Control._in_child)
        try:
            self._connect(deadline)
            self._shake_hands(client_handshake(authkey), deadline)
        except BaseException:
            self.close()
            raise
        self._inbox.limit = MAX_REPLY

    def _connect(self, deadline: Deadline) -> None:
        while True:
            try:
                with contextlib.suppress(BlockingIOError):
                    self._socket.connect(self._address)
                    return
            except OSError as error:
                raise BrokerLost(
                    f"no broker answers at {self._address!r} ({error.strerror}): it has ended, or this is not what its "
                    "`address` says"
                ) from error
            if deadline.left() == 0:
                raise TimedOut(f"the broker at {self._address!r} took no connection in time")
            time.sleep(0.005)  # its queue is full

    def _shake_hands(self, handshake: Handshake, deadline: Deadline) -> None:
        to_send = next(handshake)
        try:
            while True:
                self._send(to_send, deadline)
                to_send = handshake.send(self._receive(deadline))
        except StopIteration as done:
            self._send(done.value, deadline)
        except ControlError as error:
            raise AuthenticationFailed(
                f"the broker at {self._address!r} and this process have different keys ({error.args[0]}): pass the key of "
                "its start_broadcaster() as connect(address, authkey=...)"
            ) from error

    def request(self, message: dict[str, Any], deadline: Deadline) -> tuple[dict[str, Any], PipeEnd | None]:
        data = encode(message)
        if len(data) > MAX_REQUEST:
            raise ValueError(f"a request of {len(data)} bytes is too long: name fewer topics in one call")
        self._send(data, deadline)
        reply = decode(self._receive(deadline))
        return reply, PipeEnd(self._numbers) if self._numbers else None

    def _send(self, data: bytes, deadline: Deadline) -> None:
        view = memoryview(data)
        while view:
            try:
                with contextlib.suppress(BlockingIOError):
                    view = view[self._socket.send(view) :]
                    continue
            except OSError as error:
                raise self._lost() from error
            self._wait(select.POLLOUT, deadline)

    def _receive(self, deadline: Deadline) -> bytes:
        while True:
            body = self._inbox.next()
            if body is not None:
                return body
            data = None
            try:
                with contextlib.suppress(BlockingIOError):
                    data = self._read()
            except ConnectionError as error:
                raise self._lost() from error
            if data is None:
                self._wait(select.POLLIN, deadline)
            elif data:
                self._inbox.feed(data)
            else:
                raise self._lost()

    def _read(self) -> bytes:
        """What is there, at once; the descriptors that came with it are in ``_numbers``."""
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        with _forks.lock:
            # By map, so that an interrupt has no moment in which descriptors have come and are nowhere.
            self._received.extend(map(self._socket.recvmsg, (_READ,), (_SPACE,), (flags,)))
            data, _, got, _ = self._received[0]
            self._numbers.extend(_descriptors(self._received))
            del self._received[:]
        if not flags:
            for number in self._numbers:
                os.set_inheritable(number, False)
        if got & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, "no descriptor is left in this process for a pipe: close some, or raise `ulimit -n`")
        return data

    def _wait(self, events: int, deadline: Deadline) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(deadline.milliseconds()):
            raise TimedOut("the broker did not answer in time")

    def _lost(self) -> BrokerLost:
        return BrokerLost(f"the broker at {self._address!r} has ended")

    def write_now(self, data: bytes) -> None:
        """A short note without an answer, if there is room for it. From a finaliser, too."""
        with contextlib.suppress(OSError):
            self._socket.send(data)

    def close(self) -> None:
        self._socket.close()
        numbers = {*self._numbers, *_descriptors(self._received)}
        self._numbers.clear()
        self._received.clear()
        for number in numbers:
            os.close(number)

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()

    def _in_child(self) -> None:
        self.close()


def _descriptors(received: list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]]) -> list[int]:
    numbers = array("i")
    for _, ancillary, _, _ in received:
        for level, kind, body in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(body[: len(body) - len(body) % numbers.itemsize])
    return numbers.tolist()


class Link:
    """This process, as the broker at ``address`` knows it. It lasts until nothing refers to it any more.

    :raises BrokerLost: there is no broker.
    :raises AuthenticationFailed: it has another key.
    :raises TimedOut: it did not answer within ``CONNECT_TIMEOUT`` seconds.
    """

    def __init__(self, address: str, authkey: bytes | None = None) -> None:
        self.address = address
        self._authkey = authkey or _keys.get(address) or bytes(multiprocessing.current_process().authkey)
        self._idle: list[_Control] = []
        self.inherited = False  # made before a fork, and of no use in this process
        deadline = Deadline(CONNECT_TIMEOUT)
        self._lifeline = _Control(address, self._authkey, deadline)
        reply, _ = self._lifeline.request({"do": "attach"}, deadline)
        self.session = int(reply["session"])
        self.broker = str(reply["broker"])
        on_fork(self, Link._in_child)
        _links[address] = self

    @classmethod
    def shared(cls, address: str, broker: str) -> Link:
        """The one to ``broker`` that this process has already, or a new one to whatever listens there now."""
        link = _links.get(address)
        return link if link is not None and link.broker == broker else cls(address)

    def request(self, do: str, *, deadline: Deadline | None = None, **fields: Any) -> tuple[dict[str, Any], PipeEnd | None]:
        """Ask the broker; the answer, and the pipe's end that came with it. Waits until ``deadline``, or for ever.

        :raises BrokerLost: it has ended.
        :raises TimedOut: it did not answer in time.
        :raises ChannelInUse, ClosedError, ValueError, OSError: what it says.
        """
        deadline = deadline or Deadline(None)
        control = None
        with contextlib.suppress(IndexError):
            control = self._idle.pop()
        if control is None:
            control = _Control(self.address, self._authkey, _sooner(deadline))
        try:
            reply, end = control.request({"do": do, "session": self.session, **fields}, deadline)
        except BaseException:
            control.close()
            raise
        self._idle.append(control)
        if "error" in reply:
            raise _error(reply)
        return reply, end

    def note(self, do: str, **fields: Any) -> None:
        """Tell the broker, without an answer, without blocking: what a finaliser may do."""
        self._lifeline.write_now(encode({"do": do, **fields}))

    def _in_child(self) -> None:
        self.inherited = True
        self._idle.clear()

    def close(self) -> None:
        """Let go of all connections: the broker has ended, or nothing here needs it any more."""
        self._lifeline.close()
        while self._idle:
            self._idle.pop().close()

    def __del__(self) -> None:
        if not self.inherited and hasattr(self, "_lifeline"):
            self.note("detach")
            self.close()


_links: WeakValueDictionary[str, Link] = WeakValueDictionary()
_keys: dict[str, bytes] = {}


def remember_key(address: str, authkey: bytes) -> None:
    """For handles of this process, and of those that it forks, that come without a key."""
    _keys[address] = authkey


def for_answer(deadline: Deadline) -> Deadline:
    """For asking something that is answered at once, on the way to what ``deadline`` is for: 0 does not forbid to ask."""
    left = deadline.left()
    return Deadline(None if left is None else max(left, CONNECT_TIMEOUT))


def _sooner(deadline: Deadline) -> Deadline:
    left = deadline.left()
    return Deadline(CONNECT_TIMEOUT if left is None else min(left, CONNECT_TIMEOUT))


def _error(reply: dict[str, Any]) -> Exception:
    kind, text = str(reply["error"]), str(reply.get("text", ""))
    match kind:
        case "in use":
            return ChannelInUse(text, int(reply.get("pid", 0)))
        case "closed":
            return ClosedError(text)
        case "value":
            return ValueError(text)
        case "system":
            return OSError(int(reply.get("errno", 0)), text)
        case "lost":
            return BrokerLost(text)
    return BroadcastError(text)
