"""A publisher's ring: memory that it alone writes, and from which every subscriber reads.

It is divided into chunks. A message takes room behind the one before it, over the ends of chunks where the next ones are free,
or from the beginning of free ones. The broker says which chunks are free again: it alone knows who has read what. What is
written here and never announced does not exist.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.wire.descriptors import on_fork
from mpbroadcast.wire.frames import plain_reference, reference_frame
from mpbroadcast.wire.memory import populate

CHUNK: Final = 1 << 18  # bytes
CHUNKS: Final = 64
LONGEST: Final = 1 << 21  # bytes of a message: a longer one gets memory of its own
_ALIGNMENT: Final = 64


class Room:
    """Which part of a ring is taken, as its publisher knows. Pure.

    From ``next`` to ``end`` is what is left of the chunk that is written last.
    """

    def __init__(self, chunks: int, chunk: int) -> None:
        self.free = (1 << chunks) - 1  # a bit for each chunk; the broker says when one is free again
        self.next = self.end = 0
        self._chunk = chunk
        self._before = (0, 0, 0)  # next and end before the last take(), and the chunks that it has taken

    def fits_behind(self, length: int) -> bool:
        """Whether :meth:`take` would not begin another chunk."""
        return self.next + length <= self.end

    def take(self, length: int) -> int | None:
        """A position with room for so many bytes, or ``None`` when there is none."""
        size = self._chunk
        start = self.next
        first, last = self.end // size, (start + length - 1) // size  # the chunks that it takes, besides the one it begins in
        wanted = ((1 << (last + 1)) - 1) & ~((1 << first) - 1)
        if self.free & wanted == wanted:
            return self._taken(start, length, wanted)
        count = -(-length // size)
        runs = self.free  # in the end, a bit for each chunk with which so many free ones begin
        for _ in range(count - 1):
            runs &= runs >> 1
        if not runs:
            return None
        # The first, not the next: what was used a moment ago is in the processor's cache.
        first = (runs & -runs).bit_length() - 1
        return self._taken(first * size, length, ((1 << count) - 1) << first)

    def _taken(self, start: int, length: int, chunks: int) -> int:
        behind = aligned(start + length)
        end = -(-(start + length) // self._chunk) * self._chunk if chunks else self.end
        # No call from here on, so that an interrupt finds all of it or nothing.
        self._before = (self.next, self.end, chunks)
        self.free &= ~chunks
        self.next, self.end = behind, end
        return start

    def undo(self) -> None:
        """Give back what the last :meth:`take` has taken; once."""
        self.next, self.end, chunks = self._before
        self.free |= chunks
        self._before = (self.next, self.end, 0)


def aligned(position: int) -> int:
    """The first position from there on where a message may begin."""
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def span(offset: int, length: int, chunk: int) -> range:
    """The chunks that a message is in."""
    return range(offset // chunk, (offset + length - 1) // chunk + 1)


class Ring:
    """The memory, in its publisher; ``number`` is the publisher's for it. A child lets go of it at a fork."""

    def __init__(self, number: int, memory: mmap.mmap) -> None:
        self.number = number
        self.room = Room(CHUNKS, CHUNK)
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
