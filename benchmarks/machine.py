"""What the measurements were made with."""

from __future__ import annotations

import os
import pathlib
import platform
from collections.abc import Sequence
from multiprocessing.context import BaseContext

import psutil

from benchmarks.peers.base import Peer


def machine(context: BaseContext) -> list[str]:
    """The machine and the Python, a line each."""
    return [
        f"Python {platform.python_version()} ({platform.python_implementation()}), start method {context.get_start_method()}",
        f"{platform.system()} {platform.release()}, {platform.machine()}",
        f"{_processor()}, {os.cpu_count()} CPUs, {psutil.virtual_memory().total / (1 << 30):.0f} GiB of memory",
    ]


def _processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def versions(peers: Sequence[type[Peer]]) -> list[tuple[str, str, str, str]]:
    """Each peer's name, versions and setting, and what it does not promise."""
    return [(peer.name, peer.version(), peer.setting, peer.limits) for peer in peers]
