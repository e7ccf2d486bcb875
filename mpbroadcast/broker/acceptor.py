"""Who comes in: the listening socket, strangers until they have shown a key, and the processes that are watched."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.broker.control_clients import ControlConnection, peer_of
from mpbroadcast.broker.core.limits import MOST_CONNECTIONS
from mpbroadcast.broker.members import Peer
from mpbroadcast.posix.poller import IN, Poller
from mpbroadcast.posix.processes import PeerProcess
from mpbroadcast.protocol.control import serve_handshake

log = logging.getLogger("mpbroadcast.broker")

HANDSHAKE_TIMEOUT: Final = 5.0  # seconds
_MOST_STRANGERS: Final = 128  # connections that have not shown a key; one of them goes for one more
_LEAST_TIME: Final = 0.25  # seconds that each of them has at the least; meanwhile others wait in the socket's queue
_AGAIN: Final = 0.2  # seconds, until there may be descriptors
SWEEP: Final = 1.0  # seconds, where deaths are no events
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


class Acceptor:
    """Makes a :class:`ControlConnection` of each connection of this user, and a :class:`Peer` of each process that has one."""

    def __init__(
        self,
        loop: Poller,
        listener: socket.socket,
        keys: list[bytes],
        on_request: Callable[[ControlConnection, dict[str, Any]], None],
        on_gone: Callable[[ControlConnection, str], None],
        on_death: Callable[[Peer], None],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._keys = keys
        self._on_request = on_request
        self._on_gone = on_gone
        self._on_death = on_death
        self._peers: dict[int, Peer] = {}
        self._strangers: dict[ControlConnection, float] = {}
        self._expiring = False
        self._sweeping = False
        loop.watch(listener.fileno(), IN, self._accept)

    def close(self) -> None:
        """Let go of all connections."""
        for peer in list(self._peers.values()):
            for client in list(peer.clients):
                client.close("the broker has ended")

    @property
    def asked(self) -> int:
        """Bytes of requests that are not whole."""
        return sum(peer.asked for peer in self._peers.values())

    def send_packet(self, message: dict[str, Any]) -> None:
        """Say something to each process, without being asked: on its lifeline."""
        for peer in list(self._peers.values()):
            for client in list(peer.clients):
                if client.session is not None:
                    client.reply(message)

    def _accept(self, events: int) -> None:
        trap_points.reach("accepting")
        wait = self._make_room()
        if wait > 0:
            self._pause(wait)
            return
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in _NO_DESCRIPTORS:
                return  # it has gone already
            log.warning("no descriptor is left in the broker: new processes wait until some are free")
            self._pause(_AGAIN)
            return
        connection.setblocking(False)
        self._admit(connection)

    def _pause(self, seconds: float) -> None:
        """Accept no connection for so long."""
        self._loop.forget(self._listener.fileno())
        self._loop.later(seconds, lambda: self._loop.watch(self._listener.fileno(), IN, self._accept))

    def _make_room(self) -> float:
        """Close a stranger if there are too many: the oldest of the process that has the most.

        Return the seconds until it may be closed. A client that answers is none, and one that is slower tries again.
        """
        strangers = [client for client in self._strangers if not client.has_key]
        if len(strangers) < _MOST_STRANGERS:
            return 0.0
        ((peer, _),) = Counter(client.peer for client in strangers).most_common(1)
        oldest = next(client for client in strangers if client.peer is peer)
        wait = self._strangers[oldest] - HANDSHAKE_TIMEOUT + _LEAST_TIME - time.monotonic()
        if wait <= 0:
            oldest.close("too many have connected without a key", refused=True)
        return wait

    def _admit(self, connection: socket.socket) -> None:
        try:
            pid, uid = peer_of(connection)
            if uid != os.geteuid():
                log.warning("refused process %d of user %d: only user %d may connect", pid, uid, os.geteuid())
                connection.close()
                return
            peer = self.peer(pid)
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:  # the connection has taken the last one
                self._loop.later(_AGAIN, lambda: self._admit(connection))
            else:  # it has gone already
                connection.close()
            return
        if len(peer.clients) >= 2 * MOST_CONNECTIONS:  # its requests on half of these were answered with an error
            log.warning("refused process %d: it has %d connections already", pid, len(peer.clients))
            connection.close()
            return
        handshake = serve_handshake(self._keys)
        client = ControlConnection(self._loop, connection, peer, handshake, self._request, self._client_gone)
        if client.closed:  # it had gone before it was let in
            self.drop_unused(peer)
            return
        peer.clients.add(client)
        self._strangers[client] = time.monotonic() + HANDSHAKE_TIMEOUT
        if not self._expiring:
            self._expiring = True
            self._loop.later(HANDSHAKE_TIMEOUT, self._expire)

    def _expire(self) -> None:
        self._expiring = False
        now = time.monotonic()
        for client, deadline in list(self._strangers.items()):
            if client.authenticated:
                del self._strangers[client]
            elif deadline <= now:
                client.close("it did not show its key in time", refused=True)
        if self._strangers:
            self._expiring = True
            self._loop.later(max(0.0, min(self._strangers.values()) - now), self._expire)

    def _request(self, client: ControlConnection, message: dict[str, Any]) -> None:
        self._strangers.pop(client, None)
        self._on_request(client, message)

    def _client_gone(self, client: ControlConnection, why: str) -> None:
        self._strangers.pop(client, None)
        client.peer.clients.discard(client)
        self._on_gone(client, why)
        self.drop_unused(client.peer)

    def peer(self, pid: int) -> Peer:
        """The process with this ID, which is known to live.

        :raises ProcessLookupError: it does not any more.
        """
        peer = self._peers.get(pid)
        if peer is not None and peer.process.is_dead():  # the number is another one's by now
            self._died(peer)
            peer = None
        if peer is None:
            process = PeerProcess(pid)
            peer = Peer(process)
            if pid > 0:
                self._peers[pid] = peer
            if process.fd >= 0:
                self._loop.watch(process.fd, IN, lambda _: self._died(peer))
            elif process.must_be_asked and not self._sweeping:
                self._sweeping = True
                self._loop.later(SWEEP, self._sweep)
        return peer

    def _sweep(self) -> None:
        for peer in list(self._peers.values()):
            if peer.process.is_dead():
                self._died(peer)
        self._sweeping = any(peer.process.must_be_asked for peer in self._peers.values())
        if self._sweeping:
            self._loop.later(SWEEP, self._sweep)

    def _died(self, peer: Peer) -> None:
        for client in list(peer.clients):
            client.close("its process has ended")
        self._on_death(peer)
        self._forget(peer)

    def drop_unused(self, peer: Peer) -> None:
        """Watch it no more, if nothing is its own."""
        if peer.unused:
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        if self._peers.get(peer.pid, peer) is peer:
            self._peers.pop(peer.pid, None)
            fd, peer.process.fd = peer.process.fd, -1
            self._loop.close(fd)
