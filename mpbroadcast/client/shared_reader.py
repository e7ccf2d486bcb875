"""What a channel gets beside its pipe: rings that it reads from, and the memory of single messages.

Decoding can be interrupted at any point, and is then done again from the beginning. So nothing that it needs is let go of
before :meth:`SharedReader.settle` says that what was decoded is kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.posix.fd_socket import DescriptorSocket, Received, taken_apart
from mpbroadcast.posix.forks import fork_lock, on_fork
from mpbroadcast.posix.shared_memory import (
    MemoryRefused,
    check_message,
    check_ring,
    keep_freed_memory,
    map_for_reading,
    map_privately,
)
from mpbroadcast.protocol.fd_packets import MAPPED, MEMORY, READ, REFUSED, RING, PacketError, pack, unpack
from mpbroadcast.protocol.frames import OVERHEAD, references_in
from mpbroadcast.protocol.pickling import Failure, load_copied_image, load_each, load_image, loads
from mpbroadcast.protocol.ring_allocator import CHUNK
from mpbroadcast.protocol.runs import REFERENCES, RING_OFFERED, RunView, read_memory, read_references

_SELDOM: Final = 0.25  # seconds, until an acknowledgement is sent although little was read
SAY_EVERY: Final = 2 * CHUNK  # bytes read, until the broker is told; an empty pipe tells it, too


class SharedReader:
    """The other side of the socket beside a channel's pipe."""

    def __init__(self, fd_socket: DescriptorSocket) -> None:
        self._fd_socket = fd_socket
        self._heard: list[Received] = []  # what has come, and is still to be taken in
        self._rings: dict[int, memoryview] = {}
        self._gone: set[int] = set()
        self._memories: dict[int, int] = {}  # descriptors; -1: it was lost, as none was left
        self._loaded = 0  # the last message in memory of its own that was decoded
        self._unsaid = 0  # bytes read, and not told of
        self._said_at = time.monotonic()
        on_fork(self, SharedReader.close)

    def _receive(self, wanted: int) -> None:
        """Take in what has come, up to the ring or message of this number, so that no more descriptors are kept than needed."""
        heard = self._heard
        with contextlib.suppress(OSError, PacketError, IndexError):  # IndexError: a signal's handler has closed it
            while wanted not in self._memories and wanted not in self._rings:
                if not heard:
                    with fork_lock():
                        self._fd_socket.receive(heard)
                packet, numbers, _ = taken_apart(heard[0])
                if not packet:
                    break
                kind, number, value = unpack(packet)
                descriptor = numbers[0] if numbers else -1
                if kind == MEMORY:
                    del heard[0]  # no call between the two, so no interrupt
                    self._memories[value] = descriptor
                    continue
                if kind == RING and number not in self._rings and descriptor >= 0:
                    self._map(number, descriptor)
                del heard[0]
                if descriptor >= 0:
                    os.close(descriptor)

    def _map(self, number: int, descriptor: int) -> None:
        with contextlib.suppress(OSError, MemoryRefused):
            self._rings[number] = memoryview(map_for_reading(descriptor, check_ring(descriptor)))
            keep_freed_memory()

    def note(self, kind: int, ring: int) -> None:
        """A ring has come, and is mapped, or nothing refers to it any more."""
        if kind == RING_OFFERED:
            self._receive(ring)
            with contextlib.suppress(OSError):
                self._fd_socket.send_packet(pack(MAPPED if ring in self._rings else REFUSED, ring))
        else:
            self._gone.add(ring)

    def load_run(self, data: bytes, run: RunView) -> tuple[list[Any], bool, int]:
        """The messages of a run that are not in it, whether all could be unpickled, and their size."""
        if run.kind != REFERENCES:
            number, length = read_memory(data, run)
            message = self._load_memory(number, length, run.image)
            return [message], type(message) is not Failure, length
        number, frames = read_references(data, run)
        view = self._rings[number]
        payloads = [view[offset : offset + length] for _, offset, length in references_in(frames, run.skip)]
        size = sum(map(len, payloads))
        self._unsaid += size + len(payloads) * (run.skip + OVERHEAD)  # as the broker counts them
        return *load_each(payloads, load_copied_image if run.image else loads), size

    def _load_memory(self, number: int, length: int, image: bool) -> Any:
        self._unsaid += SAY_EVERY
        if number not in self._memories:
            trap_points.reach("taking memory")
            self._receive(number)
        descriptor = self._memories.get(number, -1)
        if descriptor < 0:
            text = "no descriptor was left in this process for a large message: close some, or raise `ulimit -n`"
            return Failure(OSError(errno.EMFILE, text))
        self._loaded = number
        try:
            check_message(descriptor, length)
            buffer = _mapped_or_read(descriptor, length)
        except (MemoryRefused, OSError, MemoryError, ValueError) as error:  # ValueError: it is empty
            return Failure(OSError(errno.ENOMEM, f"a large message could not be taken in: {error}"))
        return load_each([memoryview(buffer).cast("B")], load_image if image else loads)[0][0]

    def settle(self, read: int, came: bool = False) -> None:
        """What was decoded is kept: ``read`` references so far. Let go of what it needed, and tell the broker.

        ``came``: something was decoded. What has been read of a pipe lasts a slow reader for long, and the broker, when it is
        being closed, must see that it goes on.
        """
        if self._loaded:
            if self._loaded in self._memories:
                come = list(self._memories)  # in this order, which is that of the pipe; the numbers' is another one
                self._let_go(come[: come.index(self._loaded) + 1])
            self._loaded = 0
        while self._gone:
            self._rings.pop(self._gone.pop(), None)
        now = time.monotonic() if came else 0.0
        if self._unsaid >= SAY_EVERY or now - self._said_at >= _SELDOM:
            with contextlib.suppress(OSError):
                if self._fd_socket.send_packet(pack(READ, 0, read)):
                    self._unsaid = 0
                    self._said_at = now or self._said_at

    def ended(self) -> None:
        """Nothing more comes: the broker is to know what has been read, as it waits for that."""
        self._unsaid = SAY_EVERY

    def _let_go(self, numbers: list[int]) -> None:
        for number in numbers:
            descriptor = self._memories[number]
            del self._memories[number]
            if descriptor >= 0:
                os.close(descriptor)

    def close(self) -> None:
        """Let go of all; it can be called again."""
        self._fd_socket.close()
        self._rings.clear()
        self._let_go(list(self._memories))
        while self._heard:
            for number in taken_apart(self._heard.pop())[1]:
                os.close(number)

    def __del__(self) -> None:
        if hasattr(self, "_unsaid"):
            self.close()


def _mapped_or_read(fd: int, length: int) -> Any:
    try:
        return map_privately(fd, length)
    except OSError:  # too many maps
        buffer = bytearray(length)
        view = memoryview(buffer)
        done = 0
        while done < length:
            done += os.preadv(fd, [view[done:]], done)
        return buffer
