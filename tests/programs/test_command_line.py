"""What takes long of the command line: a million lines, and the measurements."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, start_broadcaster
from tests.support.helpers import DEADLINE

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


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(tmp_path: Path) -> None:
    """Commands, options with their help, and only those of the command; the command of ``run``, as the shell completes it."""
    script = subprocess.run([*COMMAND, "completion", "fish"], capture_output=True, text=True, check=True).stdout
    assert "-l restart" not in script  # a hidden option
    for line, expected in (
        ("mpbroadcast st", ["stats"]),
        ("mpbroadcast pub --nu", ["--null"]),
        ("mpbroadcast top --nu", []),
        ("mpbroadcast run --no-restart --address x unam", ["uname"]),
        ("mpbroadcast run -- unam", ["uname"]),
    ):
        shell = ["fish", "--no-config", "-c", f"{script}\ncomplete -C '{line}'"]
        home = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run(shell, capture_output=True, text=True, check=True, env=home)
        assert [word.split("\t")[0] for word in done.stdout.splitlines()] == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes(tmp_path: Path) -> None:
    """Commands, options and the command of ``run``, with the tabulator key of an interactive shell."""
    script = subprocess.run([*COMMAND, "completion", "zsh"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "script").write_text(script)
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "HOME": str(tmp_path)}
    shell = subprocess.Popen(["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment)
    os.close(theirs)
    try:
        os.write(ours, b"autoload -Uz compinit; compinit -u -d dump; source ./script\n")
        for typed, expected in (
            (b"mpbroadcast sta\t", b"mpbroadcast stats "),
            (b"\x15mpbroadcast pub --nu\t", b"pub --null "),
            (b"\x15mpbroadcast run --history 1 unam\t", b"run --history 1 uname "),
            (b"\x15mpbroadcast run --topics a b -- unam\t", b"run --topics a b -- uname "),
        ):
            os.write(ours, typed)
            shown, deadline = b"", time.monotonic() + DEADLINE
            while expected not in shown:
                assert time.monotonic() < deadline, shown
                if select.select([ours], [], [], 0.1)[0]:
                    shown += os.read(ours, 1 << 16)
        os.write(ours, b"\x15exit\n")
        assert shell.wait(DEADLINE) == 0
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
