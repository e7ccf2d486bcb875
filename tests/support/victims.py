"""What the tests on deaths, ends and attacks start, kill and look at: process targets, whole programs, and probes."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import psutil

import mpbroadcast
from mpbroadcast import Broadcaster, Channel
from tests.support.helpers import DEADLINE, answer, wait_until

ROOT = Path(mpbroadcast.__file__).parent.parent
MARK = "MPBROADCAST_TEST_MARK"
SOON = 5.0  # seconds: the promise is one; a busy machine gets more


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def reached(address: str) -> Broadcaster[Any] | None:
    """Return a handle of the broker at an address, if one answers."""
    try:
        return mpbroadcast.connect(address)
    except mpbroadcast.BrokerLost:
        return None


def asleep(pid: int) -> bool:
    """Whether a process waits in a system call."""
    return psutil.Process(pid).status() == psutil.STATUS_SLEEPING


def stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def shared_maps(pid: int) -> int:
    """How many maps of shared memory a process has."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:mpbroadcast")


def memories(pid: int) -> int:
    """How many descriptors of such memory a process has."""
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found += "memfd:mpbroadcast" in os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def written(pid: int) -> int:
    """How many bytes a process has written so far, pipes included."""
    return psutil.Process(pid).io_counters().write_chars


def stalled(pid: int) -> bool:
    """Whether a process that wrote without pause does so no more, and sleeps."""
    before = written(pid)
    time.sleep(0.2)
    return written(pid) == before and asleep(pid)


def shared_counter() -> memoryview:
    """Return a number, at index 0, that processes made by fork share with the test; only one of them writes it."""
    return memoryview(mmap.mmap(-1, 8)).cast("Q")


def duplicate_handles() -> list[int]:
    """Duplicate the pipes, sockets and memory of this process: the library does not know of these, and closes none."""
    made = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(("pipe:", "socket:", "/memfd:")):
                made.append(os.dup(int(name)))
    return made


def held_subscriber(bus: Broadcaster[Any], report: Connection, is_replaced: bool = False) -> None:
    """Receive one message; then become another program, which lives on, or have a child that keeps all that is open."""
    channel = bus.subscribe()
    channel.recv(DEADLINE)
    if is_replaced:
        report.send(os.getpid())
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import signal; signal.pause()"])
    duplicate_handles()
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    report.send(child)
    while True:
        signal.pause()


def slow_reader(channel: Channel[Any], report: Connection, pause: float | None) -> None:
    """Read with pauses (``None``: on an order only) to the end; report the first part of each message, and the end."""
    channel.poll(0)
    report.send("open")
    if pause is None:
        answer(report)
    messages = []
    try:
        while True:
            messages.append(channel.recv(DEADLINE)[0])
            time.sleep(pause or 0)
    except (EOFError, mpbroadcast.BroadcastError) as error:
        report.send((messages, type(error).__name__))


class Program:
    """A whole program of its own, in its own session, whose every process can be found by a mark in its environment."""

    def __init__(self, *command: str, stdin: IO[str] | None = None, executable: str = sys.executable) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [executable, *command],
            stdin=stdin or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {MARK: self.mark},
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the program has ended: {self.end()}")
        return line.rstrip("\n")

    def end(self, timeout: float = 1.5 * DEADLINE) -> tuple[int, str, str]:
        """Return (exit code, standard output, standard error) once it and all its processes have ended."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            left = [process.cmdline() for process in self.processes()]
            self.kill()
            out, err = self.process.communicate(timeout=timeout)
            raise AssertionError(f"the program hangs; processes: {left}; it printed {out!r} and {err!r}") from None
        wait_until(lambda: not self.processes())
        return self.process.returncode, out, err

    def processes(self) -> list[psutil.Process]:
        """Its processes that still run, children and grandchildren included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        with self.process:
            pass  # its end closes the streams, and waits for the program
