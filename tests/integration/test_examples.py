"""Each Python block of README and docs/ is a whole script that runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import README, ROOT, SCRIPTS, Block


def run_script(script: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *flags, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        # Unbuffered, as in many containers: a line of print() is two writes then, and those of several processes may mix.
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        cwd=script.parent,
        check=False,
    )


@pytest.mark.parametrize("block", SCRIPTS, ids=lambda block: block.name)
def test_a_script_runs_as_pasted(block: Block, tmp_path: Path) -> None:
    """Each Python block is a whole script: it ends by itself, prints what the page shows, and raises and warns of nothing."""
    script = tmp_path / "example.py"
    script.write_text(block.text)
    done = run_script(script)
    errors = done.stderr
    if "restart=True" in block.text:  # a broker that dies is worth a line in the log
        errors = re.sub(r"mpbroadcast broker \d+: ERROR: .* another one is started\n", "", errors)
    assert (done.returncode, errors) == (0, ""), done.stdout
    assert done.stdout.strip(), "an example that prints nothing shows nothing"
    if block.output is not None:
        assert done.stdout == block.output


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_first_example_runs_under_each_start_method(method: str, tmp_path: Path) -> None:
    """The README's first example needs no particular start method."""
    text = next(block.text for block in SCRIPTS if block.page == README)
    guard = re.search(r"""^if __name__ == ["']__main__["']:\n""", text, flags=re.MULTILINE)
    assert guard, "the first example has no guarded main program"
    script = tmp_path / "example.py"
    chosen = f'    __import__("multiprocessing").set_start_method("{method}")\n'
    script.write_text(text[: guard.end()] + chosen + text[guard.end() :])
    done = run_script(script)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
