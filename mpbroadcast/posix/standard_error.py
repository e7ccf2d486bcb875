"""Logging to standard error by processes that nothing may delay."""

from __future__ import annotations

import contextlib
import logging
import os
import select


class StandardError(logging.Handler):
    """Writes to descriptor 2, if there is room: a terminal or pipe that is not read must not stop the process.

    (Not to ``sys.stderr``, which under fork may be an object of the starter's that writes elsewhere. The descriptor cannot be
    made non-blocking: it is shared with the starter.)
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            data = f"{self.format(record)}\n".encode(errors="backslashreplace")
            ready = select.poll()
            ready.register(2, select.POLLOUT)
            patience = 500 if record.levelno >= logging.CRITICAL else 0  # milliseconds
            while data and ready.poll(patience):
                data = data[os.write(2, data[: select.PIPE_BUF]) :]
