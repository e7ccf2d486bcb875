"""The write end of a channel's pipe, and what the poller waits for at it."""

from __future__ import annotations

import os
from typing import Final

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.states import PipeState
from mpbroadcast.posix.pipes import new_pipe, read, size_of_pipe, unread, write
from mpbroadcast.protocol.reports import REPORT_SIZE
from mpbroadcast.protocol.runs import RESTARTED, SKIPPED, note

PIPE_SIZE: Final = 1 << 18  # bytes, when the system gives so much
SHORTEST_RETRY: Final = 0.003  # seconds until a full backlog is looked at again; it doubles while nothing is read
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_REPORTS_SIZE: Final = 1 << 16  # bytes


class ChannelPipe:
    """A pipe that is made when a process opens the channel; ``fd`` is -1 before that, and once it is closed."""

    def __init__(self) -> None:
        self.state = self.unopened = PipeState.UNOPENED  # what it is now, and what it is when an opening is taken back
        self.fd = -1
        self.token = 0  # of the opening that was begun last
        self.write_interest = False  # independent of the state: the poller reports when the pipe takes more
        self.is_retrying = False  # independent of the state: a timer will look at it again
        self.retry = SHORTEST_RETRY
        self.is_one_page = False  # it has room for more only once all has been read
        self.reports_fd = -1  # of the pipe back, in which a group's member or a bridge's session reports what it has finished
        self.most_reports = 0  # that the pipe back has room for

    def reserve(self) -> None:
        """Let only the process open it that had it open before the broker was restarted."""
        self.state = self.unopened = self.state.to(PipeState.RESERVED)

    def begin_opening(self, backlog: Backlog, *, is_member: bool = False) -> int:
        """Make the pipe, for a reader that reports (``is_member``) or another one. Return the descriptor of its end.

        :raises OSError: no descriptor is left.
        """
        # An eighth of the capacity, so that a small one is not all in the pipe, where no event reports that a part is read.
        # The newest message goes into an empty pipe only: one page reports room when it is empty.
        # What a member has been given does not count against the capacity, and the member reports what it has finished.
        size = PIPE_SIZE if is_member else min(PIPE_SIZE, max(_PAGE, 1 << max(0, (backlog.capacity // 8).bit_length() - 1)))
        reader, writer = new_pipe(_PAGE if backlog.keeps_newest_only else size)
        self.state = self.state.to(PipeState.OPENING)
        self.fd = writer
        given = size_of_pipe(reader)
        backlog.pipe_size = _PAGE if given is None else given
        self.is_one_page = given is not None and given <= _PAGE
        return reader

    def begin_reports(self) -> int:
        """Make the pipe back. Return the descriptor of the reader's end, which that writes to.

        :raises OSError: no descriptor is left.
        """
        self.reports_fd, writer = new_pipe(_REPORTS_SIZE)
        # A page that is partly read has no room for more.
        self.most_reports = max(_PAGE, (size_of_pipe(writer) or 0) - _PAGE) // REPORT_SIZE
        return writer

    def read_reports(self) -> bytes:
        """Return what its reader has reported since; nothing when no report will come any more.

        :raises BlockingIOError: nothing is there.
        """
        return read(self.reports_fd, _REPORTS_SIZE)

    def end_reports(self) -> int:
        """Return the descriptor of the pipe back, if there is one: the caller closes it."""
        fd, self.reports_fd = self.reports_fd, -1
        return fd

    def open(self) -> None:
        """Note that the reader has its end."""
        self.state = self.state.to(PipeState.OPEN)

    def take_back(self) -> int:
        """Note that the reader does not open it after all. Return the descriptor: the caller closes it."""
        self.state = self.state.to(self.unopened)
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> int:
        """Note that it is gone. Return the descriptor, if it has one: the caller closes it."""
        self.state = self.state.to(PipeState.GONE)
        fd, self.fd = self.fd, -1
        return fd

    def unread(self) -> int:
        """Return how many bytes its reader has not read."""
        return unread(self.fd) if self.fd >= 0 else 0

    def write_restarted(self) -> int:
        """Write that messages may be missing here. Return how many bytes that takes.

        :raises OSError: its reader is gone.
        """
        return write(self.fd, note(RESTARTED, 0))

    def write_probe(self) -> int:
        """Write a control record without effect if the pipe is empty: the next call that receives reads it.

        Return how many bytes that takes; 0 if the pipe is not empty, or its reader is gone.
        """
        if self.state is not PipeState.OPEN or self.unread():
            return 0
        try:
            return write(self.fd, note(SKIPPED, 0))
        except OSError:
            return 0
