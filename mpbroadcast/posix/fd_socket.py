"""The socket beside a pipe, on which descriptors travel, and small packets that belong to them.

What was received is kept as ``recvmsg`` returns it, in one step, and taken apart under the lock that keeps forks out: so no
interrupt and no fork finds a descriptor without an owner.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
from array import array
from typing import Any, Final

from mpbroadcast.posix.descriptors import OwnedDescriptor
from mpbroadcast.posix.forks import fork_lock, on_fork
from mpbroadcast.posix.poller import is_ready

SPACE: Final = socket.CMSG_SPACE(2 * array("i").itemsize)
CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_PACKET: Final = 64  # bytes of one at the most

Received = tuple[bytes, list[tuple[int, int, bytes]], int, Any]  # as `recvmsg` returns it


def taken_apart(received: Received) -> tuple[bytes, list[int], bool]:
    """Return the data, the descriptors that came with it, and whether others were lost."""
    data, ancillary, flags, _ = received
    fds = array("i")
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    if not CLOEXEC:
        for fd in fds:
            os.set_inheritable(fd, False)
    return data, fds.tolist(), bool(flags & socket.MSG_CTRUNC)


class DescriptorSocket(socket.socket):
    """One end of the socket. It never blocks. No other thread uses it at the moment when it is closed."""

    def __init__(self, fd: int) -> None:
        """Take the descriptor over; see :class:`OwnedDescriptor`."""
        super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
        on_fork(self, DescriptorSocket.close)
        self.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[DescriptorSocket, int]:
        """Make a socket. Return this end, and the descriptor of the other end.

        :raises OSError: no descriptor is left.
        """
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(own.detach()), other.detach()

    def send_packet(self, packet: bytes, fd: int = -1) -> bool:
        """Send a packet, and a descriptor with it. Return True if there was room for it.

        :raises OSError: the other end is gone, or the system does not take a descriptor.
        """
        with contextlib.suppress(BlockingIOError):
            self.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))] if fd >= 0 else [])
            return True
        return False

    def wait(self, seconds: float) -> bool:
        """Return True if a packet, or the other end's close, comes within that time, rounded up to whole milliseconds."""
        return is_ready(self, select.POLLIN, math.ceil(seconds * 1000))

    def receive_packet(self) -> bytes | None:
        """Return as :meth:`receive_packet_with_fd`, where no packet has a descriptor."""
        with contextlib.suppress(BlockingIOError):
            return self.recv(_PACKET)
        return None

    def receive_packet_with_fd(self) -> tuple[bytes, OwnedDescriptor | None] | None:
        """Return the next packet and its descriptor; ``None`` when none is there; an empty one at the end.

        :raises OSError: the other end is gone.
        """
        received: list[Received] = []
        with contextlib.suppress(BlockingIOError), fork_lock():
            self.receive(received)
            packet, fds, _ = taken_apart(received[0])
            owned = list(map(OwnedDescriptor, fds))  # no packet has more than one; no loop under a lock
            return packet, owned[0] if owned else None
        return None

    def receive(self, received: list[Received]) -> None:
        """Append the next packet, as ``recvmsg`` returns it: in one step, so that an interrupt comes before or after."""
        # When the other end was closed before it had read all, that is reported once, before what is still there.
        with contextlib.suppress(ConnectionResetError):
            received.extend(map(self.recvmsg, (_PACKET,), (SPACE,), (CLOEXEC,)))
            return
        received.extend(map(self.recvmsg, (_PACKET,), (SPACE,), (CLOEXEC,)))

    def __del__(self) -> None:
        if fork_lock is not None:  # see OwnedDescriptor
            with contextlib.suppress(AttributeError):  # an interrupt came before it was made
                self.close()
