"""Requests to the broker, and reconnecting to the one that takes over.

A process has one :class:`BrokerClient` for a broker and each that takes over from it (``restart=True``). A :class:`Session` is
this process as one of these brokers knows it: a *lifeline*, a control connection that is only held open, and a pool of control
connections for requests.

- A request has a connection to itself. One that waits for long delays no other, and one that an exception interrupts is closed
  with its connection: so threads and signal handlers need no lock, and no reply meets the wrong request. Of many requests at
  once, few make a connection, and the others wait for one of these or for an idle one: a thousand tasks need no thousand.
- A *note* is a request without a reply, which finalisers send: at once if there is room, and without a lock. Notes that had no
  room are sent before the next request, or while a publish waits. Notes are idempotent, and are sent until a reply shows that
  the broker has handled them.
- A session is lost once its broker is known to have ended. The next request attaches to the broker that takes over, which
  waits in the queue of the socket meanwhile.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from mpbroadcast.client.control_connection import ENDED, ControlConnection
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import (
    AuthenticationFailed,
    BroadcastError,
    BrokerCrashed,
    BrokerLost,
    ChannelInUse,
    ClosedError,
    TimedOut,
    VersionMismatch,
)
from mpbroadcast.key import Key
from mpbroadcast.posix import locks
from mpbroadcast.posix.descriptors import Descendants, on_fork
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.key_file import read_key
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.posix.waiting import Steps, Wait, Wakers, run
from mpbroadcast.protocol.control import encode

CONNECT_TIMEOUT: Final = 10.0  # seconds for connecting and the handshake: a broker that is stopped blocks no call for ever
# Seconds before another try to connect, when a connection was reset: by a broker that has died and is replaced, or by one that
# had more unauthenticated connections than it keeps.
_PAUSES: Final = [0.02 * 2**power for power in range(8)]
_MOST_MADE: Final = 16  # connections that are made at once
_LOOK_AGAIN: Final = 0.25  # seconds that a task waits for another's connection, unless it is woken
# Seconds for a reply that needs no waiting, whatever the caller's timeout: 0 does not forbid a request, and a broker that is
# stopped makes the call longer by less than a second.
LEAST_TIME: Final = 0.6

T = TypeVar("T")


@dataclass(eq=False)
class Session:
    """This process as one broker knows it, for as long as the lifeline is open."""

    lifeline: ControlConnection
    id: int
    idle: list[ControlConnection] = field(default_factory=list)
    lost: bool = False  # True once the broker is known to have ended; pipes may have data left all the same
    making: dict[Wakers, None] = field(default_factory=dict)  # the requests that make a connection
    waiting: dict[Wakers, None] = field(default_factory=dict)  # those that wait for one, the first one first
    replied_at: float = 0.0  # when the last reply came

    def wake_next(self) -> None:
        """Wake the first request that waits for a connection."""
        with contextlib.suppress(StopIteration, RuntimeError, KeyError):  # other threads come and go
            first = next(iter(self.waiting))
            del self.waiting[first]
            first.wake()


class Reply(NamedTuple):
    """A reply of the broker, its session, and the descriptors with it: a pipe's end, the socket beside it, the pipe back."""

    session: Session
    body: dict[str, Any]
    pipe: PipeEnd | None
    fd_socket: DescriptorSocket | None
    reports: PipeEnd | None


class BrokerClient:
    """This process's requests to the broker of one identity at ``address``, and to each that takes over from it.

    A client attaches when it is first used, and anew behind a fork, and detaches when nothing refers to it any more.
    ``restarts`` is True if another broker takes over when one dies: the broker's reply to the first request sets it.
    """

    def __init__(self, address: str, broker: str = "", restarts: bool = False, authkey: bytes | None = None) -> None:
        self.address = address
        self.broker = broker
        self.restarts = restarts
        self._authkey = authkey
        self._session: Session | None = None  # the last one
        self._session_lock = locks.rlock()  # makes each change of it one step, also without the GIL
        # Ids of subscriptions that no handle refers to any more, until a reply shows that the broker has dropped them.
        self.dropped: set[int] = _dropped.setdefault(broker, set()) if broker else set()
        # Subscriptions that only these descendants of this process can still open.
        self.inherited: dict[int, Descendants] = _inherited.setdefault(broker, {}) if broker else {}
        self.ends_broker = False  # True if the broker is to end with this session, as no other process needs it
        self._noted: set[int] = set()  # dropped subscriptions whose notes were sent since the last reply
        on_fork(self, BrokerClient._in_child)

    @classmethod
    def shared(cls, address: str, broker: str, restarts: bool) -> BrokerClient:
        """Return the client that this process has for this broker; make it if there is none."""
        return _clients.get(broker) or _clients.setdefault(broker, cls(address, broker, restarts))

    def __reduce__(self) -> tuple[Any, ...]:
        return BrokerClient.shared, (self.address, self.broker, self.restarts)

    def session(self, deadline: Deadline | None = None) -> Session:
        """Return the session, attached to the broker that has taken over if the last one was lost.

        Block until ``deadline``, at most ``CONNECT_TIMEOUT`` seconds. Raise as :meth:`ControlConnection.connecting`.
        """
        return run(self.attaching(deadline))

    def attaching(self, deadline: Deadline | None = None) -> Steps[Session]:
        """Do as :meth:`session`."""
        session = self._session
        if session is not None and not (session.lost and self.restarts):
            return session
        try:
            limit = (deadline or Deadline(None)).at_most(CONNECT_TIMEOUT)
            lifeline, reply = yield from self._connected(self._attaching, limit)
        except VersionMismatch:
            self.restarts = False  # what has taken over cannot go on for the last broker
            raise
        except BrokerLost as error:
            self.restarts = False  # no later call needs to wait for another broker
            if self.broker:  # it was there before
                raise self.lost_error(error.__cause__)  # noqa: B904, it has its cause
            raise
        if self.broker not in ("", reply["broker"]):
            raise self.lost_error()
        self.broker = str(reply["broker"])
        self.dropped = _dropped.setdefault(self.broker, self.dropped)
        self.inherited = _inherited.setdefault(self.broker, self.inherited)
        self.restarts = bool(reply["restarts"])
        if self._authkey is not None:
            _keys[self.address] = self._authkey  # for handles of this process that come without a key
        _clients.setdefault(self.broker, self)
        made = Session(lifeline, int(reply["session"]))
        with self._session_lock:
            if self._session is session:  # else another thread has attached, or a signal handler: no call in between
                self._session = made
            return self._session or made

    def _connected(self, connect: Callable[[Deadline], Steps[T]], deadline: Deadline) -> Steps[T]:
        for pause in _PAUSES:
            try:
                return (yield from connect(deadline))
            except BrokerLost as error:
                if not isinstance(error.__cause__, (ConnectionResetError, BrokenPipeError)):
                    raise
                if deadline.remaining() == 0:  # there may be a broker all the same
                    raise TimedOut(f"the broker at {self.address!r} accepted no connection in time") from error
            yield Wait(deadline.at_most(pause))
        return (yield from connect(deadline))

    def _attaching(self, deadline: Deadline) -> Steps[tuple[ControlConnection, dict[str, Any]]]:
        lifeline = yield from self._connecting(deadline)
        reply, *_ = yield from lifeline.requesting({"do": "attach"}, deadline)
        return lifeline, reply

    def _connecting(self, deadline: Deadline) -> Steps[ControlConnection]:
        key = self.key()
        while True:
            control = ControlConnection(self.address)
            try:
                yield from control.connecting(key, deadline)
                return control
            except AuthenticationFailed:
                former, key = key, self.key()
                if key == former:  # else another broker has taken the address over, and has written another key
                    raise

    def key(self) -> Key:
        """Return the key by which this process connects.

        That is the one that the handle was given, else that of the key file, else the one that children inherit.
        """
        own = bytes(multiprocessing.current_process().authkey)
        return Key(self._authkey or read_key(self.address) or _keys.get(self.address) or own)

    def request(self, do: str, *, deadline: Deadline | None = None, session: Session | None = None, **fields: Any) -> Reply:
        """Request something of the broker, and block until its reply comes, or until ``deadline``.

        Without a ``session``, the request is sent again to the broker that takes over meanwhile.

        :raises BrokerLost, TimedOut: there was no reply.
        :raises ChannelInUse, ClosedError, ValueError, OSError: the broker replied with this error.
        """
        return run(self.requesting(do, deadline=deadline, session=session, **fields))

    def requesting(
        self, do: str, *, deadline: Deadline | None = None, session: Session | None = None, **fields: Any
    ) -> Steps[Reply]:
        """Do as :meth:`request`."""
        self.send_notes()
        while True:
            current = session or (yield from self.attaching(deadline))
            message = {"do": do, "session": current.id, **fields}
            try:
                return (yield from self._requesting(current, deadline or Deadline(None), message))
            except BrokerLost:
                if session is not None or not (current.lost and self.restarts):
                    raise

    def _requesting(self, session: Session, deadline: Deadline, message: dict[str, Any]) -> Steps[Reply]:
        if session.lost:
            raise self.lost_error()
        to_drop = list(self.dropped)
        control = None
        with contextlib.suppress(IndexError):
            control = session.idle.pop()
        try:
            if control is None:
                control = yield from self._borrowing(session, deadline)
            body, pipe, fd_socket, reports = yield from control.requesting(message, deadline, _notes(to_drop))
            if body.get("error") == "unknown":  # another broker has replied, which does not know the session
                raise BrokerLost(str(body["text"]))
        except BaseException as error:
            if control is not None:
                control.close()
            if isinstance(error, BrokerLost):
                self._lose(session)
                error.__cause__ = self._crash() or error.__cause__
            raise
        session.idle.append(control)
        session.replied_at = time.monotonic()
        session.wake_next()
        self.dropped.difference_update(to_drop)
        self._noted.clear()
        if "error" in body:
            raise _error(body)
        return Reply(session, body, pipe, fd_socket, reports)

    def _borrowing(self, session: Session, deadline: Deadline) -> Steps[ControlConnection]:
        """Return a new connection, or one that is idle by then."""
        me, began = Wakers(), time.monotonic()
        try:
            while True:
                if len(session.making) < _MOST_MADE:
                    session.making[me] = None
                    return (yield from self._connected(self._connecting, deadline.at_most(CONNECT_TIMEOUT)))
                session.waiting[me] = None
                yield Wait(deadline.at_most(_LOOK_AGAIN), wakers=(me,))
                session.waiting.pop(me, None)
                with contextlib.suppress(IndexError):
                    return session.idle.pop()
                if session.lost:
                    raise self.lost_error()
                silent = time.monotonic() - max(began, session.replied_at)
                if deadline.remaining() == 0 or silent > CONNECT_TIMEOUT:
                    raise TimedOut("the broker did not answer in time")
        except BaseException:
            session.wake_next()  # it may have been woken for what another one can use
            raise
        finally:
            session.waiting.pop(me, None)
            if me in session.making:
                del session.making[me]
                session.wake_next()

    def _lose(self, session: Session) -> None:
        session.lost = True  # the lifeline stays open: a broker that is being closed may still drain
        if not self.restarts:
            _clients.pop(self.broker, None)
            self.inherited.clear()

    def lost_error(self, cause: BaseException | None = None) -> BrokerLost:
        """Return the error for a broker that has ended. Its cause is what the broker sent at its end, or else ``cause``."""
        error = BrokerLost(ENDED.format(self.address))
        error.__cause__ = self._crash() or cause
        return error

    def _crash(self) -> BrokerCrashed | None:
        return self._session.lifeline.crash() if self._session is not None else None

    def drop(self, subscription: int) -> bool:
        """Drop a subscription with the next request, and now if there is room. Return True if the note was sent.

        A finaliser may call this anywhere: each change is one step.
        """
        if self._is_broker_gone:
            return True
        self.dropped.add(subscription)
        session = self._session
        if session is None:
            return False
        # A connection for requests takes it, if one is idle: so the lifeline has room for its last notes.
        control = session.lifeline
        with contextlib.suppress(IndexError):
            control = session.idle.pop()
        rest = control.send_now(_notes([subscription]))
        if control is not session.lifeline:
            session.idle.append(control)
        if not rest:
            self._noted.add(subscription)
        return not rest

    def leave_to(self, processes: Descendants, subscription: int) -> None:
        """Drop a subscription when none of these processes, which can still open it, lives any more."""
        if not self._is_broker_gone:
            self.inherited[subscription] = processes

    @property
    def _is_broker_gone(self) -> bool:
        """True if the broker has ended, and no other one takes over."""
        session = self._session
        return session is not None and not self.restarts and (session.lost or session.lifeline.is_ended)

    def send_notes(self) -> None:
        """Send the notes that had no room before, as far as there is room now. A publish that waits calls it repeatedly."""
        self._drop_inherited()
        all(map(self.drop, self.dropped - self._noted))
        _send_last_notes()

    def _drop_inherited(self) -> None:
        for subscription, processes in self.inherited.copy().items():  # one step: a finaliser may add to it at any time
            if not processes.live(subscription):
                self.dropped.add(subscription)
                self.inherited.pop(subscription, None)

    def _in_child(self) -> None:
        self._session = None
        self._session_lock = locks.rlock()
        self.inherited = {}
        self.dropped = set()
        for kept in (_clients, _dropped, _inherited, _last_notes):
            kept.clear()

    def close(self) -> None:
        """Close all connections: the broker has ended, or no handle of this process needs it any more."""
        self.restarts = False
        if self._session is not None:
            self._lose(self._session)
            self._session.lifeline.close()
            self._session.idle.clear()

    def __del__(self) -> None:
        session: Session | None = getattr(self, "_session", None)
        if session is not None and _last_notes is not None:  # else the interpreter has cleared this module
            self._drop_inherited()
            if self._is_broker_gone:
                self.inherited.clear()
            notes = _notes([*self.dropped]) + encode({"do": "detach", "end": self.ends_broker})
            _last_notes.append((session.lifeline, notes))
            _send_last_notes()


def _notes(dropped: list[int]) -> bytes:
    return b"".join(encode({"do": "drop", "subscription": subscription}) for subscription in dropped)


def _send_last_notes() -> None:
    for _ in range(len(_last_notes)):
        with contextlib.suppress(IndexError):  # another thread, or a finaliser, has sent them
            lifeline, notes = _last_notes.popleft()
            if rest := lifeline.send_now(notes):
                _last_notes.append((lifeline, rest))


def _release_ended() -> None:
    """Close the descriptors of inherited subscriptions that show that their process has ended."""
    for inherited in list(_inherited.values()):
        for processes in list(inherited.values()):
            processes.live()


os.register_at_fork(after_in_parent=_release_ended)  # an occasion in a process that has no handle any more

_dropped: dict[str, set[int]] = {}  # by the broker's identity: the broker that takes over may be the first to get the notes
_inherited: dict[str, dict[int, Descendants]] = {}  # likewise: the handle that has left them may be closed
# Lifelines that are kept until there is room for their last notes.
_last_notes: deque[tuple[ControlConnection, bytes]] = deque()
_clients: WeakValueDictionary[str, BrokerClient] = WeakValueDictionary()  # by the broker's identity
_keys: dict[str, bytes] = {}  # by address


def _error(body: dict[str, Any]) -> Exception:
    kind, text = str(body["error"]), str(body.get("text", ""))
    if kind == "in use":
        return ChannelInUse(text, int(body.get("pid", 0)))
    if kind == "system":
        return OSError(int(body.get("errno", 0)), text)
    return {"closed": ClosedError, "value": ValueError, "lost": BrokerLost}.get(kind, BroadcastError)(text)
