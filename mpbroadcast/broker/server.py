"""The broker: who is there, what they subscribe to, and how all of it ends.

Stopping: what has been written by then is read, then every pipe from a publisher is closed, each backlog is ended, and who
has taken all of it has had a clean end. What is left at the deadline is closed without one.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.broker.acceptor import Acceptor
from mpbroadcast.broker.control_clients import ControlConnection
from mpbroadcast.broker.core.history import History
from mpbroadcast.broker.core.limits import TOGETHER, Budget, Cost, cost_of
from mpbroadcast.broker.core.patterns import Matcher
from mpbroadcast.broker.core.policies import new_backlog
from mpbroadcast.broker.core.router import Router, listed
from mpbroadcast.broker.core.states import SubscriptionState
from mpbroadcast.broker.host.journal import Journal, Succession
from mpbroadcast.broker.members import Peer, Publisher, Session, Subscription
from mpbroadcast.broker.reference_window import ReferenceWindow
from mpbroadcast.broker.traffic import Traffic
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.poller import Poller
from mpbroadcast.posix.processes import birth

log = logging.getLogger("mpbroadcast.broker")

_LAST_WORDS: Final = 1 << 14  # characters
DRAIN_TIMEOUT: Final = 5.0  # seconds, when nobody says how long
UNCLAIMED: Final = 60.0  # seconds for a process that cannot be watched to go on with what the last broker had for it
_LAST: Final = 0.1  # seconds, after the time for draining is over
_LOOK: Final = 0.1  # seconds from one look at what readers have read to the next, while stopping


class Broker:
    """All that the broker process does, on one listening socket, until it is stopped."""

    def __init__(
        self,
        listener: socket.socket,
        keys: list[bytes],
        on_request: Callable[[Broker, ControlConnection, dict[str, Any]], None],
        *,
        history: int = 0,
        stall_timeout: float | None = None,
        succession: Succession | None = None,
    ) -> None:
        self.loop = Poller()
        self.router: Router[Subscription] = Router()
        self.budget = Budget(TOGETHER)
        self.subscriptions: dict[int, Subscription] = {}
        self.sessions: dict[int, Session] = {}
        self.dropped_early: deque[int] = deque(maxlen=1024)  # subscriptions whose request may still come, if it was interrupted
        self.former_owners: OrderedDict[int, int] = OrderedDict()  # subscription -> process that had it open
        self.identity = succession.identity if succession is not None else secrets.token_hex(8)
        self.number_of_broker = succession.generation if succession is not None else 0
        self.restarts = succession is not None
        self._journal = succession.journal if succession is not None else None
        self.started = time.monotonic()
        self.stopping = False
        self._all_ended = False  # each subscription was ended, as no publisher was left while stopping
        self.ends_unneeded = False  # its starter has dropped it: it ends with the last session and subscription
        self.traffic = Traffic(
            self.loop,
            self.router,
            History(history) if history else None,
            stall_timeout,
        )
        self._reception = Acceptor(
            self.loop, listener, keys, lambda client, message: on_request(self, client, message), self._client_gone, self._died
        )
        self._numbers = iter(range((self.number_of_broker << 40) + 1, 1 << 63))  # none has been used before
        self._waiting: dict[ControlConnection, Callable[[], bool]] = {}
        self._telling = False  # whether those are looked at in this round
        self._undelivered: dict[ControlConnection, dict[Subscription, int]] = {}
        self._stopped_by: Peer | None = None
        self._patience = 0.0  # seconds without progress, while stopping
        self._progress: dict[Subscription, tuple[int, ...]] = {}
        self._progress_at = 0.0
        if self._journal is not None:
            self._restore(self._journal)

    def _restore(self, journal: Journal) -> None:
        """The subscriptions of the broker before this one, as far as their processes live."""
        trap_points.reach("restoring")
        for entry in journal.subscriptions:
            number = entry["id"]
            try:
                peer = self._reception.peer(entry["pid"])
            except OSError:
                journal.drop(number)
                continue
            if birth(peer.pid) != entry["birth"]:
                journal.drop(number)
                self._reception.drop_unused(peer)
                continue
            policy = entry["policy"]
            waits = entry["opened"] and policy in ("block", "disconnect")  # nobody knows whether it will ever be opened
            backlog = new_backlog(entry["capacity"], "drop_oldest" if waits else policy)
            subscription = Subscription(number, Session(self.number(), peer, self.budget), backlog)
            subscription.policy, subscription.restored = policy, True
            if entry["opened"]:
                subscription.pipe.reserve()
            self.subscriptions[number] = subscription
            self._spend(subscription, cost_of(entry["topics"], 1))
            peer.subscriptions.add(subscription)
            if entry["live"]:
                self.router.add(subscription, entry["topics"])
            else:
                subscription.state = subscription.state.to(SubscriptionState.ENDED)
                subscription.last_topics = tuple(entry["topics"])
                backlog.end()
            if not entry["birth"]:  # nothing will show that its process has ended, until that connects
                self.loop.later(UNCLAIMED, partial(self._remove_unclaimed, subscription))

    def _remove_unclaimed(self, subscription: Subscription) -> None:
        if subscription.restored:
            self._remove_for(subscription, "its process, of another PID namespace, has not come back")

    def _write_down(self, subscription: Subscription) -> None:
        if self._journal is not None:
            entry = {
                "id": subscription.number,
                "pid": subscription.pid,
                "birth": birth(subscription.pid),
                "topics": list(subscription.last_topics or self.router.topics(subscription)),
                "capacity": subscription.backlog.capacity,
                "policy": subscription.policy,
                "opened": subscription.owner is not None,
                "live": subscription.is_live,
            }
            self._journal.put(entry)

    def end_with(self, starter: int) -> None:
        """Stop when this process has ended.

        :raises ProcessLookupError: it has already.
        """
        self._reception.peer(starter).is_starter = True

    def run(self) -> None:
        """Serve until stopped, and all has been drained or the time for it is over."""
        while not self.finished:
            self.traffic.round()
            self._work_off()
            if self._undelivered:
                self._tell_delivered()
            if self.ends_unneeded and not (self.sessions or self.subscriptions):
                self.stop(DRAIN_TIMEOUT)
            self.loop.close_forgotten()
        self._reception.close()
        self.loop.close_forgotten()

    def _work_off(self) -> None:
        """Do what the round has found to be done: nothing iterates over subscriptions here, nor over publishers."""
        traffic = self.traffic
        while traffic.overflowed or traffic.departed or (self.stopping and not (traffic.publishers or self._all_ended)):
            while traffic.overflowed:
                self._ended(traffic.overflowed.pop())
            departed, traffic.departed = traffic.departed, {}
            for subscription, accepting in departed.items():
                if subscription.number in self.subscriptions:
                    self._reader_gone(subscription, accepting)
            if self.stopping and not traffic.publishers:
                self._end_all()
            traffic.run_until_idle()

    def report_crash(self, traceback: str) -> None:
        """Send every process the traceback; nothing else will be done."""
        self._reception.send_packet({"crashed": traceback[-_LAST_WORDS:]})

    @property
    def finished(self) -> bool:
        return self.stopping and not self.subscriptions and not self.traffic.publishers

    @property
    def held(self) -> int:
        """Bytes of messages that are here, of what somebody still has to read of publishers' rings, and of what is asked."""
        messages = self.traffic.memory.held + sum(one.held for one in self.traffic.publishers.values())
        return messages + self.budget.memory + self._reception.asked

    # --- sessions

    def number(self) -> int:
        return next(self._numbers)

    def _client_gone(self, client: ControlConnection, why: str) -> None:
        for subscription in list(client.opening):
            self.unopen(subscription)
        if client.session is not None:
            self.end_session(client.session, clean=False, why=why)
        elif client.refused and not self.stopping:
            log.warning("refused process %d: %s", client.peer.pid, why)
        self._waiting.pop(client, None)
        self._undelivered.pop(client, None)

    def _died(self, peer: Peer) -> None:
        """All that was its own goes, but for what the starter may have handed on; what it had published is still delivered."""
        for subscription in list(peer.subscriptions):
            if subscription.is_open or not peer.is_starter:
                self._remove_for(subscription, "its process has ended")
        if peer.is_starter:
            peer.is_starter = False  # so that it is watched no more
            self.stop(DRAIN_TIMEOUT)

    def new_session(self, client: ControlConnection) -> Session:
        session = Session(self.number(), client.peer, self.budget)
        client.session = session
        self.sessions[session.number] = session
        return session

    def end_session(self, session: Session, *, clean: bool, why: str = "it has detached") -> None:
        """Its publishers are done, and what it has open goes; also what nobody has opened yet, unless it has detached.

        The end of the broker decides what becomes of what its starter has not opened: it may have been handed on.
        """
        self.sessions.pop(session.number, None)
        for publisher in list(session.publishers):
            self.traffic.finish(publisher)
        for subscription in list(session.subscriptions):
            if subscription.is_open or not (clean or session.peer.is_starter):
                self._remove_for(subscription, why)

    # --- subscriptions

    def add_subscription(
        self,
        number: int,
        session: Session,
        topics: list[str],
        capacity: int,
        policy: str,
        made: Mapping[str, Matcher] | None = None,
    ) -> Subscription:
        """``made`` are matchers of its patterns.

        :raises OverBudget: the session has no room for it.
        """
        cost = cost_of(set(topics), 1)
        session.budget.check(cost)
        subscription = Subscription(number, session, new_backlog(capacity, policy))
        self._spend(subscription, cost)
        self.subscriptions[number] = subscription
        session.subscriptions.add(subscription)
        session.peer.subscriptions.add(subscription)
        self.router.add(subscription, topics, made)
        self._write_down(subscription)
        self.tell_waiting()
        return subscription

    @staticmethod
    def _spend(subscription: Subscription, cost: Cost) -> None:
        subscription.session.budget.spend(cost)
        subscription.cost = subscription.cost.plus(cost)

    def begin_behind(self, publisher: Publisher, subscription: Subscription, before: tuple[str, ...] = ()) -> None:
        """Let it have nothing that this publisher has written until now, but for its topics from ``before``."""
        if not publisher.all_routed:
            entry = (subscription, before)
            publisher.not_yet.append(entry)
            publisher.after_written(lambda: publisher.not_yet.remove(entry))

    def add_topics(
        self, subscription: Subscription, session: Session, topics: list[str], made: Mapping[str, Matcher] | None = None
    ) -> None:
        """Lead these topics to it, too, from behind what the session has published; ``made`` are matchers of its patterns.

        :raises OverBudget: its session has no room for them.
        """
        before = self.router.topics(subscription)
        cost = cost_of(set(topics).difference(before), 0)
        subscription.session.budget.check(cost)
        self._spend(subscription, cost)
        for publisher in session.publishers:
            self.begin_behind(publisher, subscription, before)
        self.router.add(subscription, topics, made)
        self._write_down(subscription)
        self.tell_waiting()

    def drop_topics(self, subscription: Subscription, topics: list[str]) -> None:
        """Lead these topics to it no more, from behind what has been published."""
        self.traffic.take_in()
        if not subscription.is_live:  # its reader was found to be gone
            return
        dropped = cost_of(set(topics).intersection(self.router.topics(subscription)), 0)
        self._spend(subscription, dropped.negated())
        self.router.drop(subscription, topics)
        self._write_down(subscription)
        self.traffic.routing.unblock(subscription)  # what waits for it may not be for it any more

    def open(self, subscription: Subscription, client: ControlConnection, *, shared: bool) -> list[int]:
        """Begin to open it: the descriptors for who opens, the second, if any, of the socket beside its pipe.

        It is open when :meth:`confirm_open` follows.

        :raises OSError: no descriptor is left.
        """
        ends = [subscription.pipe.begin_opening(subscription.backlog)]
        if shared:
            with contextlib.suppress(OSError):  # then all comes through the pipe
                own, other = DescriptorSocket.pair()
                subscription.window = ReferenceWindow(own)
                ends.append(other)
        subscription.pipe.opening = client
        client.opening.add(subscription)
        return ends

    def unopen(self, subscription: Subscription) -> None:
        """Who wanted to open it does not: it is as it was."""
        pipe = subscription.pipe
        if pipe.opening is not None:
            pipe.opening.opening.discard(subscription)
            pipe.opening = None
            self._close_ends(subscription, pipe.take_back())

    def _close_ends(self, subscription: Subscription, fd: int) -> None:
        self.loop.close(fd)
        window, subscription.window = subscription.window, None
        if window is not None:
            self.loop.close(window.fd_socket.detach())

    def confirm_open(self, subscription: Subscription, session: Session) -> None:
        """From now on it is ``session``'s, and what waits goes into its pipe."""
        pipe = subscription.pipe
        if pipe.opening is not None:
            pipe.opening.opening.discard(subscription)
            pipe.opening = None
        subscription.session.subscriptions.discard(subscription)
        subscription.session.peer.subscriptions.discard(subscription)
        self._reception.drop_unused(subscription.session.peer)
        subscription.session.budget.release(subscription.cost)
        session.budget.spend(subscription.cost)
        subscription.session = session
        session.subscriptions.add(subscription)
        session.peer.subscriptions.add(subscription)
        pipe.open()
        subscription.not_waited_for = self.stopping and session.peer is self._stopped_by
        if subscription.restored:
            subscription.report_restart()
        self._write_down(subscription)
        self.traffic.watch(subscription)
        self.former_owners[subscription.number] = session.peer.pid
        if len(self.former_owners) > 65536:
            self.former_owners.popitem(last=False)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Nothing more comes to it; what is there can still be received."""
        if subscription.is_live:
            subscription.backlog.end()
            self.traffic.routing.end(subscription)
            self._ended(subscription)

    def _ended(self, subscription: Subscription) -> None:
        if subscription.number in self.subscriptions:
            self._write_down(subscription)
        self.tell_waiting()

    def remove(self, subscription: Subscription) -> None:
        """It is gone, with all that was for it."""
        if self.subscriptions.pop(subscription.number, None) is None:
            return
        if self._journal is not None:
            self._journal.drop(subscription.number)
        self.unopen(subscription)
        self.traffic.drop(subscription)
        self._close_ends(subscription, subscription.pipe.close())
        subscription.session.subscriptions.discard(subscription)
        subscription.session.peer.subscriptions.discard(subscription)
        subscription.session.budget.release(subscription.cost)
        self._reception.drop_unused(subscription.session.peer)
        subscription.backlog.discard()
        self.tell_waiting()

    def _remove_for(self, subscription: Subscription, why: str) -> None:
        log.info("channel %d of process %d is removed: %s", subscription.number, subscription.pid, why)
        self.remove(subscription)

    def _reader_gone(self, subscription: Subscription, accepting: bool) -> None:
        if subscription.not_waited_for and not subscription.backlog.is_empty:
            self._give_up(subscription)
        else:
            self._remove_for(subscription, "its reader has closed it" if accepting else "it was unsubscribed")

    def wait_for(self, client: ControlConnection, enough: Callable[[], bool]) -> None:
        """Answer it as soon as there are enough subscriptions."""
        self._waiting[client] = enough
        self.tell_waiting()

    def tell_waiting(self) -> None:
        """Subscriptions or their topics have changed: answer those that have waited for it, once in this round."""
        if self._waiting and not self._telling:
            self._telling = True
            self.loop.later(0, self._tell_waiting)

    def _tell_waiting(self) -> None:
        self._telling = False
        for client, enough in list(self._waiting.items()):
            # An answer can fail, and who is gone then has let others go on already.
            if client in self._waiting and enough():
                del self._waiting[client]
                client.reply({"done": True})

    def when_delivered(self, client: ControlConnection, publisher: Publisher, *, now: bool = False) -> None:
        """Answer it when what the publisher has put into backlogs until now has left them; ``now``: whether it has."""
        pending = {
            subscription: position
            for subscription, position in publisher.last_in.items()
            if subscription.backlog.left < position
        }
        if now or not pending:
            client.reply({"done": not pending})
        else:
            self._undelivered[client] = pending

    def _tell_delivered(self) -> None:
        for client, pending in list(self._undelivered.items()):
            for subscription, position in list(pending.items()):
                if subscription.backlog.left >= position or subscription.number not in self.subscriptions:
                    del pending[subscription]
            if not pending:
                del self._undelivered[client]
                client.reply({"done": True})

    # --- the end

    def stop(self, timeout: float, by: Peer | None = None) -> None:
        """Drain until no reader makes progress for ``timeout`` seconds, then end. What ``by`` has open is not waited for."""
        if self.stopping:
            return
        self.stopping = True
        if self._journal is not None:
            self._journal.note_stopping()
        self._stopped_by = by
        self._patience, self._progress_at = timeout, time.monotonic()
        self.loop.later(min(timeout, _LOOK), self._look_for_progress)
        for subscription in list(self.subscriptions.values()):
            subscription.not_waited_for = subscription.session.peer is by
            if subscription.not_waited_for and subscription.owner is not None and not subscription.is_open:
                self.remove(subscription)  # nobody will open it
        for publisher in list(self.traffic.publishers.values()):
            self.traffic.finish(publisher)
        for subscription in self.subscriptions.values():
            self.traffic.mark(subscription)

    def _end_all(self) -> None:
        """Nothing more can be published."""
        self._all_ended = True
        for subscription in list(self.subscriptions.values()):
            if subscription.has_nothing_to_open_for:
                self.remove(subscription)
                continue
            self.unsubscribe(subscription)
            self.traffic.mark(subscription)  # who was unsubscribed before does not keep anything from being written any more

    @property
    def time_left(self) -> float:
        """Seconds until draining is given up, if no reader makes progress until then."""
        return max(0.0, self._progress_at + self._patience - time.monotonic())

    def _look_for_progress(self) -> None:
        before, self._progress = self._progress, {one: one.progress for one in self.subscriptions.values()}
        if self._progress != before:
            self._progress_at = time.monotonic()
        if self.time_left:
            self.loop.later(min(self.time_left, _LOOK), self._look_for_progress)
        else:
            self._time_is_over()

    def _time_is_over(self) -> None:
        self.traffic.catch_up()
        self.traffic.run_until_idle()
        for subscription in list(self.subscriptions.values()):
            if not subscription.backlog.is_empty:
                self._give_up(subscription)
        self.loop.later(_LAST, self._end_now)  # who waited for those can still have a clean end

    def _end_now(self) -> None:
        for subscription in list(self.subscriptions.values()):
            self._give_up(subscription)
        self.traffic.publishers.clear()

    def _give_up(self, subscription: Subscription) -> None:
        own = self._stopped_by is subscription.session.peer
        log.log(
            logging.DEBUG if own else logging.WARNING,
            "channel %d of process %d (%s) was closed with %d message(s) waiting: it %s",
            subscription.number,
            subscription.pid,
            listed(subscription.last_topics or self.router.topics(subscription)),
            subscription.backlog.waiting,
            "was never opened" if subscription.owner is None else "was not read in time",
        )
        self.remove(subscription)
