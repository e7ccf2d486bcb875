"""Packets on the descriptor socket beside a pipe. Sans-IO: bytes in, bytes out.

A packet has 16 bytes: kind u8, 3 unused, ring u32, value u64. Some carry a descriptor. Both ends send without blocking.
A descriptor is sent before the frame or run that needs it is written into the pipe, so it is there when that is read.

Between a publisher and the broker::

    RING      ->  the memory (descriptor) of ring ``ring``, the publisher's id for it; value: bytes of a chunk
    ACCEPTED  <-  the broker has mapped the ring: the publisher may write references into it
    REFUSED   <-  the broker cannot map the ring
    FREE      <-  chunks of the ring are free again; value: a bit for each
    WANTED    ->  the publisher waits for a free chunk
    NONE      <-  no chunk of the ring will be free soon: readers that have stopped keep them
    MEMORY    ->  the memory (descriptor) of message ``value``, whose frame comes in the pipe
    ROUTED    <-  message ``value`` is routed: its memory does not count against the publisher any more

Between the broker and a channel::

    RING      ->  the memory (descriptor) of ring ``ring``, the broker's id for it
    MAPPED    <-  the channel has mapped the ring: the broker may write references into it
    REFUSED   <-  the channel cannot map the ring
    MEMORY    ->  the memory (descriptor) of message ``value``, whose run comes in the pipe
    READ      <-  the channel has read ``value`` messages in shared memory so far
"""

from __future__ import annotations

from struct import Struct, error
from typing import Final

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


def pack(kind: int, ring: int = 0, value: int = 0) -> bytes:
    return _PACKET.pack(kind, ring, value)


def unpack(data: bytes) -> tuple[int, int, int]:
    """Return kind, ring and value of the packet in ``data``.

    :raises PacketError: ``data`` is no packet.
    """
    try:
        kind, ring, value = _PACKET.unpack(data)
    except error as cause:
        raise PacketError(f"a packet of {len(data)} bytes") from cause
    if not RING <= kind <= NONE:
        raise PacketError(f"a packet of the unknown kind {kind}")
    return kind, ring, value
