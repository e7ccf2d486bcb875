"""A control connection at the broker's side: handshake, requests one by one, replies with descriptors.

A client that is silent or rude costs a descriptor until its deadline, and nothing else: no thread waits for it, what it
sends is bounded before it is read, and nothing more is read of it while it has not read its last reply.

Nothing here calls the server. A connection that has something to handle, or is closed, is entered in ``readable`` or
``closed``, which the server works off at the end of the round; there it takes the requests by
:meth:`ControlConnection.next_request`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.broker.core.limits import MOST_ASKED
from mpbroadcast.broker.members import Peer, Session
from mpbroadcast.posix.fd_socket import Socket, send_fds
from mpbroadcast.posix.poller import ERROR, IN, OUT, Poller
from mpbroadcast.protocol.control import MAX_HANDSHAKE, MAX_REQUEST, ControlError, Handshake, Inbox, decode, encode
from mpbroadcast.protocol.version import OWN, Announcement

_READ: Final = 1 << 16


class Trust(IntEnum):
    """How far the handshake is. Each follows one above it."""

    STRANGER = 0
    HAS_KEY = 1
    UNVERSIONED = 2  # both sides have the key, but the client announces no version: its first request is refused
    AUTHENTICATED = 3  # both sides have the key, and the same protocol


Readable = dict["ControlConnection", None]  # of which bytes have come, or are left from the round before
Closed = list["ControlConnection"]


class ControlConnection:
    """One connection, with one request at a time, until :meth:`reply` or :meth:`no_reply`."""

    def __init__(
        self, poller: Poller, connection: Socket, peer: Peer, handshake: Handshake, readable: Readable, closed: Closed
    ) -> None:
        self.peer = peer
        self.session: Session | None = None  # which ends with this connection
        self.trust = Trust.STRANGER
        self.is_waiting = False  # independent of the handshake: a request is not replied to yet
        self.is_refused = False  # independent of the handshake: the broker has closed it for what it sent
        self.why = ""  # it is closed, or will be
        self._poller = poller
        self._socket = connection
        self._handshake = handshake
        self._readable = readable
        self._closed = closed
        self._inbox = Inbox(MAX_HANDSHAKE)
        self._counted = 0  # bytes in the inbox, as the peer counts them
        self._out: deque[bytes | memoryview] = deque()
        self._fds: tuple[int, ...] = ()  # that go with the first byte of it
        self._events = IN
        poller.watch(connection.fileno(), IN, self._ready)
        self._send(next(handshake))

    def reply(self, message: dict[str, Any], *fds: int) -> None:
        """Reply to the request; the descriptors ``fds`` go with it, and are closed here."""
        self._fds = fds
        self.reply_encoded((encode(message),))
        if fds:
            trap_points.reach("replied with descriptors")

    def reply_encoded(self, parts: Sequence[bytes]) -> None:
        """Reply to the request with these bytes, which are a whole message."""
        self.no_reply()
        self._send(*parts)

    def no_reply(self) -> None:
        self.is_waiting = False
        if self._inbox:
            self._readable[self] = None

    @property
    def is_closed(self) -> bool:
        """True once it is closed, at either side."""
        return self._socket.fileno() < 0

    def close(self, why: str, *, refused: bool = False) -> None:
        """Close it; ``refused`` if the client would have kept it."""
        if not self.is_closed:
            self.is_refused, self.why = refused, why
            self._poller.close(self._socket.detach())
            self._count(0)
            self._drop_fds()
            self._readable.pop(self, None)
            self._closed.append(self)

    def _ready(self, events: int) -> None:
        if events & OUT:
            self._send()
        if events & (IN | ERROR) and not self.is_waiting and not self._out:
            if self not in self._readable:  # else the requests that have come are handled first
                self._read()
        elif events & ERROR:
            self.close("it has closed its connection")

    def _read(self) -> None:
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"its connection broke ({error.strerror})")
            return
        if not data:
            self.close("it has closed its connection")
            return
        self._inbox.feed(data)
        self._readable[self] = None

    def next_request(self) -> dict[str, Any] | None:
        """Return the next request that has come, if the last one is replied to and the client has read that."""
        try:
            while not (self.is_waiting or self._out or self.is_closed):
                body = self._inbox.next()
                if body is None:
                    break
                if self.trust is Trust.AUTHENTICATED:
                    self.is_waiting = True
                    return decode(body)
                if self.trust is Trust.UNVERSIONED:
                    self._refuse(decode(body))
                else:
                    self._shake_hands(body)
        except ControlError as error:
            if len(error.args) > 1 and not self.is_closed:
                self._send(error.args[1])
            no_handshake = "" if self.trust > Trust.HAS_KEY else "no handshake: "
            self.close(f"{no_handshake or 'it sent '}{error.args[0]}", refused=True)
        return None

    def end_turn(self, *, has_more: bool) -> None:
        """Read on, after its requests of this round; ``has_more``: some are left for the next one."""
        if self.is_closed:
            return
        if has_more:
            self._readable[self] = None
        self._count(len(self._inbox))
        if self._counted and self.peer.asked > MOST_ASKED:
            self.close("too much that its process requests is not whole", refused=True)
        self._set_events()

    def _count(self, size: int) -> None:
        self.peer.asked += size - self._counted
        self._counted = size

    def _shake_hands(self, body: bytes) -> None:
        trap_points.reach("checking a key")
        try:
            self._send(self._handshake.send(body))
            self.trust = Trust.HAS_KEY
        except StopIteration as done:
            self._inbox.limit = MAX_REQUEST
            self._compare(done.value.peer)

    def _compare(self, client: Announcement | None) -> None:
        if client is None:
            self.trust = Trust.UNVERSIONED
            self.why = f"version mismatch: it announces no protocol, and this broker has {OWN}"
        elif client.protocol != OWN.protocol:
            self.close(f"version mismatch: it has {client}, and this broker has {OWN}", refused=True)
        else:
            self.trust = Trust.AUTHENTICATED

    def _refuse(self, request: dict[str, Any]) -> None:
        """Refuse the first request that has a reply. A client without a version shows the text, which must be short."""
        if request.get("do") not in ("drop", "detach"):
            text = f"version mismatch: the broker has {OWN}, this process an older mpbroadcast: install one version in both"
            # Of a reply to "attach", such a client reads the other three: what is not a number ends in an error with that text.
            self._send(encode({"error": "lost", "text": text, "broker": "", "restarts": False, "session": text}))
            self.close(self.why, refused=True)

    def _send(self, *parts: bytes) -> None:
        out = self._out
        out.extend(parts)
        try:
            while out and not self.is_closed:
                data = out[0]
                if self._fds:
                    sent = send_fds(self._socket, [data], self._fds)
                    self._drop_fds()
                else:
                    sent = self._socket.send(data)
                if sent < len(data):
                    out[0] = memoryview(data)[sent:]  # a long reply is not copied with each part that is sent
                else:
                    out.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(f"its connection broke ({error.strerror})")
            return
        if not out and self._inbox:
            self._readable[self] = None
        self._set_events()

    def _drop_fds(self) -> None:
        fds, self._fds = self._fds, ()
        for fd in fds:
            self._poller.close(fd)

    def _set_events(self) -> None:
        is_busy = self.is_waiting or self in self._readable
        events = OUT if self._out else 0 if is_busy else IN
        if not self.is_closed and events != self._events:
            self._events = events
            self._poller.change(self._socket.fileno(), events)
