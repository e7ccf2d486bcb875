"""Which part of a publisher's ring is taken. Pure: no memory and no descriptor.

A ring is divided into chunks. A message gets room behind the one before it, across the ends of chunks where the next ones are
free, or from the beginning of free ones. The broker reports which chunks are free again.
"""

from __future__ import annotations

from typing import Final

CHUNK: Final = 1 << 18  # bytes
CHUNKS: Final = 64
LONGEST: Final = 1 << 21  # bytes of a message: a longer one gets memory of its own
_ALIGNMENT: Final = 64


class RingAllocator:
    """The parts of a ring that are taken, in its publisher.

    From ``next`` to ``end`` is the rest of the chunk that was written last.
    """

    def __init__(self, chunks: int, chunk: int) -> None:
        self.free = (1 << chunks) - 1  # a bit for each chunk; the broker reports those that are free again
        self.next = self.end = 0
        self._chunk = chunk
        self._before = (0, 0, 0)  # next and end before the last take(), and the chunks that it has taken

    def take(self, length: int, among: int = -1) -> int | None:
        """Take room for so many bytes. Return its position, or ``None`` when there is none.

        Beyond the chunk that was written last, it lies in chunks ``among`` these, a bit for each.
        """
        size, free = self._chunk, self.free & among
        start = self.next
        first, last = self.end // size, (start + length - 1) // size  # the chunks that it takes, besides the one it begins in
        wanted = ((1 << (last + 1)) - 1) & ~((1 << first) - 1)
        if free & wanted == wanted:
            return self._taken(start, length, wanted)
        count = -(-length // size)
        runs = free  # in the end, a bit for each chunk with which so many free ones begin
        for _ in range(count - 1):
            runs &= runs >> 1
        if not runs:
            return None
        # The first, not the next: a chunk that was just read is in the processor's cache.
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
        """Free what the last :meth:`take` has taken; once."""
        self.next, self.end, chunks = self._before
        self.free |= chunks
        self._before = (self.next, self.end, 0)


def aligned(position: int) -> int:
    """Return the first position from there on at which a message may begin."""
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def span(offset: int, length: int, chunk: int) -> range:
    """Return the chunks that a message is in."""
    return range(offset // chunk, (offset + length - 1) // chunk + 1)
