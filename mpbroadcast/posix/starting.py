"""Processes that ``multiprocessing`` starts by ``spawn`` or ``forkserver``: how their parent sees whether they may still live.

While a thread pickles the arguments of a process that it starts, :func:`current` returns this start. The child gets the write
end of a pipe with its arguments, as ``multiprocessing`` passes connections: before the child has imported anything, it holds
that end. The parent closes its own copy once the child has one. It looks for that when it looks for the child's end, or starts
another process; a start that failed is known by its ``Popen``, which nothing refers to any more.
"""

from __future__ import annotations

import contextlib
import os
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any, Final
from weakref import WeakKeyDictionary

from mpbroadcast.posix.descriptors import OwnedDescriptor, ReadEnd, WriteEnd, fork_lock


class _StartedReadEnd(ReadEnd):
    __slots__ = ()

    def has_ended(self) -> bool:
        release_started()
        return super().has_ended()


class Start:
    """A process that is being started."""

    def __init__(self) -> None:
        self._ends: tuple[ReadEnd, OwnedDescriptor] | None = None
        self._passed: dict[int, Any] = {}  # by descriptor: a number may be passed once only

    def new_child(self) -> tuple[ReadEnd, Any] | None:
        """Return the parent's end of the child's pipe, and what is to be pickled for the child; None: no descriptor is left.

        A start has one pipe, whatever the number of channels.
        """
        if self._ends is None:
            with contextlib.suppress(OSError), fork_lock():
                reader, writer = os.pipe()
                self._ends = _StartedReadEnd(reader), OwnedDescriptor(writer)
        if self._ends is None:
            return None
        reader_end, writer_end = self._ends
        return reader_end, self._pass(writer_end.fd)

    def pass_on(self, end: WriteEnd) -> Any:
        """Return what is to be pickled for the child, so that it holds this write end, too; None if that is closed."""
        return self._pass(end.fd) if end.is_open else None

    def _pass(self, fd: int) -> Any:
        if fd not in self._passed:
            self._passed[fd] = DupFd(fd)
        return self._passed[fd]

    def release(self) -> None:
        """Close this process's write end: the child holds its own."""
        ends, self._ends = self._ends, None
        if ends is not None:
            ends[1].close()


_starts: Final[WeakKeyDictionary[Any, Start]] = WeakKeyDictionary()  # by multiprocessing's Popen object


def current() -> Start | None:
    """Return the process for which this thread is pickling arguments; None if it is not starting one."""
    popen: Any = get_spawning_popen()
    if popen is None or not hasattr(popen, "duplicate_for_child"):  # else it cannot pass a descriptor
        return None
    start = _starts.get(popen)
    if start is None:
        release_started()
        start = _starts[popen] = Start()
    return start


def release_started() -> None:
    """Close the write ends that the children hold by now."""
    for popen, start in list(_starts.items()):
        if hasattr(popen, "sentinel"):  # it is set once the child has got its descriptors
            start.release()
            _starts.pop(popen, None)


def inherit(passed: Any) -> WriteEnd:
    """Return the write end that this process was started with. It stays open for as long as this process lives."""
    fd: int = passed.detach()
    os.set_inheritable(fd, False)
    return WriteEnd.of(fd)
