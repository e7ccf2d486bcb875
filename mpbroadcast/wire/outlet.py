"""The pipe that a handle publishes through, to one broker.

It takes no lock. A frame is at most ``PIPE_BUF`` bytes, which the pipe takes whole or not at all; a longer
message is pieces with its number. So threads, and signal handlers in the middle of a publish, write as they come, and the
broker puts together what belongs together.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.arguments import Deadline
from mpbroadcast.errors import TimedOut
from mpbroadcast.wire.descriptors import PipeEnd
from mpbroadcast.wire.frames import PIPE_BUF, abort, pieces
from mpbroadcast.wire.link import Link, Session, sooner

NOT_IN_TIME: Final = (
    "it was not published in time: a subscriber that would get a message of this process has a full backlog. stats() shows "
    "whose; wait longer, or let it receive faster"
)
_SLICE: Final = 0.25  # seconds from one try to send what finalisers could not to the next
message_numbers: Final = itertools.count(1)  # of those that do not go in one write


class Outlet:
    """A publisher's end of a pipe, that came in ``session``; ``number`` is what the broker calls it."""

    def __init__(self, link: Link, session: Session, pipe: PipeEnd, number: int) -> None:
        self._link = link
        self.session = session
        self.pipe = pipe
        self.number = number
        self._unsaid: list[int] = []  # messages that were given up, and whose abort frames had no room in the pipe

    def send(self, frame: bytes, deadline: Deadline, done: list[int]) -> None:
        """Send one frame of any length, or several that fit into one write together; put a number into ``done`` when it went.

        :raises TimedOut: it was not sent, and never will be.
        :raises OSError: this end or the other is closed.
        """
        if len(frame) <= PIPE_BUF:
            self.write(frame, deadline, done)
            return
        number = next(message_numbers)
        gone: list[int] = []
        try:
            last = b""
            for piece in pieces(frame, number):
                if last:
                    self.write(last, deadline, gone)
                last = piece
            trap_points.reach("sending the last piece")
            self.write(last, deadline, done)
        except BaseException:
            # If the last piece has gone after all, the broker does not know the number any more, and nothing happens.
            self.give_up(number)
            raise

    def give_up(self, number: int) -> None:
        """The rest of this message will not come: send an abort frame, now or before the next :meth:`write`.

        Until then the broker keeps, and counts, what it has of the message.
        """
        self._unsaid.append(number)
        with contextlib.suppress(OSError):
            self._abort()

    def _abort(self) -> None:
        """Send the abort frames that are due.

        :raises BlockingIOError: the pipe has no room.
        """
        while self._unsaid:
            number = self._unsaid[-1]
            os.write(self.pipe.fd, abort(number))
            with contextlib.suppress(ValueError):  # another thread has sent it, too, which does no harm
                self._unsaid.remove(number)

    def write(self, data: bytes, deadline: Deadline, done: list[int]) -> None:
        """Write what is one write, when there is room for it; put a number into ``done`` when it went.

        :raises TimedOut: it did not.
        :raises OSError: this end or the other is closed.
        """
        while True:
            # It waits outside of the handler, so that an interrupt does not show an error that is none. What has gone is in
            # ``done`` in the same step: an interrupt comes before or after.
            with contextlib.suppress(BlockingIOError):
                if self._unsaid:
                    self._abort()
                done.extend(map(os.write, (self.pipe.fd,), (data,)))
                return
            self.wait(deadline)

    def wait(self, deadline: Deadline) -> None:
        """Wait until the pipe may have room.

        :raises TimedOut: it did not in time.
        """
        trap_points.reach("waiting for room", self.pipe.fd)
        while not self.pipe.wait(select.POLLOUT, sooner(deadline, _SLICE)):
            if deadline.left() == 0:
                raise TimedOut(NOT_IN_TIME)
            self._link.send_notes()
