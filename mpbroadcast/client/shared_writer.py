"""Publishing through shared memory: the publisher's ring, or memory of a message's own.

- The pipe gets a small frame at the position of the message, so the order is that of the pipe. For the broker, memory that
  no frame announces does not exist.
- Messages of up to ``LONGEST`` bytes are copied into the ring. The ring is offered to the broker through the descriptor socket,
  and used once that has accepted it. When no chunk is free, the publisher asks for one and waits a second at most, or until the
  broker sends that there will be none. Then it uses the pipe or memory of its own until a chunk is free, and offers a new ring.
- Longer ones, and those that the ring has no room for, get memory of their own, sent before the frame. The broker's
  acknowledgement, when it has routed the message, bounds how much of that is on its way.
- The message goes through the pipe where there is no shared memory, where there is no room for the moment and it is short, and
  in a signal handler that interrupts its own thread here. So no lock is waited for by the thread that holds it.
- The lock is held for the ring and the packets, never while something is waited for. The same holds for the note of a thread
  in ``_inside``: while a task waits, its thread publishes as if the task were not there.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import threading
import time
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, TypeVar

from mpbroadcast import trap_points
from mpbroadcast.client.broker_client import CONNECT_TIMEOUT, LEAST_TIME, BrokerClient, Session
from mpbroadcast.client.pipe_writer import NOT_IN_TIME, PipeWriter, Route, framed, message_ids
from mpbroadcast.client.ring import Ring
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import TimedOut
from mpbroadcast.posix import locks
from mpbroadcast.posix.descriptors import pause_fork_lock
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.memory_pool import MemoryPool
from mpbroadcast.posix.pipes import PipeEnd, write
from mpbroadcast.posix.shared_memory import available, keep_freed_memory, ring_memory
from mpbroadcast.posix.waiting import Steps, Wait, run
from mpbroadcast.protocol.fd_packets import ACCEPTED, FREE, MEMORY, NONE, REFUSED, RING, ROUTED, WANTED, pack, unpack
from mpbroadcast.protocol.frames import memory_frame, reference_frame
from mpbroadcast.protocol.pickling import Payload
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS, LONGEST

SHARED_FROM: Final = 2048  # bytes of a message from which on shared memory is better than the pipe
MEMORY_FROM: Final = 1 << 18  # bytes from which on memory of its own is better than the pipe
_CHUNK_PATIENCE: Final = 1.0  # seconds to wait for a free chunk, or for the packet that there will be none
_RETRY: Final = 1.0  # seconds from one try to get a ring, or the socket, to the next
_SOCKET_PATIENCE: Final = CONNECT_TIMEOUT + 1.0  # seconds that the request for the socket may take
_MOST_UNROUTED: Final = 8  # messages in memory of their own that the broker has not routed yet
_MOST_UNROUTED_BYTES: Final = 64 << 20  # in those, unless it is a single one
_SLICE: Final = 0.05  # seconds to wait for a packet, which another thread may have received

T = TypeVar("T")

_ring_ids: Final = itertools.count(1)


class _Outcome(Enum):
    """Of an attempt to publish in the ring."""

    ANNOUNCED = "published"
    PIPE_FULL = "not published: the pipe has no room for the frame"
    NO_CHUNK = "not published: the broker has accepted no ring, or no chunk of it is free"
    NO_MEMORY = "not published: the system has no memory for the chunk"


class SharedWriter(PipeWriter):
    """A publisher's writer: its pipe, and the shared memory beside it."""

    def __init__(self, client: BrokerClient, session: Session, pipe: PipeEnd, id: int) -> None:
        super().__init__(client, session, pipe, id)
        self._fd_socket: DescriptorSocket | None = None
        self._no_socket_before = 0.0 if available() else float("inf")
        self._inside: set[int] = set()  # threads that publish in shared memory: a signal handler in one uses the pipe
        self._lock = locks.lock()
        self._ring: Ring | None = None  # accepted by the broker
        self._offered: Ring | None = None
        self._packets: list[bytes] = []  # received, and not handled yet
        self._no_ring_before = 0.0
        self._is_dry = False  # True from when a chunk was waited for in vain, or the broker sent NONE, until one is free
        self._unrouted: dict[int, int] = {}  # bytes of each message in memory of its own
        self.pool = MemoryPool()

    def send_quickly(self, parts: Sequence[Any], size: int, topic: bytes, image: bool) -> bool:
        """Publish a message if the ring and the pipe have room. Return True if they had. Raise as :meth:`Ring.put`."""
        inside = self._inside
        if self._ring is None or inside:
            return False
        me = threading.get_ident()
        try:
            inside.add(me)
            with self._lock:  # under which another thread may have gone over to another ring since
                sent = self._ring.put(parts, size, topic, self.pipe.fd, image)
                if sent is None and size <= LONGEST and self._fd_socket is not None:
                    # In another chunk, which the complete path would find, too, but 1 µs later: 4 % of the CPU for 250 KB.
                    done: list[int] = []
                    self._put(self._fd_socket, Payload(parts, size, image), (topic, 0), done)
                    sent = bool(done)
                return bool(sent)
        finally:
            inside.discard(me)

    def publish(self, payload: Payload, route: Route, deadline: Deadline, done: list[int]) -> None:
        """Send one message of any length; else as :meth:`write`."""
        if payload.size < SHARED_FROM:
            self.send(framed(payload, route), deadline, done)
        else:
            run(self.publishing(payload, route, deadline, done))

    def publishing(self, payload: Payload, route: Route, deadline: Deadline, done: list[int]) -> Steps[None]:
        """Do as :meth:`publish`."""
        if payload.size < SHARED_FROM or not (yield from self._sharing(payload, route, deadline, done)):
            yield from self.sending(framed(payload, route), deadline, done)

    def _sharing(self, payload: Payload, route: Route, deadline: Deadline, done: list[int]) -> Steps[bool]:
        """Publish a message in shared memory. Return False if it must go through the pipe."""
        me = threading.get_ident()
        if me in self._inside:
            return False
        try:
            self._inside.add(me)
            fd_socket = self._fd_socket or (yield from self._outside(self._requesting_socket(deadline)))
            if fd_socket is None:
                return False
            if payload.size <= LONGEST and (yield from self._through_ring(fd_socket, payload, route, deadline, done)):
                return True
            if payload.size < MEMORY_FROM:
                return False
            return (yield from self._in_memory(fd_socket, payload, route, deadline, done))
        finally:
            self._inside.discard(me)

    def _outside(self, steps: Steps[T]) -> Steps[T]:
        """Go through ``steps``, with which a signal handler or another task of this thread does not interfere."""
        me = threading.get_ident()
        try:
            self._inside.discard(me)
            return (yield from steps)
        finally:
            self._inside.add(me)

    def _requesting_socket(self, deadline: Deadline) -> Steps[DescriptorSocket | None]:
        now = time.monotonic()
        with self._lock:  # so that a single thread sends the request, also without the GIL
            if now < self._no_socket_before:
                return None
            self._no_socket_before = now + _SOCKET_PATIENCE
        with contextlib.suppress(OSError):  # no descriptor is left, here or in the broker
            deadline = deadline.at_least(LEAST_TIME)
            client, publisher = self._client, self.id
            reply = yield from client.requesting("fd_socket", session=self.session, publisher=publisher, deadline=deadline)
            self._fd_socket = reply.fd_socket
        self._no_socket_before = time.monotonic() + _RETRY
        return self._fd_socket

    def _receive(self, fd_socket: DescriptorSocket) -> bool:
        """Handle the packets that have come. Return False if the broker is gone. The caller holds the lock."""
        self.pool.rest()
        packets = self._packets
        while True:
            while packets:
                self._handle(packets[0])  # and once more, if an interrupt comes before it is deleted
                del packets[0]
            try:
                packets.extend(map(fd_socket.recv, (64,)))
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not packets[0]:
                packets.clear()
                return False

    def _handle(self, data: bytes) -> None:
        """Act on a packet of the broker. The caller holds the lock."""
        kind, ring_id, value = unpack(data)
        ring, offered = self._ring, self._offered
        if kind == ROUTED:
            self._unrouted.pop(value, None)
        elif ring is not None and ring_id == ring.id:
            if kind == FREE:
                ring.allocator.free |= value
                self._is_dry = False
            elif kind == NONE:
                self._is_dry = True
        elif offered is not None and ring_id == offered.id:
            if kind == ACCEPTED:
                self._ring, self._offered = offered, None
                keep_freed_memory()
                self._is_dry = False
            elif kind == REFUSED:
                self._offered = None

    # --- the ring

    def _through_ring(
        self, fd_socket: DescriptorSocket, payload: Payload, route: Route, deadline: Deadline, done: list[int]
    ) -> Steps[bool]:
        """Publish a message in the ring: wait until the pipe has room. Return False if the message must go another route."""
        patience: Deadline | None = None
        while True:
            with self._lock:
                outcome = self._put(fd_socket, payload, route, done)
                if outcome is _Outcome.NO_CHUNK and (self._ring is None or self._is_dry):
                    self._offer(fd_socket)
                    return False
            if outcome is _Outcome.ANNOUNCED:
                return True
            if outcome is _Outcome.NO_MEMORY:
                return False
            if outcome is _Outcome.PIPE_FULL:
                yield from self._outside(self.waiting(deadline))
                continue
            # Wait for a chunk, but not for long, and not again until one is free.
            if patience is None:
                patience = deadline.at_most(_CHUNK_PATIENCE)
                with contextlib.suppress(OSError):
                    fd_socket.send_packet(pack(WANTED))
            if not patience.remaining():
                self._is_dry = True
                return False
            yield from self._outside(_waiting(fd_socket, patience))

    def _put(self, fd_socket: DescriptorSocket, payload: Payload, route: Route, done: list[int]) -> _Outcome:
        """Copy a message into the ring, and announce it if the pipe has room. The caller holds the lock."""
        ring = self._ring
        before = len(done)
        start = None if ring is None else ring.allocator.take(payload.size)
        if start is None:  # not for each chunk, as it takes as long as to copy 32 KiB
            self._receive(fd_socket)
            ring = self._ring
            start = None if ring is None else ring.allocator.take(payload.size)
        if ring is None or start is None:
            return _Outcome.NO_CHUNK
        try:
            if not ring.copy(start, payload):
                return _Outcome.NO_MEMORY
            frame = reference_frame(ring.id, start, payload.size, *route, payload.image)
            with contextlib.suppress(BlockingIOError):
                done.extend(map(write, (self.pipe.fd,), (frame,)))
        finally:
            if not done[before:]:
                ring.allocator.undo()
        return _Outcome.ANNOUNCED if done[before:] else _Outcome.PIPE_FULL

    def _offer(self, fd_socket: DescriptorSocket) -> None:
        """Make a ring, and send it to the broker. The caller holds the lock."""
        now = time.monotonic()
        if self._offered is not None or now < self._no_ring_before:
            return
        self._no_ring_before = now + _RETRY
        with contextlib.suppress(OSError):  # no memory or no descriptor is left
            ring_id = next(_ring_ids)
            descriptor, memory = ring_memory(CHUNK * CHUNKS)
            self._offered = Ring(ring_id, memory)
            if fd_socket.send_packet(pack(RING, ring_id, CHUNK), descriptor.fd):
                return
        self._offered = None

    # --- memory of its own

    def _in_memory(
        self, fd_socket: DescriptorSocket, payload: Payload, route: Route, deadline: Deadline, done: list[int]
    ) -> Steps[bool]:
        yield from self._outside(self.waiting(deadline))  # else much memory could be filled in vain
        before = len(done)
        message_id = next(message_ids)
        try:
            if not (yield from self._waiting_for_credit(fd_socket, message_id, payload.size, deadline)):
                return False
            trap_points.reach("filling memory")
            try:
                descriptor = self.pool.memory(payload.parts, payload.size)
                if not fd_socket.send_packet(pack(MEMORY, 0, message_id), descriptor.fd):
                    return False
            except OSError:  # no memory or no descriptor is left
                return False
            trap_points.reach("publishing memory")
            descriptor.close()
            frame = memory_frame(message_id, payload.size, *route, payload.image)
            yield from self._outside(self.writing(frame, deadline, done))
            return True
        finally:
            if not done[before:] and message_id in self._unrouted:  # no call up to here, so no interrupt
                del self._unrouted[message_id]
                self.due_aborts.append(message_id)  # as above
                self.send_aborts()

    def _waiting_for_credit(self, fd_socket: DescriptorSocket, message_id: int, size: int, deadline: Deadline) -> Steps[bool]:
        """Wait until the message may be sent, and count it. Return False if the broker is gone."""
        while True:
            with self._lock:
                is_connected = self._receive(fd_socket)
                unrouted = self._unrouted.values()
                if is_connected and (
                    not unrouted or (len(unrouted) < _MOST_UNROUTED and sum(unrouted) + size <= _MOST_UNROUTED_BYTES)
                ):
                    self._unrouted[message_id] = size  # under the same lock, as other threads look for credit, too
                    return True
            if not is_connected:
                return False
            if deadline.remaining() == 0:
                raise TimedOut(NOT_IN_TIME)
            yield from self._outside(_waiting(fd_socket, deadline.at_most(_SLICE)))
            self._client.send_notes()
            pause_fork_lock()


def _waiting(fd_socket: DescriptorSocket, deadline: Deadline) -> Steps[None]:
    """Wait until a packet, or the other end's close, comes."""
    yield Wait(deadline, select.POLLIN, fd_socket)
