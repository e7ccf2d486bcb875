"""Splitting what a publisher has written into frames, and joining these to items. Sans-IO: bytes in, items out.

Whatever a publisher writes, the broker goes on: bytes that are no frames raise :class:`FrameError`, which ends that publisher.
"""

from __future__ import annotations

import contextlib
from array import array
from struct import iter_unpack
from typing import Any, Final

from mpbroadcast.protocol.frames import (
    ABORT,
    ABORT_FRAME,
    ARRIVAL_BODY,
    BRIDGE,
    EXCLUDE,
    EXCLUDED_ID,
    HEAD,
    IMAGE,
    MAX_FRAME,
    MEMORY,
    MEMORY_BODY,
    MOST_CURSOR,
    MOST_ITEMS,
    MOST_TOGETHER,
    PIECE,
    PIECE_HEAD,
    PIPE_BUF,
    REFERENCE,
    REFERENCE_BODY,
    RING_ID,
    TOPIC_LENGTH,
    Arrival,
    Batch,
    BridgeFrame,
    Cursor,
    FrameError,
    Item,
    MemfdMessage,
    References,
    Singles,
    frame_head,
)
from mpbroadcast.validation import MAX_TOPIC

_ROUTE: Final = IMAGE | EXCLUDE | TOPIC_LENGTH  # the bits of a tag that are not its kind
_PLAIN: Final = b"\0\0"  # the last two bytes of the tag of a message that is one frame, no image, and excluded from nothing
_ALIKE: Final = 4  # neighbours with the same topic, from which on they are a batch, also where topics have changed before
_STREAK: Final = 2  # frames of the same length as the one before, from which on it is worth looking for many more
_MOST_UNFINISHED: Final = 4096  # messages, one for each thread that publishes
_UNFINISHED: Final = 512  # bytes that a message takes beside its own
_MOST_REFERRED: Final = 1 << 20  # bytes that they refer to, so that a reader gets no more at once than it soon reads
_MOST_REFERENCES: Final = PIPE_BUF - 64  # bytes of them together, so that their run is one whole write, too
_MOST_POSITION: Final = 1 << 62


class Splitter:
    """Splits the bytes of one publisher into frames, and joins the pieces of its long messages."""

    def __init__(self) -> None:
        self.rest = b""  # of a frame that is not whole: to be read only
        self._parts: dict[int, bytearray] = {}
        self.unfinished = 0  # bytes of messages that are not complete
        self.aborted: list[int] = []  # ids of messages whose remaining pieces, or memory, will not be used
        self.steps = 0  # of the last call: how many frames, or neighbours with the same targets, it has looked at
        self.has_shared = False  # True once more than messages and their pieces have come: the reader resets it
        self.has_more = False  # True once there were more items than are split at once: until take_back is called

    def take_back(self) -> bytes:
        """Return what was not split yet: it comes again in the next chunks."""
        rest, self.rest, self.has_more = self.rest, b"", False
        return rest

    def split(self, chunk: bytes) -> list[Any]:
        """Return the frames that ``chunk`` completes, in order; neighbours with the same targets are one :data:`Item`, up to a
        limit, and neighbours with changing topics one :class:`Singles`. Between them there may be a :data:`BridgeFrame`.

        At most ``MOST_ITEMS`` are returned, and about so many pieces are joined.

        :raises FrameError: no publisher of this package wrote this; the splitter is then not used again.
        """
        if self.rest:
            chunk = self.rest + chunk
        unpack = HEAD.unpack_from
        batches: list[Item | Singles | BridgeFrame] = []
        position, end = 0, len(chunk)
        same = chunk.startswith
        singles: Singles | None = None  # the last of ``batches``, while more is added to it
        last, alike = b"", 0  # the topic in it that was added last, and how many before that were the same
        for self.steps in range(MOST_ITEMS):
            if position + 8 > end:
                break
            start = position
            size, tag = unpack(chunk, position)
            if tag >= PIECE:
                singles = None
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
            route = chunk[start + 8 : start + skip]
            position += size
            if tag <= MAX_TOPIC:  # nothing is excluded, and it is no image
                if singles is not None:
                    alike = alike + 1 if route == last else 0
                    if alike == _ALIKE or len(singles.topics) == MOST_TOGETHER:
                        singles = None
                elif same(_PLAIN, position + 6) and not same(chunk[start + 4 : start + skip], position + 4):
                    singles = Singles([], [])
                    batches.append(singles)
                if singles is not None:
                    singles.topics.append(route)
                    singles.frames.append(chunk[start:position])
                    last = route
                    continue
            singles = None
            sizes = array("I", (size,))
            add = sizes.append
            length, streak = size, 0
            while position + 8 <= end and len(sizes) < MOST_TOGETHER:
                size, other = unpack(chunk, position)
                if other != tag or not skip <= size <= PIPE_BUF or position + size > end:
                    break
                if route and not same(route, position + 8):
                    break
                add(size)
                position += size
                if size != length:
                    length, streak = size, 0
                elif (streak := streak + 1) == _STREAK:
                    more = _repeats(chunk, position, size, skip, MOST_TOGETHER - len(sizes))
                    sizes.extend(array("I", (size,)) * more)
                    position += more * size
            topic, exclude = route, 0
            if tag & EXCLUDE:
                topic, exclude = route[EXCLUDED_ID.size :], EXCLUDED_ID.unpack_from(route)[0]
            batches.append(Batch(chunk[start:position], sizes, topic, exclude, skip, bool(tag & IMAGE)))
        else:
            self.has_more = True
        self.rest = chunk[position:]
        return batches

    def _piece(self, piece: bytes, tag: int, batches: list[Item | Singles | BridgeFrame]) -> None:
        if tag == ABORT and len(piece) == ABORT_FRAME.size:
            message_id = ABORT_FRAME.unpack(piece)[2]
            self._take_parts(message_id)
            self.aborted.append(message_id)
            self.has_shared = True
            return
        if tag != PIECE or len(piece) <= PIECE_HEAD.size:
            raise FrameError(f"a piece with the tag {tag:#x}")
        _, _, message_id, last = PIECE_HEAD.unpack_from(piece)
        part = piece[PIECE_HEAD.size :]
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
    if size != skip + REFERENCE_BODY.size:
        raise FrameError(f"a REFERENCE frame of {size} bytes instead of {skip + REFERENCE_BODY.size}")
    most = (min(end - start, _MOST_REFERENCES)) // size
    sizes = array("I")
    room = _MOST_REFERRED
    same = chunk[start : start + skip + RING_ID.size]
    for head, _, length in iter_unpack(f"<{len(same)}sII", chunk[start : start + most * size]):
        if head != same or room <= 0:
            break
        if skip + length > MAX_FRAME:
            raise FrameError(f"a reference to {length} bytes, more than a message may have")
        sizes.append(skip + length)
        room -= length
    frames = chunk[start : start + len(sizes) * size]
    (ring,) = RING_ID.unpack_from(same, skip)
    return References(frames, sizes, topic, exclude, skip, bool(tag & IMAGE), ring)


def _memfd_message(frame: bytes) -> MemfdMessage:
    size, tag = HEAD.unpack_from(frame)
    skip, topic, exclude = _route(frame, size, MEMORY)
    if size != skip + MEMORY_BODY.size:
        raise FrameError(f"a MEMORY frame of {size} bytes instead of {skip + MEMORY_BODY.size}")
    message_id, length = MEMORY_BODY.unpack_from(frame, skip)
    if skip + length > MAX_FRAME:
        raise FrameError(f"a message of {length} bytes in memory of its own, more than a message may have")
    image = bool(tag & IMAGE)
    return MemfdMessage(message_id, length, topic, exclude, frame_head(length, topic, exclude, IMAGE if image else 0), image)


def _bridge_frame(frame: bytes) -> BridgeFrame:
    size, tag = HEAD.unpack_from(frame)
    data = frame[HEAD.size :]
    if tag == BRIDGE and len(data) == ARRIVAL_BODY.size:
        arrival = Arrival(*ARRIVAL_BODY.unpack(data))
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
    start = HEAD.size + (EXCLUDED_ID.size if tag & EXCLUDE else 0)
    skip = start + (tag & TOPIC_LENGTH)
    if tag & ~_ROUTE != kind or skip > min(size, len(frame)) or tag & TOPIC_LENGTH > MAX_TOPIC:
        raise FrameError(f"a frame of {size} bytes with the tag {tag:#x}")
    return skip, frame[start:skip], EXCLUDED_ID.unpack_from(frame, HEAD.size)[0] if tag & EXCLUDE else 0
