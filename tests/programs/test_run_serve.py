"""``mpbroadcast run`` and ``mpbroadcast serve``: whole programs, their signals, their exit status, and what they leave."""

import os
import pty
import re
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from mpbroadcast import connect
from tests.support.helpers import DEADLINE, receive_all, rest, wait_until
from tests.support.victims import Program, asleep, reached

MAIN = ("-m", "mpbroadcast")
PYTHON = ("--", sys.executable, "-c")
# Counts signals as the system delivers them: Python's own handler runs once for several that come close together.
COUNTS = """
import collections, os, signal, sys
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
for number in map(int, sys.argv[1:]):
    signal.signal(number, lambda *_: None)
print("ready", flush=True)
sys.stdin.readline()
print(*collections.Counter(os.read(reader, 100)).items(), flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ((*PYTHON, "raise SystemExit(5)"), 5, ""),
        (("--history", "1", "sh", "-c", "exit $1", "-x", "6", "--history"), 6, ""),  # the first word that is not an option
        (("--restart", "--no-restart", "true"), 0, ""),
        (("--histroy", "1", "--", "true"), 2, "usage: mpbroadcast run "),
        ((*PYTHON, "import os; os.kill(os.getpid(), 15)"), 143, ""),
        (("--", "sh", "-c", "yes | head -n 1 > /dev/null"), 0, ""),  # by SIGPIPE, which Python ignores
        (("--", "no-such-command"), 127, "mpbroadcast: no-such-command: command not found\n"),
        (("--", "/tmp"), 126, "mpbroadcast: /tmp: Permission denied\n"),
        (("--address", "/no/such/folder/x", *PYTHON, "pass"), 1, "mpbroadcast: "),
        ((), 2, "usage: "),
    ],
)
def test_the_exit_status_of_run(command: tuple[str, ...], code: int, error: str) -> None:
    """It is the command's, as a shell has it; else one line shows what is wrong."""
    with Program(*MAIN, "run", *command) as program:
        status, out, errors = program.end()
        assert (status, out) == (code, "")
        assert errors.startswith(error)
        assert code == 2 or errors.count("\n") == bool(error)


KILLS = """
import os, sys
from mpbroadcast import connect
with connect() as bus:
    os.kill(bus.stats().pid, 9)
sys.stdin.readline()
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("status", "expected"), [(0, 1), (3, 3)])
def test_run_reports_a_broker_lost_for_good_at_once(status: int, expected: int) -> None:
    """The command continues, and its failure wins over that of the broker."""
    reader, writer = os.pipe()
    command = (*MAIN, "run", "--no-restart", sys.executable, "-c", KILLS, str(status))
    with open(reader) as stdin, open(writer, "w") as line, Program(*command, stdin=stdin) as program:
        assert program.process.stderr
        error = program.process.stderr.readline()
        assert "is lost; the command continues" in error
        print(file=line, flush=True)
        assert program.end() == (expected, "", "")


# One broker after the other, until no other one is started.
KILLS_EACH = """
import os, sys
from mpbroadcast import connect
with connect() as bus:
    killed = []
    while len(killed) < 5:
        pid = bus.stats().pid
        if pid not in killed:
            os.kill(pid, 9)
            killed.append(pid)
print(sys.stdin.readline().strip(), flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("status", "expected"), [(0, 1), (3, 3)])
def test_run_reports_brokers_that_die_again_and_again(status: int, expected: int) -> None:
    """Each but the last is replaced; then there is one line, at once, and the command continues."""
    reader, writer = os.pipe()
    command = (*MAIN, "run", sys.executable, "-c", KILLS_EACH, str(status))
    with open(reader) as stdin, open(writer, "w") as line, Program(*command, stdin=stdin) as program:
        assert program.process.stderr
        errors: list[str] = []
        while not errors or not errors[-1].startswith("mpbroadcast: "):
            errors.append(program.process.stderr.readline())
            assert errors[-1], errors
        assert "is lost; the command continues without it" in errors[-1]
        assert sum("another one is started" in error for error in errors) == 4
        assert sum("it is given up" in error for error in errors) == 1
        print("continues", file=line, flush=True)
        assert program.end() == (expected, "continues\n", "")


def test_three_terminals(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``serve``, ``sub`` and ``pub`` meet without a name; without a broker the error names the command that starts one."""
    monkeypatch.delenv("MPBROADCAST_ADDRESS", raising=False)
    with Program(*MAIN, "pub", "room:1", "hello") as alone:
        status, out, errors = alone.end()
        assert (status, out, errors.count("\n")) == (1, "", 1)
        assert "`mpbroadcast serve`" in errors
    with Program(*MAIN, "serve") as serve:
        serve.line()
        with connect("default") as bus, Program(*MAIN, "sub", "--count", "2") as sub:
            wait_until(lambda: len(bus.stats().subscribers) == 1, DEADLINE)
            with Program(*MAIN, "pub", "room:1", "hello", "and good bye") as pub:
                assert pub.end() == (0, "", "")
            assert sub.end() == (0, "hello\nand good bye\n", "")
        os.kill(serve.pid, signal.SIGTERM)
        assert serve.end() == (0, "", "")


CONNECTS = """
import os, sys
from multiprocessing import Process
from mpbroadcast import connect

def work(number):
    with connect() as bus:
        bus.publish(number)

if __name__ == "__main__":
    with connect() as bus, bus.subscribe(replay=1) as channel:
        assert bus.address not in " ".join(sys.argv)
        for number in range(3):
            Process(target=work, args=(number,)).start()
        print(sorted(channel.recv(10) for _ in range(3)))
"""


@pytest.mark.parametrize("options", [(), ("--address", "myapp"), ("--restart",)])
def test_the_command_connects_without_an_address(options: tuple[str, ...], runtime: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CONNECTS)
    with Program(*MAIN, "run", *options, "--history", "1", "--", sys.executable, str(script)) as program:
        assert program.end() == (0, "[0, 1, 2]\n", "")
    assert not [*runtime.iterdir()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_reaches_the_command_once(number: signal.Signals, to_group: bool) -> None:
    """One to this process, and one to its group; the broker lives on until the command has ended."""
    reader, writer = os.pipe()
    command = (*MAIN, "run", *PYTHON, COUNTS, str(int(number)))
    with open(reader) as stdin, open(writer, "w") as line, Program(*command, stdin=stdin) as program:
        assert program.line() == "ready"
        (os.killpg if to_group else os.kill)(program.pid, number)
        wait_until(lambda: has_handled(program.pid, number))
        print(file=line, flush=True)
        assert program.end() == (7, f"({int(number)}, 1)\n", "")


def has_handled(pid: int, number: int) -> bool:
    """Return whether a signal does not wait for a process any more, and this sleeps again."""
    pending = re.search(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
    assert pending
    return not int(pending[1], 16) >> (number - 1) & 1 and asleep(pid)


def test_ctrl_c_on_a_terminal_reaches_the_command_once() -> None:
    """The terminal sends it to the whole foreground group, and nothing is forwarded then."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, *MAIN, "run", *PYTHON, COUNTS, str(int(signal.SIGINT))])
    out = b""
    try:
        while b"ready" not in out:
            out += os.read(terminal, 1000)
        (command,) = [child.pid for child in psutil.Process(pid).children() if os.getpgid(child.pid) == pid]
        for count in range(1, 21):  # two that come close together may be delivered as one, but not each time
            os.write(terminal, b"\x03")
            while out.count(b"^C") < count:  # which is shown when it has been sent
                out += os.read(terminal, 1000)
            wait_until(lambda: has_handled(pid, signal.SIGINT) and has_handled(command, signal.SIGINT))
        time.sleep(0.1)  # what is to show is that nothing comes
        os.write(terminal, b"\n")
        while b"(2, " not in out:
            out += os.read(terminal, 1000)
        assert b"(2, 20)" in out
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    finally:
        os.close(terminal)


def test_what_the_command_published_last_is_delivered(runtime: Path) -> None:
    """It is drained when the command has ended, and each channel ends."""
    publishes = "from mpbroadcast import connect; input(); bus = connect(); bus.publish_many(range(1000)); bus.close()"
    reader, writer = os.pipe()
    command = (*MAIN, "run", "--address", "myapp", *PYTHON, publishes)
    with open(reader) as stdin, Program(*command, stdin=stdin) as program:
        bus = wait_until(lambda: reached("myapp"), DEADLINE)
        with bus, bus.subscribe() as channel:
            channel.fileno()
            os.write(writer, b"\n")
            os.close(writer)
            assert rest(channel) == [*range(1000)]
        assert program.end() == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [False, True])
def test_serve_until_a_signal(number: signal.Signals, to_group: bool, runtime: Path, tmp_path: Path) -> None:
    """One ready line; then it drains, and leaves nothing. systemd gets both states."""
    address = f"@{tmp_path}" if to_group else str(tmp_path / "notify")  # one of no file system, or a path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, pytest.MonkeyPatch.context() as patch:
        notified.bind(address.replace("@", "\0"))
        notified.settimeout(DEADLINE)
        patch.setenv("NOTIFY_SOCKET", address)
        with Program(*MAIN, "serve", "myapp") as program:
            assert program.line() == f"mpbroadcast: ready at {runtime / 'mpbroadcast-myapp'}"
            assert notified.recv(100) == b"READY=1"
            with connect("myapp") as bus, bus.subscribe() as channel:
                bus.publish_many(range(100))
                bus.flush()
                (os.killpg if to_group else os.kill)(program.pid, number)
                messages, error = receive_all(channel)
                assert (messages, type(error)) == ([*range(100)], EOFError)
            assert program.end() == (0, "", "")
            assert notified.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("restart", [False, True])
def test_a_signal_to_all_processes_of_serve(restart: bool, runtime: Path) -> None:
    """The broker does not end by the SIGTERM that a service manager sends to it, but behind what ``serve`` does then."""
    with Program(*MAIN, "serve", "myapp", *([] if restart else ["--no-restart"])) as program:
        program.line()
        with connect("myapp") as bus, bus.subscribe() as channel:
            others = [process for process in program.processes() if process.pid != program.pid]
            assert len(others) == 1 + restart
            # Nor does a terminal stop it, with Ctrl-Z or Ctrl-\\ to the group of ``serve``.
            assert os.getsid(program.pid) not in {os.getsid(process.pid) for process in others}
            for process in others:
                process.terminate()
                wait_until(lambda process=process: has_handled(process.pid, signal.SIGTERM))  # type: ignore[misc]
            bus.publish("it goes on")
            assert channel.recv(DEADLINE) == "it goes on"
            os.kill(program.pid, signal.SIGTERM)
            assert rest(channel) == []
        assert program.end() == (0, "", "")


@pytest.mark.parametrize("restart", [False, True])
def test_serve_when_its_broker_is_killed(restart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End with an error, or go on with the next one, at the same address and with the same key."""
    monkeypatch.chdir(tmp_path)
    with Program(*MAIN, "serve", "./myapp", *([] if restart else ["--no-restart"])) as program:
        address = program.line().removeprefix("mpbroadcast: ready at ")
        with connect(address) as bus:
            broker = psutil.Process(bus.stats().pid)
            broker.kill()
            if restart:
                wait_until(lambda: bus.stats().pid != broker.pid)
                os.kill(program.pid, signal.SIGTERM)
        status, _out, errors = program.end()
        assert status == (not restart)
        assert ("has ended" in errors) == (not restart)
    assert not os.path.exists(address)
    assert not os.path.exists(address + ".key")


@pytest.mark.parametrize("command", ["run", "serve"])
def test_one_line_when_the_address_is_in_use(command: str, runtime: Path) -> None:
    with Program(*MAIN, "serve", "myapp") as program:
        program.line()
        arguments = {"run": ("--address", "myapp", "--", "true"), "serve": ("myapp",)}[command]
        with Program(*MAIN, command, *arguments) as other:
            status, out, errors = other.end()
            assert (status, out) == (1, "")
            assert errors.startswith("mpbroadcast: the address")
            assert errors.count("\n") == 1
        os.kill(program.pid, signal.SIGTERM)
        assert program.end()[0] == 0
