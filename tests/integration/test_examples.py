"""Each Python block of README and docs/ is a whole script that runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import SCRIPTS, Block


@pytest.mark.parametrize("block", SCRIPTS, ids=lambda block: block.name)
def test_a_script_runs_as_pasted(block: Block, tmp_path: Path) -> None:
    """End by itself, print what the page shows, and raise and warn of nothing."""
    script = tmp_path / "example.py"
    script.write_text(block.text)
    # Unbuffered, as in many containers, a line of print() is two writes, and those of processes may mix.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path, check=False)
    errors = done.stderr
    if "restart=True" in block.text:  # a broker that dies is worth a line in the log
        errors = re.sub(r"mpbroadcast broker \d+: ERROR: .* another one is started\n", "", errors)
    assert (done.returncode, errors) == (0, ""), done.stdout
    assert done.stdout.strip(), "an example that prints nothing shows nothing"
    if block.output is not None:
        assert done.stdout == block.output
