"""Whether a process that the broker serves still lives, with and without pidfds."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

import psutil
import pytest
from psutil import _pslinux

from mpbroadcast.posix.processes import PeerProcess
from tests.support.helpers import wait_until


@pytest.fixture
def no_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system forbids them."""

    def refuse(*_: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)


def test_another_process_of_the_same_number_is_not_taken_for_it(no_pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no pidfds, a process with the same number, but started at another time, means that the first is dead."""
    peer = PeerProcess(os.getpid())
    assert (peer.must_be_asked, peer.is_dead()) == (True, False)
    started = _pslinux.Process.create_time
    monkeypatch.setattr(_pslinux.Process, "create_time", lambda *args, **keywords: started(*args, **keywords) + 100.0)
    assert peer.is_dead()


def test_a_process_that_has_ended_is_no_peer(no_pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfds, a zombie is dead. With and without them a process that has ended is refused."""
    pid = os.fork()
    if not pid:
        signal.pause()
    peer = PeerProcess(pid)
    assert not peer.is_dead()
    os.kill(pid, signal.SIGKILL)
    wait_until(peer.is_dead)
    os.waitpid(pid, 0)
    assert peer.is_dead()
    for _ in range(2):
        with pytest.raises(ProcessLookupError):
            PeerProcess(pid)
        monkeypatch.undo()


def test_a_process_elsewhere_is_not_asked_for() -> None:
    """Process 0 is one that this system has no number for: nothing is known of it, and it is no error."""
    peer = PeerProcess(0)
    assert (peer.pid, peer.fd, peer.must_be_asked, peer.is_dead()) == (0, -1, False, False)


@pytest.mark.parametrize(
    ("error", "dead"),
    [(psutil.NoSuchProcess(1), True), (psutil.AccessDenied(1), False), (OSError(errno.EMFILE, "none is left"), False)],
)
def test_an_answer_that_cannot_be_had(error: Exception, dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a system without pidfds: one that goes while it is asked for is dead; one that may not be asked for is not."""

    def status(_: Any) -> str:
        raise error

    monkeypatch.delattr(os, "pidfd_open", raising=False)
    peer = PeerProcess(os.getpid())
    monkeypatch.setattr(psutil.Process, "status", status)
    assert peer.is_dead() is dead
