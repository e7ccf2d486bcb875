"""The pipe that a handle publishes through.

It takes no lock while it waits. A frame is at most ``PIPE_BUF`` bytes, which the pipe takes whole or not at all; a longer
message is pieces with its number. So threads, and signal handlers in the middle of a publish, write as they come, and the
broker puts together what belongs together.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
from typing import Final

from mpbroadcast.arguments import Deadline
from mpbroadcast.errors import TimedOut
from mpbroadcast.wire.frames import MAX_FRAME, PIPE_BUF, abort, pieces
from mpbroadcast.wire.link import PipeEnd

__all__ = ["Outlet"]

_numbers: Final = itertools.count(1)  # of messages in pieces


class Outlet:
    """A publisher's end of a pipe; ``number`` is what the broker calls it."""

    __slots__ = ("_unsaid", "number", "pipe")

    def __init__(self, pipe: PipeEnd, number: int) -> None:
        self.pipe = pipe
        self.number = number
        self._unsaid: list[int] = []  # messages in pieces that were given up, which the broker has not been told yet

    @property
    def owes(self) -> bool:
        """Whether the broker still holds the beginning of a message that was given up: the next :meth:`send` tells it."""
        return bool(self._unsaid)

    def send(self, frame: bytes, deadline: Deadline, done: list[int]) -> None:
        """Send one frame of any length, or several that fit into one write together; put a number into ``done`` when it went.

        :raises TimedOut: it was not sent, and never will be.
        :raises OSError: this end or the other is closed.
        """
        if self._unsaid:
            self._say(deadline)
        if len(frame) <= PIPE_BUF:
            self._write(frame, deadline, done)
            return
        if len(frame) > MAX_FRAME:
            raise ValueError(f"a message of {len(frame)} bytes is too long: the limit is {MAX_FRAME}, with its topic and head")
        number = next(_numbers)
        gone: list[int] = []
        try:
            last = b""
            for piece in pieces(frame, number):
                if last:
                    self._write(last, deadline, gone)
                last = piece
            self._write(last, deadline, done)
        except BaseException:
            # If the last piece has gone after all, the broker does not know the number any more, and nothing happens.
            self._unsaid.append(number)
            with contextlib.suppress(OSError):
                self._say(Deadline(0))
            raise

    def _say(self, deadline: Deadline) -> None:
        """Tell the broker what will not come."""
        while self._unsaid:
            number = self._unsaid.pop()
            try:
                self._write(abort(number), deadline, [])
            except BaseException:
                self._unsaid.append(number)
                raise

    def _write(self, data: bytes, deadline: Deadline, done: list[int]) -> None:
        pipe = self.pipe
        while True:
            # It waits outside of the handler, so that an interrupt does not show an error that is none. What has gone is in
            # ``done`` in the same step: an interrupt comes before or after.
            with contextlib.suppress(BlockingIOError):
                done.extend(map(os.write, (pipe.fd,), (data,)))
                return
            if not pipe.wait(select.POLLOUT, deadline):
                raise TimedOut(
                    "it was not published in time: a subscriber that would get a message of this process has a full "
                    "backlog. stats() shows whose; wait longer, or let it receive faster"
                )
