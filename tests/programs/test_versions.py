"""Programs of two versions at one address: each is refused with a text that names both, and nobody else notices.

The builds are in ``tests/support/versions.py``: this one, one with a higher protocol, and one that announces none and asks for
none, as all versions were at first.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from tests.support.helpers import wait_until
from tests.support.versions import ANNOUNCES, BUILDS, Environment, environments, without_checkout
from tests.support.victims import Program

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("versions")]

MAIN = ("-m", "mpbroadcast")
PAIRS = [*permutations(BUILDS, 2)]

CONNECTS = """
import os, sys
import mpbroadcast

address = sys.argv[1] if len(sys.argv) > 1 else os.environ["MPBROADCAST_ADDRESS"]
for connect in (mpbroadcast.connect, mpbroadcast.connect_or_start):
    try:
        connect(address).publish("from another version")
        print("connected")
    except (ConnectionError, ValueError) as error:
        print(type(error).__name__, error)
"""
# The package is upgraded once this process has imported its modules, which the first name does.
UPGRADES = """
import multiprocessing, pathlib, sys

sys.path.insert(0, sys.argv[1])
from mpbroadcast import start_broadcaster

path = pathlib.Path(sys.argv[1], "mpbroadcast/protocol/version.py")
path.write_text(path.read_text().replace("PROTOCOL: Final = 1", "PROTOCOL: Final = 22"))
try:
    start_broadcaster(context=multiprocessing.get_context("spawn"))
except Exception as error:
    print(type(error).__name__, error)
"""
# Each line of its input is published, and must come back.
NEIGHBOUR = """
import sys
import mpbroadcast

with mpbroadcast.connect(sys.argv[1]) as bus, bus.subscribe() as channel:
    print(channel.poll(0), flush=True)
    for line in sys.stdin:
        bus.publish(line.strip())
        print(channel.recv(20), flush=True)
"""


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Environment]]:
    """The environments with the builds."""
    with without_checkout():
        yield environments(tmp_path_factory.mktemp("versions"))


@contextlib.contextmanager
def neighbour(environment: Environment, address: str) -> Iterator[None]:
    """Meanwhile a program has a handle and an open channel; afterwards both work, and nothing else has come."""
    reader, writer = os.pipe()
    with (
        os.fdopen(reader) as stdin,
        os.fdopen(writer, "w", 1) as asks,
        environment.program("-c", NEIGHBOUR, address, stdin=stdin) as program,
    ):
        assert program.line() == "False"
        for word in ("before", "after"):
            print(word, file=asks)
            assert program.line() == word
            if word == "before":
                yield
        asks.close()
        assert program.end() == (0, "", "")


def check_refused(lines: list[str], client: str, broker: str, address: str) -> None:
    """Each call was refused: by an error that names the address, both protocols and both versions, where they are known."""
    assert len(lines) == 2
    for line in lines:
        if client == "silent":  # whose code this broker cannot change: it is a clear text, in a ValueError
            assert line.startswith("ValueError ")
            assert f"version mismatch: the broker has {ANNOUNCES[broker]}" in line
        else:
            assert line.startswith("VersionMismatch version mismatch: ")
            assert all(part in line for part in (address, ANNOUNCES[client], ANNOUNCES[broker], "install the same version"))
            newer = client == "this" and broker == "newer"
            assert ("restart this program" in line) == newer


def end_of(program: Program) -> list[str]:
    """End a broker that serves. Return the lines of its log."""
    os.kill(program.pid, signal.SIGTERM)
    code, _, errors = program.end()
    assert code == 0
    return errors.splitlines()


@pytest.mark.parametrize(("client", "broker"), PAIRS)
def test_two_versions_at_one_address(builds: dict[str, Environment], tmp_path: Path, client: str, broker: str) -> None:
    """``connect`` and ``connect_or_start`` are refused, also on a broker that was replaced. The log has one line for each."""
    address = str(tmp_path / "s")
    with builds[broker].program(*MAIN, "serve", address, "--restart") as serves:
        assert serves.line() == f"mpbroadcast: ready at {address}"
        with neighbour(builds[broker], address):
            code, out, errors = builds[client].ended("-c", CONNECTS, address)
            assert (code, errors) == (0, "")
            check_refused(out.splitlines(), client, broker, address)
            code, out, errors = builds[client].ended(*MAIN, "stats", "--address", address)
            assert (code, out, errors.count("\n")) == (1, "", 1)
            assert "version mismatch" in errors
        (child,) = (one for one in serves.processes() if one.ppid() != serves.pid and one.pid != serves.pid)
        child.kill()
        wait_until(lambda: len(serves.processes()) == 3)
        code, out, errors = builds[client].ended("-c", CONNECTS, address)
        check_refused(out.splitlines(), client, broker, address)
        log = [line for line in end_of(serves) if "version mismatch" in line]
    if broker == "silent":
        assert not log
    else:
        assert len(log) == 5
        known = "it announces no protocol" if client == "silent" else f"it has {ANNOUNCES[client]}"
        assert all(known in line and f"this broker has {ANNOUNCES[broker]}" in line for line in log)


@pytest.mark.parametrize(("client", "broker"), [("this", "newer"), ("newer", "this"), ("silent", "this"), ("this", "silent")])
def test_run_with_a_command_of_another_version(builds: dict[str, Environment], client: str, broker: str) -> None:
    """The command is refused, and ``run`` ends with its status."""
    python = str(builds[client].folder / "bin/python")
    code, out, errors = builds[broker].ended(*MAIN, "run", "--", python, "-c", CONNECTS + "sys.exit(7)")
    assert code == 7
    check_refused(out.splitlines(), client, broker, "")
    assert errors.count("version mismatch") == (0 if broker == "silent" else 2)
    assert "Traceback" not in errors


@pytest.mark.parametrize("client", BUILDS)
def test_one_version_in_two_environments(builds: dict[str, Environment], tmp_path: Path, client: str) -> None:
    """Each build serves its own, also with a broker that belongs to nobody."""
    address = str(tmp_path / "s")
    code = CONNECTS.replace("in (mpbroadcast.connect, ", "in (mpbroadcast.connect_or_start, ").replace(
        "connect(address)", "connect(address, **({'linger': 0.1} if connect is mpbroadcast.connect_or_start else {}))"
    )
    assert builds[client].ended("-c", code, address) == (0, "connected\nconnected\n", "")


def test_a_package_that_is_upgraded_under_a_program(builds: dict[str, Environment], tmp_path: Path) -> None:
    """A broker in a new interpreter has the other version: ``start_broadcaster`` raises it, and the broker has ended."""
    (package,) = builds["this"].folder.glob("lib/python*/site-packages/mpbroadcast")
    shutil.copytree(package, tmp_path / "mpbroadcast")
    code, out, errors = builds["this"].ended("-c", UPGRADES, str(tmp_path))
    assert code == 0
    assert out.startswith("VersionMismatch version mismatch")
    assert "protocol 22" in out
    assert "restart this program" in out
    assert "Traceback" not in errors
