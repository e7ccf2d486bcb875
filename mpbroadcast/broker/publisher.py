"""A publisher as the broker knows it: the read end of its pipe, and what was read and has not been routed yet."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from mpbroadcast.broker.members import Session, unread
from mpbroadcast.broker.memory import Lender
from mpbroadcast.protocol.frames import Batch, FrameError, Item, MemfdMessage, References, Splitter

if TYPE_CHECKING:
    from mpbroadcast.broker.members import Subscription

log = logging.getLogger("mpbroadcast.broker")


Parked = Item | Callable[[], None]


class Publisher:
    """The read end of a publisher's pipe.

    ``parked`` is what was read and has not been routed, in order, and between it what is to be called when all before it
    has been. While something stays there, because a subscription that would get it is full, nothing more is read.
    """

    def __init__(self, number: int, session: Session, fd: int, room: memoryview) -> None:
        self.number = number
        self.session = session
        self.pid = session.peer.pid
        self.fd = fd
        self._room = room  # to read into: all publishers have it in turn
        self.parked: deque[Parked] = deque()
        self.blocked: Subscription | None = None  # the full one that it waits for
        self.blocked_since = 0.0  # when something of it went on last
        self.warned = False
        self.last_in: dict[Subscription, int] = {}  # how many had come to each backlog with the last of its messages
        # Subscriptions that begin behind something that is still to be routed; with topics, what they had before that.
        self.not_yet: list[tuple[Subscription, tuple[str, ...]]] = []
        self.lender: Lender | None = None  # what it shares
        self._splitter = Splitter()
        self.position = 0  # bytes read so far
        self._barriers: deque[tuple[int, Callable[[], None]]] = deque()

    def read(self, limit: int | None = None) -> bytes:
        """What is there, but not past the next position that somebody waits for; empty when all writers are gone.

        :raises BlockingIOError: nothing is there.
        """
        if self._barriers:
            end = self._barriers[0][0] - self.position
            limit = end if limit is None else min(limit, end)
        room = self._room
        # Not os.read: memory for the most that may come would be mapped and unmapped each time.
        return bytes(room[: os.readv(self.fd, (room if limit is None else room[:limit],))])

    def take(self, chunk: bytes) -> None:
        """Park what was read.

        :raises FrameError: it is no such stream.
        """
        self.position += len(chunk)
        items = self._splitter.split(chunk)
        if self._splitter.has_shared:
            self._splitter.has_shared = False
            self.parked.extend(filter(None, map(self._found, items)))
            while self._splitter.aborted:
                number = self._splitter.aborted.pop()
                if self.lender is not None:
                    self.lender.give_up(number)
        else:
            self.parked.extend(items)
        while self._barriers and self._barriers[0][0] <= self.position:
            self.parked.append(self._barriers.popleft()[1])

    def _found(self, item: Item) -> Item | None:
        """With the memory that it is in; ``None`` when that has not come.

        :raises FrameError: it is not where it says.
        """
        if isinstance(item, References):
            ring = None if self.lender is None else self.lender.rings.get(item.ring)
            if ring is None:
                raise FrameError(f"a reference to a ring {item.ring} that it does not have")
            return item._replace(hold=ring.arrived(item))
        if isinstance(item, MemfdMessage):
            memfd_message = None if self.lender is None else self.lender.fetch(item)
            if memfd_message is None:
                log.warning("process %d did not send the memory of a message: dropped", self.pid)
            return memfd_message
        return item

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
        parked = sum(
            len(item.frames) if isinstance(item, Batch) else item.length
            for item in self.parked
            if isinstance(item, (Batch, MemfdMessage))
        )
        return self._splitter.unfinished + parked
