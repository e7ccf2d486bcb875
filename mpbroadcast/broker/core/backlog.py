"""The messages that wait for one subscription. Pure: no descriptor and no clock; the broker writes what it returns.

A message is **waiting** until the run that it is in has gone into the pipe, then it is **delivered**; one that was dropped is
**missed**. Published to the subscription is always delivered + missed + waiting.

Against ``capacity`` counts each waiting message's charge (``frames.FRAME_OVERHEAD``), what is unread in the pipe, byte by
byte, and what that refers to in shared memory. Only the kernel knows how much is in the pipe: before a message is dropped, or a
publisher has to wait, the broker asks it and sets :attr:`Backlog.pipe`.

Messages in shared memory wait as others do, and count with all their bytes. Their runs hold them there: once a run is dropped,
or written and read, a chunk of a ring can be written again. What waits is copied out of a ring (:meth:`Backlog.copy_out`) only
when its publisher has no other chunk left.

The classes of the overflow policies are in ``policies.py``.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import ClassVar, Final

from mpbroadcast.protocol.frames import OVERHEAD
from mpbroadcast.protocol.runs import END, GAP, Run, note_run

_WRITE: Final = 1 << 18  # bytes to join for one write at the most: what the pipe can take


class Backlog:
    """At most ``capacity`` of charge; a single message that is larger is accepted when nothing else is there.

    A policy adds :meth:`put`, and the class attributes in which it differs.
    """

    policy: ClassVar[str]
    blocks: ClassVar[bool] = False  # publishers wait for room, so no more is put than fits
    drops: ClassVar[bool] = False  # what waits: then :attr:`pipe` must be set before :meth:`to_write`
    keeps_newest_only: ClassVar[bool] = False  # so it needs a pipe of one page, a replay of one message, and no ring
    policy_while_reserved: ClassVar[str] = ""  # while the channel may never be opened again; "": its own

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.published = 0
        self.delivered = 0
        self.missed = 0
        self.waiting = 0
        self.waiting_charge = 0
        self.departed = 0  # messages, so the index of the first that waits. A replay, put in front, makes it negative
        self.pipe = 0  # bytes in the pipe that are unread, as far as is known
        self.pipe_size = 0  # bytes that an empty pipe takes
        self.referred = 0  # bytes in shared memory that the pipe refers to, and that are unread
        self.ended = False  # an end was put: independent of SubscriptionState.ENDED, which a subscription that departs has, too
        self.overflowed = False  # it has ended itself
        self.runs: deque[Run] = deque()  # read by the pipe, changed here only
        self._offset = 0  # of what is written of the first run
        self._gap = 0  # dropped in front of what waits, and not reported yet
        self._later = 0  # dropped behind a run that is partly in the pipe: they leave when that does

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to write."""
        return not self.runs

    @property
    def charge(self) -> int:
        """The bytes that count against the capacity, as far as is known."""
        return self.waiting_charge + self.pipe + self.referred

    @property
    def entered(self) -> int:
        """How many messages have ever waited here; ``departed`` of them do not any more."""
        return self.departed + self._later + self.waiting

    def takes(self, charge: int) -> bool:
        """True if that much fits without dropping anything, as far as is known."""
        return self.waiting_charge + self.pipe + self.referred + charge <= self.capacity

    def fitting(self, run: Run) -> int:
        """Return how many of the first messages of ``run`` fit without dropping any, as far as is known."""
        room = self.capacity - self.charge
        if run.charge <= room:
            return run.count
        fits = 0
        for size in run.sizes or ():  # no further than what fits: all of a long run may come here once for each message
            room -= size + OVERHEAD
            if room < 0:
                break
            fits += 1
        return fits or int(self.is_clear)

    @property
    def is_clear(self) -> bool:
        """True if nothing else is there, so that a message is accepted that is larger than all of the capacity."""
        return not self.waiting and self.pipe <= 1  # the tail byte of a run whose last message is being handed out

    def put(self, run: Run) -> int:
        """Enqueue a run, by the policy. Return :attr:`entered`, or 0 if all of the run was dropped.

        Under ``block``, no more is put than :meth:`fitting` has returned.
        """
        raise NotImplementedError

    def put_first(self, run: Run) -> int:
        """Enqueue a run in front of all that waits, while nothing is in the pipe. Return how many of its messages were.

        Only its last messages are that fit; none if what would follow them was dropped. The others do not count.
        """
        if self.drops and self.missed:
            return 0
        room, fits = self.capacity - self.charge, 0
        for charge in reversed(run.charges()):
            room -= charge
            if room < 0 and (fits or not self.is_clear):
                break
            fits += 1
        if fits:
            part = run.part(run.count - fits, run.count)
            self.runs.appendleft(part)
            self.published += fits
            self.departed -= fits
            self.waiting += fits
            self.waiting_charge += part.charge
        return fits

    def put_gap_first(self, missed: int, *, is_exact: bool) -> None:
        """Report in front of all that waits, while nothing is in the pipe, that so many messages are missing, or more."""
        self.published += missed
        self.missed += missed
        self.runs.appendleft(note_run(GAP, missed, is_exact=is_exact))

    def put_gap(self) -> None:
        """Report behind all that waits that an unknown number of messages is missing: once, if nothing has come since."""
        self._append_gap(0, is_exact=False)

    def _append_gap(self, missed: int, *, is_exact: bool) -> None:
        """Put a gap behind all that waits. It becomes one with a gap that is the last there, and is not partly in the pipe."""
        last = self.runs[-1] if len(self.runs) > (1 if self._offset else 0) else None
        if last is not None and last.is_gap:
            missed += last.missed
            is_exact &= last.is_exact
            self.runs.pop()
        self.runs.append(note_run(GAP, missed, is_exact=is_exact))

    def end(self) -> None:
        """Put a clean end: nothing is put behind it."""
        if not self.ended:
            self.ended = True
            self.runs.append(note_run(END))

    def discard(self) -> None:
        """Release all that waits."""
        self.runs.clear()

    def take_from(self, other: Backlog) -> None:
        """Take over all that ``other`` has, but for what it dropped in front and has not reported."""
        vars(self).update(vars(other))
        self._gap = 0
        if self.runs and self.runs[0].is_gap and not self._offset:
            self.runs.popleft()

    def _append(self, run: Run) -> None:
        self.runs.append(run)
        self.waiting += run.count
        self.waiting_charge += run.charge

    def _put_fitting(self, run: Run) -> int:
        """Enqueue the first messages, as many as fit. Return how many."""
        if self.takes(run.charge):
            self._append(run)
            return run.count
        fits = self.fitting(run)
        if fits:
            self._append(run.part(0, fits))
        return fits

    def _replace(self, index: int, parts: tuple[Run, ...]) -> None:
        run = self.runs[index]
        del self.runs[index]
        for part in reversed(parts):
            self.runs.insert(index, part)
        self.waiting += sum(part.count for part in parts) - run.count
        self.waiting_charge += sum(part.charge for part in parts) - run.charge

    def _divide(self, index: int, offset: int) -> bool:
        """Make two runs of one, as :meth:`Run.divided`, if that is possible."""
        parts = self.runs[index].divided(offset)
        if parts is None:
            return False
        self.runs[index] = parts[1]
        self.runs.insert(index, parts[0])
        return True

    # --- writing

    @property
    def needs_empty_pipe(self) -> bool:
        """True if nothing may be written before the pipe is empty."""
        return False

    @property
    def is_between_runs(self) -> bool:
        """True if the pipe ends with a whole run."""
        return not self._offset

    def to_write(self) -> bytes | memoryview:
        """Return what comes next in the pipe; nothing if nothing waits."""
        runs = self.runs
        if not runs:
            return b""
        if self._offset:
            return runs[0].rest(self._offset)
        return runs[0].data if len(runs) == 1 else self._joined(_WRITE)

    def _joined(self, limit: int) -> bytes | memoryview:
        """Return the first run, with those behind it that fit into ``limit`` bytes and are in no shared memory."""
        first = self.runs[0]
        total = 0
        parts: list[bytes | memoryview] = []
        for run in self.runs:
            total += run.size
            if parts and (total > limit or first.hold or run.hold):
                break
            parts.append(run.data)
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def wrote(self, size: int) -> None:
        """Note that the pipe has taken ``size`` bytes of :meth:`to_write`."""
        self.pipe += size
        size += self._offset
        runs = self.runs
        while size and (size >= runs[0].size or self._divide(0, size)):
            run = runs.popleft()
            size -= run.size
            self.delivered += run.count
            self.departed += run.count + self._later
            self._later = 0
            self.waiting -= run.count
            self.waiting_charge -= run.charge
        self._offset = size

    def passed_on(self, size: int) -> None:
        """Note that one message of ``size`` bytes has gone into the pipe at once, as nothing waited here and it did fit."""
        self.published += 1
        self.delivered += 1
        self.departed += 1
        self.pipe += size

    # --- one message at a time, for the members of a group

    def head(self) -> list[Run]:
        """Return what comes next for one member of a group: a message alone, or the end, and the notes in front of it.

        Nothing, if only notes are here: they go with the message behind them.
        """
        runs = self.runs
        index = next((index for index, run in enumerate(runs) if not run.is_gap), -1)
        if index < 0:
            return []
        if runs[index].count > 1:
            self._replace(index, tuple(runs[index].singles()))
        return [*islice(runs, index + 1)]

    def take(self, head: list[Run]) -> None:
        """Note that a member has got what :meth:`head` has returned. In its pipe, that counts for the member."""
        self.wrote(sum(run.size for run in head))
        self.pipe = 0

    # --- some messages at a time, for the session of a bridge

    def take_first(self, room: int, *, at_least_one: bool) -> Run | None:
        """Remove the first run and return it: a note, or messages that count ``room`` bytes at the most, or one message.

        ``None`` if nothing is here, or the first message has no room.
        """
        if not self.runs:
            return None
        run = self.runs[0]
        if run.charge > room:
            fits = 0
            for charge in run.charges():
                room -= charge
                if room < 0:
                    break
                fits += 1
            fits = fits or int(at_least_one)
            if not fits:
                return None
            if fits < run.count:
                run = run.part(0, fits)
                self._replace(0, (run, self.runs[0].part(fits, self.runs[0].count)))
        self.wrote(run.size)
        self.pipe = 0
        return run

    @property
    def missing_first(self) -> int:
        """How many messages were dropped in front of all that waits, and are not reported yet."""
        return self._gap + (self.runs[0].missed if self.runs else 0)

    # --- shared memory

    def copy_first(self) -> None:
        """Replace the first run by one with the same messages, in no shared memory."""
        self._replace(0, (self.runs[0].copied(),))

    def refers_to(self, ring: object) -> bool:
        """Return whether references into ``ring`` wait."""
        return any(run.hold is not None and run.hold.ring is ring for run in self.runs)

    def copy_out(self, ring: object) -> int:
        """Copy what waits out of ``ring``. Return how many bytes."""
        copied = 0
        for index, run in enumerate(list(self.runs)):
            if run.hold is not None and run.hold.ring is ring:
                self._replace(index, (run.copied(),))
                copied += run.charge
        return copied
