"""The keeper: a small process between the starter and the broker, which starts another broker when that one has died.

It has no part in what they say to each other. When it dies itself, the broker lives on, and is not replaced any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

import psutil

from mpbroadcast import trap_points

log = logging.getLogger("mpbroadcast.broker")

_DEATHS: Final = 5
_SECONDS: Final = 30.0
_FIRST_PAUSE: Final = 0.02  # seconds


class Patience:
    """Whether to go on after another death. Pure: it is told the time."""

    def __init__(self, deaths: int = _DEATHS, seconds: float = _SECONDS) -> None:
        self._deaths = deaths
        self._seconds = seconds
        self._last: deque[float] = deque()

    def pause(self, now: float) -> float | None:
        """Seconds to wait before the next start; ``None`` for none, after the last of so many deaths in so many seconds."""
        self._last.append(now)
        while self._last[0] < now - self._seconds:
            self._last.popleft()
        if len(self._last) >= self._deaths:
            return None
        return _FIRST_PAUSE * (1 << (len(self._last) - 1))


def keep(starter: int, serve: Callable[[int], None], wanted: Callable[[], bool], clock: Callable[[], float]) -> None:
    """Let a child process ``serve`` as the broker of this number, from 0 on, until one has ended as it should.

    Nor is one replaced that has died before it was ready, or when it was to end: then no other one is ``wanted``.

    That is also so on SIGTERM, which is handed on to it, and when process ``starter`` is dead. SIGTERM and SIGCHLD are blocked.
    """
    patience = Patience()
    try:
        watched = psutil.Process(starter)
    except psutil.NoSuchProcess:
        return
    number = 0
    while True:
        child = os.fork()
        if not child:
            _be_broker(lambda number=number: serve(number))  # type: ignore[misc]
        status, ending = _wait_for(child)
        if status == 0 or ending or not _lives(watched):
            return
        why = f"was ended by signal {-status}" if status < 0 else f"has ended with exit code {status}"
        if not wanted():
            log.error("the broker (process %d) %s: no other one is wanted", child, why)
            return
        pause = patience.pause(clock())
        trap_points.reach("replacing")
        if pause is None:
            log.critical("the broker (process %d) %s, again and again: it is given up", child, why)
            return
        log.error("the broker (process %d) %s: another one is started", child, why)
        if signal.sigtimedwait({signal.SIGTERM}, pause) is not None:
            return
        number += 1


def _be_broker(serve: Callable[[], None]) -> None:
    code = 1
    try:
        serve()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _wait_for(child: int) -> tuple[int, bool]:
    """Its exit code, as ``os.waitstatus_to_exitcode`` has it; and whether it was told to end."""
    ending = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), ending
        if signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGTERM:
            ending = True
            os.kill(child, signal.SIGTERM)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
