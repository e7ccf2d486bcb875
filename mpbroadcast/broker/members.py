"""The broker's records of its peers: processes, their sessions, their publishers and their subscriptions.

Each record has the descriptors that belong to it. The code that acts on them is in ``intake.py`` (publishers' pipes are
read), ``routing.py`` (what was read goes into backlogs), ``delivery.py`` (backlogs go into channels' pipes) and ``server.py``.
The records refer to each other, so they stand in one module.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import ClassVar, Protocol

from mpbroadcast.broker.channel_pipe import ChannelPipe
from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.groups import Shares
from mpbroadcast.broker.core.limits import SESSION, Budget, Cost
from mpbroadcast.broker.core.pace import Pace
from mpbroadcast.broker.core.patterns import Matcher
from mpbroadcast.broker.core.policies import with_policy
from mpbroadcast.broker.core.states import PipeState, PublisherState, SubscriptionState
from mpbroadcast.broker.memory import Lender
from mpbroadcast.broker.reference_window import ReferenceWindow
from mpbroadcast.posix.pipes import readv, unread
from mpbroadcast.posix.processes import PeerProcess
from mpbroadcast.protocol.frames import BridgeFrame, FrameError, Item, MemfdMessage, References, Singles
from mpbroadcast.protocol.reports import last_report
from mpbroadcast.protocol.splitter import Splitter

log = logging.getLogger("mpbroadcast.broker")

Parked = Item | Singles | Callable[[], None]


class Inlet(Protocol):
    """Decides which messages of a bridge's session are routed. (Its class is in ``bridges.py``, above the routing.)"""

    def begin(self, frame: BridgeFrame) -> None:
        """Act on a frame, when all before it in the pipe is routed."""

    def admit(self, item: Item) -> Item | None:
        """Return what is to be routed of an item.

        :raises Misannounced: it has no position.
        """

    def routed(self, count: int) -> None:
        """Note that so many of the messages admitted last are routed."""

    def refuse(self) -> None:
        """End the session, which has written what cannot be routed."""

    def fence(self) -> None:
        """Admit nothing from now on."""


class Peer(PeerProcess):
    """A process, and all that is removed when it dies."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.is_starter = False  # of the broker, which ends with it
        self.is_awaited = False  # it had a session with the broker before this one, and has none yet
        self.connections = 0  # control connections that it has
        self.sessions = 0
        self.asked = 0  # bytes of their requests that are not whole
        self.subscriptions: set[Subscription] = set()

    @property
    def is_unused(self) -> bool:
        """True if nothing belongs to it, so that its death means nothing."""
        return not (self.is_starter or self.is_awaited or self.connections or self.subscriptions)


class Session:
    """A process's attachment to the broker: what belongs to it ends with its lifeline. All handles of a process share one."""

    def __init__(self, id: int, peer: Peer, whole: Budget) -> None:
        self.id = id
        self.peer = peer
        self.budget = Budget(SESSION, whole)
        self.publishers: set[Publisher] = set()
        self.subscriptions: set[Subscription] = set()


class PublisherPipe:
    """A pipe that is read into ``buffer``, which all publishers use in turn. Bytes that are not split yet count as not read.

    ``barriers`` are positions that no read goes beyond, each with what is to be called when all before it is routed.
    """

    def __init__(self, fd: int, buffer: memoryview) -> None:
        self.fd = fd  # -1 once it is closed
        self.position = 0  # bytes read so far
        self.barriers: deque[tuple[int, Callable[[], None]]] = deque()
        self.splitter = Splitter()
        self.ahead = b""  # taken out of it, and still to be read
        self._buffer = buffer

    def read(self, limit: int | None = None) -> bytes:
        """Return what is there, but nothing behind the next barrier; nothing when all writers are gone.

        :raises BlockingIOError: nothing is there.
        """
        if self.barriers:
            end = self.barriers[0][0] - self.position
            limit = end if limit is None else min(limit, end)
        if self.ahead:
            chunk, self.ahead = self.ahead[:limit], b"" if limit is None else self.ahead[limit:]
            return chunk
        buffer = self._buffer
        # Not os.read: memory for the most that may come would be mapped and unmapped each time.
        return bytes(buffer[: readv(self.fd, (buffer if limit is None else buffer[:limit],))])

    def end_of_written(self) -> int:
        """Return the position behind all that has been written until now."""
        return self.position + len(self.ahead) + (unread(self.fd) if self.fd >= 0 else 0)

    def closed(self) -> int:
        """Forget what is not complete, and the descriptor. Return it: the caller closes it."""
        fd, self.fd = self.fd, -1
        self.splitter, self.ahead = Splitter(), b""
        return fd


class Publisher:
    """A pipe from a publisher, and the queue of what was read from it and is not routed yet.

    ``parked`` has that in order, and between it what is to be called when all before it has been routed. While something
    stays there, nothing more is read, but for what comes before the end of a publisher that is finished.
    """

    def __init__(self, id: int, session: Session, pipe: PublisherPipe) -> None:
        self.id = id
        self.session = session
        self.pid = session.peer.pid
        self.pipe = pipe
        self.state = PublisherState.READING
        self.pace = Pace()
        self.lender: Lender | None = None  # what it shares; None: all goes through the pipe
        self.parked: deque[Parked] = deque()
        self.referred = 0  # bytes in shared memory that it has published so far
        self.lookup: Generator[None, None, tuple[Subscription, ...]] | None = None  # of the first item's topic, in parts
        self.blocked: Subscription | None = None  # the full one that it waits for
        self.blocked_since = 0.0  # when something of it was routed last
        self.warned = False  # independent of the state: a warning of this wait is in the log
        self.inlet: Inlet | None = None  # of the session of a bridge
        self.last_in: dict[Subscription, int] = {}  # what had entered each backlog with the last of its messages
        # Subscriptions that begin behind something still to be routed, with the topics, and matchers, that they had before.
        self.not_yet: list[tuple[Subscription, frozenset[str], tuple[Matcher, ...]]] = []

    @property
    def is_closed(self) -> bool:
        """True if nothing more will be read."""
        return self.pipe.fd < 0

    def take(self, chunk: bytes) -> int:
        """Park what was read. Return the bytes of it, with those that it refers to in shared memory.

        :raises FrameError: it is no stream of frames.
        """
        pipe, came = self.pipe, len(chunk)
        pipe.position += came
        items = pipe.splitter.split(chunk)
        if pipe.splitter.has_more:
            rest = pipe.splitter.take_back()
            pipe.ahead = rest + pipe.ahead
            pipe.position -= len(rest)
            came -= len(rest)
        if pipe.splitter.has_shared:
            pipe.splitter.has_shared = False
            came += self._take_shared(items)
        else:
            self.parked.extend(items)
        while pipe.barriers and pipe.barriers[0][0] <= pipe.position:
            self.parked.append(pipe.barriers.popleft()[1])
        return came

    def _take_shared(self, items: list[Item | Singles | BridgeFrame]) -> int:
        """Park items with the memory that they are in, and drop what was aborted. Return the bytes that they refer to.

        :raises FrameError: a frame refers to memory that is not there, or is a bridge's.
        """
        referred, lender = 0, self.lender
        for item in items:
            if isinstance(item, BridgeFrame):
                if self.inlet is None:
                    raise FrameError("a frame of a bridge, whose session it is not")
                self.parked.append(partial(self.inlet.begin, item))
                continue
            found: Item | Singles | None = item
            if isinstance(item, References):
                ring = None if lender is None else lender.rings.get(item.ring)
                if ring is None:
                    raise FrameError(f"a reference to ring {item.ring}, which it does not share")
                found = item._replace(hold=ring.arrived(item))
            elif isinstance(item, MemfdMessage):
                found = None if lender is None else lender.fetch(item)
            if found is None:
                log.warning("process %d did not send the memory of a message: dropped", self.pid)
                continue
            self.parked.append(found)
            referred += found.charge
        self.referred += referred
        aborted = self.pipe.splitter.aborted
        while aborted:
            message_id = aborted.pop()
            if lender is not None:
                lender.give_up(message_id)
        return referred

    @property
    def all_routed(self) -> bool:
        """True if nothing that it has written until now is still to be routed."""
        return not self.parked and self.pipe.end_of_written() == self.pipe.position

    def after_written(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when all that it has written until now is routed; at once, if it is."""
        end = self.pipe.end_of_written()
        if end > self.pipe.position:
            self.pipe.barriers.append((end, callback))
        elif self.parked:
            self.parked.append(callback)
        else:
            callback()

    @property
    def held(self) -> int:
        """Bytes of this publisher's messages in the broker's memory, but for those in backlogs and rings."""
        parked = sum(item.charge for item in self.parked if not callable(item) and not isinstance(item, References))
        return self.pipe.splitter.unfinished + len(self.pipe.ahead) + parked


class Subscription:
    """A subscription in the broker: topics, backlog, and the pipe to its reader."""

    name: str | None = None  # of what is no single channel: a group's, or a bridge's stream
    label: str | None = None  # that its subscriber has given it
    is_written_down: ClassVar[bool] = True  # for the broker that takes over

    def __init__(self, id: int, session: Session, backlog: Backlog) -> None:
        self.id = id
        self.session = session  # of the subscriber; of the opener once it is open
        self.backlog = backlog
        self.policy = backlog.policy  # as it was subscribed: the backlog of a reserved one has another
        self.cost = Cost()  # of its session's budget
        self.state = SubscriptionState.ACCEPTING
        self.last_topics: tuple[str, ...] = ()  # when it ended
        self.pipe = ChannelPipe()
        self.window: ReferenceWindow | None = None  # on shared memory; None: all goes through the pipe
        self.is_starting = False  # independent of its states: a replay is put in front of what waits
        self.restored = False  # independent of its states: made by the broker before this one, and not open since
        self.is_abandoned = False  # independent of its states: its process closes the broker, so it ends once its pipe is full
        self.waiters: deque[Publisher] = deque()  # those that wait for room in its backlog, the longest first
        self.charge_when_blocked = 0  # of its backlog, when the first of them began to wait
        self.group: Group | None = None  # that it is a member of: then the group's backlog has what is routed to it

    @property
    def pid(self) -> int:
        return self.session.peer.pid

    @property
    def described(self) -> str:
        """Its number and name, for the log."""
        return f"channel {self.id}" if self.label is None else f"channel {self.id} {self.label!r}"

    @property
    def is_live(self) -> bool:
        return self.state is SubscriptionState.ACCEPTING

    @property
    def is_open(self) -> bool:
        """True while it has a reader."""
        return self.pipe.state is PipeState.OPEN

    @property
    def owner(self) -> int | None:
        """The process that has it open, or is the only one that may open it; ``None`` while any may."""
        reserved = self.restored and self.pipe.unopened is PipeState.RESERVED
        return self.pid if self.is_open or reserved else None

    def report_restart(self) -> None:
        """Write into its new pipe that messages may be missing here, and go by its own policy again."""
        self.backlog.pipe += self.pipe.write_restarted()
        self.backlog = with_policy(self.policy, self.backlog)
        self.restored = False

    def refresh(self) -> None:
        """Take into account what its reader has read."""
        if self.pipe.state is PipeState.OPEN:
            self.backlog.pipe = self.pipe.unread()
            if not self.backlog.pipe and self.window is not None:  # not even a tail byte is left, so all has been decoded
                self.has_read(self.window.unread.count)

    def has_read(self, count: int) -> None:
        """Note that its reader has read so many references, of all that were ever written."""
        if self.window is not None:
            self.window.has_read(count)
            self.backlog.referred = self.window.unread.bytes

    @property
    def target(self) -> Subscription:
        """The target of the router: its group, if it is a member of one."""
        return self.group or self

    def receive_reports(self) -> bool:
        """Take into account what it reports, as a member of a group. Return False when no report will come any more."""
        if self.group is None or self not in self.group.shares or self.pipe.reports_fd < 0:
            return False
        shares = self.group.shares
        try:
            while reports := self.pipe.read_reports():
                finished, leaves = last_report(reports)
                shares.finish(self, finished)
                if leaves:
                    shares.retire(self)
        except BlockingIOError:
            return True
        return False

    @property
    def acknowledged(self) -> int:
        """The position that the session of a bridge has reported to be in the log; 0 of any other."""
        return 0

    @property
    def is_unfinished(self) -> bool:
        """True if it is a member that has not finished all that it was given, and this is still counted."""
        return self.group is not None and not self.group.is_closing and self.group.shares.has_unfinished(self)

    @property
    def must_be_read(self) -> bool:
        """True if its pipe refers to memory that would be written again if it were forgotten."""
        return self.window is not None and self.window.must_be_read


class Group(Subscription):
    """The messages that several subscriptions share: each message goes to one of them.

    For the router it is one subscription. Its backlog has what waits, under its policy; that of a member has what its pipe has
    not taken yet of what it was given. It has no pipe of its own, and its session is that of the member that made it.
    """

    def __init__(self, id: int, name: str, session: Session, backlog: Backlog, topics: list[str]) -> None:
        super().__init__(id, session, backlog)
        self.name: str = name
        self.topics = frozenset(topics)  # that its members agree on
        self.shares: Shares[Subscription] = Shares()
        self.is_closing = False  # the broker ends: what is finished is not counted any more
