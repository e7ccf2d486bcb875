"""Interrupts of calls: at one moment that a test names, at each moment in turn, or at random ones. ``MPBROADCAST_SEED`` repeats
a run's random moments, ``MPBROADCAST_SOAK`` is how many seconds each storm takes."""

import itertools
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

import mpbroadcast
from mpbroadcast.posix import locks

SEED: Final = int(os.environ.get("MPBROADCAST_SEED") or random.SystemRandom().randrange(1 << 32))
SOAK: Final = float(os.environ.get("MPBROADCAST_SOAK") or 0)
STORM: Final = SOAK or 0.1
"""How many seconds a storm takes."""
_PACKAGE: Final = str(Path(mpbroadcast.__file__).parent)

Interrupted = Callable[..., object]
"""Calls a function with its arguments, and interrupts it; what it returns is true if it came to that."""


class Interrupt(KeyboardInterrupt):
    """What is raised: a Ctrl-C that no other can be taken for."""


class Moment(NamedTuple):
    """Whether an event of the tracer, or of the profiler, is the moment."""

    is_here: Callable[[FrameType, str], bool]
    install: Callable[[Any], None] = sys.settrace


def entering(function: Callable[..., Any]) -> Moment:
    code = function.__code__
    return Moment(lambda frame, event: event == "call" and frame.f_code is code)


def before_opcode(count: int) -> Moment:
    """Before the bytecode that comes after so many others, the call's own and its callees'."""
    left = iter(range(count))

    def is_here(frame: FrameType, event: str) -> bool:
        frame.f_trace_opcodes = True
        return event == "opcode" and next(left, None) is None

    return Moment(is_here)


def before_line(count: int, file: str) -> Moment:
    """Before the line of this file that comes after so many others."""
    left = iter(range(count))
    return Moment(lambda frame, event: event == "line" and frame.f_code.co_filename == file and next(left, None) is None)


def behind_call(count: int) -> Moment:
    """Behind the return of a call in the package, as a signal's handler can come, after so many others."""
    left = iter(range(count))

    def is_here(at: FrameType, event: str) -> bool:
        if event not in ("return", "c_return") or not at.f_code.co_filename.startswith(_PACKAGE):
            return False
        frame: FrameType | None = at
        while frame is not None:
            # No signal is looked for where a lock is taken, and one in a finaliser is Python's to report.
            if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == locks.__file__:
                return False
            frame = frame.f_back
        return next(left, None) is None

    return Moment(is_here, sys.setprofile)


def interrupting(moment: Moment, function: Callable[..., Any], *args: Any) -> bool:
    """Call the function, and interrupt it at this moment, once. Return whether it came to that."""
    came = False

    def look(frame: FrameType, event: str, called: Any) -> Any:
        nonlocal came
        if event == "c_return" and called.__name__ == "__enter__":
            return look  # Python 3.15 reports it, and checks for no signal behind it
        if moment.is_here(frame, event):
            moment.install(None)
            came = True
            raise Interrupt
        return look

    try:
        moment.install(look)
        function(*args)
    except Interrupt as error:
        error.__traceback__ = error.__context__ = None  # which would keep what the call has held
    finally:
        moment.install(None)
    return came


def each_moment() -> Iterator[Interrupted]:
    """Yield what interrupts a call, one moment later each time, until a call is over before its moment."""
    came = True

    def interrupted(function: Callable[..., Any], *args: Any) -> bool:
        nonlocal came
        came = False
        came = interrupting(behind_call(count), function, *args)
        return came

    for count in itertools.count():
        yield interrupted
        if not came:
            assert count > 10
            return


class Storm:
    """Interrupts calls after random times; often twice, so that a second one meets what the first has set off."""

    def __init__(self) -> None:
        self.raised = 0
        self.times = 2  # interrupts of one call, at most
        self._left = 0
        self._random = random.Random(SEED)
        self._seconds: dict[str, list[float]] = defaultdict(list)  # that the first calls of each function took
        # pytest's own timeout has the same timer: it gets it back between the calls.
        self._deadline = time.monotonic() + (signal.getitimer(signal.ITIMER_REAL)[0] or 1e6)
        self._before = signal.signal(signal.SIGALRM, self._on_alarm)

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
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
        """Give the timer back. The handler stays, and passes on what comes at pytest's own time: where another thread takes the
        signal, an alarm can arrive after its timer has been set anew, and pytest's handler would take it for its own."""
        self._quiet()

    def __call__(self, function: Callable[..., Any], *args: Any, within: float = 0, **keywords: Any) -> Interrupt | None:
        """Call the function, and interrupt it ``within`` so many seconds, or as many as its first calls have taken. Those are
        not interrupted. Return the interrupt, if it came out of the call."""
        seconds = self._seconds[function.__name__]
        if not within and len(seconds) < 5:
            start = time.perf_counter()
            function(*args, **keywords)
            seconds.append(time.perf_counter() - start)
            return None
        longest = within or 1.5 * min(seconds) + 10e-6
        came = None
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
            came = error
        finally:
            self._left = 0
            self._quiet()
        return came

    def moments(self, most: int = 1_000_000) -> Iterator[int]:
        """Count up, until the time of a storm is over, or there were so many."""
        end = time.monotonic() + STORM
        for count in range(most):
            if time.monotonic() > end and self.raised >= 5:
                return
            yield count
