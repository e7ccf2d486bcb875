"""What the broker knows of the others: processes, their sessions, what they publish through and what they subscribe to.

These are the shell around the outbox and the splitter: state and descriptors, and the system calls on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import termios
from array import array
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mpbroadcast.broker.liveness import PeerProcess
from mpbroadcast.broker.outbox import Outbox
from mpbroadcast.wire.frames import Batch, Opening, Splitter

if TYPE_CHECKING:
    from mpbroadcast.broker.clients import Client

__all__ = ["LONGEST_RETRY", "PIPE_SIZE", "SHORTEST_RETRY", "Peer", "Publisher", "Session", "Subscription", "new_pipe", "unread"]

PIPE_SIZE: Final = 1 << 18  # bytes, when the system gives so much
SHORTEST_RETRY: Final = 0.003  # seconds, for a full backlog that no event tells of; it doubles while nothing is read
LONGEST_RETRY: Final = 0.1
_READ: Final = 1 << 18
_PAGE: Final = os.sysconf("SC_PAGESIZE")


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


def unread(fd: int) -> int:
    """Bytes in a pipe, asked at either end."""
    count = array("i", (0,))
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


class Peer:
    """A process, and all that goes with it when it dies."""

    def __init__(self, process: PeerProcess) -> None:
        self.process = process
        self.clients: set[Client] = set()
        self.subscriptions: set[Subscription] = set()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def unused(self) -> bool:
        return not self.clients and not self.subscriptions


class Session:
    """A link of a process: what belongs to it ends when its lifeline does."""

    def __init__(self, number: int, peer: Peer) -> None:
        self.number = number
        self.peer = peer
        self.publishers: set[Publisher] = set()
        self.subscriptions: set[Subscription] = set()
        self.forgotten: deque[int] = deque(maxlen=64)  # cookies of subscribers that were interrupted


class Publisher:
    """The read end of a publisher's pipe.

    ``parked`` is what was read and has not been routed, in order, and between it what is to be called when all before it
    has been. While something stays there, because a subscription that would get it is full, nothing more is read.
    """

    def __init__(self, number: int, session: Session, fd: int) -> None:
        self.number = number
        self.session = session
        self.pid = session.peer.pid
        self.fd = fd
        self.parked: deque[Batch | Opening | Callable[[], None]] = deque()
        self.blocked: Subscription | None = None  # the full one that it waits for
        self.blocked_since = 0.0  # when something of it went on last
        self.warned = False
        self.last_in: dict[Subscription, int] = {}  # how many had come to each backlog with the last of its messages
        # Subscriptions that begin behind something that is still to be routed; with topics, what they had before that.
        self.not_yet: list[tuple[Subscription, tuple[str, ...]]] = []
        self._splitter = Splitter()
        self.position = 0  # bytes read so far
        self._barriers: deque[tuple[int, Callable[[], None]]] = deque()

    def read(self, limit: int = _READ) -> bytes:
        """What is there, but not past the next position that somebody waits for; empty when all writers are gone.

        :raises BlockingIOError: nothing is there.
        """
        if self._barriers:
            limit = min(limit, self._barriers[0][0] - self.position)
        return os.read(self.fd, limit)

    def take(self, chunk: bytes) -> None:
        """Park what was read.

        :raises FrameError: it is no such stream.
        """
        self.position += len(chunk)
        self.parked.extend(self._splitter.split(chunk))
        while self._barriers and self._barriers[0][0] <= self.position:
            self.parked.append(self._barriers.popleft()[1])

    def close(self) -> None:
        """Nothing more will be read."""
        self._splitter = Splitter()
        self.parked.extend(callback for _, callback in self._barriers)
        self._barriers.clear()

    def end_of_written(self) -> int:
        """The position behind all that has been written until now."""
        return self.position + (unread(self.fd) if self.fd >= 0 else 0)

    @property
    def all_routed(self) -> bool:
        """Whether nothing that it has written until now is still to be routed."""
        return not self.parked and self.end_of_written() == self.position

    def after_written(self, callback: Callable[[], None]) -> None:
        """Call back when all that it has written until now has been routed; at once, if it has."""
        end = self.end_of_written()
        if end > self.position:
            self._barriers.append((end, callback))
        elif self.parked:
            self.parked.append(callback)
        else:
            callback()

    @property
    def held(self) -> int:
        """Bytes of it in the broker's memory that are in no backlog."""
        return self._splitter.held + sum(len(batch.frames) for batch in self.parked if isinstance(batch, Batch))


class Subscription:
    """The write end of a channel's pipe, and the backlog before it."""

    def __init__(self, number: int, session: Session, outbox: Outbox) -> None:
        self.number = number
        self.session = session  # of the subscriber; of the opener once it is open
        self.outbox = outbox
        self.cookie = 0  # by which its subscriber can name it before it knows its number
        self.said_topics: tuple[str, ...] = ()  # when it was unsubscribed
        self.live = True
        self.not_waited_for = False  # when its pipe is full, it goes
        self.fd = -1
        self.opened = False
        self.opening: Client | None = None
        self.token = 0  # of the opening that was begun last
        self.armed = False  # whether the loop waits until the pipe takes more
        self.retrying = False
        self.retry = SHORTEST_RETRY  # seconds until the next
        self.one_page = False  # its pipe has room for more only once all has been read
        self.waiters: deque[Publisher] = deque()
        self.blocked_at = 0  # what it held when the last of them began to wait

    @property
    def pid(self) -> int:
        return self.session.peer.pid

    def make_pipe(self) -> int:
        """Its pipe: the descriptor for its reader.

        :raises OSError: no descriptor is left.
        """
        # An eighth of the capacity, so that a small one is not all in the pipe, where no event tells of a part being read.
        # A state goes into an empty pipe only: of one page, it says that it has room when it is empty.
        size = min(PIPE_SIZE, max(_PAGE, 1 << max(0, (self.outbox.capacity // 8).bit_length() - 1)))
        read, self.fd = new_pipe(_PAGE if self.outbox.policy == "latest" else size)
        self.outbox.pipe_size = fcntl.fcntl(read, fcntl.F_GETPIPE_SZ) if hasattr(fcntl, "F_GETPIPE_SZ") else _PAGE
        self.one_page = hasattr(fcntl, "F_GETPIPE_SZ") and self.outbox.pipe_size <= _PAGE
        return read

    def refresh(self) -> None:
        """Take into account what its reader has read."""
        if self.opened:
            self.outbox.pipe = unread(self.fd)

    def write(self) -> bool:
        """Move from the backlog into the pipe; whether the pipe is full and there is more.

        :raises OSError: its reader is gone.
        """
        outbox = self.outbox
        while not outbox.empty:
            if outbox.drops:
                outbox.pipe = unread(self.fd)
                if outbox.must_wait:
                    return True
            data = outbox.to_write()
            try:
                size = os.write(self.fd, data)
            except BlockingIOError:
                return True
            outbox.wrote(size)
            if size < len(data):
                return True
        return False
