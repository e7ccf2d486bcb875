"""The broker: puts the rooms together, and runs one round after the other.

A **round** waits until something happens, reads, routes and writes (``traffic``), replies to the requests that have come
(``acceptor``, ``requests``), and then works off what all of that has found: subscriptions that are over, processes that have
died, connections that are closed. There nothing iterates over subscriptions, publishers or connections any more.

Nothing keeps a round for long. A request that takes long is an iterator that is advanced once in a round (:meth:`Broker.do`),
as far as the round has time for it; one that waits for something yields :data:`WAIT`, and no round is run for it alone. Of what
sessions leave behind (``registry.to_finish``, ``registry.to_remove``), only some is worked off in a round.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from mpbroadcast.broker.acceptor import Acceptor
from mpbroadcast.broker.bridges import Bridges
from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.history import History
from mpbroadcast.broker.core.linger import Linger
from mpbroadcast.broker.core.router import Router
from mpbroadcast.broker.host.journal import MOST_IDS, Succession, first_id
from mpbroadcast.broker.members import Peer, Subscription
from mpbroadcast.broker.peers import Peers
from mpbroadcast.broker.registry import Registry
from mpbroadcast.broker.shutdown import Shutdown
from mpbroadcast.broker.traffic import Traffic
from mpbroadcast.posix.fd_socket import Socket
from mpbroadcast.posix.poller import Poller

log = logging.getLogger("mpbroadcast.broker")

_LAST_WORDS: Final = 1 << 14  # characters
_SECONDS_FOR_PARTS: Final = 0.01  # in a round, for what takes long, and what waits: patterns may take long to match
DRAIN_TIMEOUT: Final = 5.0  # seconds, when the request for the end has no other
WAIT: Final = True  # what a part yields that has nothing to do until something has happened

Parts = Iterator[bool | None]


class Broker:
    """All that the broker process does, on one listening socket, until it is stopped."""

    def __init__(
        self,
        listener: Socket,
        keys: list[bytes],
        answer: Callable[[Broker, ControlConnection, dict[str, Any]], None],
        *,
        history: int = 0,
        stall_timeout: float | None = None,
        succession: Succession | None = None,
        linger: Linger | None = None,
    ) -> None:
        """Serve on ``listener``, for clients that have one of ``keys``; ``answer`` replies to a request."""
        self.succession = succession or Succession(secrets.token_hex(8), 0, None)
        self.started = time.monotonic()
        self.linger = linger  # it ends when nothing needs it; None: with its starter, or by a request
        self.poller = Poller()
        self.router: Router[Subscription] = Router()
        first = first_id(self.succession.journal)
        self.traffic = Traffic(self.poller, self.router, History(history) if history else None, stall_timeout, first)
        self.peers = Peers(self.poller)
        self.acceptor = Acceptor(self.poller, listener, keys, self.peers)
        self.registry = Registry(self.poller, self.peers, self.router, self.traffic, self.succession)
        self.bridges = Bridges(self.registry, self.traffic, self.router, self.succession.journal)
        self.parts: deque[Parts] = deque()  # what takes long: the rest of each
        self.waiting: deque[Parts] = deque()  # of those, what waits until something has happened
        self.shutdown: Shutdown | None = None
        self._shutdown_steps: Iterator[None] = iter(())
        self._answer = answer
        self._reserve_at = 0  # ids of messages: when the next one is as high, more are reserved
        self._reserve_ids()
        self.registry.restore()
        self.bridges.restore()
        if linger is not None:
            self.poller.later(0.0, _wake)

    def end_with(self, starter: int) -> None:
        """Stop when this process has ended.

        :raises ProcessLookupError: it has already.
        """
        self.peers.get(starter).is_starter = True

    def run(self) -> None:
        """Serve until stopped, and all has been drained or the time for it is over."""
        while self.shutdown is None or not self.is_finished:
            self.round()
        self.acceptor.close()
        self.poller.close_forgotten()

    def round(self, *, at_once: bool = False) -> None:
        """Wait for what happens, unless ``at_once`` is set or something is left to do, and handle it."""
        registry, traffic, acceptor = self.registry, self.traffic, self.acceptor
        left = self.parts or registry.to_finish or registry.to_remove or acceptor.readable or acceptor.closed
        traffic.round(at_once=at_once or bool(left or traffic.overflowed or traffic.departed))
        if acceptor.readable:
            for connection, request in acceptor.requests():
                self._answer(self, connection, request)
        if traffic.overflowed or traffic.departed or self.peers.dead or acceptor.closed:
            self._work_off()
        if registry.to_finish and next(registry.to_finish[-1], True) is True:
            registry.to_finish.pop()
        if registry.to_remove:
            registry.remove_some()
        if self.bridges.gone:
            self.bridges.work_off()
        if self.linger is not None and not (registry.sessions or registry.subscriptions or registry.awaited.peers):
            self._end_unneeded(self.linger)
        if self.shutdown is not None:
            next(self._shutdown_steps, None)
            self._work_off()
        if self.parts or self.waiting:
            self._do_parts()
        if traffic.routing.next_id > self._reserve_at:
            self._reserve_ids()
        self.poller.close_forgotten()

    def _reserve_ids(self) -> None:
        """Reserve more ids than a broker gives out until this is called again: one that takes over begins above them."""
        next_id, journal = self.traffic.routing.next_id, self.succession.journal
        self._reserve_at = next_id + MOST_IDS // 2
        if journal is not None:
            journal.reserve_ids(next_id + MOST_IDS)

    def _end_unneeded(self, linger: Linger) -> None:
        seconds = linger.look(time.monotonic())
        if seconds == 0:
            self.stop(DRAIN_TIMEOUT)
        elif seconds is not None:
            self.poller.later(seconds, _wake)

    def do(self, part: Parts) -> None:
        """Advance what takes long by one step; the others are for later rounds."""
        for waits in part:
            (self.waiting if waits else self.parts).append(part)
            break

    def _do_parts(self) -> None:
        """Advance what takes long, and look at what waits, each once: as many as there is time for."""
        parts = self.parts
        parts.extend(self.waiting)
        self.waiting.clear()
        end = time.monotonic() + _SECONDS_FOR_PARTS
        for _ in range(len(parts)):
            self.do(parts.popleft())
            if time.monotonic() > end:
                break

    def _has_found(self) -> bool:
        traffic = self.traffic
        return bool(traffic.overflowed or traffic.departed or self.peers.dead or self.acceptor.closed)

    def _work_off(self) -> None:
        """Do what the round has found to be done."""
        traffic, registry, peers = self.traffic, self.registry, self.peers
        while self._has_found():
            while traffic.overflowed:
                registry.note_ended(traffic.overflowed.pop())
            departed, traffic.departed = traffic.departed, {}
            for subscription, was_accepting in departed.items():
                self._remove_departed(subscription, was_accepting)
            while peers.dead:
                self._remove_peer(peers.dead.pop())
            self._remove_connections()
            traffic.run_until_idle()

    def _remove_departed(self, subscription: Subscription, was_accepting: bool) -> None:
        if subscription.is_abandoned and not subscription.backlog.is_empty and self.shutdown is not None:
            self.shutdown.give_up(subscription)
        else:
            self.registry.remove(subscription, "its reader has closed it" if was_accepting else "it had ended")

    def _remove_peer(self, peer: Peer) -> None:
        self.acceptor.close("its process has ended", peer)
        self._remove_connections()  # while it still counts as the starter
        self.registry.remove_all_of(peer)
        if peer.is_starter:
            peer.is_starter = False  # so that it is watched no more
            self.stop(DRAIN_TIMEOUT)

    def _remove_connections(self) -> None:
        closed = self.acceptor.closed
        while closed:
            connection = closed.pop()
            self.registry.unopen_all(connection)
            if connection.session is not None:
                self.registry.end_session(connection.session, clean=False, why=connection.why)
            elif connection.is_refused and self.shutdown is None:
                log.warning("refused process %d: %s", connection.peer.pid, connection.why)
            self.acceptor.forget(connection)

    def stop(self, timeout: float, by: Peer | None = None) -> Shutdown:
        """Drain until no reader makes progress for ``timeout`` seconds, then end. Wait for no channel of ``by``."""
        if self.shutdown is None:
            self.bridges.stop()
            self.shutdown = Shutdown(self.poller, self.registry, self.traffic, timeout, by)
            self._shutdown_steps = self.shutdown.steps()
        return self.shutdown

    @property
    def is_finished(self) -> bool:
        """True if it was stopped, and nothing is left to drain."""
        return self.shutdown is not None and not self.registry.subscriptions and not self.traffic.publishers

    def report_crash(self, traceback: str) -> None:
        """Send every process the traceback; nothing else will be done."""
        self.acceptor.send({"crashed": traceback[-_LAST_WORDS:]})


def _wake() -> None:
    """End the wait of a round."""
