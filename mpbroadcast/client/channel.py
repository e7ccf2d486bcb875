"""What a subscriber holds: the read end of its pipe, and what has been read from it.

All that has been read is one :class:`Stream`, replaced as a whole in one assignment. So an exception from a signal handler
finds it as it was or as it will be. Bytes come into it by ``list.extend(map(os.read, ...))``, which has no moment between
reading and keeping. A handler that itself receives from this channel is not provided for.

The descriptor is readable for as long as there is something to receive: the last byte that is in the pipe stays there until
the last message that has been decoded is handed out (see ``protocol/frames.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Any, Final, Generic, NoReturn, Self, TypeVar

from mpbroadcast import trap_points
from mpbroadcast.client.asyncio_wait import AsyncWaiters
from mpbroadcast.client.broker_client import BrokerClient, Reply, for_reply
from mpbroadcast.client.pipe_reader import END_OF_MESSAGES, LOST, LOST_FOR_GOOD, End, Stream, follow, take_in
from mpbroadcast.client.shared_reader import SharedReader
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerLost, ChannelInUse, ClosedError, Lagged, TimedOut, concerns
from mpbroadcast.posix import locks
from mpbroadcast.posix.descendants import Descendants, descendants
from mpbroadcast.posix.forks import on_fork
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.protocol.pickling import Failure
from mpbroadcast.validation import check_count, check_timeout, check_topics

M = TypeVar("M")
E = TypeVar("E", bound=Exception)

_NOTHING: Final = object()
_CLOSE_TIMEOUT: Final = 5.0  # seconds that close() gives the broker to answer
_TURN: Final = 64  # messages that `async for` hands out before it lets other tasks run


class Channel(Generic[M]):
    """A subscription, as its subscriber holds it. :meth:`Broadcaster.subscribe` makes it.

    It can be handed to another process, as an argument of ``Process`` or through any queue, until somebody receives from it:
    the first process that does owns it from then on. Any thread of that process may receive; each message comes once.

    A channel can be waited for, in ``multiprocessing.connection.wait``, ``selectors``, ``asyncio`` and a
    :class:`~mpbroadcast.Selector`: its descriptor is readable whenever :meth:`recv` has something to return or to raise. It
    may also be readable when only a part of a message has come; then ``poll(0)`` takes that in and says no. Wait for it
    level-triggered, not edge-triggered.

    Used with ``with``, it is closed at the end. An iteration ends where the messages end.
    """

    def __init__(self, client: BrokerClient, number: int, with_topic: bool, *, subscriber: bool = False) -> None:
        self._client = client
        self.number = number  # what the broker calls it
        self._with_topic = with_topic
        self._subscriber = subscriber  # whether this process has subscribed
        self._pickled = False
        self._heirs = descendants()  # which could open it, too
        self._pipe: PipeEnd | None = None
        self._former: tuple[PipeEnd | None, SharedReader | None] | None = None  # of a broker that has died
        self._token = 0
        self._opened = False
        self._closed = False
        self._told = False  # whether the broker has been: an interrupted close() can be called again
        self._owner = 0  # another process that has opened it, as far as is known here
        self._missed = 0
        self._turn = 0
        self._begin()
        on_fork(self, Channel._in_child)

    def _begin(self) -> None:
        self._lock = locks.rlock()
        self._opening = locks.rlock()
        self._stream = Stream()
        self._held = False  # whether a byte was left in the pipe
        self._shared: SharedReader | None = None
        self._tasks = AsyncWaiters()

    # --- receiving

    def recv(self, timeout: float | None = None) -> M:
        """The next message. Waits for it for at most ``timeout`` seconds; ``None`` waits for ever, 0 does not wait.

        :raises EOFError: it was unsubscribed, or the broadcaster was closed, and all has been received.
        :raises TimedOut: (a ``TimeoutError``) nothing came in time.
        :raises BrokerLost: the broker died; all that had arrived has been received.
        :raises BrokerRestarted: another broker has taken over, and messages may be missing in this place; receiving goes on.
        :raises Lagged: messages were dropped in this place (``drop_oldest``, ``drop_newest``); receiving goes on.
        :raises Overflowed: the backlog was full (``disconnect``); ``EOFError`` comes next.
        :raises ClosedError: this channel was closed, before or meanwhile.
        :raises ChannelInUse: another process receives from it.
        :raises Exception: whatever unpickling this message raises; the next call goes on with the next message. One that could
            be taken for the channel's own (``EOFError``, ``StopIteration``, an error of this package) is the cause of a
            ``RuntimeError``.
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
        deadline: Deadline | None = None
        message: Any = _NOTHING
        try:
            while True:
                with self._lock:
                    ready = self._stream.ready
                    if ready:
                        if type(ready[0]) is End:
                            self._go_on_behind(ready[0], deadline or Deadline(timeout))
                            continue
                        message = ready[0]  # not popleft(): an interrupt may come between its return and the assignment
                        del ready[0]
                        if not ready:
                            self._consume_tail_byte()
                        break
                if deadline is None:
                    deadline = Deadline(timeout)
                self._wait(deadline, timeout)
            if type(message) is not Failure:
                taken: M = message
                return taken  # nothing is called from here on, so no interrupt comes in between
        except BaseException:
            # An interrupt came after the message was taken and before it could be handed out: it is the next one again.
            if message is not _NOTHING:
                self._stream.ready.appendleft(message)
            raise
        self._fail(message)

    def recv_many(self, limit: int | None = None, timeout: float | None = None) -> list[M]:
        """Messages that have arrived, at least one, at most ``limit``. Waits as :meth:`recv` does, for the first only.

        Without a ``limit``, as many as are fastest received at once, which may be some hundred, and not all.

        An error that is in the way ends the list; it is raised by the next call, as :meth:`recv` raises it.
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
        if limit is not None:
            check_count(limit, "limit", 1)
        box: list[list[M]] = [[]]
        try:
            return self._recv_many(limit, timeout, box)
        except BaseException:
            # An interrupt: what was taken comes next again. One call and no more, so that no second interrupt comes between.
            self._stream.ready.extendleft(box[0][::-1])
            raise

    def _recv_many(self, limit: int | None, timeout: float | None, box: list[list[M]]) -> list[M]:
        # Apart from recv_many, because an interrupt at the end of a loop's turn is not always seen by a `try` around the loop.
        deadline: Deadline | None = None
        while True:
            with self._lock:
                # What was decoded before, and what has come since. No loop: with it, an interrupt may not let go of the lock.
                if self._take(limit, box):
                    self._take(limit, box)
                flawed = len(self._stream.ready) > 0
            if box[0]:
                return box[0]
            if deadline is None:
                deadline = Deadline(timeout)
            if flawed:  # it is raised, or another broker has taken over, and there may be a message
                box[0].extend(map(self.recv, (deadline.remaining(),)))
            else:
                self._wait(deadline, timeout)

    def _take(self, limit: int | None, box: list[list[M]]) -> bool:
        """Move what is decoded, or else comes, into ``box``; whether there was a message. Under the lock."""
        if not self._stream.ready:
            self._fill()
        stream = self._stream
        count = stream.sound(limit if limit is None else limit - len(box[0]))
        if count:
            more = [*box[0], *islice(stream.ready, count)]
            rest = stream.without(count)
            box[0], self._stream = more, rest  # in one, as far as an interrupt can see
            if not rest.ready:
                self._consume_tail_byte()
        return count > 0

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether :meth:`recv` would not have to wait, within ``timeout`` seconds: it would return a message, or raise.

        :raises ClosedError, ChannelInUse: as :meth:`recv`. BrokerLost: it was never opened, and cannot be any more.
        """
        return self._arrive(Deadline(check_timeout(timeout)))

    def fileno(self) -> int:
        """The descriptor that is readable while there is something to receive. Wait for it; do not read from it.

        :raises ClosedError, ChannelInUse, BrokerLost: as :meth:`poll`.
        """
        fd = self._open(Deadline(None)).fd
        if fd < 0:
            raise self._closed_error()
        return fd

    def __iter__(self) -> Iterator[M]:
        return self

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
            await asyncio.sleep(0)
        while True:
            try:
                return self.recv(0.0)
            except TimedOut:
                await self._tasks.readable(self.fileno())
            except EOFError:
                raise StopAsyncIteration from None

    def _fail(self, failure: Failure) -> NoReturn:
        """What stands in the place of a message."""
        error, failure.error = failure.error, Exception()
        if isinstance(error, Lagged):
            self._missed += error.missed
        try:
            raise self._about_this(error)
        finally:
            del error  # which has this frame in its traceback, and so this channel

    def _go_on_behind(self, end: End, deadline: Deadline) -> None:
        """With the broker that has taken over, if the last one has died and another one has. Under the lock.

        :raises EOFError, BrokerLost: nothing comes any more.
        """
        if end is not LOST or not self._client.restarts:
            raise self._end(end)
        if self._former is None:  # else it was interrupted, or had no descriptor
            self._former = self._pipe, self._shared
            self._pipe = self._shared = None
            self._opened = self._held = False
        with contextlib.suppress(BrokerLost, ChannelInUse, ClosedError):
            self._open(deadline)
        if not (self._opened or self._closed):
            self._stream.ready[0] = LOST_FOR_GOOD
            self._owner = 0
            (self._pipe, self._shared), self._opened, self._former = self._former, True, None
            raise self._end(end)
        self._stream = Stream()
        (pipe, shared), self._former = self._former, None
        self._tasks.wake()
        for former in (shared, pipe):
            if former is not None:
                former.close()

    def _end(self, end: object) -> Exception:
        """What stands behind all messages, and stays there."""
        if end is END_OF_MESSAGES:
            return self._about_this(EOFError("nothing more comes: this channel was unsubscribed, or its broadcaster closed"))
        return self._about_this(self._client.lost_error())

    def _about_this(self, error: E) -> E:
        concerns(error, self)
        return error

    def _wait(self, deadline: Deadline, timeout: float | None) -> None:
        if not self._arrive(deadline):
            raise self._about_this(TimedOut(f"no message came within {timeout} s"))

    def _arrive(self, deadline: Deadline) -> bool:
        """Wait until there is something to hand out: whether it came."""
        while True:
            try:
                pipe = self._open(deadline)
            except TimedOut:
                if deadline.remaining() == 0:
                    return False
                raise
            with self._lock:
                if not self._stream.ready:
                    self._fill()
                if self._stream.ready:
                    return True
            trap_points.reach("waiting for messages", self._stream)
            if not pipe.wait(select.POLLIN, deadline):
                return False

    def _fill(self) -> None:
        """Take in and decode what is in the pipe, when nothing decoded is left. Under the lock."""
        pipe, before, shared = self._pipe, self._stream, self._shared
        if pipe is None or not self._opened or pipe.fd < 0:
            return
        after, held = follow(before, pipe, self._held, self._with_topic, shared)
        if after is not None and self._stream is before:  # else a signal handler has received meanwhile
            self._stream, self._held = after, held
            self._missed += after.skipped
        if shared is not None:
            shared.settle(self._stream.read, after is not None)

    def _consume_tail_byte(self) -> None:
        """Nothing decoded is left: let the descriptor tell what is behind it. Under the lock."""
        if self._held and not self._stream.decodable(self._held):
            self._held = False
            if self._pipe is not None:
                take_in(self._stream, self._pipe.fd, 1)

    # --- opening and closing

    def _open(self, deadline: Deadline) -> PipeEnd:
        """The pipe; the first call asks the broker for it."""
        while True:
            pipe = self._pipe
            if self._opened and pipe is not None and not self._closed:
                return pipe
            with self._opening:
                if self._closed:
                    raise self._closed_error()
                if self._owner:
                    raise self._in_use(self._owner)
                if self._opened:  # by another thread, meanwhile
                    continue
                try:
                    self._open_once(for_reply(deadline))
                except BroadcastError as error:
                    if isinstance(error, ChannelInUse):
                        self._pipe, self._owner = None, error.pid or -1
                    error.channel = self
                    raise

    def _open_once(self, deadline: Deadline) -> None:
        # In two steps, so that an interrupted opening leaves it unopened: what was sent and not confirmed is taken back.
        if self._pipe is None:
            answer = self._ask("open", deadline, shared=available())
            shared = None if answer.fd_socket is None else SharedReader(answer.fd_socket)
            self._pipe, self._shared, self._token = answer.pipe, shared, answer.body["token"]
        said = self._ask("opened", deadline, token=self._token).body
        if said["opened"]:
            self._opened = True
            self._heirs = Descendants()  # nobody asks any more
        elif not self._opened:
            self._pipe = None

    def _ask(self, do: str, deadline: Deadline | None = None, **fields: Any) -> Reply:
        return self._client.request(do, deadline=deadline, subscription=self.number, **fields)

    def subscribe(self, *topics: str) -> None:
        """Hear these topics or patterns, too. What is published from when this returns on reaches the channel.

        :raises ClosedError: it was closed or unsubscribed. BrokerLost: the broker has ended.
        """
        self._change_topics("add topics", topics)

    def unsubscribe(self, *topics: str) -> None:
        """Do not hear these topics or patterns any more, named as they were subscribed to (``"*"`` for everything).

        What anybody had published before can still be received, but for what a backlog that is full at that moment holds back.
        The channel lives on, even with no topic left.

        :raises ClosedError: it was closed or unsubscribed. BrokerLost: the broker has ended.
        """
        self._change_topics("drop topics", topics)

    def _change_topics(self, do: str, topics: tuple[str, ...]) -> None:
        if not topics:
            raise ValueError("name at least one topic")
        check_topics(topics)
        if self._closed:
            raise self._closed_error()
        self._ask(do, topics=topics)

    @property
    def missed(self) -> int:
        """How many messages it has not been given, under any policy, before the last one that it was given.

        What :class:`Lagged` was raised for, and what ``overflow="latest"`` has skipped.
        """
        return self._missed

    @property
    def closed(self) -> bool:
        """Whether it was closed in this process."""
        return self._closed

    def close(self) -> None:
        """Unsubscribe, and let go of the pipe: what waits is dropped. It can be called again.

        In the process that has subscribed, a channel that was handed on (pickled, or not open at the fork of a process that
        lives) stays what it is for whoever opens it: only this handle is dropped. ``Broadcaster.unsubscribe`` ends it from
        anywhere.
        """
        with self._lock:
            if self._closed and self._told:
                return
            self._closed = True
            self._stream = Stream()
            self._held = False
            if self._pipe is not None:
                self._pipe.close()
                self._pipe = None
            if self._shared is not None:
                self._shared.close()
                self._shared = None
        self._tasks.wake()
        if self._subscriber and not self._opened and self._handed_on:
            self._leave_to_heirs()
        elif not self._owner:
            # A recv that waits in another thread is woken when the broker closes its end.
            try:
                self._ask("close", Deadline(_CLOSE_TIMEOUT))
            except (BroadcastError, OSError):  # the broker may not have got it, and what nobody opens no event ends
                self._client.drop(self.number)
        self._told = True
        self._heirs = Descendants()
        self._client = BrokerClient(
            self._client.address, self._client.broker
        )  # the session ends when nothing else here needs it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # An open pipe closes itself, which tells the broker; nobody can open what nobody has.
        if getattr(self, "_told", True) or self._owner:
            return
        if self._subscriber and not self._opened and self._handed_on:
            self._leave_to_heirs()
        elif (self._opened and self._client.restarts) or (self._subscriber and not self._opened):
            self._client.drop(self.number)

    def _leave_to_heirs(self) -> None:
        if not (self._pickled or self._owner):
            self._client.inherited[self.number] = self._heirs

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._opened else "not open here"
        return f"<mpbroadcast.Channel {self.number} at {self._client.address!r}, {state}>"

    # --- handing on

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closed:
            raise self._closed_error()
        if self._owner:
            raise self._in_use(self._owner)
        if self._pipe is not None:
            raise self._in_use(os.getpid())
        self._pickled = True
        return Channel, (self._client, self.number, self._with_topic)

    @property
    def _handed_on(self) -> bool:
        """Whether another process may open it: one that it was pickled for, or that was forked since, and lives."""
        return self._pickled or self._heirs.live()

    def _in_child(self) -> None:
        self._begin()
        self._subscriber = False
        if self._pipe is not None:
            self._owner = os.getppid()
            self._pipe = None
            self._opened = False

    def _closed_error(self) -> ClosedError:
        return self._about_this(ClosedError("this channel was closed in this process: subscribe again for another"))

    def _in_use(self, pid: int) -> ChannelInUse:
        process = f"process {pid}" if pid > 0 else "a process of another PID namespace"
        text = f"{process} has opened this channel, and only that one can receive from it: hand a channel on before its "
        return self._about_this(ChannelInUse(text + "first receive, or subscribe in each process", pid))

    # --- for the broadcaster

    @property
    def broker(self) -> str:
        """Which broker it belongs to."""
        return self._client.broker

    def broker_has_ended(self) -> bool:
        """Release what shows which processes could open it: none can any more. Return True."""
        self._heirs = Descendants()
        return True

    def open_if_own(self, deadline: Deadline) -> None:
        """Open it, if it was made here and nobody else can."""
        if self._subscriber and not (self._handed_on or self._opened or self._closed):
            self._open(deadline)


def open_own(channels: Iterable[Channel[Any]], deadline: Deadline) -> None:
    """Open those of them that nobody else can open, as far as there is time."""
    for channel in list(channels):
        try:
            channel.open_if_own(deadline)
        except TimedOut:
            return  # so will the next ones
        except (BroadcastError, OSError):
            continue
