"""Entries of the log: what bridges write into it and read from it, signed. Bytes in, bytes out; no engine, no clock.

An entry speaks for one origin: the 8 bytes of a bus, and the number of the broker that has it, its incarnation. ``first`` is
the position of the entry's first message; the messages of an origin have the positions 1, 2, 3, ... An entry is a *batch* of
messages, a *piece* of one that is too long for an entry, or a *hello*, without a message: what comes next has the position
``first``.

=============  =========================================================================================================
bytes          field (little endian)
=============  =========================================================================================================
4              ``MPB1``: the format and its version
1              kind: 1 batch, 2 piece, 3 hello
4              which key has signed: the beginning of a hash of it
8, 8, 8        origin, incarnation, ``first``
4              batch: number of messages; piece: 1; hello: 0
8, 8           piece: its offset in the message, and the length of the whole message; else 0
8 each         a message: bytes of its topic, bytes of its payload (of this piece)
...            the topics, then the payloads
32             HMAC-SHA256 of the stream's name and all before
=============  =========================================================================================================
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

Payload = bytes | bytearray | memoryview
Message = tuple[str, Payload]

LEAST: Final = 2048
"""How many bytes an engine's entry must be able to have: for the longest topic, and some of a message."""

_NAME: Final = b"MPB"
_FORMAT: Final = b"1"  # another one with each change of an entry
_MAGIC: Final = _NAME + _FORMAT
_BATCH: Final = 1
_PIECE: Final = 2
_HELLO: Final = 3
_HEAD: Final = struct.Struct("<4sB4s8sQQIQQ")
_MAC: Final = 32
_ROW: Final = 8
_MOST_TOPIC: Final = 1024
_MOST: Final = 1 << 62  # of positions and lengths, so that sums stay within 64 bits


class EntryRefused(Exception):
    """These bytes are no entry that a bridge with one of the keys has written for this stream."""


class OtherFormat(EntryRefused):
    """An entry of a bridge whose version of this package has another format."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A verified entry. A hello has no messages. The payloads are views into the entry's bytes, or a whole message's buffer."""

    origin: bytes
    incarnation: int
    first: int
    messages: list[tuple[str, memoryview]]
    offset: int = 0
    total: int = -1  # of a piece: the length of the whole message

    @property
    def is_piece(self) -> bool:
        return self.total >= 0

    @property
    def end(self) -> tuple[int, int]:
        """The incarnation, and the position behind this entry."""
        return self.incarnation, self.first + len(self.messages)


class Signer:
    """Makes and verifies the entries of one stream.

    :param keys: The first signs; all are accepted, so that keys can be changed on one machine after the other.
    :param stream: The name of the stream, which the signature covers: an entry is good in its own stream only.
    """

    def __init__(self, keys: Sequence[bytes], stream: str) -> None:
        name = stream.encode()
        prefix = b"mpbroadcast bridge %d %b" % (len(name), name)
        self._keys = {_key_id(key): hmac.new(key, prefix, hashlib.sha256) for key in reversed(keys)}
        self._id = _key_id(keys[0])

    def hello(self, origin: bytes, incarnation: int, first: int) -> bytes:
        """Return the entry without a message: what ``origin`` sends next has the position ``first``."""
        return self._signed([_HEAD.pack(_MAGIC, _HELLO, self._id, origin, incarnation, first, 0, 0, 0)])

    def pack(
        self, origin: bytes, incarnation: int, first: int, messages: Sequence[Message], most: int
    ) -> Iterator[tuple[bytes, int]]:
        """Yield entries of at most ``most`` bytes (:data:`LEAST` at the least) with all messages, in order.

        With each comes the position up to which all is in the log once this entry is: in front of a message whose last piece is
        still to come. After an error, messages that are not acknowledged are packed anew, each from its beginning.
        """
        room = most - _HEAD.size - _MAC
        topics: list[bytes] = []
        payloads: list[Payload] = []
        size = 0
        position = first
        for topic, payload in messages:
            name = topic.encode()
            more = _ROW + len(name) + len(payload)
            if topics and size + more > room:
                yield self._batch(origin, incarnation, position, topics, payloads), position + len(topics) - 1
                position += len(topics)
                topics, payloads, size = [], [], 0
            if more > room:
                for entry, is_last in self._pieces(origin, incarnation, position, name, payload, room):
                    yield entry, position if is_last else position - 1
                position += 1
                continue
            topics.append(name)
            payloads.append(payload)
            size += more
        if topics:
            yield self._batch(origin, incarnation, position, topics, payloads), position + len(topics) - 1

    def _batch(self, origin: bytes, incarnation: int, first: int, topics: list[bytes], payloads: list[Payload]) -> bytes:
        count = len(topics)
        head = _HEAD.pack(_MAGIC, _BATCH, self._id, origin, incarnation, first, count, 0, 0)
        table = struct.pack(f"<{2 * count}I", *map(len, topics), *map(len, payloads))
        return self._signed([head, table, *topics, *payloads])

    def _pieces(
        self, origin: bytes, incarnation: int, position: int, topic: bytes, payload: Payload, room: int
    ) -> Iterator[tuple[bytes, bool]]:
        view = memoryview(payload)
        length = room - _ROW - len(topic)
        for offset in range(0, len(view), length):
            piece = view[offset : offset + length]
            head = _HEAD.pack(_MAGIC, _PIECE, self._id, origin, incarnation, position, 1, offset, len(view))
            table = struct.pack("<2I", len(topic), len(piece))
            yield self._signed([head, table, topic, piece]), offset + length >= len(view)

    def _signed(self, parts: list[bytes | bytearray | memoryview]) -> bytes:
        mac = self._keys[self._id].copy()
        body = b"".join(parts)
        mac.update(body)
        return body + mac.digest()

    def open(self, data: bytes) -> Entry:
        """Return what is in an entry.

        :raises EntryRefused: for all that no bridge with one of the keys has written for this stream.
        """
        if len(data) < _HEAD.size + _MAC:
            raise EntryRefused("too short for an entry")
        magic, kind, key_id, origin, incarnation, first, count, offset, total = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            if magic.startswith(_NAME) and magic.isalnum():
                form = magic[len(_NAME) :].decode()
                raise OtherFormat(
                    f"it has format {form} of entries, and this bridge {_FORMAT.decode()}: install the same version of "
                    "mpbroadcast on all machines of this stream"
                )
            raise EntryRefused("it does not begin as an entry of a bridge does")
        key = self._keys.get(key_id)
        if key is None:
            raise EntryRefused("signed with a key that this bridge does not have")
        view = memoryview(data)
        mac = key.copy()
        mac.update(view[:-_MAC])
        if not hmac.compare_digest(mac.digest(), view[-_MAC:]):
            raise EntryRefused("the signature is wrong")
        body = view[_HEAD.size : -_MAC]
        if not (0 < first < _MOST and incarnation < _MOST and offset < _MOST and total < _MOST):
            raise EntryRefused("a position or a length is out of range")
        if kind == _HELLO and not (count or offset or total or body):
            return Entry(origin, incarnation, first, [])
        if kind == _BATCH and count and not (offset or total):
            return Entry(origin, incarnation, first, _messages(body, count))
        if kind == _PIECE and count == 1:
            messages = _messages(body, 1)
            if messages[0][1] and offset + len(messages[0][1]) <= total:
                return Entry(origin, incarnation, first, messages, offset, total)
        raise EntryRefused("its fields do not fit together")


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"mpbroadcast bridge key " + key).digest()[:4]


def _messages(body: memoryview, count: int) -> list[tuple[str, memoryview]]:
    if count * _ROW > len(body):
        raise EntryRefused("it is shorter than its table")
    lengths = struct.unpack_from(f"<{2 * count}I", body)
    if count * _ROW + sum(lengths) != len(body):
        raise EntryRefused("its length is not that of its messages")
    index = count * _ROW
    names = []
    topics: dict[bytes, str] = {}  # those of a batch are few
    for length in lengths[:count]:
        name = bytes(body[index : index + length])
        index += length
        topic = topics.get(name)
        if topic is None:
            topic = topics[name] = _topic(name)
        names.append(topic)
    payloads = []
    for length in lengths[count:]:
        payloads.append(body[index : index + length])
        index += length
    return list(zip(names, payloads, strict=True))


def _topic(name: bytes) -> str:
    if len(name) > _MOST_TOPIC or b"\0" in name:
        raise EntryRefused("no message can have such a topic")
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise EntryRefused("no message can have such a topic") from None


@dataclass(slots=True)
class _Partial:
    """A message of which not all pieces have come."""

    mark: tuple[int, int]  # incarnation, position
    cursor: str  # where reading must begin again to have all of its pieces
    total: int
    topic: str
    since: float
    data: bytearray = field(default_factory=bytearray)


class Assembler:
    """Puts pieces together, in the order of the log, among the entries of all origins. There is a new one for each
    :meth:`Engine.seek`, as what is read then may begin with any piece.

    It keeps one message of each origin, the newest: an origin sends the pieces of one after the other, and again from the first
    one if it is not sure. What an origin does not complete within ``patience`` seconds, it never will (it is gone, or sends
    all again); and no more than ``most`` origins are in the midst of one.

    :param own: The origin of this bus, whose entries are skipped.
    :param cursor: The position behind which reading begins.
    """

    def __init__(self, own: bytes, cursor: str, *, patience: float = 120.0, most: int = 64) -> None:
        self._own = own
        self._last = cursor
        self._patience = patience
        self._most = most
        self._partial: dict[bytes, _Partial] = {}  # of each origin, the oldest first

    @property
    def cursor(self) -> str:
        """The position behind which a bridge that starts anew must begin: all before has been returned."""
        return next(iter(self._partial.values())).cursor if self._partial else self._last

    def put(self, position: str, entry: Entry | None, now: float) -> Entry | None:
        """Take the next entry, ``None`` for one that was refused, and return what is to be routed, if anything.

        :param now: Seconds of a monotonic clock.
        """
        before, self._last = self._last, position
        for origin in [*self._partial]:
            if now - self._partial[origin].since > self._patience:
                del self._partial[origin]
        if entry is None or entry.origin == self._own:
            return None
        partial = self._partial.get(entry.origin)
        if not entry.is_piece:
            if partial and entry.end > partial.mark:  # its position has passed
                del self._partial[entry.origin]
            return entry
        mark = (entry.incarnation, entry.first)
        if partial and partial.mark > mark:
            return None  # a copy of an old one
        ((topic, piece),) = entry.messages
        if not partial or (partial.mark, partial.total, partial.topic) != (mark, entry.total, topic):
            self._partial.pop(entry.origin, None)
            if entry.offset:
                return None  # its beginning is gone
            if len(self._partial) >= self._most:
                del self._partial[next(iter(self._partial))]
            partial = self._partial[entry.origin] = _Partial(mark, before, entry.total, topic, now)
        if entry.offset <= len(partial.data):  # else one in between is missing
            partial.since = now
            partial.data += piece[len(partial.data) - entry.offset :]
        if len(partial.data) < partial.total:
            return None
        del self._partial[entry.origin]
        return Entry(entry.origin, entry.incarnation, entry.first, [(topic, memoryview(partial.data).toreadonly())])
