"""Whether a process that the broker serves still lives, with and without pidfds."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from psutil import _pslinux

from mpbroadcast.posix.processes import PeerProcess
from tests.support.helpers import wait_until


@pytest.fixture
def no_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system has none, or forbids it."""

    def refuse(*_: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)


def test_another_process_of_the_same_number_is_not_taken_for_it(no_pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no pidfds, a process with the same number, but started at another time, means that the first is dead."""
    peer = PeerProcess(os.getpid())
    assert peer.must_be_asked
    assert not peer.is_dead()
    started = _pslinux.Process.create_time

    def later(self: Any, *args: Any, **keywords: Any) -> float:
        return float(started(self, *args, **keywords)) + 100.0

    monkeypatch.setattr(_pslinux.Process, "create_time", later)
    assert peer.is_dead()


def test_a_process_that_has_ended_is_no_peer(no_pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without pidfds a process that has ended is refused, and one that ends while it is looked at is dead."""
    pid = os.fork()
    if not pid:
        signal.pause()
    peer = PeerProcess(pid)
    assert not peer.is_dead()
    os.kill(pid, signal.SIGKILL)
    wait_until(peer.is_dead)  # a zombie still
    os.waitpid(pid, 0)
    assert peer.is_dead()
    with pytest.raises(ProcessLookupError):
        PeerProcess(pid)
    monkeypatch.undo()
    with pytest.raises(ProcessLookupError):
        PeerProcess(pid)


@pytest.fixture
def ended() -> Iterator[int]:
    """A child that has ended and that nobody has asked for: a zombie."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield pid
    os.waitpid(pid, 0)


def test_nobody_asks_of_a_process_elsewhere() -> None:
    """Process 0 is one that this system has no number for: nothing is known of it, and it is no error."""
    peer = PeerProcess(0)
    assert (peer.pid, peer.fd, peer.must_be_asked, peer.is_dead()) == (0, -1, False, False)


def test_a_zombie_is_dead(ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no pidfds, one that has ended counts as dead before anybody has waited for it."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    peer, me = PeerProcess(ended), PeerProcess(os.getpid())
    assert (peer.must_be_asked, peer.is_dead()) == (True, True)
    assert (me.must_be_asked, me.is_dead()) == (True, False)


@pytest.mark.parametrize(("error", "dead"), [(psutil.NoSuchProcess(1), True), (psutil.AccessDenied(1), False)])
def test_an_answer_that_cannot_be_had(error: Exception, dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that goes while it is asked for is dead; one that may not be asked for is not."""

    def status(_: psutil.Process) -> str:
        raise error

    monkeypatch.delattr(os, "pidfd_open", raising=False)
    peer = PeerProcess(os.getpid())
    monkeypatch.setattr(psutil.Process, "status", status)
    assert peer.is_dead() is dead
