"""What the broker knows of the others: processes, their sessions, what they publish through and what they subscribe to.

These are the shell around the outbox and the splitter: state and descriptors, and the system calls on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import termios
from array import array
from collections import deque
from typing import TYPE_CHECKING, Final

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.limits import SESSION, Budget, Cost
from mpbroadcast.broker.reference_window import ReferenceWindow
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.processes import PeerProcess
from mpbroadcast.protocol.runs import RESTARTED, SharedRun, note

if TYPE_CHECKING:
    from mpbroadcast.broker.control_clients import ControlConnection
    from mpbroadcast.broker.publisher import Publisher

log = logging.getLogger("mpbroadcast.broker")

PIPE_SIZE: Final = 1 << 18  # bytes, when the system gives so much
_MOST_AT_ONCE: Final = 16 * PIPE_SIZE  # bytes, into a pipe whose reader is as quick as the broker
SHORTEST_RETRY: Final = 0.003  # seconds, for a full backlog that no event tells of; it doubles while nothing is read
LONGEST_RETRY: Final = 0.1
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_SMALLEST: Final = 4 << 20  # capacity: of less, what was read and not acknowledged yet would be too large a part


def new_pipe(size: int) -> tuple[int, int]:
    """A pipe, not blocking and not inherited at either end, of that size as far as the system allows."""
    if hasattr(os, "pipe2"):
        ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    else:
        ends = os.pipe()
        for end in ends:
            os.set_blocking(end, False)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        # Best effort: all pipes of a user share a limit.
        with contextlib.suppress(OSError):
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, size)
    return ends


def new_socket() -> tuple[DescriptorSocket, int]:
    """A socket for descriptors, and the descriptor of its other end."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return DescriptorSocket(own.detach()), other.detach()


def unread(fd: int) -> int:
    """Bytes in a pipe, asked at either end."""
    count = array("i", (0,))
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


class Peer:
    """A process, and all that goes with it when it dies."""

    def __init__(self, process: PeerProcess) -> None:
        self.process = process
        self.is_starter = False  # of the broker, which ends with it
        self.clients: set[ControlConnection] = set()
        self.asked = 0  # bytes of their requests that are not whole
        self.subscriptions: set[Subscription] = set()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def unused(self) -> bool:
        return not (self.is_starter or self.clients or self.subscriptions)


class Session:
    """A link of a process: what belongs to it ends when its lifeline does."""

    def __init__(self, number: int, peer: Peer, whole: Budget) -> None:
        self.number = number
        self.peer = peer
        self.budget = Budget(SESSION, whole)
        self.publishers: set[Publisher] = set()
        self.subscriptions: set[Subscription] = set()


class Subscription:
    """The write end of a channel's pipe, and the backlog before it."""

    def __init__(self, number: int, session: Session, backlog: Backlog) -> None:
        self.number = number
        self.session = session  # of the subscriber; of the opener once it is open
        self.backlog = backlog
        self.cost = Cost()  # of its session's budget
        self.said_topics: tuple[str, ...] = ()  # when it was unsubscribed
        self.live = True
        self.restored = False  # from the broker before this one, and not open since
        self.reserved = False  # for the process that had it open there
        self.policy = backlog.policy  # as it was subscribed; while it is reserved, nobody waits for it
        self.not_waited_for = False  # when its pipe is full, it goes
        self.fd = -1
        self.opened = False
        self.opening: ControlConnection | None = None
        self.token = 0  # of the opening that was begun last
        self.write_interest = False  # whether the loop waits until the pipe takes more
        self.retrying = False
        self.retry = SHORTEST_RETRY  # seconds until the next
        self.one_page = False  # its pipe has room for more only once all has been read
        self.waiters: deque[Publisher] = deque()
        self.blocked_at = 0  # what it held when the first of them began to wait
        self.window: ReferenceWindow | None = None  # on shared memory; None: all goes through the pipe

    @property
    def pid(self) -> int:
        return self.session.peer.pid

    @property
    def owner(self) -> int | None:
        """The process that has it open, or is the only one that may; ``None`` while any may."""
        return self.pid if self.opened or self.reserved else None

    def say_restarted(self) -> None:
        """Tell its reader, in its new pipe, that something may be missing in this place."""
        data = note(RESTARTED, 0)
        os.write(self.fd, data)
        self.backlog.pipe += len(data)
        self.backlog.take_over(self.policy)
        self.restored = self.reserved = False

    @property
    def nothing_to_open_for(self) -> bool:
        """Whether nobody has opened it, and there is no message for the process that would."""
        return not (self.opened or self.opening or self.reserved or self.backlog.waiting)

    @property
    def progress(self) -> tuple[int, ...]:
        """Numbers that change when its reader opens it or reads."""
        there = unread(self.fd) if self.fd >= 0 else 0
        return self.opened, self.backlog.left, there, self.window.heard if self.window is not None else 0

    def make_pipe(self) -> int:
        """Its pipe: the descriptor for its reader.

        :raises OSError: no descriptor is left.
        """
        # An eighth of the capacity, so that a small one is not all in the pipe, where no event tells of a part being read.
        # A state goes into an empty pipe only: of one page, it says that it has room when it is empty.
        size = min(PIPE_SIZE, max(_PAGE, 1 << max(0, (self.backlog.capacity // 8).bit_length() - 1)))
        read, self.fd = new_pipe(_PAGE if self.backlog.policy == "latest" else size)
        self.backlog.pipe_size = fcntl.fcntl(read, fcntl.F_GETPIPE_SZ) if hasattr(fcntl, "F_GETPIPE_SZ") else _PAGE
        self.one_page = hasattr(fcntl, "F_GETPIPE_SZ") and self.backlog.pipe_size <= _PAGE
        return read

    def refresh(self) -> None:
        """Take into account what its reader has read."""
        if self.opened and self.fd >= 0:
            self.backlog.pipe = unread(self.fd)
            if not self.backlog.pipe and self.window is not None:  # not even a tail byte is left, so all has been decoded
                self.has_read(self.window.unread.count)

    def has_read(self, count: int) -> None:
        """Its reader has read so many references, of all that were ever written."""
        if self.window is not None:
            self.window.has_read(count)
            self.backlog.referred = self.window.unread.bytes

    @property
    def shares(self) -> bool:
        """Whether references may wait in its backlog; else it gets the messages themselves."""
        there = self.window is not None and self.opened
        return there and self.backlog.policy != "latest" and self.backlog.capacity >= _SMALLEST

    def write(self) -> bool:
        """Move from the backlog into the pipe; whether the pipe is full, or has had much in this round, and there is more.

        :raises OSError: its reader is gone.
        """
        backlog, window = self.backlog, self.window
        room = _MOST_AT_ONCE
        while not backlog.empty:
            if backlog.drops:
                backlog.pipe = unread(self.fd)
                if backlog.must_wait:
                    return True
            if window is not None and window.notes and backlog.between and not self._write_notes(window):
                return True
            data = backlog.to_write()
            run = backlog.shared
            if run is not None:
                ready = self._prepare(run)
                if ready is None:
                    return False
                if not ready:
                    backlog.copy_first()
                    continue
            try:
                size = os.write(self.fd, data)
            except BlockingIOError:
                return True
            backlog.wrote(size)
            if window is not None:
                window.moved += size
                if run is not None:
                    window.wrote(run)
                    backlog.referred = window.unread.bytes
            room -= size
            if size < len(data) or (room < 0 and not backlog.empty):
                return True
        return window is not None and bool(window.notes) and not self._write_notes(window)

    def _write_notes(self, window: ReferenceWindow) -> bool:
        """Write the notes of its window, between two runs; whether the pipe had room for all of them."""
        while window.notes:
            data = note(*window.notes[0])
            try:
                os.write(self.fd, data)
            except BlockingIOError:
                return False
            self.backlog.pipe += len(data)
            del window.notes[0]
        return True

    def _prepare(self, run: SharedRun) -> bool | None:
        """Whether the pipe can have this run now; ``None`` when a packet from its reader comes before that."""
        if self.window is None:
            return False
        ready = self.window.prepare(run)
        if ready is None:
            self.refresh()
            ready = self.window.prepare(run)
        return False if ready is None and not self.window.expects else ready

    @property
    def must_be_read(self) -> bool:
        """Whether its pipe refers to memory that would be written again if it were forgotten."""
        return self.window is not None and self.window.must_be_read
