"""A control connection at the broker's side: handshake, requests one by one, replies with descriptors.

A client that is silent or rude costs a descriptor until its deadline, and nothing else: no thread waits for it, what it
sends is bounded before it is read, and nothing more is read of it while it has not taken its last reply.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from mpbroadcast import trap_points
from mpbroadcast.broker.core.limits import MOST_ASKED
from mpbroadcast.broker.members import Peer, Session
from mpbroadcast.posix.poller import ERROR, IN, OUT, Poller
from mpbroadcast.protocol.control import MAX_HANDSHAKE, MAX_REQUEST, ControlError, Handshake, Inbox, decode, encode

if TYPE_CHECKING:
    from mpbroadcast.broker.members import Subscription

_READ: Final = 1 << 16
_MOST_REQUESTS: Final = 256  # of one connection in a round: thousands of notes come at once when channels are dropped
_SOL_LOCAL: Final = 0  # macOS: level and names of what SO_PEERCRED is on Linux, from its sys/un.h
_LOCAL_PEERCRED: Final = 1
_LOCAL_PEERPID: Final = 2


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process ID and the effective user ID of who connected; frozen at that moment."""
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid
    (pid,) = struct.unpack("i", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))
    _, uid = struct.unpack_from("2I", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76))
    return pid, uid


class ControlConnection:
    """One connection. ``on_request`` gets each request, and answers with :meth:`reply`; ``on_gone`` is called once."""

    def __init__(
        self,
        loop: Poller,
        connection: socket.socket,
        peer: Peer,
        handshake: Handshake,
        on_request: Callable[[ControlConnection, dict[str, Any]], None],
        on_gone: Callable[[ControlConnection, str], None],
    ) -> None:
        self.peer = peer
        self.session: Session | None = None  # whose lifeline this is
        self.opening: set[Subscription] = set()  # what it has begun to open
        self.waiting = False  # a request is not answered yet
        self._going = False  # through what has come
        self._resting = False  # until the next round
        self.has_key = False  # it has proved that
        self.authenticated = False  # and so has the broker
        self.refused = False
        self._loop = loop
        self._handshake = handshake
        self._on_request = on_request
        self._on_gone = on_gone
        self._inbox = Inbox(MAX_HANDSHAKE)
        self._held = 0  # bytes in it, as the peer counts them
        self._out: bytes | memoryview = b""
        self._descriptors: tuple[int, ...] = ()
        self._socket = connection
        self._fd = connection.fileno()
        self._events = IN
        loop.watch(self._fd, IN, self._ready)
        self._send(next(handshake))

    def reply(self, message: dict[str, Any], *descriptors: int) -> None:
        """Answer the request; ``descriptors`` go with it, and are closed here."""
        self._descriptors = descriptors
        self.reply_encoded(encode(message))
        if descriptors:
            trap_points.reach("replied with descriptors")

    def reply_encoded(self, data: bytes) -> None:
        """Answer the request with what :func:`encode` makes."""
        self.no_reply()
        self._send(data)

    def no_reply(self) -> None:
        """Be done with a request that has no answer."""
        self.waiting = False
        if self._inbox and not self._going:
            self._loop.later(0, self._go_on)

    def fail(self, kind: str, text: str, **more: Any) -> None:
        """Answer that it cannot be done."""
        self.reply({"error": kind, "text": text, **more})

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self, why: str, *, refused: bool = False) -> None:
        """Let go of it; ``refused`` when it would have stayed."""
        if self._fd >= 0:
            self.refused = refused
            fd, self._fd = self._fd, -1
            self._socket.detach()
            self._count(0)
            self._loop.close(fd)
            self._drop_descriptors()
            self._on_gone(self, why)

    def _ready(self, events: int) -> None:
        if events & OUT:
            self._send(b"")
            self._go_on()
        if events & IN and not self.waiting and not self._resting and not self._out:
            self._read()
        elif events & ERROR:
            self.close("it has closed its connection")

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"its connection broke ({error.strerror})")
            return
        if not data:
            self.close("it has closed its connection")
            return
        self._inbox.feed(data)
        self._go_on()

    def _go_on(self) -> None:
        """Handle what has come, as far as the answers go out, and some in this round."""
        self._going, left = True, _MOST_REQUESTS
        try:
            while left and self._fd >= 0 and not self.waiting and not self._out:
                left -= 1
                body = self._inbox.next()
                if body is None:
                    break
                if self.authenticated:
                    self.waiting = True
                    self._on_request(self, decode(body))
                else:
                    self._shake_hands(body)
        except ControlError as error:
            if len(error.args) > 1 and self._fd >= 0:
                self._send(error.args[1])
            self.close(f"it sent {error.args[0]}" if self.authenticated else f"no handshake: {error.args[0]}", refused=True)
        self._going, self._resting = False, not left
        if self._resting:
            self._loop.later(0, self._go_on)
        if self._fd >= 0:
            self._count(len(self._inbox))
        if self._held and self.peer.asked > MOST_ASKED:
            self.close("too much that its process asks is not whole", refused=True)
        self._set_events()

    def _count(self, held: int) -> None:
        self.peer.asked += held - self._held
        self._held = held

    def _shake_hands(self, body: bytes) -> None:
        trap_points.reach("checking a key")
        try:
            self._send(self._handshake.send(body))
            self.has_key = True
        except StopIteration as done:
            self.authenticated = True
            self._inbox.limit = MAX_REQUEST
            self._send(done.value)

    def _send(self, data: bytes) -> None:
        if data:
            self._out = bytes(self._out) + data if self._out else data
        try:
            while self._out and self._fd >= 0:
                if self._descriptors:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", self._descriptors))]
                    sent = self._socket.sendmsg([self._out], rights)
                    self._drop_descriptors()
                else:
                    sent = self._socket.send(self._out)
                self._out = memoryview(self._out)[sent:]  # a long reply is not copied with each part that is sent
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(f"its connection broke ({error.strerror})")
            return
        self._set_events()

    def _drop_descriptors(self) -> None:
        descriptors, self._descriptors = self._descriptors, ()
        for descriptor in descriptors:
            self._loop.close(descriptor)

    def _set_events(self) -> None:
        events = OUT if self._out else 0 if self.waiting or self._resting else IN
        if self._fd >= 0 and events != self._events:
            self._events = events
            self._loop.change(self._fd, events)
