"""The broker's log, in its own process: where it goes, and how much of it."""

from __future__ import annotations

import logging
import logging.config
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from mpbroadcast.posix.standard_error import StandardError

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
    handler = StandardError()
    handler.setFormatter(logging.Formatter("mpbroadcast broker %(process)d: %(levelname)s: %(message)s"))
    log.handlers = [handler]
