"""Reading a channel's pipe: bytes to runs, runs to messages.

- A :class:`Stream` has the decoded messages, and the bytes behind them. :func:`decode` makes the next stream and leaves this
  one as it is: an interrupted decoding is repeated from the same bytes. The channel assigns the result in one step.
- A run ends in a tail byte that decoding does not need. :func:`follow` reads all bytes but the last, which keeps the descriptor
  readable; it reads that one, too, if the bytes before it complete no message. The channel reads it when it hands out the last
  decoded message.
- Messages are decoded up to a limit at once; what is not decoded stays in the stream as bytes.
- All messages of a stream but the last can be taken without a lock, and by C alone: :attr:`Stream.fast`, which each thread and
  each iteration shares, pops exactly so many. The last one is taken under the channel's lock, as its tail byte is read then.
- A message that comes alone takes a fast path, :func:`take_lone`, which changes the stream with no call in between.
- What has no message follows as a :class:`Failure` at its position, or as an :class:`End` behind all messages.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any, Final

from mpbroadcast.client.pipe_ownership import OPEN, PipeOwnership
from mpbroadcast.client.received import formed
from mpbroadcast.client.shared_reader import SharedReader
from mpbroadcast.errors import BroadcastError, BrokerRestarted, Lagged, Overflowed
from mpbroadcast.posix.pipes import FIONREAD, PipeEnd, ioctl, read
from mpbroadcast.protocol import runs
from mpbroadcast.protocol.frames import topic_of
from mpbroadcast.protocol.pickling import ALL_KINDS, Failure, Loaders, load_each, load_run
from mpbroadcast.protocol.runs import MOST_AT_ONCE, RUN, RunView, read_run, read_singles


class End:
    """The end of a stream, behind its last message, for good."""


NOTHING: Final[Any] = object()  # no message
ENDED: Final = End()  # a clean end
LOST: Final = End()  # the end of the pipe, without a clean end
LOST_FOR_GOOD: Final = End()  # the same, and no other broker takes over
_RESTARTED: Final = (
    "the broker has died, and another one has taken over: an unknown number of messages may be missing here; the next receive "
    "goes on behind them"
)
_OVERFLOWED: Final = (
    'the backlog was full under overflow="disconnect", and so this channel was unsubscribed; subscribe again, receive faster, '
    "or choose a larger capacity or another policy"
)
FLAWS: Final = (End, Failure)  # kinds that stand among messages, and are none
_AT_ONCE: Final = 1 << 19  # bytes in shared memory to decode at once: no more than malloc keeps
_SHARED: Final = (runs.REFERENCES, runs.IN_MEMORY)
_NONE: Final[Iterator[Any]] = iter(())
# With the GIL, nothing comes between the count and the popping in `map(deque.popleft, repeat(...))`.
_IS_ATOMIC: Final = getattr(sys, "_is_gil_enabled", lambda: True)()


@dataclass(slots=True, eq=False)
class Stream:
    """Decoded messages, and the chunks of bytes behind them, of which the first ``skip`` bytes are decoded.

    With ``has_tail``, a byte that was seen is still in the pipe, and serves as the last tail byte.
    ``need`` is how many bytes the next run has at least. ``plain`` is True if ``ready`` has messages only, no failure and no
    end. ``has_more`` is False once a call has reported a clean end: there, iterations end. ``skipped`` messages were dropped
    by ``latest`` between these. ``read`` counts all messages in shared memory so far, and ``decoded`` all messages.
    """

    ready: deque[Any] = field(default_factory=deque)
    chunks: list[bytes] = field(default_factory=list)
    skip: int = 0
    need: int = RUN.size
    plain: bool = True
    skipped: int = 0
    read: int = 0
    decoded: int = 0
    has_tail: bool = False
    has_more: bool = True
    fast: Iterator[Any] = _NONE
    _left: Iterator[Any] = _NONE

    def open_fast(self) -> None:
        """Let all messages but the last be taken from ``fast``. The caller holds the channel's lock, as for the next one."""
        if _IS_ATOMIC:
            self._left = repeat(self.ready, len(self.ready) - 1)
            self.fast = map(deque.popleft, self._left)

    def close_fast(self) -> None:
        """Exhaust ``fast``: from then on only the holder of the lock takes messages."""
        deque(self._left, 0)

    def discard(self) -> None:
        """Release all messages, which iterations refer to, too. The caller holds the lock."""
        self.close_fast()
        self.ready.clear()

    @property
    def handed_out(self) -> int:
        """How many messages were taken of all that were decoded. Errors of the channel's own do not count."""
        return self.decoded - (len(self.ready) if self.plain else sum(map(_is_message, self.ready)))

    @property
    def is_used_up(self) -> bool:
        """True if nothing is left of what was read."""
        return not self.ready and sum(map(len, self.chunks)) == self.skip

    @property
    def is_decodable(self) -> bool:
        """True if there are as many bytes as the next run needs, one in the pipe counted in."""
        return sum(map(len, self.chunks)) - self.skip + self.has_tail >= self.need

    def split(self, limit: int | None) -> tuple[list[Any], Stream]:
        """Return the messages before the first failure or end, at most ``limit``, and the same stream without them."""
        count = len(self.ready) if limit is None else min(limit, len(self.ready))
        if not self.plain:
            count = next((index for index, item in enumerate(islice(self.ready, count)) if type(item) in FLAWS), count)
        taken = [*self.ready]
        rest = deque(taken[count:])
        del taken[count:]
        return taken, Stream(rest, self.chunks, self.skip, self.need, self.plain, 0, self.read, self.decoded, self.has_tail)


def decode(stream: Stream, form: int, shared: SharedReader | None = None, loaders: Loaders = ALL_KINDS) -> Stream | None:
    """Return the stream that follows ``stream``, which has no decoded messages; ``None`` while no message is whole."""
    if not stream.is_decodable:
        return None
    data = b"".join(stream.chunks)  # which does not copy a single one
    ready: list[Any] = []
    plain = True
    skipped = 0
    shared_count, decoded = stream.read, stream.decoded
    position, end = stream.skip, len(data) + stream.has_tail
    room = _AT_ONCE
    while (run := read_run(data, position)) is not None and position + run.size <= end:
        if room <= 0 or len(ready) >= MOST_AT_ONCE:
            break
        kind = run.kind
        if kind == runs.MESSAGES and run.messages == 1:  # where topics change with each message, so do runs
            payloads, starts, position = read_singles(data, position, end, MOST_AT_ONCE - len(ready))
            if payloads:
                messages, whole = load_each(payloads, loaders.pickle)
                decoded += len(messages)
                plain = plain and whole
                if form:
                    messages = formed(messages, form, *_topics_and_ids(data, starts))
                ready.extend(messages)
                continue
        if kind == runs.MESSAGES or kind in _SHARED:
            if kind == runs.MESSAGES:
                messages, whole = load_run(data, run, loaders)
            elif shared is None:
                raise RuntimeError("a message in shared memory, which this channel cannot map")
            else:
                messages, whole, size = shared.load_run(data, run, loaders)
                shared_count += len(messages)
                room -= size
            decoded += run.messages
            plain = plain and whole
            if form:
                topic = topic_of(data[run.first : run.first + run.skip])
                messages = formed(messages, form, repeat(topic), range(run.position, run.position + run.messages))
            ready.extend(messages)
        elif kind == runs.SKIPPED:
            skipped += run.position
        elif kind in (runs.RING_OFFERED, runs.RING_GONE):
            if shared is not None:
                shared.note(kind, run.position)
        else:
            ready.append(_note(run))
            plain = False
            if kind == runs.END and shared is not None:
                shared.acknowledge_all()
        position += run.size
    need = RUN.size if run is None else run.size
    if not ready:
        stream.need = need
        return None
    unused = 0 if position + need <= end else min(position, len(data))  # no copy of what is decoded next
    rest = data[unused:]
    chunks, counts = [rest] if rest else [], (skipped, shared_count, decoded)
    return Stream(deque(ready), chunks, position - unused, need, plain, *counts, stream.has_tail)


def _topics_and_ids(data: bytes, starts: list[int]) -> tuple[list[str], list[int]]:
    """Return the topics and the ids of the messages in the runs of one message that start there."""
    topics: list[str] = []
    ids: list[int] = []
    for start in starts:
        *_, skip, position = RUN.unpack_from(data, start)
        first = start + RUN.size
        topics.append(topic_of(data[first : first + skip]))
        ids.append(position)
    return topics, ids


def take_lone(stream: Stream, ownership: PipeOwnership, form: int, loaders: Loaders) -> Any:
    """Read a message that has come alone, and return it without its tail byte. Return ``NOTHING`` if :func:`follow` must do it.

    Where messages come one by one, all code is cold, and what counts is how much of it runs. So this does all for a pipe with
    one run of one message, where nothing was read before. Whatever else it finds stays in ``stream``, as bytes that are not
    decoded; but one that cannot be unpickled is in ``stream.ready``, as a failure. The caller holds the channel's lock, and no
    decoded message is left.
    """
    chunks, pipe = stream.chunks, ownership.pipe
    if len(chunks) > 1 or sum(map(len, chunks)) != stream.skip or pipe is None or ownership.state is not OPEN:
        return NOTHING
    fd = pipe.fd
    if fd < 0:
        return NOTHING
    count = array("i", (0,))
    ioctl(fd, FIONREAD, count)
    unread = count[0]
    if unread <= RUN.size:
        return NOTHING
    stream.has_tail = True
    read_into(stream, fd, unread - 1)
    data = chunks[-1] if chunks else b""
    if len(data) != unread - 1:
        return NOTHING
    size, messages, kind, image, skip, position = RUN.unpack_from(data)
    if size != unread or messages != 1 or kind != runs.MESSAGES or image:
        return NOTHING
    payload = memoryview(data)[RUN.size + skip :]
    plain, failed = True, None
    try:
        message = loaders.pickle(payload)
    except BaseException as error:
        message, failed = NOTHING, error
    if failed is not None:
        try:
            [message], plain = load_each([payload], loaders.pickle, [], failed)  # which raises an interrupt
        finally:
            failed = None  # it has this frame in its traceback
    if form and plain:
        (message,) = formed((message,), form, (topic_of(data[RUN.size : RUN.size + skip]),), (position,))
    # No call from here on, so neither an interrupt nor another thread comes in between.
    if stream.ready:  # another thread was interrupted, and has put its message back
        return NOTHING
    stream.chunks = []
    stream.skip = 1
    stream.need = RUN.size
    stream.plain = plain
    stream.decoded += 1
    if plain:
        return message
    stream.ready.append(message)
    return NOTHING


def follow(
    stream: Stream, pipe: PipeEnd, form: int, shared: SharedReader | None, loaders: Loaders, is_readable: bool
) -> Stream | None:
    """Read, and return the stream that follows ``stream``, or ``None``, as :func:`decode` does.

    Without ``is_readable``, an empty pipe is not read: whether it has ended is seen when it was waited for.
    """
    if stream.chunks and (after := decode(stream, form, shared, loaders)) is not None:
        return after
    count = array("i", (0,))
    try:
        ioctl(pipe.fd, FIONREAD, count)
    except ValueError:  # a signal handler has closed it just now
        return None
    stream.has_tail = count[0] > 0
    if not (stream.has_tail or is_readable):
        return None
    if count[0] != 1:
        read_into(stream, pipe.fd, max(1, count[0] - 1))
    after = decode(stream, form, shared, loaders)
    if after is None and stream.has_tail:
        stream.has_tail = False
        read_into(stream, pipe.fd, 1)
    if after is None and stream.chunks and not stream.chunks[-1]:
        # The pipe has ended. A last message may lack its tail byte.
        stream.has_tail = True
        after = decode(stream, form, shared, loaders) or Stream(decoded=stream.decoded)
        after.has_tail = False
        after.ready.append(LOST)
        after.plain = False
    return after


def _is_message(item: object) -> bool:
    """Return whether a message was decoded to this, be it one that could not be unpickled."""
    return not isinstance(item.error, BroadcastError) if type(item) is Failure else type(item) is not End


def _note(run: RunView) -> End | Failure:
    """Return what a note stands for."""
    if run.kind == runs.GAP:  # the flag of an image is, in a note, that of a count which is not exact
        return Failure(Lagged(None if run.image else run.position), run.position)
    if run.kind == runs.RESTARTED:
        return Failure(BrokerRestarted(_RESTARTED))
    return Failure(Overflowed(_OVERFLOWED), 1) if run.kind == runs.OVERFLOWED else ENDED


def read_into(stream: Stream, fd: int, size: int) -> None:
    """Read up to ``size`` bytes; none, if a signal handler has read them or closed the pipe meanwhile."""
    try:
        if fd >= 0:
            stream.chunks.extend(map(read, (fd,), (size,)))  # one step: an interrupt comes before or after
    except BlockingIOError:
        pass
