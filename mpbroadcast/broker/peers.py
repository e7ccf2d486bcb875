"""The processes that the broker watches, and which of them have died.

A process is watched while it is the starter, or has a connection or a subscription. Where its death is an event, the poller
reports it; else each one is looked at once a second. Nothing is done about a death here: it is on a list, which the server
works off at the end of the round.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from mpbroadcast.broker.members import Peer
from mpbroadcast.posix.poller import IN, Poller

SWEEP: Final = 1.0  # seconds, where deaths are no events


class Peers:
    """The peers by their process IDs, and those that have died."""

    def __init__(self, poller: Poller) -> None:
        self.dead: list[Peer] = []
        self._poller = poller
        self._peers: dict[int, Peer] = {}
        self._is_sweeping = False

    def get(self, pid: int) -> Peer:
        """Return the peer with this process ID; the caller knows that the process lives.

        :raises ProcessLookupError: it does not any more.
        """
        peer = self._peers.get(pid)
        if peer is not None and peer.is_dead():  # the ID is another one's by now
            self._note_death(peer)
            peer = None
        if peer is None:
            peer = Peer(pid)
            if pid > 0:
                self._peers[pid] = peer
            if peer.fd >= 0:
                self._poller.watch(peer.fd, IN, partial(self._note_death, peer))
            elif peer.must_be_asked and not self._is_sweeping:
                self._is_sweeping = True
                self._poller.later(SWEEP, self._sweep)
        return peer

    @property
    def asked(self) -> int:
        return sum(peer.asked for peer in self._peers.values())

    def release(self, peer: Peer) -> None:
        """Watch it no more, if nothing belongs to it."""
        if peer.is_unused:
            self._forget(peer)

    def _sweep(self) -> None:
        for peer in list(self._peers.values()):
            if peer.is_dead():
                self._note_death(peer)
        self._is_sweeping = any(peer.must_be_asked for peer in self._peers.values())
        if self._is_sweeping:
            self._poller.later(SWEEP, self._sweep)

    def _note_death(self, peer: Peer, _events: int = IN) -> None:
        self._forget(peer)
        self.dead.append(peer)

    def _forget(self, peer: Peer) -> None:
        if self._peers.get(peer.pid, peer) is peer:
            self._peers.pop(peer.pid, None)
            fd, peer.fd = peer.fd, -1
            self._poller.close(fd)
