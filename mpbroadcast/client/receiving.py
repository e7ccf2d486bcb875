"""Receiving from a subscription in the process of its subscriber: the core of a channel.

- What was read from the pipe is one :class:`Stream`, replaced in one assignment, or changed with no call in between. So an
  exception from a signal handler finds it as it was or as it will be. Bytes are read by ``list.extend(map(read, ...))``: there
  is no moment between reading and keeping. A signal handler that receives from the same channel itself is not provided for.
- The descriptor is readable for as long as there is something to receive: the tail byte of the last run that was read stays in
  the pipe until the last decoded message is handed out (see ``protocol/runs.py``). An interrupt behind the reading of that
  byte puts the message back, but not the byte. To read it with the next call instead would wake each waiter once in vain.
- :meth:`Receiving._receive_nowait` takes one message, or none, and never blocks: each other call that receives goes through
  it. ``_lock`` is held while a message is read, decoded and taken, but for those of ``Stream.fast``, which are taken without
  it. Nothing waits under it, for a message or for the broker.
- ``pipe_ownership.py`` has the pipe, which process owns it, and the channel's state.
"""

from __future__ import annotations

import contextlib
import select
import threading
from collections import deque
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from mpbroadcast import trap_points
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.pipe_ownership import OPEN, PipeOwnership
from mpbroadcast.client.pipe_reader import ENDED, FLAWS, LOST, LOST_FOR_GOOD, NOTHING, End, Stream, follow, read_into, take_lone
from mpbroadcast.client.tasks import drive
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerLost, ChannelBusy, ChannelInUse, ClosedError, TimedOut, set_channel
from mpbroadcast.posix import locks
from mpbroadcast.posix.descriptors import on_fork
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.posix.waiting import Steps, Wait, Wakers, run
from mpbroadcast.protocol.pickling import ALL_KINDS, PAYLOADS, Failure

M = TypeVar("M")
T = TypeVar("T")
E = TypeVar("E", bound=Exception)

_PATIENCE: Final = 0.1  # seconds without a byte from the broker, under `latest`, while there is a message to return
_NO_MESSAGE: Final = "no message came within {} s"
_BUSY: Final = (
    "a task receives from this channel, and one call at a time may: let one task receive and hand the messages to others, or "
    "subscribe once for each"
)
_NESTED: Final = "a message that is being unpickled receives from its own channel: receive after unpickling instead"


class Receiving(Generic[M]):
    """The part of a channel that receives."""

    def __init__(
        self, client: BrokerClient, id: int, form: int, raw: bool = False, name: str | None = None, *, subscriber: bool = False
    ) -> None:
        self._id = id  # the subscription's, at the broker
        self._name = name
        self._form = form  # of what it gives, as `received.py` has it
        self._ownership = PipeOwnership(client, id, subscriber)
        # What turns bytes into messages: a program that trusts no publisher sets another.
        self._loaders = PAYLOADS if raw else ALL_KINDS
        self._missed = 0
        self._begin()
        on_fork(self, Receiving._in_child)

    def _begin(self) -> None:
        self._lock = locks.rlock()
        self._stream = Stream()
        self._tasks = Wakers()
        self._has_receiver = False  # True while a task receives: no other call may
        self._unpickler: int | None = None  # the thread that decodes messages, and so holds the lock
        self._turn = 0

    def _in_child(self) -> None:
        self._stream.discard()  # an iteration that goes on in both processes hands them out in one
        self._begin()

    def _receive(self, deadline: Deadline, timeout: float | None, patience: float | None = None) -> M:
        while True:
            self._wait(deadline if patience is None else deadline.at_most(patience), timeout)
            message = self._receive_nowait(is_readable=True)
            if message is not NOTHING:
                return message

    def _receive_newest(self, timeout: float | None, limit: Deadline) -> M:
        """Receive from a channel under ``latest``: the newest message that is routed by now, or a later one.

        What is in the pipe may have been written long ago. So the broker is asked for a newer one. What is in the pipe is
        returned at the ``limit``, or when the broker has sent nothing for :data:`_PATIENCE`.
        """
        deadline = Deadline(timeout)
        older: M = NOTHING
        if run(self._finding_newer(deadline, timeout, limit)):
            older = self._receive_nowait()  # an interrupt from here on loses what is not the newest
        try:
            message = self._receive_nowait()
            if message is NOTHING and older is NOTHING:
                message = self._receive(deadline, timeout)
            elif message is NOTHING:
                message = self._receive(limit, timeout, _PATIENCE)
        except (TimedOut, BrokerLost):  # the next call reports the loss again
            if older is NOTHING:
                raise
            return older
        self._missed += older is not NOTHING
        return message

    def _finding_newer(self, deadline: Deadline, timeout: float | None, limit: Deadline) -> Steps[bool]:
        """Return whether something newer waits in the broker than the message that has arrived; False if none has."""
        is_readable = False
        while True:
            with self._lock:
                if not self._stream.ready:
                    self._fill(is_readable)
                ready = self._stream.ready
                is_empty, is_message = self._stream.is_used_up, bool(ready) and type(ready[0]) not in FLAWS
            if is_message:
                return (yield from self._ownership.looking_for_newer(limit.at_most(_PATIENCE)))
            if ready or is_empty:  # an error comes next; or the pipe is empty, and what comes into it then is the newest
                return False
            yield from self._waiting(deadline, timeout)  # a part of a message has arrived
            is_readable = True

    def _receive_nowait(self, *, is_readable: bool = False) -> M:
        """Take the next message, or raise the error at its position. Return ``NOTHING`` if there is none, or only the end.

        The end of the pipe is found only if it ``is_readable``.
        """
        message: M = NOTHING
        if self._ownership.reports is not None:
            self._finish()
        try:
            with self._lock:
                stream = self._stream
                if stream.ready:
                    stream.close_fast()
                elif is_readable:  # a return of this call, as opposed to one in C, is safe
                    try:
                        self._unpickler = threading.get_ident()
                        message = take_lone(stream, self._ownership, self._form, self._loaders)
                    finally:
                        self._unpickler = None
                if message is not NOTHING:
                    self._consume_tail_byte()
                else:
                    if not stream.ready:
                        self._fill(is_readable)
                        stream = self._stream
                    ready, plain = stream.ready, stream.plain
                    if ready and (plain or type(ready[0]) not in FLAWS):
                        message = ready[0]  # not popleft(): an interrupt may come between its return and the assignment
                        del ready[0]
                        if not ready:
                            self._consume_tail_byte()
                        elif plain and self._ownership.reports is None and not self._ownership.keeps_newest:
                            stream.open_fast()
                    elif ready:
                        self._raise_failure(ready)
            return message  # nothing is called from here on, so no interrupt comes in between
        except BaseException:
            # An interrupt came after the message was taken and before it could be handed out: it is the next one again.
            if message is not NOTHING:
                self._stream.ready.appendleft(message)
            raise

    def _finish(self) -> None:
        """Report what was handed out as finished, if this is a member of a group: each call does that asks for more."""
        with self._lock:
            stream, reports = self._stream, self._ownership.reports
            if reports is not None and not (stream.ready and stream.ready[0] is LOST):  # of the broker before this one
                reports.finish(stream.handed_out)

    def _raise_failure(self, ready: deque[Any]) -> None:
        """If a failure comes next, remove it and raise its error. The caller holds the lock."""
        failure = ready[0]
        if type(failure) is Failure:
            error = self._about_this(failure.error)
            missed = failure.missed
            if len(ready) == 1:
                self._consume_tail_byte()
            if ready[0] is failure:  # else a call in another thread has put a message back
                # Nothing is called from here on. Put back by an interrupt, it could get among messages of `Stream.fast`.
                del ready[0]
                self._missed += missed
                try:
                    raise error
                finally:
                    del error, failure.error  # it has this frame in its traceback, and so this channel

    def _take_ready(self, limit: int | None, box: list[list[M]]) -> None:
        """Move messages that can be received now into ``box``, up to ``limit`` there."""
        with self._lock:
            # What was decoded before, and what has come since. No loop: an interrupt at its end may not release the lock.
            # Of shared memory one decoding is enough: more would leave the processor's cache.
            before = self._stream.read
            if self._take_decoded(limit, box) and self._stream.read == before:
                self._take_decoded(limit, box)

    def _take_decoded(self, limit: int | None, box: list[list[M]]) -> bool:
        """Do as :meth:`_take_ready`, up to the next error. Return True if there was a message. The caller holds the lock."""
        if limit is not None and len(box[0]) >= limit:
            return False
        if not self._stream.ready:
            self._fill(False)
        stream = self._stream
        stream.close_fast()
        taken, rest = stream.split(limit if limit is None else limit - len(box[0]))
        if taken:
            more = box[0] + taken
            count = len(taken) + len(rest.ready)
            box[0], self._stream = more, rest  # no call between the two: an interrupt finds neither or both
            # What a call in another thread has put back meanwhile, as it was interrupted.
            put_back = [*islice(stream.ready, max(0, len(stream.ready) - count))]
            rest.ready.extendleft(put_back[::-1])
            stream.ready.clear()  # which an iteration may refer to
            if not rest.ready:
                self._consume_tail_byte()
        return bool(taken)

    def _fill(self, is_readable: bool) -> None:
        """Read and decode what is in the pipe. The caller holds the lock, and no decoded message is left."""
        ownership, before = self._ownership, self._stream
        pipe, shared = ownership.pipe, ownership.shared
        if pipe is None or ownership.state is not OPEN or pipe.fd < 0:
            return
        try:
            self._unpickler = threading.get_ident()
            after = follow(before, pipe, self._form, shared, self._loaders, is_readable)
        finally:
            self._unpickler = None
        if before.ready:
            return  # another thread was interrupted, and has put its message back: what comes behind it is decoded again
        if after is not None and self._stream is before:  # else a signal handler has received meanwhile
            self._stream = after
            self._missed += after.skipped
        if shared is not None:
            shared.commit(self._stream.read, after is not None)

    def _consume_tail_byte(self) -> None:
        """Read the tail byte, so that the descriptor shows what is behind it. The caller holds the lock."""
        stream, pipe = self._stream, self._ownership.pipe
        if stream.has_tail and not (stream.chunks and stream.is_decodable):
            stream.has_tail = False
            if pipe is not None:
                read_into(stream, pipe.fd, 1)

    def _wait(self, deadline: Deadline, timeout: float | None) -> None:
        """Block until there may be a message, or raise TimedOut; raise EOFError or BrokerLost if none comes any more."""
        if self._stream.ready:
            with self._lock:
                stream = self._stream
                if not stream.ready or type(stream.ready[0]) is not End:
                    return
                self._meet_end(stream)
            self._reconnect(stream, deadline)
        elif not self._wait_readable(deadline):
            raise self._about_this(TimedOut(_NO_MESSAGE.format(timeout)))

    def _meet_end(self, stream: Stream) -> None:
        """Raise EOFError or BrokerLost, or begin to go over to the broker that takes over. The caller holds the lock."""
        end = stream.ready[0]
        if end is ENDED:
            stream.has_more = False
            raise self._about_this(EOFError("no message follows: this channel was unsubscribed, or its broadcaster closed"))
        if end is not LOST or not self._ownership.client.restarts:
            raise self._about_this(self._ownership.client.lost_error())
        self._ownership.begin_reconnecting()

    def _wait_readable(self, deadline: Deadline) -> bool:
        """Open the channel, and block until its descriptor is readable. Return False at the deadline."""
        pipe = self._ownership.pipe
        if pipe is None or self._ownership.state is not OPEN:
            try:
                pipe = self._open(deadline)
            except TimedOut:
                if deadline.remaining() == 0:
                    return False
                raise
        trap_points.reach("waiting for messages", self._stream)
        return pipe.wait(select.POLLIN, deadline)

    def _reconnect(self, stream: Stream, deadline: Deadline) -> None:
        """Go over from ``stream``, which has ended, to the pipe of the broker that takes over, or to the end if none does.

        If it raises TimedOut, a later call goes on from there.
        """
        is_open = False
        with contextlib.suppress(BrokerLost, ChannelInUse, ClosedError):
            self._open(deadline)  # not under the lock: a broker that is stopped delays no other thread
            is_open = True
        self._go_over(stream, is_open)

    def _go_over(self, stream: Stream, is_open: bool) -> None:
        after = Stream() if is_open else Stream(deque((LOST_FOR_GOOD,)), plain=False)
        with self._lock:
            if self._stream is stream and type(stream.ready[0]) is End:  # else another thread has gone over, or put back
                self._stream = after
                self._tasks.wake()
                self._ownership.release_former()

    def _open(self, deadline: Deadline) -> PipeEnd:
        try:
            return self._ownership.open(deadline)
        except BroadcastError as error:
            error.channel = self
            raise

    # --- receiving in a task: the same steps, without blocking

    async def _in_task(self, steps: Steps[T]) -> T:
        """Drive a core that receives, as the only task that does, or raise ChannelBusy."""
        self._claim()
        try:
            return await drive(steps, self._tasks, self._closed_error)
        finally:
            self._unclaim()

    def _claim(self) -> None:
        with self._lock:
            self._check_no_receiver()
            self._has_receiver = True

    def _unclaim(self) -> None:
        self._has_receiver = False

    def _check_not_unpickling(self) -> None:
        """Raise ChannelBusy if a message of this channel that is being unpickled calls: its bytes would be decoded again."""
        if self._unpickler == threading.get_ident():
            raise self._about_this(ChannelBusy(_NESTED))

    def _check_no_receiver(self) -> None:
        self._check_not_unpickling()
        if self._has_receiver:
            raise self._about_this(ChannelBusy(_BUSY))

    def _closed_error(self) -> ClosedError:
        return self._about_this(self._ownership.closed_error())

    def _arriving(self, timeout: float | None) -> Steps[M]:
        """Return the next message, or raise, as ``recv`` does."""
        if self._ownership.keeps_newest and timeout != 0:
            return (yield from self._arriving_newest(timeout, Deadline(timeout)))
        return (yield from self._arriving_until(Deadline(timeout), timeout))

    def _arriving_newest(self, timeout: float | None, limit: Deadline) -> Steps[M]:
        """Do as :meth:`_receive_newest`, in a task."""
        deadline = Deadline(timeout)
        older: M = NOTHING
        if (yield from self._finding_newer(deadline, timeout, limit)):
            older = self._receive_nowait()
        try:
            if older is NOTHING:
                message = yield from self._arriving_until(deadline, timeout)
            else:
                message = yield from self._arriving_until(limit, timeout, _PATIENCE)
        except (TimedOut, BrokerLost):
            if older is NOTHING:
                raise
            return older
        self._missed += older is not NOTHING
        return message

    def _arriving_until(self, deadline: Deadline, timeout: float | None, patience: float | None = None) -> Steps[M]:
        is_readable = False
        while True:
            message = self._receive_nowait(is_readable=is_readable)
            if message is not NOTHING:
                return message  # no wait follows in which the task could be cancelled
            yield from self._waiting(deadline if patience is None else deadline.at_most(patience), timeout)
            is_readable = True

    def _arriving_many(self, limit: int | None, timeout: float | None) -> Steps[list[M]]:
        """Return messages, or raise, as ``recv_many`` does."""
        if self._ownership.reports is not None:
            self._finish()
        box: list[list[M]] = [[]]
        is_newest = self._ownership.keeps_newest and timeout != 0
        try:
            if not is_newest:
                self._take_ready(limit, box)
            if not box[0]:
                box[0] = [(yield from self._arriving(timeout))]
                if not is_newest:
                    self._take_ready(limit, box)
            return box[0]
        except BaseException:
            if back := box[0][::-1]:
                self._stream.ready.extendleft(back)
            raise

    def _arriving_until_end(self) -> Steps[list[M]]:
        """Return all messages up to the clean end, or raise what comes before that."""
        messages: list[M] = []
        with contextlib.suppress(EOFError):
            while True:
                messages += yield from self._arriving_many(None, None)
        return messages

    def _waiting(self, deadline: Deadline, timeout: float | None) -> Steps[None]:
        """Do as :meth:`_wait`."""
        is_lost = False
        with self._lock:
            stream = self._stream
            if stream.ready:
                if type(stream.ready[0]) is not End:
                    return
                self._meet_end(stream)
                is_lost = True
        if is_lost:
            is_open = False
            with contextlib.suppress(BrokerLost, ChannelInUse, ClosedError):
                yield from self._opening(deadline)
                is_open = True
            self._go_over(stream, is_open)
            return
        try:
            pipe = yield from self._opening(deadline)
            if (yield Wait(deadline, select.POLLIN, pipe)):
                return
        except TimedOut:
            if deadline.remaining() != 0:
                raise
        raise self._about_this(TimedOut(_NO_MESSAGE.format(timeout)))

    def _opening(self, deadline: Deadline) -> Steps[PipeEnd]:
        try:
            return (yield from self._ownership.opening(deadline))
        except BroadcastError as error:
            error.channel = self
            raise

    def _about_this(self, error: E) -> E:
        set_channel(error, self)
        return error
