"""Sockets that carry descriptors: control connections, and the socket beside a pipe with its small packets. None blocks.

What was received is kept as ``recvmsg`` returns it, in one step, and taken apart under the lock that keeps forks out: so no
interrupt and no fork finds a descriptor without an owner.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from array import array
from collections.abc import Iterator
from typing import Any, Final

from mpbroadcast.posix.descriptors import OwnedDescriptor, fork_lock, on_fork

SPACE: Final = socket.CMSG_SPACE(3 * array("i").itemsize)
CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
PACKET: Final = 64  # bytes of one at the most

_SOL_LOCAL: Final = 0  # macOS: level and names of what SO_PEERCRED is on Linux, from its sys/un.h
_LOCAL_PEERCRED: Final = 1
_LOCAL_PEERPID: Final = 2

Socket = socket.socket
Received = tuple[bytes, list[tuple[int, int, bytes]], int, Any]  # as `recvmsg` returns it

send_fds = socket.send_fds


def control_socket() -> Socket:
    """Return a socket to listen at, or for a control connection."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


def peer_of(connection: Socket) -> tuple[int, int]:
    """Return the process ID and the effective user ID of the process that connected, as they were then."""
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid
    (pid,) = struct.unpack("i", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))
    _, uid = struct.unpack_from("2I", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76))
    return pid, uid


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
    """One end of the socket beside a pipe. No other thread uses it at the moment when it is closed."""

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
            if fd >= 0:
                self.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", (fd,)))])
            else:
                self.send(packet)
            return True
        return False

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
            received.extend(map(self.recvmsg, (PACKET,), (SPACE,), (CLOEXEC,)))
            return
        received.extend(map(self.recvmsg, (PACKET,), (SPACE,), (CLOEXEC,)))

    def __del__(self) -> None:
        if fork_lock is not None:  # see OwnedDescriptor
            with contextlib.suppress(AttributeError):  # an interrupt came before it was made
                self.close()


class Reserve:
    """One descriptor that is kept so that another one can be received when none is left."""

    def __init__(self) -> None:
        self._fd = -1
        self._open()

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            self._fd = os.open(os.devnull, os.O_RDONLY)

    @contextlib.contextmanager
    def room_for_one(self) -> Iterator[bool]:
        """Have room for one more descriptor in the block. Yield True if it can be kept."""
        has_room = False
        with contextlib.suppress(OSError):  # none is left, or the reserve is not there
            os.close(os.dup(self._fd))
            has_room = True
        if not has_room and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        try:
            yield has_room
        finally:
            if not has_room:
                self._open()
