"""A subscription in the process of its subscriber: the public calls that receive, iterate, change topics, close.

``receiving.py`` has the core that they share, ``pipe_ownership.py`` the pipe and which process owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from mpbroadcast.client.messages import Gap, Messages, OnGap, in_turns
from mpbroadcast.client.naming import named_throughout
from mpbroadcast.client.pipe_ownership import OPEN
from mpbroadcast.client.pipe_reader import NOTHING, Stream
from mpbroadcast.client.receiving import Receiving
from mpbroadcast.client.tasks import TURN, drive, give_turn
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError
from mpbroadcast.posix.waiting import Steps, run
from mpbroadcast.protocol.pickling import PAYLOADS
from mpbroadcast.validation import check_count, check_timeout, check_topics

M = TypeVar("M")


@named_throughout
class Channel(Receiving[M]):
    """A subscription, in the process of its subscriber. :meth:`Broadcaster.subscribe` makes it.

    It can be handed to another process, as an argument of ``Process`` or through any queue, until one receives from it: the
    first process that does is its owner from then on. Any thread of the owner may receive; each message comes once, in the
    broker's order.

    A channel can be waited for, in ``multiprocessing.connection.wait``, ``selectors``, ``asyncio`` and a
    :class:`~mpbroadcast.Selector`: its descriptor is readable whenever :meth:`recv` has something to return or to raise. It
    may also be readable when only a part of a message has come; then ``poll(0)`` reads that part and returns False. Wait for
    it level-triggered, not edge-triggered. When an exception from a signal handler has interrupted a call that receives, call
    ``poll(0)`` before the next wait: a message may be ready, and the descriptor not readable.

    Of a group's member (``subscribe(group=...)``), each call that receives or waits also reports that what was handed out
    before is finished. If you wait with ``selectors``, call ``poll()`` behind each message.

    Used with ``with``, it is closed at the end. An iteration ends where the messages end.
    """

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
        :raises ChannelBusy: a task receives from the channel (:meth:`arecv`, ``async for``); or a message that comes from it is
            being unpickled, and calls this.
        :raises Exception: whatever unpickling this message raises; the next call returns the next message. An error that could
            be taken for the channel's own (``EOFError``, ``StopIteration``, an error of this package) is the cause of a
            ``RuntimeError``.
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
        message: M
        for message in self._stream.fast:
            return message  # nothing was called since, so no interrupt comes in between
        if self._has_receiver or self._unpickler is not None:
            self._check_no_receiver()
        # Where nothing is left of what was read, the first look into the pipe comes with the wait for it: one system call less.
        # What an interrupt has kept from being acknowledged is acknowledged first: the broker may wait for that.
        ownership = self._ownership
        if ownership.keeps_newest and timeout != 0:
            return self._receive_newest(timeout, Deadline(timeout))
        reports, shared = ownership.reports, ownership.shared
        if reports is None and (shared is None or shared.is_committed) and self._stream.is_used_up:
            message = NOTHING
        else:
            message = self._receive_nowait()
        if message is NOTHING:
            message = self._receive(Deadline(timeout), timeout)
        return message  # as above

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
        self._check_no_receiver()
        if self._ownership.reports is not None:
            self._finish()
        box: list[list[M]] = [[]]
        is_newest = self._ownership.keeps_newest and timeout != 0
        try:
            if not is_newest:
                self._take_ready(limit, box)
            if not box[0]:
                box[0].extend(map(self.recv, (timeout,)))  # one step: an interrupt comes before or after
                if not is_newest:
                    self._take_ready(limit, box)
            return box[0]
        except BaseException:
            # An interrupt: what was taken comes next again. One call and no more, so that no second interrupt comes between.
            if back := box[0][::-1]:  # first, as a collection may run another thread. Behind the error of a message: no call
                self._stream.ready.extendleft(back)
            raise

    async def arecv(self, timeout: float | None = None) -> M:
        """Return the next message, as :meth:`recv`, in a task of asyncio or trio: the loop runs on while it waits.

        Cancelled, it has received nothing. One task at a time may receive.

        :raises ChannelBusy: another task receives from the channel.
        :raises Exception: as :meth:`recv`.
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
        await self._take_turn()
        return await self._in_task(self._arriving(timeout))

    async def arecv_many(self, limit: int | None = None, timeout: float | None = None) -> list[M]:
        """Return messages that have arrived, as :meth:`recv_many`, in a task; else as :meth:`arecv`."""
        if timeout is not None:
            timeout = check_timeout(timeout)
        if limit is not None:
            check_count(limit, "limit", 1)
        await self._take_turn()
        return await self._in_task(self._arriving_many(limit, timeout))

    async def _take_turn(self) -> None:
        self._turn = (self._turn + 1) % TURN
        if not self._turn:
            await give_turn()

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Block until :meth:`recv` would return or raise at once, at most ``timeout`` seconds. Return True if it would.

        ``poll(0)`` on a channel that was never opened opens it, and may return False although messages wait for it: the broker
        writes them into the new pipe a moment later.

        :raises ClosedError, ChannelInUse: as :meth:`recv`.
        :raises ChannelBusy: a message that comes from this channel is being unpickled, and calls this.
        :raises BrokerLost: the channel was not opened before the broker died.
        """
        deadline = Deadline(check_timeout(timeout))
        self._check_not_unpickling()
        is_readable = False
        if self._ownership.reports is not None:
            self._finish()
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
        if self._ownership.reports is not None:
            self._finish()
        if fd < 0:
            raise self._about_this(self._ownership.closed_error())
        return fd

    def __iter__(self) -> Iterator[M]:
        return in_turns(self, Channel.__next__, self)

    def __next__(self) -> M:
        try:
            return self.recv()
        except EOFError:
            raise StopIteration from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        self._turn = (self._turn + 1) % TURN
        if not self._turn:
            await give_turn()
        message: M
        for message in self._stream.fast:
            return message
        try:
            return await self._in_task(self._arriving(None))
        except EOFError:
            raise StopAsyncIteration from None

    @overload
    def messages(self, on_gap: Literal["skip"] | Callable[[Gap], object] = "skip") -> Messages[M]: ...
    @overload
    def messages(self, on_gap: Literal["yield"]) -> Messages[M | Gap]: ...
    def messages(self, on_gap: OnGap = "skip") -> Messages[Any]:
        """Return an iterable over the messages that goes on behind gaps, for ``for`` and ``async for``.

        Where messages are missing (:class:`Lagged`), or another broker has taken over (:class:`BrokerRestarted`), it goes on
        with the next message if ``on_gap`` is ``"skip"``, gives the exception as a value if it is ``"yield"``, and else calls
        ``on_gap`` with the exception. Everything else is as in ``for message in channel``.
        """
        return Messages(self, on_gap)

    # --- opening and closing

    def subscribe(self, *topics: str) -> None:
        """Add topics or patterns: what is published after this has returned reaches the channel. Block until it is added.

        Pass a topic that comes from outside through :func:`escape`: ``*``, ``?`` and ``[`` make it a pattern.

        :raises ClosedError: the channel was closed or unsubscribed.
        :raises BrokerLost: the broker has ended.
        """
        run(self._changing_topics("add topics", topics))

    async def asubscribe(self, *topics: str) -> None:
        """Do as :meth:`subscribe`, in a task. Cancelled, it may have added the topics."""
        await drive(self._changing_topics("add topics", topics), self._tasks, self._closed_error)

    def unsubscribe(self, *topics: str) -> None:
        """Drop topics or patterns, named as they were subscribed to (``"*"`` for everything). Block until the broker replies.

        What was published before can still be received, but for what a backlog that is full at that moment blocks or drops.
        The channel lives on, even with no topic left.

        :raises ClosedError, BrokerLost: as :meth:`subscribe`.
        """
        run(self._changing_topics("drop topics", topics))

    async def aunsubscribe(self, *topics: str) -> None:
        """Do as :meth:`unsubscribe`, in a task. Cancelled, it may have dropped the topics."""
        await drive(self._changing_topics("drop topics", topics), self._tasks, self._closed_error)

    def _changing_topics(self, do: str, topics: tuple[str, ...]) -> Steps[None]:
        if not topics:
            text = "" if do == "add topics" else ", or end the subscription: channel.close(), or bus.unsubscribe(channel)"
            raise ValueError(f"name at least one topic{text}")
        check_topics(topics)
        if self.closed:
            raise self._about_this(self._ownership.closed_error())
        yield from self._ownership.requesting(do, topics=topics)

    @property
    def id(self) -> int:
        """The number of this subscription: ``id`` of its row in ``stats().subscribers``, and in the broker's log."""
        return self._id

    @property
    def missed(self) -> int:
        """The number of messages dropped for this channel, under any policy, before the last one that it has received.

        It counts what :class:`Lagged` and, for one, :class:`Overflowed` stand for, and what ``overflow="latest"`` has skipped.
        """
        return self._missed

    @property
    def closed(self) -> bool:
        """True if it was closed in this process."""
        return self._ownership.is_closed

    def close(self) -> None:
        """Unsubscribe, and close the pipe: what was not received is dropped. It can be called again.

        In the process that has subscribed, a channel that was handed on (pickled; or not open when a child that lives was
        forked, or was started with it) stays subscribed for the process that opens it: only this handle is dropped.
        ``Broadcaster.unsubscribe`` ends it from any process. It blocks until the broker replies, at most 5 seconds, and raises
        nothing if that does not reply.
        """
        run(self._closing())

    async def aclose(self) -> None:
        """Do as :meth:`close`, in a task. Cancelled, it leaves a channel that :meth:`close` closes."""
        await drive(self._closing())

    def _closing(self) -> Steps[None]:
        with self._lock:
            if not self._ownership.close_pipe(self._stream.handed_out):
                return
            self._stream.discard()
            self._stream = Stream()
        self._tasks.close()
        yield from self._ownership.ending_subscription()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_ownership"):
            self._ownership.drop()

    def __repr__(self) -> str:
        ownership = self._ownership
        state = "closed" if ownership.is_closed else "open" if ownership.state is OPEN else "not open here"
        name = "" if self._name is None else f" {self._name!r}"
        return f"<mpbroadcast.Channel {self.id}{name} at {ownership.client.address!r}, {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            passed = self._ownership.hand_on()
        except BroadcastError as error:
            error.channel = self
            raise
        arguments = self._ownership.client, self.id, self._form, self._loaders is PAYLOADS, self._name
        return (Channel, arguments) if passed is None else (Channel, arguments, passed)

    def __setstate__(self, passed: Any) -> None:
        self._ownership.inherit(passed)
