"""Who still reads what in a ring. Pure: it has no descriptor and no clock.

A chunk is free again when the publisher has gone on to another, all messages in it are routed, and each reference to it that
was written into the pipe of a living subscription has been read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

R = TypeVar("R")


class Holds:
    """How many there are on each chunk of a ring."""

    def __init__(self, chunks: int) -> None:
        self._counts = [0] * chunks
        self._used = 0  # a bit for each chunk that is not free
        self._current = -1  # the chunk that the publisher has written to last

    @property
    def held(self) -> int:
        """Chunks with a hold on them."""
        return sum(map(bool, self._counts))

    def arrived(self, chunks: Sequence[int]) -> int:
        """Messages in these chunks have come, in this order; each has one more hold. The chunks that are free now, as bits."""
        before, self._current = self._current, chunks[-1]
        for chunk in chunks:
            self._counts[chunk] += 1
            self._used |= 1 << chunk
        return self._freed((before,)) if before >= 0 else 0

    def hold(self, chunks: Iterable[int]) -> None:
        """One more on each."""
        for chunk in chunks:
            self._counts[chunk] += 1

    def release(self, chunks: Iterable[int]) -> int:
        """One less on each: the chunks that are free now, as bits."""
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


class Unread(Generic[R]):
    """What one pipe has been given references to, until that has been read: in order, of all rings."""

    def __init__(self) -> None:
        self.bytes = 0
        self.count = 0  # of all that were ever written
        self.memories = 0  # of those that are unread, the messages in memory of their own
        self._entries: deque[tuple[int, R, Sequence[int], int, int]] = deque()  # count behind it, ring, chunks, place, bytes

    def __len__(self) -> int:
        return len(self._entries)

    def wrote(self, count: int, size: int, ring: R, chunks: Sequence[int] = (), place: int = 0) -> None:
        """So many references were, to messages of ``size`` bytes in all."""
        self.count += count
        self.bytes += size
        self.memories += ring is None
        self._entries.append((self.count, ring, chunks, place, size))

    @property
    def first(self) -> R | None:
        """The ring of the first that is unread."""
        return self._entries[0][1] if self._entries else None

    def rings(self) -> Iterator[R]:
        """Of all that are unread."""
        return (ring for _, ring, _, _, _ in self._entries)

    def oldest(self, ring: R) -> int | None:
        """The place of the first that is unread in this ring."""
        return next((place for _, of, _, place, _ in self._entries if of is ring), None)

    def read(self, count: int) -> list[tuple[R, Sequence[int]]]:
        """Of all that were ever written, so many have been read: which rings and chunks have a hold less."""
        done = []
        while self._entries and self._entries[0][0] <= count:
            _, ring, chunks, _, size = self._entries.popleft()
            self.bytes -= size
            self.memories -= ring is None
            done.append((ring, chunks))
        return done
