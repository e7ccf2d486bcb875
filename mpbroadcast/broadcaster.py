"""What publishers and starters hold.

Publishing takes no lock while it waits. A frame is at most ``PIPE_BUF`` bytes, which the pipe takes whole or not at all; a
longer message is pieces with its number. So threads, and signal handlers in the middle of a publish, write as they come, and
the broker puts together what belongs together.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar
from weakref import WeakSet

from mpbroadcast.arguments import Deadline, check_count, check_timeout, encode_topic, encoded_topic
from mpbroadcast.broker.outbox import POLICIES
from mpbroadcast.broker.process import BrokerProcess
from mpbroadcast.channel import Channel
from mpbroadcast.errors import BroadcastError, BrokerLost, ClosedError, TimedOut
from mpbroadcast.stats import BrokerStats, SubscriberStats
from mpbroadcast.wire.descriptors import DescriptorSocket, PipeEnd, on_fork
from mpbroadcast.wire.frames import IMAGE, MAX_FRAME, PIPE_BUF, frame_head
from mpbroadcast.wire.link import Link, for_answer
from mpbroadcast.wire.outlet import Outlet
from mpbroadcast.wire.payload import PROTOCOL, LargeBuffer, Payload, dumps, gather, keep_in_band
from mpbroadcast.wire.shared_outlet import SHARED_FROM, SharedOutlet

__all__ = ["Broadcaster"]

M = TypeVar("M")
T = TypeVar("T")

DEFAULT_CAPACITY: Final = 64 << 20
_CLOSE_TIMEOUT: Final = 5.0
_ANSWER_TIMEOUT: Final = 10.0  # seconds for an answer that needs no waiting

_write = os.write
_NOT_WRITTEN: Final = (errno.EAGAIN, errno.EPIPE, errno.EBADF)
_NO_MORE: Final = object()
_NOWHERE: Final = PipeEnd([-1])
# The heads of short messages without a topic: to look one up costs less than to pack it.
SHORT: Final = min(SHARED_FROM, PIPE_BUF // 2)
_HEADS: Final = [frame_head(size, b"") for size in range(SHORT)]
_GATHER_FROM: Final = 1 << 18  # bytes of a message from which on its parts are better not put together


class Broadcaster(Generic[M]):
    """A handle on a broker. :func:`start_broadcaster` and :func:`connect` make it.

    It can be pickled into any child process of the starter, and used in any number of threads and signal handlers, and after a
    fork; each process and each handle has its own order of messages (FIFO), and all channels see all messages in one order.

    Used with ``with``, it is closed at the end.
    """

    def __init__(self, address: str, broker: str, link: Link | None = None, process: BrokerProcess | None = None) -> None:
        self._address = address
        self._broker = broker
        self._link = link  # without one, it attaches when it is first used: unpickling must not fail, or wait
        self._process = process  # in its starter
        self._outlet: Outlet | None = None
        self._pipe = _NOWHERE  # the outlet's, for short
        self._shared: SharedOutlet | None = None
        self._made: dict[str, tuple[Outlet, SharedOutlet]] = {}
        self._large = False  # whether the last message was, and so perhaps the next
        self._closed = False
        self._channels: WeakSet[Channel[M]] = WeakSet()
        on_fork(self, Broadcaster._in_child)

    @property
    def address(self) -> str:
        """The path of the broker's socket: what :func:`connect` takes."""
        return self._address

    @property
    def closed(self) -> bool:
        """Whether this handle was closed in this process."""
        return self._closed

    # --- publishing

    def publish(self, message: M, *, topic: str = "", exclude: Channel[M] | None = None, timeout: float | None = None) -> None:
        """Send ``message`` to every channel that is subscribed to ``topic``, except ``exclude``.

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
            way = self._way(topic, exclude)
            deadline = Deadline(check_timeout(timeout))
            self._publish(self._pickled(message), way, deadline, [])
            return
        if topic != "":
            self._publish_to(encoded_topic(topic), message)
            return
        try:
            payload = dumps(message, PROTOCOL, buffer_callback=keep_in_band)
        except LargeBuffer:
            self._publish(self._gathered(message), (b"", 0), Deadline(None), [])
            return
        try:
            _write(self._pipe.fd, _HEADS[len(payload)] + payload)
        except IndexError:
            if len(payload) < SHORT:  # not from the table of heads
                raise
            self._large = len(payload) >= _GATHER_FROM
        except OSError as error:
            # Full, closed, broken or not there yet: _send finds out. Anything else has not come from this write.
            if error.errno not in _NOT_WRITTEN:
                raise
        else:
            return
        shared = self._shared
        if shared is not None and len(payload) >= SHORT:
            try:
                if shared.send_quickly(payload):
                    return
            except OSError as error:
                if error.errno not in _NOT_WRITTEN:
                    raise
        self._publish(Payload((payload,), len(payload), False), (b"", 0), Deadline(None), [])

    def _publish_to(self, topic: bytes, message: M) -> None:
        payload = self._pickled(message)
        if payload.size < SHORT:
            frame = self._frame(payload, (topic, 0))
            try:
                _write(self._pipe.fd, frame)
            except OSError as error:
                if error.errno not in _NOT_WRITTEN:
                    raise
            else:
                return
        self._publish(payload, (topic, 0), Deadline(None), [])

    def publish_many(
        self,
        messages: Iterable[M],
        *,
        topic: str = "",
        exclude: Channel[M] | None = None,
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
            way = self._way(topic, exclude)
            self._publish_all(messages, way, Deadline(check_timeout(timeout)), counts, done)
        except BaseException as error:
            with contextlib.suppress(AttributeError):
                error.sent = sum(counts[: len(done)])  # type: ignore[attr-defined]
            raise
        return sum(counts)

    def _publish_all(
        self, messages: Iterable[M], way: tuple[bytes, int], deadline: Deadline, counts: list[int], done: list[int]
    ) -> None:
        waiting: list[bytes] = []
        size = 0
        failure: Exception | None = None
        iterator = iter(messages)
        while failure is None:
            frame = b""
            try:
                message: Any = next(iterator, _NO_MORE)
                if message is _NO_MORE:
                    break
                payload = self._pickled(message)
                frame = self._frame(payload, way) if payload.size < SHARED_FROM else b""
            except Exception as error:
                failure = error  # those before it are sent first
            if waiting and (failure or not frame or size + len(frame) > PIPE_BUF):
                counts.append(len(waiting))
                self._send(b"".join(waiting), deadline, done)
                waiting, size = [], 0
            if failure is None and (not frame or len(frame) > PIPE_BUF):
                counts.append(1)
                self._publish(payload, way, deadline, done)
            elif frame:
                waiting.append(frame)
                size += len(frame)
        if failure is not None:
            raise failure
        if waiting:
            counts.append(len(waiting))
            self._send(b"".join(waiting), deadline, done)

    def _way(self, topic: str, exclude: Channel[M] | None) -> tuple[bytes, int]:
        encoded = encode_topic(topic)
        if exclude is None:
            return encoded, 0
        return encoded, self._own_channel(exclude, "exclude").number

    def _own_channel(self, channel: Channel[M], name: str) -> Channel[M]:
        if not isinstance(channel, Channel):
            raise TypeError(f"{name} must be a Channel, not {type(channel).__name__}")
        if channel.broker != self._broker:
            raise ValueError(f"{name} is a channel of another broker, not of the one at {self._address!r}")
        return channel

    def _pickled(self, message: M) -> Payload:
        if self._large:
            return self._gathered(message)
        try:
            payload = dumps(message, PROTOCOL, buffer_callback=keep_in_band)
        except LargeBuffer:
            return self._gathered(message)
        self._large = len(payload) >= _GATHER_FROM
        return Payload((payload,), len(payload), False)

    def _gathered(self, message: M) -> Payload:
        payload = gather(message)
        self._large = payload.image or payload.size >= _GATHER_FROM
        return payload

    @staticmethod
    def _frame(payload: Payload, way: tuple[bytes, int]) -> bytes:
        return b"".join((frame_head(payload.size, *way, IMAGE if payload.image else 0), *payload.parts))

    def _publish(self, payload: Payload, way: tuple[bytes, int], deadline: Deadline, done: list[int]) -> None:
        """Send one message of any length."""
        if payload.size + 16 + len(way[0]) > MAX_FRAME:
            raise ValueError(f"a message of {payload.size} bytes is too long: with its topic, the limit is {MAX_FRAME - 16}")
        shared = self._shared
        if payload.size >= SHARED_FROM:
            if shared is None:
                self._make_outlet(deadline)
                shared = self._shared
            if shared is not None and self._try(lambda: shared.send(payload, *way, deadline, done)):
                return
        self._send(self._frame(payload, way), deadline, done)

    def _send(self, frame: bytes, deadline: Deadline, done: list[int]) -> None:
        """Send one frame of any length, or several that fit into one write together."""
        outlet = self._outlet or self._make_outlet(deadline)
        self._try(lambda: outlet.send(frame, deadline, done))

    def _try(self, send: Callable[[], T]) -> T:
        outlet = self._outlet
        try:
            return send()
        except TimedOut:
            raise
        except OSError as error:
            if self._closed:
                raise self._closed_error() from None
            raise self._lost() from error
        finally:
            # While something is owed, the short way is closed: it would not say it.
            if not self._closed and outlet is not None:
                self._pipe = _NOWHERE if outlet.owes else outlet.pipe

    def _make_outlet(self, deadline: Deadline) -> Outlet:
        link = self._attached()
        answer = link.request("publisher", deadline=for_answer(deadline))
        if answer.end is None:
            raise self._lost()
        number = answer.said["publisher"]

        def ask(deadline: Deadline) -> DescriptorSocket | None:
            return link.request("beside", publisher=number, deadline=for_answer(deadline)).beside

        outlet = Outlet(answer.end, number)
        # Of several threads that come here first, one makes it for all: this is one step, where `if` and `=` are two.
        outlet, shared = self._made.setdefault("outlet", (outlet, SharedOutlet(outlet, ask)))
        self._outlet, self._shared = outlet, shared
        if self._closed:  # meanwhile, by another thread
            self._outlet = self._shared = None
            outlet.pipe.close()
            raise self._closed_error()
        return outlet

    def _attached(self) -> Link:
        if self._closed:
            raise self._closed_error()
        link = self._link
        if link is None or link.inherited:
            link = Link.shared(self._address, self._broker)
            if link.broker != self._broker:
                raise self._lost()
            self._link = link
        return link

    def _closed_error(self) -> ClosedError:
        return ClosedError("this broadcaster was closed in this process: start or connect() another")

    def _lost(self) -> BrokerLost:
        return BrokerLost(f"the broker at {self._address!r} has ended: start another one, and subscribe to it again")

    # --- subscribing

    def subscribe(
        self, *topics: str, overflow: str = "block", capacity: int | None = None, replay: int = 0, with_topic: bool = False
    ) -> Channel[M]:
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

        :raises ValueError: an argument that is out of range; ``replay`` without a history.
        :raises BrokerLost: the broker has ended. ClosedError: this handle was closed.
        """
        for topic in topics:
            encode_topic(topic)
        if not isinstance(overflow, str):
            raise TypeError(f"overflow must be a str, not {type(overflow).__name__}")
        if overflow not in POLICIES:
            raise ValueError(f"overflow must be one of {', '.join(map(repr, POLICIES))}, not {overflow!r}")
        if not isinstance(with_topic, bool):
            raise TypeError(f"with_topic must be True or False, not {type(with_topic).__name__}")
        room = DEFAULT_CAPACITY if capacity is None else check_count(capacity, "capacity", 1)
        check_count(replay, "replay", 0)
        link = self._attached()
        cookie = int.from_bytes(os.urandom(6))
        try:
            return self._subscribe(
                link, with_topic, topics=topics or ("*",), overflow=overflow, capacity=room, replay=replay, cookie=cookie
            )
        except BaseException:
            link.note("forget", cookie=cookie)  # an interrupt leaves no subscription that nobody holds
            raise

    def _subscribe(self, link: Link, with_topic: bool, **fields: Any) -> Channel[M]:
        outlet = self._outlet
        number = outlet.number if outlet is not None else None
        reply = link.request("subscribe", **fields, publisher=number).said
        channel: Channel[M] = Channel(self._address, self._broker, reply["subscription"], with_topic=with_topic, link=link)
        self._channels.add(channel)
        return channel

    def unsubscribe(self, channel: Channel[M]) -> None:
        """Let nothing more come to ``channel``, whoever holds it. What was routed can still be received, then ``EOFError``.

        Nothing happens if it was unsubscribed or closed before.

        :raises ValueError: it is another broker's. BrokerLost: the broker has ended. ClosedError: this handle was closed.
        """
        number = self._own_channel(channel, "channel").number
        self._attached().request("unsubscribe", subscription=number)

    # --- asking

    def flush(self, timeout: float | None = None, *, delivered: bool = False) -> None:
        """Wait until the broker has routed all that this handle has published in this process.

        Then it is in every backlog that it belongs to, and comes before whatever is published from now on. With
        ``delivered``, wait until all of it has left every backlog, too: it is in the pipe, was dropped by the policy, or its
        subscription is gone; a channel that nobody has opened yet is waited for. Neither means that anybody has received it.

        :raises TimedOut: (a ``TimeoutError``) not within ``timeout`` seconds. BrokerLost, ClosedError: as :meth:`publish`.
        """
        limit = check_timeout(timeout)
        if not isinstance(delivered, bool):
            raise TypeError(f"delivered must be True or False, not {type(delivered).__name__}")
        link = self._attached()
        if self._outlet is not None:
            what = "all to leave its backlog" if delivered else "the broker to route all"
            self._ask_and_wait(link, limit, what, "flush", publisher=self._outlet.number, delivered=delivered)

    def wait_for_subscribers(self, count: int, *, topic: str | None = None, timeout: float | None = None) -> None:
        """Wait until there are ``count`` subscriptions; with ``topic``, that would get what is published to it.

        :raises TimedOut: (a ``TimeoutError``) not within ``timeout`` seconds. BrokerLost, ClosedError: as :meth:`publish`.
        """
        check_count(count, "count", 0)
        if topic is not None:
            encode_topic(topic)
        what = f"{count} subscription(s)" + ("" if topic is None else f" to {topic!r}")
        self._ask_and_wait(self._attached(), check_timeout(timeout), what, "wait", count=count, topic=topic)

    def _ask_and_wait(self, link: Link, timeout: float | None, what: str, do: str, **fields: Any) -> None:
        # Who does not wait for what is asked for does wait for the answer.
        deadline = Deadline(_ANSWER_TIMEOUT if timeout == 0 else timeout)
        try:
            done = bool(link.request(do, now=timeout == 0, deadline=deadline, **fields).said["done"])
        except TimedOut:
            done = False
        if not done:
            raise TimedOut(f"{timeout} s were not enough for {what}: stats() shows how things are; wait longer")

    def stats(self) -> BrokerStats:
        """A snapshot of the broker and its subscriptions. Rates are the difference of two.

        :raises BrokerLost: the broker has ended. ClosedError: this handle was closed.
        """
        reply = self._attached().request("stats").said
        rows = tuple(
            SubscriberStats(**{**row, "topics": tuple(row["topics"]), "stalls": tuple(row["stalls"])})
            for row in reply.pop("subscribers")
        )
        return BrokerStats(subscribers=rows, **reply)

    # --- the end

    def close(self, timeout: float | None = _CLOSE_TIMEOUT) -> None:
        """In the process that has started the broker: end it. Elsewhere: let go of this handle; its channels live on.

        The broker takes in what has been published, and moves all backlogs into the channels' pipes, for at most ``timeout``
        seconds (``None``: as long as that takes). It waits for channels that were handed on and are not open yet, but not for
        those that this process has open. Who has got all has a clean end (``EOFError``); who has not gets ``BrokerLost``, and
        the broker's log names it. A ``publish`` that comes later raises ``BrokerLost``.

        It can be called again.
        """
        self._close(check_timeout(timeout), False)

    def close_at_exit(self) -> None:
        """What :meth:`close` does, at the end of the program: nobody is left in it to miss what it did not receive."""
        self._close(_CLOSE_TIMEOUT, True)

    def _close(self, timeout: float | None, quiet: bool) -> None:
        if self._closed:
            return
        process = self._process
        link = self._link
        if process is not None:
            for channel in list(self._channels):
                with contextlib.suppress(BroadcastError, OSError):
                    channel.open_if_own()
        self._closed = True
        self._link = None
        outlet, self._outlet, self._shared = self._outlet, None, None
        self._made.clear()
        self._pipe = _NOWHERE
        if outlet is not None:
            outlet.pipe.close()
            if process is None and link is not None:
                # A publish that waits in another thread is woken when the broker closes its end.
                with contextlib.suppress(BroadcastError, OSError):
                    link.request("retire", publisher=outlet.number, deadline=Deadline(_CLOSE_TIMEOUT))
        if process is not None:
            told = False
            if link is not None:
                with contextlib.suppress(BroadcastError, OSError):
                    link.request("stop", timeout=timeout, quiet=quiet, deadline=Deadline(_CLOSE_TIMEOUT))
                    told = True
            process.end(timeout, told=told)
            if link is not None:
                link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closed:
            raise self._closed_error()
        return Broadcaster, (self._address, self._broker)

    def __repr__(self) -> str:
        return f"<mpbroadcast.Broadcaster at {self._address!r}{', closed' if self._closed else ''}>"

    def _in_child(self) -> None:
        self._link = None
        self._outlet = self._shared = None
        self._pipe = _NOWHERE
        self._made = {}
        self._process = None
