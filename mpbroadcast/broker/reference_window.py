"""The shared memory that the reader of a pipe was given, and how much of it is unread.

References into a ring follow the ring itself: its memory is sent on the socket beside the pipe, an offer is written into the
pipe, and the reader answers on the socket that it has mapped it. All of the references that it has not read lie within a part
of the ring, as the chunks in between cannot be written again.
"""

from __future__ import annotations

import contextlib
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.broker.core.ring_holds import Unread
from mpbroadcast.broker.memory import Memory, Ring, RingHold
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.protocol.fd_packets import MEMORY, RING, pack
from mpbroadcast.protocol.ring_allocator import CHUNK
from mpbroadcast.protocol.runs import RING_GONE, RING_OFFERED, Run

_MOST_UNREAD: Final = 64  # messages in memory of their own, each with a descriptor on its way
_MOST_OFFERS: Final = 4  # rings that were sent and are not mapped: no limit of the system counts what is on its way
_PART: Final = 2  # of a ring, 1/2: in it lie the references that one pipe may have unread


class ReferenceWindow:
    """Of one pipe, with the socket beside it."""

    def __init__(self, fd_socket: DescriptorSocket) -> None:
        self.fd_socket = fd_socket
        self.unread: Unread[RingHold] = Unread()
        self.rings: dict[Ring, bool | None] = {}  # whether each is mapped; None: it is not, and nothing waits for that
        self.received = 0  # packets from its reader
        self.moved = 0  # bytes that its reader has read, or made room for in the pipe
        self.copies_until = 0  # until ``moved`` is this, its reader gets copies, as what waited was copied
        self.notes: list[tuple[int, int]] = []  # kinds and ids, to be written between two runs
        self._unanswered: set[int] = set()  # the ids of rings that were sent, and that no answer has come to
        self._sent = 0  # the last message whose memory was sent

    def offer(self, ring: Ring) -> None:
        self.rings[ring] = None
        if len(self._unanswered) < _MOST_OFFERS:
            with contextlib.suppress(OSError):
                if self.fd_socket.send_packet(pack(RING, ring.id), ring.descriptor.fd):
                    self.rings[ring] = False
                    self._unanswered.add(ring.id)
                    self.notes.append((RING_OFFERED, ring.id))

    def answered(self, id: int, *, mapped: bool) -> None:
        """Note that the reader has mapped the ring of this id, or cannot."""
        if id in self._unanswered:
            self._unanswered.remove(id)
            for ring in self.rings:
                if ring.id == id:
                    self.rings[ring] = True if mapped else None

    def retire(self, ring: Ring) -> None:
        """Note that no later run refers to this ring."""
        if self.rings.pop(ring, None) is not None or ring.id in self._unanswered:
            self.notes.append((RING_GONE, ring.id))

    # --- what a pipe gets

    def prepare(self, hold: Memory | RingHold, most: int) -> bool | None:
        """Return whether the reader has all that it needs for this; ``None`` if it must read, or answer, before that.

        The reader must read first when more than ``most`` bytes are unread.
        """
        if self.unread.bytes > most:
            return None
        if hold.ring is None:
            return self._send_memory(hold)
        mapped = self.rings.get(hold.ring)
        if not mapped:
            return None if mapped is False else False
        oldest = self.unread.oldest(hold.ring)
        return True if oldest is None or hold.position - oldest <= hold.ring.size // _PART else None

    def _send_memory(self, memory: Memory) -> bool | None:
        if self._sent == memory.id:
            return True
        if self.unread.memories >= _MOST_UNREAD:
            return None
        packet = pack(MEMORY, 0, memory.id)
        with contextlib.suppress(OSError):  # the reader is gone, or too many descriptors are on their way already
            if memory.descriptor is not None and self.fd_socket.send_packet(packet, memory.descriptor.fd):
                self._sent = memory.id
                trap_points.reach("sent memory")
                return True
        return False

    @property
    def expects_packet(self) -> bool:
        """True if a packet will come from the reader, if it goes on reading: an answer, or how much it has read."""
        return self.unread.bytes > 2 * CHUNK or self.unread.memories > 0 or bool(self._unanswered)

    def wrote(self, run: Run) -> None:
        """Note that a run that was prepared is in the pipe."""
        self.unread.wrote(run.count, run.charge, None if run.hold.ring is None else run.hold)

    def has_read(self, count: int) -> None:
        """Note that the reader has read so many, of all references and memories that were ever written."""
        before = self.unread.bytes
        self.unread.read(count)
        self.moved += before - self.unread.bytes

    @property
    def must_be_read(self) -> bool:
        return any(not hold.ring.retired for hold in self.unread.holds())
