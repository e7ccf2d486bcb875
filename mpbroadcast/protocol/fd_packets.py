"""What is said on the descriptor socket beside a pipe: packets of one size, some with a descriptor. Sans-IO.

Between a publisher and the broker::

    RING      ->  a ring's memory (descriptor); number: the publisher's for it, value: bytes of a chunk
    ACCEPTED  <-  references into ring ``number`` will be understood
    REFUSED   <-  they will not
    FREE      <-  chunks of ring ``number`` are free again; value: a bit for each
    WANTED    ->  no chunk is free
    NONE      <-  none of ring ``number`` will be soon: readers that have stopped keep them
    MEMORY    ->  the memory of message ``value`` (descriptor), whose frame comes in the pipe
    ROUTED    <-  message ``value`` is on its way: its memory does not count any more

Between the broker and a channel::

    RING      ->  a ring's memory (descriptor); number: the broker's for it
    MAPPED    <-  ring ``number`` is mapped: references may come
    REFUSED   <-  ring ``number`` cannot be mapped
    MEMORY    ->  the memory of message ``value`` (descriptor), whose run comes in the pipe
    READ      <-  ``value`` references have been read so far, of rings and memories
"""

from __future__ import annotations

from struct import Struct, error
from typing import Final, NamedTuple

RING: Final = 1
ACCEPTED: Final = 2
REFUSED: Final = 3
FREE: Final = 4
WANTED: Final = 5
MEMORY: Final = 6
ROUTED: Final = 7
MAPPED: Final = 8
READ: Final = 9
NONE: Final = 10

_PACKET: Final = Struct("<BxxxIQ")


class PacketError(Exception):
    """A packet that no peer of this package sends."""


class Packet(NamedTuple):
    """``kind`` says what ``number`` and ``value`` mean."""

    kind: int
    number: int
    value: int


def pack(kind: int, number: int = 0, value: int = 0) -> bytes:
    """A packet as it travels."""
    return _PACKET.pack(kind, number, value)


def unpack(data: bytes) -> Packet:
    """The packet in ``data``.

    :raises PacketError: it is none.
    """
    try:
        packet = Packet(*_PACKET.unpack(data))
    except error as cause:
        raise PacketError(f"a packet of {len(data)} bytes") from cause
    if not RING <= packet.kind <= NONE:
        raise PacketError(f"a packet of kind {packet.kind}")
    return packet
