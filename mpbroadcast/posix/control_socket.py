"""The socket of a control connection, at either side: bytes, and descriptors beside them. It never blocks."""

from __future__ import annotations

import socket
import struct
from array import array
from typing import Final

from mpbroadcast.deadline import Deadline
from mpbroadcast.posix.fd_socket import CLOEXEC, SPACE, Received
from mpbroadcast.posix.poller import is_ready

_SOL_LOCAL: Final = 0  # macOS: level and names of what SO_PEERCRED is on Linux, from its sys/un.h
_LOCAL_PEERCRED: Final = 1
_LOCAL_PEERPID: Final = 2

Listener = socket.socket  # of the same kind


class ControlSocket(socket.socket):
    """A socket of the kind AF_UNIX, SOCK_STREAM: new, or one that was accepted."""

    def __init__(self, fd: int | None = None) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        self.setblocking(False)

    @classmethod
    def accepted(cls, listener: Listener) -> ControlSocket:
        """Accept a connection.

        :raises BlockingIOError: none is there.
        :raises OSError: it has gone already, or no descriptor is left.
        """
        connection, _ = listener.accept()
        return cls(connection.detach())

    def peer(self) -> tuple[int, int]:
        """Return the process ID and the effective user ID of the process that connected, as they were then."""
        if hasattr(socket, "SO_PEERCRED"):
            pid, uid, _ = struct.unpack("3i", self.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return pid, uid
        (pid,) = struct.unpack("i", self.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))
        _, uid = struct.unpack_from("2I", self.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76))
        return pid, uid

    def send_with_fds(self, data: bytes | memoryview, fds: tuple[int, ...]) -> int:
        """Send what there is room for, and these descriptors with its first byte. Return how many bytes.

        :raises BlockingIOError: there is no room.
        """
        return self.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])

    def receive(self, size: int) -> Received:
        """Return what is there, with descriptors, which get an owner under the same :func:`fork_lock`.

        :raises BlockingIOError: nothing is there.
        """
        return self.recvmsg(size, SPACE, CLOEXEC)

    def wait(self, events: int, deadline: Deadline) -> bool:
        """Return True if one of ``events`` came before the deadline."""
        return is_ready(self, events, deadline.milliseconds())
