"""Sessions of bridges: they take what is to go out, and hand on what other buses have sent.

- A session has a pipe from the broker, as a channel has, whose messages and gaps give the positions; a pipe back, in which it
  acknowledges them; and a publisher of its own. In that pipe, what stands between the messages gives their origin and position,
  the position in the log behind them, or a gap. So the broker changes what it keeps in the step in which it routes.
- The broker keeps all that must not be lost. A session that is killed leaves nothing behind: the next one is given everything
  that is not acknowledged, and takes up the log where the broker is. What is handed on twice is routed once.
"""

from __future__ import annotations

import contextlib
import select
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeVar

from mpbroadcast.client.broadcaster import Broadcaster
from mpbroadcast.client.broker_client import LEAST_TIME, BrokerClient, Session
from mpbroadcast.client.pipe_reader import ENDED, FLAWS, End, Stream, follow, read_into
from mpbroadcast.client.pipe_writer import framed
from mpbroadcast.client.received import WITH_TOPIC
from mpbroadcast.client.shared_reader import SharedReader
from mpbroadcast.client.shared_writer import SHARED_FROM, SharedWriter
from mpbroadcast.client.subscribing import DEFAULT_CAPACITY
from mpbroadcast.client.tasks import drive
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerLost, ClosedError, Lagged
from mpbroadcast.posix.descriptors import on_fork
from mpbroadcast.posix.pipes import PipeEnd, write
from mpbroadcast.posix.poller import is_ready
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.posix.waiting import Steps, Wait, Wakers, run
from mpbroadcast.protocol.frames import MOST_CURSOR, PIPE_BUF, Arrival, Cursor, bridge_frame
from mpbroadcast.protocol.pickling import PAYLOADS, Failure, as_payload
from mpbroadcast.protocol.reports import report
from mpbroadcast.validation import check_count, check_outbox, check_stream, check_timeout, check_topics, encoded_topic

T = TypeVar("T")
BytesLike = bytes | bytearray | memoryview

_NEVER: Final = Deadline(None)
_AGAIN: Final = 0.02  # seconds until an acknowledgement is written again that had no room
_REPORT_EVERY: Final = 0.05  # seconds from one report to the next


class BridgeState(NamedTuple):
    """A stream as the broker has it, when a session is at work.

    ``origin`` is the bus's, 8 bytes, and ``incarnation`` which of its brokers it is. All positions up to ``acknowledged`` are
    in the log, or were dropped. ``cursor`` is the position in the log behind all that was routed; ``None``: there is none yet.
    """

    origin: bytes
    incarnation: int
    acknowledged: int
    cursor: str | None


class Outgoing(NamedTuple):
    """Messages for the log, each a topic and a payload, at the positions from ``first`` on.

    The next ones begin at ``end``, or later: the positions in between were dropped.
    """

    first: int
    messages: list[tuple[str, bytes]]
    end: int


class BridgeSession:
    """A session of a bridge with its broker, for one asyncio loop. :func:`bridge_session` makes it.

    Every coroutine may be cancelled at any ``await``: nothing is lost. The methods raise ``BrokerLost`` when the broker has
    gone, or has ended the session, and ``ClosedError`` once it was ended here, or in a process that was forked meanwhile.
    """

    def __init__(self, client: BrokerClient, options: dict[str, Any]) -> None:
        self._client = client
        self._options = options
        self._session: Session | None = None
        self._reader = 0  # the broker's id of the pipe; 0 until this is the session at work
        self._state: BridgeState | None = None
        self._pipe: PipeEnd | None = None
        self._shared: SharedReader | None = None
        self._acknowledgements: PipeEnd | None = None
        self._writer: SharedWriter | None = None
        self._stream = Stream()
        self._ready: deque[Any] = deque()  # what was read and not taken
        self._next = 1  # the position of the first of it
        self._acknowledged = 0
        self._is_writing = False
        self._report: dict[str, Any] | None = None  # that is still to be sent
        self._reporting: Any = None  # the task that sends it
        self._calls = Wakers()  # which end all calls
        self._changes = Wakers()  # of what other calls wait for
        self._has_ended = False  # by a clean end of the broker
        on_fork(self, BridgeSession._in_child)

    @property
    def lost(self) -> bool:
        """Whether the broker has gone, or has ended this session, without a clean end of its own."""
        return not (self._has_ended or (self._ready and self._ready[-1] is ENDED))

    async def turn(self) -> BridgeState:
        """Return when this is the session at work: at once, if no other one of this stream is, in any process.

        :raises ValueError: the broker has this stream with other topics, ``overflow`` or ``capacity`` by now.
        :raises BrokerLost: the broker has ended.
        """
        return await self._call(self._taking_turn())

    def _taking_turn(self) -> Steps[BridgeState]:
        if self._state is None:
            reply = yield from self._client.requesting("bridge", turn=True, shared=available(), **self._options)
            body = reply.body
            if "ended" in body:
                self._has_ended = True
                raise self._client.lost_error()
            self._session, self._reader = reply.session, body["reader"]
            self._pipe, self._acknowledgements = reply.pipe, reply.reports
            self._shared = None if reply.fd_socket is None else SharedReader(reply.fd_socket)
            origin = bytes.fromhex(body["origin"])
            self._state = BridgeState(origin, body["incarnation"], body["acknowledged"], body["cursor"])
            self._acknowledged = self._state.acknowledged
            self._next = self._acknowledged + 1
            self._changes.wake()
        if self._writer is None:
            session = self._session
            reply = yield from self._client.requesting("publisher", session=session, reader=self._reader)
            if reply.pipe is None:
                raise self._client.lost_error()
            self._writer = SharedWriter(self._client, reply.session, reply.pipe, reply.body["publisher"])
        return self._state

    # --- out

    async def take(self, most: int = 1 << 19) -> Outgoing:
        """Return what comes next, at least one message, or positions that were dropped. Wait until there is something.

        The payloads have ``most`` bytes together, unless there is one only. The broker keeps what was taken until it is
        acknowledged, and counts it against the capacity of the outbox; of more than some MiB, the rest is not given out before.

        :raises EOFError: the broker ends, and all has been taken.
        :raises OSError: a large message cannot be mapped: no descriptor, or no memory, is left.
        """
        return await self._call(self._taking(most))

    def _taking(self, most: int) -> Steps[Outgoing]:
        while True:
            outgoing = self._next_batch(most)
            if outgoing is not None:
                return outgoing  # no wait follows in which the task could be cancelled
            pipe = self._open_pipe()
            yield Wait(_NEVER, select.POLLIN, pipe)
            self._read(is_readable=True)

    def _next_batch(self, most: int) -> Outgoing | None:
        ready, messages = self._ready, list[tuple[str, bytes]]()
        first, missed, size = self._next, 0, 0
        while ready or self._read():
            item = ready[0]
            if type(item) in FLAWS:
                if not (type(item) is Failure and isinstance(item.error, Lagged)):
                    break
                missed += item.missed
                del ready[0]
                if not messages:
                    continue
                break
            if messages and size + len(item[1]) > most:
                break
            if not messages:
                first, missed = first + missed, 0
            messages.append(item)
            size += len(item[1])
            del ready[0]
        if messages or missed:
            self._next = first + len(messages) + missed
            return Outgoing(first, messages, self._next)
        if ready:
            self._raise(ready[0])
        return None

    def _raise(self, item: Any) -> None:
        if type(item) is Failure:
            raise item.error
        raise EOFError("the broker has ended, and nothing more is to go out") if item is ENDED else self._client.lost_error()

    def _read(self, *, is_readable: bool = False) -> bool:
        """Decode what is in the pipe, as much as is worth it. Return whether that was something."""
        pipe = self._pipe
        if pipe is None or (self._ready and type(self._ready[-1]) is End):
            return False
        after = follow(self._stream, pipe, WITH_TOPIC, self._shared, PAYLOADS, is_readable)
        if after is not None:
            self._stream = after
            self._ready.extend(after.ready)
            after.ready.clear()
        stream = self._stream
        if stream.has_tail and not (stream.chunks and stream.is_decodable):
            stream.has_tail = False
            read_into(stream, pipe.fd, 1)
        if self._shared is not None:
            self._shared.commit(stream.read, after is not None)
        return after is not None

    def acknowledge(self, position: int) -> None:
        """Note that all up to this position is in the log: the broker releases it. Does not block.

        To be called in the loop. What could not be written at once is written later.
        """
        self._acknowledged = max(self._acknowledged, check_count(position, "position", 0))
        self._write_acknowledged()

    def _write_acknowledged(self) -> None:
        pipe = self._acknowledgements
        try:
            if pipe is not None and pipe.fd >= 0:
                write(pipe.fd, report(self._acknowledged))
        except BlockingIOError:  # the broker does not read: the next one has the same, and more
            import asyncio

            asyncio.get_running_loop().call_later(_AGAIN, self._write_acknowledged)
        except OSError:
            pass  # the session is over, as other calls show

    async def target(self) -> int:
        """Return the last position so far: of all that was routed before."""
        reply = await self._call(self._client.requesting("bridge flushed", stream=self._options["stream"]))
        positions = reply.body["positions"]
        if positions is None:
            raise ClosedError("this bridge was forgotten")
        return int(positions[0])

    # --- in

    async def route(self, origin: bytes, incarnation: int, first: int, messages: Sequence[tuple[str, BytesLike]]) -> None:
        """Hand on messages of another bus, whose positions are ``first`` and those behind it; none: only where it is by now.

        The broker routes those that it has not had, in its own time. A gap before them becomes one ``Lagged`` for the channels
        that may get messages of this stream. Wait while the broker does not read: while a channel that gets them is full.

        :raises ValueError: the position, the origin or a topic is not valid.
        """
        if len(origin) != 8:
            raise ValueError(f"an origin has 8 bytes, not {len(origin)}")
        check_count(first, "first", 1)
        frame = bridge_frame(Arrival(bytes(origin), check_count(incarnation, "incarnation", 0), first, len(messages)))
        await self._call(self._writing_alone(self._routing(frame, messages)))

    def _routing(self, frame: bytes, messages: Sequence[tuple[str, BytesLike]]) -> Steps[None]:
        """Write the messages behind a frame, several in one write. A call that was cancelled is followed by another frame."""
        writer, done = self._open_writer(), list[int]()
        waiting = bytearray(frame)
        for topic, data in messages:
            payload, route = as_payload(data), (encoded_topic(topic), 0)
            small = framed(payload, route) if payload.size < SHARED_FROM else b""
            if waiting and (not small or len(waiting) + len(small) > PIPE_BUF):
                yield from writer.writing(bytes(waiting), _NEVER, done)
                waiting.clear()
            if small and len(small) <= PIPE_BUF:
                waiting += small
            else:
                yield from writer.publishing(payload, route, _NEVER, done)
        if waiting:
            yield from writer.writing(bytes(waiting), _NEVER, done)

    async def set_cursor(self, position: str) -> None:
        """Let the broker keep this position in the log, once all that was handed on before is routed.

        :raises ValueError: it is empty, or longer than 256 bytes.
        """
        if not position or len(position.encode()) > MOST_CURSOR:
            raise ValueError(f"a position in the log must have 1 to {MOST_CURSOR} bytes, not {len(position.encode())}")
        await self._call(self._writing_alone(self._writing(Cursor(position))))

    async def note_gap(self) -> None:
        """Show the channels that may get messages of this stream one ``Lagged``: the log has lost what was behind the cursor.

        What each known origin sends next is taken without another one.
        """
        await self._call(self._writing_alone(self._writing(Cursor(""))))

    def _writing(self, frame: Cursor) -> Steps[None]:
        yield from self._open_writer().writing(bridge_frame(frame), _NEVER, [])

    def _writing_alone(self, steps: Steps[None]) -> Steps[None]:
        """Write what belongs together with nothing of another task in between."""
        while self._is_writing:
            yield Wait(_NEVER, wakers=(self._changes,))
        self._is_writing = True
        try:
            yield from steps
        except BroadcastError:
            raise
        except OSError as error:
            self._check_open()
            raise self._client.lost_error(error)  # noqa: B904, it has its cause
        finally:
            self._is_writing = False
            self._changes.wake()

    # --- about the session

    def report(self, *, url: str, state: str, error: str | None = None, refused: int = 0, lag: int | None = None) -> None:
        """Let ``stats().bridges`` show this: a URL without its password, "up" or "connecting", the last error, the number of
        entries that were refused by this session, and how many are not read yet. Does not block. To be called in the loop.
        """
        import asyncio

        self._report = {"url": url, "state": state, "error": error, "refused": refused, "lag": lag}
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.ensure_future(self._sending_reports())

    async def _sending_reports(self) -> None:
        import asyncio

        while self._report is not None and not self._calls.is_closed:
            fields, self._report = self._report, None
            about = {"session": self._session, "reader": self._reader, "stream": self._options["stream"]}
            with contextlib.suppress(BroadcastError, OSError):
                await self._call(self._client.requesting("bridge report", **about, **fields))
            await asyncio.sleep(_REPORT_EVERY)

    async def closed(self) -> None:
        """Return when the broker has gone, has ended, or has ended this session: :attr:`lost` is False for a clean end."""
        with contextlib.suppress(BrokerLost):
            await self._call(self._ending())

    def _ending(self) -> Steps[None]:
        session = self._session or (yield from self._client.attaching())  # else perhaps that of the next broker
        lifeline = session.lifeline
        while not lifeline.is_ended and ((back := self._acknowledgements) is None or not is_ready(back.fd, 0, 0)):
            sources = (lifeline,) if back is None else (lifeline, back)  # readable when their other ends are closed
            yield Wait(_NEVER, select.POLLIN, *sources, wakers=(self._changes,))
        while self._read(is_readable=True):
            pass

    async def end(self, *, forget: bool) -> None:
        """End the session, behind what it has handed on: another one that stands by is at work then.

        With ``forget``, and if none stands by, the broker drops all that it keeps of the stream: what waits, what came and how
        far, and its row in ``stats()``. Else all of this stays, "down", for the next session.
        """
        fields = {"reader": self._reader, "stream": self._options["stream"], "forget": forget}
        try:
            with contextlib.suppress(BroadcastError, OSError):
                await drive(self._client.requesting("bridge end", session=None if forget else self._session, **fields))
        finally:
            self._close()

    def _close(self) -> None:
        self._calls.close()
        for end in (self._pipe, self._shared, self._acknowledgements, None if self._writer is None else self._writer.pipe):
            if end is not None:
                end.close()
        self._pipe = self._shared = self._acknowledgements = self._writer = None

    def _in_child(self) -> None:
        self._calls = Wakers()
        self._close()

    async def _call(self, steps: Steps[T]) -> T:
        self._check_open()
        return await drive(steps, self._calls, _closed_error)

    def _check_open(self) -> None:
        if self._calls.is_closed:
            raise _closed_error()

    def _open_pipe(self) -> PipeEnd:
        if self._pipe is None:
            raise _not_at_work()
        return self._pipe

    def _open_writer(self) -> SharedWriter:
        if self._writer is None:
            raise _not_at_work()
        return self._writer


def _closed_error() -> ClosedError:
    return ClosedError("this session of a bridge was ended in this process: make another one")


def _not_at_work() -> ClosedError:
    return ClosedError("this session of a bridge is not at work: await turn() first")


def bridge_session(
    bus: Broadcaster[Any],
    stream: str,
    *,
    topics: Sequence[str] = (),
    overflow: str = "drop_oldest",
    capacity: int = DEFAULT_CAPACITY,
) -> BridgeSession:
    """Return a session for this stream; make its outbox, if the broker has none. Block until the broker replies.

    From now on, what is published to ``topics`` (as :meth:`Broadcaster.subscribe` has them; none: all) waits in the outbox: at
    most ``capacity`` bytes, with what a session has taken and not acknowledged. When it is full, ``"drop_oldest"`` and
    ``"drop_newest"`` drop messages; ``"block"`` blocks the publishers of these topics. Of several streams with a topic, the
    first gets its messages. One session at a time is at work: :meth:`BridgeSession.turn`.

    :raises TypeError, ValueError: an argument is not valid.
    :raises ValueError: the broker has this stream with other topics, ``overflow`` or ``capacity``.
    :raises BrokerLost, ClosedError: as :meth:`Broadcaster.publish`.
    """
    if isinstance(topics, str):
        raise TypeError("topics must be a sequence of topics and patterns, not one str")
    check_topics(tuple(topics))
    check_stream(stream)
    check_outbox(overflow)
    check_count(capacity, "capacity", 1)
    options: dict[str, Any] = {"stream": stream, "topics": list(topics), "overflow": overflow, "capacity": capacity}
    run(bus._requesting("bridge", **options))
    return BridgeSession(bus._client, options)


def bridge_flushed(bus: Broadcaster[Any], stream: str, *, timeout: float | None = None) -> tuple[int, int] | None:
    """Return the last position of a stream, behind all that this handle has published, and the last one up to which all is in
    the log, or was dropped; ``None`` if the broker does not have this stream.

    Block until it has routed that, at most ``timeout`` seconds; less than a second if that is 0.

    :raises TimedOut: (a ``TimeoutError``) it took longer, as a full backlog or outbox blocks this handle.
    :raises BrokerLost, ClosedError: as :meth:`Broadcaster.publish`.
    """
    deadline = None if (limit := check_timeout(timeout)) is None else Deadline(max(limit, LEAST_TIME))
    reply = run(bus._requesting("bridge flushed", deadline, stream=check_stream(stream), publisher=bus._publisher))
    positions = reply.body["positions"]
    return None if positions is None else (int(positions[0]), int(positions[1]))


def forget_bridge(bus: Broadcaster[Any], stream: str) -> bool:
    """Drop all that the broker keeps of a stream, its row in ``stats()`` included. Block until the broker replies.

    Return False if there was nothing.

    :raises ValueError: a session is at work, or stands by.
    :raises BrokerLost, ClosedError: as :meth:`Broadcaster.publish`.
    """
    return bool(run(bus._requesting("bridge forget", stream=check_stream(stream))).body["done"])


def key_of(bus: Broadcaster[Any]) -> bytes:
    """Return the key by which this process connects to the broker: a bridge's process, which has none, connects by it."""
    bus._check_open()
    return bus._client.key()
