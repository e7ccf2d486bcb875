"""What publishers and readers send on the sockets beside their pipes, and when messages are copied out of a ring.

References wait in backlogs as any other run does, and keep their chunks. A publisher that finds no free chunk asks for one.
Quick readers free some within milliseconds; if none has come free then, what still waits is copied out of the ring, once for
all readers that are not quick. A subscription for which messages were copied gets copies until it has read as much: so a
reader that has stopped costs its publisher one such pause, and one that is slow a pause for each ring full that it reads.

A quick reader under ``block`` is waited for instead. What is before the references in its backlog are copies, as when its
channel was opened late; more copies behind them would be read no faster, and it would never come to references again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from mpbroadcast.broker.members import Subscription, new_socket
from mpbroadcast.broker.memory import Lender, Ring, Store
from mpbroadcast.broker.publisher import Publisher
from mpbroadcast.posix.poller import IN, Poller
from mpbroadcast.protocol.fd_packets import MAPPED, NONE, READ, REFUSED, PacketError, pack, unpack

_QUICK: Final = 1 << 20  # bytes that a quick reader reads in that time, through its pipe alone
_GRACE: Final = 0.01  # seconds to wait for a free chunk, or for a ring to be mapped, before messages are copied


class Sharing:
    """``mark`` lets what is in a subscription's backlog be moved into its pipe in this round."""

    def __init__(self, loop: Poller, mark: Callable[[Subscription], None]) -> None:
        self.store = Store()
        self._loop = loop
        self._mark = mark

    @property
    def held(self) -> int:
        """Bytes that wait in backlogs, and of rings that readers still have to read, as far as is known, in whole chunks."""
        for ring in list(self.store.rings):  # some go in here
            for subscription in ring.readers:
                subscription.refresh()
        return self.store.account.held + sum(ring.held for ring in self.store.rings)

    # --- publishers

    def add(self, publisher: Publisher) -> int:
        """Let it share memory: the descriptor of its socket.

        :raises OSError: no descriptor is left, or it shares a ring already.
        """
        if publisher.lender is not None and publisher.lender.rings:
            raise OSError(errno.EEXIST, "this publisher has a socket for descriptors already")
        own, other = new_socket()
        if publisher.lender is not None:  # it was interrupted, and begins again
            self._loop.close(publisher.lender.fd_socket.detach())
        publisher.lender = Lender(self.store, own, publisher.pid)
        self._loop.watch(own.fileno(), IN, lambda _: self._receive(publisher))
        return other

    def _receive(self, publisher: Publisher) -> None:
        lender = publisher.lender
        if lender is None:
            return
        if not lender.receive_packet_with_fd():
            self._loop.forget(lender.fd_socket.fileno())
        if lender.wanted:
            lender.wanted = False
            for ring in list(lender.rings.values()):
                for subscription in ring.readers:
                    subscription.refresh()
            if lender.rings and not lender.watched:
                lender.watched = True
                self._watch_ring(lender, list(lender.rings.values())[-1])

    def _watch_ring(self, lender: Lender, ring: Ring) -> None:
        """See what has been read of a ring in a moment, as its publisher waits for a chunk."""
        moved = {subscription: subscription.window.moved for subscription in ring.readers if subscription.window is not None}
        freed = ring.freed
        self._loop.later(_GRACE, lambda: self._look(lender, ring, freed, moved))

    def _look(self, lender: Lender, ring: Ring, freed: int, moved: dict[Subscription, int]) -> None:
        """If no chunk has come free, copy what waits for readers that are not quick; if none is free then, report that."""
        lender.watched = ring.freed == freed and not ring.retired
        if not lender.watched:
            return
        waits = False
        for subscription, before in moved.items():
            window, backlog = subscription.window, subscription.backlog
            if window is None or not backlog.refers_to(ring):
                continue
            if backlog.policy == "block" and window.moved - before >= _QUICK:
                waits = True
                continue
            window.copies_until = window.moved + backlog.copy_out(ring)
            self._mark(subscription)
        if ring.freed == freed and not waits:
            lender.watched = False
            lender.send_packet(pack(NONE, ring.name))
        else:
            self._watch_ring(lender, ring)

    def close(self, publisher: Publisher) -> None:
        """All that it has written has been taken in, and nothing more will be."""
        if publisher.lender is not None:
            publisher.lender.close()
            self._loop.close(publisher.lender.fd_socket.detach())

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
            subscription.backlog.copy_out(ring)
            if subscription.window is not None:
                subscription.window.retire(ring)
            self._mark(subscription)
        lender.retire(ring)

    # --- subscriptions

    def watch(self, subscription: Subscription) -> None:
        """It is open."""
        if subscription.window is not None:
            self._loop.watch(subscription.window.fd_socket.fileno(), IN, lambda _: self._hear_reader(subscription))

    def _hear_reader(self, subscription: Subscription) -> None:
        window = subscription.window
        if window is None:
            return
        try:
            while (packet := window.fd_socket.receive_packet()) is not None:
                if not packet:
                    raise ConnectionError("it has closed its socket")
                window.heard += 1
                kind, number, value = unpack(packet)
                if kind == READ:
                    subscription.has_read(value)
                elif kind in (MAPPED, REFUSED):
                    window.answered(number, mapped=kind == MAPPED)
        except (OSError, PacketError):
            self._loop.forget(window.fd_socket.fileno())  # its pipe tells whether it is gone
        if subscription.waiters or subscription.backlog.ended or not subscription.backlog.empty:
            self._mark(subscription)

    def takes(self, subscription: Subscription, ring: Ring) -> bool:
        """Whether references into this ring may wait for a subscription, whose reader is offered the ring if need be."""
        window = subscription.window
        if window is None or not subscription.shares:
            return False
        if ring not in window.rings:
            ring.readers.add(subscription)
            window.offer(ring)
            self._loop.later(_GRACE, lambda: self._answers_late(subscription, ring))
        return window.moved >= window.copies_until and window.rings[ring] is not None

    def _answers_late(self, subscription: Subscription, ring: Ring) -> None:
        """A reader that does not read does not answer to an offer, either: let nothing wait for that."""
        window = subscription.window
        if window is not None and window.rings.get(ring) is False:
            window.rings[ring] = None
            self._mark(subscription)

    def drop(self, subscription: Subscription) -> None:
        """It is gone."""
        for ring in self.store.rings:
            ring.readers.discard(subscription)
