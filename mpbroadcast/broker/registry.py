"""Sessions and subscriptions: how they begin, change and end, and what of them is written down for the next broker.

A subscription belongs to the session that subscribed, until a process opens its channel: then to that process's session. What
a session, or a process, leaves behind is removed some at a time, as that may be thousands of subscriptions: they are not found
any more, and on a list, which the server works off, some in each round. So is one with very many topics. Publishers that are
to be read to their end are on another list.

Opening takes two requests. With the first, the pipe is made and its end goes to the process; with the second, that process has
it. If the connection ends in between, the channel is unopened again.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator
from functools import partial
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.broker.awaited import Awaited
from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.limits import TOGETHER, Budget, Cost, cost_of
from mpbroadcast.broker.core.patterns import is_pattern, matcher
from mpbroadcast.broker.core.policies import new_backlog, reserved_backlog
from mpbroadcast.broker.core.router import Router
from mpbroadcast.broker.core.states import PipeState, SubscriptionState
from mpbroadcast.broker.groups import Groups
from mpbroadcast.broker.host.journal import Entry, Succession
from mpbroadcast.broker.members import Group, Peer, Publisher, Session, Subscription
from mpbroadcast.broker.outbox import BridgeReader
from mpbroadcast.broker.peers import Peers
from mpbroadcast.broker.reference_window import ReferenceWindow
from mpbroadcast.broker.traffic import Traffic
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.poller import Poller
from mpbroadcast.posix.processes import birth

log = logging.getLogger("mpbroadcast.broker")

UNCLAIMED: Final = 60.0  # seconds for a process that cannot be watched to go on with what the last broker had for it
_MOST_REMOVED: Final = 64  # subscriptions in a round: some milliseconds
_MANY_TOPICS: Final = 1024  # the same time
_MOST_FORMER: Final = 65536


class Registry:
    """All sessions and subscriptions."""

    def __init__(
        self,
        poller: Poller,
        peers: Peers,
        router: Router[Subscription],
        traffic: Traffic,
        succession: Succession,
    ) -> None:
        self.subscriptions: dict[int, Subscription] = {}
        self.sessions: dict[int, Session] = {}
        self.budget = Budget(TOGETHER)
        self.openings: dict[Subscription, ControlConnection] = {}  # those that are being opened, and over which connection
        self.dropped_early: deque[int] = deque(maxlen=1024)  # subscriptions whose request may still come, if it was interrupted
        self.former_owners: OrderedDict[int, int] = OrderedDict()  # subscription -> process that had it open
        self.to_remove: OrderedDict[int, tuple[Subscription, str]] = OrderedDict()  # by their IDs, each with the reason
        self.to_finish: list[Iterator[None]] = []  # publishers of sessions that have ended: the rest of the reading of each
        self.groups = Groups(traffic)
        self.awaited = Awaited(peers, succession.journal)
        self._poller = poller
        self._peers = peers
        self._router = router
        self._traffic = traffic
        self._journal = succession.journal
        # The IDs of one broker are above those of all before it.
        self._ids = iter(range((succession.generation << 40) + 1, 1 << 63))

    def new_id(self) -> int:
        return next(self._ids)

    # --- the broker before this one

    def restore(self) -> None:
        """Take over the subscriptions that are written down, of processes that live."""
        trap_points.reach("restoring")
        for entry in self._journal.subscriptions if self._journal is not None else ():
            self._restore(entry)
        self.awaited.restore()

    def _restore(self, entry: Entry) -> None:
        try:
            peer = self._peers.get(entry["pid"])
        except OSError:
            self._forget_entry(entry["id"])
            return
        if birth(peer.pid) != entry["birth"]:
            self._forget_entry(entry["id"])
            self._peers.release(peer)
            return
        policy, session = entry["policy"], Session(self.new_id(), peer, self.budget)
        backlog = (reserved_backlog if entry["opened"] else new_backlog)(entry["capacity"], policy)
        is_live = entry["live"]
        if entry["group"] is not None:
            subscription = Subscription(entry["id"], session, new_backlog(entry["capacity"], "block"))
            is_live = is_live and self.groups.rejoin(subscription, entry, backlog)
        else:
            subscription = Subscription(entry["id"], session, backlog)
            subscription.policy = policy
        subscription.restored, subscription.label = True, entry["name"]
        if entry["opened"]:
            subscription.pipe.reserve()
        self.subscriptions[subscription.id] = subscription
        self._spend(subscription, cost_of(entry["topics"], 1))
        peer.subscriptions.add(subscription)
        if is_live:
            self._router.add(subscription.target, entry["topics"])
        else:
            subscription.state = subscription.state.to(SubscriptionState.ENDED)
            subscription.last_topics = tuple(entry["topics"])
            subscription.backlog.end()
        if not entry["birth"]:  # nothing will show that its process has ended, until that connects
            self._poller.later(UNCLAIMED, partial(self._remove_unclaimed, subscription))

    def _remove_unclaimed(self, subscription: Subscription) -> None:
        if subscription.restored:
            self.remove_in_parts(subscription, "its process, of another PID namespace, has not come back")

    def _write_down(self, subscription: Subscription) -> None:
        if self._journal is not None and subscription.is_written_down:
            entry = {
                "id": subscription.id,
                "name": subscription.label,
                "pid": subscription.pid,
                "birth": birth(subscription.pid),
                "topics": list(self.topics(subscription)),
                "capacity": subscription.backlog.capacity,
                "policy": subscription.target.policy,
                "group": None if subscription.group is None else subscription.group.name,
                "prefetch": 0 if subscription.group is None else subscription.group.shares.prefetch(subscription),
                "opened": subscription.owner is not None,
                "live": subscription.is_live,
            }
            self._journal.put(entry)

    def _forget_entry(self, id: int) -> None:
        if self._journal is not None:
            self._journal.drop(id)

    def note_stopping(self) -> None:
        if self._journal is not None:
            self._journal.note_stopping()

    # --- sessions

    def new_session(self, connection: ControlConnection) -> Session:
        session = Session(self.new_id(), connection.peer, self.budget)
        connection.session = session
        self.sessions[session.id] = session
        self.awaited.note_session(session.peer)
        return session

    def end_session(self, session: Session, *, clean: bool, why: str = "it has detached") -> None:
        """Read its publishers to their end, and remove what it has open; also what it has not opened, unless it has detached.

        Channels that the starter has not opened stay until the end of the broker: another process may have it.
        """
        if self.sessions.pop(session.id, None) is not None:
            self.awaited.note_end(session.peer)
        self.to_finish.extend(map(self._traffic.intake.finish, session.publishers))
        for subscription in session.subscriptions:
            if subscription.is_open or not (clean or session.peer.is_starter):
                self.remove_in_parts(subscription, why)

    def remove_all_of(self, peer: Peer) -> None:
        """Remove all that is a process's own, but for what the starter may have handed on."""
        self.awaited.note_death(peer)
        for subscription in peer.subscriptions:
            if subscription.is_open or not peer.is_starter:
                self.remove_in_parts(subscription, "its process has ended")

    # --- subscriptions

    def add_subscription(self, id: int, session: Session, capacity: int, policy: str, cost: Cost) -> Subscription:
        """Make a subscription that will have topics of this cost; :meth:`route` adds them.

        :raises OverBudget: the session has no room for it.
        """
        subscription = Subscription(id, session, new_backlog(capacity, policy))
        self.spend(subscription, cost)
        self.add(subscription)
        return subscription

    def add(self, subscription: Subscription) -> None:
        """Let a subscription be found, and end with its session."""
        self.subscriptions[subscription.id] = subscription
        subscription.session.subscriptions.add(subscription)
        subscription.session.peer.subscriptions.add(subscription)

    def route(self, subscription: Subscription, topics: list[str], *, is_last: bool = True) -> None:
        """Add topics to a subscription. The journal is written with the last of them."""
        self._router.add(subscription.target, topics)
        if is_last:
            self._write_down(subscription)

    def spend(self, subscription: Subscription, cost: Cost) -> None:
        """Spend the cost of topics that :meth:`route` adds next.

        :raises OverBudget: the subscription's session has no room for them.
        """
        subscription.session.budget.check(cost)
        self._spend(subscription, cost)

    @staticmethod
    def _spend(subscription: Subscription, cost: Cost) -> None:
        subscription.session.budget.spend(cost)
        subscription.cost = subscription.cost.plus(cost)

    def counting(self, topic: bytes | None) -> Generator[None, None, int]:
        """Return how many subscriptions there are, or get what is published to ``topic``, each member of a group counted.

        :raises UnicodeDecodeError: the topic is not UTF-8.
        """
        targets = None if topic is None else (yield from self._router.look_up(topic))
        count = self._router.count if targets is None else len(targets)
        count -= sum(1 for outbox in self._router.alternatives if targets is None or outbox in targets)
        return count + sum(len(group.shares) - 1 for group in self.groups if targets is None or group in targets)

    def topics(self, subscription: Subscription) -> tuple[str, ...]:
        """Return its topics, or those that it had until it was ended."""
        target = subscription.target
        return target.last_topics or self._router.topics(target)

    @staticmethod
    def begin_behind(publisher: Publisher, subscription: Subscription, before: tuple[str, ...] = ()) -> None:
        """Route nothing to the subscription that this publisher has written until now, but for the topics in ``before``."""
        if not publisher.all_routed:
            patterns = tuple(filter(is_pattern, before))
            entry = (subscription, frozenset(before).difference(patterns), tuple(map(matcher, patterns)))
            publisher.not_yet.append(entry)
            publisher.after_written(partial(publisher.not_yet.remove, entry))

    def recount(self, subscription: Subscription) -> None:
        """Let the session pay for the topics that were added before the request for more was cut off, and write these down."""
        if subscription.id in self.subscriptions:
            subscription.session.budget.release(subscription.cost)
            subscription.cost = Cost()
            self._spend(subscription, cost_of({*self.topics(subscription)}, 1))
            self._write_down(subscription)

    def drop_topics(self, subscription: Subscription, topics: list[str], *, is_last: bool = True) -> None:
        dropped = {*topics}.intersection(self._router.topics(subscription))
        self._spend(subscription, cost_of(dropped, 0).negated())
        self._router.drop(subscription, topics)
        if is_last:
            self._write_down(subscription)
        self._traffic.routing.unblock(subscription)  # what waits for it may not be for it any more

    def unsubscribe(self, subscription: Subscription) -> None:
        """Route nothing more to it; what is in its backlog can still be received."""
        if not subscription.is_live:
            return
        if subscription.group is not None:
            for member in self.groups.unsubscribe(subscription):
                self.note_ended(member)
            return
        subscription.backlog.end()
        self._traffic.routing.end(subscription)
        self.note_ended(subscription)

    def note_ended(self, subscription: Subscription) -> None:
        """Write down that nothing more is routed to it."""
        for one in self.groups.end(subscription) if isinstance(subscription, Group) else (subscription,):
            if one.id in self.subscriptions:
                self._write_down(one)

    def remove(self, subscription: Subscription, why: str = "") -> None:
        """Remove it, unless it is removed already, with all that is in its backlog. Log ``why``."""
        if subscription.pipe.state is PipeState.GONE:
            return
        if why:
            log.info("%s of process %d is removed: %s", subscription.described, subscription.pid, why)
        self.subscriptions.pop(subscription.id, None)
        self._forget_entry(subscription.id)
        self.unopen(subscription)
        self.groups.leave(subscription)
        self._traffic.drop(subscription)
        self._close_descriptors(subscription, subscription.pipe.close())
        self._detach(subscription)
        subscription.backlog.discard()
        if isinstance(subscription, BridgeReader):
            subscription.gone.append(subscription)

    def remove_in_parts(self, subscription: Subscription, why: str) -> None:
        """Remove it when the server has time; from now on it is not found."""
        if self.subscriptions.pop(subscription.id, None) is not None:
            self.to_remove[subscription.id] = subscription, why
            self.groups.retire(subscription)

    def close(self, subscription: Subscription, why: str) -> None:
        """Remove it: at once, if that does not take long."""
        if len(self.topics(subscription)) <= _MANY_TOPICS:
            self.remove(subscription, why)
        else:
            self._forget_entry(subscription.id)
            self.remove_in_parts(subscription, why)

    def remove_some(self) -> None:
        """Remove what is to be removed in parts, as much as a round has time for."""
        room = _MANY_TOPICS
        while self.to_remove and room > 0:
            id, (subscription, why) = next(iter(self.to_remove.items()))
            topics = self._router.topics(subscription)
            room -= len(topics) + _MANY_TOPICS // _MOST_REMOVED
            if len(topics) > _MANY_TOPICS:
                self._router.drop(subscription, topics[-_MANY_TOPICS:])
            else:
                del self.to_remove[id]
                self.remove(subscription, why)

    def _detach(self, subscription: Subscription) -> None:
        session = subscription.session
        session.budget.release(subscription.cost)
        session.subscriptions.discard(subscription)
        session.peer.subscriptions.discard(subscription)
        self._peers.release(session.peer)

    # --- opening

    def begin_opening(self, subscription: Subscription, connection: ControlConnection, *, shared: bool) -> list[int]:
        """Make its pipe, the pipe back if its reader reports, and the socket beside it if ``shared``. Return that one's ends.

        :raises OSError: no descriptor is left.
        """
        is_member = subscription.target is not subscription
        ends = [subscription.pipe.begin_opening(subscription.backlog, is_member=is_member)]
        if is_member:
            try:
                ends.append(subscription.pipe.begin_reports())
            except OSError:
                self._poller.close(ends[0])
                self._close_descriptors(subscription, subscription.pipe.take_back())
                raise
        if shared:
            with contextlib.suppress(OSError):  # then all comes through the pipe
                own, other = DescriptorSocket.pair()
                subscription.window = ReferenceWindow(own)
                ends.append(other)
        subscription.pipe.token = self.new_id()
        self.openings[subscription] = connection
        return ends

    def unopen(self, subscription: Subscription) -> None:
        """Take its opening back: it is as it was."""
        if self.openings.pop(subscription, None) is not None:
            self._close_descriptors(subscription, subscription.pipe.take_back())

    def unopen_all(self, connection: ControlConnection) -> None:
        """Take back what was being opened over this connection."""
        for subscription, opening in list(self.openings.items()):
            if opening is connection:
                self.unopen(subscription)

    def confirm_open(self, subscription: Subscription, session: Session, *, is_abandoned: bool) -> None:
        """Give it to ``session``, whose process has its reader's end, and write its backlog into the pipe.

        :raises BrokenPipeError: the reader's end is closed already; nothing has changed.
        """
        if subscription.restored:
            subscription.report_restart()
        self.openings.pop(subscription, None)
        session.budget.spend(subscription.cost)
        self._detach(subscription)
        subscription.session = session
        session.subscriptions.add(subscription)
        session.peer.subscriptions.add(subscription)
        subscription.pipe.open()
        subscription.is_abandoned = is_abandoned
        self._write_down(subscription)
        self.groups.open(subscription)
        self._traffic.watch(subscription)
        self.former_owners[subscription.id] = session.peer.pid
        if len(self.former_owners) > _MOST_FORMER:
            self.former_owners.popitem(last=False)

    def _close_descriptors(self, subscription: Subscription, fd: int) -> None:
        self._poller.close(fd)
        self._poller.close(subscription.pipe.end_reports())
        window, subscription.window = subscription.window, None
        if window is not None:
            self._poller.close(window.fd_socket.detach())
