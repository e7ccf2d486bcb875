"""Threads that share a handle and a channel, in a program of its own: also on a Python without the GIL, where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mpbroadcast

ROOT = Path(mpbroadcast.__file__).parent.parent

MANY_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from mpbroadcast import start_broadcaster

SIZES = (20, 3_000, 20, 60_000, 400_000, 20, 2_500_000)

def publish(publisher):
    for index in range(70):
        bus.publish((publisher, index, bytes([index]) * SIZES[index % 7]), topic=str(publisher % 2))

def receive():
    numbers = []
    for publisher, index, data in channel:
        assert data == bytes([index]) * SIZES[index % 7]
        numbers.append((publisher, index))
    assert sorted(numbers, key=itemgetter(0)) == sorted(numbers)
    return numbers

with ThreadPoolExecutor(16) as threads, start_broadcaster() as bus:
    channel = bus.subscribe("0", "1")
    receiving = [threads.submit(receive) for _ in range(8)]
    assert len([*threads.map(publish, range(8))]) == 8
    bus.flush()
    bus.unsubscribe(channel)
    received = [number for thread in receiving for number in thread.result()]
    assert sorted(received) == [(publisher, index) for publisher in range(8) for index in range(70)]
    print("in turn" if getattr(sys, "_is_gil_enabled", lambda: True)() else "parallel")
"""


@pytest.mark.parametrize("python", [sys.executable, *filter(shutil.which, ("python3.13t", "python3.14t", "python3.15t"))])
def test_many_threads_use_one_handle_and_one_channel(python: str, tmp_path: Path) -> None:
    """Give each message once and whole, those of a thread in its order."""
    program = tmp_path / "program.py"
    program.write_text(MANY_THREADS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run([python, "-c", "import psutil"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no psutil")
    done = subprocess.run([python, program], env=environment, capture_output=True, text=True, check=False)
    parallel = python != sys.executable or bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "parallel\n" if parallel else "in turn\n", "")
