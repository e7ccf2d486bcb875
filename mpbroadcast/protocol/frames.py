"""Frames: what a publisher writes to the broker. Sans-IO: bytes in, bytes out.

A frame is one published message::

    size u32 | tag u32 | [excluded subscription u64] | topic | payload

``size`` counts the whole frame. ``tag`` has the topic's length in its low 16 bits, then ``EXCLUDE`` and ``IMAGE``, and the kind
in its high byte. All that decides about a frame's targets stands before the payload, so comparing bytes finds neighbours with
the same targets.

Every write to the broker is whole frames of at most ``PIPE_BUF`` bytes, which a pipe takes all or not at all. A longer frame
is sent as **pieces**, each a frame of its own with the message's id. So no kill, timeout, interrupt or other thread ever tears
one: pieces of several messages may be mixed, and a message whose last piece never comes does not exist.

A message in shared memory is a frame of the kind ``REFERENCE`` (into the publisher's ring: ring u32, offset u32, length u32)
or ``MEMORY`` (in memory of its own: id u64, length u64), without its payload. A frame of the kind ``BRIDGE`` is no message: it
stands between those that the session of a bridge hands to the broker. ``IMAGE`` marks a payload, wherever it is, that
is no plain pickle; the broker does not read it.
"""

from __future__ import annotations

import contextlib
import select
from array import array
from collections.abc import Iterator
from functools import partial
from struct import Struct, iter_unpack
from typing import Any, Final, NamedTuple, TypeVar

from mpbroadcast.validation import MAX_TOPIC

PIPE_BUF: Final = select.PIPE_BUF
MAX_FRAME: Final = 0xFFFF_FFFF
EXCLUDE: Final = 1 << 16
IMAGE: Final = 1 << 17
TOPIC_LENGTH: Final = 0xFFFF
PIECE: Final = 1 << 24
ABORT: Final = 2 << 24
REFERENCE: Final = 3 << 24
MEMORY: Final = 4 << 24
BRIDGE: Final = 5 << 24
_ROUTE: Final = IMAGE | EXCLUDE | TOPIC_LENGTH  # the bits of a tag that are not its kind

MOST_TOGETHER: Final = 1 << 11  # neighbouring messages that are routed together
MOST_ITEMS: Final = 1 << 12  # that are split at once: some 10 ms
HEAD: Final = Struct("<II")
_EXCLUDED: Final = Struct("<Q")
_STREAK: Final = 2  # frames of the same length as the one before, from which on it is worth looking for many more
_PIECE: Final = Struct("<IIQB")  # size, PIECE, message id, last?
_MOST_UNFINISHED: Final = 4096  # messages, one for each thread that publishes
_UNFINISHED: Final = 512  # bytes that a message takes beside its own
_ABORT: Final = Struct("<IIQ")
_ROOM: Final = PIPE_BUF - _PIECE.size
_REFERENCE: Final = Struct("<III")  # ring, offset, length
_RING: Final = Struct("<I")
_PLAIN: Final = Struct("<IIIII")  # head and reference, without a topic
REFERENCE_SIZE: Final = _REFERENCE.size  # bytes behind the head
_MOST_REFERRED: Final = 1 << 20  # bytes that they refer to, so that a reader gets no more at once than it soon reads
_MOST_REFERENCES: Final = PIPE_BUF - 64  # bytes of them together, so that their run is one whole write, too
_MEMORY: Final = Struct("<QQ")  # id, length
_ARRIVAL: Final = Struct("<8sQQI")  # origin, incarnation, position of the first message, messages
_MOST_POSITION: Final = 1 << 62
MOST_CURSOR: Final = 256  # bytes of UTF-8

# A message counts in a backlog as its pickled bytes, its topic's, and this: the frame's head, the run's object with its
# header, and its entry in a queue, rounded up.
FRAME_OVERHEAD: Final = 256
OVERHEAD: Final = FRAME_OVERHEAD - HEAD.size  # what is added to a whole frame


class FrameError(Exception):
    """Bytes that no publisher of this package writes."""


def frame_head(size: int, topic: bytes, exclude: int = 0, kind: int = 0) -> bytes:
    """Return the head of a frame with ``size`` bytes of payload; ``exclude`` is a subscription's id, 0 for none."""
    if not exclude:
        return HEAD.pack(size + 8 + len(topic), len(topic) | kind) + topic
    head = HEAD.pack(size + 16 + len(topic), len(topic) | EXCLUDE | kind)
    return head + _EXCLUDED.pack(exclude) + topic


def reference_frame(ring: int, offset: int, length: int, topic: bytes, exclude: int = 0, image: bool = False) -> bytes:
    """Return the frame of a message in the publisher's ring of this id."""
    head = frame_head(_REFERENCE.size, topic, exclude, REFERENCE | IMAGE if image else REFERENCE)
    return head + _REFERENCE.pack(ring, offset, length)


# With a ring, an offset and a length, it returns what :func:`reference_frame` does without a topic. A call in C.
plain_reference: Final = partial(_PLAIN.pack, _PLAIN.size, REFERENCE)


def memory_frame(message_id: int, length: int, topic: bytes, exclude: int = 0, image: bool = False) -> bytes:
    """Return the frame of a message in memory of its own, which was sent to the broker with this id."""
    return frame_head(_MEMORY.size, topic, exclude, MEMORY | IMAGE if image else MEMORY) + _MEMORY.pack(message_id, length)


def pieces(frame: bytes, message_id: int) -> Iterator[bytes]:
    """Yield the pieces of a frame that is too long for one write. ``message_id`` differs from any other message's."""
    view = memoryview(frame)
    for start in range(0, len(frame), _ROOM):
        part = view[start : start + _ROOM]
        yield _PIECE.pack(_PIECE.size + len(part), PIECE, message_id, start + _ROOM >= len(frame)) + part


def abort(message_id: int) -> bytes:
    """Return the frame that ends a message whose last piece will not come."""
    return _ABORT.pack(_ABORT.size, ABORT, message_id)


class Arrival(NamedTuple):
    """The next ``messages`` in the pipe are so many of another bus, the first at the position ``first``."""

    origin: bytes
    incarnation: int
    first: int
    messages: int


class Cursor(NamedTuple):
    """The position in the log behind all messages before it in the pipe; empty: the log has lost what was behind the last."""

    position: str


BridgeFrame = Arrival | Cursor


def bridge_frame(frame: BridgeFrame) -> bytes:
    """Return what stands between messages in the pipe of a bridge's session."""
    data = _ARRIVAL.pack(*frame) if isinstance(frame, Arrival) else frame.position.encode()
    return HEAD.pack(HEAD.size + len(data), BRIDGE | isinstance(frame, Cursor)) + data


class Batch(NamedTuple):
    """Neighbouring frames with the same topic and exclusion. ``skip`` is the length of what precedes each payload."""

    frames: bytes
    sizes: array[int]
    topic: bytes
    exclude: int
    skip: int
    image: bool = False
    hold: None = None  # it is in no shared memory

    @property
    def charge(self) -> int:
        """The bytes that it counts in a backlog."""
        return len(self.frames) + len(self.sizes) * OVERHEAD

    def cut(self, count: int) -> tuple[Batch, Batch]:
        """Return its first ``count`` messages, and the others."""
        return _cut(self, count, sum(self.sizes[:count]))


class References(NamedTuple):
    """Neighbouring references into one ring, with the same targets. ``sizes`` are of the frames that they replace."""

    frames: bytes
    sizes: array[int]
    topic: bytes
    exclude: int
    skip: int
    image: bool
    ring: int
    hold: Any = None  # keeps the messages in the ring

    @property
    def charge(self) -> int:
        """The bytes that its messages count in a backlog."""
        return sum(self.sizes) + len(self.sizes) * OVERHEAD

    def cut(self, count: int) -> tuple[References, References]:
        """Return its first ``count`` messages, and the others."""
        return _cut(self, count, count * (self.skip + _REFERENCE.size))

    def positions(self) -> Iterator[tuple[int, int]]:
        """Return offset and length of each message in the ring."""
        return iter_unpack(f"<{self.skip + _RING.size}xII", self.frames)

    def copied(self, ring: memoryview) -> Batch:
        """Return the messages, copied out of the ring."""
        frames: list[Any] = []
        for offset, length in self.positions():
            frames += (frame_head(length, self.topic, self.exclude, IMAGE if self.image else 0), ring[offset : offset + length])
        return Batch(b"".join(frames), self.sizes, self.topic, self.exclude, self.skip, self.image)


class MemfdMessage(NamedTuple):
    """A message in memory of its own. ``id`` is its publisher's; the memory's descriptor has it, too."""

    id: int
    length: int
    topic: bytes
    exclude: int
    head: bytes
    image: bool
    hold: Any = None  # keeps the memory

    @property
    def sizes(self) -> array[int]:
        """The size of the frame that it replaces."""
        return array("I", (len(self.head) + self.length,))

    @property
    def charge(self) -> int:
        """The bytes that it counts in a backlog."""
        return len(self.head) + self.length + OVERHEAD

    def cut(self, count: int) -> tuple[MemfdMessage, MemfdMessage]:
        """Return the message as both parts: one of them is empty, and not used."""
        return self, self

    def copied(self, payload: bytes) -> Batch:
        """Return the message, with its payload."""
        return Batch(self.head + payload, self.sizes, self.topic, self.exclude, len(self.head), self.image)


Item = Batch | References | MemfdMessage
Several = TypeVar("Several", Batch, References)


def _cut(item: Several, count: int, middle: int) -> tuple[Several, Several]:
    """Return the first ``count`` messages, whose frames have ``middle`` bytes, and the others."""
    first = item._replace(frames=item.frames[:middle], sizes=item.sizes[:count])
    return first, item._replace(frames=item.frames[middle:], sizes=item.sizes[count:])


class Splitter:
    """Splits the bytes of one publisher into frames, and joins the pieces of its long messages."""

    def __init__(self) -> None:
        self.rest = b""  # of a frame that is not whole: to be read only
        self._parts: dict[int, bytearray] = {}
        self.unfinished = 0  # bytes of messages that are not complete
        self.aborted: list[int] = []  # ids of messages whose remaining pieces, or memory, will not be used
        self.has_shared = False  # True once more than messages and their pieces have come: the reader resets it
        self.has_more = False  # True once there were more items than are split at once: until take_back is called

    def take_back(self) -> bytes:
        """Return what was not split yet: it comes again in the next chunks."""
        rest, self.rest, self.has_more = self.rest, b"", False
        return rest

    def split(self, chunk: bytes) -> list[Any]:
        """Return the frames that ``chunk`` completes, in order; neighbours with the same targets are one :data:`Item`, up to a
        limit. Between them there may be a :data:`BridgeFrame`.

        At most ``MOST_ITEMS`` are returned, and about so many pieces are joined.

        :raises FrameError: no publisher of this package wrote this; the splitter is then not used again.
        """
        if self.rest:
            chunk = self.rest + chunk
        unpack = HEAD.unpack_from
        batches: list[Item | BridgeFrame] = []
        position, end = 0, len(chunk)
        for _ in range(MOST_ITEMS):
            if position + 8 > end:
                break
            start = position
            size, tag = unpack(chunk, position)
            if tag >= PIECE:
                if size > PIPE_BUF or size < 8:
                    raise FrameError(f"a piece of {size} bytes")
                if position + size > end:
                    break
                if tag < REFERENCE:
                    position += size
                    self._piece(chunk[start:position], tag, batches)
                elif tag < MEMORY:
                    self.has_shared = True
                    references = _references(chunk, position, end)
                    batches.append(references)
                    position += len(references.frames)
                else:
                    self.has_shared = True
                    position += size
                    frame = chunk[start:position]
                    batches.append(_memfd_message(frame) if tag < BRIDGE else _bridge_frame(frame))
                continue
            skip = 8 + (tag & TOPIC_LENGTH) + (8 if tag & EXCLUDE else 0)
            if size < skip or size > PIPE_BUF or tag > _ROUTE or tag & TOPIC_LENGTH > MAX_TOPIC:
                raise FrameError(f"a frame of {size} bytes with the tag {tag:#x}")
            if position + size > end:
                break
            sizes = array("I", (size,))
            add = sizes.append
            same = chunk.startswith
            route = chunk[start + 8 : start + skip]
            position += size
            last, streak = size, 0
            while position + 8 <= end and len(sizes) < MOST_TOGETHER:
                size, other = unpack(chunk, position)
                if other != tag or not skip <= size <= PIPE_BUF or position + size > end:
                    break
                if route and not same(route, position + 8):
                    break
                add(size)
                position += size
                if size != last:
                    last, streak = size, 0
                elif (streak := streak + 1) == _STREAK:
                    more = _repeats(chunk, position, size, skip, MOST_TOGETHER - len(sizes))
                    sizes.extend(array("I", (size,)) * more)
                    position += more * size
            topic, exclude = route, 0
            if tag & EXCLUDE:
                topic, exclude = route[_EXCLUDED.size :], _EXCLUDED.unpack_from(route)[0]
            batches.append(Batch(chunk[start:position], sizes, topic, exclude, skip, bool(tag & IMAGE)))
        else:
            self.has_more = True
        self.rest = chunk[position:]
        return batches

    def _piece(self, piece: bytes, tag: int, batches: list[Item | BridgeFrame]) -> None:
        if tag == ABORT and len(piece) == _ABORT.size:
            message_id = _ABORT.unpack(piece)[2]
            self._take_parts(message_id)
            self.aborted.append(message_id)
            self.has_shared = True
            return
        if tag != PIECE or len(piece) <= _PIECE.size:
            raise FrameError(f"a piece with the tag {tag:#x}")
        _, _, message_id, last = _PIECE.unpack_from(piece)
        part = piece[_PIECE.size :]
        parts = self._parts.get(message_id)
        if parts is None:
            self._parts[message_id] = parts = bytearray()
            if len(self._parts) > _MOST_UNFINISHED:
                raise FrameError("more unfinished messages than a publisher can have")
            self.unfinished += _UNFINISHED
        parts += part  # a list of short parts would take many times their bytes
        self.unfinished += len(part)
        if self.unfinished > MAX_FRAME:
            raise FrameError("more bytes of unfinished messages than one message may have")
        if last:
            frame = self._take_parts(message_id)
            if len(frame) < HEAD.size or HEAD.unpack_from(frame)[0] != len(frame):
                raise FrameError(f"a message of {len(frame)} bytes whose head has another size")
            batches.append(_batch(frame, array("I", (len(frame),))))

    def _take_parts(self, message_id: int) -> bytes:
        """Remove what has come of a message in pieces. Return it; nothing if nothing has come."""
        parts = self._parts.pop(message_id, None)
        if parts is None:
            return b""
        self.unfinished -= len(parts) + _UNFINISHED
        return bytes(parts)


def _repeats(chunk: bytes, position: int, size: int, skip: int, most: int) -> int:
    """Return how many frames of ``size`` bytes from ``position`` on, at most ``most``, have the head of the frame before it.

    Compares a byte of all their heads at once, in slices: a fraction of what a loop over frames costs.
    """
    alike = min(most, (len(chunk) - position) // size)
    for index, byte in enumerate(chunk[position - size : position - size + skip]):
        column = chunk[position + index : position + alike * size : size]
        alike -= len(column.lstrip(bytes((byte,))))
    return alike


def _references(chunk: bytes, start: int, end: int) -> References:
    """Return the references from ``start`` on with the same targets, into the same ring."""
    size, tag = HEAD.unpack_from(chunk, start)
    skip, topic, exclude = _route(chunk[start : start + size], size, REFERENCE)
    if size != skip + _REFERENCE.size:
        raise FrameError(f"a REFERENCE frame of {size} bytes instead of {skip + _REFERENCE.size}")
    most = (min(end - start, _MOST_REFERENCES)) // size
    sizes = array("I")
    room = _MOST_REFERRED
    same = chunk[start : start + skip + _RING.size]
    for head, _, length in iter_unpack(f"<{len(same)}sII", chunk[start : start + most * size]):
        if head != same or room <= 0:
            break
        if skip + length > MAX_FRAME:
            raise FrameError(f"a reference to {length} bytes, more than a message may have")
        sizes.append(skip + length)
        room -= length
    frames = chunk[start : start + len(sizes) * size]
    (ring,) = _RING.unpack_from(same, skip)
    return References(frames, sizes, topic, exclude, skip, bool(tag & IMAGE), ring)


def references_in(frames: bytes | memoryview, skip: int) -> Iterator[tuple[int, int, int]]:
    """Return ring, offset and length of each reference; their heads are ``skip`` bytes long."""
    return iter_unpack(f"<{skip}xIII", frames)


def _memfd_message(frame: bytes) -> MemfdMessage:
    size, tag = HEAD.unpack_from(frame)
    skip, topic, exclude = _route(frame, size, MEMORY)
    if size != skip + _MEMORY.size:
        raise FrameError(f"a MEMORY frame of {size} bytes instead of {skip + _MEMORY.size}")
    message_id, length = _MEMORY.unpack_from(frame, skip)
    if skip + length > MAX_FRAME:
        raise FrameError(f"a message of {length} bytes in memory of its own, more than a message may have")
    image = bool(tag & IMAGE)
    return MemfdMessage(message_id, length, topic, exclude, frame_head(length, topic, exclude, IMAGE if image else 0), image)


def _bridge_frame(frame: bytes) -> BridgeFrame:
    size, tag = HEAD.unpack_from(frame)
    data = frame[HEAD.size :]
    if tag == BRIDGE and len(data) == _ARRIVAL.size:
        arrival = Arrival(*_ARRIVAL.unpack(data))
        if 0 < arrival.first < _MOST_POSITION and arrival.incarnation < _MOST_POSITION:
            return arrival
    elif tag == BRIDGE + 1 and len(data) <= MOST_CURSOR:
        with contextlib.suppress(UnicodeDecodeError):
            return Cursor(data.decode())
    raise FrameError(f"a BRIDGE frame of {size} bytes with the tag {tag:#x}")


def _batch(frames: bytes, sizes: array[int]) -> Batch:
    skip, topic, exclude = _route(frames, sizes[0])
    return Batch(frames, sizes, topic, exclude, skip, bool(frames[6] & (IMAGE >> 16)))


def _route(frame: bytes, size: int, kind: int = 0) -> tuple[int, bytes, int]:
    """Return the length of the head of a frame of this kind, its topic, and the excluded subscription."""
    tag = HEAD.unpack_from(frame)[1]
    if not tag:
        return HEAD.size, b"", 0
    start = HEAD.size + (_EXCLUDED.size if tag & EXCLUDE else 0)
    skip = start + (tag & TOPIC_LENGTH)
    if tag & ~_ROUTE != kind or skip > min(size, len(frame)) or tag & TOPIC_LENGTH > MAX_TOPIC:
        raise FrameError(f"a frame of {size} bytes with the tag {tag:#x}")
    return skip, frame[start:skip], _EXCLUDED.unpack_from(frame, HEAD.size)[0] if tag & EXCLUDE else 0


def topic_of(head: bytes) -> str:
    """Return the topic in the bytes before a payload."""
    return head[16 if HEAD.unpack_from(head)[1] & EXCLUDE else 8 :].decode()
