"""Frames (publisher to broker) and runs (broker to channel). Sans-IO: bytes in, bytes out.

A **frame** is one published message::

    size u32 | tag u32 | [excluded subscription u64] | topic | payload

``size`` counts the whole frame. ``tag`` has the topic's length in its low 16 bits, then ``EXCLUDE``, and the kind in its high
byte. All that decides where a frame goes stands in front of the payload, so neighbours that go the same way are told by
comparing bytes.

Every write to the broker is whole frames of at most ``PIPE_BUF`` bytes, which a pipe takes all or not at all. A frame that is
longer travels as **pieces**, each a frame of its own with the message's number, so that no kill, timeout, interrupt or other
thread ever tears one: pieces of several messages may be mixed, and a message whose last piece never comes does not exist.

A **run** is what a channel reads: neighbouring frames, untouched, behind a table of their lengths::

    size u64 | count u32 | kind u8 | 0 u8 | skip u16 | count lengths u32 (none for a single frame) | frames | tail byte

or a **note**, which stands in the place of messages::

    size u64 | 0 u32 | kind u8 | 0 u8 | 0 u16 | missed u64 | tail byte

``skip`` is the length of what stands before each payload. The channel reads ``length`` bytes from behind the first frame's
head on: each read is one payload and the next frame's head, which unpickling ignores. The tail byte stays in the pipe until
the last message of the run has been handed out, so that the descriptor stays readable while there is something to receive.
"""

from __future__ import annotations

import select
from array import array
from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

__all__ = [
    "END",
    "FRAME_OVERHEAD",
    "GAP",
    "HEAD",
    "MAX_FRAME",
    "MESSAGES",
    "OVERFLOWED",
    "PIPE_BUF",
    "RUN",
    "SKIPPED",
    "Batch",
    "FrameError",
    "Opening",
    "Run",
    "RunView",
    "Splitter",
    "abort",
    "frame_head",
    "note_run",
    "pieces",
    "read_run",
    "run_of",
    "topic_of",
]

PIPE_BUF: Final = select.PIPE_BUF
MAX_FRAME: Final = 0xFFFF_FFFF
EXCLUDE: Final = 1 << 16
TOPIC_LENGTH: Final = 0xFFFF
PIECE: Final = 1 << 24
ABORT: Final = 2 << 24

HEAD: Final = Struct("<II")
_EXCLUDED: Final = Struct("<Q")
_STREAK: Final = 8  # frames of one length in a row, before it is worth looking for many more
_PIECE: Final = Struct("<IIQB")  # size, PIECE, message number, last?
_ABORT: Final = Struct("<IIQ")
_ROOM: Final = PIPE_BUF - _PIECE.size

RUN: Final = Struct("<QIBBH")
_NOTE: Final = Struct("<QIBBHQ")
TAIL: Final = b"\n"
MESSAGES: Final = 0
END: Final = 1
GAP: Final = 2
SKIPPED: Final = 3
OVERFLOWED: Final = 4

# A message counts in a backlog as its pickled bytes, its topic's, and this: the frame's head, the run's object with its
# header, and its place in a queue, rounded up.
FRAME_OVERHEAD: Final = 256
_OVERHEAD: Final = FRAME_OVERHEAD - HEAD.size  # what comes to a whole frame


class FrameError(Exception):
    """Bytes that no publisher of this package writes."""


def frame_head(size: int, topic: bytes, exclude: int = 0) -> bytes:
    """The head of a frame with ``size`` bytes of payload; ``exclude`` is a subscription's number, 0 for none."""
    if not exclude:
        return HEAD.pack(size + 8 + len(topic), len(topic)) + topic
    head = HEAD.pack(size + 16 + len(topic), len(topic) | EXCLUDE)
    return head + _EXCLUDED.pack(exclude) + topic


def pieces(frame: bytes, number: int) -> Iterator[bytes]:
    """A frame that is too long for one write, as frames that are not. ``number`` differs from any other message's."""
    view = memoryview(frame)
    for start in range(0, len(frame), _ROOM):
        part = view[start : start + _ROOM]
        yield _PIECE.pack(_PIECE.size + len(part), PIECE, number, start + _ROOM >= len(frame)) + part


def abort(number: int) -> bytes:
    """Says that the rest of message ``number`` will not come."""
    return _ABORT.pack(_ABORT.size, ABORT, number)


class Batch(NamedTuple):
    """Neighbouring frames that go the same way."""

    frames: bytes
    sizes: array[int]
    topic: bytes
    exclude: int
    skip: int

    @property
    def charge(self) -> int:
        """What it counts in a backlog."""
        return len(self.frames) + len(self.sizes) * _OVERHEAD

    def charge_of(self, size: int) -> int:
        """What a frame of ``size`` counts."""
        return size + _OVERHEAD

    def fitting(self, room: int) -> int:
        """How many of its first messages fit into ``room`` of charge."""
        for index, size in enumerate(self.sizes):
            room -= size + _OVERHEAD
            if room < 0:
                return index
        return len(self.sizes)

    def cut(self, count: int) -> tuple[Batch, Batch]:
        """Its first ``count`` messages, and the others."""
        middle = sum(self.sizes[:count])
        return (
            self._replace(frames=self.frames[:middle], sizes=self.sizes[:count]),
            self._replace(frames=self.frames[middle:], sizes=self.sizes[count:]),
        )


class Opening(NamedTuple):
    """The beginning of a message in pieces: where it goes, and what it will count."""

    topic: bytes
    exclude: int
    charge: int


class Splitter:
    """Finds the frames in what one publisher wrote, and puts its long messages together."""

    def __init__(self) -> None:
        self._rest = b""
        self._parts: dict[int, list[bytes]] = {}
        self.held = 0  # bytes of messages that are not complete

    def split(self, chunk: bytes) -> list[Batch | Opening]:
        """The frames that ``chunk`` completes, in order, neighbours of one way together; and what begins in it.

        :raises FrameError: it is no such stream; the splitter is then of no more use.
        """
        if self._rest:
            chunk = self._rest + chunk
        unpack = HEAD.unpack_from
        batches: list[Batch | Opening] = []
        position, end = 0, len(chunk)
        while position + 8 <= end:
            start = position
            size, tag = unpack(chunk, position)
            if tag >= PIECE:
                if size > PIPE_BUF or size < 8:
                    raise FrameError(f"a piece of {size} bytes")
                position += size
                if position > end:
                    position = start
                    break
                self._piece(chunk[start:position], tag, batches)
                continue
            skip = 8 + (tag & TOPIC_LENGTH) + (8 if tag & EXCLUDE else 0)
            if size < skip or size > PIPE_BUF or tag > (EXCLUDE | TOPIC_LENGTH):
                raise FrameError(f"a frame of {size} bytes with the tag {tag:#x}")
            if position + size > end:
                break
            sizes = array("I", (size,))
            add = sizes.append
            same = chunk.startswith
            way = chunk[start + 8 : start + skip]
            position += size
            last, streak = size, 0
            while position + 8 <= end:
                size, other = unpack(chunk, position)
                if other != tag or not skip <= size <= PIPE_BUF or position + size > end:
                    break
                if way and not same(way, position + 8):
                    break
                add(size)
                position += size
                if size != last:
                    last, streak = size, 0
                elif (streak := streak + 1) == _STREAK:
                    streak = 0
                    more = _repeats(chunk, position, size, chunk[start + 4 : start + skip], (end - position) // size)
                    sizes.extend(array("I", (size,)) * more)
                    position += more * size
            batches.append(_batch(chunk[start:position], sizes))
        self._rest = chunk[position:]
        return batches

    def _piece(self, piece: bytes, tag: int, batches: list[Batch | Opening]) -> None:
        if tag == ABORT and len(piece) == _ABORT.size:
            self._drop(_ABORT.unpack(piece)[2])
            return
        if tag != PIECE or len(piece) <= _PIECE.size:
            raise FrameError(f"a piece with the tag {tag:#x}")
        _, _, number, last = _PIECE.unpack_from(piece)
        part = piece[_PIECE.size :]
        parts = self._parts.get(number)
        if parts is None:
            self._parts[number] = parts = []
            opening = _opening(part)
            if opening is not None:
                batches.append(opening)
        parts.append(part)
        self.held += len(part)
        if self.held > MAX_FRAME:
            raise FrameError("more of unfinished messages than one message may have")
        if last:
            frame = self._drop(number)
            if HEAD.unpack_from(frame)[0] != len(frame):
                raise FrameError(f"a message of {len(frame)} bytes that says something else")
            batches.append(_batch(frame, array("I", (len(frame),))))

    def _drop(self, number: int) -> bytes:
        frame = b"".join(self._parts.pop(number, ()))
        self.held -= len(frame)
        return frame


def _repeats(chunk: bytes, position: int, size: int, way: bytes, most: int) -> int:
    """How many frames of ``size`` that go the same ``way`` follow each other from ``position`` on, ``most`` at the most.

    Compares a byte of all their heads at once, in slices: a fraction of what a loop over frames costs.
    """
    head = HEAD.pack(size, 0)[:4] + way
    count, block = 0, 64
    while count < most:
        wanted = alike = min(block, most - count)
        first = position + count * size
        for index, byte in enumerate(head):
            column = chunk[first + index : first + alike * size : size]
            alike -= len(column.lstrip(bytes((byte,))))
            if not alike:
                break
        count += alike
        if alike < wanted:
            break
        block *= 4
    return count


def _opening(part: bytes) -> Opening | None:
    """What the first piece of a message says; nothing where PIPE_BUF is so small that it does not hold all of the head."""
    if len(part) < HEAD.size:
        raise FrameError("a message without a head")
    size, tag = HEAD.unpack_from(part)
    head = HEAD.size + (_EXCLUDED.size if tag & EXCLUDE else 0) + (tag & TOPIC_LENGTH)
    if len(part) == _ROOM and _ROOM < head <= size:
        return None
    _, topic, exclude = _way(part, size)
    return Opening(topic, exclude, size + _OVERHEAD)


def _batch(frames: bytes, sizes: array[int]) -> Batch:
    skip, topic, exclude = _way(frames, sizes[0])
    return Batch(frames, sizes, topic, exclude, skip)


def _way(frame: bytes, size: int) -> tuple[int, bytes, int]:
    """How long the head of a frame is, its topic, and who is excluded."""
    tag = HEAD.unpack_from(frame)[1]
    if not tag:
        return HEAD.size, b"", 0
    start = HEAD.size + (_EXCLUDED.size if tag & EXCLUDE else 0)
    skip = start + (tag & TOPIC_LENGTH)
    if tag > (EXCLUDE | TOPIC_LENGTH) or skip > min(size, len(frame)):
        raise FrameError(f"a frame of {size} bytes with the tag {tag:#x}")
    return skip, frame[start:skip], _EXCLUDED.unpack_from(frame, HEAD.size)[0] if tag & EXCLUDE else 0


class Run:
    """Messages on their way to channels: ``data`` is what a pipe gets, shared by all who get it."""

    __slots__ = ("charge", "count", "data", "holders", "missed")

    def __init__(self, data: bytes, count: int, charge: int, missed: int = 0) -> None:
        self.data = data
        self.count = count
        self.charge = charge  # what it counts in a backlog
        self.missed = missed  # what a note says of that
        self.holders = 0  # backlogs that it is in

    def charges(self) -> list[int]:
        """What each of its messages counts in a backlog."""
        if self.count == 1:
            return [self.charge]
        return [size + _OVERHEAD for size in array("I", self.data[RUN.size : RUN.size + 4 * self.count])]

    def part(self, start: int, stop: int) -> Run:
        """Its messages from ``start`` to before ``stop``, as a run of their own."""
        if start == 0 and stop == self.count:
            return self
        skip = RUN.unpack_from(self.data)[4]
        sizes = array("I", self.data[RUN.size : RUN.size + 4 * self.count])
        first = RUN.size + 4 * self.count + sum(sizes[:start])
        sizes = sizes[start:stop]
        return _pack(self.data[first : first + sum(sizes)], sizes, skip)


def topic_of(head: bytes) -> str:
    """The topic in what stands before a payload."""
    return head[16 if HEAD.unpack_from(head)[1] & EXCLUDE else 8 :].decode()


def run_of(batch: Batch) -> Run:
    """The run that carries a batch."""
    return _pack(batch.frames, batch.sizes, batch.skip)


def _pack(frames: bytes, sizes: array[int], skip: int) -> Run:
    count = len(sizes)
    table = sizes.tobytes() if count > 1 else b""
    head = RUN.pack(RUN.size + len(table) + len(frames) + len(TAIL), count, MESSAGES, 0, skip)
    return Run(b"".join((head, table, frames, TAIL)), count, len(frames) + count * _OVERHEAD)


def note_run(kind: int, missed: int = 0) -> Run:
    """Says something in the place of messages: ``END`` (a clean end), ``GAP`` (so many were dropped here), ``SKIPPED`` (so many
    states were, which nobody wants to hear of), ``OVERFLOWED`` (what came next did not fit)."""
    return Run(_NOTE.pack(_NOTE.size + len(TAIL), 0, kind, 0, 0, missed) + TAIL, 0, 0, missed)


class RunView(NamedTuple):
    """What the head of a run says about the bytes behind it. Of a note, ``messages`` is what it says of missed ones."""

    size: int
    kind: int
    messages: int
    skip: int
    sizes: array[int] | None  # of the frames; None for a single one
    first: int  # where the first frame starts


def read_run(data: bytes, start: int) -> RunView | None:
    """The run at ``start``, or ``None`` while its head is not whole. The frames may not be there yet."""
    if len(data) - start < RUN.size:
        return None
    size, count, kind, _, skip = RUN.unpack_from(data, start)
    first = start + RUN.size
    if kind != MESSAGES:
        missed = _NOTE.unpack_from(data, start)[5] if len(data) - start >= _NOTE.size else 0
        return RunView(size, kind, missed, skip, None, first)
    if count <= 1 or len(data) - first < 4 * count:
        return RunView(size, kind, count, skip, None, first)
    return RunView(size, kind, count, skip, array("I", data[first : first + 4 * count]), first + 4 * count)
