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
from collections.abc import Callable
from typing import Final

from mpbroadcast.arguments import Deadline
from mpbroadcast.errors import TimedOut
from mpbroadcast.wire.descriptors import PipeEnd
from mpbroadcast.wire.frames import MAX_FRAME, PIPE_BUF, abort, pieces

_numbers: Final = itertools.count(1)  # of messages in pieces


class Outlet:
    """A publisher's end of a pipe; ``number`` is what the broker calls it."""

    __slots__ = ("_on_give_up", "_unsaid", "number", "pipe")

    def __init__(self, pipe: PipeEnd, number: int, on_give_up: Callable[[int], None] = lambda number: None) -> None:
        """``on_give_up`` tells the broker another way: it may not read the pipe before there is room for what was given up."""
        self.pipe = pipe
        self.number = number
        self._on_give_up = on_give_up
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
            self.write(frame, deadline, done)
            return
        if len(frame) > MAX_FRAME:
            raise ValueError(f"a message of {len(frame)} bytes is too long: the limit is {MAX_FRAME}, with its topic and head")
        number = self.new_number()
        gone: list[int] = []
        try:
            last = b""
            for piece in pieces(frame, number):
                if last:
                    self.write(last, deadline, gone)
                last = piece
            self.write(last, deadline, done)
        except BaseException:
            # If the last piece has gone after all, the broker does not know the number any more, and nothing happens.
            self.give_up(number)
            raise

    def new_number(self) -> int:
        """For a message that does not go in one write: no other has it."""
        return next(_numbers)

    def give_up(self, number: int) -> None:
        """What belongs to this message will not come: tell the broker, as soon as there is room for that."""
        self._unsaid.append(number)
        with contextlib.suppress(OSError):
            self._say(Deadline(0))
        self._on_give_up(number)

    def _say(self, deadline: Deadline) -> None:
        """Tell the broker what will not come."""
        while self._unsaid:
            number = self._unsaid[-1]
            self.write(abort(number), deadline, [])
            with contextlib.suppress(ValueError):  # another thread has said it, too, which does no harm
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
                done.extend(map(os.write, (self.pipe.fd,), (data,)))
                return
            self.wait(deadline)

    def wait(self, deadline: Deadline) -> None:
        """Wait until the pipe may have room.

        :raises TimedOut: it did not in time.
        """
        if not self.pipe.wait(select.POLLOUT, deadline):
            raise self.not_in_time()

    @staticmethod
    def not_in_time() -> TimedOut:
        """The error of a message that was not sent."""
        return TimedOut(
            "it was not published in time: a subscriber that would get a message of this process has a full backlog. "
            "stats() shows whose; wait longer, or let it receive faster"
        )
