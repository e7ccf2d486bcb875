"""The supervisor: a small process between the starter and the broker, which starts another broker when one has died.

The supervisor carries no messages. When it dies itself, the broker lives on, and is not replaced any more.

A broker is replaced that has ended by a signal or with an exit code other than 0, after it was ready and before it was to end,
while the starter lives. After five deaths in thirty seconds none is started any more.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.posix.processes import PeerProcess
from mpbroadcast.posix.waiting import run

log = logging.getLogger("mpbroadcast.broker")

_DEATHS: Final = 5
_SECONDS: Final = 30.0
_FIRST_PAUSE: Final = 0.02  # seconds
_POLL: Final = 0.01  # seconds between two looks for SIGTERM, in pauses of at most 0.16 seconds


def pause_after(deaths: deque[float], now: float) -> float | None:
    """Enter another death. Return the seconds until the next start; ``None`` for no start, after too many deaths."""
    deaths.append(now)
    while deaths[0] < now - _SECONDS:
        deaths.popleft()
    return _FIRST_PAUSE * (1 << (len(deaths) - 1)) if len(deaths) < _DEATHS else None


def supervise(starter: int | None, serve: Callable[[int], None], wanted: Callable[[], bool]) -> None:
    """Call ``serve`` in a child process, with its generation, from 0 on, until one has ended with exit code 0.

    None follows either when no other one is ``wanted``, after SIGTERM, which is forwarded to the child, and when process
    ``starter`` is dead, if it is not ``None``. SIGTERM and SIGCHLD are blocked.
    """
    deaths: deque[float] = deque()
    try:
        watched = None if starter is None else PeerProcess(starter)
    except ProcessLookupError:
        return
    for generation in itertools.count():
        child = os.fork()
        if not child:
            _be_broker(serve, generation)
        status, ending = _wait_for(child)
        if status == 0 or ending or (watched is not None and run(watched.waiting(0))):
            return
        why = f"was ended by signal {-status}" if status < 0 else f"has ended with exit code {status}"
        if not wanted():
            log.error("the broker (process %d) %s, not ready yet or being closed: no other one is started", child, why)
            return
        pause = pause_after(deaths, time.monotonic())
        trap_points.reach("replacing")
        if pause is None:
            log.critical("the broker (process %d) %s, again and again: it is given up", child, why)
            return
        log.error("the broker (process %d) %s: another one is started", child, why)
        if _is_ended_within(pause):
            return


def _is_ended_within(pause: float) -> bool:
    """Wait ``pause`` seconds, or until SIGTERM comes. Return whether it came. macOS has no ``sigtimedwait``, so poll."""
    deadline = time.monotonic() + pause
    while signal.SIGTERM not in signal.sigpending():
        rest = deadline - time.monotonic()
        if rest <= 0:
            return False
        time.sleep(min(rest, _POLL))
    return True


def _be_broker(serve: Callable[[int], None], generation: int) -> None:
    code = 1
    try:
        serve(generation)
        code = 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _wait_for(child: int) -> tuple[int, bool]:
    """Return its exit code, as ``os.waitstatus_to_exitcode`` has it, and whether SIGTERM came."""
    ending = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), ending
        if signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGTERM:
            ending = True
            os.kill(child, signal.SIGTERM)
