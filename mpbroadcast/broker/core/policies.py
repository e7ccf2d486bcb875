"""The overflow policies, for when a backlog is full: one class each. Pure, as ``backlog.py``.

What is in the pipe cannot be dropped, nor what follows a part that is. So a policy that drops writes a run of many messages
only when all of it has room for certain, and else in writes that the pipe takes whole or not at all.

To add a policy, add a class to :data:`POLICIES`, and its name to ``validation.Policy``.
"""

from __future__ import annotations

from typing import Final

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.protocol.frames import FRAME_OVERHEAD, PIPE_BUF
from mpbroadcast.protocol.runs import GAP, OVERFLOWED, RUN, SKIPPED, Run, note_run


class Block(Backlog):
    """Nothing is dropped: publishers wait for room."""

    policy = "block"
    policy_while_reserved = "drop_oldest"  # no publisher waits for a process that may never come back
    blocks = True

    def put(self, run: Run) -> int:
        self.published += run.count
        self.runs.append(run)
        self.waiting += run.count
        self.waiting_charge += run.charge
        return self.departed + self.waiting


class DropNewest(Backlog):
    """The messages that do not fit are dropped, and reported behind those that wait."""

    policy = "drop_newest"

    def put(self, run: Run) -> int:
        self.published += run.count
        fits = self._put_fitting(run)
        missed = run.count - fits
        if missed:
            self.missed += missed
            self._append_gap(missed, is_exact=True)
        return self.entered if fits else 0


class Disconnect(Backlog):
    """The first message that does not fit ends the subscription; what comes behind it is received by no one."""

    policy = "disconnect"
    policy_while_reserved = "drop_oldest"  # the process may still come back, and then it reads on

    def put(self, run: Run) -> int:
        fits = self._put_fitting(run)
        self.published += fits
        if fits < run.count:
            self.published += 1
            self.missed += 1
            self.overflowed = True
            self.runs.append(note_run(OVERFLOWED, 1))
            self.end()
        return self.entered if fits else 0


class _Dropping(Backlog):
    """The oldest messages are dropped, and reported in front of what waits."""

    drops = True
    _report: int  # the note of it

    def to_write(self) -> bytes | memoryview:
        if self._offset:
            return self.runs[0].rest(self._offset)
        self._put_note()
        if not self.runs:
            return b""
        # A page of the pipe may be half empty, so what is unread counts twice.
        limit = max(PIPE_BUF, self.pipe_size - 2 * self.pipe - 2 * PIPE_BUF)
        self._split_to(limit)
        return self._joined(limit)

    def head(self) -> list[Run]:
        if self.runs:
            self._put_note()
        return super().head()

    def take_first(self, room: int, *, at_least_one: bool) -> Run | None:
        self._put_note()
        return super().take_first(room, at_least_one=at_least_one)

    def _put_note(self) -> None:
        if self._gap:
            if self.runs and not self.runs[0].is_exact:
                note = note_run(GAP, self._gap + self.runs.popleft().missed, is_exact=False)
            else:
                note = note_run(self._report, self._gap)
            self.runs.appendleft(note)
            self._gap = 0

    def _split_to(self, limit: int) -> None:
        """Cut the first run of messages, if it can be cut, to ``limit`` bytes with the note before it."""
        index = 1 if self.runs[0].is_gap else 0
        if len(self.runs) <= index:
            return
        run = self.runs[index]
        room = limit - len(self.runs[0].data) * index
        if run.size <= room or run.count <= 1 or self._divide(index, room):
            return
        if self._divide(index, run.first):
            run = self.runs[index]
        room -= RUN.size + 1
        fits = 0
        for charge in run.charges():
            room -= charge - FRAME_OVERHEAD + 12  # its head, and its entry in the table
            if room < 0:
                break
            fits += 1
        fits = max(1, fits)
        if fits < run.count:
            self._replace(index, (run.part(0, fits), run.part(fits, run.count)))

    def put_gap_first(self, missed: int, *, is_exact: bool) -> None:
        if is_exact:
            self.published += missed
            self._miss(missed)
        else:
            super().put_gap_first(missed, is_exact=False)

    def _drop(self, excess: int) -> None:
        """Drop the oldest messages that are not partly in the pipe, until ``excess`` of charge is gone."""
        runs, index = self.runs, 1 if self._offset else 0
        if index:
            self._divide(0, runs[0].first)  # what is behind the part can be dropped
        if len(runs) > index and runs[index].is_gap:  # a note that is not written yet: its messages are reported with these
            if runs[index].is_exact:
                self._gap += runs[index].missed
                del runs[index]
            else:
                index += 1
        while excess > 0 and len(runs) > index:
            if not runs[index].count:  # a gap of unknown size: it stays, once, in front of what is left
                if index > bool(self._offset) and runs[index - 1].is_gap:
                    del runs[index]
                else:
                    index += 1
                continue
            if runs[index].charge > excess:
                self._divide(index, runs[index].first)
            run = runs[index]
            if run.charge <= excess or run.count == 1:
                excess -= run.charge
                count = run.count
            else:
                count = _covering(run.charges(), excess)
                excess = 0
            self._replace(index, (run.part(count, run.count),) if count < run.count else ())
            if index:
                self._later += count
            else:
                self.departed += count
            self._miss(count)

    def _miss(self, count: int) -> None:
        self.missed += count
        self._gap += count


class DropOldest(_Dropping):
    """The oldest messages are dropped, and the reader gets ``Lagged`` with their number."""

    policy = "drop_oldest"
    _report = GAP

    @property
    def is_empty(self) -> bool:
        return not self.runs and not self._gap

    def put(self, run: Run) -> int:
        self.published += run.count
        if self.takes(run.charge):
            self._append(run)
            return self.entered
        self._drop(self.charge + run.charge - self.capacity)
        first = _covering(run.charges(), self.charge + run.charge - self.capacity)
        if first == run.count and self.is_clear:
            first -= 1  # it is larger than the capacity: an empty backlog accepts it
        self._miss(first)
        if first < run.count:
            self._append(run.part(first, run.count))
        return self.entered if first < run.count else 0


class Latest(_Dropping):
    """Only the newest message waits, and it is written into an empty pipe only."""

    policy = "latest"
    keeps_newest_only = True
    _report = SKIPPED

    @property
    def needs_empty_pipe(self) -> bool:
        return self.pipe > 0 and self.waiting > 0 and not self._offset

    def put(self, run: Run) -> int:
        self.published += run.count
        self._drop(self.waiting_charge)
        self._miss(run.count - 1)
        self._append(run.part(run.count - 1, run.count))
        return self.entered


POLICIES: Final[dict[str, type[Backlog]]] = {one.policy: one for one in (Block, DropOldest, DropNewest, Latest, Disconnect)}


def new_backlog(capacity: int, policy: str = "block") -> Backlog:
    """Return an empty backlog of this policy."""
    return POLICIES[policy](capacity)


def reserved_backlog(capacity: int, policy: str) -> Backlog:
    """Return an empty backlog for a channel of this policy that only the process that had it open may open again."""
    return new_backlog(capacity, POLICIES[policy].policy_while_reserved or policy)


def with_policy(policy: str, backlog: Backlog) -> Backlog:
    """Return the backlog with all that waits, under this policy from now on."""
    if backlog.policy == policy:
        return backlog
    other = new_backlog(backlog.capacity, policy)
    other.take_from(backlog)
    return other


def _covering(charges: list[int], excess: int) -> int:
    """Return how many of the first of ``charges`` it takes to cover ``excess``; all, if they do not."""
    for index, charge in enumerate(charges):
        if excess <= 0:
            return index
        excess -= charge
    return len(charges)
