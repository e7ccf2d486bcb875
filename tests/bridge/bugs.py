"""Bugs put in on purpose, each a change of one text in a copy of the package: the chaos run must find every one.

    python -m tests.bridge.bugs --engine redis [words]

runs it for each bug, or those whose name has one of the words, and prints what was found. The exit status is 0 if each bug was
found as what the table expects, within some runs with different seeds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
RUNS: Final = 3
TIMEOUT: Final = 400.0  # seconds for a run


class Bug(NamedTuple):
    """What is wrong, the text of a module that is replaced, what the run needs for it to matter, and what it must find."""

    name: str
    module: str
    text: str
    replacement: str
    finds: str  # a regular expression
    options: str = ""

    def changed(self) -> str:
        """Return the module with the bug.

        :raises ValueError: the text is not there once.
        """
        source = (ROOT / "mpbroadcast" / self.module).read_text()
        if source.count(self.text) != 1:
            raise ValueError(f"{self.module} has the text of {self.name!r} {source.count(self.text)} times")
        return source.replace(self.text, self.replacement)


KILLS: Final = "--only kill_bridge kill_supervisor kill_engine --pause 0.3"
DROPS: Final = "--overflow drop_oldest --capacity 100000 --only stop_engine cut_off kill_bridge"

BUGS: Final = [
]


def find(bug: Bug, engine: str, seconds: float) -> str:
    """Run with a bug until it is found; return what was found, or an empty text and print all that came."""
    with tempfile.TemporaryDirectory(prefix="bug-") as folder:
        shutil.copytree(ROOT / "mpbroadcast", Path(folder, "mpbroadcast"), ignore=shutil.ignore_patterns("__pycache__"))
        os.symlink(ROOT / "tests", Path(folder, "tests"))
        Path(folder, "mpbroadcast", bug.module).write_text(bug.changed())
        environment = {**os.environ, "PYTHONPATH": folder}
        for seed in range(1, RUNS + 1):
            words = ["-m", "tests.bridge.chaos", "--engine", engine, "--seed", str(seed), "--seconds", str(seconds)]
            command = [sys.executable, *words, "--pause", "0.5", *bug.options.split()]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
            found = re.findall(r"^WRONG (.*)$", done.stdout, flags=re.MULTILINE)
            if any(re.match(bug.finds, one) for one in found):
                return "; ".join(one.partition(",")[0] for one in found)
            print(f"{bug.name}, seed {seed}: exit status {done.returncode}", done.stdout, done.stderr[-3000:], sep="\n", flush=True)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="redis")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    missed = []
    for bug in BUGS:
        if not options.words or any(word in bug.name for word in options.words):
            found = find(bug, options.engine, options.seconds)
            print(f"{bug.name}: {found or 'NOT FOUND'}", flush=True)
            missed += [] if found else [bug.name]
    print(f"not found: {missed}" if missed else "all were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
