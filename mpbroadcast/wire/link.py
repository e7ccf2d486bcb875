"""The control connection and the pipe, as a user's process holds them.

A process is known to the broker by a :class:`Link`: a *lifeline*, a control connection that is only held open, and a pool of
control connections for requests. Each request has one of these to itself, so a request that waits for long holds up no
other, and one that is interrupted by an exception is thrown away with its connection: no lock, no reply that meets the wrong
question, in threads and in signal handlers.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import select
import socket
import time
from collections import deque
from types import NoneType
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

from mpbroadcast import trap_points
from mpbroadcast.arguments import Deadline
from mpbroadcast.errors import (
    AuthenticationFailed,
    BroadcastError,
    BrokerCrashed,
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
from mpbroadcast.wire.descriptors import DescriptorSocket, PipeEnd, Received, fork_lock, on_fork, receive, taken_apart

CONNECT_TIMEOUT: Final = 10.0  # seconds for connecting and the handshake: a broker that is stopped hangs nobody for ever
_TRIES: Final = 5  # of connecting: so many brokers in a row are replaced
_READ: Final = 1 << 16


class Answer(NamedTuple):
    """What the broker says, and what came with that: a pipe's end, and the socket beside it."""

    said: dict[str, Any]
    end: PipeEnd | None = None
    beside: DescriptorSocket | None = None


class _Control:
    """A control connection of this process, behind its handshake."""

    def __init__(self, address: str, authkey: bytes, deadline: Deadline) -> None:
        self._address = address
        self._inbox = Inbox(MAX_HANDSHAKE)
        self.last_notes = b""  # to be sent before it is closed
        self._numbers: list[int] = []  # of descriptors that have come, and that nothing else has taken over yet
        with fork_lock():
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.setblocking(False)
            on_fork(self, _Control.close)
        try:
            self._connect(deadline)
            trap_points.reach("connected")
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
                trap_points.reach("answering")
                self._send(to_send, deadline)
                to_send = handshake.send(self._receive(deadline))
        except StopIteration as done:
            self._send(done.value, deadline)
        except ControlError as error:
            raise AuthenticationFailed(
                f"the broker at {self._address!r} and this process have different keys ({error.args[0]}): pass the key of "
                "its start_broadcaster() as connect(address, authkey=...)"
            ) from error

    def request(self, message: dict[str, Any], deadline: Deadline, notes: bytes = b"") -> Answer:
        """Ask; ``notes`` go ahead of it, so they have been handled when the answer comes."""
        data = encode(message)
        if len(data) > MAX_REQUEST:
            raise ValueError(f"a request of {len(data)} bytes is too long: name fewer topics in one call")
        self._send(notes + data, deadline)
        trap_points.reach("waiting for a reply", (message["do"], self._socket))
        said = decode(self._receive(deadline))
        numbers = self._numbers
        if not numbers:
            return Answer(said)
        with fork_lock():
            beside = DescriptorSocket(numbers.pop()) if said.get("beside") else None
            return Answer(said, PipeEnd(numbers.pop(0)) if numbers else None, beside)

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
        received: list[Received] = []
        with fork_lock():
            receive(self._socket, _READ, received)
            data, numbers, lost = taken_apart(received[0])
            self._numbers += numbers
        if lost:
            raise OSError(errno.EMFILE, "no descriptor is left in this process for a pipe: close some, or raise `ulimit -n`")
        return data

    def _wait(self, events: int, deadline: Deadline) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(deadline.milliseconds()):
            raise TimedOut("the broker did not answer in time")

    def _lost(self) -> BrokerLost:
        return BrokerLost(f"the broker at {self._address!r} has ended")

    def last_words(self) -> str | None:
        """What the broker has said without being asked, if it has."""
        with contextlib.suppress(OSError, ControlError):
            self._inbox.feed(self._read())
            body = self._inbox.next()
            if body is not None:
                return str(decode(body).get("crashed", ""))
        return None

    def write_now(self, note: bytes) -> None:
        """Send a short note without an answer. From a finaliser, too: it takes no lock.

        A note is sent whole or not at all, also when threads send at once: Linux puts so few bytes into one buffer, and the
        BSDs take less than a request only when there is room for ``SO_SNDLOWAT``, 1,024 bytes or more.

        :raises BlockingIOError: there is no room.
        :raises OSError: the other end is gone.
        """
        self._socket.send(note)

    def send_last_notes(self) -> bool:
        """Send what is left of ``last_notes``, without blocking; whether nothing is left."""
        try:
            self.last_notes = self.last_notes[self._socket.send(self.last_notes) :]
        except BlockingIOError:
            return False
        except OSError:  # the broker has ended
            return True
        return not self.last_notes

    def close(self) -> None:
        self._socket.close()
        while self._numbers:
            os.close(self._numbers.pop())

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()


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
        self._crash: BrokerCrashed | None = None
        self._dropped: set[int] = set()
        self._sent: set[int] = set()  # those of them that a waiting publish need not send again
        self.inherited = False  # made before a fork, and of no use in this process
        deadline = Deadline(CONNECT_TIMEOUT)
        self._lifeline = _Control(address, self._authkey, deadline)
        said = self._lifeline.request({"do": "attach"}, deadline).said
        self.session = int(said["session"])
        self.broker = str(said["broker"])
        self._dropped = dropped.setdefault(self.broker, set())
        self.number = int(said["number"])  # of the brokers that follow each other
        self.restarts = bool(said["restarts"])  # whether another one will follow
        self.lost = False  # whether this one is known to have ended
        on_fork(self, Link._in_child)
        _links[address] = self

    @classmethod
    def shared(cls, address: str, broker: str) -> Link:
        """The one to ``broker`` that this process has already, or a new one to whatever listens there now."""
        link = _links.get(address)
        if link is not None and link.broker == broker and not link.lost:
            return link
        return cls.found(address)

    @classmethod
    def found(cls, address: str, authkey: bytes | None = None) -> Link:
        """A new one to whatever listens there.

        While a broker is being replaced, it waits in the queue of the socket. One that dies during the handshake may be
        replaced as well, so that is tried again.
        """
        tries = _TRIES
        while True:
            try:
                return cls(address, authkey)
            except BrokerLost as error:
                tries -= 1
                if not tries or not isinstance(error.__cause__, (ConnectionResetError, BrokenPipeError, NoneType)):
                    raise

    def request(self, do: str, *, deadline: Deadline | None = None, **fields: Any) -> Answer:
        """Ask the broker. Waits until ``deadline``, or for ever.

        :raises BrokerLost: it has ended.
        :raises TimedOut: it did not answer in time.
        :raises ChannelInUse, ClosedError, ValueError, OSError: what it says.
        """
        deadline = deadline or Deadline(None)
        _send_last_notes()
        to_drop = list(self._dropped)
        control = None
        with contextlib.suppress(IndexError):
            control = self._idle.pop()
        try:
            if control is None:
                control = _Control(self.address, self._authkey, sooner(deadline, CONNECT_TIMEOUT))
            answer = control.request(
                {"do": do, "session": self.session, **fields}, deadline, b"".join(map(_drop_note, to_drop))
            )
        except BaseException as error:
            if control is not None:
                control.close()
            if isinstance(error, BrokerLost):
                self.lost = True
                error.__cause__ = self.crash or error.__cause__
            raise
        if answer.said.get("error") == "unknown":  # it was another broker that has answered
            control.close()
            self.lost = True
            raise BrokerLost(str(answer.said["text"]))
        self._idle.append(control)
        for number in to_drop:
            self._dropped.discard(number)
        self._sent.clear()
        if "error" in answer.said:
            raise _error(answer.said)
        return answer

    @property
    def crash(self) -> BrokerCrashed | None:
        """What the broker has said of its crash, if that is how it ended."""
        if self._crash is None and not self.inherited:
            text = self._lifeline.last_words()
            self._crash = BrokerCrashed(text) if text else None
        return self._crash

    def note(self, do: str, **fields: Any) -> None:
        """Tell the broker, without an answer, without blocking: what a finaliser may do."""
        with contextlib.suppress(OSError):
            self._lifeline.write_now(encode({"do": do, **fields}))

    def drop(self, number: int) -> bool:
        """Drop a subscription, without blocking; whether there was room for the note.

        A connection for requests takes it, if one is idle: so the lifeline has room for its last notes.
        """
        control = self._lifeline
        with contextlib.suppress(IndexError):
            control = self._idle.pop()
        try:
            control.write_now(_drop_note(number))
            if self.restarts:  # this broker may die before it reads that: the next request repeats it
                self._sent.add(number)
            else:
                self._dropped.discard(number)
        except BlockingIOError:
            return False
        except OSError:  # the next request finds out what has happened
            pass
        finally:
            if control is not self._lifeline:
                self._idle.append(control)
        return True

    def _in_child(self) -> None:
        self.inherited = True
        self._idle.clear()
        _links.clear()
        _leaving.clear()
        dropped.clear()

    def close(self) -> None:
        """Let go of all connections: the broker has ended, or nothing here needs it any more."""
        self.lost, self.restarts = True, False
        self._lifeline.close()
        while self._idle:
            self._idle.pop().close()

    def __del__(self) -> None:
        if not self.inherited and hasattr(self, "_lifeline"):
            self._lifeline.last_notes = b"".join(map(_drop_note, list(self._dropped))) + encode({"do": "detach"})
            _leaving.append(self._lifeline)
            _send_last_notes()


def drop(link: Link | None, address: str, broker: str, number: int) -> None:
    """Drop a subscription that nothing here holds any more; the next broker does, if this one has died. From a finaliser."""
    if link is None or link.lost:
        link = _links.get(address, link)
    if link is None or not link.lost or link.restarts:
        dropped.setdefault(broker, set()).add(number)
        if link is not None and link.broker == broker:
            link.drop(number)


def send_notes() -> None:
    """Try again to send what finalisers could not, without blocking. A publish calls it again and again while it waits."""
    for reference in _links.valuerefs():
        link = reference()
        if link is not None and not link.lost:
            all(map(link.drop, link._dropped - link._sent))
    _send_last_notes()


def _send_last_notes() -> None:
    for _ in range(len(_leaving)):
        with contextlib.suppress(IndexError):  # another thread has taken it out
            lifeline = _leaving.popleft()
            if not lifeline.send_last_notes():
                _leaving.append(lifeline)


def _drop_note(number: int) -> bytes:
    return encode({"do": "drop", "subscription": number})


# For each broker, the subscriptions that nothing here holds any more, and that it may not have dropped yet. A finaliser may
# come in at any moment, so each change is a single step.
dropped: dict[str, set[int]] = {}
_leaving: deque[_Control] = deque()  # lifelines of links that are gone, until there is room for their last notes
_links: WeakValueDictionary[str, Link] = WeakValueDictionary()
_keys: dict[str, bytes] = {}


def remember_key(address: str, authkey: bytes) -> None:
    """For handles of this process, and of those that it forks, that come without a key."""
    _keys[address] = authkey


def for_answer(deadline: Deadline) -> Deadline:
    """For asking something that is answered at once, on the way to what ``deadline`` is for: 0 does not forbid to ask."""
    left = deadline.left()
    return Deadline(None if left is None else max(left, CONNECT_TIMEOUT))


def sooner(deadline: Deadline, seconds: float) -> Deadline:
    """In ``seconds``, or at ``deadline`` if that comes first."""
    left = deadline.left()
    return Deadline(seconds if left is None else min(left, seconds))


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
