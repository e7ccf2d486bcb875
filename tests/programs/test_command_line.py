"""What takes long of the command line: a million lines, and the measurements."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, start_broadcaster

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("programs")]
COMMAND = (sys.executable, "-m", "mpbroadcast")
LINES = 1_000_000


def test_a_million_lines(tmp_path: Path, record_property: Any) -> None:
    """All are published, and each comes, in order; the rate is printed. On an idle machine it is 200,000 lines/s and more."""
    lines = tmp_path / "lines"
    lines.write_text("".join(f"line {number}\n" for number in range(LINES)))
    bus: Broadcaster[str]
    with start_broadcaster(address=tmp_path / "bus") as bus, bus.subscribe() as channel:
        start = time.monotonic()
        with lines.open() as source:
            publisher = subprocess.Popen([*COMMAND, "pub", "--address", bus.address], stdin=source)
        for number in range(LINES):
            assert channel.recv(60) == f"line {number}"
        assert publisher.wait(60) == 0
        rate = LINES / (time.monotonic() - start)
    record_property("lines per second", round(rate))
    print(f"{rate:,.0f} lines/s")


def test_bench_prints_its_figures() -> None:
    """A row for each measurement, to standard output, with no options."""
    done = subprocess.run([*COMMAND, "bench"], capture_output=True, text=True, timeout=200, check=True)
    assert done.stderr == ""
    rows = done.stdout.splitlines()
    assert len(rows) == 10
    assert [row for row in rows[2:7] if not float(row.split()[-1]) > 0] == []
