"""The packets of publishers and readers about shared memory, and when messages are copied out of a ring.

References wait in backlogs as any other run does, and hold their chunks. A publisher that finds no free chunk asks for one.
Quick readers free some within milliseconds; if none has come free then, what still waits is copied out of the ring, once for
all readers that are not quick. A subscription for which messages were copied gets copies until its reader has read as much: so
a reader that has stopped costs its publisher one such pause, and one that is slow a pause for each ring full that it reads.

A reader under ``block`` has ten times as long: where other processes have all CPUs, one that would free a chunk at once may not
run for some ten milliseconds, and copies would take these CPUs as well. A quick one is waited for even longer. What is before
the references in its backlog are copies, as when its channel was opened late; more copies behind them would be read no faster,
and its backlog would never come to references again.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import Final

from mpbroadcast.broker.core.ring_holds import LOOKS, is_copied_for
from mpbroadcast.broker.members import Publisher, Subscription
from mpbroadcast.broker.memory import Lender, Ring, Store
from mpbroadcast.posix.fd_socket import PACKET, DescriptorSocket
from mpbroadcast.posix.poller import IN, Poller
from mpbroadcast.protocol.fd_packets import MAPPED, NONE, READ, REFUSED, PacketError, pack, unpack

_GRACE: Final = 0.01  # seconds to wait for a free chunk, or for a ring to be mapped, before messages are copied: one look
_SMALLEST: Final = 4 << 20  # capacity: of less, what was read and not acknowledged yet would be too large a part


class MemoryExchange:
    """Receives the packets, and decides which references may wait. Subscriptions to be written after that are in ``dirty``."""

    def __init__(self, poller: Poller, dirty: dict[Subscription, None]) -> None:
        self.store = Store()
        self._poller = poller
        self._dirty = dirty

    @property
    def held(self) -> int:
        """Bytes that wait in backlogs, and of rings that readers still have to read, as far as is known, in whole chunks."""
        return self.store.account.held + sum(ring.held for ring in self.store.rings)

    # --- publishers

    def add(self, publisher: Publisher) -> int:
        """Let a publisher share memory. Return the descriptor of its socket.

        :raises OSError: no descriptor is left, or it shares a ring already.
        """
        if publisher.lender is not None and publisher.lender.rings:
            raise OSError(errno.EEXIST, "this publisher shares a ring already")
        own, other = DescriptorSocket.pair()
        if publisher.lender is not None:  # it was interrupted, and begins again
            self._poller.close(publisher.lender.fd_socket.detach())
        publisher.lender = Lender(self.store, own, publisher.pid)
        self._poller.watch(own.fileno(), IN, partial(self._receive, publisher.lender))
        return other

    def _receive(self, lender: Lender, _events: int) -> None:
        if not lender.receive():
            self._poller.forget(lender.fd_socket.fileno())
        if lender.wants_chunk:
            lender.wants_chunk = False
            for ring in lender.rings.values():
                for subscription in ring.readers:
                    subscription.refresh()
            if lender.rings and not lender.is_watched:
                lender.is_watched = True
                self._watch_ring(lender, list(lender.rings.values())[-1])

    def _watch_ring(self, lender: Lender, ring: Ring) -> None:
        """Look at the ring, whose publisher waits for a chunk, each 10 ms."""
        moved = {subscription: subscription.window.moved for subscription in ring.readers if subscription.window is not None}
        self._poller.later(_GRACE, partial(self._look, lender, ring, ring.freed, moved, 1))

    def _look(self, lender: Lender, ring: Ring, freed: int, moved: dict[Subscription, int], looks: int) -> None:
        """If no chunk has come free, copy what waits for readers that are not quick; if none is free then, report that.

        It is so many ``looks`` since the publisher waits.
        """
        lender.is_watched = ring.freed == freed and not ring.retired
        if not lender.is_watched:
            return
        waits = False
        for subscription, before in moved.items():
            window, backlog = subscription.window, subscription.backlog
            if window is None or not backlog.refers_to(ring):
                continue
            if not is_copied_for(blocks=backlog.blocks, looks=looks, moved=window.moved - before):
                waits = True
                continue
            window.copies_until = window.moved + backlog.copy_out(ring)
            self._dirty[subscription] = None
        if waits and looks < LOOKS:
            self._poller.later(_GRACE, partial(self._look, lender, ring, freed, moved, looks + 1))
        elif ring.freed == freed and not waits:
            lender.is_watched = False
            lender.send(pack(NONE, ring.name))
        else:
            self._watch_ring(lender, ring)

    def forget(self, publisher: Publisher) -> None:
        """Retire the rings of a publisher that is gone, as all that it has written is routed."""
        if publisher.lender is not None:
            for ring in list(publisher.lender.rings.values()):
                self._retire(ring, publisher.lender)
            publisher.lender.current = None

    def use(self, ring: Ring, publisher: Publisher) -> None:
        """Note that a message in this ring is to be routed: all of the ring before it are."""
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
            self._dirty[subscription] = None
        lender.retire(ring)

    # --- subscriptions

    def watch(self, subscription: Subscription) -> None:
        """Receive the packets of its reader, which has opened it."""
        if subscription.window is not None:
            self._poller.watch(subscription.window.fd_socket.fileno(), IN, partial(self._receive_from_reader, subscription))

    def _receive_from_reader(self, subscription: Subscription, _events: int) -> None:
        window = subscription.window
        if window is None:
            return
        try:
            while packet := window.fd_socket.recv(PACKET):
                window.received += 1
                kind, ring, value = unpack(packet)
                if kind == READ:
                    subscription.has_read(value)
                elif kind in (MAPPED, REFUSED):
                    window.answered(ring, mapped=kind == MAPPED)
            self._poller.forget(window.fd_socket.fileno())  # its pipe reports whether it is gone
        except BlockingIOError:
            pass
        except (OSError, PacketError):
            self._poller.forget(window.fd_socket.fileno())
        if subscription.waiters or subscription.backlog.ended or not subscription.backlog.is_empty:
            self._dirty[subscription] = None

    def takes(self, subscription: Subscription, ring: Ring) -> bool:
        """Return whether references into this ring may wait for a subscription. Offer the ring to its reader if need be."""
        window, backlog = subscription.window, subscription.backlog
        if window is None or not subscription.is_open or backlog.capacity < _SMALLEST or backlog.keeps_newest_only:
            return False
        if ring not in window.rings:
            ring.readers.add(subscription)
            window.offer(ring)
            self._poller.later(_GRACE * (LOOKS if backlog.blocks else 1), partial(self._answers_late, subscription, ring))
        return window.moved >= window.copies_until and window.rings[ring] is not None

    def _answers_late(self, subscription: Subscription, ring: Ring) -> None:
        """Let nothing wait for the answer to an offer: a reader that does not read does not answer, either."""
        window = subscription.window
        if window is not None and window.rings.get(ring) is False:
            window.rings[ring] = None
            self._dirty[subscription] = None

    def drop(self, subscription: Subscription) -> None:
        for ring in self.store.rings:
            ring.readers.discard(subscription)
