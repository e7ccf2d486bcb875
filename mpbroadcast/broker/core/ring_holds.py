"""Which parts of a ring must stay as they are. Pure: it has no descriptor and no clock.

A chunk is free again when the publisher has gone on to another, all messages in it are routed, no backlog has them any more,
and each reference to it that was written into the pipe of a living subscription has been read.

Each message lies in the ring. A chunk is written forward only: until it is free again, no message lies before the end of an
earlier one. So what one read of a publisher's pipe refers to is never more than the ring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

LOOKS: Final = 10  # at a ring whose publisher waits for a chunk, before a reader under `block` is taken for a slow one
_QUICK: Final = 10 << 20  # bytes that a quick reader reads in the time of so many looks, through its pipe alone


def is_copied_for(*, blocks: bool, looks: int, moved: int) -> bool:
    """Return whether what waits for a reader is copied out of a ring, as no chunk has come free in so many ``looks``.

    Not for one under ``block``, which loses nothing by waiting, before the last look, nor then if it is quick: it has read, or
    made room for, ``moved`` bytes meanwhile.
    """
    return not blocks or (looks >= LOOKS and moved < _QUICK)


class Misplaced(Exception):
    """A message lies outside of the ring, or before the end of an earlier one: no publisher of this package writes so."""


class Holds:
    """The holds on each chunk of a ring that has ``chunks`` chunks of ``size`` bytes."""

    def __init__(self, chunks: int, size: int) -> None:
        self._size = size
        self._whole = chunks * size
        self._counts = [0] * chunks
        self._ends = [0] * chunks  # in each that is used, of the last message
        self._used = 0  # a bit for each chunk that is not free
        self._current = -1  # the chunk that the publisher has written to last

    @property
    def held(self) -> int:
        """Chunks with a hold on them."""
        return sum(map(bool, self._counts))

    def arrived(self, spans: Iterable[tuple[int, int]]) -> tuple[Sequence[int], int]:
        """Enter messages at these offsets, with their lengths, and add a hold to each of their chunks.

        Return these chunks, and the chunks that are free now, as bits.

        :raises Misplaced: a message is not in the ring, or lies before the end of an earlier one.
        """
        size, whole, ends, used = self._size, self._whole, self._ends, self._used
        chunks: dict[int, None] = {}
        last = -1
        behind = limit = 0  # the end of the message before, and of its chunk
        for offset, length in spans:
            end = offset + length
            if behind <= offset < end <= limit:  # nearly always: behind that one, in the same chunk
                behind = ends[last] = end
                continue
            if not 0 < length <= whole - offset:
                raise Misplaced(f"a reference to {length} bytes at offset {offset}, outside of the ring of {whole} bytes")
            first, last = offset // size, (end - 1) // size
            for chunk in range(first, last + 1):
                if used >> chunk & 1 and offset < ends[chunk]:
                    raise Misplaced(f"a reference to {length} bytes at offset {offset}, before the end of an earlier message")
                used |= 1 << chunk
                ends[chunk] = end
                chunks[chunk] = None
            behind, limit = end, (last + 1) * size
        before, self._current, self._used = self._current, last, used
        self.hold(chunks)
        return tuple(chunks), self._freed((before,)) if before >= 0 else 0

    def hold(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            self._counts[chunk] += 1

    def release(self, chunks: Iterable[int]) -> int:
        """Remove a hold from each of these chunks. Return those that are free now, as bits."""
        for chunk in chunks:
            self._counts[chunk] -= 1
        return self._freed(chunks)

    def _freed(self, chunks: Iterable[int]) -> int:
        freed = 0
        for chunk in chunks:
            if not self._counts[chunk] and chunk != self._current:
                freed |= self._used & (1 << chunk)
        self._used &= ~freed
        return freed


class Hold(Protocol):
    """Keeps chunks of ``ring`` from being freed while it exists; ``position`` is how much had come in that ring then."""

    ring: Any
    position: int


H = TypeVar("H", bound=Hold)


class Unread(Generic[H]):
    """The references that were written into one pipe and are unread: in order, of all rings.

    A message in memory of its own is an entry without a hold.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.count = 0  # of all that were ever written
        self.memories = 0  # of those that are unread, the messages in memory of their own
        self._entries: deque[tuple[int, H | None, int]] = deque()  # count behind it, hold, bytes

    def wrote(self, count: int, size: int, hold: H | None) -> None:
        """Enter ``count`` references that were written, to messages of ``size`` bytes in all."""
        self.count += count
        self.bytes += size
        self.memories += hold is None
        self._entries.append((self.count, hold, size))

    def holds(self) -> Iterator[H]:
        return (hold for _, hold, _ in self._entries if hold is not None)

    def oldest(self, ring: object) -> int | None:
        """Return the position of the first that is unread in this ring."""
        for _, hold, _ in self._entries:
            if hold is not None and hold.ring is ring:
                return hold.position
        return None

    def read(self, count: int) -> None:
        """Forget the holds of the first ``count`` references that were ever written, as they have been read."""
        while self._entries and self._entries[0][0] <= count:
            _, hold, size = self._entries.popleft()
            self.bytes -= size
            self.memories -= hold is None
