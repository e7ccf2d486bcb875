"""A subscription in the process of its subscriber: receiving, opening, closing, handing on.

- What was read from the pipe is one :class:`Stream`, replaced in one assignment, or changed with no call in between. So an
  exception from a signal handler finds it as it was or as it will be. Bytes are read by ``list.extend(map(read, ...))``: there
  is no moment between reading and keeping. A signal handler that receives from the same channel itself is not provided for.
- The descriptor is readable for as long as there is something to receive: the tail byte of the last run that was read stays in
  the pipe until the last decoded message is handed out (see ``protocol/runs.py``). An interrupt behind the reading of that
  byte puts the message back, but not the byte. To read it with the next call instead would wake each waiter once in vain.
- :meth:`Channel._receive_nowait` takes one message, or none, and never blocks: each other call that receives goes through it.
  ``_lock`` is held while a message is read, decoded and taken, but for those of ``Stream.fast``, which are taken without it.
  Nothing waits under it, for a message or for the broker.
- ``pipe_ownership.py`` has the pipe, which process owns it, and the channel's state.
"""

from __future__ import annotations

import contextlib
import select
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice, repeat, starmap, takewhile
from operator import attrgetter
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from mpbroadcast import trap_points
from mpbroadcast.client.asyncio_wait import AsyncWaiters, give_turn, in_thread
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.pipe_ownership import OPEN, PipeOwnership
from mpbroadcast.client.pipe_reader import ENDED, FLAWS, LOST, LOST_FOR_GOOD, NOTHING, End, Stream, follow, read_into, take_lone
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerLost, ChannelInUse, ClosedError, Lagged, Overflowed, TimedOut, set_channel
from mpbroadcast.posix import locks
from mpbroadcast.posix.descriptors import on_fork
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.protocol.pickling import Failure
from mpbroadcast.validation import check_count, check_timeout, check_topics

M = TypeVar("M")
E = TypeVar("E", bound=Exception)

_FAST: Final = attrgetter("_stream.fast")
_HAS_MORE: Final = attrgetter("_stream.has_more")
_TURN: Final = 64  # messages that `async for` hands out before it lets other tasks run


class Channel(Generic[M]):
    """A subscription, in the process of its subscriber. :meth:`Broadcaster.subscribe` makes it.

    It can be handed to another process, as an argument of ``Process`` or through any queue, until one receives from it: the
    first process that does is its owner from then on. Any thread of the owner may receive; each message comes once, in the
    broker's order.

    A channel can be waited for, in ``multiprocessing.connection.wait``, ``selectors``, ``asyncio`` and a
    :class:`~mpbroadcast.Selector`: its descriptor is readable whenever :meth:`recv` has something to return or to raise. It
    may also be readable when only a part of a message has come; then ``poll(0)`` reads that part and returns False. Wait for
    it level-triggered, not edge-triggered. When an exception from a signal handler has interrupted a call that receives, call
    ``poll(0)`` before the next wait: a message may be ready, and the descriptor not readable.

    Used with ``with``, it is closed at the end. An iteration ends where the messages end.
    """

    def __init__(self, client: BrokerClient, id: int, with_topic: bool, *, subscriber: bool = False) -> None:
        self.id = id  # the subscription's, at the broker
        self._with_topic = with_topic
        self.ownership = PipeOwnership(client, id, subscriber)
        self._missed = 0
        self._begin()
        on_fork(self, Channel._in_child)

    def _begin(self) -> None:
        self._lock = locks.rlock()
        self._stream = Stream()
        self._tasks = AsyncWaiters()
        self._turn = 0

    def _in_child(self) -> None:
        self._stream.discard()  # an iteration that goes on in both processes hands them out in one
        self._begin()

    # --- receiving

    def recv(self, timeout: float | None = None) -> M:
        """Return the next message. Block until it comes, at most ``timeout`` seconds; ``None``: no limit, 0: do not block.

        :raises EOFError: the channel was unsubscribed, or the broadcaster was closed, and all messages have been received.
        :raises TimedOut: (a ``TimeoutError``) no message came in time.
        :raises BrokerLost: the broker died; all messages that had arrived have been received.
        :raises BrokerRestarted: another broker has taken over, and messages may be missing at this position; receiving goes on.
        :raises Lagged: messages were dropped at this position (``drop_oldest``, ``drop_newest``); receiving goes on.
        :raises Overflowed: the backlog was full (``disconnect``); ``EOFError`` comes next.
        :raises ClosedError: this channel was closed, before or meanwhile.
        :raises ChannelInUse: another process is the owner.
        :raises Exception: whatever unpickling this message raises; the next call returns the next message. An error that could
            be taken for the channel's own (``EOFError``, ``StopIteration``, an error of this package) is the cause of a
            ``RuntimeError``.
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
        message: M
        for message in self._stream.fast:
            return message  # nothing was called since, so no interrupt comes in between
        message = self._receive_nowait()
        if message is NOTHING:
            message = self._receive(timeout)
        return message  # as above

    def _receive(self, timeout: float | None) -> M:
        deadline = Deadline(timeout)
        while True:
            self._wait(deadline, timeout)
            message = self._receive_nowait(is_readable=True)
            if message is not NOTHING:
                return message

    def recv_many(self, limit: int | None = None, timeout: float | None = None) -> list[M]:
        """Return messages that have arrived, at least one, at most ``limit``. Block as :meth:`recv` does, for the first only.

        Without a ``limit``, as many as are fastest received at once, which may be some hundred, and not all.

        An error behind a message ends the list: the next call raises it.

        :raises Exception: as :meth:`recv`, if no message comes before the error.
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
        if limit is not None:
            check_count(limit, "limit", 1)
        box: list[list[M]] = [[]]
        try:
            self._take_ready(limit, box)
            if not box[0]:
                box[0].extend(map(self.recv, (timeout,)))  # one step: an interrupt comes before or after
                self._take_ready(limit, box)
            return box[0]
        except BaseException:
            # An interrupt: what was taken comes next again. One call and no more, so that no second interrupt comes between.
            if back := box[0][::-1]:  # first, as a collection may run another thread. Behind the error of a message: no call
                self._stream.ready.extendleft(back)
            raise

    def _receive_nowait(self, *, is_readable: bool = False) -> M:
        """Take the next message, or raise the error at its position. Return ``NOTHING`` if there is none, or only the end.

        The end of the pipe is found only if it ``is_readable``.
        """
        message: M = NOTHING
        try:
            with self._lock:
                stream = self._stream
                if stream.ready:
                    stream.close_fast()
                elif is_readable:  # a return of this call, as opposed to one in C, is safe
                    message = take_lone(stream, self.ownership, self._with_topic)
                if message is NOTHING and not stream.ready:
                    self._fill(is_readable)
                    stream = self._stream
                ready, plain = stream.ready, stream.plain
                if message is NOTHING and ready and (plain or type(ready[0]) not in FLAWS):
                    message = ready[0]  # not popleft(): an interrupt may come between its return and the assignment
                    del ready[0]
                if message is NOTHING:
                    if ready:
                        self._raise_failure(ready)
                    return message
                if not ready:
                    self._consume_tail_byte()
                elif plain:
                    stream.open_fast()
            return message  # nothing is called from here on, so no interrupt comes in between
        except BaseException:
            # An interrupt came after the message was taken and before it could be handed out: it is the next one again.
            if message is not NOTHING:
                self._stream.ready.appendleft(message)
            raise

    def _raise_failure(self, ready: deque[Any]) -> None:
        """If a failure comes next, remove it and raise its error. The caller holds the lock."""
        failure = ready[0]
        if type(failure) is Failure:
            error = self._about_this(failure.error)
            missed = error.missed if isinstance(error, Lagged) else int(isinstance(error, Overflowed))
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
            if self._take_decoded(limit, box):
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
        ownership, before = self.ownership, self._stream
        pipe, shared = ownership.pipe, ownership.shared
        if pipe is None or ownership.state is not OPEN or pipe.fd < 0:
            return
        after = follow(before, pipe, self._with_topic, shared, is_readable)
        if before.ready:
            return  # another thread was interrupted, and has put its message back: what comes behind it is decoded again
        if after is not None and self._stream is before:  # else a signal handler has received meanwhile
            self._stream = after
            self._missed += after.skipped
        if shared is not None:
            shared.commit(self._stream.read, after is not None)

    def _consume_tail_byte(self) -> None:
        """Read the tail byte, so that the descriptor shows what is behind it. The caller holds the lock."""
        stream, pipe = self._stream, self.ownership.pipe
        if stream.has_tail and not (stream.chunks and stream.is_decodable):
            stream.has_tail = False
            if pipe is not None:
                read_into(stream, pipe.fd, 1)

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Block until :meth:`recv` would return or raise at once, at most ``timeout`` seconds. Return True if it would.

        :raises ClosedError, ChannelInUse: as :meth:`recv`.
        :raises BrokerLost: the channel was not opened before the broker died.
        """
        deadline = Deadline(check_timeout(timeout))
        is_readable = False
        while True:
            with self._lock:
                if not self._stream.ready:
                    self._fill(is_readable)
                if self._stream.ready:
                    return True
            is_readable = self._wait_readable(deadline)
            if not is_readable:
                return False

    def fileno(self) -> int:
        """Return the descriptor that is readable while there is something to receive. Wait for it; do not read from it.

        The first call opens the channel: it blocks until the broker replies.

        :raises ClosedError, ChannelInUse, BrokerLost: as :meth:`poll`.
        """
        fd = self._open(Deadline(None)).fd
        if fd < 0:
            raise self._about_this(self.ownership.closed_error())
        return fd

    def __iter__(self) -> Iterator[M]:
        # In turns: what is decoded, then one message by `recv`. All of this is C, and so an interrupt comes within `recv` only:
        # it would end a generator, and with that the iteration.
        fast = map(_FAST, takewhile(_HAS_MORE, repeat(self)))
        one = starmap(map, repeat((Channel.__next__, (self,))))
        return chain.from_iterable(chain.from_iterable(zip(fast, one, strict=False)))

    def __next__(self) -> M:
        try:
            return self.recv()
        except EOFError:
            raise StopIteration from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        self._turn = (self._turn + 1) % _TURN
        if not self._turn:
            await give_turn()
        message: M
        for message in self._stream.fast:
            return message
        is_readable = False
        while True:
            message = self._receive_nowait(is_readable=is_readable)
            if message is not NOTHING:
                return message
            if self.ownership.state is OPEN and not self._stream.ready:
                await self._tasks.readable(self.fileno())
                is_readable = True
                continue
            try:
                with contextlib.suppress(TimedOut):
                    await in_thread(self._wait, Deadline(0), 0)  # a broker that is stopped does not block the loop
            except EOFError:
                raise StopAsyncIteration from None

    def _wait(self, deadline: Deadline, timeout: float | None) -> None:
        """Block until there may be a message, or raise TimedOut; raise EOFError or BrokerLost if none comes any more."""
        end: End | None = None
        with self._lock:
            stream = self._stream
            if stream.ready:
                if type(stream.ready[0]) is not End:
                    return
                end = stream.ready[0]
                if end is ENDED:
                    stream.has_more = False
                    text = "no message follows: this channel was unsubscribed, or its broadcaster closed"
                    raise self._about_this(EOFError(text))
                if end is not LOST or not self.ownership.client.restarts:
                    raise self._about_this(self.ownership.client.lost_error())
                self.ownership.begin_reconnecting()
        if end is not None:
            self._reconnect(stream, deadline)
        elif not self._wait_readable(deadline):
            raise self._about_this(TimedOut(f"no message came within {timeout} s"))

    def _wait_readable(self, deadline: Deadline) -> bool:
        """Open the channel, and block until its descriptor is readable. Return False at the deadline."""
        pipe = self.ownership.pipe
        if pipe is None or self.ownership.state is not OPEN:
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
        after = Stream(deque((LOST_FOR_GOOD,)), plain=False)
        with contextlib.suppress(BrokerLost, ChannelInUse, ClosedError):
            self._open(deadline)  # not under the lock: a broker that is stopped delays no other thread
            after = Stream()
        with self._lock:
            if self._stream is stream and type(stream.ready[0]) is End:  # else another thread has gone over, or put back
                self._stream = after
                self._tasks.wake()
                self.ownership.release_former()

    def _about_this(self, error: E) -> E:
        set_channel(error, self)
        return error

    # --- opening and closing

    def _open(self, deadline: Deadline) -> PipeEnd:
        try:
            return self.ownership.open(deadline)
        except BroadcastError as error:
            error.channel = self
            raise

    def subscribe(self, *topics: str) -> None:
        """Add topics or patterns: what is published after this has returned reaches the channel. Block until it is added.

        :raises ClosedError: the channel was closed or unsubscribed.
        :raises BrokerLost: the broker has ended.
        """
        self._change_topics("add topics", topics)

    def unsubscribe(self, *topics: str) -> None:
        """Drop topics or patterns, named as they were subscribed to (``"*"`` for everything). Block until the broker replies.

        What was published before can still be received, but for what a backlog that is full at that moment blocks or drops.
        The channel lives on, even with no topic left.

        :raises ClosedError, BrokerLost: as :meth:`subscribe`.
        """
        self._change_topics("drop topics", topics)

    def _change_topics(self, do: str, topics: tuple[str, ...]) -> None:
        if not topics:
            raise ValueError("name at least one topic")
        check_topics(topics)
        if self.closed:
            raise self._about_this(self.ownership.closed_error())
        self.ownership.request(do, topics=topics)

    @property
    def missed(self) -> int:
        """The number of messages dropped for this channel, under any policy, before the last one that it has received.

        It counts what :class:`Lagged` and, for one, :class:`Overflowed` stand for, and what ``overflow="latest"`` has skipped.
        """
        return self._missed

    @property
    def closed(self) -> bool:
        """True if it was closed in this process."""
        return self.ownership.is_closed

    def close(self) -> None:
        """Unsubscribe, and close the pipe: what was not received is dropped. It can be called again.

        In the process that has subscribed, a channel that was handed on (pickled, or not open at the fork of a process that
        lives) stays subscribed for the process that opens it: only this handle is dropped. ``Broadcaster.unsubscribe`` ends it
        from any process. It blocks until the broker replies, at most 5 seconds, and raises nothing if that does not reply.
        """
        with self._lock:
            if not self.ownership.close_pipe():
                return
            self._stream.discard()
            self._stream = Stream()
        self._tasks.wake()
        self.ownership.end_subscription()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "ownership"):
            self.ownership.drop()

    def __repr__(self) -> str:
        ownership = self.ownership
        state = "closed" if ownership.is_closed else "open" if ownership.state is OPEN else "not open here"
        return f"<mpbroadcast.Channel {self.id} at {ownership.client.address!r}, {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            self.ownership.hand_on()
        except BroadcastError as error:
            error.channel = self
            raise
        return Channel, (self.ownership.client, self.id, self._with_topic)
