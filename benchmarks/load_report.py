"""What ``python -m benchmarks.load`` reports at its end, and the search for what it has left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from benchmarks.load_books import DELIVERED, ENDED, EXACT, LOST, MISSED, OVERFLOWED, WRONG, Board

_MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One look at the broker and the counters."""

    at: float  # seconds, of time.monotonic()
    memory: float  # bytes of the broker's own
    files: float  # descriptors of the broker
    published: int  # messages, since the start
    delivered: int


@dataclass(frozen=True)
class Report:
    """What is known of a run. Times are seconds, memory is bytes, ``shmem`` was taken before the start, in KiB."""

    board: Board
    start: float
    samples: Sequence[Sample]
    kills: int
    emptied: int  # the broker's memory when it had no client any more
    ran: tuple[float, float]  # seconds that the broker had a CPU, and waited for one
    shmem: int

    def lines(self) -> list[str]:
        """The lines of the report."""
        total, board = self.board.total, self.board
        first, last = self.samples[0], self.samples[-1]
        warm = [sample for sample in self.samples if sample.at - self.start >= (last.at - self.start) / 4]
        memory = [f"{size / _MIB:.1f}" for size in (first.memory, last.memory, self.emptied)]
        return [
            f"after {last.at - self.start:.1f} s, {self.kills} processes killed:",
            f"messages           {sum(board.published):,}; {sum(board.timeouts):,} were not published in their timeout",
            f"deliveries         {total(DELIVERED):,}, each checked",
            f"subscriptions      {total(ENDED):,} ended with a balance, {total(EXACT):,} exact to the message",
            f"losses             {total(LOST):,}; otherwise wrong: {total(WRONG):,}",
            f"gaps               {total(MISSED):,} counted as missed; {total(OVERFLOWED):,} were disconnected",
            f"broker's memory    {memory[0]} MiB, at the end {memory[1]}, without clients {memory[2]}; "
            + _slope([(sample.at, sample.memory / _MIB) for sample in warm], "MiB"),
            f"broker's files     {first.files:,.0f}, at the end {last.files:,.0f}; "
            + _slope([(sample.at, sample.files) for sample in warm], "descriptors"),
            f"broker's CPU       {self.ran[0]:.1f} s, and {self.ran[1]:.1f} s in which others had the CPU",
            f"Shmem              {self.shmem / 1024:.1f} MiB before, {shared_memory() / 1024:.1f} after",
            f"longest publish    {max(board.longest) / 1e6:.2f} s; longest flush {max(board.longest_flush) / 1e6:.2f} s",
        ]


def _slope(points: list[tuple[float, float]], unit: str) -> str:
    if len(points) < 3:
        return "too short for a slope"
    return f"{3600 * statistics.linear_regression(*zip(*points, strict=True)).slope:+,.1f} {unit} an hour"


def shared_memory() -> int:
    """KiB of shared memory on this machine, of all processes; 0 where the system has no such number."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("Shmem:"):
                return int(line.split()[1])
    return 0


def seconds_on_cpu(pid: int) -> tuple[float, float]:
    """How long this process had a CPU, and how long it could have run and had none; zeros where that is not known."""
    with contextlib.suppress(OSError):
        ran, waited, *_ = pathlib.Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()
        return int(ran) / 1e9, int(waited) / 1e9
    return 0.0, 0.0


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/dev/fd"))


def left_behind(folder: pathlib.Path, files: int) -> list[str]:
    """Child processes, the broker's folder, and descriptors of this process beyond the ``files`` that there were before."""
    gc.collect()
    left = [f"process {child.pid}" for child in psutil.Process().children(recursive=True) if _matters(child)]
    left += [f"file {folder}"] if folder.exists() else []
    more = open_files() - files
    return left + ([f"{more} descriptors"] if more > 0 else [])


def _matters(child: psutil.Process) -> bool:
    """Whether it is not one of those that multiprocessing starts for itself, and keeps."""
    with contextlib.suppress(psutil.Error):
        return not any("resource_tracker" in part or "forkserver" in part for part in child.cmdline())
    return False
