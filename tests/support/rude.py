"""Processes that have the key and misbehave: control connections, publishers and files as none of this package are."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from random import Random
from typing import Any, Final

import pytest

from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.deadline import Deadline
from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.shared_memory import available, message_memory, ring_memory
from mpbroadcast.posix.waiting import Wait
from mpbroadcast.protocol.control import decode, encode
from mpbroadcast.protocol.fd_packets import MEMORY, RING, pack
from tests.support.helpers import DEADLINE, keyed_connection

shares_memory = pytest.mark.skipif(not available(), reason="there is no shared memory here, or it is forbidden")
RING_SIZE: Final = 1 << 20


class Rude:
    """A connection that has shown the key, and then sends what it likes."""

    def __init__(self, address: str) -> None:
        self._connection = keyed_connection(address)
        self.socket = socket.socket(fileno=os.dup(self._connection.fileno()))

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the broker has closed the connection
            self.socket.sendall(data)

    def reply(self, seconds: float = DEADLINE) -> dict[str, Any] | None:
        """Return the next reply, or ``None`` if none comes in that time, or the broker has closed the connection."""
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll(seconds):
                return decode(self._connection.recv_bytes())
        return None

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a good request."""
        self.send(encode(message))
        reply = self.reply()
        assert reply is not None, f"no reply to {message}"
        return reply

    def close(self) -> None:
        self.socket.close()
        self._connection.close()


class Lent:
    """A publisher as the library has it, with a pipe, and perhaps a socket beside it, and a ring."""

    def __init__(self, link: BrokerClient, *, fd_socket: bool) -> None:
        reply = link.request("publisher")
        assert reply.pipe is not None
        self.number = reply.body["publisher"]
        self.pipe = reply.pipe
        self.fd_socket = link.request("fd_socket", publisher=self.number).fd_socket if fd_socket else None

    def write(self, data: bytes) -> None:
        """Write what there is room for, whole or not, unless the broker has closed the pipe."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self.pipe.fd, data)

    def send_packet(self, packet: bytes, *fds: int) -> None:
        """Send a packet with descriptors, if there is room for it, and the broker has not closed the socket."""
        if self.fd_socket is not None:
            with contextlib.suppress(OSError):
                socket.send_fds(self.fd_socket, [packet], [*fds])

    def ring(self, number: int, seconds: float = DEADLINE) -> None:
        """Share a good ring, and wait until that is answered, but not for longer."""
        descriptor, memory = ring_memory(RING_SIZE)
        self.send_packet(pack(RING, number, 1 << 16), descriptor.fd)
        if self.fd_socket is not None:
            Wait(Deadline(seconds), IN, self.fd_socket).block()
        memory.close()

    def memory(self, number: int, size: int) -> None:
        descriptor = message_memory([bytes(size)])
        self.send_packet(pack(MEMORY, 0, number), descriptor.fd)
        descriptor.close()

    def close(self) -> None:
        self.pipe.close()
        if self.fd_socket is not None:
            self.fd_socket.close()


SEALS: Final = [0, 2, 4, 8, 2 | 4, 2 | 4 | 8, 2 | 4 | 16, 1 | 2 | 4 | 16, 1 | 2 | 4 | 8]


@contextlib.contextmanager
def any_file(choose: Random) -> Iterator[int]:
    """Yield a descriptor of memory of any size with any seals, or of something that is no memory."""
    kind = choose.randrange(8)
    if kind == 0:
        fd, other = os.pipe()
        os.close(other)
    elif kind == 1:
        fd = os.open(choose.choice(["/dev/null", "/dev/zero", "/", sys.executable]), os.O_RDONLY)
    else:
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, choose.choice([0, 1, 100, 3000, 4096, 5000, 1 << 16, 1 << 20, (1 << 20) + 1, 1 << 30, 1 << 45]))
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, choose.choice(SEALS))
    try:
        yield fd
    finally:
        os.close(fd)
