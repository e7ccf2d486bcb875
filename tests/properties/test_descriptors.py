"""Memory and packets with descriptors that other processes send, of any kind and number."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from random import Random

import pytest

from mpbroadcast.posix.fd_socket import CLOEXEC, PACKET, SPACE, DescriptorSocket, taken_apart
from mpbroadcast.posix.shared_memory import MemoryRefused, check_message, check_ring
from tests.support.rude import any_file, shares_memory
from tests.support.victims import descriptors


@shares_memory
def test_memory_of_any_kind() -> None:
    """What passes the checks has that size and cannot shrink; all else is ``MemoryRefused``."""
    for number in range(300):
        choose = Random(f"memory {number}")
        with any_file(choose) as fd:
            size = choose.choice([0, 1, 3000, 4096, 1 << 20, 1 << 63])
            with contextlib.suppress(MemoryRefused):
                check_message(fd, size)
                assert os.fstat(fd).st_size >= size
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
                assert seals & 6 == 6
                assert seals & 24, "others could change it"
            with contextlib.suppress(MemoryRefused):
                assert check_ring(fd) == os.fstat(fd).st_size > 0
                assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 22 == 22
    for fd in (-1, 1 << 20):
        with pytest.raises((MemoryRefused, ValueError)):
            check_ring(fd)


def test_descriptors_of_any_number() -> None:
    """Packets of any length with any number of descriptors are received one by one, and no descriptor stays."""
    held = descriptors(os.getpid())
    ours, number = DescriptorSocket.pair()
    theirs = DescriptorSocket(number)
    for count in range(200):
        choose = Random(f"descriptors {count}")
        fds = [ours.fileno()] * choose.choice([0, 0, 1, 2, 3, 20])
        data = choose.randbytes(choose.choice([1, 15, 16, 64, 65, 300]))
        socket.send_fds(ours, [data], fds)
        if choose.random() < 0.3:
            assert theirs.recv(PACKET) == data[:PACKET]
        elif choose.random() < 0.5:
            came, numbers, lost = taken_apart(theirs.recvmsg(32, SPACE, CLOEXEC))
            assert (came, lost) == (data[:32], len(fds) > len(numbers))
            assert len(numbers) <= len(fds)
            for fd in numbers:
                os.close(fd)
        else:
            packet = theirs.receive_packet_with_fd()
            assert packet is not None
            assert packet[0] == data[:PACKET]
            assert (packet[1] is not None) == bool(fds)
            del packet
        assert theirs.receive_packet_with_fd() is None
        assert descriptors(os.getpid()) == held + 2
    ours.close()
    assert theirs.receive_packet_with_fd() == (b"", None)
    theirs.close()
