"""The processes of a snapshot, as the system knows them."""

from __future__ import annotations

import os
import re
from typing import Final

import psutil

from mpbroadcast import BrokerStats
from mpbroadcast.cli.figures import Process

_SECRET: Final = re.compile(r"(?<=//)\S*@|(?<=[?&]password=)[^&\s]*")


class Processes:
    """Looks processes up by PID, and keeps the command lines of those that live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[psutil.Process, str]] = {}

    def of(self, stats: BrokerStats) -> dict[int, Process]:
        """Return what is known of each process of a snapshot; of another PID namespace, nothing is."""
        pids = {row.pid for row in stats.subscribers} | {row.pid for row in stats.publisher_rows}
        self._known = {pid: known for pid, known in self._known.items() if pid in pids}
        return {pid: self._look_up(pid) for pid in pids if pid}

    def _look_up(self, pid: int) -> Process:
        try:
            process, command = self._known.get(pid) or (psutil.Process(pid), "")
            with process.oneshot():
                is_alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
                command = command or shortened(process.cmdline()) or f"[{process.name()}]"
        except psutil.Error:
            return Process(self._known[pid][1] if pid in self._known else "", False)
        if is_alive:
            self._known[pid] = process, command
        return Process(command, is_alive)


def shortened(words: list[str]) -> str:
    """Return a command line without the folder of its program, and without what is secret in a URL."""
    return _SECRET.sub("", " ".join((os.path.basename(words[0]), *words[1:]))) if words else ""
