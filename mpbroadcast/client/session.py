"""The control connection and the pipe, as a user's process holds them.

A process has one :class:`Link` to a broker, and to each that takes over from it. A :class:`Session` is what one of these
knows the process by: a *lifeline*, a control connection that is only held open, and a pool of control connections for
requests. Each request has one of these to itself, so a request that waits for long holds up no other, and one that is
interrupted by an exception is thrown away with its connection: no lock, no reply that meets the wrong question, in threads and
in signal handlers.

A finaliser sends *notes*, which have no answer: at once if there is room, without a lock. Those that had none go ahead of the
next request, or while a publish waits.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Final, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from mpbroadcast import trap_points
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import (
    AuthenticationFailed,
    BroadcastError,
    BrokerCrashed,
    BrokerLost,
    ChannelInUse,
    ClosedError,
    TimedOut,
)
from mpbroadcast.posix.descendants import Descendants
from mpbroadcast.posix.fd_socket import DescriptorSocket, receive, taken_apart
from mpbroadcast.posix.forks import fork_lock, on_fork
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.protocol.control import (
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

CONNECT_TIMEOUT: Final = 10.0  # seconds for connecting and the handshake: a broker that is stopped hangs nobody for ever
# Seconds before another try to connect, when a connection was reset: by a broker that has died and is replaced, or by one that
# had more strangers than it keeps.
_PAUSES: Final = [0.02 * 2**number for number in range(8)]
_LEAST_TIME: Final = 0.6  # seconds for an answer that needs no waiting, whatever the caller's timeout
_READ: Final = 1 << 16
_ENDED: Final = (
    "the broker at {!r} has ended: start another one, or connect() to the one that is there now, and subscribe again"
)

T = TypeVar("T")


class _Control:
    """A control connection of this process, behind its handshake."""

    def __init__(self, address: str, authkey: bytes, deadline: Deadline) -> None:
        self._address = address
        self._inbox = Inbox(MAX_HANDSHAKE)
        self._crash: BrokerCrashed | None = None
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
            if deadline.remaining() == 0:
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

    def ask(self, message: dict[str, Any], deadline: Deadline, notes: bytes = b"") -> dict[str, Any]:
        """The broker's answer; ``notes`` go ahead of the question, so they have been handled when it comes."""
        data = encode(message)
        if len(data) > MAX_REQUEST:
            raise ValueError(f"a request of {len(data)} bytes is too long: name fewer topics in one call")
        self._send(notes + data, deadline)
        trap_points.reach("waiting for a reply", (message["do"], self._socket))
        return decode(self._receive(deadline))

    def end_and_fd_socket(self, said: dict[str, Any]) -> tuple[PipeEnd | None, DescriptorSocket | None]:
        """What came with an answer."""
        numbers = self._numbers
        with fork_lock():
            fd_socket = DescriptorSocket(numbers.pop()) if numbers and said.get("fd_socket") else None
            return PipeEnd(numbers.pop(0)) if numbers else None, fd_socket

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
        with fork_lock():
            data, numbers, lost = taken_apart(receive(self._socket, _READ))
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
        return BrokerLost(_ENDED.format(self._address))

    def crash(self) -> BrokerCrashed | None:
        """What the broker has said of its crash, if that is how it ended."""
        with contextlib.suppress(OSError, ControlError):
            self._inbox.feed(self._read())
            body = self._inbox.next()
            if body is not None:
                self._crash = BrokerCrashed(str(decode(body).get("crashed", "")))
        return self._crash

    def write_now(self, notes: bytes) -> bytes:
        """Send what there is room for; what is left, if the broker is there.

        A single note is sent whole or not at all, also when threads send at once: Linux puts so few bytes into one buffer, and
        the BSDs take less than a request only when there is room for ``SO_SNDLOWAT``, 1,024 bytes or more.
        """
        try:
            return notes[self._socket.send(notes) :]
        except BlockingIOError:
            return notes
        except OSError:
            return b""

    def close(self) -> None:
        self._socket.close()
        while self._numbers:
            os.close(self._numbers.pop())

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()


@dataclass(eq=False)
class Session:
    """What one broker knows this process by, for as long as the lifeline is open; ``id`` is the broker's name for it."""

    lifeline: _Control
    id: int
    number: int  # of the brokers that follow each other
    idle: list[_Control] = field(default_factory=list)
    lost: bool = False  # whether the broker is known to have ended


class Answer(NamedTuple):
    """What the broker says, in which session, and what came with that: a pipe's end, and the socket beside it."""

    session: Session
    said: dict[str, Any]
    end: PipeEnd | None
    fd_socket: DescriptorSocket | None


class Link:
    """This process, as the broker of this identity at ``address`` knows it, and each that takes over from it.

    It attaches when it is first used, and anew behind a fork. It lasts until nothing refers to it any more. ``restarts`` says
    that another broker takes over when one dies; who is attached knows it from the broker.
    """

    def __init__(self, address: str, broker: str = "", restarts: bool = False, authkey: bytes | None = None) -> None:
        self.address = address
        self.broker = broker
        self.restarts = restarts
        self._authkey = authkey
        self._session: Session | None = None  # the last one
        self._sessions: dict[int, Session] = {}  # those that are not lost, by the broker's number
        # Subscriptions that nothing here holds any more, until an answer shows that the broker knows.
        self.dropped: set[int] = _dropped.setdefault(broker, set()) if broker else set()
        # Subscriptions that only these processes, forked from this one, can still open.
        self.inherited: dict[int, Descendants] = {}
        self.ends_broker = False  # whether nothing needs the broker when nothing here does, and no other process
        self._told: set[int] = set()  # dropped subscriptions that a waiting publish need not drop again
        on_fork(self, Link._in_child)

    @classmethod
    def to(cls, address: str, broker: str, restarts: bool) -> Link:
        """The one that this process has to this broker."""
        return _links.get(broker) or _links.setdefault(broker, cls(address, broker, restarts))

    def __reduce__(self) -> tuple[Any, ...]:
        return Link.to, (self.address, self.broker, self.restarts)

    def session(self, deadline: Deadline | None = None) -> Session:
        """The last one, or that with the broker that takes over.

        :raises BrokerLost: there is no broker.
        :raises AuthenticationFailed: it has another key.
        :raises TimedOut: it did not answer by ``deadline``, or within ``CONNECT_TIMEOUT`` seconds.
        """
        session = self._session
        if session is not None and not (session.lost and self.restarts):
            return session
        # While a broker is being replaced, this waits in the queue of the socket.
        try:
            lifeline, said = self._connected(self._attach, (deadline or Deadline(None)).at_most(CONNECT_TIMEOUT))
        except BrokerLost as error:
            self.restarts = False  # nobody needs to wait for another one again
            if self.broker:  # it was there before
                raise self.lost_error(error.__cause__)  # noqa: B904, it has its cause
            error.__cause__ = self._crash() or error.__cause__
            raise
        if self.broker not in ("", said["broker"]):
            raise self.lost_error()
        self.broker = str(said["broker"])
        self.dropped = _dropped.setdefault(self.broker, self.dropped)
        self.restarts = bool(said["restarts"])
        if self._authkey is not None:
            _keys[self.address] = self._authkey  # for handles of this process that come without a key
        _links.setdefault(self.broker, self)
        made = Session(lifeline, int(said["session"]), int(said["number"]))
        # Of several threads that come here first, one makes it for all: this is one step, where `if` and `=` are two.
        self._session = session = self._sessions.setdefault(made.number, made)
        return session

    def _connected(self, connect: Callable[[Deadline], T], deadline: Deadline) -> T:
        for pause in _PAUSES:
            try:
                return connect(deadline)
            except BrokerLost as error:
                if not isinstance(error.__cause__, (ConnectionResetError, BrokenPipeError, NoneType)):
                    raise
                if deadline.remaining() == 0:  # there may be a broker all the same
                    raise TimedOut(f"the broker at {self.address!r} took no connection in time") from error
            time.sleep(deadline.at_most(pause).remaining() or 0.0)
        return connect(deadline)

    def _attach(self, deadline: Deadline) -> tuple[_Control, dict[str, Any]]:
        lifeline = self._control(deadline)
        return lifeline, lifeline.ask({"do": "attach"}, deadline)

    def _control(self, deadline: Deadline) -> _Control:
        key = self._authkey or _keys.get(self.address) or bytes(multiprocessing.current_process().authkey)
        return _Control(self.address, key, deadline)

    def request(self, do: str, *, deadline: Deadline | None = None, session: Session | None = None, **fields: Any) -> Answer:
        """Ask the broker, or the one that takes over meanwhile, if it need not be in ``session``. Waits until ``deadline``.

        :raises BrokerLost: it has ended.
        :raises TimedOut: it did not answer in time.
        :raises ChannelInUse, ClosedError, ValueError, OSError: what it says.
        """
        self.send_notes()
        while True:
            asked = session or self.session(deadline)
            try:
                return self._ask(asked, deadline or Deadline(None), {"do": do, "session": asked.id, **fields})
            except BrokerLost:
                if session is not None or not (asked.lost and self.restarts):
                    raise

    def _ask(self, session: Session, deadline: Deadline, message: dict[str, Any]) -> Answer:
        if session.lost:
            raise self.lost_error()
        to_drop = list(self.dropped)
        control = None
        with contextlib.suppress(IndexError):
            control = session.idle.pop()
        try:
            if control is None:
                control = self._connected(self._control, deadline.at_most(CONNECT_TIMEOUT))
            said = control.ask(message, deadline, b"".join(map(_drop_note, to_drop)))
            if said.get("error") == "unknown":  # it was another broker that has answered
                raise BrokerLost(str(said["text"]))
            answer = Answer(session, said, *control.end_and_fd_socket(said))
        except BaseException as error:
            if control is not None:
                control.close()
            if isinstance(error, BrokerLost):
                self._lose(session)
                error.__cause__ = self._crash() or error.__cause__
            raise
        session.idle.append(control)
        self.dropped.difference_update(to_drop)
        self._told.clear()
        if "error" in said:
            raise _error(said)
        return answer

    def _lose(self, session: Session) -> None:
        session.lost = True  # the lifeline stays open: who is being closed has not ended yet
        self._sessions.pop(session.number, None)
        if not self.restarts:
            _links.pop(self.broker, None)

    def lost_error(self, cause: BaseException | None = None) -> BrokerLost:
        """The error of who has no broker any more; its cause is what the broker has said at its end, or else ``cause``."""
        error = BrokerLost(_ENDED.format(self.address))
        error.__cause__ = self._crash() or cause
        return error

    def _crash(self) -> BrokerCrashed | None:
        return self._session.lifeline.crash() if self._session is not None else None

    def drop(self, number: int) -> bool:
        """Drop a subscription with the next request, and now if there is room, which it returns. Each change is one step."""
        session = self._session
        if session is not None and session.lost and not self.restarts:
            return True
        self.dropped.add(number)
        if session is None:
            return False
        # A connection for requests takes it, if one is idle: so the lifeline has room for its last notes.
        control = session.lifeline
        with contextlib.suppress(IndexError):
            control = session.idle.pop()
        left = control.write_now(_drop_note(number))
        if control is not session.lifeline:
            session.idle.append(control)
        if not left:
            self._told.add(number)
        return not left

    def send_notes(self) -> None:
        """Try again to send what finalisers could not. A publish calls it again and again while it waits."""
        for number, processes in list(self.inherited.items()):
            if not processes.live():
                self.dropped.add(number)
                self.inherited.pop(number, None)
        all(map(self.drop, self.dropped - self._told))
        _send_last_notes()

    def _in_child(self) -> None:
        self._session = None
        self._sessions = {}
        self.inherited = {}
        self.dropped = set()
        _links.clear()
        _dropped.clear()
        _leaving.clear()

    def close(self) -> None:
        """Let go of all connections: the broker has ended, or nothing here needs it any more."""
        self.restarts = False
        self.inherited.clear()
        if self._session is not None:
            self._lose(self._session)
            self._session.lifeline.close()
            self._session.idle.clear()

    def __del__(self) -> None:
        session: Session | None = getattr(self, "_session", None)
        if session is not None:
            notes = b"".join(map(_drop_note, list(self.dropped))) + encode({"do": "detach", "end": self.ends_broker})
            _leaving.append((session.lifeline, notes))
            _send_last_notes()


def _drop_note(number: int) -> bytes:
    return encode({"do": "drop", "subscription": number})


def _send_last_notes() -> None:
    for _ in range(len(_leaving)):
        with contextlib.suppress(IndexError):  # another thread, or a finaliser, has sent them
            lifeline, notes = _leaving.popleft()
            if left := lifeline.write_now(notes):
                _leaving.append((lifeline, left))


_dropped: dict[str, set[int]] = {}  # of each broker, as the next one may be the first to hear of it
_leaving: deque[tuple[_Control, bytes]] = deque()  # lifelines of links that are gone, until there is room for their last notes
_links: WeakValueDictionary[str, Link] = WeakValueDictionary()  # by the broker's identity
_keys: dict[str, bytes] = {}  # by address


def for_reply(deadline: Deadline) -> Deadline:
    """Return the deadline of a request that the broker answers at once, sent on behalf of a call that waits until ``deadline``.

    A timeout of 0 does not forbid the request. A broker that is stopped makes the call longer by less than a second.
    """
    return deadline.at_least(_LEAST_TIME)


def _error(reply: dict[str, Any]) -> Exception:
    kind, text = str(reply["error"]), str(reply.get("text", ""))
    if kind == "in use":
        return ChannelInUse(text, int(reply.get("pid", 0)))
    if kind == "system":
        return OSError(int(reply.get("errno", 0)), text)
    return {"closed": ClosedError, "value": ValueError, "lost": BrokerLost}.get(kind, BroadcastError)(text)
