"""Memory that messages of one publisher had, to be written again.

New memory is dear: the system finds each of its pages, and takes it back when the last reader is gone. A stream of large
messages needs less: each is written into memory that one before it had, once no other process has that any more. The system
knows, as it knows every descriptor and every map of every process; and so nothing is held up or lost by a process that was
killed, and a message is its reader's own for as long as the reader likes.

A publisher that sends such messages only now and then keeps nothing. The memory that a stream has left is released at the next
occasion, as there is no thread here that could do it by itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from itertools import repeat
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.posix.descriptors import OwnedDescriptor, fork_lock, on_fork
from mpbroadcast.posix.shared_memory import (
    SEAL_FUTURE_WRITE,
    enter_pages,
    fill,
    fits,
    map_for_writing,
    message_memory,
    new_memory,
    seal,
)

_MOST: Final = 4  # memories: one that is read, one that waits, one on its way to them, and one to be written
MOST_KEPT: Final = 1 << 26  # bytes of them, but two there may be at any rate
LARGEST: Final = 9 << 25  # bytes of a message that is kept: beyond that, it is much to have for the next one
STREAM: Final = 1.0  # seconds between two messages that belong to one
PATIENCE: Final = 1e-10  # seconds for each byte: a part of what new memory takes
_PAUSE: Final = 5e-5  # seconds
# Taken, and given back. SIGURG is ignored where no handler is set; the default would be a signal that kills.
_LEASE: Final = tuple(getattr(fcntl, name, -1) for name in ("F_SETSIG", "F_SETLEASE", "F_SETLEASE"))
_LEASED: Final = (signal.SIGURG, fcntl.F_WRLCK, fcntl.F_UNLCK)
_SLICE: Final = 1 << 22  # bytes to go through at once: other threads, and signals, have their turn in between


class MemoryPool:
    """Memory for large messages: that of an earlier one if it is free, else new. Several threads may use it at once."""

    def __init__(self) -> None:
        # That no thread is about to write; what was used last is last. It needs no lock: a thread writes only what it has
        # itself removed from the list, and what an interrupt loses is released.
        self._kept: list[KeptMemory] = []
        self._possible = True
        self._patient = True  # to wait for memory helped, the last time
        self._when = -STREAM  # that the last message came

    def memory(self, parts: Sequence[Any], size: int) -> OwnedDescriptor:
        """Return a descriptor to send, of memory with these bytes, ``size`` in all. No receiver of it can change them.

        :raises OSError: the system has none to give.
        """
        now = time.monotonic()
        follows = self._possible and size <= LARGEST and now < self._when + STREAM
        self._when = now
        if not follows:
            self._kept.clear()
        return (self._in_kept(parts, size, now) if follows else None) or message_memory(parts)

    def rest(self) -> None:
        """Release all, if no large message has come for a while."""
        if self._kept and time.monotonic() >= self._when + STREAM:
            self._kept.clear()

    def _in_kept(self, parts: Sequence[Any], size: int, now: float) -> OwnedDescriptor | None:
        try:
            kept = self._wait(size, now) or KeptMemory(size)
            reader = kept.reader()
            kept.fill(parts)
            self._kept.append(kept)
            while _too_much([one.size for one in self._kept]):
                del self._kept[:1]
            return reader
        except OSError as error:  # what is not to be kept may need less
            self._possible = error.errno not in (errno.EINVAL, errno.ENOENT)  # the system has no such seal, lease, or /proc
        return None

    def _wait(self, size: int, now: float) -> KeptMemory | None:
        """Return kept memory that no other process has. Quick readers are waited for: less long if a stream may need more."""
        while True:
            if (found := self._taken(size)) is not None:
                self._patient = True
                return found
            there = [kept.size for kept in self._kept]
            enough = _too_much([*there, size])
            if not (self._patient and any(fits(size, one) for one in there)):
                return None
            if time.monotonic() > now + size * (PATIENCE if enough else PATIENCE / 5):
                self._patient = not enough
                return None
            time.sleep(_PAUSE)

    def _taken(self, size: int) -> KeptMemory | None:
        """Return memory for a message of this size that no other process has, removed from what is kept."""
        for index, kept in reversed(list(enumerate(self._kept))):
            if fits(size, kept.size):
                # Removed before its use is asked: else another thread could write it in between, and two leases at once could
                # undo each other's signal.
                with contextlib.suppress(ValueError):  # another thread has it
                    self._kept.remove(kept)
                    if kept.is_unused():
                        return kept
                    self._kept.insert(index, kept)
        return None


class KeptMemory:
    """Memory to be written more than once, and the map by which it is written. A child releases both at a fork.

    Receivers get what :meth:`reader` opens. While there is such a descriptor, or a map of it, anywhere, :meth:`is_unused` is
    false.
    """

    def __init__(self, size: int) -> None:
        """Make memory for messages of about ``size``. Nothing is in it yet, so that little is lost if something is missing.

        :raises OSError: the system has none to give, or cannot watch its use.
        """
        made = new_memory()
        size += size // 32  # the next message may be longer
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._fills = 0
        os.ftruncate(made.fd, self.size)
        # The system counts the open files for writing, but not the one that has made it.
        self.descriptor = _opened_again(made, os.O_RDWR)
        made.close()
        if not self.is_unused():
            raise OSError(errno.EINVAL, "the system has no leases")
        with fork_lock():  # a child has the map only if it has the hook
            self._map = map_for_writing(self.descriptor.fd, self.size)
            trap_points.reach("mapping kept memory")
            on_fork(self, KeptMemory.close)

    def reader(self) -> OwnedDescriptor:
        """Return a descriptor that can only be read.

        :raises OSError: no descriptor is left.
        """
        return _opened_again(self.descriptor, os.O_RDONLY)

    def is_unused(self) -> bool:
        """Return True if this memory is not open or mapped in any process, except through this object.

        Just then the system gives a lease for writing, which is given back at once; an open that would have to wait for that
        makes the system send a signal, one that is ignored where no handler is set.
        """
        try:
            # In one step, as far as an interrupt can see: under a lease that is not given back, no open() would return. (Where
            # it is seen, as audit hooks may run, the next call here gives it back.)
            deque(map(fcntl.fcntl, repeat(self.descriptor.fd), _LEASE, _LEASED), maxlen=0)
        except OSError:
            return False
        return True

    def fill(self, parts: Sequence[Any]) -> None:
        """Write the parts of a message, one behind the other. From the first fill on, only maps that are there can write.

        The first fill allocates all of the memory, so that no later write can fail for want of it.

        :raises OSError: in the first fill only: the system has no memory for it, or cannot seal it.
        """
        self._fills += 1
        if self._fills == 1:
            written = fill(self.descriptor.fd, parts)
            if written < self.size:
                os.posix_fallocate(self.descriptor.fd, written, self.size - written)
            seal(self.descriptor.fd, SEAL_FUTURE_WRITE)
            return
        if self._fills == 2:
            for start in range(0, self.size, _SLICE):
                enter_pages(self._map, start, min(_SLICE, self.size - start))
        position = 0
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _SLICE):
                piece = view[start : start + _SLICE]
                self._map[position : position + len(piece)] = piece
                position += len(piece)

    def close(self) -> None:
        with fork_lock():  # so that a child has a copy only while this knows of it
            trap_points.reach("unmapping kept memory")
            self._map.close()
            self.descriptor.close()

    def __del__(self) -> None:
        if hasattr(self, "_map") and fork_lock is not None:  # else the interpreter has cleared this module
            self.close()


def _opened_again(descriptor: OwnedDescriptor, how: int) -> OwnedDescriptor:
    """Return a descriptor with an open file of its own.

    :raises OSError: the system has no path to it, or no descriptor is left.
    """
    with fork_lock():
        return OwnedDescriptor(os.open(f"/proc/self/fd/{descriptor.fd}", how | os.O_NONBLOCK))


def _too_much(sizes: Sequence[int]) -> bool:
    return len(sizes) > _MOST or (len(sizes) > 2 and sum(sizes) > MOST_KEPT)
