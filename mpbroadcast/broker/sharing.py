"""How messages in shared memory get from their publishers to subscriptions: who is ready for references, and who is not.

A subscription can have references when it has mapped the ring, nothing waits in its backlog, and what it has not read yet
lies not too far behind. One that is not ready, and reads quickly, is waited for: to copy the messages, and so to let it fall
behind, would be slower for all. How long it is waited for, it earns by what it reads; who has stopped is not waited for again.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from typing import Final

from mpbroadcast.broker.loop import IN, Loop
from mpbroadcast.broker.members import State, Subscription, new_socket
from mpbroadcast.broker.publisher import Held, Publisher
from mpbroadcast.broker.shared import Lender, Ring, Store
from mpbroadcast.wire.packets import MAPPED, READ, REFUSED, PacketError, unpack

_SMALLEST: Final = 4 << 20  # capacity: of less, what was read and not told of yet would be too large a part
_LOOK_AGAIN: Final = 0.001  # seconds, when a reader has so little to read that it will not tell of it


class Sharing:
    """``write`` moves what is in a subscription's backlog into its pipe now, ``mark`` in this round; ``resume`` routes what is
    parked of publishers; ``on_gone`` is called with a subscription whose reader is."""

    def __init__(
        self,
        loop: Loop,
        write: Callable[[Subscription], None],
        mark: Callable[[Subscription], None],
        resume: Callable[[Iterable[Publisher]], None],
        on_gone: Callable[[Subscription], None],
    ) -> None:
        self.store = Store()
        self._loop = loop
        self._write = write
        self._mark = mark
        self._resume = resume
        self._on_gone = on_gone

    @property
    def held(self) -> int:
        """Bytes of rings that somebody still has to read, as far as is known, in whole chunks."""
        for ring in list(self.store.rings):  # some go in here
            for subscription in ring.readers:
                subscription.refresh()
        return sum(ring.held for ring in self.store.rings)

    # --- publishers

    def add(self, publisher: Publisher) -> int:
        """Let it share memory: the descriptor of its socket.

        :raises OSError: no descriptor is left, or it shares a ring already.
        """
        if publisher.lender is not None and publisher.lender.rings:
            raise OSError(errno.EEXIST, "this publisher has a socket for descriptors already")
        own, other = new_socket()
        if publisher.lender is not None:  # it was interrupted, and begins again
            self._loop.close(publisher.lender.beside.detach())
        publisher.lender = Lender(self.store, own, publisher.pid)
        self._loop.watch(own.fileno(), IN, lambda _: self._hear(publisher))
        return other

    def _hear(self, publisher: Publisher) -> None:
        lender = publisher.lender
        if lender is None:
            return
        if not lender.hear():
            self._loop.forget(lender.beside.fileno())
        if lender.wanted:
            lender.wanted = False
            for ring in list(lender.rings.values()):
                for subscription in ring.readers:
                    subscription.refresh()

    def close(self, publisher: Publisher) -> None:
        """All that it has written has been taken in, and nothing more will be."""
        if publisher.lender is not None:
            publisher.lender.close()
            self._loop.close(publisher.lender.beside.detach())

    def forget(self, publisher: Publisher) -> None:
        """All that it has written has been routed."""
        if publisher.lender is not None:
            for ring in list(publisher.lender.rings.values()):
                self._retire(ring, publisher.lender)
            publisher.lender.current = None

    def use(self, ring: Ring, publisher: Publisher) -> None:
        """Something in this ring is to be routed: all of the one before it has been."""
        lender = publisher.lender
        if lender is not None and ring is not lender.current:
            if lender.current is not None:
                self._retire(lender.current, lender)
            lender.current = ring

    def _retire(self, ring: Ring, lender: Lender) -> None:
        for subscription in ring.readers:
            subscription.retire(ring)
            self._mark(subscription)
        lender.retire(ring)

    # --- subscriptions

    def watch(self, subscription: Subscription) -> None:
        """It is open."""
        if subscription.beside is not None:
            self._loop.watch(subscription.beside.fileno(), IN, lambda _: self._hear_reader(subscription))

    def _hear_reader(self, subscription: Subscription) -> None:
        beside = subscription.beside
        if beside is None:
            return
        try:
            while (packet := beside.hear_plain()) is not None:
                if not packet:
                    raise ConnectionError("it has closed its socket")
                kind, number, value = unpack(packet)
                if kind == READ:
                    subscription.has_read(value)
                elif kind in (MAPPED, REFUSED):
                    subscription.answered(number, mapped=kind == MAPPED)
        except (OSError, PacketError):
            self._loop.forget(beside.fileno())  # its pipe tells whether it is gone
        self.go_on(subscription)
        if subscription.waiters or subscription.outbox.ended or not subscription.outbox.empty:
            self._mark(subscription)

    def drop(self, subscription: Subscription) -> None:
        """It is gone."""
        for ring in self.store.rings:
            ring.readers.discard(subscription)
        subscription.let_go()

    # --- references

    def slow_one(self, held: Held, targets: Iterable[Subscription]) -> Subscription | None:
        """Who cannot have these references now, and may in a moment."""
        for subscription in targets:
            if subscription.patience > 0 and self._state(subscription, held) is State.LATER:
                return subscription
        return None

    def refer(self, subscription: Subscription, held: Held, charge: int) -> bool:
        """Let it have references, and not the messages; whether that is possible now."""
        if not subscription.outbox.takes(charge) or self._state(subscription, held) is not State.READY:
            return False
        try:
            return subscription.refer(held, charge)
        except OSError:
            self._on_gone(subscription)
            return True

    def _state(self, subscription: Subscription, held: Held) -> State:
        if not _ever(subscription):
            return State.NEVER
        if not subscription.outbox.empty:
            self._write(subscription)
            if subscription.fd < 0:
                return State.NEVER
            if not subscription.outbox.empty:
                return State.LATER
        held.ring.readers.add(subscription)
        state = subscription.state_for(held)
        if subscription.notes:
            self._mark(subscription)
        return state

    def wait(self, publisher: Publisher, slow: Subscription) -> None:
        """Resume the publisher when the subscription may be ready, or its patience is over."""
        slow.slow_for.append(publisher)
        slow.behind = not slow.outbox.empty
        if not slow.paused_at:
            slow.paused_at = time.monotonic()
            wait = slow.patience if slow.tells else min(slow.patience, _LOOK_AGAIN)
            self._loop.later(wait, lambda: self.go_on(slow))

    def go_on(self, subscription: Subscription) -> None:
        """It may be ready, or has been waited for long enough."""
        if subscription.paused_at:
            subscription.patience -= time.monotonic() - subscription.paused_at
            subscription.paused_at = 0.0
            self._resume([publisher for publisher in subscription.slow_for if publisher.waits])
            subscription.slow_for.clear()


def _ever(subscription: Subscription) -> bool:
    """Whether it can have references at all."""
    outbox = subscription.outbox
    there = subscription.opened and subscription.fd >= 0 and subscription.beside is not None
    return there and outbox.policy != "latest" and outbox.capacity >= _SMALLEST
