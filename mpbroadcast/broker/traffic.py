"""What goes from publishers' pipes into backlogs, and from these into channels' pipes.

A **round** reads what is in the publishers' pipes, routes it into backlogs, and then moves each backlog that has something
into its pipe. A batch that does not fit into every ``block`` backlog that would get it is **parked**, and its publisher is not
read until it does: so all see one order, and the publisher's pipe fills up until its ``publish`` waits. Who frees room, or
goes, lets those that wait for it go on, the longest first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.broker.core.history import History
from mpbroadcast.broker.core.patterns import Matcher
from mpbroadcast.broker.core.router import Router, matches
from mpbroadcast.broker.members import LONGEST_RETRY, PIPE_SIZE, SHORTEST_RETRY, Session, Subscription, new_pipe
from mpbroadcast.broker.publisher import Publisher
from mpbroadcast.broker.sharing import Sharing
from mpbroadcast.broker.stalls import Stalls
from mpbroadcast.posix.poller import IN, OUT, Poller
from mpbroadcast.posix.shared_memory import keep_freed_memory
from mpbroadcast.protocol.fd_packets import ROUTED, pack
from mpbroadcast.protocol.frames import Batch, FrameError, Item, MemfdMessage, References
from mpbroadcast.protocol.runs import Run, SharedRun, run_of

log = logging.getLogger("mpbroadcast.broker")

_BUSY: Final = 16  # messages in one read, from which on a publisher's pipe is read after naps instead of events
_SHORTEST_NAP: Final = 50e-6  # seconds; it doubles while a publisher stays busy
_LONGEST_NAP: Final = 400e-6
_TURN: Final = 1 << 12  # puts into backlogs, of one publisher's messages in a round: some 20 ms
_STEPS: Final = 1 << 10  # of trying patterns, in the time of a put
_MUCH: Final = PIPE_SIZE // 4  # bytes that came in one read, or between two naps: with 400 µs, a publisher would soon wait


class Traffic:
    """Publishers, and the route from them to subscriptions.

    Nothing here calls the server. What it has to do is on two lists, which it works off at the end of the round, where nothing
    iterates over subscriptions any more: ``departed`` has those whose pipe is done, or closed by its reader, or full and not
    waited for; ``overflowed`` has those that have ended themselves.
    """

    def __init__(
        self,
        loop: Poller,
        router: Router[Subscription],
        history: History | None,
        stall_timeout: float | None,
    ) -> None:
        self.publishers: dict[int, Publisher] = {}
        self.routed = 0
        self.history = history
        self.sharing = Sharing(loop, self.mark)
        self._loop = loop
        self._router = router
        self._stalls = Stalls(loop, router, self.publishers, stall_timeout)
        self.departed: dict[Subscription, bool] = {}  # whether it was accepting messages until then
        self.overflowed: list[Subscription] = []
        self._busy: dict[Publisher, None] = {}
        self._behind: dict[Publisher, None] = {}  # those whose turn was over: the rest has one in the next round
        self._nap = _SHORTEST_NAP
        self._puts = 0
        self._came = 0  # bytes since the last nap, in pipes and referred to
        self._dirty: dict[Subscription, None] = {}
        self._resuming: list[Publisher] = []
        self._room = memoryview(mmap(-1, PIPE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS))  # not touched before it is needed
        keep_freed_memory(4 * PIPE_SIZE)  # what is read from a pipe, and what is written into others

    def round(self) -> None:
        """Wait for what happens, and handle it."""
        much, self._came = self._came >= _MUCH, 0
        self._nap = min(2 * self._nap, _LONGEST_NAP) if self._busy and not much else _SHORTEST_NAP
        self._loop.round(0.0 if self._behind else self._nap if self._busy else None)
        for publisher in list(self._busy):
            self._read(publisher)
        for publisher in list(self._behind):
            self._route(publisher, _TURN)
        self.settle()

    def settle(self) -> None:
        """Move all that can be moved."""
        while self._resuming or self._dirty:
            self._flush()

    # --- publishers

    def add(self, number: int, session: Session) -> tuple[Publisher, int]:
        """A new publisher, and the descriptor that is its end.

        :raises OSError: no descriptor is left.
        """
        read, write = new_pipe(PIPE_SIZE)
        publisher = Publisher(number, session, read, self._room)
        self.publishers[number] = publisher
        session.publishers.add(publisher)
        self._watch(publisher)
        return publisher, write

    def _watch(self, publisher: Publisher) -> None:
        self._loop.watch(publisher.fd, IN, lambda _: self._read(publisher))

    def _read(self, publisher: Publisher) -> None:
        before, came = self.routed, self._came
        try:
            chunk = publisher.read()
        except BlockingIOError:
            self._set_busy(publisher, False)
            return
        if not chunk:
            self._close(publisher)
            return
        self._came += len(chunk)
        self._take(publisher, chunk)
        trap_points.reach("routing")
        self._route(publisher, _TURN)
        self._set_busy(publisher, self.routed - before > _BUSY or self._came - came > _MUCH)

    def _set_busy(self, publisher: Publisher, busy: bool) -> None:
        """Whether its pipe is read after naps.

        A publisher that finds the broker waiting for its pipe pays for waking it, with each message; one whose pipe nobody
        waits for pays nothing. What else happens ends a nap at once.
        """
        if busy == (publisher in self._busy) or publisher.fd < 0 or publisher.blocked or publisher in self._behind:
            return
        if busy:
            self._busy[publisher] = None
            self._loop.forget(publisher.fd)
        else:
            del self._busy[publisher]
            self._watch(publisher)

    def _take(self, publisher: Publisher, chunk: bytes) -> None:
        try:
            publisher.take(chunk)
        except FrameError as error:
            self._refuse(publisher, str(error))
        except Exception as error:  # whatever comes from outside, it does not end the broker
            log.exception("what process %d sent was not understood", publisher.pid)
            self._refuse(publisher, str(error))

    def _refuse(self, publisher: Publisher, error: str) -> None:
        log.warning("process %d sent %s, which is no frame: it cannot publish any more", publisher.pid, error)
        self._close(publisher)

    def take_in(self) -> None:
        """Route what all publishers have written until now, as far as backlogs take it.

        So that what is asked for next comes behind it: a process may have learnt from another one that it has published.
        """
        self.catch_up()
        for publisher in list(self.publishers.values()):
            end = publisher.end_of_written()
            self._look_again(publisher)
            while publisher.fd >= 0 and not publisher.blocked and publisher.position < end:
                self._take(publisher, publisher.read(end - publisher.position))
                self._route(publisher)
                self._look_again(publisher)

    def _look_again(self, publisher: Publisher) -> None:
        """Let it go on if there is room by now: a pipe that has been read empty makes no event."""
        full: Subscription | None = None
        while publisher.blocked is not full:
            full = publisher.blocked
            if full is not None:
                self.mark(full)
                self.settle()

    def catch_up(self) -> None:
        """Route what was left for the next round, also of publishers that are gone."""
        for publisher in list(self._behind):
            self._route(publisher)

    def finish(self, publisher: Publisher) -> None:
        """Take in what it has written until now, whether it can be routed or not, and nothing more.

        That its end of the pipe breaks wakes a ``publish`` that waits in its process.
        """
        if publisher.fd < 0:
            return
        end = publisher.end_of_written()
        while publisher.fd >= 0 and publisher.position < end:
            self._take(publisher, publisher.read(end - publisher.position))
            if not publisher.blocked:
                self._route(publisher, _TURN)
        # Who waited for room has perhaps gone on when there was some: that is published, too, but what comes now is not.
        with contextlib.suppress(BlockingIOError):
            if publisher.fd >= 0:
                self._take(publisher, publisher.read())
        with contextlib.suppress(OSError):  # no descriptor is left: it closes at the end of this round
            if publisher.fd >= 0:
                nowhere = os.open(os.devnull, os.O_RDONLY)
                os.dup2(nowhere, publisher.fd, inheritable=False)
                os.close(nowhere)
        self._close(publisher)

    def _close(self, publisher: Publisher) -> None:
        if publisher.fd < 0:
            return
        fd, publisher.fd = publisher.fd, -1
        self._loop.close(fd)
        self._busy.pop(publisher, None)
        self.sharing.close(publisher)
        publisher.close()
        publisher.session.publishers.discard(publisher)
        if not publisher.blocked:
            self._route(publisher, _TURN)

    def _forget(self, publisher: Publisher) -> None:
        if self.publishers.pop(publisher.number, None) is None:
            return
        self.sharing.forget(publisher)

    # --- routing

    def _route(self, publisher: Publisher, turn: int | None = None) -> None:
        """Route what is parked, as far as the backlogs take it, and as far as that is done in this ``turn``."""
        parked = publisher.parked
        before = self.routed
        last = None if turn is None else self._work + turn
        waited = publisher in self._behind
        while parked:
            if last is not None and self._work > last:
                self._behind[publisher] = self._behind.pop(publisher, None)
                self._leave(publisher)
                publisher.blocked, publisher.warned = None, False
                return
            item = parked.popleft()
            if callable(item):
                item()
                continue
            if isinstance(item, References):
                if item.hold.ring.retired:
                    self._refuse(publisher, "a reference into a ring that it has left")
                    continue
                self.sharing.use(item.hold.ring, publisher)
                self._came += item.charge
            try:
                full, rest = self._deliver(item, publisher)
            except UnicodeDecodeError:
                log.warning("process %d published to a topic that is not UTF-8: dropped", publisher.pid)
                self._routed(item, publisher)
                continue
            except Exception as error:  # an item that the broker cannot route costs its publisher, and nobody else
                log.exception("what process %d published could not be routed", publisher.pid)
                self._refuse(publisher, str(error))
                continue
            if full is not None:
                parked.appendleft(rest)
                self._behind.pop(publisher, None)
                self._block(publisher, full, went_on=self.routed > before)
                return
        self._behind.pop(publisher, None)
        if publisher.blocked or waited:
            publisher.blocked = None
            publisher.warned = False
            if publisher.fd >= 0:
                self._watch(publisher)
        if publisher.fd < 0:
            self._forget(publisher)

    def _leave(self, publisher: Publisher) -> None:
        """Do not read it, not even for errors: that its writers are gone would be reported again and again."""
        self._loop.forget(publisher.fd)
        self._busy.pop(publisher, None)

    @property
    def _work(self) -> int:
        """How many puts into backlogs there were, about."""
        return self._puts + self._router.steps // _STEPS

    def _targets(self, item: Item, publisher: Publisher) -> tuple[Subscription, ...]:
        targets = self._router.targets(item.topic)
        if item.exclude or publisher.not_yet:
            late = {subscription for subscription, before in publisher.not_yet if not matches(before, item.topic)}
            targets = tuple(target for target in targets if target.number != item.exclude and target not in late)
        return targets

    def _deliver(self, item: Item, publisher: Publisher) -> tuple[Subscription | None, Item]:
        """Put as much as all its targets take into their backlogs: who is full, if one is, and what is left."""
        targets = self._targets(item, publisher)
        self._puts += 1 + len(targets)
        fits, full = len(item.sizes), None
        charge = item.charge
        for subscription in targets:
            backlog = subscription.backlog
            if subscription.waiters:  # who waits already is first, or many small messages would hold up a large one for ever
                return subscription, item
            if not backlog.takes(charge):
                subscription.refresh()
                if backlog.policy == "block":
                    least = backlog.fitting(item, charge)
                    if least < fits:
                        fits, full = least, subscription
        rest = item
        if full is not None:
            if not fits:
                return full, item
            item, rest = item.cut(fits)
        self._give(item, targets, publisher)
        self.routed += fits
        return full, rest

    def _give(self, item: Item, targets: tuple[Subscription, ...], publisher: Publisher) -> None:
        """What all of these take."""
        run: Run | None = None
        ring = item.hold.ring if isinstance(item, References) else None
        last_in = publisher.last_in
        for subscription in targets:
            backlog = subscription.backlog
            before = backlog.entered
            if run is None:
                run = self._run_of(item)
            refused = ring is not None and not self.sharing.takes(subscription, ring)
            backlog.put(run.copied() if refused and isinstance(run, SharedRun) else run)
            self._dirty[subscription] = None
            if backlog.entered > before:  # not all of it was dropped at once
                last_in[subscription] = backlog.entered
            if backlog.overflowed:
                self.end(subscription)
                self.overflowed.append(subscription)
        if self.history is not None:
            self.history.add(self.routed, item.hold.copied(item) if isinstance(item, References) else item)
        self._routed(item, publisher)

    def _run_of(self, item: Item) -> Run:
        account = self.sharing.store.account
        if isinstance(item, Batch):
            return run_of(item, account)
        return SharedRun(item, item.hold.ring.account if isinstance(item, References) else account)

    @staticmethod
    def _routed(item: Item, publisher: Publisher) -> None:
        """It is on its way, or dropped: its publisher may go on."""
        if isinstance(item, MemfdMessage) and publisher.lender is not None:
            publisher.lender.send_packet(pack(ROUTED, 0, item.id))

    def replay(self, subscription: Subscription, topics: list[str], count: int, made: Mapping[str, Matcher]) -> None:
        """Put the last ``count`` messages that are for it into its backlog; ``made`` are the matchers of its patterns."""
        backlog = subscription.backlog
        if self.history is not None and count:
            most = 1 if backlog.policy == "latest" else count
            for batch in self.history.last(topics, most, backlog.capacity, made):
                backlog.put(self._run_of(batch))
            self._dirty[subscription] = None

    def _block(self, publisher: Publisher, full: Subscription, *, went_on: bool) -> None:
        if not publisher.blocked:
            self._leave(publisher)
        if went_on or not publisher.blocked:
            publisher.blocked_since = time.monotonic()
            publisher.warned = False
        publisher.blocked = full
        if not full.waiters:  # what has been read since then counts for those who come behind, too
            full.blocked_at = full.backlog.charge
        full.waiters.append(publisher)
        self._dirty[full] = None
        self._stalls.look()

    def unblock(self, subscription: Subscription) -> None:
        """Let those go on who wait for it."""
        self._resuming.extend(subscription.waiters)
        subscription.waiters.clear()

    # --- writing

    def mark(self, subscription: Subscription) -> None:
        """Write what is in its backlog, in this round."""
        self._dirty[subscription] = None

    def end(self, subscription: Subscription) -> None:
        """Route nothing more to it. What is in its backlog is still written."""
        if subscription.live:
            subscription.live = False
            subscription.said_topics = self._router.topics(subscription)
            self._router.remove(subscription)
        self._dirty[subscription] = None
        self.unblock(subscription)

    def _depart(self, subscription: Subscription) -> None:
        self.departed.setdefault(subscription, subscription.live)
        self.drop(subscription)

    def drop(self, subscription: Subscription) -> None:
        """Route nothing more to it, write nothing more into its pipe, and let no publisher wait for it."""
        self.end(subscription)
        self._dirty.pop(subscription, None)
        for publisher in self.publishers.values():
            publisher.last_in.pop(subscription, None)
        self.sharing.drop(subscription)
        self.unblock(subscription)

    def watch(self, subscription: Subscription) -> None:
        """It is open: write into its pipe."""
        self._loop.watch(subscription.fd, 0, lambda events: self._writable(subscription, events))
        self.sharing.watch(subscription)
        self._dirty[subscription] = None

    def _writable(self, subscription: Subscription, events: int) -> None:
        if events & OUT:
            self._dirty[subscription] = None
        else:
            self._depart(subscription)

    def _flush(self) -> None:
        """Move what is in backlogs into pipes, and let those go on who waited for that."""
        dirty, self._dirty = self._dirty, {}
        for subscription in dirty:
            if subscription.opened and subscription.fd >= 0:
                self._write(subscription)
        resuming, self._resuming = self._resuming, []
        for publisher in resuming:
            if publisher.parked or publisher.blocked:
                self._route(publisher, _TURN)

    def _write(self, subscription: Subscription) -> None:
        try:
            full = subscription.write()
        except OSError:
            self._depart(subscription)
            return
        backlog = subscription.backlog
        if backlog.ended and backlog.empty and subscription.must_be_read:
            subscription.refresh()
        if (backlog.ended and backlog.empty and not subscription.must_be_read) or (subscription.not_waited_for and full):
            self._depart(subscription)
            return
        if subscription.waiters:
            subscription.refresh()
            if backlog.charge < subscription.blocked_at:
                subscription.retry = SHORTEST_RETRY
                self.unblock(subscription)
        self._arm(subscription, full)

    def _arm(self, subscription: Subscription, full: bool) -> None:
        """Wait for room: in the pipe, or, while somebody waits for that, in what has not been read of it."""
        must_wait = subscription.backlog.must_wait
        if (subscription.waiters and not full) or must_wait:
            full = subscription.one_page  # such a pipe has room when all has been read
            if not (full and must_wait) and not subscription.retrying:
                subscription.retrying = True
                self._loop.later(subscription.retry, lambda: self._retry(subscription))
                subscription.retry = min(2 * subscription.retry, LONGEST_RETRY)
        if full != subscription.write_interest:
            subscription.write_interest = full
            self._loop.change(subscription.fd, OUT if full else 0)

    def _retry(self, subscription: Subscription) -> None:
        subscription.retrying = False
        if subscription.fd >= 0:
            self._dirty[subscription] = None
