"""The command line: each command in a pipeline, with real shells, files and closed ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from mpbroadcast import Broadcaster, start_broadcaster
from mpbroadcast.client import publishing
from tests.support.helpers import DEADLINE, wait_until

Bus = Broadcaster[Any]
COMMAND = f"{shlex.quote(sys.executable)} -m mpbroadcast"
UNBLOCK = f"{shlex.quote(sys.executable)} -c 'import os; os.set_blocking({{}}, False)'"


class Shell:
    """Runs lines of shell, in which ``$mpb`` is the command, beside a broker that it finds by the environment."""

    def __init__(self, bus: Bus, folder: Path) -> None:
        self.bus = bus
        self.folder = folder
        self.environment = os.environ | {"MPBROADCAST_ADDRESS": bus.address, "mpb": COMMAND}
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, line: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a line of shell, in a process group of its own."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            ["/bin/sh", "-c", line],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=self.folder,
            env=self.environment | environment,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def subscribe(self, line: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a line of shell, and wait until it has subscribed."""
        count = len(self.bus.stats().subscribers)
        process = self.start(line, **environment)
        wait_until(lambda: len(self.bus.stats().subscribers) > count, DEADLINE)
        return process

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with start_broadcaster(address=tmp_path / "bus", history=1000) as bus:
        started = Shell(bus, tmp_path)
        yield started
        started.end()


def outcome(process: subprocess.Popen[bytes], written: bytes | None = None) -> tuple[int, bytes, bytes]:
    """Return the status of a line of shell, and what it has printed, to standard output and standard error."""
    printed, errors = process.communicate(written, timeout=2 * DEADLINE)
    return process.returncode, printed, errors


PUBLISHED: dict[str, tuple[str, list[object]]] = {
    "messages": (r"$mpb pub t one 'two  ' -- --three", ["one", "two  ", "--three"]),
    "JSON messages": (r"""$mpb pub t '{"a": 1}' --json 2""", [{"a": 1}, 2]),
    "lines": (r"printf 'one\n\n  two \r\nlast' | $mpb pub t", ["one", "", "  two \r", "last"]),
    "bytes that are no UTF-8": (r"printf 'caf\303\251\nno\377\n' | $mpb pub t", ["café", "no\udcff"]),
    "lines that end in NUL": (r"printf 'a\nb\000c\000' | $mpb pub t -0", ["a\nb", "c"]),
    "values": (r"""printf '{"a": [1, null]}\n"x"\n2.5' | $mpb pub t --json""", [{"a": [1, None]}, "x", 2.5]),
    "files": (r"printf 'x\ny' > f; : > g; $mpb pub t --file f g", [b"x\ny", b""]),
    "nothing": (r"$mpb pub t < /dev/null", []),
    "an output that is not read": ("$mpb stats | true", []),
    "a slow producer": (r"(echo one; sleep 0.2; printf tw; sleep 0.2; echo o) | $mpb pub t", ["one", "two"]),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_pub_publishes(case: str, shell: Shell) -> None:
    """Lines as they are, JSON values, files as bytes; UTF-8 in any locale."""
    line, messages = PUBLISHED[case]
    channel = shell.bus.subscribe("t")
    assert outcome(shell.start(line, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")) == (0, b"", b"")
    shell.bus.unsubscribe(channel)
    assert [*channel] == messages


def test_a_line_is_published_when_it_has_come(shell: Shell) -> None:
    """The one behind it is not waited for, also where a read does not block."""
    channel = shell.bus.subscribe()
    process = shell.start(f"{UNBLOCK.format(0)}; $mpb pub")
    assert process.stdin
    for line in ("one", "two"):
        process.stdin.write(f"{line}\nha".encode())
        process.stdin.flush()
        assert channel.recv(DEADLINE).removeprefix("ha") == line
    assert outcome(process, b"lf") == (0, b"", b"")
    assert channel.recv(DEADLINE) == "half"


WRONG = {
    "no JSON": (r"printf '1\n2\n{\n4\n' | $mpb pub t --json", 1, "line 3 is not JSON", [1, 2]),
    "JSON of another encoding": (r"printf '1\n\"\351\"\n' | $mpb pub t --json", 1, "line 2 is not JSON", [1]),
    "NaN": (r"echo NaN | $mpb pub t --json", 1, "line 1 is not JSON", []),
    "nested JSON": (f"{sys.executable} -c 'print(\"[\" * 200000)' | $mpb pub t --json", 1, "line 1 is not JSON", []),
    "no file": (r": > f; $mpb pub t --file f g h", 1, "'g'", [b""]),
    "no broker": (r"$mpb pub t --address ./none < /dev/null", 1, "none", []),
    "a long topic": (r"echo x | $mpb pub $(printf %02000d 0)", 1, "1024", []),
    "no input": (r"$mpb pub t <&-", 0, "", []),
    "lines of files": (r"$mpb pub t -0 --file f", 2, "-0 is about lines", []),
    "no seconds": (r"$mpb sub --timeout -1", 2, "--timeout", []),
    "no interval": (r"$mpb top --interval 0", 2, "--interval", []),
    "two forms": (r"$mpb pub t --file f --json", 2, "not allowed with", []),
    "files and messages": (r"$mpb pub t hello --file f", 2, "usage: mpbroadcast pub ", []),
    "NUL and messages": (r"$mpb pub t -0 hello", 2, "-0 is about", []),
    "a message that is not JSON": (r"$mpb pub t --json 1 {", 1, "message 2 is not JSON", [1]),
    "a wrong command": (r"$mpb pubb t", 2, "did you mean pub?", []),
    "a wrong option": (r"$mpb sub --tiemout 3", 2, "did you mean --timeout?", []),
    "a wrong word": (r"$mpb stats t", 2, "usage: mpbroadcast stats ", []),
    "a wrong shell": (r"$mpb completion bsh", 2, "did you mean bash?", []),
    "two addresses": (r"$mpb serve a --address b", 2, "usage: mpbroadcast serve ", []),
    "no option": (r"$mpb sub --nonsense", 2, "unrecognized arguments", []),
    "no count": (r"$mpb sub --count 0", 2, "--count", []),
    "no command": (r"$mpb", 2, "usage", []),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_clear_line(case: str, shell: Shell) -> None:
    """With status 1, or 2 for a wrong usage; what stands before it is published, and nothing behind it."""
    line, status, text, messages = WRONG[case]
    channel = shell.bus.subscribe("t")
    code, printed, errors = outcome(shell.start(line))
    assert (code, printed) == (status, b"")
    assert text in errors.decode()
    assert status == 2 or errors.count(b"\n") == status
    shell.bus.unsubscribe(channel)
    assert [*channel] == messages


def printed_by(shell: Shell, line: str, *messages: object, **environment: str) -> tuple[int, bytes, bytes]:
    """Return the outcome of a line of shell that has subscribed before these are published."""
    process = shell.subscribe(line, **environment)
    for message in messages:
        shell.bus.publish(message, topic="room:1")
    return outcome(process)


class Hostile:
    """Would write a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)


PRINTED = {
    "a text": ("café", b"caf\xc3\xa9", "café"),
    "bytes that were no UTF-8": ("no\udcff", b"no\xff", "no\udcff"),
    "half a character": ("\ud800", b"\\ud800", "\ud800"),
    "lines": ("a\nb\r\n\x85\u2028", rb"a\nb\r\n\x85\u2028", "a\nb\r\n\x85\u2028"),
    "values": ([1, None, {"a": (True, 2.5)}], b"[1, None, {'a': (True, 2.5)}]", [1, None, {"a": [True, 2.5]}]),
    "bytes": (b"x\n", rb"b'x\n'", repr(b"x\n")),
    "a set in a list": ([{1}], b"[{1}]", ["{1}"]),
    "no number": ([float("nan")], b"[nan]", "[nan]"),
    "keys": ({(1, 2): 3}, b"{(1, 2): 3}", "{(1, 2): 3}"),
    "numbers as keys": ({1: 2}, b"{1: 2}", {"1": 2}),
    "large bytes": (bytes(1 << 20), repr(bytes(1 << 20)).encode(), repr(bytes(1 << 20))),
}


def test_sub_prints_a_line_for_each_message(shell: Shell) -> None:
    """A text as it is, anything else as its ``repr``, in any locale; also where a write does not block."""
    line = f"{UNBLOCK.format(1)}; $mpb sub 'room:*' --count {len(PRINTED)}"
    messages = [message for message, _, _ in PRINTED.values()]
    lines = b"".join(line + b"\n" for _, line, _ in PRINTED.values())
    assert printed_by(shell, line, *messages, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") == (0, lines, b"")


def test_sub_prints_json(shell: Shell) -> None:
    """What has no form there is its ``repr``."""
    messages = [message for message, _, _ in PRINTED.values()]
    status, printed, errors = printed_by(shell, f"$mpb sub --json --count {len(messages)}", *messages)
    assert (status, errors) == (0, b"")
    rows = [json.loads(line) for line in printed.decode().splitlines()]
    assert [row["message"] for row in rows] == [value for _, _, value in PRINTED.values()]
    assert {(*row, row["topic"]) for row in rows} == {("id", "topic", "message", "room:1")}
    assert sorted({row["id"] for row in rows}) == [row["id"] for row in rows]


def test_sub_refuses_what_is_not_plain(shell: Shell) -> None:
    """Code does not run, each is a line on standard error, and the count goes on; also with large buffers."""
    process = shell.subscribe("$mpb sub --count 2")
    for data in (Hostile(), numpy.zeros(100_000), numpy.zeros(10), {"x": complex(1, 2)}, 10**5000):
        shell.bus.publish(data)
    with unittest.mock.patch.object(publishing, "dumps", return_value=b"\x80\x05" + b"]" * 200_000 + b"a" * 199_999 + b"."):
        shell.bus.publish("a list in a list in a list ...")
    for message in ("one", "two"):
        shell.bus.publish(message)
    status, printed, errors = outcome(process)
    assert (status, printed) == (0, b"one\ntwo\n")
    lines = errors.decode().splitlines()
    assert [line for line in lines if "refused" in line] == lines
    reasons = ("posix.system", "large buffers", "numpy", "builtins.complex", "4300 digits", "recursion")
    assert [reason for reason, line in zip(reasons, lines, strict=True) if reason not in line] == []
    assert not (shell.folder / "hostile").exists()
    status, printed, errors = printed_by(shell, "$mpb sub --pickle --count 2", Hostile(), "after")
    assert (status, printed) == (0, b"0\nafter\n")
    assert (shell.folder / "hostile").exists()


ENDS: dict[str, tuple[str, int, bytes, str]] = {
    "a reader of one line": ("$mpb sub | head -1", 0, b"one\n", ""),
    "nothing more": ("$mpb sub --timeout 0.5", 0, b"one\ntwo\n", ""),
    "nothing more, and not all": ("$mpb sub --timeout 0.5 --count 3", 1, b"one\ntwo\n", "2 of 3"),
    "all": ("$mpb sub --timeout 60 --count 2 < /dev/null", 0, b"one\ntwo\n", ""),
    "a full disk": ("$mpb sub > /dev/full", 1, b"", "No space left"),
    "no output": ("$mpb sub --count 1 >&-", 0, b"", ""),
}


@pytest.mark.parametrize("case", ENDS)
def test_sub_ends(case: str, shell: Shell) -> None:
    """With its status, and a line where one is due; also while nothing more comes."""
    line, status, printed, text = ENDS[case]
    code, lines, errors = printed_by(shell, line, "one", "two")
    assert (code, lines) == (status, printed)
    assert text in errors.decode()
    assert errors.count(b"\n") == bool(text)


def test_sub_ends_with_the_broadcaster(shell: Shell) -> None:
    """Behind what was published, with status 0, or 1 where that is less than the count; and at Ctrl-C."""
    processes = [shell.subscribe(f"exec $mpb sub {option}") for option in ("", "--count 2", "--json")]
    shell.bus.publish("one")
    stdout = processes[2].stdout
    assert stdout
    assert json.loads(stdout.readline())["message"] == "one"
    processes[2].send_signal(signal.SIGINT)
    assert outcome(processes[2]) == (0, b"", b"")
    shell.bus.close()
    assert outcome(processes[0]) == (0, b"one\n", b"")
    status, printed, errors = outcome(processes[1])
    assert (status, printed, errors.count(b"\n")) == (1, b"one\n", 1)


def test_a_gap_is_a_line_on_standard_error(tmp_path: Path) -> None:
    """Another broker takes over: the subscription goes on."""
    with start_broadcaster(address=tmp_path / "bus", restart=True) as bus:
        shell = Shell(bus, tmp_path)
        process = shell.subscribe("$mpb sub --count 2")
        bus.publish("one")
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"one\n"
        os.kill(bus.stats().pid, signal.SIGKILL)
        assert b"gap: the broker has died" in process.stderr.readline()
        bus.publish("two")
        assert outcome(process) == (0, b"two\n", b"")


def test_sub_resumes_and_shares(shell: Shell) -> None:
    """``--after`` starts behind an id, and ``--timeout 0`` gives all that is there; a group's lines are all finished."""
    shell.bus.publish_many(["one", "two", "three"])
    status, printed, errors = outcome(shell.start("$mpb sub --after 0 --timeout 0 --json"))
    rows = [json.loads(line) for line in printed.splitlines()]
    assert (status, [row["message"] for row in rows], errors) == (0, ["one", "two", "three"], b"")
    assert outcome(shell.start(f"$mpb sub --after {rows[0]['id']} --count 2")) == (0, b"two\nthree\n", b"")
    assert outcome(shell.start(f"$mpb sub --after {rows[2]['id'] + 9} --count 1"))[:2] == (0, b"one\n")
    members = [shell.subscribe("$mpb sub jobs --group workers --count 2") for _ in range(2)]
    with shell.bus.subscribe("jobs", group="workers"):
        shell.bus.publish_many(["a", "b", "c", "d", "e"], topic="jobs")
        printed_lines = [line for member in members for line in outcome(member)[1].split()]
        wait_until(lambda: len(shell.bus.stats().subscribers) == 1)
        assert (len(printed_lines), shell.bus.stats().groups["workers"].lost) == (4, 0)
