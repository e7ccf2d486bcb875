"""The broker: who is there, and what goes from whom to whom.

A **round** reads what is in the publishers' pipes, routes it into backlogs, and then moves each backlog that has something
into its pipe. A batch that does not fit into every backlog that would get it is **parked**, and its publisher is not read until
it does: so all see one order, and the publisher's pipe fills up until its ``publish`` waits. Who frees room, or goes, lets
those that wait for it go on, the longest first.

Stopping: what has been written by then is read, then every pipe from a publisher is closed, each backlog is ended, and who
has taken all of it has had a clean end. What is left at the deadline is closed without one.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from mpbroadcast.broker.clients import Client
from mpbroadcast.broker.loop import IN, OUT, Loop
from mpbroadcast.broker.members import (
    LONGEST_RETRY,
    PIPE_SIZE,
    SHORTEST_RETRY,
    Peer,
    Publisher,
    Session,
    Subscription,
    new_pipe,
)
from mpbroadcast.broker.reception import Reception
from mpbroadcast.broker.router import Router, matches
from mpbroadcast.wire.frames import Batch, FrameError, end_run, run_of

__all__ = ["Broker"]

log = logging.getLogger("mpbroadcast.broker")

_BUSY: Final = 16  # messages in one read, from which on a publisher's pipe is read after naps instead of events
_SHORTEST_NAP: Final = 100e-6  # seconds; it doubles while a publisher stays busy
_LONGEST_NAP: Final = 400e-6
_LAST: Final = 0.1  # seconds, after the time for draining is over


class Broker:
    """All that the broker process does, on one listening socket, until it is stopped."""

    def __init__(
        self,
        listener: socket.socket,
        keys: list[bytes],
        on_request: Callable[[Broker, Client, dict[str, Any]], None],
    ) -> None:
        self.loop = Loop()
        self.router: Router[Subscription] = Router()
        self.subscriptions: dict[int, Subscription] = {}
        self.publishers: dict[int, Publisher] = {}
        self.sessions: dict[int, Session] = {}
        self.former_owners: dict[int, int] = {}  # subscription -> process that had it open
        self.identity = secrets.token_hex(8)
        self.started = time.monotonic()
        self.routed = 0
        self.stopping = False
        self._waiting: dict[Client, Callable[[], bool]] = {}
        self._reception = Reception(
            self.loop, listener, keys, lambda client, message: on_request(self, client, message), self._client_gone, self._died
        )
        self._dirty: dict[Subscription, None] = {}
        self._resuming: list[Publisher] = []
        self._numbers = iter(range(1, 1 << 63))
        self._stopped_by: Peer | None = None
        self._quiet = False
        self._busy: dict[Publisher, None] = {}

    def run(self) -> None:
        """Serve until stopped, and all has been drained or the time for it is over."""
        loop = self.loop
        nap = _SHORTEST_NAP
        while not self.finished:
            if self._busy:
                loop.round(nap)
                nap = min(2 * nap, _LONGEST_NAP)
                for publisher in list(self._busy):
                    self._read(publisher)
            else:
                nap = _SHORTEST_NAP
                loop.round()
            while self._resuming or self._dirty:
                self._flush()
            loop.close_forgotten()
        self._reception.close()
        loop.close_forgotten()

    @property
    def finished(self) -> bool:
        return self.stopping and not self.subscriptions and not self.publishers

    # --- sessions

    def number(self) -> int:
        return next(self._numbers)

    def _client_gone(self, client: Client, why: str) -> None:
        if client.opening is not None:
            self.unopen(client.opening)
        if client.session is not None:
            log.debug("process %d: %s", client.peer.pid, why)
            self.end_session(client.session, clean=False)
        self._waiting.pop(client, None)

    def _died(self, peer: Peer) -> None:
        """All that was its own goes; what it had published is still delivered."""
        for subscription in list(peer.subscriptions):
            self.remove(subscription)

    def new_session(self, client: Client) -> Session:
        session = Session(self.number(), client.peer)
        client.session = session
        self.sessions[session.number] = session
        return session

    def end_session(self, session: Session, *, clean: bool) -> None:
        """Its publishers are done, and what it has open goes; also what nobody has opened yet, unless it has detached."""
        self.sessions.pop(session.number, None)
        for publisher in list(session.publishers):
            self.finish(publisher)
        for subscription in list(session.subscriptions):
            if subscription.opened or not clean:
                self.remove(subscription)

    # --- publishers

    def add_publisher(self, session: Session) -> tuple[Publisher, int]:
        """A new publisher, and the descriptor that is its end.

        :raises OSError: no descriptor is left.
        """
        read, write = new_pipe(PIPE_SIZE)
        publisher = Publisher(self.number(), session, read)
        self.publishers[publisher.number] = publisher
        session.publishers.add(publisher)
        self.loop.watch(read, IN, lambda _: self._read(publisher))
        return publisher, write

    def _read(self, publisher: Publisher) -> None:
        before = self.routed
        try:
            chunk = publisher.read()
        except BlockingIOError:
            self._set_busy(publisher, False)
            return
        if not chunk:
            self._close_publisher(publisher)
            return
        self._take(publisher, chunk)
        self._route(publisher)
        self._set_busy(publisher, self.routed - before > _BUSY)

    def _set_busy(self, publisher: Publisher, busy: bool) -> None:
        """Whether its pipe is read after naps.

        A publisher that finds the broker waiting for its pipe pays for waking it, with each message; one whose pipe nobody
        waits for pays nothing. What else happens ends a nap at once.
        """
        if busy == (publisher in self._busy) or publisher.fd < 0 or publisher.blocked:
            return
        if busy:
            self._busy[publisher] = None
            self.loop.forget(publisher.fd)
        else:
            del self._busy[publisher]
            self.loop.watch(publisher.fd, IN, lambda _: self._read(publisher))

    def _take(self, publisher: Publisher, chunk: bytes) -> None:
        try:
            publisher.take(chunk)
        except FrameError as error:
            log.warning("process %d sent %s, which is no frame: it cannot publish any more", publisher.pid, error)
            self._close_publisher(publisher)

    def take_in(self, session: Session) -> None:
        """Route what the session's publishers have written until now, as far as backlogs take it.

        So that what it asks for next comes behind it.
        """
        for publisher in list(session.publishers):
            end = publisher.end_of_written()
            while publisher.fd >= 0 and not publisher.blocked and publisher.position < end:
                self._take(publisher, publisher.read(end - publisher.position))
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
                self._route(publisher)
        self._close_publisher(publisher)

    def _close_publisher(self, publisher: Publisher) -> None:
        fd, publisher.fd = publisher.fd, -1
        self.loop.close(fd)
        self._busy.pop(publisher, None)
        publisher.close()
        publisher.session.publishers.discard(publisher)
        if not publisher.blocked:
            self._route(publisher)

    def _forget_publisher(self, publisher: Publisher) -> None:
        self.publishers.pop(publisher.number, None)
        if self.stopping and not self.publishers:
            self._end_all()

    # --- routing

    def _route(self, publisher: Publisher) -> None:
        """Route what is parked, as far as the backlogs take it."""
        parked = publisher.parked
        while parked:
            batch = parked.popleft()
            if not isinstance(batch, Batch):
                batch()
                continue
            try:
                full, rest = self._deliver(batch, publisher)
            except UnicodeDecodeError:
                log.warning("process %d published to a topic that is not UTF-8: dropped", publisher.pid)
                continue
            if full is not None:
                parked.appendleft(rest)
                self._block(publisher, full)
                return
        if publisher.blocked:
            publisher.blocked = False
            if publisher.fd >= 0:
                self.loop.watch(publisher.fd, IN, lambda _: self._read(publisher))
        if publisher.fd < 0:
            self._forget_publisher(publisher)

    def _deliver(self, batch: Batch, publisher: Publisher) -> tuple[Subscription | None, Batch]:
        """Put as much of a batch as all its targets take into their backlogs: who is full, if one is, and what is left."""
        targets = self.router.targets(batch.topic)
        if batch.exclude or publisher.not_yet:
            late = {subscription for subscription, before in publisher.not_yet if not matches(before, batch.topic)}
            targets = tuple(target for target in targets if target.number != batch.exclude and target not in late)
        fits = len(batch.sizes)
        full = None
        charge = batch.charge
        for subscription in targets:
            outbox = subscription.outbox
            least = outbox.fitting(batch, charge)
            if least < fits:
                subscription.refresh()
                least = outbox.fitting(batch, charge)
                if least < fits:
                    fits, full = least, subscription
        rest = batch
        if full is not None:
            if not fits:
                return full, batch
            batch, rest = batch.cut(fits)
        if targets:
            run = run_of(batch)
            dirty = self._dirty
            for subscription in targets:
                subscription.outbox.put(run)
                dirty[subscription] = None
        self.routed += fits
        return full, rest

    def _block(self, publisher: Publisher, full: Subscription) -> None:
        if not publisher.blocked:
            publisher.blocked = True
            # Not even for errors: that its writers are gone would be reported again and again.
            self.loop.forget(publisher.fd)
            self._busy.pop(publisher, None)
        full.waiters.append(publisher)
        full.blocked_at = full.outbox.charge
        self._dirty[full] = None

    def _unblock(self, subscription: Subscription) -> None:
        self._resuming.extend(subscription.waiters)
        subscription.waiters.clear()

    # --- subscriptions

    def add_subscription(self, session: Session, topics: list[str], capacity: int) -> Subscription:
        subscription = Subscription(self.number(), session, capacity)
        self.subscriptions[subscription.number] = subscription
        session.subscriptions.add(subscription)
        session.peer.subscriptions.add(subscription)
        self.router.add(subscription, topics)
        self.tell_waiting()
        return subscription

    def begin_behind(self, publisher: Publisher, subscription: Subscription, before: tuple[str, ...] = ()) -> None:
        """Let it have nothing that this publisher has written until now, but for its topics from ``before``."""
        if not publisher.all_routed:
            entry = (subscription, before)
            publisher.not_yet.append(entry)
            publisher.after_written(lambda: publisher.not_yet.remove(entry))

    def add_topics(self, subscription: Subscription, session: Session, topics: list[str]) -> None:
        """Lead these topics to it, too, from behind what the session has published."""
        before = self.router.topics(subscription)
        for publisher in session.publishers:
            self.begin_behind(publisher, subscription, before)
        self.router.add(subscription, topics)
        self.tell_waiting()

    def open(self, subscription: Subscription, client: Client) -> int:
        """Begin to open it: the descriptor for who opens. It is open when :meth:`confirm_open` follows.

        :raises OSError: no descriptor is left.
        """
        read = subscription.make_pipe()
        subscription.opening = client
        client.opening = subscription
        return read

    def unopen(self, subscription: Subscription) -> None:
        """Who wanted to open it does not: it is as it was."""
        if subscription.opening is not None:
            subscription.opening.opening = None
            subscription.opening = None
            self.loop.close(subscription.fd)
            subscription.fd = -1

    def confirm_open(self, subscription: Subscription, session: Session) -> None:
        """From now on it is ``session``'s, and what waits goes into its pipe."""
        if subscription.opening is not None:
            subscription.opening.opening = None
            subscription.opening = None
        subscription.session.subscriptions.discard(subscription)
        subscription.session.peer.subscriptions.discard(subscription)
        self._reception.drop_unused(subscription.session.peer)
        subscription.session = session
        session.subscriptions.add(subscription)
        session.peer.subscriptions.add(subscription)
        subscription.opened = True
        self._remember_owner(subscription.number, session.peer.pid)
        self.loop.watch(subscription.fd, 0, lambda events: self._writable(subscription, events))
        self._dirty[subscription] = None

    def _remember_owner(self, number: int, pid: int) -> None:
        self.former_owners[number] = pid
        if len(self.former_owners) > 65536:
            del self.former_owners[next(iter(self.former_owners))]

    def unsubscribe(self, subscription: Subscription) -> None:
        """Nothing more comes to it; what is there can still be received."""
        if subscription.live:
            subscription.live = False
            self.router.remove(subscription)
            subscription.outbox.end(end_run())
            self._dirty[subscription] = None
            self._unblock(subscription)
            self.tell_waiting()

    def remove(self, subscription: Subscription) -> None:
        """It is gone, with all that was for it."""
        if self.subscriptions.pop(subscription.number, None) is None:
            return
        self.unopen(subscription)
        self.router.remove(subscription)
        subscription.live = False
        fd, subscription.fd = subscription.fd, -1
        self.loop.close(fd)
        subscription.session.subscriptions.discard(subscription)
        subscription.session.peer.subscriptions.discard(subscription)
        self._reception.drop_unused(subscription.session.peer)
        self._dirty.pop(subscription, None)
        self._unblock(subscription)
        self.tell_waiting()

    def _writable(self, subscription: Subscription, events: int) -> None:
        if events & OUT:
            self._dirty[subscription] = None
        else:
            self.remove(subscription)  # its reader is gone

    def _flush(self) -> None:
        """Move what is in backlogs into pipes, and let those go on who waited for that."""
        dirty, self._dirty = self._dirty, {}
        for subscription in dirty:
            if subscription.opened and subscription.fd >= 0:
                self._write(subscription)
        resuming, self._resuming = self._resuming, []
        for publisher in resuming:
            if publisher.parked:
                self._route(publisher)

    def _write(self, subscription: Subscription) -> None:
        try:
            full = subscription.write()
        except OSError:
            self.remove(subscription)
            return
        outbox = subscription.outbox
        if outbox.ended and outbox.empty:
            self.remove(subscription)
            return
        if subscription.waiters:
            subscription.refresh()
            if outbox.charge < subscription.blocked_at:
                subscription.retry = SHORTEST_RETRY
                self._unblock(subscription)
        if self._stopped_by is subscription.session.peer and full:
            self._give_up(subscription)
            return
        self._arm(subscription, full)

    def _arm(self, subscription: Subscription, full: bool) -> None:
        """Wait for room: in the pipe, or, while publishers wait, in what has not been read of it."""
        if subscription.waiters and not full:
            if subscription.one_page:
                full = True  # such a pipe has room when all has been read
            elif not subscription.retrying:
                subscription.retrying = True
                self.loop.later(subscription.retry, lambda: self._retry(subscription))
                subscription.retry = min(2 * subscription.retry, LONGEST_RETRY)
        if full != subscription.armed:
            subscription.armed = full
            self.loop.change(subscription.fd, OUT if full else 0)

    def _retry(self, subscription: Subscription) -> None:
        subscription.retrying = False
        if subscription.fd >= 0:
            self._dirty[subscription] = None

    @property
    def live_subscriptions(self) -> int:
        return sum(subscription.live for subscription in self.subscriptions.values())

    def wait_for(self, client: Client, enough: Callable[[], bool]) -> None:
        """Answer it as soon as there are enough subscriptions."""
        self._waiting[client] = enough
        self.tell_waiting()

    def tell_waiting(self) -> None:
        """Subscriptions or their topics have changed: answer those that have waited for it."""
        for client, enough in list(self._waiting.items()):
            if enough():
                del self._waiting[client]
                client.reply({"done": True})

    # --- the end

    def stop(self, timeout: float, by: Peer | None = None, *, quiet: bool = False) -> None:
        """Drain for at most ``timeout`` seconds, then end. What ``by`` has open is not waited for.

        ``quiet``: ``by`` is at its own end, and nobody is left there to miss what it did not receive.
        """
        if self.stopping:
            return
        self.stopping = True
        self._stopped_by = by
        self._quiet = quiet
        self.loop.later(timeout, self._time_is_over)
        for publisher in list(self.publishers.values()):
            self.finish(publisher)
        if not self.publishers:
            self._end_all()
        for subscription in list(self.subscriptions.values()):
            if not (subscription.live or subscription.opened or subscription.outbox.waiting):
                self.remove(subscription)  # it was unsubscribed, and nobody who opens it would miss anything
            self._dirty[subscription] = None

    def _end_all(self) -> None:
        for subscription in list(self.subscriptions.values()):
            self.unsubscribe(subscription)

    def _time_is_over(self) -> None:
        for subscription in list(self.subscriptions.values()):
            if not subscription.outbox.empty:
                self._give_up(subscription)
        self.loop.later(_LAST, self._end_now)  # who waited for those can still have a clean end

    def _end_now(self) -> None:
        for subscription in list(self.subscriptions.values()):
            self._give_up(subscription)
        self.publishers.clear()

    def _give_up(self, subscription: Subscription) -> None:
        own = self._stopped_by is subscription.session.peer
        log.log(
            logging.DEBUG if own and self._quiet else logging.WARNING,
            "channel %d of process %d (%s) was closed with %d message(s) waiting: it %s",
            subscription.number,
            subscription.pid,
            ", ".join(self.router.topics(subscription)) or "unsubscribed",
            subscription.outbox.waiting,
            "was not read in time" if subscription.opened else "was never opened",
        )
        self.remove(subscription)
