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

import select
from array import array
from collections.abc import Iterator
from functools import partial
from struct import Struct, iter_unpack
from typing import Any, Final, NamedTuple, TypeVar

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

MOST_TOGETHER: Final = 1 << 11  # neighbouring messages that are routed together
MOST_ITEMS: Final = 1 << 12  # that are split at once: some 10 ms
HEAD: Final = Struct("<II")
EXCLUDED_ID: Final = Struct("<Q")
PIECE_HEAD: Final = Struct("<IIQB")  # size, PIECE, message id, last?
ABORT_FRAME: Final = Struct("<IIQ")
_ROOM: Final = PIPE_BUF - PIECE_HEAD.size
REFERENCE_BODY: Final = Struct("<III")  # ring, offset, length
RING_ID: Final = Struct("<I")
_PLAIN: Final = Struct("<IIIII")  # head and reference, without a topic
REFERENCE_SIZE: Final = REFERENCE_BODY.size  # bytes behind the head
MEMORY_BODY: Final = Struct("<QQ")  # id, length
ARRIVAL_BODY: Final = Struct("<8sQQI")  # origin, incarnation, position of the first message, messages
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
    return head + EXCLUDED_ID.pack(exclude) + topic


def reference_frame(ring: int, offset: int, length: int, topic: bytes, exclude: int = 0, image: bool = False) -> bytes:
    """Return the frame of a message in the publisher's ring of this id."""
    head = frame_head(REFERENCE_BODY.size, topic, exclude, REFERENCE | IMAGE if image else REFERENCE)
    return head + REFERENCE_BODY.pack(ring, offset, length)


# With a ring, an offset and a length, it returns what :func:`reference_frame` does without a topic. A call in C.
plain_reference: Final = partial(_PLAIN.pack, _PLAIN.size, REFERENCE)


def memory_frame(message_id: int, length: int, topic: bytes, exclude: int = 0, image: bool = False) -> bytes:
    """Return the frame of a message in memory of its own, which was sent to the broker with this id."""
    head = frame_head(MEMORY_BODY.size, topic, exclude, MEMORY | IMAGE if image else MEMORY)
    return head + MEMORY_BODY.pack(message_id, length)


def pieces(frame: bytes, message_id: int) -> Iterator[bytes]:
    """Yield the pieces of a frame that is too long for one write. ``message_id`` differs from any other message's."""
    view = memoryview(frame)
    for start in range(0, len(frame), _ROOM):
        part = view[start : start + _ROOM]
        yield PIECE_HEAD.pack(PIECE_HEAD.size + len(part), PIECE, message_id, start + _ROOM >= len(frame)) + part


def abort(message_id: int) -> bytes:
    """Return the frame that ends a message whose last piece will not come."""
    return ABORT_FRAME.pack(ABORT_FRAME.size, ABORT, message_id)


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
    data = ARRIVAL_BODY.pack(*frame) if isinstance(frame, Arrival) else frame.position.encode()
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


class Singles(NamedTuple):
    """Neighbouring frames with changing topics, at most ``MOST_TOGETHER``; none has an exclusion, or an image."""

    topics: list[bytes]
    frames: list[bytes]

    @property
    def charge(self) -> int:
        """The bytes that its messages count in a backlog."""
        return sum(map(len, self.frames)) + len(self.frames) * OVERHEAD

    def cut(self, count: int) -> tuple[Singles, Singles]:
        """Return its first ``count`` messages, and the others."""
        return Singles(self.topics[:count], self.frames[:count]), Singles(self.topics[count:], self.frames[count:])

    def batches(self) -> list[Batch]:
        """Return each message as a batch."""
        return [
            Batch(frame, array("I", (len(frame),)), topic, 0, HEAD.size + len(topic))
            for topic, frame in zip(self.topics, self.frames, strict=True)
        ]


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
        return _cut(self, count, count * (self.skip + REFERENCE_BODY.size))

    def positions(self) -> Iterator[tuple[int, int]]:
        """Return offset and length of each message in the ring."""
        return iter_unpack(f"<{self.skip + RING_ID.size}xII", self.frames)

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


def references_in(frames: bytes | memoryview, skip: int) -> Iterator[tuple[int, int, int]]:
    """Return ring, offset and length of each reference; their heads are ``skip`` bytes long."""
    return iter_unpack(f"<{skip}xIII", frames)


def topic_of(head: bytes) -> str:
    """Return the topic in the bytes before a payload."""
    return head[16 if HEAD.unpack_from(head)[1] & EXCLUDE else 8 :].decode()
