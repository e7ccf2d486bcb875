"""From backlogs into channels' pipes.

Subscriptions with something to write are in :attr:`Delivery.dirty`. Writing finds pipes that are gone, and backlogs that have
room again: both are put on lists, which the caller works off when nothing iterates over subscriptions.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Final

from mpbroadcast.broker.channel_pipe import PIPE_SIZE, SHORTEST_RETRY
from mpbroadcast.broker.core.states import PipeState
from mpbroadcast.broker.members import Group, Subscription
from mpbroadcast.broker.outbox import Outbox
from mpbroadcast.broker.reference_window import ReferenceWindow
from mpbroadcast.posix.pipes import unread, write
from mpbroadcast.posix.poller import IN, OUT, Poller
from mpbroadcast.protocol.runs import Run, note

_MOST_AT_ONCE: Final = 16 * PIPE_SIZE  # bytes, into a pipe whose reader is as quick as the broker
_MOST_GIVEN: Final = 64  # messages to the members of a group, before others are written
LONGEST_RETRY: Final = 0.1  # seconds

Dirty = dict[Subscription, None]


class Delivery:
    """Writes as much as each pipe takes, and waits for room in those that are full."""

    def __init__(self, poller: Poller) -> None:
        self.dirty: Dirty = {}
        self.gone: list[Subscription] = []  # done, or closed by their readers, or full and abandoned
        self.unblocked: list[Subscription] = []  # those that have room again, for which publishers wait
        self._poller = poller

    def watch(self, subscription: Subscription) -> None:
        """Write into its pipe, which is open."""
        self._poller.watch(subscription.pipe.fd, 0, partial(self._on_event, subscription))
        if subscription.pipe.reports_fd >= 0:
            self._poller.watch(subscription.pipe.reports_fd, IN, partial(self._receive_reports, subscription))
        self.dirty[subscription] = None

    def _on_event(self, subscription: Subscription, events: int) -> None:
        if events & OUT:
            self.dirty[subscription] = None
        else:
            self.gone.append(subscription)  # an error event: its reader has closed its end

    def write(self, limit: int) -> int:
        """Write the backlogs of at most ``limit`` dirty subscriptions. Return how many these were."""
        dirty = list(islice(self.dirty, limit))
        if len(dirty) < len(self.dirty):
            for subscription in dirty:
                del self.dirty[subscription]
        else:
            self.dirty.clear()
        given = 0
        for subscription in dirty:
            pipe, backlog = subscription.pipe, subscription.backlog
            if pipe.state is not PipeState.OPEN:
                if isinstance(subscription, Group):
                    given += self._give_out(subscription)
                elif isinstance(subscription, Outbox):
                    self._give_session(subscription)
                continue
            try:
                is_full = _write(subscription)
            except OSError:
                self.gone.append(subscription)
                continue
            if (backlog.ended or subscription.is_abandoned) and _is_done(subscription, is_full):
                self.gone.append(subscription)
                continue
            if subscription.group is not None and backlog.is_empty:
                subscription.group.shares.make_room(subscription)
                self.dirty[subscription.group] = None
            if subscription.waiters:
                subscription.refresh()
                if backlog.charge < subscription.charge_when_blocked:
                    pipe.retry = SHORTEST_RETRY
                    self.unblocked.append(subscription)
            if is_full or subscription.waiters or pipe.write_interest:
                self._wait_for_room(subscription, is_full)
        return len(dirty) + given

    def _give_out(self, group: Group) -> int:
        """Give what waits for a group to its members, as far as they take it. Return how many messages.

        Each is in a pipe before the next one is given: what is not in a pipe goes to others when a member dies.
        """
        backlog, shares, given = group.backlog, group.shares, 0
        while not group.is_starting and (head := backlog.head()):
            if given >= _MOST_GIVEN:
                self.dirty[group] = None
                break
            if not head[-1].count:
                self._end_members(group, head)
                break
            member = shares.next()
            if member is None:
                break
            for run in head:
                member.backlog.put(run)
            try:
                is_full = _write(member)
            except OSError:  # its reader is gone: another member gets the message
                shares.retire(member)
                self.gone.append(member)
                continue
            given += 1
            backlog.take(head)
            shares.gave(member, has_room=member.backlog.is_empty)
            if is_full:
                self._wait_for_room(member, is_full)
        if group.waiters and backlog.charge < group.charge_when_blocked:
            self.unblocked.append(group)
        if backlog.ended and not backlog.is_empty and all(one.is_open and one.is_abandoned for one in shares.members):
            self.gone.extend(shares.members)  # the broker ends, and none of them will read it
        return given

    def _give_session(self, outbox: Outbox) -> None:
        """Give the session at work what it may have, and let the publishers go on for which there is room then."""
        if outbox.give() and outbox.reader is not None:
            self.dirty[outbox.reader] = None
        if outbox.waiters and outbox.backlog.charge < outbox.charge_when_blocked:
            self.unblocked.append(outbox)

    def _end_members(self, group: Group, head: list[Run]) -> None:
        """End each member behind what it was given, as nothing waits for the group any more."""
        *notes, _ = head
        for member in group.shares.members:
            for run in notes:
                member.backlog.put(run)
            member.backlog.end()
            group.shares.retire(member)
            self.dirty[member] = None
            notes = notes[-1:] if group.backlog.overflowed else []  # what was dropped is reported once
            if group.is_closing and member.pipe.state is PipeState.UNOPENED:
                self.gone.append(member)  # no process would get a message from it
        group.backlog.take(head)

    def _receive_reports(self, member: Subscription, _events: int) -> None:
        """Give the next messages, as a member has finished some, or a session; one that has ended may be over then."""
        if not member.receive_reports():
            self._poller.forget(member.pipe.reports_fd)
        if member.target is not member:
            self.dirty[member.target] = None
        if member.backlog.ended:
            self.dirty[member] = None

    def _wait_for_room(self, subscription: Subscription, is_full: bool) -> None:
        """Wait for room in the pipe; or, while a publisher waits for that, until some of what is unread is read."""
        pipe = subscription.pipe
        needs_empty_pipe = subscription.backlog.needs_empty_pipe
        if (subscription.waiters and not is_full) or needs_empty_pipe:
            is_full = pipe.is_one_page  # it reports room when all has been read
            if not (is_full and needs_empty_pipe) and not pipe.is_retrying:
                pipe.is_retrying = True
                self._poller.later(pipe.retry, partial(self._retry, subscription))
                pipe.retry = min(2 * pipe.retry, LONGEST_RETRY)
        if is_full != pipe.write_interest:
            pipe.write_interest = is_full
            self._poller.change(pipe.fd, OUT if is_full else 0)

    def _retry(self, subscription: Subscription) -> None:
        subscription.pipe.is_retrying = False
        self.dirty[subscription] = None


def _write(subscription: Subscription) -> bool:
    """Move from the backlog into the pipe. Return whether the pipe is full, or took much in this round, and there is more.

    :raises OSError: its reader is gone.
    """
    backlog, window, fd = subscription.backlog, subscription.window, subscription.pipe.fd
    room = _MOST_AT_ONCE
    while True:
        if backlog.drops:
            if backlog.is_empty:
                break
            backlog.pipe = unread(fd)
            if backlog.needs_empty_pipe:
                return True
        if window is not None and window.notes and not _write_notes(subscription, window):
            return True
        data = backlog.to_write()
        if not data:
            break
        run = backlog.runs[0]
        if run.hold:
            is_ready = _prepare(subscription, run)
            if is_ready is None:
                return subscription.is_abandoned  # else the packet that must come lets it be written
            if not is_ready:
                backlog.copy_first()
                continue
        elif run.missed and backlog.drops and _is_held_back(subscription):
            return subscription.is_abandoned
        try:
            size = write(fd, data)
        except BlockingIOError:
            return True
        backlog.wrote(size)
        subscription.pipe.retry = SHORTEST_RETRY
        if window is not None:
            window.moved += size
            if run.hold:
                window.wrote(run)
                backlog.referred = window.unread.bytes
        room -= size
        if size < len(data) or (room < 0 and backlog.runs):
            return True
        if not (backlog.runs or backlog.drops):
            break
    return window is not None and bool(window.notes) and not _write_notes(subscription, window)


def _write_notes(subscription: Subscription, window: ReferenceWindow) -> bool:
    """Write the notes of the window, if the pipe ends with a whole run. Return False if the pipe is full."""
    backlog = subscription.backlog
    while window.notes and backlog.is_between_runs:
        data = note(*window.notes[0])
        try:
            write(subscription.pipe.fd, data)
        except BlockingIOError:
            return False
        backlog.pipe += len(data)
        del window.notes[0]
    return True


def _prepare(subscription: Subscription, run: Run) -> bool | None:
    """Return whether the pipe can have this run now; ``None`` when a packet from its reader comes before that."""
    window, backlog = subscription.window, subscription.backlog
    if window is None:
        return False
    # What the pipe refers to cannot be dropped: the newest messages have the rest of the capacity.
    most = backlog.capacity // 8 if backlog.drops else backlog.capacity
    is_ready = window.prepare(run.hold, most)
    if is_ready is None:
        subscription.refresh()
        is_ready = window.prepare(run.hold, most)
    return False if is_ready is None and not window.expects_packet else is_ready


def _is_held_back(subscription: Subscription) -> bool:
    """Return whether the messages behind the first note must wait for a packet: the note waits, too, as its gap may grow."""
    runs = subscription.backlog.runs
    return len(runs) > 1 and bool(runs[1].hold) and _prepare(subscription, runs[1]) is None


def _is_done(subscription: Subscription, is_full: bool) -> bool:
    """Return whether nothing more has to be written into its pipe, nor read from it."""
    backlog = subscription.backlog
    if backlog.ended and backlog.is_empty and not subscription.is_unfinished:
        if subscription.must_be_read:
            subscription.refresh()
        return not subscription.must_be_read or (subscription.is_abandoned and is_full)
    return subscription.is_abandoned and is_full
