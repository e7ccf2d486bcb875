"""The way of messages through the broker: one round reads, routes and writes.

::

    publishers' pipes -> intake -> queues -> routing -> backlogs -> delivery -> channels' pipes
                         (rings and messages in memory of their own: memory_exchange)

Nothing here calls the server. The server finds its work on two lists, which it works off at the end of the round, where nothing
iterates over subscriptions any more: ``departed`` has those that are done, closed by their readers, or full and abandoned;
``overflowed`` those that have ended themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from functools import partial
from typing import Final

from mpbroadcast.broker.channel_pipe import PIPE_SIZE
from mpbroadcast.broker.core.history import History
from mpbroadcast.broker.core.pace import MANY
from mpbroadcast.broker.core.router import Router
from mpbroadcast.broker.core.states import PublisherState
from mpbroadcast.broker.delivery import Delivery
from mpbroadcast.broker.fast_path import FastPath
from mpbroadcast.broker.intake import MUCH, Intake
from mpbroadcast.broker.members import Publisher, Subscription
from mpbroadcast.broker.memory_exchange import MemoryExchange
from mpbroadcast.broker.routing import Routing
from mpbroadcast.broker.stall_warnings import Stalls
from mpbroadcast.posix.poller import Poller
from mpbroadcast.posix.shared_memory import keep_freed_memory

_WRITES: Final = 1 << 10  # into pipes, in one round: some ten milliseconds
_REMOVAL: Final = 4  # of a subscription, in the time of a write


class Traffic:
    """Intake, routing and delivery, put together."""

    def __init__(
        self,
        poller: Poller,
        router: Router[Subscription],
        history: History | None,
        stall_timeout: float | None,
        first_id: int,
    ) -> None:
        self.departed: dict[Subscription, bool] = {}  # whether it was accepting messages until then
        self.delivery = Delivery(poller)
        self.memory = MemoryExchange(poller, self.delivery.dirty)
        self.routing = Routing(router, history, self.memory, self.delivery.dirty, first_id)
        self.overflowed = self.routing.overflowed
        self.intake = Intake(poller, FastPath(router, self.routing, self.delivery.dirty, self.memory.store.account))
        self.publishers = self.intake.publishers
        self._stalls = Stalls(poller, router, self.publishers, stall_timeout)
        keep_freed_memory(4 * PIPE_SIZE)  # what is read from a pipe, and what is written into others

    def round(self, *, at_once: bool = False) -> None:
        """Wait for what happens, unless ``at_once`` is set or something is left to do, and handle it."""
        intake, delivery, routing = self.intake, self.delivery, self.routing
        left = routing.behind or intake.ready or delivery.dirty or delivery.gone or routing.resuming
        intake.wait(at_once=at_once or bool(left))
        routing.begin_turn()
        for publisher in list(routing.behind):
            self._route(publisher)
        self.run_until_idle(_WRITES)

    def run_until_idle(self, writes: int = sys.maxsize) -> None:
        """Route what was read, write what can be written, and route again what waited for that, until nothing moves.

        Stop after writing into about so many pipes, and removing as many subscriptions.
        """
        intake, delivery, routing = self.intake, self.delivery, self.routing
        while writes > 0 and (intake.ready or delivery.dirty or delivery.gone or routing.resuming):
            if intake.ready:
                self._route_ready()
            resuming, routing.resuming = routing.resuming, []
            for publisher in resuming:
                if publisher.parked or publisher.blocked:
                    self._route(publisher)
            if delivery.dirty:
                writes -= delivery.write(writes)
            while delivery.unblocked:
                routing.unblock(delivery.unblocked.pop())
            while delivery.gone and writes > 0:
                self._depart(delivery.gone.pop())
                writes -= _REMOVAL

    def _route_ready(self) -> None:
        """Route what was read, and choose how each pipe is read next."""
        intake, routing = self.intake, self.routing
        ready, intake.ready = intake.ready, {}
        for publisher, came in ready.items():
            if publisher.blocked is not None:
                continue
            before = routing.next_id
            self._route(publisher)
            count = routing.next_id - before
            # One message in shared memory is no stream, however long it is: behind it, a nap would be one more wake-up.
            is_lone = count == 1 and publisher.lender is not None
            publisher.pace.count += count
            is_busy = publisher.pace.is_busy(time.monotonic(), has_much=not is_lone and (count > MANY or came > MUCH))
            if is_busy and publisher.state is PublisherState.READING:
                intake.nap(publisher)
            elif not is_busy and publisher.state is PublisherState.NAPPING:
                intake.watch(publisher)

    def _route(self, publisher: Publisher) -> None:
        """Route what is parked, and go on reading its pipe, or not."""
        routing = self.routing
        if routing.route(publisher):
            if publisher.state is PublisherState.PAUSED:
                self.intake.watch(publisher)
            elif publisher.state is PublisherState.DRAINING and self.intake.forget(publisher):
                self.memory.forget(publisher)
        else:
            if publisher.state is PublisherState.READING or publisher.state is PublisherState.NAPPING:
                self.intake.pause(publisher)
            if publisher.blocked is not None:
                self._stalls.look()
        while routing.refused:
            self.intake.refuse(*routing.refused.popitem())

    def take_in(self) -> Generator[None, None, bool]:
        """Route what all publishers have written until now, as far as backlogs take it, in parts: some turns each.

        Return True if backlogs took all of it. What is requested next comes behind it: a process may have learnt from another
        one that it has published.
        """
        pending: dict[Publisher, None] = {}
        is_all = True
        for publisher in list(self.publishers.values()):
            self._look_for_room(publisher)
            if publisher.blocked:
                is_all = False
            elif not publisher.all_routed:
                pending[publisher] = None
                publisher.after_written(partial(pending.pop, publisher, None))
        self.routing.begin_turn()
        room = MUCH
        while pending:
            publisher = next(iter(pending))
            if not publisher.parked:
                position = publisher.pipe.position
                self.intake.read(publisher, limit=min(publisher.pipe.end_of_written() - position, MUCH))
                room -= publisher.pipe.position - position
            self._route(publisher)
            self._look_for_room(publisher)
            if publisher.blocked:
                pending.pop(publisher, None)
                is_all = False
            if pending and (room <= 0 or self.routing.turn_is_over or publisher.lookup is not None):
                yield
                self.routing.begin_turn()
                room = MUCH
        return is_all

    def _look_for_room(self, publisher: Publisher) -> None:
        """Let a blocked publisher go on if there is room by now: no event reports that a pipe has been read empty."""
        full: Subscription | None = None
        while publisher.blocked is not full:
            full = publisher.blocked
            if full is not None:
                self.mark(full)
                self.run_until_idle()

    def fence(self, publisher: Publisher) -> None:
        """Read nothing more of a publisher whose inlet admits nothing any more: what is not routed of it is dropped."""
        full, publisher.blocked = publisher.blocked, None
        if full is not None and publisher in full.waiters:
            full.waiters.remove(publisher)
        publisher.lookup = None
        self.intake.close(publisher)
        if publisher.id in self.publishers:
            self.intake.ready.setdefault(publisher, 0)

    @property
    def is_behind(self) -> bool:
        """True if there is something to route or to write that waits for nothing."""
        routing, delivery = self.routing, self.delivery
        return bool(routing.behind or self.intake.ready or delivery.dirty or delivery.gone or routing.resuming)

    # --- subscriptions

    def mark(self, subscription: Subscription) -> None:
        """Write what is in its backlog, in this round."""
        self.delivery.dirty[subscription] = None

    def watch(self, subscription: Subscription) -> None:
        """Write into its pipe, which is open now."""
        self.delivery.watch(subscription)
        self.memory.watch(subscription)

    def drop(self, subscription: Subscription) -> None:
        """Route nothing more to it, write nothing more into its pipe, and let no publisher wait for it."""
        self.routing.end(subscription)
        self.delivery.dirty.pop(subscription, None)
        for publisher in self.publishers.values():
            publisher.last_in.pop(subscription, None)
        self.memory.drop(subscription)

    def _depart(self, subscription: Subscription) -> None:
        self.departed.setdefault(subscription, subscription.is_live)
        self.drop(subscription)
