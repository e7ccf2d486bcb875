"""Bridges of two versions: of entries in another format, and at a broker that another version has replaced."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bridge.servers import RedisServer, redis_server
from tests.support.helpers import DEADLINE, wait_until
from tests.support.versions import ANNOUNCES, Environment, environments, without_checkout
from tests.support.victims import Program

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("versions")]

MAIN = ("-m", "mpbroadcast")
# Bridges a broker, once a line has come.
BRIDGES = """
import sys
import mpbroadcast
from mpbroadcast.bridge import bridge

with mpbroadcast.connect(sys.argv[1]) as bus:
    print("connected", flush=True)
    sys.stdin.readline()
    try:
        bridge(bus, start_timeout=20)
    except mpbroadcast.VersionMismatch as error:
        print("VersionMismatch", error)
"""


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Environment]]:
    """The environments with the builds."""
    with without_checkout():
        yield environments(tmp_path_factory.mktemp("versions"))


@pytest.fixture
def server(leaves_nothing: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """An engine, and the key, which the commands have from their environment."""
    monkeypatch.setenv("MPBROADCAST_BRIDGE_KEY", "the key of all machines")
    with redis_server() as started:
        monkeypatch.setenv("MPBROADCAST_BRIDGE_URL", started.url)
        yield started


def row(environment: Environment, address: str) -> dict[str, Any]:
    """Return the statistics of the bridge."""
    code, out, errors = environment.ended(*MAIN, "stats", "--json", "--address", address)
    assert (code, errors) == (0, "")
    (found,) = json.loads(out)["bridges"].values()
    return dict(found)


def test_entries_of_another_format(builds: dict[str, Environment], server: RedisServer, tmp_path: Path) -> None:
    """They are skipped and counted, and the log has the format, not damage; the bridges stay up."""
    sides = [(builds[name], str(tmp_path / name)) for name in ("this", "newer")]
    with contextlib.ExitStack() as stack:
        serving = []
        for environment, address in sides:
            arguments = (*MAIN, "serve", address, "--bridge", server.url)
            serving.append(stack.enter_context(environment.program(*arguments)))
            assert serving[-1].line() == f"mpbroadcast: ready at {address}"
        for environment, address in sides:  # each announces its origin to the others, again and again
            code, _, errors = environment.ended(*MAIN, "pub", "topic", "--address", address)
            assert (code, errors) == (0, "")
        wait_until(lambda: row(*sides[0])["refused"] > 0, DEADLINE)
        assert row(*sides[0])["state"] == "up"
        logs = []
        for program in serving:
            os.kill(program.pid, signal.SIGTERM)
            code, _, errors = program.end()
            assert code == 0
            logs.append(errors)
    assert "an entry of 'mpbroadcast' was refused" in logs[0]
    assert "it has format 2 of entries, and this bridge 1: install the same version" in logs[0]
    assert "signature" not in logs[0]


def replaced(stack: contextlib.ExitStack, old: Program, newer: Environment, address: str) -> None:
    """Kill a broker and its supervisor, and let one of another version serve at the address."""
    old.kill()
    old.end()
    program = stack.enter_context(newer.program(*MAIN, "serve", address))
    assert program.line() == f"mpbroadcast: ready at {address}"


def test_a_bridge_at_work_ends_when_another_version_serves(
    builds: dict[str, Environment], server: RedisServer, tmp_path: Path
) -> None:
    """It ends at once, and the log names both; it does not wait for the next broker, and no other one is started."""
    address = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(builds["this"].program(*MAIN, "serve", address, "--restart"))
        assert old.line() == f"mpbroadcast: ready at {address}"
        command = stack.enter_context(builds["this"].program(*MAIN, "bridge", "--address", address))
        assert command.line().startswith("mpbroadcast: ready")
        pid = row(builds["this"], address)["pid"]
        os.kill(pid, signal.SIGSTOP)  # else it may look for a broker while there is none, and end for that reason
        replaced(stack, old, builds["newer"], address)
        os.kill(pid, signal.SIGCONT)
        code, _, errors = command.end()
        assert code == 1
    assert "the bridge of 'mpbroadcast' ends: version mismatch" in errors
    assert ANNOUNCES["this"] in errors
    assert ANNOUNCES["newer"] in errors
    assert "Traceback" not in errors


def test_bridge_raises_it(builds: dict[str, Environment], server: RedisServer, tmp_path: Path) -> None:
    """``bridge`` with a handle from before raises ``VersionMismatch`` in the caller."""
    address = str(tmp_path / "s")
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stdin = stack.enter_context(os.fdopen(reader))
        old = stack.enter_context(builds["this"].program(*MAIN, "serve", address, "--restart"))
        assert old.line() == f"mpbroadcast: ready at {address}"
        program = stack.enter_context(builds["this"].program("-c", BRIDGES, address, stdin=stdin))
        assert program.line() == "connected"
        replaced(stack, old, builds["newer"], address)
        os.close(writer)
        code, out, errors = program.end()
        assert code == 0
    assert out.startswith("VersionMismatch version mismatch")
    assert ANNOUNCES["newer"] in out
    assert "Traceback" not in errors
