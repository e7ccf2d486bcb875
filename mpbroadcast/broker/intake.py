"""From publishers' pipes into their queues.

A publisher that finds the broker waiting for its pipe pays for waking it, with each message. So the pipe of one that is busy is
not watched by the poller, but read after naps: a publisher whose pipe is not waited for pays nothing. Any other event
ends a nap at once. A short message that comes alone is passed on as soon as it is read (``fast_path.py``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Final

from mpbroadcast.broker.channel_pipe import PIPE_SIZE
from mpbroadcast.broker.core.pace import MANY
from mpbroadcast.broker.core.states import PublisherState
from mpbroadcast.broker.fast_path import MOST_WRITES, FastPath
from mpbroadcast.broker.members import Publisher, PublisherPipe, Session
from mpbroadcast.posix.pipes import new_pipe, replace_with_dead_pipe
from mpbroadcast.posix.poller import IN, Poller
from mpbroadcast.protocol.frames import MOST_ITEMS, PIPE_BUF, FrameError

log = logging.getLogger("mpbroadcast.broker")

_SHORTEST_NAP: Final = 50e-6  # seconds; it doubles while a publisher stays busy
_LONGEST_NAP: Final = 400e-6
MUCH: Final = PIPE_SIZE // 4  # bytes in one read, or between two naps: with 400 µs, a publisher would soon wait for room
_AT_FIRST: Final = MUCH + PIPE_BUF  # bytes in a read of one that is not busy: one of very short messages never is


class Intake:
    """All publishers. Those of which something was read are in ``ready``, to be routed."""

    def __init__(self, poller: Poller, fast_path: FastPath) -> None:
        self.publishers: dict[int, Publisher] = {}
        self.ready: dict[Publisher, int] = {}  # with the bytes of the last read, in its pipe and referred to
        self._poller = poller
        self._fast_path = fast_path
        self._napping: dict[Publisher, None] = {}
        self._nap = _SHORTEST_NAP
        self._came = 0  # bytes since the last nap
        self._items = 0  # in this round
        self._buffer = memoryview(bytearray(PIPE_SIZE))

    def add(self, id: int, session: Session) -> tuple[Publisher, int]:
        """Make a publisher, and the descriptor that is its end of the pipe.

        :raises OSError: no descriptor is left.
        """
        reader, writer = new_pipe(PIPE_SIZE)
        publisher = Publisher(id, session, PublisherPipe(reader, self._buffer))
        self.publishers[id] = publisher
        session.publishers.add(publisher)
        self._poller.watch(publisher.pipe.fd, IN, partial(self.read, publisher))
        return publisher, writer

    def wait(self, *, at_once: bool) -> None:
        """Wait until something happens, and handle it; do not wait if ``at_once``. Then read the pipes of those that nap."""
        much, self._came, self._items = self._came >= MUCH, 0, 0
        self._fast_path.room = MOST_WRITES
        self._nap = min(2 * self._nap, _LONGEST_NAP) if self._napping and not much else _SHORTEST_NAP
        self._poller.round(0.0 if at_once else self._nap if self._napping else None)
        for publisher in list(self._napping):
            self.read(publisher)

    def read(self, publisher: Publisher, _events: int = IN, *, limit: int | None = None) -> None:
        """Read once what is in its pipe, and park it, or pass it on if it is a lone message.

        At most ``limit`` bytes; with none, nothing if this round has enough.
        """
        if limit is None and self._items > MOST_ITEMS:
            return  # it is read in a later round: those that were read are behind then, as a turn is no longer than that
        is_alone = False
        if limit is None and publisher.state is PublisherState.READING:
            limit = _AT_FIRST
            is_alone = not self.ready
        try:
            chunk = publisher.pipe.read(limit)
        except BlockingIOError:
            if publisher.state is PublisherState.NAPPING and not publisher.pace.is_busy(time.monotonic()):
                self.watch(publisher)
            return
        if not chunk:
            self.close(publisher)
            return
        try:
            if is_alone and self._fast_path.pass_on(publisher, chunk):
                self._items += 1
                pace = publisher.pace
                pace.count += 1
                if pace.count >= MANY and pace.is_busy(time.monotonic()):
                    self.nap(publisher)
                return
            came = publisher.take(chunk)
        except FrameError as error:
            self.refuse(publisher, f"it sent {error}")
            return
        except Exception as error:  # whatever is wrong with what it has sent, or here: it does not end the broker
            log.exception("bytes of process %d could not be parsed, or routed", publisher.pid)
            self.refuse(publisher, f"the broker failed at what it sent ({error!r})")
            return
        self._came += came
        self._items += publisher.pipe.splitter.steps
        self.ready[publisher] = came

    def refuse(self, publisher: Publisher, why: str) -> None:
        """Read nothing more of a publisher whose bytes cannot be parsed, or routed."""
        log.warning("process %d cannot publish any more: %s", publisher.pid, why)
        self.close(publisher)
        if publisher.inlet is not None:
            publisher.inlet.refuse()

    def watch(self, publisher: Publisher) -> None:
        """Read its pipe when the poller reports bytes, from now on."""
        publisher.state = publisher.state.to(PublisherState.READING)
        self._napping.pop(publisher, None)
        self._poller.watch(publisher.pipe.fd, IN, partial(self.read, publisher))
        if publisher.pipe.ahead:  # of which the poller reports nothing
            self.nap(publisher)

    def nap(self, publisher: Publisher) -> None:
        """Read its pipe after naps, from now on."""
        publisher.state = publisher.state.to(PublisherState.NAPPING)
        self._napping[publisher] = None
        self._poller.forget(publisher.pipe.fd)

    def pause(self, publisher: Publisher) -> None:
        """Do not read it, nor watch for errors: the poller would report again and again that its writers are gone."""
        publisher.state = publisher.state.to(PublisherState.PAUSED)
        self._poller.forget(publisher.pipe.fd)
        self._napping.pop(publisher, None)

    def finish(self, publisher: Publisher) -> Iterator[None]:
        """Read what it has written until now, whether it can be routed or not, and nothing more; in parts."""
        pipe, position = publisher.pipe, -1
        # A publish that waited for room may have gone on when there was some: that is published, but what comes later is not.
        end = pipe.end_of_written() + PIPE_SIZE
        while not publisher.is_closed and position < pipe.position < end:
            position = pipe.position
            self.read(publisher, limit=end - position)
            if self._items > MOST_ITEMS:
                yield
        if not publisher.is_closed:
            replace_with_dead_pipe(publisher.pipe.fd)  # at once, not at the end of the round: it wakes a publish that waits
            self.close(publisher)

    def close(self, publisher: Publisher) -> None:
        """Read nothing more. What was read is still to be routed."""
        if publisher.is_closed:
            return
        barriers, lender = publisher.pipe.barriers, publisher.lender
        self._poller.close(publisher.pipe.closed())
        self._napping.pop(publisher, None)
        publisher.state = publisher.state.to(PublisherState.DRAINING)
        publisher.parked.extend(callback for _, callback in barriers)
        barriers.clear()
        if lender is not None:
            lender.close()
            self._poller.close(lender.fd_socket.detach())
        publisher.session.publishers.discard(publisher)
        self.ready[publisher] = 0

    def forget(self, publisher: Publisher) -> bool:
        """Forget a publisher of which all is routed. Return whether it was known."""
        publisher.state = publisher.state.to(PublisherState.GONE)
        return self.publishers.pop(publisher.id, None) is not None
