"""Reading messages in shared memory: the rings and memories whose descriptors come on the socket beside a channel's pipe.

- Decoding can be interrupted at any point, and is then repeated from the beginning. So nothing that it needs is released before
  :meth:`SharedReader.commit`, which the channel calls when it has kept what was decoded.
- Descriptors are received only as far as the next run needs them, so that a slow reader holds few.
- An acknowledgement has the number of messages read so far. It is sent when much was read, or when the last one is old; an
  empty pipe shows the broker the same. Sending never blocks: one that had no room, or was interrupted, is sent with the next
  commit, which comes before the channel waits (:attr:`SharedReader.is_committed`).
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.posix import shared_memory
from mpbroadcast.posix.descriptors import close_fd, fork_lock, on_fork
from mpbroadcast.posix.fd_socket import DescriptorSocket, Received, taken_apart
from mpbroadcast.protocol.fd_packets import MAPPED, MEMORY, READ, REFUSED, RING, PacketError, pack, unpack
from mpbroadcast.protocol.frames import OVERHEAD, references_in
from mpbroadcast.protocol.pickling import Failure, Loaders, load_each
from mpbroadcast.protocol.ring_allocator import CHUNK
from mpbroadcast.protocol.runs import REFERENCES, RING_OFFERED, RunView, read_memory, read_references

_SELDOM: Final = 0.25  # seconds until an acknowledgement is sent although little was read
ACKNOWLEDGE_EVERY: Final = 2 * CHUNK  # bytes read until an acknowledgement is sent


class SharedReader:
    """The channel's end of the descriptor socket, and what it has mapped."""

    def __init__(self, fd_socket: DescriptorSocket) -> None:
        self.is_committed = True  # False if there is something to release or to acknowledge, until commit() has done all
        self._fd_socket = fd_socket
        self._received: list[Received] = []  # packets that are not handled yet
        self._rings: dict[int, memoryview] = {}
        self._gone: set[int] = set()  # rings to unmap
        self._memories: dict[int, int] = {}  # descriptors by message; -1: no descriptor was left for it
        self._loaded = 0  # the last message in memory of its own that was decoded
        self._unacknowledged = 0  # bytes
        self._acknowledged_at = time.monotonic()
        on_fork(self, SharedReader.close)

    def _receive(self, wanted: int) -> None:
        """Receive packets until this ring or message has come, or none is left."""
        received = self._received
        with contextlib.suppress(OSError, PacketError, IndexError):  # IndexError: a signal handler has closed it
            while wanted not in self._memories and wanted not in self._rings:
                if not received:
                    with fork_lock():
                        self._fd_socket.receive(received)
                packet, fds, _ = taken_apart(received[0])
                if not packet:
                    break
                kind, ring, value = unpack(packet)
                if kind == MEMORY:
                    fd = fds[0] if fds else -1
                    del received[0]  # no call between the two, so no interrupt
                    self._memories[value] = fd
                    continue
                if kind == RING and ring not in self._rings and fds:
                    self._map(ring, fds[0])
                del received[0]
                for fd in fds:
                    close_fd(fd)

    def _map(self, ring: int, fd: int) -> None:
        with contextlib.suppress(OSError, shared_memory.MemoryRefused):
            self._rings[ring] = shared_memory.map_for_reading(fd, shared_memory.check_ring(fd))
            shared_memory.keep_freed_memory()

    def note(self, kind: int, ring: int) -> None:
        """Handle a note about a ring: map it and reply, or unmap it at the next commit."""
        if kind == RING_OFFERED:
            self._receive(ring)
            with contextlib.suppress(OSError):
                self._fd_socket.send_packet(pack(MAPPED if ring in self._rings else REFUSED, ring))
        else:
            self.is_committed = False
            self._gone.add(ring)

    def load_run(self, data: bytes, run: RunView, loaders: Loaders) -> tuple[list[Any], bool, int]:
        """Return the messages that a run refers to, whether all could be unpickled, and their size."""
        self.is_committed = False
        if run.kind != REFERENCES:
            message_id, length = read_memory(data, run)
            message = self._load_memory(message_id, length, loaders.image if run.image else loaders.pickle)
            return [message], type(message) is not Failure, length
        ring, frames = read_references(data, run)
        view = self._rings[ring]
        payloads = [view[offset : offset + length] for _, offset, length in references_in(frames, run.skip)]
        size = sum(map(len, payloads))
        self._unacknowledged += size + len(payloads) * (run.skip + OVERHEAD)  # as the broker counts them
        return *load_each(payloads, loaders.copied_image if run.image else loaders.pickle), size

    def _load_memory(self, message_id: int, length: int, loader: Callable[[Any], Any]) -> Any:
        self._unacknowledged += ACKNOWLEDGE_EVERY
        if message_id not in self._memories:
            trap_points.reach("taking memory")
            self._receive(message_id)
        fd = self._memories.get(message_id, -1)
        if fd < 0:
            text = "no descriptor was left in this process for a large message: close some, or raise `ulimit -n`"
            return Failure(OSError(errno.EMFILE, text))
        self._loaded = message_id
        try:
            shared_memory.check_message(fd, length)
            buffer = shared_memory.map_or_read(fd, length)
        except (shared_memory.MemoryRefused, OSError, MemoryError, ValueError) as error:  # ValueError: it is empty
            return Failure(OSError(errno.ENOMEM, f"a large message could not be mapped: {error}"))
        return load_each([memoryview(buffer).cast("B")], loader)[0][0]

    def commit(self, read: int, is_progress: bool = False) -> None:
        """Release what decoding needed, now that its result is kept, and acknowledge: ``read`` messages so far.

        With ``is_progress``, messages were decoded. One pipe's worth lasts a slow reader for long, and the broker, when it is
        being closed, waits for readers that go on.
        """
        if self._loaded:
            if self._loaded in self._memories:
                ids = list(self._memories)  # in the order of the pipe, which is not that of the ids
                self._release(ids[: ids.index(self._loaded) + 1])
            self._loaded = 0
        while self._gone:
            self._rings.pop(self._gone.pop(), None)
        now = time.monotonic() if is_progress else 0.0
        if self._unacknowledged >= ACKNOWLEDGE_EVERY or now - self._acknowledged_at >= _SELDOM:
            with contextlib.suppress(OSError):
                if not self._fd_socket.send_packet(pack(READ, 0, read)):
                    return
                self._unacknowledged = 0
                self._acknowledged_at = now or self._acknowledged_at
        self.is_committed = True

    def acknowledge_all(self) -> None:
        """Let the next commit acknowledge: no message follows, and the broker waits for what was read."""
        self._unacknowledged = ACKNOWLEDGE_EVERY

    def _release(self, ids: list[int]) -> None:
        for message_id in ids:
            with fork_lock():  # so that a child has a copy only while this object knows of it
                fd = self._memories[message_id]
                del self._memories[message_id]
                if fd >= 0:
                    close_fd(fd)

    def close(self) -> None:
        """Close all descriptors, and unmap the rings; it can be called again."""
        self._fd_socket.close()
        self._rings.clear()
        self._release(list(self._memories))
        while self._received:
            for fd in taken_apart(self._received.pop())[1]:
                close_fd(fd)

    def __del__(self) -> None:
        if hasattr(self, "_unacknowledged"):
            self.close()
