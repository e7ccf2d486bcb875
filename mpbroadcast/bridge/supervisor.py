"""The supervisor: a small process that starts the bridge's process, and another one when that has died or hangs.

::

    caller ── starts ──▶ a new interpreter ── forks, and ends ──▶ supervisor ── forks ──▶ the bridge's process
      ▲                                                            │     ▲                      │
      └── a pipe: the configuration, the stop, reports ────────────┘     └── a pipe: the same, ─┘
                                                                              signs of life

So the bridge is no child of the caller, which has nothing to reap, and a signal to the caller's process group or terminal does
not reach it. The end of either pipe shows the death at its other end. Processes that were forked from the caller keep copies of
the caller's end, so the supervisor looks at the caller itself, too.

The supervisor carries no messages, and imports no engine. When it dies, the bridge's process ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Final

import psutil

from mpbroadcast.bridge.control import ENDED, SETTLED, Configuration, Report, Stop
from mpbroadcast.bridge.timing import SILENCE, BackOff, Watch

_INTERVAL: Final = 1.0  # seconds from one look at the other processes to the next
_STEADY: Final = 5.0  # seconds behind which a process that dies is replaced at once
_GRACE: Final = 10.0  # seconds that the end may take beyond the time without progress that the stop gives
_TRIES: Final = 3  # processes that die before no other one is started to send what waits, once the bridge is to end


def main(caller: Connection) -> None:
    """Leave the caller, and supervise until the bridge has ended. The configuration comes from the pipe ``caller``."""
    try:
        configuration: Configuration = caller.recv()
        starter = psutil.Process(os.getppid())
        if starter.pid == configuration.caller and not os.fork():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a caller that ignores it hands that on
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            Supervisor(caller, starter, configuration).run()
    except (EOFError, OSError, psutil.NoSuchProcess):
        pass  # the caller has gone
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class Supervisor:
    """Keeps one process of the bridge at work until the bridge is to end."""

    def __init__(self, caller: Connection, starter: psutil.Process, configuration: Configuration) -> None:
        self._caller = caller
        self._starter = starter
        self._configuration = configuration
        self._stop: Stop | None = None
        self._is_settled = False  # True once the caller reads no more reports, until it stops the bridge
        self._is_terminated = False

    def run(self) -> None:
        """Start a process, and another one when it dies, until one has ended for good."""
        signal.signal(signal.SIGTERM, self._terminate)
        back_off = BackOff(0.1, 5.0)
        tries = 0
        while True:
            began = time.monotonic()
            code = self._run_one()
            tries += self._stop is not None
            if code == ENDED or tries >= _TRIES:
                return
            pause = back_off.pause()
            if time.monotonic() - began > _STEADY:
                back_off.reset()
                pause = 0.0
            if self._stop is None and wait([self._caller], pause):
                self._look_at_caller()

    def _terminate(self, *_: object) -> None:
        self._is_terminated = True

    def _run_one(self) -> int:
        """Start a process, and return its exit code once it has ended; negative if a signal has ended it."""
        ours, theirs = Pipe()
        child = os.fork()
        if not child:
            ours.close()
            self._caller.close()
            _be_bridge(self._configuration, theirs)
        theirs.close()
        with ours:
            self._watch(ours)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it hangs; one that has closed its end is ending
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _watch(self, process: Connection) -> None:
        """Hand on reports and the stop, until the process has ended, or hangs."""
        watch = Watch(_INTERVAL)
        watch.begin(time.monotonic())
        is_asked, is_stopping = False, False
        while True:
            ready = wait([process] if self._stop else [process, self._caller], _INTERVAL)
            if process not in ready:
                self._look_at_caller()
            try:
                if self._stop is not None and not is_stopping:
                    is_stopping = True
                    process.send(self._stop)
                if process in ready:
                    report: Report | None = process.recv()
                    watch.begin(time.monotonic())
                    if report is None:
                        is_asked = False
                    else:
                        self._hand_on(report)
                elif watch.silence(time.monotonic()) > self._patience():
                    return
                elif not is_asked:
                    is_asked = True
                    process.send(None)  # it returns the same; nothing more is written to one that does not read
            except (EOFError, OSError):
                return

    def _patience(self) -> float:
        """Return for how many seconds the process may give no sign of life."""
        if self._stop is None or self._stop.timeout is None:
            return SILENCE
        return min(SILENCE, self._stop.timeout + _GRACE)

    def _look_at_caller(self) -> None:
        """Find out whether the bridge is to end."""
        if self._stop is not None:
            return
        try:
            if self._caller.poll():
                self._stop = self._caller.recv()
            elif self._is_terminated or not self._starter.is_running() or self._starter.status() == psutil.STATUS_ZOMBIE:
                self._stop = Stop()
        except (EOFError, OSError, psutil.Error):
            self._stop = Stop()

    def _hand_on(self, report: Report) -> None:
        if not self._is_settled or self._stop is not None:
            with contextlib.suppress(OSError):
                self._caller.send(report)
            patient = self._configuration.is_patient
            self._is_settled |= report[0] in SETTLED or (report[0] == "at work" and not patient)


def _be_bridge(configuration: Configuration, supervisor: Connection) -> None:
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from mpbroadcast.bridge.process import run

        run(configuration, supervisor)
        code = ENDED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
