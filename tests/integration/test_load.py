"""The load program of the benchmarks runs, and loses nothing."""

import os
import signal
import time

from tests.support.victims import Program


def test_a_short_run_loses_nothing_and_leaves_nothing() -> None:
    """Ended early by SIGTERM: the report comes, and nothing is lost, wrong, or left behind."""
    with Program("-m", "benchmarks.load", "--smoke", "--seed", "1") as program:
        while "subscriptions" not in program.line():  # they are there
            pass
        time.sleep(0.7)
        os.kill(program.pid, signal.SIGTERM)
        code, output, errors = program.end()
    assert code == 0, output + errors
    assert "losses             0; otherwise wrong: 0" in output
    assert output.endswith("left behind        nothing\n")
