"""``mpbroadcast top`` and ``stats``: on a pseudo-terminal, in a pipe, and with many subscriptions."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, start_broadcaster
from tests.support.helpers import DEADLINE

Bus = Broadcaster[Any]
COMMAND = (sys.executable, "-m", "mpbroadcast")


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with start_broadcaster(address=tmp_path / "bus") as broadcaster:
        yield broadcaster


class Terminal:
    """A pseudo-terminal of some size, and the command that runs in it. ``shown`` is the text of the last screen."""

    def __init__(self, bus: Bus, columns: int, lines: int, *arguments: str, **environment: str) -> None:
        self.fd, theirs = pty.openpty()
        self.resize(columns, lines)
        known = {"TERM": "xterm-256color", "MPBROADCAST_ADDRESS": bus.address, "COLUMNS": "", "LINES": ""}
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [*COMMAND, "top", "--interval", "0.2", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | known | environment,
            preexec_fn=lambda: os.login_tty(theirs),  # noqa: PLW1509 (no lock is taken there)
            pass_fds=[theirs],
        )
        self._theirs = theirs
        self._read = ""
        self._decoded = codecs.getincrementaldecoder("utf-8")().decode  # a read may end within a character

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    @property
    def shown(self) -> list[str]:
        """The lines of the last whole screen, without colours."""
        screens = self._read.split("\x1b[H")
        return [line.rstrip() for line in re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", screens[-1]).splitlines()]

    def wait_for(self, predicate: Callable[[list[str]], bool]) -> list[str]:
        """Wait until the screen is so, and return its lines."""
        deadline = time.monotonic() + DEADLINE
        while not (self.shown and predicate(self.shown)):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.fd], [], [], 0.1)[0]:
                self._read += self._decoded(os.read(self.fd, 1 << 16))
        return self.shown

    def end(self) -> int:
        """Wait for the end of the command, and return its status. The terminal is as it was."""
        deadline = time.monotonic() + DEADLINE
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                self._read += self._decoded(os.read(self.fd, 1 << 16))
        assert termios.tcgetattr(self._theirs) == self.before
        return self.process.wait(DEADLINE)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self._theirs)


def rows_of(lines: list[str]) -> list[str]:
    """Return the rows of subscriptions: those with a room."""
    return [line for line in lines if "room:" in line and "with" not in line]


def test_top_on_a_terminal(bus: Bus) -> None:
    """Figures change, keys sort, filter and scroll, another size is taken at once, and ``q`` leaves the terminal as it was."""
    pytest.importorskip("rich")
    channels = [bus.subscribe(f"room:{number:03}", capacity=10_000, overflow="drop_oldest") for number in range(500)]
    for _ in range(100):
        bus.publish(bytes(100), topic="room:123")
    with Terminal(bus, 80, 24) as terminal:
        lines = terminal.wait_for(lambda lines: len(lines) == 24 and "1-" in lines[-1])
        assert max(map(len, lines)) <= 80
        assert "500 subscriptions (500 not open), 1 publishers" in lines[1]
        assert re.search(r"\(unopened\).* room:123 +oldest .*k/10k +\d\d$", rows_of(lines)[0])
        assert any("WAITS FOR" in line for line in lines)
        terminal.press("t")
        rows = rows_of(terminal.wait_for(lambda lines: "by TOPICS" in lines[-1]))
        assert [re.findall(r"room:\d+", row) for row in rows] == [[f"room:{number:03}"] for number in range(len(rows))]
        terminal.press("\x1b[F")
        terminal.wait_for(lambda lines: "of 500" in lines[-1] and "room:499" in rows_of(lines)[-1])
        terminal.resize(120, 40)
        terminal.wait_for(lambda lines: len(lines) == 40 and len(lines[2]) > 80 and "room:499" in rows_of(lines)[-1])
        terminal.press("/room:12\r")
        terminal.wait_for(lambda lines: len(rows_of(lines)) == 10 and "with 'room:12'" in lines[-1])
        channels[120].close()
        terminal.wait_for(lambda lines: len(rows_of(lines)) == 9)
        terminal.press("q")
        assert terminal.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, 0], ids=["Ctrl-C", "SIGTERM", "no broker"])
def test_what_ends_top(bus: Bus, number: int) -> None:
    """It leaves the terminal as it was; a broker that has ended is one line there."""
    pytest.importorskip("rich")
    with Terminal(bus, 80, 24) as terminal:
        terminal.wait_for(lambda lines: len(lines) == 24)
        if number == signal.SIGINT:
            terminal.press("\x03")
        elif number:
            terminal.process.send_signal(number)
        else:
            bus.close()
        assert terminal.end() == {signal.SIGINT: 0, signal.SIGTERM: 128 + number, 0: 1}[number]
        assert number or sum("mpbroadcast: " in line for line in terminal.shown) == 1


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"PYTHONPATH": "no rich"}], ids=["dumb", "without rich"])
def test_a_terminal_that_can_do_less_has_plain_text(environment: dict[str, str], bus: Bus, tmp_path: Path) -> None:
    """A report each interval; without rich, one line names the extra."""
    channel = bus.subscribe("room:1")
    if "PYTHONPATH" in environment:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rich'] = None\n")
        environment = {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}
    with Terminal(bus, 80, 24, **environment) as terminal:
        lines = terminal.wait_for(lambda lines: sum("room:1" in line for line in lines) == 3)
        assert [line for line in lines if "\x1b" in line] == []
        assert sum("mpbroadcast[cli]" in line for line in lines) == (environment.get("TERM") != "dumb")
        terminal.press("\x03")
        assert terminal.end() == 0
    channel.close()


def run(bus: Bus, *arguments: str) -> str:
    """Return what a command prints."""
    environment = os.environ | {"MPBROADCAST_ADDRESS": bus.address}
    done = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, timeout=2 * DEADLINE, check=True)
    assert done.stderr == b""
    return done.stdout.decode()


def test_what_top_and_stats_print(bus: Bus) -> None:
    """Text, JSON and Prometheus' format have the same figures."""
    with bus.subscribe("room:1", "é") as channel:
        bus.publish("x", topic="é")
        assert channel.recv(DEADLINE) == "x"
        snapshot = json.loads(run(bus, "stats", "--json"))
        assert (snapshot["published"], snapshot["subscribers"][0]["topics"]) == (1, ["room:1", "é"])
        assert 'mpbroadcast_subscription_delivered_messages_total{id="' in run(bus, "stats", "--prometheus")
        for text in (run(bus, "stats"), run(bus, "top", "--once", "--interval", "0.1")):
            (row,) = rows_of(text.splitlines())
            assert row.split()[0] == str(os.getpid())
            assert "room:1 é" in row
        shell = f"{sys.executable} -m mpbroadcast top --json --interval 0.1 --address {bus.address} | head -2"
        done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, timeout=2 * DEADLINE, check=True)
        assert done.stderr == b""
        for line in done.stdout.splitlines():
            (subscriber,) = json.loads(line)["subscribers"]
            assert (subscriber["rate_in"], subscriber["state"], subscriber["pid"]) == (0, "open", os.getpid())
            assert "python" in subscriber["command"] or "pytest" in subscriber["command"]
