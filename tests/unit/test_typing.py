"""The annotations, as type checkers see them: ``typing_uses.py`` has right uses, and wrong ones that must be errors."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_right_uses_are_accepted_and_wrong_ones_are_not(checker: str) -> None:
    """In strict mode, an error without its comment is an error, and so is a comment without its error."""
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed: it comes with the extra `dev`")
    command = [sys.executable, "-m", checker]
    if checker == "pyright" and subprocess.run([*command, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("pyright cannot be had: its package loads the program itself when it is first used")
    command += ["--pythonpath", sys.executable] if checker == "pyright" else ["--strict"]
    command.append("tests/unit/typing_uses.py")
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
