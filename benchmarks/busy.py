"""A machine that has other things to do: one spinning process a core, beside what is measured."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# It looks for its parent every few hundredths of a second, and so ends also when that was killed.
_SPIN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    """``count`` processes that do nothing but use a CPU each, for the length of a ``with``."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-I", "-c", _SPIN, str(os.getpid())], stdin=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def busy_note(count: int) -> str:
    """Return what a title adds for so many spinning processes: nothing for none."""
    return f", beside {count} spinning process(es)" if count else ""
