"""How the broker ends: one function, whose steps are in order.

::

    0. STOPPING is written into the journal: the supervisor (restart=True) starts no other broker

    publisher process          broker process                                          subscriber process
                     pipe                                                    pipe
    publish() ────────────▶ intake ─▶ Publisher.parked ─▶ backlogs ─▶ delivery ────────────▶ recv()
              1. read to its end;      2. routed, as far    3. ended; written,  4. read, until the
                 closed                   as backlogs          then END            time is over
                                          have room

    5. each channel whose backlog is not empty is closed without END; what waited for room in it is routed
    6. that is written, in 0.1 s at most; what is left then is closed without END

A reader that goes on reading gets all. The time is over when none has made progress for ``timeout`` seconds. A reader whose
channel is closed without END gets ``BrokerLost``. What the process that requested the end has open itself is not waited for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

from mpbroadcast.broker.core.router import listed
from mpbroadcast.broker.core.states import PipeState
from mpbroadcast.broker.members import Peer, Subscription
from mpbroadcast.broker.outbox import BridgeReader
from mpbroadcast.broker.registry import Registry
from mpbroadcast.broker.traffic import Traffic
from mpbroadcast.posix.poller import Poller

log = logging.getLogger("mpbroadcast.broker")

_LAST: Final = 0.1  # seconds, after the time is over
_LOOK: Final = 0.1  # seconds from one look at what readers have read to the next
_AT_ONCE: Final = 256  # subscriptions that are ended, or closed, in a round


class Shutdown:
    """The end that was requested by the process ``by``, if by any, and its time."""

    def __init__(self, poller: Poller, registry: Registry, traffic: Traffic, timeout: float, by: Peer | None) -> None:
        self.by = by
        self._poller = poller
        self._registry = registry
        self._traffic = traffic
        self._patience = timeout
        self._progress: dict[Subscription, tuple[int, ...]] = {}  # numbers that change when a reader opens or reads
        self._progress_at = time.monotonic()
        self._next_look = self._progress_at + min(timeout, _LOOK)
        self._all_ended = False  # each backlog has its end: nothing more can be published

    @property
    def time_left(self) -> float:
        """Seconds until what is left is closed, if no reader makes progress until then."""
        return max(0.0, self._progress_at + self._patience - time.monotonic())

    def shorten(self, timeout: float) -> None:
        """Go on without progress for ``timeout`` seconds at most."""
        self._patience = min(self._patience, timeout)

    def steps(self) -> Iterator[None]:
        """End the broker. Between two steps it has a round; at the end, no publisher and no subscription is left."""
        registry, traffic, poller = self._registry, self._traffic, self._poller
        # 0. No other broker follows. What only the process that closes could open is not opened any more.
        registry.note_stopping()
        for subscription in list(registry.subscriptions.values()):
            subscription.is_abandoned = subscription.session.peer is self.by
            if subscription.is_abandoned and subscription.owner is not None and not subscription.is_open:
                registry.remove(subscription)
        # 1. What publishers have written is read, and their pipes are closed, which wakes each publish that waits.
        registry.to_finish.extend(map(traffic.intake.finish, traffic.publishers.values()))
        while registry.to_finish:
            yield
        for subscription in registry.subscriptions.values():
            traffic.mark(subscription)
        # 2. to 4. It is routed; then each backlog is ended, and written while readers make progress.
        poller.later(self._next_look - time.monotonic(), _wake)
        while registry.subscriptions or traffic.publishers:
            yield from self._end_backlogs()
            if time.monotonic() >= self._next_look and not self._look():
                break
            yield
        # 5. What has not been read in time is closed; the publishers that waited for it are routed.
        while traffic.is_behind:
            yield
        yield from self._each(self._close_unread)
        # 6. What waited for those has a last moment.
        end = time.monotonic() + _LAST
        poller.later(_LAST, _wake)
        while (registry.subscriptions or traffic.publishers) and time.monotonic() < end:
            yield from self._end_backlogs()
            yield
        yield from self._each(self.give_up)
        traffic.publishers.clear()

    def _each(self, handle: Callable[[Subscription], None]) -> Iterator[None]:
        """Handle each subscription, some in a round."""
        for count, subscription in enumerate(list(self._registry.subscriptions.values()), 1):
            if subscription.id in self._registry.subscriptions:
                handle(subscription)
            if not count % _AT_ONCE:
                self._poller.later(0, _wake)
                yield

    def _end_backlogs(self) -> Iterator[None]:
        """End each backlog, once nothing more can be published. Remove the subscriptions that no process would open."""
        if self._traffic.publishers or self._all_ended:
            return
        self._all_ended = True
        yield from self._each(self._end_backlog)

    def _end_backlog(self, subscription: Subscription) -> None:
        if subscription.pipe.state is PipeState.UNOPENED and not subscription.target.backlog.waiting:
            self._registry.remove(subscription)  # no process has opened it, or is about to, nor would one get a message
        elif subscription.group is not None:
            subscription.group.is_closing = True
            self._registry.groups.end(subscription.group)
            self._traffic.mark(subscription)
        elif isinstance(subscription, BridgeReader):
            subscription.outbox.backlog.end()
            self._traffic.mark(subscription.outbox)
            self._traffic.mark(subscription)
        else:
            self._registry.unsubscribe(subscription)
            self._traffic.mark(subscription)  # one that was unsubscribed before keeps nothing from being written any more

    def _look(self) -> bool:
        """Look at what readers have read. Return whether there is time left."""
        before, self._progress = self._progress, {}
        for subscription in self._registry.subscriptions.values():
            packets = subscription.window.received if subscription.window is not None else 0
            departed, unread = subscription.backlog.departed, subscription.pipe.unread()
            self._progress[subscription] = (subscription.is_open, departed, unread, packets, subscription.acknowledged)
        if self._progress != before:
            self._progress_at = time.monotonic()
        wait = min(self.time_left, _LOOK)
        self._next_look = time.monotonic() + wait
        self._poller.later(wait, _wake)
        return wait > 0

    def _close_unread(self, subscription: Subscription) -> None:
        if not (subscription.backlog.is_empty and subscription.target.backlog.is_empty):
            self.give_up(subscription)

    def give_up(self, subscription: Subscription) -> None:
        """Close it without a clean end."""
        own = self.by is subscription.session.peer
        log.log(
            logging.DEBUG if own else logging.WARNING,
            "%s of process %d (%s) was closed with %d message(s) waiting: it %s",
            subscription.described,
            subscription.pid,
            listed(self._registry.topics(subscription)),
            subscription.target.backlog.waiting,
            "was never opened" if subscription.owner is None else "was not read in time",
        )
        self._registry.remove(subscription)


def _wake() -> None:
    """End the wait of a round."""
