"""A publisher's ring in the publisher: memory that it alone writes, and that the broker and every subscriber read.

A message is copied, then announced by a frame in the pipe. A message that is written here and never announced does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpbroadcast import trap_points
from mpbroadcast.posix.descriptors import on_fork
from mpbroadcast.posix.pipes import write
from mpbroadcast.posix.shared_memory import Map, populate
from mpbroadcast.protocol.frames import plain_reference, reference_frame
from mpbroadcast.protocol.pickling import Payload
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS, LONGEST, RingAllocator, aligned, span


class Ring:
    """The memory of a ring. ``id`` is the publisher's. A child unmaps it at a fork."""

    def __init__(self, id: int, memory: Map) -> None:
        self.id = id
        self.allocator = RingAllocator(CHUNKS, CHUNK)
        self._memory = memory
        self._view = memoryview(memory)
        self._populated = 0  # a bit for each chunk
        on_fork(self, Ring.close)

    def put(self, parts: Sequence[Any], size: int, topic: bytes, pipe: int, image: bool) -> bool | None:
        """Copy and announce a message, if it fits into chunks that were written before and into the pipe. Return True if so.

        Return ``None`` if no such chunk is known to be free. A message whose announcement was interrupted keeps its part of the
        ring: it may have been announced. One that finds the pipe full leaves its part to the next message.

        :raises OSError: the pipe is closed, at either end.
        """
        allocator = self.allocator
        start = allocator.next
        if start + size > allocator.end:
            taken = allocator.take(size, self._populated) if size <= LONGEST else None
            if taken is None:
                return None
            start = taken
        position = start
        allocator.next = aligned(start + size)
        for part in parts:
            end = position + len(part)
            self._view[position:end] = part
            position = end
        if topic or image:
            frame = reference_frame(self.id, start, size, topic, 0, image)
        else:
            frame = plain_reference(self.id, start, size)
        try:
            write(pipe, frame)
            return True
        except BlockingIOError:
            allocator.next = start
            return False

    def copy(self, start: int, payload: Payload) -> bool:
        """Copy a message to this part of the ring. Return False if the system has no memory for it."""
        for chunk in span(start, payload.size, CHUNK):
            if not self._populated >> chunk & 1:
                trap_points.reach("populating a ring")
                if not populate(self._memory, chunk * CHUNK, CHUNK):
                    return False
                self._populated |= 1 << chunk
        for part in payload.parts:
            end = start + len(part)
            self._view[start:end] = part
            start = end
        return True

    def close(self) -> None:
        self._view.release()
        self._memory.close()
