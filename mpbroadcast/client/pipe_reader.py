"""What a channel has read from its pipe, as bytes and as messages. A stream is replaced as a whole, in one assignment."""

from __future__ import annotations

import contextlib
import fcntl
import os
import termios
from array import array
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from mpbroadcast.client.shared_reader import SharedReader
from mpbroadcast.errors import BrokerRestarted, Lagged, Overflowed
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.protocol import runs
from mpbroadcast.protocol.frames import MOST_TOGETHER, topic_of
from mpbroadcast.protocol.pickling import Failure, load_run
from mpbroadcast.protocol.runs import RUN, RunView, read_run


class End:
    """Stands behind the last message, and stays there."""


END_OF_MESSAGES: Final = End()  # a clean end
LOST: Final = End()  # the pipe has ended without one
LOST_FOR_GOOD: Final = End()  # and no other broker goes on with it
_RESTARTED: Final = (
    "the broker has died, and another one has taken over: messages may be missing here, nobody knows how many; the next "
    "receive goes on"
)
_OVERFLOWED: Final = (
    'the backlog was full under overflow="disconnect", and so this channel was unsubscribed; subscribe again, receive faster, '
    "or choose a larger capacity or another policy"
)
_FLAWS: Final = (End, Failure)
_AT_ONCE: Final = 1 << 19  # bytes in shared memory: nor more than malloc keeps
_SHARED: Final = (runs.REFERENCES, runs.IN_MEMORY)


@dataclass(slots=True, eq=False)
class Stream:
    """Decoded messages, and the chunks of bytes behind them, of which ``skip`` bytes are done with.

    ``need`` is how many bytes there must be before it is worth looking at them. ``plain`` says that all of ``ready`` are
    messages, none a flaw. ``skipped`` messages were left out between these. ``read`` counts all that have come in shared
    memory so far.
    """

    ready: deque[Any] = field(default_factory=deque)
    chunks: list[bytes] = field(default_factory=list)
    skip: int = 0
    need: int = RUN.size
    plain: bool = True
    skipped: int = 0
    read: int = 0

    def decodable(self, held: bool) -> bool:
        """Whether there are as many bytes as the next run needs, with one more in the pipe if one is ``held`` there."""
        return sum(map(len, self.chunks)) - self.skip + held >= self.need

    def sound(self, limit: int | None) -> int:
        """How many messages come before the first flaw, at most ``limit``."""
        count = len(self.ready) if limit is None else min(limit, len(self.ready))
        if self.plain:
            return count
        return next((index for index, item in enumerate(islice(self.ready, count)) if type(item) in _FLAWS), count)

    def without(self, count: int) -> Stream:
        """The same, less its first messages."""
        ready = deque(islice(self.ready, count, None))
        return Stream(ready, self.chunks, self.skip, self.need, self.plain, 0, self.read)


def decode(stream: Stream, held: bool, with_topic: bool, shared: SharedReader | None = None) -> Stream | None:
    """What comes after ``stream``, which has no decoded messages, or ``None`` when no message is whole yet.

    ``held`` says that one more byte is in the pipe at least, which will do for the last tail byte.
    """
    if not stream.decodable(held):
        return None
    data = b"".join(stream.chunks)  # which does not copy a single one
    ready: list[Any] = []
    plain = True
    skipped = 0
    read = stream.read
    position, end = stream.skip, len(data) + held
    room = _AT_ONCE
    while (run := read_run(data, position)) is not None and position + run.size <= end:
        if room <= 0 or len(ready) >= MOST_TOGETHER:
            break
        kind = run.kind
        if kind == runs.MESSAGES or kind in _SHARED:
            if kind == runs.MESSAGES:
                messages, whole = load_run(data, run)
            elif shared is None:
                raise RuntimeError("a message in shared memory, without a way to it")
            else:
                messages, whole, size = shared.load_run(data, run)
                read += len(messages)
                room -= size
            plain = plain and whole
            if with_topic:
                topic = topic_of(data[run.first : run.first + run.skip])
                messages = [message if type(message) is Failure else (topic, message) for message in messages]
            ready.extend(messages)
        elif kind == runs.SKIPPED:
            skipped += run.messages
        elif kind in (runs.RING_OFFERED, runs.RING_GONE):
            if shared is not None:
                shared.note(kind, run.messages)
        else:
            ready.append(_said(run))
            plain = False
            if kind == runs.END and shared is not None:
                shared.ended()
        position += run.size
    need = RUN.size if run is None else run.size
    if not ready:
        stream.need = need
        return None
    unused = 0 if position + need <= end else min(position, len(data))  # what is decoded next is not copied for that
    rest = data[unused:]
    return Stream(deque(ready), [rest] if rest else [], position - unused, need, plain, skipped, read)


def follow(
    stream: Stream, pipe: PipeEnd, held: bool, with_topic: bool, shared: SharedReader | None
) -> tuple[Stream | None, bool]:
    """What comes after ``stream``, which has no decoded messages, in it or in ``pipe``; and whether a byte was left there.

    ``None`` when no message is whole yet.
    """
    if (after := decode(stream, held, with_topic, shared)) is not None:
        return after, held
    count = array("i", (0,))
    try:
        fcntl.ioctl(pipe.fd, termios.FIONREAD, count)
    except ValueError:  # a signal handler has closed it just now
        return None, held
    there = count[0]
    held = there > 0
    if there != 1:
        take_in(stream, pipe.fd, max(1, there - 1))
    after = decode(stream, held, with_topic, shared)
    if after is None and held:
        held = False
        take_in(stream, pipe.fd, 1)
    if after is None and stream.chunks and not stream.chunks[-1]:
        # The pipe has ended. A last message may lack its tail byte.
        after = decode(stream, True, with_topic, shared) or Stream()
        after.ready.append(LOST)
        after.plain = False
    return after, held


def _said(run: RunView) -> End | Failure:
    if run.kind == runs.GAP:
        return Failure(Lagged(run.messages))
    if run.kind == runs.RESTARTED:
        return Failure(BrokerRestarted(_RESTARTED))
    if run.kind == runs.OVERFLOWED:
        return Failure(Overflowed(_OVERFLOWED))
    return END_OF_MESSAGES


def take_in(stream: Stream, fd: int, size: int) -> None:
    """Keep up to ``size`` bytes that are there; none, if a signal handler has taken them or closed the pipe meanwhile."""
    with contextlib.suppress(BlockingIOError):
        if fd >= 0:
            stream.chunks.extend(map(os.read, (fd,), (size,)))
