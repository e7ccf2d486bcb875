"""Packets on the descriptor socket beside a pipe. Sans-IO: bytes in, bytes out.

A packet has 16 bytes: kind u8, 3 unused, ring u32, value u64. Some carry a descriptor. Both ends send without blocking.
A descriptor is sent before the frame or run that needs it is written into the pipe, so it is there when that is read.
"""

from __future__ import annotations

from struct import Struct, error
from typing import Final

# From a publisher to the broker, and from the broker to a channel.
RING: Final = 1  # with the memory of ring ``ring``, by the sender's id; from a publisher, ``value`` is the bytes of a chunk
MEMORY: Final = 6  # with the memory of message ``value``, whose frame or run comes in the pipe
# Back.
REFUSED: Final = 3  # the ring cannot be mapped
ACCEPTED: Final = 2  # the broker has mapped the ring: the publisher may write references into it
MAPPED: Final = 8  # the channel has mapped the ring: the broker may write references into it
# From the broker to a publisher.
FREE: Final = 4  # chunks of the ring are free again; ``value`` has a bit for each
NONE: Final = 10  # no chunk of the ring will be free soon: readers that have stopped keep them
ROUTED: Final = 7  # message ``value`` is routed: its memory does not count against the publisher any more
# To the broker.
WANTED: Final = 5  # the publisher waits for a free chunk
READ: Final = 9  # the channel has read ``value`` messages in shared memory so far

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
