"""``mpbroadcast bridge``, and ``--bridge`` of ``run`` and ``serve``: whole programs over an engine; and examples/bridge."""

import configparser
import contextlib
import http.client
import importlib.util
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, connect, start_broadcaster
from mpbroadcast.cli.main import parse
from tests.bridge.servers import RedisServer, free_port, redis_server
from tests.support.helpers import DEADLINE, take, wait_until
from tests.support.pages import ROOT
from tests.support.victims import Program

MAIN = ("-m", "mpbroadcast")
KEY = "a key of the tests"
PASSWORD = "not to be shown"
STREAM = "mpbroadcast"
Bus = Broadcaster[Any]

pytestmark = pytest.mark.usefixtures("runtime")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of all commands."""
    monkeypatch.setenv("MPBROADCAST_BRIDGE_KEY", KEY)


@pytest.fixture
def engine(leaves_nothing: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server with a password, whose URL the commands have from their environment."""
    with redis_server(password=PASSWORD.replace(" ", "-")) as server:
        monkeypatch.setenv("MPBROADCAST_BRIDGE_URL", server.url)
        yield server


@pytest.fixture
def bus(runtime: Path) -> Iterator[Bus]:
    """The broker that ``mpbroadcast bridge --address here`` finds."""
    with start_broadcaster(address="here") as started:
        yield started


def until_it_waits(program: Program, port: int) -> None:
    """Wait for the line by which a command shows that its engine is not there. The bridge's log comes before it."""
    assert program.process.stderr
    line = next(line for line in program.process.stderr if line.startswith("mpbroadcast: "))
    assert line.startswith(f"mpbroadcast: waiting: the engine at redis://127.0.0.1:{port}/0 was not reached within")


def end_of(program: Program) -> tuple[int, str, list[str]]:
    """Return the exit code, standard output, and the lines on standard error that are not the log of a bridge."""
    code, out, errors = program.end()
    return code, out, [line for line in errors.splitlines() if not line.startswith("mpbroadcast bridge ")]


def state(bus: Bus, stream: str = STREAM) -> str:
    """Return the state of a bridge; nothing, if the broker has none."""
    row = bus.stats().bridges.get(stream)
    return "" if row is None else row.state


def ended(*arguments: str) -> tuple[int, str, str]:
    """Return the exit code, standard output and standard error of a command that ends by itself."""
    with Program(*MAIN, *arguments) as program:
        return program.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bridge_beside_a_broker(number: signal.Signals, bus: Bus, engine: RedisServer, tmp_path: Path) -> None:
    """One ready line; messages of these topics pass in both directions; a signal ends it behind what waits, and the broker
    keeps its row for the next one, until that is forgotten. No argument list has the key or the password."""
    (tmp_path / "key").write_text(f"{KEY}\nanother key, of 16 bytes\n")
    options = ("--topics", "room:*", "news", "--overflow", "block", "--capacity", "1000000", "--max-age", "60")
    there = ("serve", "there", "--bridge", "--key-file", str(tmp_path / "key"))
    with Program(*MAIN, "bridge", "--address", "here", *options) as program, Program(*MAIN, *there) as other:
        assert program.line().startswith(
            f"mpbroadcast: ready, <mpbroadcast.bridge.Bridge of '{STREAM}' over redis://127.0.0.1:"
        )
        assert other.line().startswith("mpbroadcast: ready at ")
        assert (state(bus), bus.stats().bridges[STREAM].topics) == ("up", ("room:*", "news"))
        for process in (*program.processes(), *other.processes()):
            assert not [word for word in process.cmdline() if KEY in word or f"{engine.password}" in word or "redis://" in word]
        with connect("there") as far, far.subscribe("room:*", "other") as channel, bus.subscribe("news") as news:
            channel.fileno()
            far.publish("from there", topic="news")
            assert news.recv(DEADLINE) == "from there"
            for count in range(1000):
                bus.publish("not this", topic="other")
                bus.publish(count, topic="room:1")
            bus.flush(timeout=DEADLINE)
            os.kill(program.pid, number)
            assert take(channel, 1000) == [*range(1000)]
            assert program.end() == (0, "", "")
            assert state(bus) == "down"
            assert ended("bridge", "--forget", STREAM, "--address", "here") == (0, "", "")
            assert state(bus) == ""
            code, out, errors = ended("bridge", "--forget", STREAM, "--address", "here")
            assert (code, out) == (1, "")
            assert "keeps nothing for a bridge of the stream 'mpbroadcast'" in errors
        os.kill(other.pid, number)
        assert other.end() == (0, "", "")


def test_it_waits_for_its_engine(bus: Bus, engine: RedisServer) -> None:
    """One line shows that; a signal ends it, and leaves no row."""
    engine.kill()
    with Program(*MAIN, "bridge", "--address", "here") as program:
        until_it_waits(program, engine.port)
        os.kill(program.pid, signal.SIGTERM)
        assert end_of(program) == (0, "", [])
        assert state(bus) == ""
    for command in (("bridge", "--address", "here"), ("run", "--bridge", "--", sys.executable, "-c", "print('it runs')")):
        engine.kill()
        with Program(*MAIN, *command) as program:
            until_it_waits(program, engine.port)
            engine.restart()
            if command[0] == "bridge":
                assert program.line().startswith("mpbroadcast: ready, ")
                bus.close()
                code, out, errors = program.end()
                assert (code, out) == (1, "")
                assert "has gone, and so the bridge has ended" in errors.splitlines()[-1]
            else:
                assert program.end()[:2] == (0, "it runs\n")


def test_signals_while_run_waits_for_its_engine(engine: RedisServer) -> None:
    engine.kill()
    for command, code in ((("run", "--bridge", "--", "sleep", "100"), 128 + signal.SIGHUP), (("serve", "x", "--bridge"), 0)):
        with Program(*MAIN, *command) as program:
            until_it_waits(program, engine.port)
            os.kill(program.pid, signal.SIGHUP if command[0] == "run" else signal.SIGINT)
            assert end_of(program) == (code, "", [])


def test_what_makes_no_sense(bus: Bus, engine: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It ends with one line on standard error, in which no secret is, and the broker is as before."""
    wrong = engine.url.replace(f"{engine.password}", "wrong")
    (tmp_path / "short").write_text("short\n")
    for code, reason, arguments in (
        (1, "refuses", ("bridge", wrong, "--address", "here")),
        (1, "refuses", ("run", "--bridge", wrong, "--", "true")),
        (1, "no engine for the URL", ("bridge", "kafka://here", "--address", "here")),
        (1, "too short", ("bridge", "--key-file", str(tmp_path / "short"), "--address", "here")),
        (1, "No such file", ("bridge", "--key-file", str(tmp_path / "none"), "--address", "here")),
        (1, "max_bytes", ("bridge", "--max-bytes", "0", "--address", "here")),
        (1, "--max-age is an option of a bridge", ("run", "--max-age", "3", "--", "true")),
        (1, "--topics is an option of a bridge", ("serve", "x", "--topics", "a")),
        (1, "nowhere", ("bridge", "--address", "nowhere")),
        (2, "usage: ", ("bridge", "--overflow", "latest", "--address", "here")),
        (2, "usage: ", ("bridge", "--capacity", "much", "--address", "here")),
    ):
        status, out, errors = ended(*arguments)
        print(arguments, errors)
        assert (status, out) == (code, "")
        assert reason in errors
        assert "wrong" not in errors
        assert code == 2 or errors.count("\n") == 1
    monkeypatch.delenv("MPBROADCAST_BRIDGE_KEY")
    assert "MPBROADCAST_BRIDGE_KEY" in ended("bridge", "--address", "here")[2]
    monkeypatch.delenv("MPBROADCAST_BRIDGE_URL")
    assert "MPBROADCAST_BRIDGE_URL" in ended("bridge", "--address", "here")[2]
    assert state(bus) == ""


def test_the_broker_is_lost(engine: RedisServer) -> None:
    """Then the command ends with status 1; over a broker that is replaced it goes on."""
    with start_broadcaster(address="here", restart=True) as bus, Program(*MAIN, "bridge", "--address", "here") as program:
        program.line()
        pid = bus.stats().pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: bus.stats().pid != pid and state(bus) == "up", DEADLINE)
        assert program.process.poll() is None
        code, out, _ = ended("stats", "--json", "--address", "here")
        assert (code, json.loads(out)["bridges"][STREAM]["state"]) == (0, "up")
        supervisor = psutil.Process(bus.stats().pid).parent()
        assert supervisor is not None
        supervisor.kill()
        os.kill(bus.stats().pid, signal.SIGKILL)
        code, _, errors = program.end()
        assert code == 1
        assert "has gone" in errors


def test_two_web_servers_are_one(engine: RedisServer) -> None:
    """Two machines with two workers each: what is posted on one reaches a reader on the other. Its last messages, too."""
    if importlib.util.find_spec("uvicorn") is None:
        pytest.skip("uvicorn is not installed: pip install -e '.[programs]'")
    ports = (free_port(), free_port())
    with contextlib.ExitStack() as stack:
        programs = []
        for port in ports:
            server = ("-m", "uvicorn", "examples.events:app", "--workers", "2", "--port", str(port), "--log-level", "warning")
            run = ("run", "--bridge", "--topics", "/room/*", "--", sys.executable, *server, "--timeout-graceful-shutdown", "1")
            programs.append(stack.enter_context(Program(*MAIN, *run)))
        readers = [stack.enter_context(connected_reader(port)) for port in ports]
        for number, port in enumerate(ports):
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
                connection.request("POST", "/room/lobby", f"text {number}")
                assert connection.getresponse().status == 204
        texts = [{reader.line() for _ in range(2)} for reader in readers]
        assert texts == [{b'data: "text 0"', b'data: "text 1"'}] * 2
        for program in programs:
            os.kill(program.pid, signal.SIGTERM)
        for program in programs:
            assert program.end()[0] in (0, 128 + signal.SIGTERM)


class Reader:
    """A connection that has asked for what is posted."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        self.connection.request("GET", "/room/lobby")
        self.lines = self.connection.getresponse()
        assert self.lines.readline() == b": you are in\n"

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.lines.close()
        self.connection.close()

    def line(self) -> bytes:
        """Return the next line that is not empty."""
        return next(text for _ in range(5) if (text := self.lines.readline().strip()))


def connected_reader(port: int) -> Reader:
    """Return a reader of the room, once the server serves."""

    def reader() -> Reader | None:
        try:
            return Reader(port)
        except OSError:
            return None

    found: Reader = wait_until(reader, 50.0)
    return found


def test_the_files_to_start_from() -> None:
    """The compose file and the unit of systemd call commands that there are, with options that there are."""
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "examples" / "bridge"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    commands = [compose["services"]["web"]["command"]]
    for path in folder.glob("*.service"):
        unit = configparser.ConfigParser(interpolation=None, strict=False)
        unit.optionxform = str  # type: ignore[assignment, method-assign]
        unit.read_string(path.read_text().replace("\\\n", " "))
        assert unit["Service"]["Type"] == "notify"
        commands.append(shlex.split(unit["Service"]["ExecStart"]))
    assert len(commands) == 3
    for program, *arguments in commands:
        assert Path(program).name == "mpbroadcast"
        options, _ = parse(arguments)
        assert options.command in ("run", "serve", "bridge")
    secrets = compose["services"]["web"]["secrets"]
    assert f"/run/secrets/{secrets[0]}" in compose["services"]["web"]["command"]
    assert {*secrets} <= {*compose["secrets"]}
