"""One subscription's backlog. Pure: it has no descriptor and no clock; the loop asks it what to write, and tells it what was.

A message is **waiting** until the run that it is in has gone into the pipe, then it is **delivered**; one that was dropped is
**missed**. What was published to the subscription is always delivered + missed + waiting.

Against ``capacity`` counts each waiting message's charge (``frames.FRAME_OVERHEAD``), what is unread in the pipe, byte by
byte, and what that refers to in shared memory. How much is in the pipe only the kernel knows: before a backlog drops something
or lets somebody wait, the loop asks, and tells :attr:`Backlog.pipe`.

Messages in shared memory wait as others do, and count with all their bytes. Their runs keep them there: one that is dropped,
or was written, is forgotten, and lets a chunk of a ring be written again. What waits is copied out of a ring
(:meth:`Backlog.copy_out`) only when its publisher has no other chunk left.

What is in the pipe cannot be dropped, nor what follows a part that is. So a policy that drops writes a run of many messages
only when all of it has room for certain, and else in writes that the pipe takes whole or not at all.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from mpbroadcast.protocol.frames import FRAME_OVERHEAD, PIPE_BUF, Item
from mpbroadcast.protocol.runs import END, GAP, OVERFLOWED, RUN, SKIPPED, Run, SharedRun, note_run

_WRITE: Final = 1 << 18  # bytes to join for one write at the most: what the pipe can take
_DROPPING: Final = ("drop_oldest", "drop_newest", "latest")


class Backlog:
    """A backlog of at most ``capacity``; a single message that is larger passes when nothing else is there.

    ``policy`` says what happens when it is full: see ``arguments.POLICIES``. Under ``block`` the router asks :meth:`fitting`,
    and puts no more; the others take everything, and drop by themselves.
    """

    def __init__(self, capacity: int, policy: str = "block") -> None:
        self.capacity = capacity
        self.policy = policy
        self.published = 0
        self.delivered = 0
        self.missed = 0
        self.waiting = 0
        self.waiting_charge = 0
        self.left = 0  # messages that were put here and are here no more: the position of the first that waits
        self.pipe = 0  # bytes in the pipe that are unread, as far as is known
        self.pipe_size = 0  # bytes that an empty pipe takes
        self.referred = 0  # bytes in shared memory that the pipe refers to, and that are unread
        self.ended = False
        self.overflowed = False  # whether it has ended itself
        self._runs: deque[Run] = deque()
        self._offset = 0  # of what is written of the first run
        self._gap = 0  # dropped in front of what waits, and not said yet
        self._later = 0  # dropped behind a run that is partly in the pipe: they leave when that does

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self._runs and not (self._gap and self.policy == "drop_oldest")

    @property
    def charge(self) -> int:
        """What counts against the capacity, as far as is known."""
        return self.waiting_charge + self.pipe + self.referred

    @property
    def entered(self) -> int:
        """How many messages have come here to wait; ``left`` of them do not any more."""
        return self.left + self._later + self.waiting

    # --- taking

    def takes(self, charge: int) -> bool:
        """Whether it takes that much without dropping anything, as far as is known."""
        return self.waiting_charge + self.pipe + self.referred + charge <= self.capacity

    def fitting(self, item: Item, charge: int) -> int:
        """How many of the first messages of ``item`` it takes without dropping any, as far as is known."""
        if self.takes(charge):
            return len(item.sizes)
        return item.fitting(self.capacity - self.charge) or int(self.clear)

    @property
    def clear(self) -> bool:
        """Whether nothing else is there, so that a message passes that is larger than all of the capacity."""
        return not self.waiting and self.pipe <= 1  # the tail byte of what is being handed out is as good as read

    def put(self, run: Run) -> None:
        """Take a run, by the policy."""
        self.published += run.count
        if self.policy == "latest":
            self._drop(self.waiting_charge)
            self._miss(run.count - 1)
            self._append(run.part(run.count - 1, run.count))
        elif self.policy == "block" or self.takes(run.charge):
            self._append(run)
        elif self.policy == "drop_oldest":
            self._put_over_oldest(run)
        elif self.policy == "drop_newest":
            missed = run.count - self._put_fitting(run)
            if missed:
                self.missed += missed
                self._note_behind(missed)
        else:
            missed = run.count - self._put_fitting(run)
            if missed:
                self.published -= missed - 1  # the one that does not fit ends it; what is behind that comes to nobody
                self.missed += 1
                self.overflowed = True
                self._runs.append(note_run(OVERFLOWED, 1))
                self.end()

    def end(self) -> None:
        """Nothing is put behind this: a clean end."""
        if not self.ended:
            self.ended = True
            self._runs.append(note_run(END))

    def take_over(self, policy: str) -> None:
        """From now on go by this policy; of what was dropped, the reader hears otherwise."""
        if policy != self.policy:
            self.policy, self._gap = policy, 0

    def discard(self) -> None:
        """It is gone, with all that waits."""
        self._runs.clear()

    def _append(self, run: Run) -> None:
        self._runs.append(run)
        self.waiting += run.count
        self.waiting_charge += run.charge

    def _put_fitting(self, run: Run) -> int:
        """Take the first messages, as many as fit: how many."""
        room = self.capacity - self.charge
        fits = 0
        for charge in run.charges():
            room -= charge
            if room < 0:
                break
            fits += 1
        fits = fits or int(self.clear)
        if fits:
            self._append(run.part(0, fits))
        return fits

    def _note_behind(self, missed: int) -> None:
        """That many are dropped behind what waits."""
        last = self._runs[-1] if len(self._runs) > (1 if self._offset else 0) else None
        if last is not None and last.missed:
            missed += last.missed
            self._runs.pop()
        self._runs.append(note_run(GAP, missed))

    # --- dropping the oldest

    def _put_over_oldest(self, run: Run) -> None:
        self._drop(self.charge + run.charge - self.capacity)
        excess = self.charge + run.charge - self.capacity
        first = _covering(run.charges(), excess)
        if first == run.count and self.clear:
            first -= 1
        self._miss(first)
        if first < run.count:
            self._append(run.part(first, run.count))

    def _drop(self, excess: int) -> None:
        """Drop the oldest messages that are not partly in the pipe, until ``excess`` of charge is gone."""
        runs, place = self._runs, 1 if self._offset else 0
        self._unsay(place)
        while excess > 0 and len(runs) > place:
            run = runs[place]
            if run.charge <= excess or run.count == 1:
                excess -= run.charge
                self._replace(place, ())
                self._drop_counted(run.count, place)
            else:
                count = _covering(run.charges(), excess)
                excess = 0
                self._replace(place, (run.part(count, run.count),) if count < run.count else ())
                self._drop_counted(count, place)

    def _drop_counted(self, count: int, place: int) -> None:
        if place:
            self._later += count
        else:
            self.left += count
        self._miss(count)

    def _miss(self, count: int) -> None:
        self.missed += count
        self._gap += count

    def _unsay(self, place: int) -> None:
        """Take a note of what was dropped back from where it was put to be written."""
        if len(self._runs) > place and self._runs[place].missed:
            self._gap += self._runs[place].missed
            del self._runs[place]

    def _replace(self, place: int, parts: tuple[Run, ...]) -> None:
        run = self._runs[place]
        del self._runs[place]
        for part in reversed(parts):
            self._runs.insert(place, part)
        self.waiting += sum(part.count for part in parts) - run.count
        self.waiting_charge += sum(part.charge for part in parts) - run.charge

    # --- writing

    @property
    def must_wait(self) -> bool:
        """Whether a state waits that may not be written before the pipe is empty."""
        return self.policy == "latest" and self.pipe > 0 and self.waiting > 0 and not self._offset

    @property
    def drops(self) -> bool:
        """Whether it drops what waits: then :attr:`pipe` must be known before :meth:`to_write`."""
        return self.policy in _DROPPING

    def to_write(self) -> bytes | memoryview:
        """What comes next in the pipe; not empty unless :attr:`empty`."""
        runs = self._runs
        if self._offset:
            return runs[0].rest(self._offset)
        limit = _WRITE
        if self.policy in _DROPPING:
            if self._gap:
                runs.appendleft(note_run(SKIPPED if self.policy == "latest" else GAP, self._gap))
                self._gap = 0
            # A page of the pipe may be half empty, so what is unread counts twice.
            limit = max(PIPE_BUF, self.pipe_size - 2 * self.pipe - 2 * PIPE_BUF)
            self._split_to(limit)
        if len(runs) == 1 or runs[0].size >= limit or runs[0].hold:
            return runs[0].data
        total = 0
        parts: list[bytes] = []
        for run in runs:
            total += run.size
            if total > limit or run.hold:
                break
            parts.append(run.data)
        return b"".join(parts) if len(parts) > 1 else parts[0]

    @property
    def between(self) -> bool:
        """Whether the pipe ends with a whole run."""
        return not self._offset

    @property
    def shared(self) -> SharedRun | None:
        """The run that :meth:`to_write` has just given, if a reader must be prepared for it."""
        run = self._runs[0]
        return run if isinstance(run, SharedRun) else None

    def copy_first(self) -> None:
        """Write the same messages, in no shared memory, instead of what comes next."""
        if self.shared is not None:
            self._replace(0, (self.shared.copied(),))

    def refers_to(self, ring: object) -> bool:
        """Whether references into ``ring`` wait."""
        return any(isinstance(run, SharedRun) and getattr(run.hold, "ring", None) is ring for run in self._runs)

    def copy_out(self, ring: object) -> int:
        """Copy what waits out of ``ring``: how many bytes."""
        copied = 0
        for place, run in enumerate(list(self._runs)):
            if isinstance(run, SharedRun) and getattr(run.hold, "ring", None) is ring:
                self._replace(place, (run.copied(),))
                copied += run.charge
        return copied

    def _split_to(self, limit: int) -> None:
        """Let the first run of messages not be longer than ``limit`` bytes, with the note before it, if it can be cut."""
        place = 1 if self._runs[0].missed else 0
        if len(self._runs) <= place:
            return
        run = self._runs[place]
        room = limit - len(self._runs[0].data) * place
        if run.size <= room or run.count <= 1:
            return
        room -= RUN.size + 1
        fits = 0
        for charge in run.charges():
            room -= charge - FRAME_OVERHEAD + 12  # its head, and its entry in the table
            if room < 0:
                break
            fits += 1
        fits = max(1, fits)
        if fits < run.count:
            self._replace(place, (run.part(0, fits), run.part(fits, run.count)))

    def wrote(self, size: int) -> None:
        """The pipe has taken ``size`` bytes of :meth:`to_write`."""
        self.pipe += size
        size += self._offset
        runs = self._runs
        while runs and size >= runs[0].size:
            run = runs.popleft()
            size -= run.size
            self.delivered += run.count
            self.left += run.count + self._later
            self._later = 0
            self.waiting -= run.count
            self.waiting_charge -= run.charge
        self._offset = size


def _covering(charges: list[int], excess: int) -> int:
    """How many of the first of ``charges`` it takes to cover ``excess``; all, if they do not."""
    for index, charge in enumerate(charges):
        if excess <= 0:
            return index
        excess -= charge
    return len(charges)
