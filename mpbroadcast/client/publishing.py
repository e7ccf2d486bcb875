"""Publishing through one handle: pickling, and the shortest route to the broker.

- Pickling runs user code, so it comes first, before any lock. A message is expected to be like the one before it: a short one
  is pickled into one bytes object, one with large parts is gathered uncopied.
- The fast path of :meth:`Publishing.publish` writes a short message itself: one system call, no lock, no object. What is not
  plain success (a full pipe, a closed one, a broker that has died, no pipe yet) falls through to the complete path, which finds
  out, blocks, reconnects or raises. A write that failed has published nothing.
- The writer belongs to one broker. When another one takes over (``restart=True``), the next publish makes a new one, and
  ``flush`` reports the gap between them.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar

from mpbroadcast.client.broker_client import LEAST_TIME, BrokerClient, Reply
from mpbroadcast.client.channel import Channel
from mpbroadcast.client.pipe_writer import Route, framed
from mpbroadcast.client.shared_writer import SHARED_FROM, SharedWriter
from mpbroadcast.client.tasks import TURN, drive, give_turn
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import ClosedError, TimedOut
from mpbroadcast.posix import locks
from mpbroadcast.posix.pipes import write
from mpbroadcast.posix.waiting import Steps, Wakers, run
from mpbroadcast.protocol.frames import HEAD, MAX_FRAME, PIPE_BUF, frame_head
from mpbroadcast.protocol.pickling import (
    PROTOCOL,
    LargeBuffer,
    Payload,
    as_payload,
    dumps,
    explain,
    gather,
    gather_from,
    keep_in_band,
)
from mpbroadcast.validation import check_timeout, encode_topic, encoded_topic

M = TypeVar("M")
T = TypeVar("T")

_NOT_WRITTEN: Final = (errno.EAGAIN, errno.EPIPE, errno.EBADF)
SHORT: Final = min(SHARED_FROM, PIPE_BUF // 2)  # bytes of a message below which it is one write into the pipe
# Bytes of a message and its topic in one write: where PIPE_BUF is 512, a topic may have more.
_ROOM: Final = PIPE_BUF - HEAD.size
_HEADS: Final = [frame_head(size, b"") for size in range(SHORT)]  # without a topic: looking one up is faster than packing it


class Publishing(Generic[M]):
    """The part of a broadcaster that publishes."""

    def __init__(self, client: BrokerClient) -> None:
        self._client = client
        self._writer: SharedWriter | None = None  # None until something is published
        self._has_gap = False  # True if something was published to a broker that has died since
        self._is_large = False  # True if the last message was, and so perhaps the next
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._tasks = Wakers()
        self._threads_with_tasks: list[int] = []  # the thread of each task that publishes now
        self._turn = 0
        self._writer_lock = locks.rlock()  # makes each change of the writer one step, also without the GIL

    @property
    def address(self) -> str:
        """The path of the broker's socket, which :func:`connect` takes."""
        return self._client.address

    def publish(
        self, message: M, *, topic: str = "", exclude: Channel[Any] | None = None, timeout: float | None = None
    ) -> None:
        """Send ``message`` to every channel that is subscribed to ``topic``, except ``exclude``.

        ``topic`` is a name, not a pattern: ``"room:*"`` is one topic here.

        When this returns, the message has left this process: it is delivered even if this process is killed the next moment,
        as long as the broker lives and is not being closed. It does not mean that a channel has received it, or that the
        broker has routed it: :meth:`flush` blocks until that. Without subscribers the message is discarded. The message may be
        changed, and its buffers reused. The messages of one handle in one process keep their order.

        Block while a subscriber that would get a message of this handle has a full backlog: at most ``timeout`` seconds;
        ``None``: no limit, 0: do not block. An exception from a signal handler leaves the message published whole or not at
        all.

        :raises TimedOut: (a ``TimeoutError``) the message is not published, and never will be. Also without a limit, if the
            call would block the loop of a task that waits in :meth:`apublish` on this handle.
        :raises BrokerLost: the broker has ended.
        :raises ClosedError: this handle was closed.
        :raises Exception: whatever pickling the message raises; nothing was sent.
        """
        if exclude is not None or timeout is not None:
            route, deadline = self._route(topic, exclude), self._deadline(check_timeout(timeout))
            self._publish(self._pickled(message, topic), route, deadline, [])
            return
        encoded = encoded_topic(topic) if topic != "" else b""
        gathered: Payload | None = None
        try:
            if self._is_large:
                gathered = gather(message)
                data, size = b"", gathered.size
                self._is_large = gathered.image or size >= gather_from(message)
            else:
                data = dumps(message, PROTOCOL, buffer_callback=keep_in_band)
                size = len(data)
        except LargeBuffer:
            self._is_large = True
            self.publish(message, topic=topic)
            return
        except Exception as error:
            explain(error, message, topic)
            raise
        writer = self._writer
        if writer is not None:
            try:
                if gathered is not None:
                    if size >= SHORT and writer.send_quickly(gathered.parts, size, encoded, gathered.image):
                        return
                elif size >= SHORT:
                    self._is_large = size >= gather_from(message)
                    if writer.send_quickly((data,), size, encoded, False):
                        return
                elif not encoded:
                    write(writer.pipe.fd, _HEADS[size] + data)
                    return
                elif size + len(encoded) <= _ROOM:
                    write(writer.pipe.fd, frame_head(size, encoded) + data)
                    return
            except OSError as error:
                # Full, closed or broken: _publish finds out. Any other error is not of this write.
                if error.errno not in _NOT_WRITTEN:
                    raise
        self._publish(gathered or Payload((data,), size, False), (encoded, 0), self._deadline(None), [])

    def publish_many(
        self,
        messages: Iterable[M],
        *,
        topic: str = "",
        exclude: Channel[Any] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send each of ``messages``, in order, several in one write. Return how many were sent.

        As :meth:`publish`, with one ``timeout`` in seconds for all. Messages are joined while they fit into one write: for a
        slow generator :meth:`publish` is better.

        :raises Exception: as :meth:`publish`; the exception's ``sent`` is how many of the first messages were published.
        """
        result = run(self._publishing_many(messages, topic, exclude, timeout, self._deadline))
        if isinstance(result, StopIteration):
            raise result
        return result

    async def apublish(
        self, message: M, *, topic: str = "", exclude: Channel[Any] | None = None, timeout: float | None = None
    ) -> None:
        """Do as :meth:`publish`, in a task of asyncio or trio: the loop runs on while it waits.

        Cancelled, it has published the message whole, or never will.
        """
        route, deadline = self._route(topic, exclude), Deadline(check_timeout(timeout))
        payload = self._pickled(message, topic)
        await self._in_task(self._publishing(payload, route, deadline, []))

    async def apublish_many(
        self,
        messages: Iterable[M],
        *,
        topic: str = "",
        exclude: Channel[Any] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Do as :meth:`publish_many`, in a task. ``sent`` is exact when it is cancelled, too."""
        try:
            result = await self._in_task(self._publishing_many(messages, topic, exclude, timeout, Deadline))
        except BaseException as error:
            if not hasattr(error, "sent"):  # cancelled in the turn of other tasks, before the first message
                error.sent = 0  # type: ignore[attr-defined]
            raise
        if isinstance(result, StopIteration):
            raise result
        return result

    def publish_payload(
        self,
        payload: bytes | bytearray | memoryview,
        *,
        topic: str = "",
        exclude: Channel[Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Send the message that ``payload`` is the pickle of, as :meth:`publish` does, without unpickling it.

        ``payload`` is what a channel with ``raw`` gives, or ``pickle.dumps`` returns: any contiguous bytes-like object. It is
        not checked: one that is no whole pickle reaches each channel, for which unpickling it is an error, as a rule. Block at
        most ``timeout`` seconds; ``None``: no limit, 0: do not block.

        :raises TypeError: ``payload`` is not bytes-like, or not contiguous.
        :raises TimedOut, BrokerLost, ClosedError: as :meth:`publish`.
        """
        route, deadline = self._route(topic, exclude), self._deadline(check_timeout(timeout))
        self._publish(as_payload(payload), route, deadline, [])

    async def apublish_payload(
        self,
        payload: bytes | bytearray | memoryview,
        *,
        topic: str = "",
        exclude: Channel[Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Do as :meth:`publish_payload`, in a task. Cancelled, it has published the message whole, or never will."""
        route, deadline = self._route(topic, exclude), Deadline(check_timeout(timeout))
        await self._in_task(self._publishing(as_payload(payload), route, deadline, []))

    async def _in_task(self, steps: Steps[T]) -> T:
        """Drive a core that publishes. Note meanwhile that a task of this thread may wait for room in the pipe."""
        self._turn = (self._turn + 1) % TURN
        if not self._turn:
            await give_turn()
        me = threading.get_ident()
        self._threads_with_tasks.append(me)
        try:
            return await drive(steps, self._tasks, closed_error)
        finally:
            self._threads_with_tasks.remove(me)

    def _deadline(self, timeout: float | None) -> Deadline:
        """Return the deadline of a call that blocks. Without a limit, it may not block a task that publishes in this thread."""
        if timeout is None and self._threads_with_tasks and threading.get_ident() in self._threads_with_tasks:
            return Deadline(0)
        return Deadline(timeout)

    def _publishing_many(
        self,
        messages: Iterable[M],
        topic: str,
        exclude: Channel[Any] | None,
        timeout: float | None,
        deadline_of: Callable[[float | None], Deadline],
    ) -> Steps[int | StopIteration]:
        """Return how many were sent, or an error of pickling that a generator cannot raise."""
        counts: list[int] = []  # messages in each write that was begun
        done: list[int] = []  # one item for each write that was done
        waiting: list[bytes] = []
        try:
            route, deadline = self._route(topic, exclude), deadline_of(check_timeout(timeout))
            size = 0
            try:
                for message in messages:
                    payload = self._pickled(message, topic)
                    frame = framed(payload, route) if payload.size < SHARED_FROM else b""
                    if not frame or size + len(frame) > PIPE_BUF:
                        yield from self._sending_all(waiting, deadline, counts, done)
                        size = 0
                    if not frame or len(frame) > PIPE_BUF:
                        counts.append(1)
                        yield from self._publishing(payload, route, deadline, done)
                    else:
                        waiting.append(frame)
                        size += len(frame)
            except Exception:
                # The messages before the one that cannot be sent.
                yield from self._sending_all(waiting, deadline, counts, done)
                raise
            yield from self._sending_all(waiting, deadline, counts, done)
        except BaseException as error:
            with contextlib.suppress(AttributeError):
                error.sent = sum(counts[: len(done)])  # type: ignore[attr-defined]
            if isinstance(error, StopIteration):
                return error
            raise
        return sum(counts)

    def _sending_all(self, waiting: list[bytes], deadline: Deadline, counts: list[int], done: list[int]) -> Steps[None]:
        if waiting:
            frames = b"".join(waiting)
            counts.append(len(waiting))
            waiting.clear()
            yield from self._delivering(deadline, SharedWriter.sending, frames, deadline, done)

    def _route(self, topic: str, exclude: Channel[Any] | None) -> Route:
        return encode_topic(topic), 0 if exclude is None else self._own_channel(exclude, "exclude").id

    def _own_channel(self, channel: Channel[Any], name: str) -> Channel[Any]:
        if not isinstance(channel, Channel):
            hint = "; channel.unsubscribe(topic) drops a topic" if isinstance(channel, str) and name == "channel" else ""
            raise TypeError(f"{name} must be a Channel, not {type(channel).__name__}{hint}")
        if channel._ownership.client.broker != self._client.broker:
            raise ValueError(f"{name} is a channel of another broker, not of the one at {self.address!r}")
        return channel

    def _pickled(self, message: M, topic: str) -> Payload:
        try:
            if self._is_large:
                payload = gather(message)
            else:
                data = dumps(message, PROTOCOL, buffer_callback=keep_in_band)
                payload = Payload((data,), len(data), False)
        except LargeBuffer:
            self._is_large = True
            return self._pickled(message, topic)
        except Exception as error:
            explain(error, message, topic)
            raise
        self._is_large = payload.image or payload.size >= gather_from(message)
        return payload

    def _publish(self, payload: Payload, route: Route, deadline: Deadline, done: list[int]) -> None:
        writer = self._writer
        if writer is not None and not self._closed and payload.size < SHORT:
            try:
                writer.send(framed(payload, route), deadline, done)
                return
            except TimedOut:
                raise
            except OSError:
                pass  # closed or broken: what follows finds out
        run(self._publishing(payload, route, deadline, done))

    def _publishing(self, payload: Payload, route: Route, deadline: Deadline, done: list[int]) -> Steps[None]:
        if payload.size + 16 + len(route[0]) > MAX_FRAME:
            raise ValueError(f"a message of {payload.size} bytes is too long: with its topic, the limit is {MAX_FRAME - 16}")
        yield from self._delivering(deadline, SharedWriter.publishing, payload, route, deadline, done)

    def _delivering(self, deadline: Deadline, sending: Callable[..., Steps[None]], *arguments: Any) -> Steps[None]:
        """Go through ``sending`` with the writer, and again with a new one if another broker takes over meanwhile."""
        while True:
            self._check_open()
            writer = self._writer or (yield from self._making_writer(deadline))
            try:
                yield from sending(writer, *arguments)
                return
            except TimedOut:
                raise
            except OSError as error:
                self._check_open()
                if not self._client.restarts:
                    raise self._client.lost_error(error)  # noqa: B904, it has its cause
                self._drop_writer(writer)

    def _making_writer(self, deadline: Deadline) -> Steps[SharedWriter]:
        reply = yield from self._requesting("publisher", deadline.at_least(LEAST_TIME))
        if reply.pipe is None:
            raise self._client.lost_error()
        writer = SharedWriter(self._client, reply.session, reply.pipe, reply.body["publisher"])
        with self._writer_lock:
            if self._writer is None:  # no call in between, so no signal handler either: the first one makes it for all
                self._writer = writer
            writer = self._writer
        if self._closed:  # meanwhile, by another thread
            writer.pipe.close()
        self._check_open()
        return writer

    def _drop_writer(self, writer: SharedWriter) -> None:
        """Drop the writer of a broker that has died: the next publish makes one for the broker that has taken over."""
        self._has_gap = True
        with self._writer_lock:
            if writer is self._writer:
                self._writer = None

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error() from None

    def _requesting(self, do: str, deadline: Deadline | None = None, **fields: Any) -> Steps[Reply]:
        self._check_open()
        if self._writer is not None:
            self._writer.pool.rest()
        return (yield from self._client.requesting(do, deadline=deadline, **fields))


def closed_error() -> ClosedError:
    return ClosedError("this broadcaster was closed in this process: start or connect() another")
