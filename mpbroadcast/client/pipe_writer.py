"""The way of a handle's messages to one broker: a pipe, and shared memory beside it.

No lock is held while the pipe is waited for. A frame is at most ``PIPE_BUF`` bytes, which the pipe takes whole or not at all; a
longer message is pieces with its number. So threads, and signal handlers in the middle of a publish, write as they come, and
the broker puts together what belongs together.

A message that should not go through the pipe goes in the publisher's ring, or in memory of its own. The pipe gets a small frame
in the place of the message, so the order is the same. Where there is no memory to share, or no room in it for the moment, or a
signal handler publishes while its own thread is just here, the message goes through the pipe.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
import time
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.client.broker_client import CONNECT_TIMEOUT, BrokerClient, Session, for_reply
from mpbroadcast.client.ring import Ring
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import TimedOut
from mpbroadcast.posix import locks
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.memory_pool import MemoryPool
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.posix.shared_memory import available, keep_freed_memory, ring_memory
from mpbroadcast.protocol.fd_packets import ACCEPTED, FREE, MEMORY, NONE, REFUSED, RING, ROUTED, WANTED, pack, unpack
from mpbroadcast.protocol.frames import IMAGE, PIPE_BUF, abort, frame_head, memory_frame, pieces, reference_frame
from mpbroadcast.protocol.pickling import Payload
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS, LONGEST

SHARED_FROM: Final = 2048  # bytes of a message from which on it goes this way
MEMORY_FROM: Final = 1 << 18  # bytes from which on memory of its own is better than the pipe
_PATIENCE: Final = 1.0  # seconds to wait for a free chunk, or for the answer that there will be none
_AGAIN: Final = 1.0  # seconds from one try to get a ring to the next
_MOST_UNROUTED: Final = 8  # messages in memory of their own that the broker has not routed yet
_MOST_BYTES: Final = 64 << 20  # in those, unless it is a single one
_ASKING: Final = CONNECT_TIMEOUT + 1.0  # seconds that the question for the socket may take
_SLICE: Final = 0.05  # seconds: another thread may have heard what this one waits for
_TURN: Final = 0.25  # seconds from one try to send what finalisers could not to the next
_NOT_IN_TIME: Final = (
    "it was not published in time, as the pipe to the broker is full: either a subscriber that would get a message of this "
    "handle has a full backlog (in stats(), it has this process among its `stalls`), or the broker has not read yet what was "
    "published before. Wait longer, or let that subscriber receive faster"
)

_numbers: Final = itertools.count(1)  # of messages that do not go in one write
_ring_numbers: Final = itertools.count(1)


def framed(payload: Payload, way: tuple[bytes, int]) -> bytes:
    """The frame of a message that goes through the pipe; ``way`` is its topic, and the channel that is left out."""
    return b"".join((frame_head(payload.size, *way, IMAGE if payload.image else 0), *payload.parts))


class PipeWriter:
    """A publisher, as it came in ``session``; ``number`` is what the broker calls it, and ``pipe`` its end of the pipe."""

    def __init__(self, client: BrokerClient, session: Session, pipe: PipeEnd, number: int) -> None:
        self._client = client
        self.session = session
        self.pipe = pipe
        self.number = number
        self._unsaid: list[int] = []  # messages that were given up, and whose abort frames had no room in the pipe
        self._fd_socket: DescriptorSocket | None = None  # what shared memory is agreed on through
        self._not_before = 0.0 if available() else float("inf")  # when to ask for it
        self._inside: set[int] = set()  # threads that publish in shared memory: a signal's handler in one uses the pipe
        self._lock = locks.lock()
        self._ring: Ring | None = None
        self._offered: Ring | None = None
        self._heard: list[bytes] = []  # what the broker has said, and is still to be handled
        self._no_ring_before = 0.0
        self._dry = False  # no chunk was free for all of the time that it waited
        self._unrouted: dict[int, int] = {}  # bytes of each message in memory of its own
        self.pool = MemoryPool()

    def send_quickly(self, payload: bytes, topic: bytes) -> bool:
        """Publish a message where nothing more is needed than room in the ring and the pipe; whether it went.

        :raises OSError: this end of the pipe, or the other, is closed.
        """
        ring, inside = self._ring, self._inside
        if ring is None or inside:
            return False
        me = threading.get_ident()
        try:
            inside.add(me)
            with self._lock:
                return ring.put(payload, topic, self.pipe.fd)
        finally:
            inside.discard(me)

    def publish(self, payload: Payload, way: tuple[bytes, int], deadline: Deadline, done: list[int]) -> None:
        """Send one message of any length; put a number into ``done`` when it went.

        :raises TimedOut: it was not sent, and never will be.
        :raises OSError: this end of the pipe, or the other, is closed.
        """
        if payload.size < SHARED_FROM or not self._share(payload, way, deadline, done):
            self.send(framed(payload, way), deadline, done)

    # --- the pipe

    def send(self, frame: bytes, deadline: Deadline, done: list[int]) -> None:
        """Send one frame of any length, or several that fit into one write together; put a number into ``done`` when it went.

        :raises TimedOut: it was not sent, and never will be.
        :raises OSError: this end or the other is closed.
        """
        if len(frame) <= PIPE_BUF:
            self.write(frame, deadline, done)
            return
        number = next(_numbers)
        gone: list[int] = []
        try:
            last = b""
            for piece in pieces(frame, number):
                if last:
                    self.write(last, deadline, gone)
                last = piece
            trap_points.reach("sending the last piece")
            self.write(last, deadline, done)
        except BaseException:
            # If the last piece has gone after all, the broker does not know the number any more, and nothing happens.
            self.give_up(number)
            raise

    def give_up(self, number: int) -> None:
        """The rest of this message will not come: send an abort frame, now or before the next :meth:`write`.

        Until then the broker keeps, and counts, what it has of the message.
        """
        self._unsaid.append(number)
        with contextlib.suppress(OSError):
            self._abort()

    def _abort(self) -> None:
        """Send the abort frames that are due.

        :raises BlockingIOError: the pipe has no room.
        """
        while self._unsaid:
            number = self._unsaid[-1]
            os.write(self.pipe.fd, abort(number))
            with contextlib.suppress(ValueError):  # another thread has sent it, too, which does no harm
                self._unsaid.remove(number)

    def write(self, data: bytes, deadline: Deadline, done: list[int]) -> None:
        """Write what is one write, when there is room for it; put a number into ``done`` when it went.

        :raises TimedOut: it did not.
        :raises OSError: this end or the other is closed.
        """
        while True:
            # It waits outside of the handler, so that an interrupt does not show an error that is none. What has gone is in
            # ``done`` in the same step: an interrupt comes before or after.
            with contextlib.suppress(BlockingIOError):
                if self._unsaid:
                    self._abort()
                done.extend(map(os.write, (self.pipe.fd,), (data,)))
                return
            self.wait(deadline)

    def wait(self, deadline: Deadline) -> None:
        """Wait until the pipe may have room.

        :raises TimedOut: it did not in time.
        """
        trap_points.reach("waiting for room", self.pipe.fd)
        while not self.pipe.wait(select.POLLOUT, deadline.at_most(_TURN)):
            if deadline.remaining() == 0:
                raise TimedOut(_NOT_IN_TIME)
            self._client.send_notes()

    # --- shared memory

    def _share(self, payload: Payload, way: tuple[bytes, int], deadline: Deadline, done: list[int]) -> bool:
        """Publish it in shared memory, or return ``False`` when it must go through the pipe."""
        me = threading.get_ident()
        if me in self._inside:
            return False
        try:
            self._inside.add(me)
            fd_socket = self._fd_socket or self._begin(deadline)
            if fd_socket is None:
                return False
            if payload.size <= LONGEST and self._through_ring(fd_socket, payload, way, deadline, done):
                return True
            return payload.size >= MEMORY_FROM and self._in_memory(fd_socket, payload, way, deadline, done)
        finally:
            self._inside.discard(me)

    def _begin(self, deadline: Deadline) -> DescriptorSocket | None:
        now = time.monotonic()
        if now < self._not_before:
            return None
        self._not_before = now + _ASKING  # no call since it was looked at, so only one thread comes here
        with contextlib.suppress(OSError):  # no descriptor is left, here or in the broker
            answer = self._client.request(
                "fd_socket", session=self.session, publisher=self.number, deadline=for_reply(deadline)
            )
            self._fd_socket = answer.fd_socket
        self._not_before = time.monotonic() + _AGAIN
        return self._fd_socket

    def _receive(self, fd_socket: DescriptorSocket) -> bool:
        """Take in what the broker has said; ``False`` when it is gone. Under the lock."""
        self.pool.rest()
        heard = self._heard
        while True:
            while heard:
                self._handle(heard[0])  # and if an interrupt comes, once more
                del heard[0]
            try:
                heard.extend(map(fd_socket.recv, (64,)))
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not heard[0]:
                heard.clear()
                return False

    def _handle(self, data: bytes) -> None:
        kind, number, value = unpack(data)
        ring, offered = self._ring, self._offered
        if kind == FREE and ring is not None and number == ring.number:
            ring.room.free |= value
            self._dry = False
        elif kind == NONE and ring is not None and number == ring.number:
            self._dry = True
        elif kind == ROUTED:
            self._unrouted.pop(value, None)
        elif kind == ACCEPTED and offered is not None and number == offered.number:
            self._ring, self._offered = offered, None
            keep_freed_memory()
            self._dry = False
        elif kind == REFUSED and offered is not None and number == offered.number:
            self._offered = None

    # --- the ring

    def _through_ring(
        self, fd_socket: DescriptorSocket, payload: Payload, way: tuple[bytes, int], deadline: Deadline, done: list[int]
    ) -> bool:
        before = len(done)
        patience: Deadline | None = None
        while True:
            with self._lock:
                dry = self._put(fd_socket, payload, way, done)
                if dry and (self._ring is None or self._dry):
                    self._offer(fd_socket)
                    return False
            if len(done) > before:
                return True
            if not dry:
                self.wait(deadline)
                continue
            # Wait for a chunk, but not for long, and not again until one has come.
            if patience is None:
                patience = deadline.at_most(_PATIENCE)
                with contextlib.suppress(OSError):
                    fd_socket.send_packet(pack(WANTED))
            left = patience.remaining()
            if not left:
                self._dry = True
                return False
            fd_socket.wait(left)

    def _put(self, fd_socket: DescriptorSocket, payload: Payload, way: tuple[bytes, int], done: list[int]) -> bool:
        """Copy and announce it, if there is room, which ``done`` tells; whether it was the ring that had none."""
        ring = self._ring
        if ring is None or not ring.room.fits_behind(payload.size):
            self._receive(fd_socket)
            ring = self._ring
        before = len(done)
        start = ring.room.take(payload.size) if ring is not None else None
        if ring is None or start is None:
            return True
        try:
            if not ring.has(start, payload.size):
                return True
            ring.write(start, payload.parts)
            frame = reference_frame(ring.number, start, payload.size, *way, payload.image)
            with contextlib.suppress(BlockingIOError):
                done.extend(map(os.write, (self.pipe.fd,), (frame,)))
        finally:
            if not done[before:]:
                ring.room.undo()
        return False

    def _offer(self, fd_socket: DescriptorSocket) -> None:
        """Make a ring, and send it to the broker; it is used once that has accepted it."""
        now = time.monotonic()
        if self._offered is not None or now < self._no_ring_before:
            return
        self._no_ring_before = now + _AGAIN
        with contextlib.suppress(OSError):  # no memory or no descriptor is left
            number = next(_ring_numbers)
            descriptor, memory = ring_memory(CHUNK * CHUNKS)
            self._offered = Ring(number, memory)
            if fd_socket.send_packet(pack(RING, number, CHUNK), descriptor.fd):
                return
        self._offered = None

    # --- memory of its own

    def _in_memory(
        self, fd_socket: DescriptorSocket, payload: Payload, way: tuple[bytes, int], deadline: Deadline, done: list[int]
    ) -> bool:
        self.wait(deadline)  # else much memory could be filled in vain
        before = len(done)
        number = next(_numbers)
        try:
            if not self._wait_for_credit(fd_socket, number, payload.size, deadline):
                return False
            trap_points.reach("filling memory")
            try:
                descriptor = self.pool.memory(payload.parts, payload.size)
                if not fd_socket.send_packet(pack(MEMORY, 0, number), descriptor.fd):
                    return False
            except OSError:  # no memory or no descriptor is left
                return False
            trap_points.reach("publishing memory")
            descriptor.close()
            self.write(memory_frame(number, payload.size, *way, payload.image), deadline, done)
            return True
        finally:
            if not done[before:] and number in self._unrouted:  # no call up to here, so no interrupt
                del self._unrouted[number]
                self.give_up(number)

    def _wait_for_credit(self, fd_socket: DescriptorSocket, number: int, size: int, deadline: Deadline) -> bool:
        """Take the credit for this message; ``False`` when the broker is gone."""
        while True:
            with self._lock:
                there = self._receive(fd_socket)
                unrouted = self._unrouted.values()
                if there and (not unrouted or (len(unrouted) < _MOST_UNROUTED and sum(unrouted) + size <= _MOST_BYTES)):
                    self._unrouted[number] = size  # under the same lock, as other threads look for credit, too
                    return True
            if not there:
                return False
            if deadline.remaining() == 0:
                raise TimedOut(_NOT_IN_TIME)
            fd_socket.wait(deadline.at_most(_SLICE).remaining() or 0)
            self._client.send_notes()
