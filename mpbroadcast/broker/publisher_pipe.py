"""The read end of a publisher's pipe: what is read, and how far."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from mpbroadcast.posix.pipes import readv, unread
from mpbroadcast.protocol.frames import Splitter


class PublisherPipe:
    """A pipe that is read into ``buffer``, which all publishers use in turn.

    ``barriers`` are positions that no read goes beyond, each with what is to be called when all before it is routed.
    """

    def __init__(self, fd: int, buffer: memoryview) -> None:
        self.fd = fd  # -1 once it is closed
        self.position = 0  # bytes read so far
        self.barriers: deque[tuple[int, Callable[[], None]]] = deque()
        self.splitter = Splitter()
        self._buffer = buffer

    def read(self, limit: int | None = None) -> bytes:
        """Return what is there, but nothing behind the next barrier; nothing when all writers are gone.

        :raises BlockingIOError: nothing is there.
        """
        if self.barriers:
            end = self.barriers[0][0] - self.position
            limit = end if limit is None else min(limit, end)
        buffer = self._buffer
        # Not os.read: memory for the most that may come would be mapped and unmapped each time.
        return bytes(buffer[: readv(self.fd, (buffer if limit is None else buffer[:limit],))])

    def passed(self) -> Iterator[Callable[[], None]]:
        """Return what belongs to the barriers that are reached, and forget these."""
        while self.barriers and self.barriers[0][0] <= self.position:
            yield self.barriers.popleft()[1]

    def end_of_written(self) -> int:
        """Return the position behind all that has been written until now."""
        return self.position + (unread(self.fd) if self.fd >= 0 else 0)

    def closed(self) -> int:
        """Forget what is not complete, and the descriptor. Return it: the caller closes it."""
        fd, self.fd = self.fd, -1
        self.splitter = Splitter()
        return fd
