"""Writing frames into a publisher's pipe.

- No lock is held while the pipe is waited for. Each write is one frame, or whole frames together, of at most ``PIPE_BUF``
  bytes, which the pipe takes all or not at all. So threads, and signal handlers in the middle of a publish, write as they come.
- A longer message is pieces with its id; the broker joins them. A message that is given up, at a timeout or an interrupt, is
  ended by an abort frame: now, or before the next write if the pipe is full.
- ``done`` is a list that grows by one item in the same step in which a message is written: an interrupt comes before both or
  after both. The caller knows from it whether the message is published.
"""

from __future__ import annotations

import contextlib
import itertools
import select
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.client.broker_client import BrokerClient, Session
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import TimedOut
from mpbroadcast.posix.descriptors import pause_fork_lock
from mpbroadcast.posix.pipes import PipeEnd, write
from mpbroadcast.posix.waiting import Steps, Wait, run
from mpbroadcast.protocol.frames import IMAGE, PIPE_BUF, abort, frame_head, pieces
from mpbroadcast.protocol.pickling import Payload

Route = tuple[bytes, int]  # a topic, and the id of the subscription that is left out; 0 for none

_NOTES_EVERY: Final = 0.25  # seconds from one try to send the notes of finalisers to the next
NOT_IN_TIME: Final = (
    "it was not published in time, as the pipe to the broker is full: either a subscriber that would get a message of this "
    "handle has a full backlog (in stats(), it has this process among its `stalls`), or the broker has not read yet what was "
    "published before. Wait longer, or let that subscriber receive faster"
)

message_ids: Final = itertools.count(1)  # of messages that do not go in one write


def framed(payload: Payload, route: Route) -> bytes:
    """Return the frame of a message that goes through the pipe."""
    return b"".join((frame_head(payload.size, *route, IMAGE if payload.image else 0), *payload.parts))


class PipeWriter:
    """The pipe of a publisher. ``id`` is the publisher's at the broker of ``session``."""

    def __init__(self, client: BrokerClient, session: Session, pipe: PipeEnd, id: int) -> None:
        self.session = session
        self.pipe = pipe
        self.id = id
        self._client = client
        # The ids of messages that were given up and whose abort frames are not written: until then, the broker keeps what it
        # has of these messages.
        self.due_aborts: list[int] = []

    def send(self, frame: bytes, deadline: Deadline, done: list[int]) -> None:
        """Write one frame of any length, or several that fit into one write; else as :meth:`write`."""
        if len(frame) <= PIPE_BUF:
            self.write(frame, deadline, done)
        else:
            run(self.sending(frame, deadline, done))

    def sending(self, frame: bytes, deadline: Deadline, done: list[int]) -> Steps[None]:
        """Do as :meth:`send`."""
        if len(frame) <= PIPE_BUF:
            yield from self.writing(frame, deadline, done)
            return
        message_id = next(message_ids)
        written: list[int] = []
        try:
            last = b""
            for piece in pieces(frame, message_id):
                if last:
                    yield from self.writing(last, deadline, written)
                last = piece
            trap_points.reach("sending the last piece")
            yield from self.writing(last, deadline, done)
        except BaseException:
            # If the last piece was written after all, the broker does not know the id any more, and ignores the abort.
            self.due_aborts.append(message_id)  # with no other call before it, behind which a second interrupt could come
            self.send_aborts()
            raise

    def send_aborts(self) -> None:
        """Send the abort frames that are due, as far as the pipe has room; the rest is sent before the next :meth:`write`."""
        with contextlib.suppress(OSError):
            self._abort()

    def _abort(self) -> None:
        for message_id in list(self.due_aborts):
            write(self.pipe.fd, abort(message_id))
            with contextlib.suppress(ValueError):  # another thread has sent it, too, which does no harm
                self.due_aborts.remove(message_id)

    def write(self, data: bytes, deadline: Deadline, done: list[int]) -> None:
        """Do one write. Block until there is room for it.

        :raises TimedOut: it was not written, and never will be.
        :raises OSError: this end of the pipe, or the other, is closed.
        """
        # It waits outside of the handler, so that an interrupt has no context that is no error.
        with contextlib.suppress(BlockingIOError):
            if self.due_aborts:
                self._abort()
            done.extend(map(write, (self.pipe.fd,), (data,)))
            return
        run(self.writing(data, deadline, done))

    def writing(self, data: bytes, deadline: Deadline, done: list[int]) -> Steps[None]:
        """Do as :meth:`write`."""
        while True:
            with contextlib.suppress(BlockingIOError):
                if self.due_aborts:
                    self._abort()
                done.extend(map(write, (self.pipe.fd,), (data,)))
                return
            yield from self.waiting(deadline)

    def waiting(self, deadline: Deadline) -> Steps[None]:
        """Wait until the pipe may have room, or raise TimedOut."""
        trap_points.reach("waiting for room", self.pipe.fd)
        while not (yield Wait(deadline.at_most(_NOTES_EVERY), select.POLLOUT, self.pipe)):
            if deadline.remaining() == 0:
                raise TimedOut(NOT_IN_TIME)
            self._client.send_notes()
            pause_fork_lock()
