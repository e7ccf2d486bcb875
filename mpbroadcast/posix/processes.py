"""Peer processes: which of them are dead.

Where the kernel has pidfds, a death is an event in the broker's own poll. A process ID alone is not an identity: a pidfd is
taken while its process is known to live. Elsewhere the broker calls :meth:`PeerProcess.is_dead` once a second, which compares
the process ID *and* the start time, and counts a zombie as dead.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

import psutil

from mpbroadcast.deadline import Deadline
from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.waiting import Steps, Wait

_PAUSE: Final = 0.01  # seconds, where a death is no event


def birth(pid: int) -> float:
    """Return when the process began, which distinguishes it from a later one with its ID; 0 if that is not known."""
    if pid <= 0:
        return 0.0
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return 0.0  # it shows another PID namespace, in which the ID is another process's
        with open(f"/proc/{pid}/stat", "rb") as file:
            return float(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        pass
    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, ValueError):
        return 0.0


class PeerProcess:
    """A peer process. ``pid`` 0: it is in another PID namespace, and only the end of its connections shows its death.

    :raises ProcessLookupError: it is dead already.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = -1  # readable from the moment of its death; -1 where that is not to be had
        self._process: psutil.Process | None = None
        if pid <= 0:
            return
        try:
            self.fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except (AttributeError, OSError):  # the system has none, forbids it, or no descriptor is left: ask instead
            try:
                self._process = psutil.Process(pid)
            except psutil.NoSuchProcess:
                raise ProcessLookupError(f"process {pid} has ended") from None

    @property
    def must_be_asked(self) -> bool:
        """True if its death is no event."""
        return self._process is not None

    def is_dead(self) -> bool:
        """Return True if it is dead, for one that must be asked."""
        if self._process is None:
            return False
        try:
            return not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except (psutil.Error, OSError):  # it cannot be asked, as no descriptor is left
            return False

    def fileno(self) -> int:
        return self.fd

    def waiting(self, timeout: float | None) -> Steps[bool]:
        """Wait until it is dead, for at most ``timeout`` seconds. Return True if it is, or if this object is closed."""
        deadline = Deadline(timeout)
        if self.fd >= 0:
            return (yield Wait(deadline, IN, self))
        while self._process is not None and not self.is_dead():
            if deadline.remaining() == 0:
                return False
            yield Wait(Deadline(_PAUSE))
        return True

    def send_signal(self, signal_number: int) -> None:
        """Send it a signal, and none to another process that has got its ID."""
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if self.fd >= 0:
                signal.pidfd_send_signal(self.fd, signal_number)
            elif self._process is not None:
                self._process.send_signal(signal_number)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
