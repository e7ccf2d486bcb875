"""Web servers with several worker processes: ``mpbroadcast run`` beside them, and ``connect()`` in the application.

These take long, and need the servers (``pip install -e '.[programs]'``): ``python -m pytest tests/programs`` runs them. One
whose server is not installed is skipped.
"""

import contextlib
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel
from tests.support.helpers import receive_all, wait_until
from tests.support.victims import Program, alive, reached

Bus = Broadcaster[Any]
PATIENCE = 50.0  # seconds for the start of a server's workers
WORKERS = 4
SERVERS = {
    "uvicorn": "uvicorn {app} --workers 4 --port {port}",
    "gunicorn": "gunicorn -k asgi -w 4 --no-control-socket -b 127.0.0.1:{port} {app}",
    "granian": "granian --interface asgi --workers 4 --respawn-failed-workers --port {port} {app}",
}

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("programs"), pytest.mark.usefixtures("runtime")]


class Site:
    """A server that runs, seen from outside: its workers, by what they answer and by their subscriptions."""

    def __init__(self, command: str, app: str = "tests.programs.app:app", *, wrapped: bool = True) -> None:
        name, *arguments = command.split()
        server = Path(sys.executable).with_name(name)
        if not server.exists():
            pytest.skip(f"{name} is not installed")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [word.format(app=app, port=self.port) for word in (str(server), *arguments)]
        run = ("mpbroadcast", "run", "--address", "site", "--", *words)
        self.program = Program("-m", *(run if wrapped else (name, *words[1:])))

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *exc: object) -> None:
        self.program.__exit__(*exc)

    def connected(self) -> Bus:
        return wait_until(lambda: reached("site"), PATIENCE)

    def request(self, path: str) -> int:
        """Return the process ID of the worker that answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE) as response:
            return int(response.read())


def workers(bus: Bus, without: Set[int] = frozenset(), count: int = WORKERS, patience: float = PATIENCE) -> set[int]:
    """Wait until there are so many workers, none of them one of ``without``. Return their process IDs."""

    def found() -> set[int]:
        there = {row.pid for row in bus.stats().subscribers if row.topics == ("question",)}
        return there if len(there) == count and not there & without else set()

    return wait_until(found, patience)


def reaches(site: Site, bus: Bus, answers: Channel[Any], path: str, pids: set[int]) -> None:
    """A request is answered by one worker, and what that publishes reaches all of them."""
    assert wait_until(lambda: requested(site, path), PATIENCE) in pids
    assert {answers.recv(PATIENCE) for _ in pids} == {(pid, path) for pid in pids}


def requested(site: Site, path: str) -> int:
    try:
        return site.request(path)
    except OSError:  # the server is about to listen, or a worker that has just been replaced had the connection
        return 0


@pytest.mark.parametrize("name", SERVERS)
def test_all_workers_are_reached(name: str) -> None:
    """Before and after a worker is killed, and after SIGHUP; after SIGTERM to the group nothing is left."""
    with Site(SERVERS[name]) as site, site.connected() as bus:
        first = workers(bus)
        with bus.subscribe("answer") as answers, bus.subscribe("end") as end:
            reaches(site, bus, answers, "/first", first)
            killed = first.pop()
            os.kill(killed, signal.SIGKILL)
            second = workers(bus, {killed})
            assert first < second
            reaches(site, bus, answers, "/second", second)
            os.kill(site.program.pid, signal.SIGHUP)
            third = workers(bus, second)
            reaches(site, bus, answers, "/third", third)
            os.killpg(site.program.pid, signal.SIGTERM)
            last, error = receive_all(end, PATIENCE)
            assert {pid for pid, _ in last} >= third  # the broker ends behind the last worker
            assert isinstance(error, EOFError)
        status, _, errors = site.program.end()
        assert status == 0, errors
        assert "Traceback" not in errors


def test_reload(tmp_path: Path) -> None:
    """A worker that replaces another one when a file has changed is reached; Ctrl-C ends all."""
    module = tmp_path / "site_app.py"
    module.write_text("from tests.programs.app import app\n")
    command = f"uvicorn {{app}} --reload --reload-dir {tmp_path} --app-dir {tmp_path} --port {{port}}"
    with Site(command, "site_app:app") as site, site.connected() as bus, bus.subscribe("answer") as answers:
        first = workers(bus, count=1)
        reaches(site, bus, answers, "/first", first)
        second: set[int] = set()
        for change in range(5):  # one that comes before the reloader's first look is none for it
            module.write_text(f"from tests.programs.app import app  # {change}\n")
            with contextlib.suppress(AssertionError):
                second = workers(bus, first, count=1, patience=10)
                break
        reaches(site, bus, answers, "/second", second)
        os.kill(site.program.pid, signal.SIGINT)
        _, _, errors = site.program.end()
        assert "Traceback" not in errors


def test_workers_that_start_the_broker_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``mpbroadcast run``: it goes on when the worker that has started it is killed, and ends behind the last one."""
    monkeypatch.setenv("STARTS_AT", "site")
    with Site(SERVERS["uvicorn"], wrapped=False) as site:
        bus = site.connected()
        broker, first = bus.stats().pid, workers(bus)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        second = workers(bus, first)
        with bus, bus.subscribe("answer") as answers:
            reaches(site, bus, answers, "/", second)
            assert bus.stats().pid == broker
        os.killpg(site.program.pid, signal.SIGTERM)
        assert site.program.end()[0] == 0
        wait_until(lambda: not alive(broker))


def test_the_example() -> None:
    """A text that is posted reaches the readers of its room in each worker, and no others."""
    command = "uvicorn {app} --workers 4 --timeout-graceful-shutdown 1 --port {port}"
    with Site(command, "examples.events:app") as site, contextlib.ExitStack() as stack:
        wait_until(lambda: posted(site, "/room/warm-up", b"x"), PATIENCE)
        bus = stack.enter_context(site.connected())
        lobby = [stack.enter_context(reading(site, "/room/lobby"))]
        while len({row.pid for row in bus.stats().subscribers}) == 1:  # the other workers may not listen yet
            lobby.append(stack.enter_context(reading(site, "/room/lobby")))
        other, star = (stack.enter_context(reading(site, f"/room/{name}")) for name in ("other", "*"))
        assert posted(site, "/room/lobby", b"hello,\nall")
        assert posted(site, "/room/other", b"elsewhere")
        assert {reader.readline() for reader in lobby} == {b'data: "hello,\\nall"\n'}
        assert other.readline() == b'data: "elsewhere"\n'
        assert posted(site, "/room/*", b"to a room of this name")  # which is no pattern: it reads no other room
        assert star.readline() == b'data: "to a room of this name"\n'
        os.kill(site.program.pid, signal.SIGTERM)
        assert site.program.end()[0] == 0


def posted(site: Site, path: str, body: bytes) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{site.port}{path}", body, timeout=PATIENCE).status == 204
    except OSError:
        return False


def reading(site: Site, path: str) -> Any:
    """Open a stream of events, and read what shows that it is subscribed."""
    stream = urllib.request.urlopen(f"http://127.0.0.1:{site.port}{path}", timeout=PATIENCE)
    assert stream.readline() == b": you are in\n"
    assert stream.readline() == b"\n"
    return stream
