"""A publisher's ring: memory that it alone writes, and from which every subscriber reads.

What is written here and never announced does not exist.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

from mpbroadcast import trap_points
from mpbroadcast.posix.forks import on_fork
from mpbroadcast.posix.shared_memory import populate
from mpbroadcast.protocol.frames import plain_reference, reference_frame
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS, RingAllocator, aligned, span


class Ring:
    """The memory, in its publisher; ``number`` is the publisher's for it. A child lets go of it at a fork."""

    def __init__(self, number: int, memory: mmap.mmap) -> None:
        self.number = number
        self.room = RingAllocator(CHUNKS, CHUNK)
        self._memory = memory
        self._view = memoryview(memory)
        self._there = 0  # a bit for each chunk that has got its memory
        on_fork(self, Ring.close)

    def put(self, payload: bytes, topic: bytes, pipe: int) -> bool:
        """Copy and announce a message in one go, if it fits behind the one before it, and into the pipe.

        What an interrupt keeps from being announced stays taken: nobody knows whether it was.

        :raises OSError: the pipe is closed, at either end.
        """
        room = self.room
        start = room.next
        length = len(payload)
        if start + length > room.end:
            return False
        room.next = aligned(start + length)
        self._view[start : start + length] = payload
        frame = reference_frame(self.number, start, length, topic) if topic else plain_reference(self.number, start, length)
        try:
            os.write(pipe, frame)
            return True
        except BlockingIOError:
            room.next = start
            return False

    def has(self, start: int, length: int) -> bool:
        """Whether the system has memory for what is to be written there."""
        for chunk in span(start, length, CHUNK):
            if not self._there >> chunk & 1:
                trap_points.reach("populating a ring")
                if not populate(self._memory, chunk * CHUNK, CHUNK):
                    return False
                self._there |= 1 << chunk
        return True

    def write(self, start: int, parts: Sequence[Any]) -> None:
        """Put the parts of a message there, one behind the other."""
        view = self._view
        for part in parts:
            end = start + len(part)
            view[start:end] = part
            start = end

    def close(self) -> None:
        """Unmap it, unless that has been done."""
        self._view.release()
        self._memory.close()
