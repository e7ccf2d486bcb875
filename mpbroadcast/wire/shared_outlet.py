"""How a handle publishes what should not go through the pipe: in its ring, or in memory of the message's own.

The pipe gets a small frame in the place of the message, so the order is the same. Where there is no memory to share, or no
room in it for the moment, or a signal handler publishes while its own thread is just here, the message goes through the pipe.

The lock is held while something is copied and announced, never while the pipe is waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.arguments import Deadline
from mpbroadcast.wire.descriptors import DescriptorSocket
from mpbroadcast.wire.frames import memory_frame, reference_frame
from mpbroadcast.wire.link import CONNECT_TIMEOUT, send_notes
from mpbroadcast.wire.memory import available, keep_freed_memory, ring_memory
from mpbroadcast.wire.outlet import Outlet
from mpbroadcast.wire.packets import ACCEPTED, FREE, MEMORY, NONE, REFUSED, RING, ROUTED, WANTED, pack, unpack
from mpbroadcast.wire.payload import Payload
from mpbroadcast.wire.pool import MemoryPool
from mpbroadcast.wire.ring import CHUNK, CHUNKS, LONGEST, Ring

SHARED_FROM: Final = 2048  # bytes of a message from which on it goes this way
MEMORY_FROM: Final = 1 << 18  # bytes from which on memory of its own is better than the pipe
_PATIENCE: Final = 1.0  # seconds to wait for a free chunk, or for the answer that there will be none
_AGAIN: Final = 1.0  # seconds from one try to get a ring to the next
_MOST_UNROUTED: Final = 8  # messages in memory of their own that the broker has not routed yet
_MOST_BYTES: Final = 64 << 20  # in those, unless it is a single one
_ASKING: Final = CONNECT_TIMEOUT + 1.0  # seconds that the question for the socket may take
_WANTED: Final = pack(WANTED)
_SLICE: Final = 0.05  # seconds: another thread may have heard what this one waits for

_ring_numbers: Final = itertools.count(1)


class SharedOutlet:
    """The way through shared memory beside an ``outlet``; ``ask`` asks the broker for the socket that it needs."""

    def __init__(self, outlet: Outlet, ask: Callable[[Deadline], DescriptorSocket | None]) -> None:
        self._outlet = outlet
        self._ask = ask
        self._beside: DescriptorSocket | None = None
        self._not_before = 0.0 if available() else float("inf")  # when to ask for it
        self._lock = threading.Lock()
        self._holder = 0  # the thread that has it
        self._ring: Ring | None = None
        self._offered: Ring | None = None
        self._heard: list[bytes] = []  # what the broker has said, and is still to be handled
        self._in_between: set[int] = set()  # threads that have a message in memory of its own on the way
        self._no_ring_before = 0.0
        self._dry = False  # no chunk was free for all of the time that it waited
        self._unrouted: dict[int, int] = {}  # bytes of each message in memory of its own
        self._pool = MemoryPool()

    def send_quickly(self, payload: bytes) -> bool:
        """Publish a message without a topic, where nothing more is needed than room in the ring and the pipe; whether it went.

        :raises OSError: this end of the pipe, or the other, is closed.
        """
        ring = self._ring
        if ring is None or self._holder:
            return False
        me = threading.get_ident()
        with self._lock:
            self._holder = me  # no call before it, so that no signal's handler comes in between
            try:
                return ring.put(payload, self._outlet.pipe.fd)
            finally:
                self._holder = 0

    def send(self, payload: Payload, topic: bytes, exclude: int, deadline: Deadline, done: list[int]) -> bool:
        """Publish it, or return ``False`` when it must go through the pipe; put a number into ``done`` when it went.

        :raises TimedOut: it was not sent, and never will be.
        :raises OSError: this end of the pipe, or the other, is closed.
        """
        beside = self._beside or self._begin(deadline)
        if beside is None:
            return False
        if payload.size <= LONGEST and self._through_ring(beside, payload, topic, exclude, deadline, done):
            return True
        return payload.size >= MEMORY_FROM and self._in_memory(beside, payload, topic, exclude, deadline, done)

    def rest(self) -> None:
        """There is a moment to let go of what is not needed any more."""
        self._pool.rest()

    def _begin(self, deadline: Deadline) -> DescriptorSocket | None:
        now = time.monotonic()
        if now < self._not_before:
            return None
        self._not_before = now + _ASKING  # no call since it was looked at, so only one thread comes here
        with contextlib.suppress(OSError):  # no descriptor is left, here or in the broker
            self._beside = self._ask(deadline)
        self._not_before = time.monotonic() + _AGAIN
        return self._beside

    def _hear(self, beside: DescriptorSocket) -> bool:
        """Take in what the broker has said; ``False`` when it is gone. Under the lock."""
        self._pool.rest()
        heard = self._heard
        while True:
            while heard:
                self._handle(heard[0])  # and if an interrupt comes, once more
                del heard[0]
            try:
                heard.extend(map(beside.recv, (64,)))
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
            ring.room.is_free(value)
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
        self, beside: DescriptorSocket, payload: Payload, topic: bytes, exclude: int, deadline: Deadline, done: list[int]
    ) -> bool:
        me = threading.get_ident()
        if self._holder == me:
            return False
        before = len(done)
        patience: Deadline | None = None
        while True:
            with self._lock:
                self._holder = me
                try:
                    dry = self._put(beside, payload, topic, exclude, done)
                    if dry and (self._ring is None or self._dry):
                        self._offer(beside)
                        return False
                finally:
                    self._holder = 0
            if len(done) > before:
                return True
            if not dry:
                self._outlet.wait(deadline)
                continue
            # Wait for a chunk, but not for long, and not again until one has come.
            if patience is None:
                patience = Deadline(_PATIENCE)
                with contextlib.suppress(OSError):
                    beside.tell(_WANTED)
            left = deadline.left()
            seconds = patience.left() or 0
            if not seconds or left == 0:
                self._dry = True
                return False
            beside.wait(seconds if left is None else min(seconds, left))

    def _put(self, beside: DescriptorSocket, payload: Payload, topic: bytes, exclude: int, done: list[int]) -> bool:
        """Copy and announce it, if there is room, which ``done`` tells; whether it was the ring that had none."""
        ring = self._ring
        if ring is None or not ring.room.fits_behind(payload.size):
            self._hear(beside)
            ring = self._ring
            if ring is None:
                return True
        before = len(done)
        start = ring.room.take(payload.size)
        if start is None:
            return True
        try:
            if not ring.has(start, payload.size):
                return True
            ring.write(start, payload.parts)
            frame = reference_frame(ring.number, start, payload.size, topic, exclude, payload.image)
            with contextlib.suppress(BlockingIOError):
                done.extend(map(os.write, (self._outlet.pipe.fd,), (frame,)))
        finally:
            if len(done) == before:
                ring.room.undo()
        return False

    def _offer(self, beside: DescriptorSocket) -> None:
        """Make a ring, and send it to the broker; it is used once that has accepted it."""
        now = time.monotonic()
        if self._offered is not None or now < self._no_ring_before:
            return
        self._no_ring_before = now + _AGAIN
        with contextlib.suppress(OSError):  # no memory or no descriptor is left
            number = next(_ring_numbers)
            descriptor, memory = ring_memory(CHUNK * CHUNKS)
            self._offered = Ring(number, memory)
            if beside.tell(pack(RING, number, CHUNK), descriptor.fd):
                return
        self._offered = None

    # --- memory of its own

    def _in_memory(
        self, beside: DescriptorSocket, payload: Payload, topic: bytes, exclude: int, deadline: Deadline, done: list[int]
    ) -> bool:
        me = threading.get_ident()
        if self._holder == me or me in self._in_between:
            return False  # a signal handler that has interrupted a publish: that one's credit would never come back
        outlet = self._outlet
        outlet.wait(deadline)  # else much memory could be filled in vain
        before = len(done)
        number = outlet.new_number()
        try:
            self._in_between.add(me)
            if not self._wait_for_credit(beside, payload.size, deadline):
                return False
            try:
                descriptor = self._pool.memory(payload.parts, payload.size)
                self._unrouted[number] = payload.size
                if not beside.tell(pack(MEMORY, 0, number), descriptor.fd):
                    return False
            except OSError:  # no memory or no descriptor is left
                return False
            trap_points.reach("publishing memory")
            descriptor.close()
            outlet.write(memory_frame(number, payload.size, topic, exclude, payload.image), deadline, done)
            return True
        finally:
            if len(done) == before and self._unrouted.pop(number, None) is not None:
                outlet.give_up(number)
            self._in_between.discard(me)

    def _wait_for_credit(self, beside: DescriptorSocket, size: int, deadline: Deadline) -> bool:
        me = threading.get_ident()
        while True:
            with self._lock:
                self._holder = me
                try:
                    there = self._hear(beside)
                finally:
                    self._holder = 0
            if not there:
                return False
            unrouted = list(self._unrouted.values())
            if not unrouted or (len(unrouted) < _MOST_UNROUTED and sum(unrouted) + size <= _MOST_BYTES):
                return True
            left = deadline.left()
            if left == 0:
                raise self._outlet.not_in_time()
            beside.wait(_SLICE if left is None else min(_SLICE, left))
            send_notes()
