"""The memory that publishers share: rings, and single messages in memory of their own, as the broker has them.

All that comes from a publisher is checked before it is used, so that nothing in it makes this process, or a subscriber, read
where nothing is.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import resource
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from mpbroadcast import trap_points
from mpbroadcast.broker.core.ring_holds import Holds, Misplaced
from mpbroadcast.posix.descriptors import OwnedDescriptor
from mpbroadcast.posix.fd_socket import DescriptorSocket, Reserve
from mpbroadcast.posix.shared_memory import (
    MemoryRefused,
    check_message,
    check_ring,
    fits,
    map_for_reading,
    read_memory,
)
from mpbroadcast.protocol.fd_packets import ACCEPTED, FREE, MEMORY, REFUSED, RING, WANTED, PacketError, pack, unpack
from mpbroadcast.protocol.frames import MAX_FRAME, Batch, FrameError, MemfdMessage, References
from mpbroadcast.protocol.runs import Account, memory_run, references_run

log = logging.getLogger("mpbroadcast.broker")

_MOST_RINGS: Final = 4  # of one publisher, with those that are only read any more
_MOST_RING_BYTES: Final = 1 << 30  # of all
_MOST_PENDING: Final = 64  # memories whose frames have not come: some threads' with 8 each
_MOST_CHUNKS: Final = 64
_LARGEST_RING: Final = 1 << 24  # bytes: what one read of a pipe may refer to
_SMALLEST_CHUNK: Final = 1 << 12


class Store:
    """All shared memory of the broker, and how much of it there may be."""

    def __init__(self) -> None:
        self.account = Account()  # of all runs but those that refer to rings
        self.rings: set[Ring] = set()
        self.memories = 0  # messages in memory of their own, each with a descriptor
        self.ids = itertools.count(1)  # of rings and messages
        self.reserve = Reserve()  # so that a descriptor can be received when none is left
        self.most_memories = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


class Ring:
    """A publisher's ring; ``name`` is the publisher's id for it, ``id`` the one that channels get."""

    def __init__(self, store: Store, lender: Lender, name: int, descriptor: OwnedDescriptor, chunk: int) -> None:
        size = check_ring(descriptor.fd)
        chunks = size // chunk if chunk >= _SMALLEST_CHUNK else 0
        if not 1 <= chunks <= _MOST_CHUNKS or size % chunk or size > _LARGEST_RING:
            raise MemoryRefused(f"a ring of {size} bytes in chunks of {chunk}")
        self.id = next(store.ids)
        self.name = name
        self.size = size
        self.descriptor = descriptor
        self.position = 0  # bytes that have come in it so far
        self.account = Account()  # of the runs that refer to it
        self.copies = store.account  # of those that were copied out of it
        self.freed = 0  # how often chunks have become free
        self.readers: set[Any] = set()  # the subscriptions to which it was offered
        self.retired = False  # no later message is in it
        self._users = 0  # holds that exist
        self._lender = lender
        self._chunk = chunk
        self._holds = Holds(chunks, chunk)
        self.view = map_for_reading(descriptor.fd, size)

    def arrived(self, references: References) -> RingHold:
        """Return the hold on the chunks of messages that have come.

        :raises FrameError: they are not in the ring, or lie over earlier ones.
        """
        try:
            chunks, freed = self._holds.arrived(references.positions())
        except Misplaced as error:
            raise FrameError(str(error)) from None
        self.position += sum(references.sizes) - len(references.sizes) * references.skip
        self._users += 1
        self._report(freed)
        return RingHold(self, chunks)

    @property
    def held(self) -> int:
        """Bytes of the chunks that are held, or of the runs that refer to them, if that is more."""
        return max(self._holds.held * self._chunk, self.account.held)

    def release(self, chunks: Sequence[int]) -> None:
        """Note that a hold on these is gone."""
        self._users -= 1
        self._report(self._holds.release(chunks))

    def retire(self) -> None:
        """Release the map, as nothing is read from it here any more. Readers have maps of their own."""
        self.retired = True
        self.view.release()
        self.descriptor.close()
        self._report(0)

    def _report(self, freed: int) -> None:
        if self.retired:
            if not self._users:
                self._lender.forget(self)
        elif freed:
            self.freed += 1
            self._lender.send(pack(FREE, self.name, freed))


class RingHold:
    """Keeps chunks of a ring from being written again while it exists: in items, runs, and what a pipe has unread."""

    __slots__ = ("chunks", "copies", "position", "ring")

    def __init__(self, ring: Ring, chunks: Sequence[int]) -> None:
        self.ring = ring
        self.chunks = chunks
        self.copies = ring.copies
        self.position = ring.position

    def __del__(self) -> None:
        self.ring.release(self.chunks)

    def data(self, references: References, position: int) -> bytes:
        return references_run(references, position, self.ring.id)

    def copied(self, references: References) -> Batch:
        return references.copied(self.ring.view)


class Memory:
    """The memory of one message; or, when no descriptor could be kept for it, its bytes."""

    ring: ClassVar[None] = None  # as a hold, it holds no chunk

    def __init__(self, store: Store, descriptor: OwnedDescriptor, kept: bool) -> None:
        size = check_message(descriptor.fd)
        if size > MAX_FRAME:
            raise MemoryRefused(f"a message of {size} bytes")
        self.id = next(store.ids)
        self.size = size
        self.copies = store.account
        self._store = store
        self._bytes = b"" if kept else read_memory(descriptor.fd, size)
        self.descriptor = descriptor if kept else None
        store.memories += kept

    def data(self, memfd_message: MemfdMessage, position: int) -> bytes:
        return memory_run(memfd_message, position, self.id)

    def copied(self, memfd_message: MemfdMessage) -> Batch:
        return memfd_message.copied(self.read(0, memfd_message.length))

    def read(self, offset: int, size: int) -> bytes:
        if self.descriptor is None:
            return self._bytes[offset : offset + size]
        return read_memory(self.descriptor.fd, size, offset)

    def __del__(self) -> None:
        if getattr(self, "descriptor", None) is not None:
            self._store.memories -= 1


class Lender:
    """The rings and memories that one publisher shares, and its descriptor socket."""

    def __init__(self, store: Store, fd_socket: DescriptorSocket, pid: int) -> None:
        self.fd_socket = fd_socket
        self.current: Ring | None = None  # the ring of the last message that was routed
        self.rings: dict[int, Ring] = {}  # those that it may refer to
        self.wants_chunk = False  # it has found no free chunk
        self.is_watched = False  # a timer will look whether chunks have come free
        self._ring_count = 0  # with those that are only read any more
        self._memories: dict[int, Memory] = {}
        self._store = store
        self._pid = pid
        self._is_closed = False  # nothing more is sent
        self._has_peer = True  # independent of that: the publisher has not closed its end

    def receive(self) -> bool:
        """Receive all packets that have come. Return ``False`` when none will come any more."""
        try:
            more = True
            while more:
                with self._store.reserve.room_for_one() as kept:
                    # In a call of its own, so that no variable keeps a descriptor when the reserve is made again.
                    more = self._receive_one(kept)
            return self._has_peer
        except (OSError, PacketError, MemoryError) as error:
            log.debug("process %d: %s", self._pid, error)
            return False

    def _receive_one(self, kept: bool) -> bool:
        received = self.fd_socket.receive_packet_with_fd()
        if received is None:
            return False
        packet, descriptor = received
        if not packet:
            self._has_peer = False
            return False
        kind, id, value = unpack(packet)
        if kind == RING:
            self._take_ring(id, descriptor if kept else None, value)
        elif kind == WANTED:
            self.wants_chunk = True
        elif kind == MEMORY and descriptor is not None:
            self._take_memory(value, descriptor, kept)
        return True

    def _take_ring(self, name: int, descriptor: OwnedDescriptor | None, chunk: int) -> None:
        answer = REFUSED
        try:
            if descriptor is not None and self._ring_count < _MOST_RINGS and name not in self.rings:
                ring = Ring(self._store, self, name, descriptor, chunk)
                if sum(one.size for one in self._store.rings) + ring.size <= _MOST_RING_BYTES:
                    self.rings[name] = ring
                    self._ring_count += 1
                    self._store.rings.add(ring)
                    answer = ACCEPTED
        except (MemoryRefused, OSError) as error:
            log.warning("the ring of process %d is not used: %s", self._pid, error)
        self.send(pack(answer, name))

    def _take_memory(self, id: int, descriptor: OwnedDescriptor, kept: bool) -> None:
        if len(self._memories) >= _MOST_PENDING:
            raise PacketError("too many messages in memory of their own, without their frames")
        with contextlib.suppress(MemoryRefused):  # then it has not come
            self._memories[id] = Memory(self._store, descriptor, kept and self._store.memories < self._store.most_memories)

    def give_up(self, id: int) -> None:
        """Forget a message that is not published after all."""
        self.receive()
        self._memories.pop(id, None)

    def fetch(self, memfd_message: MemfdMessage) -> MemfdMessage | None:
        """Return the message with its memory; ``None`` if that has not come, or is not what was announced."""
        if memfd_message.id not in self._memories:
            self.receive()
        memory = self._memories.pop(memfd_message.id, None)
        trap_points.reach("fetched memory")
        return None if memory is None or not fits(memfd_message.length, memory.size) else memfd_message._replace(hold=memory)

    def retire(self, ring: Ring) -> None:
        """Read nothing more from a ring here."""
        self.rings.pop(ring.name, None)
        ring.retire()

    def forget(self, ring: Ring) -> None:
        self._store.rings.discard(ring)
        self._ring_count -= 1

    def close(self) -> None:
        """Send nothing more, as what the publisher would write again from now on is not announced, and may still be read."""
        self._is_closed = True
        self._memories.clear()  # what was not announced by now never will be

    def send(self, packet: bytes) -> None:
        if not self._is_closed:
            with contextlib.suppress(OSError):
                self.fd_socket.send_packet(packet)
