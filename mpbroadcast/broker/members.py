"""What the broker knows of the others: processes, their sessions, what they publish through and what they subscribe to.

These are the shell around the outbox and the splitter: state and descriptors, and the system calls on them.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import logging
import os
import socket
import termios
from array import array
from collections import deque
from typing import TYPE_CHECKING, Final

from mpbroadcast.broker.liveness import PeerProcess
from mpbroadcast.broker.outbox import Outbox
from mpbroadcast.broker.rings import Unread
from mpbroadcast.broker.shared import Ring
from mpbroadcast.wire.descriptors import DescriptorSocket
from mpbroadcast.wire.frames import Parcel
from mpbroadcast.wire.packets import MEMORY, RING, pack
from mpbroadcast.wire.ring import CHUNK
from mpbroadcast.wire.runs import GONE, OFFER, RESTARTED, note, references_run

if TYPE_CHECKING:
    from mpbroadcast.broker.clients import Client
    from mpbroadcast.broker.publisher import Held, Publisher

log = logging.getLogger("mpbroadcast.broker")

PIPE_SIZE: Final = 1 << 18  # bytes, when the system gives so much
SHORTEST_RETRY: Final = 0.003  # seconds, for a full backlog that no event tells of; it doubles while nothing is read
LONGEST_RETRY: Final = 0.1
LONGEST_PATIENCE: Final = 0.02  # seconds
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_MOST_UNREAD: Final = 64  # references to messages in memory of their own, each with a descriptor on its way
_MOST_OFFERS: Final = 4  # rings that it was sent and has not mapped: what is on its way nobody counts
_QUICK: Final = 3e8  # bytes a second: who reads as many is worth being waited for, as copying is slower
_QUICK_SPAN: Final = 2  # the part of a ring, 1/2, in which the references lie that a quick reader has not read yet
_SLOW_SPAN: Final = 8  # and one that is not waited for: 1/8, as all of the others must do with the rest


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
    return DescriptorSocket([own.detach()]), other.detach()


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


class State(enum.Enum):
    """Whether a subscription can have references."""

    READY = enum.auto()
    LATER = enum.auto()
    NEVER = enum.auto()


class Subscription:
    """The write end of a channel's pipe, and the backlog before it."""

    def __init__(self, number: int, session: Session, outbox: Outbox) -> None:
        self.number = number
        self.session = session  # of the subscriber; of the opener once it is open
        self.outbox = outbox
        self.cookie = 0  # by which its subscriber can name it before it knows its number
        self.said_topics: tuple[str, ...] = ()  # when it was unsubscribed
        self.live = True
        self.restored = False  # from the broker before this one, and not open since
        self.reserved = 0  # for the process that had it open there
        self.policy = outbox.policy  # as it was subscribed; while it is reserved, nobody waits for it
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
        self.blocked_at = 0  # what it held when the first of them began to wait
        self.beside: DescriptorSocket | None = None
        self.rings: dict[Ring, bool | None] = {}  # whether it has mapped each; None: it will not
        self._unanswered = 0  # those that it was sent and has said nothing about
        self.unread: Unread[Ring | None] = Unread()
        self.patience = LONGEST_PATIENCE  # seconds that publishers may still wait for it to take references
        self.paused_at = 0.0  # since when one does
        self.behind = False  # whether they wait for its backlog
        self.slow_for: list[Publisher] = []  # those that do
        self.notes: list[tuple[int, Ring]] = []  # to be written when nothing waits
        self._sent = 0  # the last message whose memory was

    @property
    def pid(self) -> int:
        return self.session.peer.pid

    @property
    def owner(self) -> int:
        """The process that has it open, or is the only one that may; 0 while any may."""
        return self.pid if self.opened else self.reserved

    def say_restarted(self) -> None:
        """Tell its reader, in its new pipe, that something may be missing in this place."""
        data = note(RESTARTED, 0)
        os.write(self.fd, data)
        self.outbox.pipe += len(data)
        self.outbox.take_over(self.policy)
        self.restored, self.reserved = False, 0

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
        if self.opened and self.fd >= 0:
            self.outbox.pipe = unread(self.fd)
            if not self.outbox.pipe and self.unread:  # not even a tail byte is left, so all has been decoded
                self.has_read(self.unread.count)

    def has_read(self, count: int) -> None:
        """So many references, of all that were ever written."""
        before = self.unread.bytes
        for ring, chunks in self.unread.read(count):
            if ring is not None:
                ring.release(chunks)
        self.outbox.referred = self.unread.bytes
        self.patience = min(LONGEST_PATIENCE, self.patience + (before - self.unread.bytes) / _QUICK)

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
            parcel = outbox.parcel
            if parcel is not None and not self._send_memory(parcel):
                if self.unread.memories >= _MOST_UNREAD:
                    return False  # until it has read one
                outbox.put_in_its_place(parcel.memory.run(parcel))
                continue
            try:
                size = os.write(self.fd, data)
            except BlockingIOError:
                return True
            outbox.wrote(size)
            self.patience = min(LONGEST_PATIENCE, self.patience + size / _QUICK)
            if size < len(data):
                return True
            if parcel is not None:
                self.unread.wrote(1, parcel.length, None)
                outbox.referred = self.unread.bytes
        return not self._write_notes()

    def _send_memory(self, parcel: Parcel) -> bool:
        """Send what must be there when the pipe has the run that it belongs to."""
        memory = parcel.memory
        if self._sent == memory.number:
            return True
        if self.unread.memories >= _MOST_UNREAD:
            self.refresh()
        if self.beside is None or memory.descriptor is None or self.unread.memories >= _MOST_UNREAD:
            return False
        with contextlib.suppress(OSError):  # it is gone, or too many are on their way already
            if self.beside.tell(pack(MEMORY, 0, memory.number), memory.descriptor.fd):
                self._sent = memory.number
                return True
        return False

    def refer(self, held: Held, charge: int) -> bool:
        """Write references into the pipe, past the backlog, which is empty; whether that was possible.

        :raises OSError: its reader is gone.
        """
        ring, references, outbox = held.ring, held.references, self.outbox
        data = references_run(references, ring.number)
        try:
            os.write(self.fd, data)
        except BlockingIOError:
            return False
        count = len(references.sizes)
        ring.hold(held.chunks)
        self.unread.wrote(count, charge, ring, held.chunks, held.place)
        outbox.passed(count, len(data))
        outbox.referred = self.unread.bytes
        return True

    def state_for(self, held: Held) -> State:
        """Whether references can be written now, if the pipe has room, past a backlog that is empty."""
        if held.ring not in self.rings:
            self._offer(held.ring)
        mapped = self.rings[held.ring]
        if mapped is None:
            return State.NEVER
        if not mapped:
            return State.LATER
        if self._lags(held):
            self.refresh()
            if self._lags(held):
                return State.LATER
        return State.READY

    def _lags(self, held: Held) -> bool:
        """Whether too much is between these and what it has not read, so that it would keep too much of a ring from being used
        again."""
        first = self.unread.first
        if first is not None and first.retired:  # its publisher needs another ring already
            return True
        oldest = self.unread.oldest(held.ring)
        part = _QUICK_SPAN if self.patience > 0 else _SLOW_SPAN
        return oldest is not None and held.place - oldest > held.ring.size // part

    @property
    def tells(self) -> bool:
        """Whether it has so much to read that it will tell of it."""
        return self.unread.bytes > 2 * CHUNK or not self.outbox.empty or False in self.rings.values()

    @property
    def must_be_read(self) -> bool:
        """Whether it has references into memory that would be written again if it were forgotten."""
        return any(ring is not None and not ring.retired for ring in self.unread.rings())

    def _offer(self, ring: Ring) -> None:
        """Send it a ring: references follow when it has mapped that."""
        self.rings[ring] = None
        if self.beside is not None and self._unanswered < _MOST_OFFERS:
            with contextlib.suppress(OSError):
                if self.beside.tell(pack(RING, ring.number), ring.descriptor.fd):
                    self.rings[ring] = False
                    self._unanswered += 1
                    self.notes.append((OFFER, ring))

    def retire(self, ring: Ring) -> None:
        """Nothing more will refer to it."""
        if self.rings.pop(ring, None) is not None:
            self.notes.append((GONE, ring))  # if it has not answered yet, it still has a descriptor more

    def _write_notes(self) -> bool:
        while self.notes:
            kind, ring = self.notes[0]
            data = note(kind, ring.number)
            try:
                os.write(self.fd, data)
            except BlockingIOError:
                return False
            self.outbox.pipe += len(data)
            del self.notes[0]
        return True

    def let_go(self) -> None:
        """Nobody will read any more."""
        self.has_read(self.unread.count)
        self.rings.clear()
        self.notes.clear()

    def answered(self, number: int, *, mapped: bool) -> None:
        """It has mapped the ring of this number, or cannot."""
        for ring, state in self.rings.items():
            if ring.number == number and state is False:
                self.rings[ring] = True if mapped else None
                self._unanswered -= 1
