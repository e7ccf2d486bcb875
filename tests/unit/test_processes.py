"""Whether a process that the broker serves still lives, with and without pidfds."""

import errno
import os
import signal
from unittest.mock import Mock

import psutil
import pytest

from mpbroadcast.posix.processes import PeerProcess
from tests.support.helpers import wait_until


def test_a_process_that_has_ended_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfds, a zombie is dead. With and without them a process that has ended is refused."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
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


@pytest.mark.parametrize(
    ("error", "dead"),
    [(psutil.NoSuchProcess(1), True), (psutil.AccessDenied(1), False), (OSError(errno.EMFILE, "none is left"), False)],
)
def test_an_answer_that_cannot_be_had(error: Exception, dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a system without pidfds: one that goes while it is asked for is dead; one that may not be asked for is not."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    peer = PeerProcess(os.getpid())
    monkeypatch.setattr(psutil.Process, "status", Mock(side_effect=error))
    assert peer.is_dead() is dead
