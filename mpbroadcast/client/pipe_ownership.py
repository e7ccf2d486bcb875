"""The pipe that a channel receives from, and which process owns it: opening, reconnecting, handing on, closing.

- The first process that opens a subscription is its owner; the broker decides. Opening takes two requests: ``open``, whose
  reply has the pipe, and ``opened``, which confirms it. So an interrupted opening leaves the subscription unopened: a pipe that
  was not confirmed is confirmed, or requested anew, by the next call.
- A subscription that this process has made can be opened by another one if a descendant that may have it lives: one that was
  forked since, or that was started with it among its arguments. Pickled otherwise, by this process or a descendant, it can be
  opened by any process. Then closing, or dropping, this handle does not end it.
- When a broker has died and another one takes over, the old pipe is kept as ``_former`` until what was read from it is done.
- The lock is held while a thread asks the broker, so another one waits for it until its own deadline, and never under the
  channel's lock. ``close_pipe`` does not take it: a close does not wait for the broker's reply to another thread, and ``_move``
  finds which one was first. A second lock, under which nothing waits, makes each such change one step, also without the GIL.
- A task holds no lock while it asks, and begins only when no other call does. A thread that begins meanwhile supersedes it: the
  broker takes the second request of a process for a repeated one, and the task ignores the reply to its own.

The states of a channel in one process::

    UNOPENED --> OPENING --> OPEN <--> RECONNECTING
        ^___________|

UNOPENED, OPENING, OPEN and RECONNECTING can become ELSEWHERE; each state but CLOSED can become CLOSING, then CLOSED.
Another process that opens a channel, and each fork of a process that has it open, lead to ELSEWHERE, for good.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Final

from mpbroadcast.client.broker_client import LEAST_TIME, BrokerClient, Reply
from mpbroadcast.client.reports import Reports
from mpbroadcast.client.shared_reader import SharedReader
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerLost, ChannelInUse, ClosedError, TimedOut, VersionMismatch
from mpbroadcast.posix import locks, starting
from mpbroadcast.posix.descriptors import Descendants, WriteEnd, descendants, on_fork, write_end_of_fork
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.posix.waiting import Steps, Wait, run
from mpbroadcast.states import IllegalTransition, State

_CLOSE_TIMEOUT: Final = 5.0  # seconds until close() no longer waits for the broker's reply
_PAUSE: Final = 0.01  # seconds until a task looks again whether another call has opened the channel


class ChannelState(State):
    """Of a channel in one process."""

    UNOPENED = "no pipe: the first process that receives opens the channel", "OPENING", "ELSEWHERE", "CLOSING"
    OPENING = "the broker has sent the pipe, and has not confirmed the owner", "OPEN", "UNOPENED", "ELSEWHERE", "CLOSING"
    OPEN = "this process is the owner, and receives", "RECONNECTING", "ELSEWHERE", "CLOSING"
    RECONNECTING = "the broker has died; the next one's pipe is not confirmed yet", "OPEN", "ELSEWHERE", "CLOSING"
    ELSEWHERE = "another process is the owner", "CLOSING"
    CLOSING = "close() has begun; after an interrupt it can be called again", "CLOSED"
    CLOSED = ("the broker knows, or the next request will show it",)


UNOPENED, OPENING, OPEN = ChannelState.UNOPENED, ChannelState.OPENING, ChannelState.OPEN
RECONNECTING, ELSEWHERE = ChannelState.RECONNECTING, ChannelState.ELSEWHERE
CLOSING, CLOSED = ChannelState.CLOSING, ChannelState.CLOSED


class PipeOwnership:
    """The pipe of one subscription in one process. ``state`` is OPEN only while ``pipe`` is there and confirmed."""

    def __init__(self, client: BrokerClient, subscription: int, is_subscriber: bool) -> None:
        self.client = client
        self.subscription = subscription
        self.state = UNOPENED
        self.pipe: PipeEnd | None = None
        self.shared: SharedReader | None = None
        self.reports: Reports | None = None  # the pipe back, of a member of a group
        self.keeps_newest = False  # True once it is open under the policy `latest`
        self._token = 0  # what confirms this pipe
        self._attempt: object = None  # the call that is opening it
        self._former: tuple[PipeEnd | None, SharedReader | None] | None = None
        self._owner = 0  # the PID of another process that has opened it, as far as this process knows
        # Which process may open it; independent of the state, until this process has: then no other one can.
        self._is_subscriber = is_subscriber  # this process has subscribed
        self._is_pickled = False  # a process may have it that is not known to be a descendant of the subscriber
        self._heirs = descendants()  # processes that were forked from this one
        self._started = Descendants()  # processes that were started with it among their arguments
        self._life: WriteEnd | None = None  # held by a descendant: by it the subscriber sees that this process lives
        self._new_locks()
        on_fork(self, PipeOwnership._in_child)

    def _new_locks(self) -> None:
        self._lock = locks.rlock()
        self._state_lock = locks.rlock()  # it orders the changes of an opening and of a close, which another thread may call

    @property
    def is_closed(self) -> bool:
        return self.state is CLOSED or self.state is CLOSING

    def requesting(self, do: str, deadline: Deadline | None = None, **fields: Any) -> Steps[Reply]:
        return self.client.requesting(do, deadline=deadline, subscription=self.subscription, **fields)

    def looking_for_newer(self, deadline: Deadline) -> Steps[bool]:
        """Return whether a newer message waits in the broker, for a channel under ``latest``; False without a reply in time.

        If so, the broker writes it into the pipe as soon as that is empty.
        """
        try:
            reply = yield from self.requesting("newest", deadline, token=self._token)
        except (BroadcastError, OSError):
            return False
        return int(reply.body["waiting"]) > 0

    # --- opening

    def open(self, deadline: Deadline) -> PipeEnd:
        """Return the pipe; the first call requests it from the broker.

        :raises ClosedError, ChannelInUse, BrokerLost: as ``Channel.recv``.
        :raises TimedOut: the broker did not reply in time.
        """
        pipe = self.pipe
        if pipe is not None and self.state is OPEN:
            return pipe
        limit = deadline.at_least(LEAST_TIME)
        while pipe is None or self.state is not OPEN:
            with locks.within(self._lock, limit):
                run(self._opening(limit))
            pipe = self.pipe
        return pipe

    def opening(self, deadline: Deadline) -> Steps[PipeEnd]:
        """Do as :meth:`open`, in a task."""
        limit = deadline.at_least(LEAST_TIME)
        while (pipe := self.pipe) is None or self.state is not OPEN:
            if self._attempt is None:
                yield from self._opening(limit)
            elif limit.remaining() == 0:
                raise TimedOut("another call waits for the broker's reply, which did not come in time")
            else:
                yield Wait(limit.at_most(_PAUSE))
        return pipe

    def _opening(self, deadline: Deadline) -> Steps[None]:
        if self.is_closed:
            raise self.closed_error()
        if self.state is ELSEWHERE:
            raise _in_use(self._owner)
        if self.state is OPEN:  # another thread has opened it meanwhile
            return
        attempt = self._attempt = object()
        try:
            yield from self._opening_or_restoring(attempt, deadline)
        except IllegalTransition:  # closed by another thread meanwhile
            self.pipe = self.shared = self.reports = None
            raise self.closed_error() from None
        finally:
            if self._attempt is attempt:
                self._attempt = None

    def _opening_or_restoring(self, attempt: object, deadline: Deadline) -> Steps[None]:
        """Open the pipe. If it raises, the former pipe is back, or another process is known as the owner."""
        try:
            yield from self._opening_once(attempt, deadline)
        except (BrokerLost, VersionMismatch, ChannelInUse, ClosedError) as error:
            if self._attempt is not attempt:
                return
            with self._state_lock:
                former = self._former
                if former is not None and self.state is RECONNECTING:  # no call until it is OPEN again
                    (self.pipe, self.shared), self.state, self._former = former, OPEN, None
                    raise
            if isinstance(error, ChannelInUse):
                self.pipe = None
                self._owner = error.pid or -1
                self._move(ELSEWHERE)
                self.release_heirs()
            raise

    def _opening_once(self, attempt: object, deadline: Deadline) -> Steps[None]:
        if self.pipe is None:
            reply = yield from self.requesting("open", deadline, shared=available())
            if self._attempt is not attempt:
                return
            shared = None if reply.fd_socket is None else SharedReader(reply.fd_socket)
            reports = None if reply.reports is None else Reports(reply.reports)
            self.pipe, self.shared, self.reports, self._token = reply.pipe, shared, reports, reply.body["token"]
            self.keeps_newest = bool(reply.body["newest"])
        if self.state is UNOPENED:
            self._move(OPENING)
        reply = yield from self.requesting("opened", deadline, token=self._token)
        if self._attempt is not attempt:
            return
        if reply.body["opened"]:
            self.release_heirs()
            self._is_pickled = False
            self._move(OPEN)
            return
        self.pipe = None
        if self.state is OPENING:
            self._move(UNOPENED)

    def _move(self, to: ChannelState) -> None:
        """Change the state, or raise IllegalTransition: another thread has closed the channel meanwhile."""
        while True:
            state = self.state
            after = state.to(to)
            with self._state_lock:
                if self.state is state:  # no call from here on, so no signal handler comes in between
                    self.state = after
                    return

    def begin_reconnecting(self) -> None:
        """Note that the broker of this pipe has died: :meth:`open` replaces it, or gives it back if no other takes over.

        The caller holds the channel's lock, and calls :meth:`release_former` when it has gone over to the new pipe.
        """
        if self._former is None:
            reconnecting = self.state.to(RECONNECTING)
            # No call from here on, so that an interrupt finds all of it or nothing.
            self.state, self._former = reconnecting, (self.pipe, self.shared)
            self.pipe = self.shared = None

    def release_former(self) -> None:
        """Close the pipe and the memory of the broker that has died."""
        former, self._former = self._former, None
        if former is not None:
            _close(*former)

    # --- handing on and closing

    def hand_on(self) -> Any:
        """Prepare for being pickled, for another process, or raise ClosedError or ChannelInUse.

        Return what is to be pickled with the channel, for :meth:`inherit`; None if nothing is.
        """
        if self.is_closed:
            raise self.closed_error()
        if self.state is not UNOPENED:
            raise _in_use(self._owner or os.getpid())
        start = starting.current()
        if start is not None and self._is_subscriber:
            if (child := start.new_child()) is not None:
                end, passed = child
                self._started.ends[end] = None
                return passed
        elif start is not None and self._life is not None:
            if (passed := start.pass_on(self._life)) is not None:
                return passed
        elif self._life is not None and not self._is_pickled:
            self._life.report(self.subscription)
        self._is_pickled = True
        return None

    def inherit(self, passed: Any) -> None:
        """Take over what :meth:`hand_on` returned in the process that has started this one."""
        self._life = starting.inherit(passed)

    @property
    def can_be_opened_elsewhere(self) -> bool:
        """True if this process has subscribed, and another one may open the channel."""
        if not self._is_subscriber:
            return False
        heirs, started = self._heirs.live(self.subscription), self._started.live(self.subscription)
        return self._is_pickled or heirs or started

    @property
    def is_only_openable_here(self) -> bool:
        """True if this process has subscribed, has not opened the channel, and no other process can."""
        return self._is_subscriber and self.state in (UNOPENED, OPENING) and not self.can_be_opened_elsewhere

    def close_pipe(self, handed_out: int) -> bool:
        """Begin to close, when so many messages were handed out. Return False if it was closed before."""
        if self.state is CLOSED:
            return False
        if self.state is not CLOSING:
            self._move(CLOSING)
        if self.reports is not None:
            self.reports.leave(handed_out)
        _close(self.pipe, self.shared, self.reports)
        self.pipe = self.shared = self.reports = None
        self.release_former()
        return True

    def ending_subscription(self) -> Steps[None]:
        """End the subscription, unless another process has it or can open it: the last step of closing."""
        if self.can_be_opened_elsewhere:
            self._leave_to_heirs()
        elif not self._owner:
            # A recv that waits in another thread is woken when the broker closes its end.
            try:
                yield from self.requesting("close", Deadline(_CLOSE_TIMEOUT))
            except (BroadcastError, OSError):  # the request may be lost, and no other event ends an unopened channel
                self.client.drop(self.subscription)
        client = BrokerClient(self.client.address, self.client.broker)  # the session ends with its last handle
        if self.state is CLOSING:  # else another thread has closed it meanwhile
            self.state, self.client = CLOSING.to(CLOSED), client
        self.release_heirs()

    def release_heirs(self) -> None:
        """Close the descriptors that show which processes could open the channel: none can any more."""
        self._heirs, self._started = Descendants(), Descendants()
        starting.release_started()

    def drop(self) -> None:
        """End the subscription from a finaliser, unless another process has it or can open it."""
        if CLOSED is None or self.state is CLOSED or self._owner:  # without CLOSED the interpreter has cleared this module
            return
        if self.can_be_opened_elsewhere:
            self._leave_to_heirs()
        elif self.state in (OPEN, RECONNECTING):  # the broker sees that the pipe is closed; the one that takes over does not
            if self.client.restarts:
                self.client.drop(self.subscription)
        elif self._is_subscriber or self.state is CLOSING:
            self.client.drop(self.subscription)

    def _leave_to_heirs(self) -> None:
        if not (self._is_pickled or self._owner):
            self.client.leave_to(self._heirs.until_now(self._started), self.subscription)

    def _in_child(self) -> None:
        self._new_locks()
        self._attempt = None
        if self._is_subscriber:
            self._life = write_end_of_fork()
        self._is_subscriber = False
        if self.pipe is not None or self._former is not None:
            owner = os.getppid()
            state = self.state if self.is_closed else self.state.to(ELSEWHERE)
            # No call from here on, so that an interrupt finds all of it or nothing.
            self.state, self._owner = state, owner
            self.pipe = self._former = None
        self.shared = self.reports = None

    def closed_error(self) -> ClosedError:
        return ClosedError("this channel was closed in this process: subscribe again for another")


def opening_unshared(ownerships: Iterable[PipeOwnership], deadline: Deadline) -> Steps[None]:
    """Open those that this process has subscribed and no other one can open, until the deadline."""
    for ownership in ownerships:
        try:
            if ownership.is_only_openable_here:
                yield from ownership.opening(deadline)
        except TimedOut:
            return  # the next ones would, too
        except (BroadcastError, OSError):
            continue


def _close(*ends: PipeEnd | SharedReader | Reports | None) -> None:
    for end in ends:
        if end is not None:
            end.close()


def _in_use(pid: int) -> ChannelInUse:
    process = f"process {pid}" if pid > 0 else "a process of another PID namespace"
    text = f"{process} has opened this channel, and only that one can receive from it: hand a channel on before its "
    return ChannelInUse(text + "first receive, or subscribe in each process", pid)
