"""The load program of the benchmarks runs, and loses nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from tests.unit.test_structure import ROOT


def test_a_short_run_loses_nothing_and_leaves_nothing() -> None:
    """Ended early by SIGTERM: the report comes, and nothing is lost, wrong, or left behind."""
    program = [sys.executable, "-m", "benchmarks.load", "--smoke", "--seed", "1"]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        while "subscriptions" not in (line := process.stdout.readline()):  # they are there
            assert line
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    assert "losses             0; otherwise wrong: 0" in output
    assert output.endswith("left behind        nothing\n")
