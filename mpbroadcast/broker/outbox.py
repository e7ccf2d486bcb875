"""One subscription's backlog. Pure: it has no descriptor and no clock; the loop asks it what to write, and tells it what was.

A message is **waiting** until the whole run that it came in has gone into the pipe, then it is **delivered**. What was
published to the subscription is always delivered + missed + waiting.

What counts against ``capacity`` is each message's charge (``frames.FRAME_OVERHEAD``) from when it was routed until it has been
read from the pipe. How much of the pipe is unread only the kernel knows: the loop asks it, when it matters, and tells
:meth:`Outbox.unread`.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from mpbroadcast.wire.frames import Batch, Run

__all__ = ["Outbox"]

_WRITE: Final = 1 << 18  # bytes to join for one write at the most: what the pipe can take
_PIPE_ENTRIES: Final = 512  # runs in the pipe to remember before asking how many have been read


class Outbox:
    """A backlog of at most ``capacity``; a single message that is larger passes when nothing else is there."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.published = 0
        self.delivered = 0
        self.missed = 0
        self.waiting = 0
        self.waiting_charge = 0
        self.ended = False
        self._runs: deque[Run] = deque()
        self._offset = 0  # of what is written of the first run
        self._written = 0
        self._in_pipe: deque[tuple[int, int]] = deque()  # (where in the stream it ends, charge) of each run
        self._pipe_charge = 0

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self._runs

    @property
    def charge(self) -> int:
        """What counts against the capacity, as far as is known."""
        return self.waiting_charge + self._pipe_charge

    @property
    def wants_unread(self) -> bool:
        """Whether it is time to tell :meth:`unread`, so that what is remembered of the pipe stays small."""
        return len(self._in_pipe) > _PIPE_ENTRIES

    def fitting(self, batch: Batch, charge: int) -> int:
        """How many of the first messages of ``batch`` the backlog takes now, as far as is known."""
        room = self.capacity - self.waiting_charge - self._pipe_charge
        if charge <= room:
            return len(batch.sizes)
        return batch.fitting(room) or (1 if room == self.capacity else 0)

    def put(self, run: Run) -> None:
        """Take what :meth:`fitting` has said it would."""
        self._runs.append(run)
        self.published += run.count
        self.waiting += run.count
        self.waiting_charge += run.charge

    def end(self, run: Run) -> None:
        """Let ``run`` be the last: nothing is put behind it."""
        self.ended = True
        self._runs.append(run)

    def to_write(self) -> bytes | memoryview:
        """What comes next in the pipe; not empty unless :attr:`empty`."""
        runs = self._runs
        first = runs[0].data
        if self._offset:
            return memoryview(first)[self._offset :]
        if len(runs) == 1 or len(first) >= _WRITE:
            return first
        total, parts = 0, []
        for run in runs:
            parts.append(run.data)
            total += len(run.data)
            if total >= _WRITE:
                break
        return b"".join(parts)

    def wrote(self, size: int) -> None:
        """The pipe has taken ``size`` bytes of :meth:`to_write`."""
        self._written += size
        size += self._offset
        runs = self._runs
        start = self._written - size  # where the first run starts in the stream
        while runs and size >= len(runs[0].data):
            run = runs.popleft()
            size -= len(run.data)
            start += len(run.data)
            self.delivered += run.count
            self.waiting -= run.count
            self.waiting_charge -= run.charge
            # Less the tail byte: that stays until all of the run has been handed out, long after it was read.
            self._in_pipe.append((start - 1, run.charge))
            self._pipe_charge += run.charge
        self._offset = size

    def unread(self, size: int) -> None:
        """The pipe holds ``size`` bytes that its reader has not taken yet."""
        read = self._written - size
        pipe = self._in_pipe
        while pipe and pipe[0][0] <= read:
            self._pipe_charge -= pipe.popleft()[1]
