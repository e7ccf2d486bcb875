"""Interrupts of calls: at one moment that a test names, or at random ones, many times.

``MPBROADCAST_SEED`` repeats a run's random moments, ``MPBROADCAST_SOAK`` is how many seconds each storm takes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

import mpbroadcast
from mpbroadcast.posix import locks
from tests.conftest import FAILED

SEED: Final = int(os.environ.get("MPBROADCAST_SEED") or random.SystemRandom().randrange(1 << 32))
SOAK: Final = float(os.environ.get("MPBROADCAST_SOAK") or 0)
STORM: Final = SOAK or 0.1
"""How many seconds a storm takes."""
_PACKAGE: Final = str(Path(mpbroadcast.__file__).parent)

Moment = Callable[[FrameType, str], bool]


class Interrupt(KeyboardInterrupt):
    """What the handler raises: a Ctrl-C that no other can be taken for."""


# ------------------------------------------------------------------------------------------------------------ one moment


def entering(function: Callable[..., Any]) -> Moment:
    """Where this function is entered."""
    code = function.__code__
    return lambda frame, event: event == "call" and frame.f_code is code


def before_opcode(count: int) -> Moment:
    """Before the bytecode that comes after so many others, the call's own and its callees'."""
    left = iter(range(count))

    def moment(frame: FrameType, event: str) -> bool:
        frame.f_trace_opcodes = True
        return event == "opcode" and next(left, None) is None

    return moment


def before_line(count: int, file: str) -> Moment:
    """Before the line of this file that comes after so many others."""
    left = iter(range(count))
    return lambda frame, event: event == "line" and frame.f_code.co_filename == file and next(left, None) is None


def behind_call(count: int) -> Moment:
    """Behind the return of a call in the package, as a signal's handler can come, after so many others: of a profiler."""
    left = iter(range(count))

    def moment(at: FrameType, event: str) -> bool:
        if event not in ("return", "c_return") or not at.f_code.co_filename.startswith(_PACKAGE):
            return False
        frame: FrameType | None = at
        while frame is not None:
            # No signal is looked for where a lock is taken, and one in a finaliser is Python's to report.
            if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == locks.__file__:
                return False
            frame = frame.f_back
        return next(left, None) is None

    return moment


class Interrupting:
    """Raises once, at the first moment of its kind, in this thread."""

    def __init__(self, moment: Moment, install: Callable[[Any], None] = sys.settrace) -> None:
        self.came = False
        self._moment = moment
        self._install = install

    def begin(self) -> None:
        """Look for the moment from here on."""
        self._install(self._look)

    def _look(self, frame: FrameType, event: str, called: Any) -> Any:
        if event == "c_return" and called.__name__ == "__enter__":
            return self._look  # Python 3.15 reports it, and checks for no signal behind it
        if self._moment(frame, event):
            self._install(None)
            self.came = True
            raise Interrupt
        return self._look

    def end(self) -> None:
        """Look no more."""
        self._install(None)

    def __call__(self, function: Callable[..., Any], *args: Any, begin: bool = True) -> bool:
        """Call the function; whether it was interrupted. Without ``begin``, something else begins the looking."""
        try:
            if begin:
                self.begin()
            function(*args)
        except Interrupt as error:
            error.__traceback__ = error.__context__ = None  # which would keep what the call has held
        finally:
            self._install(None)
        return self.came


def interrupting(moment: Moment, function: Callable[..., Any], *args: Any) -> bool:
    """Call the function, and interrupt it at this moment; whether it came to that."""
    return Interrupting(moment)(function, *args)


# -------------------------------------------------------------------------------------------------------- random moments


class Storm:
    """Interrupts calls after random times; often twice, so that a second one meets what the first has set off."""

    def __init__(self, times: int) -> None:
        self.raised = 0
        self.times = times
        self._left = 0
        self._random = random.Random(SEED)
        self._error: Interrupt | None = None
        # pytest's own timeout has the same timer: it gets it back between the calls.
        self._deadline = time.monotonic() + (signal.getitimer(signal.ITIMER_REAL)[0] or 1e6)
        self._before = signal.signal(signal.SIGALRM, self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._left:
            self._left -= 1
            self.raised += 1
            if not self._left:
                self._quiet()
            raise Interrupt
        if time.monotonic() >= self._deadline and callable(self._before):
            self._before(signum, frame)

    def _quiet(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self._deadline - time.monotonic()))

    def end(self) -> None:
        """Give signal and timer back."""
        signal.signal(signal.SIGALRM, self._before)
        self._quiet()

    def interrupts(self, longest: float, function: Callable[..., Any], *args: Any, **keywords: Any) -> Interrupt | None:
        """Call the function, and interrupt it before ``longest`` seconds are over; the interrupt, if it came out of it."""
        self._error = None
        try:
            self._left = self._random.randint(1, self.times)
            # Some come late, or else a call that takes longer now and then would never be done.
            delay = self._random.random() * longest * (30 if self._random.random() < 0.1 else 1)
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, delay), max(20e-6, 0.2 * longest))
            function(*args, **keywords)
            self._left = 0
        except Interrupt as error:
            self._left = 0
            error.__traceback__ = error.__context__ = error.__cause__ = None  # which would keep what the call has held
            self._error = error
        finally:
            self._left = 0
            self._quiet()
        return self._error

    def moments(self, most: int = 1_000_000) -> Iterator[int]:
        """Count up, until the time of a storm is over, or there were so many."""
        end = time.monotonic() + STORM
        for count in range(most):
            if time.monotonic() > end and self.raised >= 5:
                return
            yield count


@contextlib.contextmanager
def storming(times: int, node: Any) -> Iterator[Storm]:
    """A storm for the length of a block, with up to so many interrupts a call."""
    print(f"MPBROADCAST_SEED={SEED}")
    raising = Storm(times)
    gc.disable()  # a collection in a call takes longer than the call
    hook, sys.unraisablehook = sys.unraisablehook, id  # one in Python would be interrupted itself; id() does nothing
    try:
        yield raising
    finally:
        sys.unraisablehook = hook
        gc.enable()
        raising.end()
    node.add_marker(pytest.mark.interrupted(raising.raised))
    assert raising.raised or node.stash.get(FAILED, False)


def duration(function: Callable[..., Any], *args: Any, **keywords: Any) -> float:
    """How many seconds a call takes, and half as many more: the shortest of a few."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        function(*args, **keywords)
        taken.append(time.perf_counter() - start)
    return 1.5 * min(taken) + 10e-6
