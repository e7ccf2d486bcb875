"""Memory that messages of one publisher had, to be written again.

New memory is dear: the system finds each of its pages, and takes it back when the last reader is gone. A stream of messages of
about one size needs less: each is written into memory that one before it had, once nobody has that any more. That is for the
system to say, who knows of every descriptor and every map, of whatever process; and so nothing is held up or lost by one that
was killed, and a message is its reader's own for as long as the reader likes.

A publisher that sends such messages only now and then keeps nothing. What a stream has left is let go of at the next occasion,
as there is no thread here that could do it by itself.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from mpbroadcast.wire.descriptors import OwnedDescriptor, on_fork
from mpbroadcast.wire.memory import fits, kept_memory, message_memory, nobody_has, populate, reader_of

__all__ = ["MemoryPool"]

_MOST: Final = 4  # memories: one that is read, one that waits, one on its way to them, and one to be written
_MOST_BYTES: Final = 1 << 26  # in them, but two there may be at any rate
_LARGEST: Final = 9 << 25  # bytes of a message that is kept: beyond that, it is much to have for the next one
_STREAM: Final = 1.0  # seconds between two messages that belong to one
_PATIENCE: Final = 1e-10  # seconds for each byte: a part of what new memory takes
_PAUSE: Final = 5e-5  # seconds
_SLICE: Final = 1 << 22  # bytes to copy at once: other threads, and signals, have their turn in between


class MemoryPool:
    """The memory for messages: new or not, as it comes. Several threads may ask at once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # held for moments only; a signal handler may come in while its own thread has it
        self._kept: list[_Kept] = []  # that no thread is about to write; what was used last is last
        self._possible = True
        self._patient = True  # to wait for memory helped, the last time
        self._size = 0  # of the last message
        self._when = 0.0  # that it came

    def memory(self, parts: Sequence[Any], size: int) -> OwnedDescriptor:
        """A descriptor to send, of memory with these bytes, ``size`` in all, which nobody can change who gets it.

        :raises OSError: the system has none to give.
        """
        now = time.monotonic()
        follows = self._possible and (fits(size, self._size) or fits(self._size, size)) and now < self._when + _STREAM
        self._size, self._when = size, now
        if not follows:
            self._keep(None)
        elif size <= _LARGEST:
            kept = self._wait(size, now)
            if kept is not None:
                kept.fill(parts)
            else:
                kept = self._make(parts)
            reader = reader_of(kept.descriptor) if kept is not None else None
            if kept is not None and reader is not None:
                self._keep(kept)
                return reader
        return message_memory(parts)

    def rest(self) -> None:
        """Let go of all, if nothing has come for a while."""
        if self._kept and time.monotonic() >= self._when + _STREAM:
            self._keep(None)

    def _wait(self, size: int, now: float) -> _Kept | None:
        """Memory that was kept and that nobody has: who reads quickly is waited for, if there is enough for a stream."""
        while True:
            found = self._find(size)
            if found is not None or not (self._patient and self._full(size)):
                self._patient = self._patient or found is not None
                return found
            if time.monotonic() > now + size * _PATIENCE:
                self._patient = False
                return None
            time.sleep(_PAUSE)

    def _find(self, size: int) -> _Kept | None:
        """Memory of about that size that nobody has, taken out of the pool."""
        with self._lock:
            there = self._kept
            for kept in reversed(there):
                if fits(size, kept.size) and nobody_has(kept.descriptor):
                    there.remove(kept)
                    return kept
        return None

    def _full(self, size: int) -> bool:
        return _too_much([*(kept.size for kept in self._kept), size])

    def _make(self, parts: Sequence[Any]) -> _Kept | None:
        with contextlib.suppress(OSError):  # a message that is not to be kept may need less
            made = kept_memory(parts)
            self._possible = made is not None
            return _Kept(*made) if made is not None else None
        return None

    def _keep(self, kept: _Kept | None) -> None:
        """Put this back, and let go of what is too much; ``None``: of all."""
        with self._lock:
            there = [*self._kept, kept] if kept is not None else []
            while _too_much([one.size for one in there]):
                del there[0]
            let_go, self._kept = self._kept, there
        del let_go  # not under the lock: it takes its time


class _Kept:
    """Memory and the map by which it is written. A child lets go of both at a fork."""

    def __init__(self, descriptor: OwnedDescriptor, mapped: mmap.mmap) -> None:
        self.descriptor = descriptor
        self.size = len(mapped)  # all of it is there already, so that no write can fail for want of memory
        self._map = mapped
        self._touched = False
        on_fork(self, _Kept.close)

    def fill(self, parts: Sequence[Any]) -> None:
        """Write the parts of a message, one behind the other."""
        if not self._touched:
            populate(self._map, 0, self.size)
            self._touched = True
        place = 0
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _SLICE):
                piece = view[start : start + _SLICE]
                self._map[place : place + len(piece)] = piece
                place += len(piece)

    def close(self) -> None:
        """Unmap and close it."""
        self._map.close()
        self.descriptor.close()


def _too_much(sizes: Sequence[int]) -> bool:
    return len(sizes) > _MOST or (len(sizes) > 2 and sum(sizes) > _MOST_BYTES)
