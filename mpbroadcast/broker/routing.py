"""From publishers' queues into backlogs, and which publisher has to wait.

A batch is put into the backlogs of all its targets, or of none. If a ``block`` backlog is full, the publisher is blocked, and
what is left of its queue stays parked: so all subscriptions see one order, and the publisher's pipe fills up until its
``publish`` waits. When a backlog has room again, those that wait for it are routed again, the longest first.

A round routes a bounded number of messages. A publisher that is not done then is behind all others in the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Final, cast

from mpbroadcast import trap_points
from mpbroadcast.broker.core.bridging import Misannounced, Topics
from mpbroadcast.broker.core.history import ALL, Entry, History
from mpbroadcast.broker.core.router import Router
from mpbroadcast.broker.core.singles import runs_by_target
from mpbroadcast.broker.core.states import PipeState, SubscriptionState
from mpbroadcast.broker.delivery import Dirty
from mpbroadcast.broker.members import Inlet, Publisher, Subscription
from mpbroadcast.broker.memory import Ring
from mpbroadcast.broker.memory_exchange import MemoryExchange
from mpbroadcast.protocol.fd_packets import ROUTED, pack
from mpbroadcast.protocol.frames import Batch, Item, MemfdMessage, References, Singles
from mpbroadcast.protocol.runs import Account, Run, SharedRun, run_of

log = logging.getLogger("mpbroadcast.broker")

TURN: Final = 1 << 12  # puts into backlogs in a round: some 20 ms
_SINGLES_PER_PUT: Final = 1 << 2  # messages of changing topics that are put in the time of a put
_SORTED_PER_PUT: Final = 1 << 5  # targets of such messages that are sorted in the same time
_MOST_SORTED: Final = _SORTED_PER_PUT * TURN  # at once
_PATTERNS_PER_PUT: Final = 1 << 3  # patterns that are tried one by one in the time of a put
_STEPS_PER_PUT: Final = 1 << 10  # steps of trying all patterns, in the same time
_PACKED_PER_FIT: Final = 16  # messages that are packed next, for each that a backlog had room for
_REPLAYED: Final = 1 << 10  # batches of a replay in a round: some milliseconds
_BYTES_PER_BATCH: Final = 1 << 12  # that are copied in the time of one of these batches

Targets = tuple[Subscription, ...]


class _LooksUp(Exception):
    """The targets of an item are not known yet."""


class Routing:
    """Puts items into backlogs. Publishers and subscriptions that its caller has to handle are on lists."""

    def __init__(
        self, router: Router[Subscription], history: History | None, memory: MemoryExchange, dirty: Dirty, first_id: int
    ) -> None:
        self.first_id = first_id  # of this broker's messages
        self.next_id = first_id  # the next message's
        self.history = history
        self.behind: dict[Publisher, None] = {}  # those whose turn is over: the next is in the next round
        self.resuming: list[Publisher] = []  # blocked by backlogs that have room again
        self.refused: dict[Publisher, str] = {}  # those of which something cannot be routed, with the reason
        self.overflowed: list[Subscription] = []  # those that have ended themselves
        self.groups: dict[int, int] = {}  # the ids of members and of their groups, which a member's exclusion leaves out whole
        self._router = router
        self._found = router.found
        self._memory = memory
        self._dirty = dirty
        self._puts = 0
        self._turn_end = TURN  # puts: beyond so many, the turn is over

    def begin_turn(self) -> None:
        """Route as much as a round has time for from now on, of all publishers together."""
        self._turn_end = self._puts + self._router.steps // _STEPS_PER_PUT + TURN

    @property
    def routed(self) -> int:
        """How many messages this broker has routed."""
        return self.next_id - self.first_id

    @property
    def turn_is_over(self) -> bool:
        return self._puts + self._router.steps // _STEPS_PER_PUT > self._turn_end

    def route(self, publisher: Publisher) -> bool:
        """Route what is parked, as far as the backlogs take it, and until the turn is over.

        Return whether all of it is routed. Else ``publisher.blocked`` is the backlog that is full, or the turn is over.
        """
        trap_points.reach("routing")
        parked, router, inlet = publisher.parked, self._router, publisher.inlet
        before = self.next_id
        while parked:  # `turn_is_over` is written out here, as a property is a call for each item
            if self._puts + router.steps // _STEPS_PER_PUT > self._turn_end:
                if self.next_id > before:  # in the next turn, the others are first
                    self.behind.pop(publisher, None)
                self.behind.setdefault(publisher)
                publisher.blocked, publisher.warned = None, False
                return False
            item = parked.popleft()
            if callable(item):
                item()
                continue
            if inlet is not None and not isinstance(item, Singles):
                admitted = self._admitted(item, publisher, inlet)
                if admitted is None:
                    continue
                item = admitted
            try:
                if isinstance(item, Singles):
                    self._put_singles(item, publisher)
                    continue
                full = self._put(item, publisher)
            except _LooksUp:
                parked.appendleft(item)
                self.behind.pop(publisher, None)  # the others are first in the next turn
                self.behind[publisher] = None
                publisher.blocked, publisher.warned = None, False
                return False
            except UnicodeDecodeError:
                log.warning("process %d published to a topic that is not UTF-8: dropped", publisher.pid)
                _done(item, publisher)
                continue
            except Exception as error:  # an item that the broker cannot route costs its publisher, and no other one
                log.exception("a message of process %d could not be routed", publisher.pid)
                self.refused[publisher] = f"the broker failed at a message of it ({error!r})"
                continue
            if full is not None:
                self.behind.pop(publisher, None)
                self._block_publisher(publisher, full, went_on=self.next_id > before)
                return False
        self.behind.pop(publisher, None)
        publisher.blocked, publisher.warned = None, False
        return True

    def _admitted(self, item: Item, publisher: Publisher, inlet: Inlet) -> Item | None:
        """Return what is to be routed of what the session of a bridge hands on: not what was had."""
        try:
            admitted = inlet.admit(item)
        except Misannounced:
            self.refused[publisher] = "it sent a message of another bus without its position"
            admitted = None
        if admitted is None:
            publisher.lookup = None
            _done(item, publisher)
        return admitted

    def _put(self, item: Item, publisher: Publisher) -> Subscription | None:
        """Put as much as all its targets take into their backlogs.

        Return the first of them that is full, if one is: what is left is parked again.
        """
        hold, account = item.hold, self._memory.store.account
        ring = None if hold is None else hold.ring
        if ring is not None:
            if ring.retired:
                self.refused[publisher] = "it sent a reference into a ring that it had replaced"
                return None
            self._memory.use(ring, publisher)
        targets = self._found.get(item.topic)
        if targets is None or publisher.lookup is not None:
            targets = self._look_up(item.topic, publisher)
        if item.exclude or publisher.not_yet:
            targets = self._allowed(targets, item, publisher)
        self._puts += 1 + len(targets)
        run: Run | None = None
        count = len(item.sizes)
        fits, full = count, None
        for subscription in targets:
            backlog = subscription.backlog
            if subscription.waiters:  # those that wait already are first, or many small messages would hold up a large one
                publisher.parked.appendleft(item)
                return subscription
            if run is None:
                run = _RUNS[type(item)](item, self.next_id, account)
            if backlog.waiting_charge + backlog.pipe + backlog.referred + run.charge > backlog.capacity:
                subscription.refresh()
                if backlog.blocks and (least := backlog.fitting(run)) < fits:
                    fits, full = least, subscription
        if run is not None and fits < count:
            item, rest = item.cut(fits) if fits else (item, item)
            next_count = _PACKED_PER_FIT * (fits + 1)
            if count - fits > next_count:  # it is packed before it is known what fits: not all of it each time
                rest, later = rest.cut(next_count)
                publisher.parked.appendleft(later)
            publisher.parked.appendleft(rest)
            if not fits:
                return full
            run = _RUNS[type(item)](item, self.next_id, account)
        if run is not None:
            self._enqueue(run, ring, targets, publisher.last_in)
        if self.history is not None:
            self.history.add(self.next_id, item if not isinstance(item, References) else item.hold.copied(item))
        self.next_id += fits
        if publisher.inlet is not None:  # in the step in which it is routed
            publisher.inlet.routed(fits)
        if hold is not None:
            _done(item, publisher)
        return full

    def _put_singles(self, singles: Singles, publisher: Publisher) -> None:
        """Put messages of changing topics into the backlogs of their targets, if these take all of them without a wait.

        What they do not take is parked again in halves, as are messages with more targets than a turn can sort. A single
        message is parked as an item of its own, for :meth:`_put`; so are all, where more is to be decided or kept for each.
        """
        parked, count = publisher.parked, len(singles.topics)
        if count == 1 or publisher.inlet is not None or publisher.not_yet or self.history is not None:
            parked.extendleft(reversed(singles.batches()))
            return
        targets = [*map(self._found.get, singles.topics)]
        known = self._complete(targets, singles.topics) if None in targets else count
        if known < count:
            singles, rest = singles.cut(max(1, known))
            parked.appendleft(rest)
            if not known:
                parked.extendleft(singles.batches())
                return
            count = known
        own = cast("list[Targets]", targets[:count])
        to_sort = sum(map(len, own))
        if to_sort > _MOST_SORTED:
            parked.extendleft(reversed(singles.cut(count // 2)))
            return
        runs = runs_by_target(singles, own, self.next_id, self._memory.store.account)
        for subscription, run in runs.items():
            backlog = subscription.backlog
            if backlog.waiting_charge + backlog.pipe + backlog.referred + run.charge > backlog.capacity:
                subscription.refresh()
            if subscription.waiters or (backlog.blocks and not backlog.takes(run.charge)):
                parked.extendleft(reversed(singles.cut(count // 2)))
                return
        for subscription, run in runs.items():
            self._enqueue(run, None, (subscription,), publisher.last_in)
        self._puts += count // _SINGLES_PER_PUT + to_sort // _SORTED_PER_PUT + len(runs)
        self.next_id += count

    def _complete(self, targets: list[Targets | None], topics: list[bytes]) -> int:
        """Look up the targets that are not known yet. Return how many of the first are known then.

        It ends at a topic that takes long, or is not UTF-8, or at the end of the turn.
        """
        for index, known in enumerate(targets):
            if known is None:
                try:
                    found = None if self.turn_is_over else self._router.targets(topics[index])
                except UnicodeDecodeError:
                    return index
                if found is None:
                    return index
                targets[index] = found
        return len(targets)

    def _look_up(self, topic: bytes, publisher: Publisher) -> Targets:
        """Return the targets of the topic of its first item.

        :raises _LooksUp: that takes long. It is to be called again for the same item, in its next turn.
        :raises UnicodeDecodeError: the topic is not UTF-8.
        """
        if publisher.lookup is None:
            targets = self._router.targets(topic)
            if targets is not None:
                return targets
            publisher.lookup = self._router.look_up(topic)
        try:
            next(publisher.lookup)
        except StopIteration as done:
            publisher.lookup = None
            found: Targets = done.value
            return found
        raise _LooksUp

    def _enqueue(self, run: Run, ring: Ring | None, targets: Targets, last_in: dict[Subscription, int]) -> None:
        """Put a run that all of these take into their backlogs."""
        for subscription in targets:
            backlog = subscription.backlog
            own = run
            if ring is not None and not self._memory.takes(subscription, ring):
                own = run.copied()
            if entered := backlog.put(own):  # else all of it was dropped at once
                last_in[subscription] = entered
            self._dirty[subscription] = None
            if backlog.overflowed:
                self.end(subscription)
                self.overflowed.append(subscription)

    def put_first(self, subscription: Subscription, entries: Iterable[Entry]) -> Generator[None, None, tuple[int, int]]:
        """Put messages of the history into its backlog, in parts, until it is full, opened or removed.

        The newest is first, and each comes before those that are there: so what is routed meanwhile comes behind all of them.
        Return how many were put, and how many did not fit.
        """
        backlog, account, room = subscription.backlog, self._memory.store.account, _REPLAYED
        kept, cut, is_state = 0, 0, backlog.keeps_newest_only
        for position, batch in entries:
            count = len(batch.sizes)
            if cut or (kept and is_state):
                cut += count
                room -= 1
            else:
                run = _RUNS[type(batch)](batch, position, account)
                fits = backlog.put_first(run.part(count - 1, count) if is_state else run)
                kept += fits
                cut += count - fits
                room -= 1 + batch.charge // _BYTES_PER_BATCH
            if room < 0:
                yield
                if subscription.pipe.state is not PipeState.UNOPENED:
                    break
                room = _REPLAYED
        return kept, cut

    def put_last(self, subscription: Subscription, entries: Iterable[Entry]) -> Iterator[None]:
        """Put messages of the history into its backlog, in parts and in order, whatever its capacity, until it is removed."""
        room = _REPLAYED
        for position, batch in entries:
            subscription.backlog.put(_RUNS[type(batch)](batch, position, self._memory.store.account))
            room -= 1 + batch.charge // _BYTES_PER_BATCH
            if room < 0:
                yield
                if subscription.pipe.state is not PipeState.UNOPENED:
                    break
                room = _REPLAYED

    def put_gap(self, topics: Topics) -> None:
        """Report to all that may get messages of these topics that an unknown number of them is missing here."""
        for subscription in self._router:
            backlog = subscription.backlog
            if backlog.keeps_newest_only or backlog.ended or subscription in self._router.alternatives:
                continue
            own = self._router.topics(subscription)
            self._puts += 1 + len(own) // _PATTERNS_PER_PUT  # so that many gaps take many turns
            if topics.may_reach(own):
                backlog.put_gap()
                self._dirty[subscription] = None

    def knows(self, id: int) -> bool:
        """Return whether a message of this broker has this id, or it is 0, which stands before all of them."""
        return id == 0 or self.first_id <= id < self.next_id

    def resume(
        self, subscription: Subscription, history: History, topics: Iterable[bytes], after: int, *, has_all: bool
    ) -> Iterator[None]:
        """Put what the history has behind the id ``after`` into its backlog, in parts, and in front of it what is missing.

        The subscription has all topics there are if it ``has_all``, else it has ``topics``.
        """
        is_known = self.knows(after)
        after = max(after, self.first_id - 1) if is_known else 0
        routed = self.next_id - 1 - after
        missing = history.missing(topics, after) if is_known else None
        kept, cut = yield from self.put_first(subscription, history.last(topics, ALL, after))
        if has_all and is_known:
            missing = routed - kept - cut
        is_exact = missing is not None
        if is_known and subscription.backlog.policy == "latest":
            is_exact = bool(kept or not missing)  # it would have got the newest only
        if cut or missing or not is_exact:
            subscription.backlog.put_gap_first(cut + (missing or 0), is_exact=is_exact)

    def _allowed(self, targets: Targets, item: Item, publisher: Publisher) -> Targets:
        """Return the targets without the excluded one, and without those that begin behind this item."""
        late = set()
        excluded = self.groups.get(item.exclude, item.exclude)
        topic = item.topic.decode()
        for subscription, names, matchers in publisher.not_yet:
            if subscription in targets and topic not in names:
                self._puts += len(matchers) // _PATTERNS_PER_PUT
                if not any(one.match(topic) for one in matchers):
                    late.add(subscription)
        return tuple(target for target in targets if target.id != excluded and target not in late)

    def _block_publisher(self, publisher: Publisher, full: Subscription, *, went_on: bool) -> None:
        if went_on or not publisher.blocked:
            publisher.blocked_since = time.monotonic()
            publisher.warned = False
        publisher.blocked = full
        if not full.waiters:  # what is read from now on counts for those that come behind, too
            full.charge_when_blocked = full.backlog.charge
        full.waiters.append(publisher)
        self._dirty[full] = None

    def unblock(self, subscription: Subscription) -> None:
        """Route those again that wait for it."""
        self.resuming.extend(subscription.waiters)
        subscription.waiters.clear()

    def end(self, subscription: Subscription) -> None:
        """Route nothing more to it. What is in its backlog is still written."""
        if subscription.is_live:
            subscription.state = subscription.state.to(SubscriptionState.ENDED)
            subscription.last_topics = self._router.topics(subscription)
            self._router.remove(subscription)
        self._dirty[subscription] = None
        self.unblock(subscription)


def _run_in_ring(item: References, position: int, _account: Account) -> Run:
    return SharedRun(item, position, item.hold.ring.account)


_RUNS: Final[dict[type, Callable[[Any, int, Account], Run]]] = {
    Batch: run_of,
    References: _run_in_ring,
    MemfdMessage: SharedRun,
}


def _done(item: Item | Singles, publisher: Publisher) -> None:
    """Let its publisher go on, as the item is enqueued or dropped."""
    if isinstance(item, MemfdMessage) and publisher.lender is not None:
        publisher.lender.send(pack(ROUTED, 0, item.id))
