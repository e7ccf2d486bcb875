"""What publishers and starters hold. Publishing takes no lock while it waits (see ``pipe_writer.py``)."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Generic, Literal, Protocol, Self, TypeVar, overload
from weakref import WeakSet

from mpbroadcast.client.broker_client import BrokerClient, Reply, Session, for_reply
from mpbroadcast.client.channel import Channel, open_own
from mpbroadcast.client.pipe_writer import Route, framed
from mpbroadcast.client.shared_writer import SHARED_FROM, SharedWriter
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerRestarted, ClosedError, TimedOut
from mpbroadcast.posix.descendants import Descendants, descendants
from mpbroadcast.posix.forks import on_fork
from mpbroadcast.protocol.frames import MAX_FRAME, PIPE_BUF, frame_head
from mpbroadcast.protocol.pickling import PROTOCOL, LargeBuffer, Payload, dumps, explain, gather, keep_in_band
from mpbroadcast.stats import BrokerStats, snapshot
from mpbroadcast.validation import (
    Policy,
    check_count,
    check_overflow,
    check_timeout,
    check_topics,
    encode_topic,
    encoded_topic,
)

M = TypeVar("M")

DEFAULT_CAPACITY: Final = 64 << 20
CLOSE_TIMEOUT: Final = 5.0
_MARGIN: Final = 0.6  # seconds that a broker's answers and end may take longer than the timeout of close()

_write = os.write
_NOT_WRITTEN: Final = (errno.EAGAIN, errno.EPIPE, errno.EBADF)
# The heads of short messages without a topic: to look one up costs less than to pack it.
SHORT: Final = min(SHARED_FROM, PIPE_BUF // 2)
_HEADS: Final = [frame_head(size, b"") for size in range(SHORT)]
_GATHER_FROM: Final = 1 << 18  # bytes of a message from which on its parts are better not put together


class _Process(Protocol):
    """The broker's, in its starter. (Handles and channels need no module of the broker.)"""

    def leave(self) -> bool: ...

    def end(self, timeout: float | None, *, asked: int, time_left: Callable[[], float]) -> None: ...


class Broadcaster(Generic[M]):
    """A handle on a broker. :func:`start_broadcaster` and :func:`connect` make it.

    It can be pickled into any child process of the starter, and used in any number of threads and signal handlers, and after a
    fork; each process and each handle has its own order of messages (FIFO), and all channels see all messages in one order.

    Used with ``with``, it is closed at the end. One that its starter drops without closing it is a ``ResourceWarning``: its
    broker ends when no channel of this process and no other process needs it, at the latest with the program.
    """

    def __init__(self, client: BrokerClient, process: _Process | None = None) -> None:
        self._client = client
        self._writer: SharedWriter | None = None  # until something is published
        self._writers: dict[Session, SharedWriter] = {}
        self._gap = False  # whether something was published to a broker that has died since
        self._process = process  # in its starter
        self._large = False  # whether the last message was, and so perhaps the next
        self._closed = False
        self._ended = False  # whether close() has been done: an interrupted one can be called again
        self._channels: WeakSet[Channel[Any]] = WeakSet()
        self._handed_on = False
        self._heirs = descendants()
        on_fork(self, Broadcaster._in_child)

    @property
    def address(self) -> str:
        """The path of the broker's socket: what :func:`connect` takes."""
        return self._client.address

    @property
    def closed(self) -> bool:
        """Whether this handle was closed in this process."""
        return self._closed

    # --- publishing

    def publish(
        self, message: M, *, topic: str = "", exclude: Channel[Any] | None = None, timeout: float | None = None
    ) -> None:
        """Send ``message`` to every channel that is subscribed to ``topic``, except ``exclude``.

        ``topic`` is taken as it is: ``"room:*"`` is the name of one topic here, not a pattern.

        When this returns, the message has left this process: it is delivered even if this process is killed the next
        moment, as long as the broker lives and is not being closed. It does not mean that anybody has received it, or
        that the broker has routed it: :meth:`flush` waits for that. Without subscribers it is discarded. The message may be
        changed, and its buffers used again.

        It waits while a subscriber that would get a message of this handle has a full backlog: at most ``timeout`` seconds;
        ``None`` waits for ever, 0 does not wait. An exception from a signal handler leaves the message published whole or
        not at all.

        :raises TimedOut: (a ``TimeoutError``) it is not published, and never will be.
        :raises BrokerLost: the broker has ended.
        :raises ClosedError: this handle was closed.
        :raises Exception: whatever pickling the message raises; nothing was sent.
        """
        if exclude is not None or timeout is not None or self._large:
            route, deadline = self._route(topic, exclude), Deadline(check_timeout(timeout))
            self._publish(self._pickled(message, topic), route, deadline, [])
            return
        encoded = encoded_topic(topic) if topic != "" else b""
        try:
            payload = dumps(message, PROTOCOL, buffer_callback=keep_in_band)
        except LargeBuffer:
            self._large = True
            self._publish(self._pickled(message, topic), (encoded, 0), Deadline(None), [])
            return
        except Exception as error:
            explain(error, message, topic)
            raise
        size = len(payload)
        writer = self._writer
        if writer is not None:
            try:
                if size < SHORT:
                    _write(writer.pipe.fd, (frame_head(size, encoded) if encoded else _HEADS[size]) + payload)
                    return
                self._large = size >= _GATHER_FROM
                if writer.send_quickly(payload, encoded):
                    return
            except OSError as error:
                # Full, closed or broken: _publish finds out. Anything else has not come from this write.
                if error.errno not in _NOT_WRITTEN:
                    raise
        self._publish(Payload((payload,), size, False), (encoded, 0), Deadline(None), [])

    def publish_many(
        self,
        messages: Iterable[M],
        *,
        topic: str = "",
        exclude: Channel[Any] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send each of ``messages``, in order, several in one write: how many were sent.

        As :meth:`publish`, with one ``timeout`` for all. When it raises, whatever it is, the exception's ``sent`` is how many
        of the first messages were published. Messages are gathered while they fit into one write: a generator that is slow
        is better served by :meth:`publish`.
        """
        counts: list[int] = []  # of the messages in each write that was begun
        done: list[int] = []  # one for each write that was done
        try:
            route = self._route(topic, exclude)
            self._publish_all(messages, topic, route, Deadline(check_timeout(timeout)), counts, done)
        except BaseException as error:
            with contextlib.suppress(AttributeError):
                error.sent = sum(counts[: len(done)])  # type: ignore[attr-defined]
            raise
        return sum(counts)

    def _publish_all(
        self,
        messages: Iterable[M],
        topic: str,
        route: Route,
        deadline: Deadline,
        counts: list[int],
        done: list[int],
    ) -> None:
        waiting: list[bytes] = []
        size = 0
        try:
            for message in messages:
                payload = self._pickled(message, topic)
                frame = framed(payload, route) if payload.size < SHARED_FROM else b""
                if not frame or size + len(frame) > PIPE_BUF:
                    self._send_all(waiting, deadline, counts, done)
                    size = 0
                if not frame or len(frame) > PIPE_BUF:
                    counts.append(1)
                    self._publish(payload, route, deadline, done)
                else:
                    waiting.append(frame)
                    size += len(frame)
        except Exception:
            self._send_all(waiting, deadline, counts, done)  # what came before a message that cannot be sent
            raise
        self._send_all(waiting, deadline, counts, done)

    def _send_all(self, waiting: list[bytes], deadline: Deadline, counts: list[int], done: list[int]) -> None:
        if waiting:
            frames = b"".join(waiting)
            counts.append(len(waiting))
            waiting.clear()
            self._deliver(deadline, SharedWriter.send, frames, deadline, done)

    def _route(self, topic: str, exclude: Channel[Any] | None) -> Route:
        return encode_topic(topic), 0 if exclude is None else self._own_channel(exclude, "exclude").id

    def _own_channel(self, channel: Channel[Any], name: str) -> Channel[Any]:
        if not isinstance(channel, Channel):
            hint = "; channel.unsubscribe(topic) drops a topic" if isinstance(channel, str) and name == "channel" else ""
            raise TypeError(f"{name} must be a Channel, not {type(channel).__name__}{hint}")
        if channel.broker != self._client.broker:
            raise ValueError(f"{name} is a channel of another broker, not of the one at {self.address!r}")
        return channel

    def _pickled(self, message: M, topic: str) -> Payload:
        try:
            if self._large:
                return self._gathered(message)
            payload = dumps(message, PROTOCOL, buffer_callback=keep_in_band)
        except LargeBuffer:
            self._large = True
            return self._pickled(message, topic)
        except Exception as error:
            explain(error, message, topic)
            raise
        self._large = len(payload) >= _GATHER_FROM
        return Payload((payload,), len(payload), False)

    def _gathered(self, message: M) -> Payload:
        payload = gather(message)
        self._large = payload.image or payload.size >= _GATHER_FROM
        return payload

    def _publish(self, payload: Payload, route: Route, deadline: Deadline, done: list[int]) -> None:
        if payload.size + 16 + len(route[0]) > MAX_FRAME:
            raise ValueError(f"a message of {payload.size} bytes is too long: with its topic, the limit is {MAX_FRAME - 16}")
        self._deliver(deadline, SharedWriter.publish, payload, route, deadline, done)

    def _deliver(self, deadline: Deadline, send: Callable[..., None], *arguments: Any) -> None:
        """Call ``send`` with the route to the broker, and again if another one takes over meanwhile."""
        while True:
            self._check_open()
            writer = self._writer or self._make(deadline)
            try:
                send(writer, *arguments)
                return
            except TimedOut:
                raise
            except OSError as error:
                self._check_open()
                if not self._client.restarts:
                    raise self._client.lost_error(error)  # noqa: B904, it has its cause
                self._leave(writer)

    def _make(self, deadline: Deadline) -> SharedWriter:
        answer = self._ask("publisher", for_reply(deadline))
        if answer.pipe is None:
            raise self._client.lost_error()
        made = SharedWriter(self._client, answer.session, answer.pipe, answer.body["publisher"])
        # Of several threads that come here first, one makes it for all: this is one step, where `if` and `=` are two.
        self._writer = writer = self._writers.setdefault(answer.session, made)
        if self._closed:  # meanwhile, by another thread
            writer.pipe.close()
        self._check_open()
        return writer

    def _leave(self, writer: SharedWriter) -> None:
        """The broker that it leads to has died; the next publish makes one to that which has taken over."""
        self._gap = True
        self._writers.pop(writer.session, None)
        if writer is self._writer:
            self._writer = None

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this broadcaster was closed in this process: start or connect() another") from None

    def _ask(self, do: str, deadline: Deadline | None = None, **fields: Any) -> Reply:
        self._check_open()
        if self._writer is not None:
            self._writer.pool.rest()
        return self._client.request(do, deadline=deadline, **fields)

    # --- subscribing

    @overload
    def subscribe(
        self,
        *topics: str,
        overflow: Policy = "block",
        capacity: int | None = None,
        replay: int = 0,
        with_topic: Literal[False] = False,
    ) -> Channel[M]: ...
    @overload
    def subscribe(
        self, *topics: str, overflow: Policy = "block", capacity: int | None = None, replay: int = 0, with_topic: Literal[True]
    ) -> Channel[tuple[str, M]]: ...
    @overload
    def subscribe(
        self, *topics: str, overflow: Policy = "block", capacity: int | None = None, replay: int = 0, with_topic: bool
    ) -> Channel[M] | Channel[tuple[str, M]]: ...
    def subscribe(
        self, *topics: str, overflow: Policy = "block", capacity: int | None = None, replay: int = 0, with_topic: bool = False
    ) -> Channel[Any]:
        """A new channel that hears ``topics``; everything, when none is named.

        A topic with ``*``, ``?`` or ``[`` is a pattern (``fnmatch.fnmatchcase``; ``[*]`` is a literal star). From when this
        returns, every publish, by anyone, reaches the channel; nothing that this handle has published before does. Each
        channel gets its own copy, once, however many of its topics match.

        ``capacity`` bounds the backlog, in bytes (64 MiB if not given). A message counts with its pickled length, its
        topic's, and 256 bytes while it waits in the broker, and with its unread bytes in the channel's pipe. One that is
        larger than all of it passes when nothing else is there. When the backlog is full, ``overflow`` says who pays:

        - ``"block"``: those whose messages it would get wait in ``publish``; nothing is lost.
        - ``"drop_oldest"``: what waits the longest is dropped, and ``recv`` raises ``Lagged`` in its place.
        - ``"drop_newest"``: what comes is dropped, and ``recv`` raises ``Lagged`` in its place.
        - ``"latest"``: full or not, the channel gets the newest message only, as soon as it has taken the one before.
        - ``"disconnect"``: it is unsubscribed; ``recv`` gives what was kept, then raises ``Overflowed``, then ``EOFError``.

        With ``replay=k`` it starts with the last ``k`` messages that match, in the order of all, as far as the broker has kept
        them (``start_broadcaster(history=...)``) and they fit into the capacity; what comes next follows without a gap.

        With ``with_topic`` the channel gives ``(topic, message)``.

        :raises ValueError: an argument that is out of range; ``replay`` without a history; more than one process may have.
        :raises BrokerLost: the broker has ended. ClosedError: this handle was closed.
        """
        check_topics(topics)
        check_overflow(overflow)
        if not isinstance(with_topic, bool):
            raise TypeError(f"with_topic must be True or False, not {type(with_topic).__name__}")
        room = DEFAULT_CAPACITY if capacity is None else check_count(capacity, "capacity", 1)
        check_count(replay, "replay", 0)
        self._check_open()
        writer = self._writer
        number = int.from_bytes(os.urandom(6)) or 1
        # The channel exists before the subscription does: if an interrupt comes, its finaliser drops that.
        channel: Channel[Any] = Channel(self._client, number, with_topic, subscriber=True)
        try:
            self._ask(
                "subscribe",
                subscription=number,
                topics=topics or ("*",),
                overflow=overflow,
                capacity=room,
                replay=replay,
                publisher=None if writer is None else writer.id,  # a former broker's is unknown to the next one
            )
            self._channels.add(channel)
        except BaseException:
            self._client.dropped.add(number)  # if a second interrupt stops the finaliser, the next request does it
            del channel
            raise
        return channel

    def unsubscribe(self, channel: Channel[Any]) -> None:
        """Let nothing more come to ``channel``, whoever holds it.

        What anybody had published before can still be received, but for what a backlog that is full at that moment holds back;
        then ``EOFError``. Nothing happens if it was unsubscribed or closed before.

        :raises ValueError: it is another broker's. BrokerLost: the broker has ended. ClosedError: this handle was closed.
        """
        number = self._own_channel(channel, "channel").id
        self._ask("unsubscribe", subscription=number)

    # --- asking

    def flush(self, timeout: float | None = None, *, delivered: bool = False) -> None:
        """Wait until the broker has routed all that this handle has published in this process.

        Then it is in every backlog that it belongs to, and comes before whatever is published from now on. With
        ``delivered``, wait until all of it has left every backlog, too: it is in the pipe, was dropped by the policy, or its
        subscription is gone; a channel that nobody has opened yet is waited for. Neither means that anybody has received it.

        :raises TimedOut: (a ``TimeoutError``) not within ``timeout`` seconds. BrokerLost, ClosedError: as :meth:`publish`.
        :raises BrokerRestarted: something was published to a broker that has died since, and may not have been routed.
        """
        limit = check_timeout(timeout)
        if not isinstance(delivered, bool):
            raise TypeError(f"delivered must be True or False, not {type(delivered).__name__}")
        self._check_open()
        writer = self._writer
        if writer is not None:
            what = "all to leave its backlog" if delivered else "the broker to route all"
            self._ask_and_wait(limit, what, "flush", publisher=writer.id, delivered=delivered)
            if writer.session is not self._client.session():
                self._leave(writer)
        if self._gap:
            self._gap = False
            raise BrokerRestarted("the broker has died: what this handle had published before may not have reached everybody")

    def wait_for_subscribers(self, count: int, *, topic: str | None = None, timeout: float | None = None) -> None:
        """Wait until there are ``count`` subscriptions; with ``topic``, that would get what is published to it.

        :raises TimedOut: (a ``TimeoutError``) not within ``timeout`` seconds. BrokerLost, ClosedError: as :meth:`publish`.
        """
        check_count(count, "count", 0)
        if topic is not None:
            encode_topic(topic)
        what = f"{count} subscription(s)" + ("" if topic is None else f" to {topic!r}")
        timeout = check_timeout(timeout)
        try:
            self._ask_and_wait(timeout, what, "wait", count=count, topic=topic)
        except TimedOut as error:
            there = "no answer comes"
            with contextlib.suppress(TimedOut):
                said = self._ask("wait", Deadline(0.3), now=True, count=count, topic=topic).body
                there = f"there are {said['there']}"
            raise TimedOut(f"{error}. Now {there}") from None

    def _ask_and_wait(self, timeout: float | None, what: str, do: str, **fields: Any) -> None:
        # Who does not wait for what is asked for does wait for the answer.
        deadline = for_reply(Deadline(0)) if timeout == 0 else Deadline(timeout)
        try:
            done = bool(self._ask(do, deadline, now=timeout == 0, **fields).body["done"])
        except TimedOut:
            done = False
        if not done:
            raise TimedOut(f"{timeout} s were not enough for {what}: stats() shows how things are; wait longer")

    def stats(self) -> BrokerStats:
        """A snapshot of the broker and its subscriptions. Rates are the difference of two.

        :raises BrokerLost: the broker has ended. ClosedError: this handle was closed.
        """
        return snapshot(self._ask("stats").body)

    def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """In the process that has started the broker: end it. Elsewhere: let go of this handle; its channels live on.

        The broker takes in what has been published, and moves all backlogs into the channels' pipes, until no reader has made
        progress for ``timeout`` seconds (``None``: as long as that takes). It waits for a channel that is not open yet while
        there is a message for it and a process that could open it: one that it was pickled for, or that was forked since; not
        for those that this process has open. Who has got all has a clean end (``EOFError``); who has not gets ``BrokerLost``,
        and the broker's log names it. A ``publish`` that comes later raises ``BrokerLost``. It can be called again.
        """
        timeout = check_timeout(timeout)
        if self._ended:
            return
        process, client, writer = self._process, self._client, self._writer
        limit = Deadline(None if timeout is None else timeout + _MARGIN)  # also when the broker is stopped
        if process is not None:
            open_own(self._channels, limit.at_most(CLOSE_TIMEOUT))
        self._closed = True
        if writer is not None:
            writer.pipe.close()
        if process is None and writer is not None:
            # A publish that waits in another thread is woken when the broker closes its end.
            with contextlib.suppress(BroadcastError, OSError):
                deadline = limit.at_most(CLOSE_TIMEOUT)
                client.request("retire", session=writer.session, publisher=writer.id, deadline=deadline)
        if process is not None:
            asked = 0
            with contextlib.suppress(BroadcastError, OSError):
                asked = client.request("stop", deadline=limit.at_most(CLOSE_TIMEOUT), timeout=timeout).body["pid"]
            process.end(limit.remaining(), asked=asked, time_left=lambda: self._time_left(client, timeout))
            client.close()
        self._writer = None
        self._writers.clear()
        self._client = BrokerClient(client.address, client.broker)  # the session ends when nothing else here needs it
        self._heirs = Descendants()  # nobody asks any more
        if process is not None:
            all(map(Channel.broker_has_ended, self._channels))
        self._ended = True

    @staticmethod
    def _time_left(client: BrokerClient, timeout: float | None) -> float:
        """How many seconds the broker goes on draining, unless a reader makes progress; 0 when it does not answer."""
        with contextlib.suppress(BroadcastError, OSError):
            return float(client.request("stop", deadline=Deadline(1.0), timeout=timeout).body["left"])
        return 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_open()
        self._handed_on = True
        return Broadcaster, (self._client,)

    def __del__(self) -> None:
        process: _Process | None = getattr(self, "_process", None)
        if process is not None and not self._closed and process.leave():
            if not (self._handed_on or self._heirs.live()):  # else there may be a process that will connect
                self._client.ends_broker = True
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        return f"<mpbroadcast.Broadcaster at {self.address!r}{', closed' if self._closed else ''}>"

    def _in_child(self) -> None:
        self._writer = None
        self._writers = {}
        self._gap = False
        self._process = None
