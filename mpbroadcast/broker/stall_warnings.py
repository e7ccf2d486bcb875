"""Warnings about publishers that have been blocked for long: the publisher, and the subscription that it waits for."""

from __future__ import annotations

import logging
import time
from functools import partial

from mpbroadcast.broker.core.router import Router, listed
from mpbroadcast.broker.members import Group, Publisher, Subscription
from mpbroadcast.broker.outbox import Outbox
from mpbroadcast.posix.poller import Poller

log = logging.getLogger("mpbroadcast.broker")


class Stalls:
    """A warning for each of ``publishers`` that has waited ``timeout`` seconds, once for each wait; ``None`` for none."""

    def __init__(
        self, poller: Poller, router: Router[Subscription], publishers: dict[int, Publisher], timeout: float | None
    ) -> None:
        self._poller = poller
        self._router = router
        self._publishers = publishers
        self._timeout = timeout
        self._looking = False

    def look(self) -> None:
        """Look at the publishers from now on, as one is blocked, until none is."""
        if self._timeout is not None and not self._looking:
            self._looking = True
            self._poller.later(self._timeout, partial(self._look, self._timeout))

    def _look(self, timeout: float) -> None:
        now, wait, self._looking = time.monotonic(), timeout, False
        for publisher in self._publishers.values():
            if publisher.blocked is not None:
                self._looking = True
                seconds = now - publisher.blocked_since
                if not publisher.warned and seconds >= timeout:
                    publisher.warned = True
                    self._warn(publisher, publisher.blocked, seconds)
                elif not publisher.warned:
                    wait = min(wait, timeout - seconds)
        if self._looking:
            self._poller.later(max(wait, 0.01), partial(self._look, timeout))

    def _warn(self, publisher: Publisher, full: Subscription, seconds: float) -> None:
        if isinstance(full, Group):
            log.warning(
                "process %d has waited %.1f s to publish: the backlog of group %r (%s) is full, with %d bytes waiting%s",
                publisher.pid,
                seconds,
                full.name,
                listed(self._router.topics(full)),
                full.backlog.waiting_charge,
                "" if any(one.is_open for one in full.shares.members) else "; no channel of it was ever opened",
            )
            return
        if isinstance(full, Outbox):
            log.warning(
                "process %d has waited %.1f s to publish: the outbox of bridge %r (%s) is full, with %d bytes waiting%s",
                publisher.pid,
                seconds,
                full.name,
                listed(self._router.topics(full)),
                full.outbound.waiting_charge,
                "" if full.reader is not None else "; no bridge is at work",
            )
            return
        same = publisher.pid == full.pid
        must = ", which must receive before it publishes" if full.is_open else ""  # else another may be about to open it
        log.warning(
            "process %d has waited %.1f s to publish: the backlog of %s of %s (%s) is full, with %d bytes waiting%s",
            publisher.pid,
            seconds,
            full.described,
            f"the same process, {full.pid}{must}" if same else f"process {full.pid}",
            listed(self._router.topics(full)),
            full.backlog.waiting_charge,
            "" if full.is_open else "; it was never opened: receive from it in some process, or unsubscribe it",
        )
