"""Traps: a process is hit by a signal at a moment of a call, by the process itself, so that no test sleeps and hopes.

At moments at which the victim waits in the kernel, it only notes that, and the test sends the signal once it sees it sleep.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, cast

import psutil

from mpbroadcast import Broadcaster, trap_points
from tests.support.helpers import DEADLINE, wait_until
from tests.support.victims import stopped

INTERRUPTED: Final = 130  # exit code of who was ended by Ctrl-C
DEAF: Final = ("broker", "supervisor")  # they ignore Ctrl-C, and are in the test's own group
WAITING: Final = ("blocked", "draining", "idle")  # moments at which the victim sleeps in the kernel
IN_RING: Final = 100_000  # bytes of a message that goes through a ring


@dataclass(frozen=True)
class Trap:
    """Hits the process that it was put into with a signal at a moment, once, from when it is armed on.

    What has happened stands in files in ``folder``: they outlive whoever is killed, and all processes see them.
    """

    folder: str
    victim: str
    signal: signal.Signals
    moment: str

    def _file(self, name: str) -> Path:
        return Path(self.folder, name)

    def arm(self) -> None:
        """From now on it springs."""
        self._file("armed").touch()

    @property
    def armed(self) -> bool:
        """Whether it springs at the next occasion."""
        return self._file("armed").exists() and not self.sprung

    @property
    def sprung(self) -> bool:
        """Whether it has."""
        return self._file("sprung").exists()

    @property
    def companions(self) -> list[int]:
        """The victim's own processes at that moment; for a bystander, a broker or a supervisor, that one."""
        return [int(pid) for pid in self._file("sprung").read_text().split()]

    def spring(self) -> None:
        """This is the moment: if it is armed, hit this process, or note that it will wait now, for the test to hit it."""
        if not self.armed:
            return
        if self.victim == "bystander":
            self._note(self._fork_bystander())
            return
        if self.victim in DEAF:
            self._note(os.getpid())
        else:
            self._note(*(child.pid or 0 for child in multiprocessing.active_children()))
        if self.moment in WAITING:
            return
        if self.victim == "supervisor" and self.moment != "replacing":
            self._hit_supervisor()
        else:
            self.hit(os.getpid())

    def _hit_supervisor(self) -> None:
        """In the broker, which stays where it is until its supervisor is dead or stopped, if that is what becomes of it."""
        supervisor = os.getppid()
        self.hit(supervisor)
        if self.signal == signal.SIGKILL:
            wait_until(lambda: os.getppid() != supervisor)
        elif self.signal == signal.SIGSTOP:
            wait_until(lambda: stopped(supervisor))

    def hit(self, pid: int) -> None:
        """Send the signal; Ctrl-C goes to all of the group that the victim leads, if it leads one."""
        if self.signal == signal.SIGINT and self.victim not in DEAF:
            os.killpg(pid, self.signal)
        else:
            os.kill(pid, self.signal)

    def _note(self, *pids: int) -> None:
        passing = self._file("passing")
        passing.write_text(" ".join(map(str, pids)))
        passing.rename(self._file("sprung"))

    def _fork_bystander(self) -> int:
        """A child that has all handles of this process, and duplicates of its pipes and sockets, is hit right here."""
        kept = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(("pipe:", "socket:", "/memfd:")):
                    kept.append(os.dup(int(name)))  # nothing in the child knows of these, and so nothing closes them
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.setsid()  # in a mere group of its own, its parent's end would wake it
                self.hit(os.getpid())
            os._exit(INTERRUPTED)
        for descriptor in kept:
            os.close(descriptor)
        os.waitpid(pid, os.WUNTRACED)
        return pid

    def returned(self) -> int:
        """How many messages the victim has published, as far as ``publish`` has returned."""
        with contextlib.suppress(FileNotFoundError):
            return self._file("returned").stat().st_size
        return 0

    def count_one(self) -> None:
        """In the victim: ``publish`` has returned."""
        with self._file("returned").open("ab") as file:
            file.write(b".")


def spring_at(point: str, trap: Trap, when: Callable[[Any], bool] = lambda _: True) -> None:
    """The trap springs at the trap point of this name, if ``when`` says yes to its subject; also in forked processes."""

    def reach(name: str, subject: object = None) -> None:
        if name == point and trap.armed and when(subject):
            trap.spring()

    trap_points.reach = reach


# ------------------------------------------------------------------------------------ publishers, subscribers, starters


def set_trap(trap: Trap) -> None:
    """In a publisher, subscriber or starter: lead a group of its own, take signals as they come, and set the trap."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if trap.moment == "mid-frame":
        os.environ["MPBROADCAST_INLINE"] = "1"
    reader = trap.victim == "subscriber"
    match trap.moment:
        case "connecting":
            spring_at("connected", trap)
        case "handshake":
            spring_at("answering", trap, lambda _: _send_half_first(trap))
        case "pipe in flight":
            spring_at("waiting for a reply", trap, _has_come_with_a_pipe)
        case "mid-frame" if reader:
            spring_at("waiting for messages", trap, lambda stream: any(stream.chunks))
        case "mid-frame":
            spring_at("sending the last piece", trap)
        case "mid-ring" | "mid-memory" if reader:
            Bait.trap, Bait.read = trap, _bytes_read()
        case "mid-ring":
            spring_at("populating a ring", trap)
        case "mid-memory":
            _trap_half_in_memory(trap)
        case "memory in flight":
            spring_at("taking memory" if reader else "publishing memory", trap)
        case "idle" if reader:
            spring_at("waiting for messages", trap)
        case "draining" if trap.victim == "starter":
            spring_at("ending the broker", trap)


def blocked(fd: int, bus: Broadcaster[Any]) -> bool:
    """Whether a full backlog is what this publisher waits for; else its pipe is full for a moment only."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while not poll.poll(1):
        if any(row.stalls for row in bus.stats().subscribers):
            return not poll.poll(50)  # what was read last may have left room
    return False


def _has_come_with_a_pipe(asked: tuple[str, socket.socket]) -> bool:
    """Whether this is a request for a pipe; its reply is there then."""
    poll = select.poll()
    poll.register(asked[1], select.POLLIN)
    return asked[0] in ("publisher", "open") and bool(poll.poll(1000 * DEADLINE))


def _patch(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function, in this process, for good, by what ``make`` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


def _send_half_first(trap: Trap) -> bool:
    """The trap springs when half of what comes next is sent, and not here."""

    def make(original: Callable[..., int]) -> Callable[..., int]:
        def send(connection: socket.socket, data: bytes) -> int:
            if not trap.armed:
                return original(connection, data)
            sent = original(connection, data[: len(data) // 2])
            trap.spring()
            return sent

        return send

    _patch(socket.socket, "send", make)
    return False


def _trap_half_in_memory(trap: Trap) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def writev(descriptor: int, parts: Any) -> int:
            if not trap.armed:
                return int(original(descriptor, parts))
            data = b"".join(parts)
            written = int(original(descriptor, [data[: len(data) // 2]]))
            trap.spring()
            return written

        return writev

    _patch(os, "writev", make)


def _bytes_read() -> int:
    """How many bytes this process has read so far, from files, pipes and sockets."""
    return int(psutil.Process().io_counters().read_chars)


class Bait(str):
    """Springs the trap of the process that unpickles it, if it did not come through the pipe."""

    __slots__ = ()
    trap: Trap | None = None
    read = 0  # bytes that this process had read when it unpickled the last one

    def __reduce__(self) -> tuple[Any, ...]:
        return Bait.taken, (str(self),)

    @staticmethod
    def taken(text: str) -> str:
        """What it is for its reader."""
        if Bait.trap is not None:
            before, Bait.read = Bait.read, _bytes_read()
            if Bait.read - before < IN_RING:
                Bait.trap.spring()
        return text


# -------------------------------------------------------------------------------------------------------------- brokers

_BROKERS_POINTS: Final = {
    "replacing": "restoring",
    "connecting": "accepting",
    "handshake": "checking a key",
    "pipe in flight": "replied with descriptors",
    "mid-frame": "routing",
    "mid-ring": "routing",
    "mid-memory": "fetched memory",
    "memory in flight": "sent memory",
}


def run_with_trap(trap: Trap, run: Callable[..., None], *args: Any) -> None:
    """Set the trap, then be a broker; or its supervisor, from which each broker inherits the trap."""
    points = _BROKERS_POINTS | ({"replacing": "replacing"} if trap.victim == "supervisor" else {})
    if trap.moment in points:
        spring_at(points[trap.moment], trap)
    run(*args)


def trapping(method: str, trap: Trap) -> BaseContext:
    """A start method whose processes have a trap in them."""
    context: Any = type(multiprocessing.get_context(method))()
    process = context.Process

    def make(*args: Any, target: Callable[..., None], **keywords: Any) -> BaseProcess:
        made: BaseProcess = process(*args, target=partial(run_with_trap, trap, target), **keywords)
        return made

    context.Process = make
    return cast(BaseContext, context)
