"""The broker's log, in its own process: where it goes, and how much of it."""

from __future__ import annotations

import contextlib
import logging
import logging.config
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any, Final

_LINES: Final = 20  # in a second


class RateLimitFilter(logging.Filter):
    """Passes ``lines`` in each second; the first that passes again has how many were left out. A crash always passes."""

    def __init__(self, lines: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._lines = lines
        self._clock = clock
        self._since = clock()
        self._passed = 0
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        if now - self._since >= 1.0:
            self._since, self._passed = now, 0
        if self._passed >= self._lines and record.levelno < logging.CRITICAL:
            self._left_out += 1
            return False
        self._passed += 1
        if self._left_out:
            record.msg, record.args = f"{record.getMessage()} ({self._left_out} line(s) before this one were left out)", ()
            self._left_out = 0
        return True


class _StandardError(logging.Handler):
    """Writes to descriptor 2, if there is room: a terminal or pipe that is not read must not stop the broker.

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


def configure(log: logging.Logger, config: dict[str, Any] | None) -> None:
    """Configure ``log`` by a dictionary for ``logging.config``; without one, write warnings and worse to standard error.

    :raises Exception: whatever is wrong with the dictionary.
    """
    log.filters = [RateLimitFilter(_LINES)]
    if config is not None:
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)
        logging.config.dictConfig({"disable_existing_loggers": False, **config})
        return
    log.propagate = False
    log.setLevel(logging.WARNING)
    if sys.__stderr__ is None:  # descriptor 2 may be anything
        log.handlers = [logging.NullHandler()]
        return
    handler = _StandardError()
    handler.setFormatter(logging.Formatter("mpbroadcast broker %(process)d: %(levelname)s: %(message)s"))
    log.handlers = [handler]
