"""The listening socket, and its connections: strangers until they have shown a key.

Only processes of this user are let in. A connection that has not shown a key costs a descriptor for at most
``HANDSHAKE_TIMEOUT`` seconds, and there are at most ``_MOST_STRANGERS`` of them: for one more, the oldest one of the process
that has the most is closed, once it has had ``_LEAST_TIME``. Meanwhile connections keep their turn in the socket's queue.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.broker.control_connection import Closed, ControlConnection, Readable, Trust
from mpbroadcast.broker.core.limits import MOST_CONNECTIONS
from mpbroadcast.broker.members import Peer
from mpbroadcast.broker.peers import Peers
from mpbroadcast.posix.fd_socket import Socket, peer_of
from mpbroadcast.posix.poller import IN, Poller
from mpbroadcast.protocol.control import serve_handshake

log = logging.getLogger("mpbroadcast.broker")

HANDSHAKE_TIMEOUT: Final = 5.0  # seconds
_MOST_STRANGERS: Final = 128
_LEAST_TIME: Final = 0.25  # seconds
_AGAIN: Final = 0.2  # seconds, until there may be descriptors
_MOST_REQUESTS: Final = 64  # of one connection in a round: thousands of notes come at once when channels are dropped
_SECONDS_FOR_REQUESTS: Final = 0.02  # for all requests in a round, but one request at the least
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


class Acceptor:
    """Makes a :class:`ControlConnection` of each connection of this user."""

    def __init__(self, poller: Poller, listener: Socket, keys: list[bytes], peers: Peers) -> None:
        self.readable: Readable = {}
        self.closed: Closed = []
        self._poller = poller
        self._listener = listener
        self._keys = keys
        self._peers = peers
        self._connections: set[ControlConnection] = set()
        self._strangers: dict[ControlConnection, float] = {}  # with their deadlines
        self._is_expiring = False
        poller.watch(listener.fileno(), IN, self._accept)

    def requests(self) -> Iterator[tuple[ControlConnection, dict[str, Any]]]:
        """Yield the requests that have come, of each connection as many as it may have in a round."""
        readable = list(self.readable)
        self.readable.clear()
        end = time.monotonic() + _SECONDS_FOR_REQUESTS
        served: list[ControlConnection] = []
        for connection in readable:
            count, is_over = 0, bool(served) and time.monotonic() > end
            while count < _MOST_REQUESTS and not is_over and (request := connection.next_request()) is not None:
                self._strangers.pop(connection, None)
                yield connection, request
                count += 1
                is_over = time.monotonic() > end
            if count:
                served.append(connection)
            connection.end_turn(has_more=is_over or count == _MOST_REQUESTS)
        for connection in served:  # the others are the first in the next round
            if connection in self.readable:
                self.readable[connection] = self.readable.pop(connection)

    def close(self, why: str = "the broker has ended", peer: Peer | None = None) -> None:
        """Close all connections, or those of this process."""
        for connection in list(self._connections):
            if peer is None or connection.peer is peer:
                connection.close(why)

    def forget(self, connection: ControlConnection) -> None:
        self._strangers.pop(connection, None)
        self._connections.remove(connection)
        connection.peer.connections -= 1
        self._peers.release(connection.peer)

    def send(self, message: dict[str, Any]) -> None:
        """Send this to each session, though it has requested nothing."""
        for connection in list(self._connections):
            if connection.session is not None:
                connection.reply(message)

    def _accept(self, events: int) -> None:
        trap_points.reach("accepting")
        wait = self._make_room()
        if wait > 0:
            self._pause(wait)
            return
        try:
            connection, _ = self._listener.accept()
            connection.setblocking(False)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in _NO_DESCRIPTORS:
                return  # it has gone already
            log.warning("no descriptor is left in the broker: new processes wait until some are free")
            self._pause(_AGAIN)
            return
        self._admit(connection)

    def _pause(self, seconds: float) -> None:
        self._poller.forget(self._listener.fileno())
        self._poller.later(seconds, partial(self._poller.watch, self._listener.fileno(), IN, self._accept))

    def _make_room(self) -> float:
        """Close a stranger if there are too many. Return the seconds until it may be closed.

        A client that answers the challenge is none, and one that is slower tries again.
        """
        strangers = [connection for connection in self._strangers if connection.trust is Trust.STRANGER]
        if len(strangers) < _MOST_STRANGERS:
            return 0.0
        ((peer, _),) = Counter(connection.peer for connection in strangers).most_common(1)
        oldest = next(connection for connection in strangers if connection.peer is peer)
        wait = self._strangers[oldest] - HANDSHAKE_TIMEOUT + _LEAST_TIME - time.monotonic()
        if wait <= 0:
            oldest.close("too many have connected without a key", refused=True)
            self._strangers.pop(oldest)
        return wait

    def _admit(self, connection: Socket) -> None:
        try:
            pid, uid = peer_of(connection)
            if uid != os.geteuid():
                log.warning("refused process %d of user %d: only user %d may connect", pid, uid, os.geteuid())
                connection.close()
                return
            peer = self._peers.get(pid)
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:  # the connection has taken the last one
                self._poller.later(_AGAIN, partial(self._admit, connection))
            else:  # it has gone already
                connection.close()
            return
        if peer.connections >= 2 * MOST_CONNECTIONS:  # its requests on half of these were answered with an error
            log.warning("refused process %d: it has %d connections already", pid, peer.connections)
            connection.close()
            return
        handshake = serve_handshake(self._keys)
        client = ControlConnection(self._poller, connection, peer, handshake, self.readable, self.closed)
        self._connections.add(client)
        peer.connections += 1
        self._strangers[client] = time.monotonic() + HANDSHAKE_TIMEOUT
        if not self._is_expiring:
            self._is_expiring = True
            self._poller.later(HANDSHAKE_TIMEOUT, self._expire)

    def _expire(self) -> None:
        self._is_expiring = False
        now = time.monotonic()
        for connection, deadline in list(self._strangers.items()):
            if connection.trust is Trust.AUTHENTICATED:
                del self._strangers[connection]
            elif deadline <= now:
                connection.close(connection.why or "it did not show its key in time", refused=True)
                del self._strangers[connection]
        if self._strangers:
            self._is_expiring = True
            self._poller.later(max(0.0, min(self._strangers.values()) - now), self._expire)
