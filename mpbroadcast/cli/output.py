"""Standard output and standard error of a command: whole lines at once, and the end of what reads them."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Final

from mpbroadcast.cli.text import one_line
from mpbroadcast.deadline import Deadline

_CLOSED: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


def prepare() -> None:
    """Make texts UTF-8 whatever the locale, and open what the caller has closed, or a socket would be taken for the output."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(fd)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def write(data: bytes) -> None:
    """Write all of ``data`` to standard output, at once.

    :raises BrokenPipeError: nothing reads it any more.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:  # another process has made it non-blocking
            select.select([], [1], [])


def warn(text: str) -> None:
    """Write one line to standard error."""
    with contextlib.suppress(OSError):
        print(f"mpbroadcast: {one_line(text)}", file=sys.stderr, flush=True)


def wait(fd: int | None, timeout: float | None) -> bool:
    """Block until ``fd`` is readable, at most ``timeout`` seconds. Return True if it is.

    :raises BrokenPipeError: nothing reads standard output any more.
    """
    poll = select.poll()
    poll.register(1, 0)
    if fd is not None:
        poll.register(fd, select.POLLIN)
    events = poll.poll(Deadline(timeout).milliseconds())
    if any(ready == 1 and event & _CLOSED for ready, event in events):
        raise BrokenPipeError
    return any(ready == fd for ready, _ in events)
