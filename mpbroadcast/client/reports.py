"""A member of a group reports to the broker what it has finished, in a pipe back to it.

A message is finished when the next call asks for another one, however it was handed out; so is one that could not be unpickled.
Each report has the count of all that are finished, so one that is repeated, behind an interrupt, does no harm.
"""

from __future__ import annotations

import contextlib

from mpbroadcast.posix.pipes import PipeEnd, write
from mpbroadcast.protocol.reports import report


class Reports:
    """The pipe back to the broker. What it has not read of it is never more than it has room for."""

    def __init__(self, pipe: PipeEnd) -> None:
        self._pipe = pipe
        self._reported = 0

    def finish(self, finished: int) -> None:
        """Report that so many are finished, of all that came through the channel's pipe."""
        if finished > self._reported:
            with contextlib.suppress(OSError):
                write(self._pipe.fd, report(finished))
                self._reported = finished

    def leave(self, finished: int) -> None:
        """Report that nothing more is asked for, as the channel is being closed, and how much was handed out."""
        with contextlib.suppress(OSError):
            write(self._pipe.fd, report(max(finished, self._reported), leaves=True))

    def close(self) -> None:
        self._pipe.close()
