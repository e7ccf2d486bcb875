"""Plain names: the processes of one user meet whatever their environments are, and no folder of another user is trusted."""

import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import AddressError, BrokerLost, StartError, connect, connect_or_start, start_broadcaster, trap_points
from mpbroadcast.validation import MAX_ADDRESS
from tests.support.helpers import DEADLINE, Children, Pipe, answer, finish, wait_until
from tests.support.victims import alive

VARIABLES = ("XDG_RUNTIME_DIR", "TMPDIR", "_MPBROADCAST_TMP")
LATER = 60.0  # seconds that a broker lingers which must not end meanwhile
PATIENCE = 2 * DEADLINE  # for a start
NOBODY = 65534

Environment = dict[str, str]


def made(folder: Path) -> Path:
    """Make a folder that only this user can enter."""
    folder.mkdir(0o700, parents=True)
    return folder


@pytest.fixture
def run_user(temporary_folder: Path) -> Iterator[Path]:
    """The place of this user's runtime folder, which a test may make: empty in the end."""
    folder = temporary_folder / "run-user" / str(os.geteuid())
    yield folder
    if folder.exists():
        wait_until(lambda: not os.listdir(folder), DEADLINE)
    shutil.rmtree(folder.parent, ignore_errors=True)


def set_environment(environment: Environment) -> None:
    """Give this process, a child of the test's, another environment: of some variables nothing but what is given."""
    for variable in VARIABLES[:2]:
        os.environ.pop(variable, None)
    os.environ.update(environment)
    tempfile.tempdir = None
    multiprocessing.current_process().authkey = os.urandom(32)  # as in a program that is not the test's


def start(pipe: Connection, environment: Environment) -> None:
    """Report the process and the address of the broker that this process starts or finds; keep it until an answer comes."""
    set_environment(environment)
    with connect_or_start("myapp", linger=LATER, start_timeout=PATIENCE) as bus:
        pipe.send((bus.stats().pid, bus.address))
        answer(pipe, 3 * DEADLINE)


def meet(pipe: Connection, environment: Environment) -> None:
    """Report what each call that takes a name finds."""
    set_environment(environment)
    with connect("myapp") as bus, connect_or_start("myapp", start_timeout=PATIENCE) as other:
        found = [(each.stats().pid, each.address) for each in (bus, other)]
    try:
        start_broadcaster(address="myapp").close()
    except StartError as error:
        pipe.send((found, str(error)))


def end(pid: int) -> None:
    """End a broker that lingers for long, and wait for that."""
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not alive(pid))


def command(environment: Environment, *words: str) -> str:
    """Return what a command prints in this environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES[:2]}
    call = [sys.executable, "-m", "mpbroadcast", *words, "--address", "myapp"]
    return subprocess.run(
        call, env=inherited | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=PATIENCE, check=True
    ).stdout.decode()


@pytest.mark.parametrize("where", ["own folder", "runtime folder", "runtime folder that came later", "link to it"])
def test_processes_with_different_environments_meet(
    where: str, run_user: Path, temporary_folder: Path, tmp_path: Path, fork: BaseContext, children: Children, pipe: Pipe
) -> None:
    """Each call and command finds the broker, and none starts another one."""
    with_variable = {"XDG_RUNTIME_DIR": str(made(tmp_path / "runtime")), "TMPDIR": str(made(tmp_path / "temporary"))}
    of_starter, of_others = {}, with_variable
    folder = temporary_folder / f"mpbroadcast-{os.geteuid()}"
    name = "myapp"
    if where in ("runtime folder", "link to it"):
        folder, name = made(run_user), "mpbroadcast-myapp"
        (link := tmp_path / "link").symlink_to(run_user)
        of_starter = {"XDG_RUNTIME_DIR": str(run_user if where == "runtime folder" else link)}
        of_others = {"TMPDIR": with_variable["TMPDIR"]}
    starter = children(fork, start, pipe[1], of_starter)
    broker, address = answer(pipe[0], PATIENCE)
    assert Path(address).resolve() == folder / name
    if where == "runtime folder that came later":
        of_others = {"XDG_RUNTIME_DIR": str(made(run_user))}
    other = children(fork, meet, pipe[1], of_others)
    found, refusal = answer(pipe[0], PATIENCE)
    finish(other)
    assert [(pid, Path(at).resolve()) for pid, at in found] == [(broker, folder / name)] * 2
    assert "in use" in refusal or "listens" in refusal
    assert str(folder / name) in refusal
    command(of_others, "pub", "room", "hello")
    stats = json.loads(command(of_others, "stats", "--json"))
    assert (stats["pid"], stats["published"]) == (broker, 1)
    assert not [*(tmp_path / "runtime").iterdir(), *(tmp_path / "temporary").iterdir()]
    pipe[0].send("end")
    finish(starter)
    end(broker)


def test_racing_starters_with_different_environments(run_user: Path, fork: BaseContext, children: Children) -> None:
    """All get the same broker, in the runtime folder, which half of them know by the variable."""
    made(run_user)
    pipes = [multiprocessing.Pipe() for _ in range(10)]
    for number, (_, theirs) in enumerate(pipes):
        children(fork, start, theirs, {"XDG_RUNTIME_DIR": str(run_user)} if number % 2 else {})
    ((broker, address),) = {answer(ours, 3 * DEADLINE) for ours, _ in pipes}
    assert address == str(run_user / "mpbroadcast-myapp")
    for ours, theirs in pipes:
        ours.send("end")
        ours.close()
        theirs.close()
    end(broker)


def start_slowly(pipe: Connection, environment: Environment) -> None:
    """Report when the broker is about to be started, and start it when an answer comes."""

    def reach(name: str, subject: object = None) -> None:
        if name == "starting for all":
            pipe.send(name)
            answer(pipe, PATIENCE)

    trap_points.reach = reach
    start(pipe, environment)


def start_meanwhile(pipe: Connection, environment: Environment) -> None:
    """Report it if this process starts a broker, or else that it waits for another one to do that."""

    def reach(name: str, subject: object = None) -> None:
        if name == "starting for all":
            pipe.send("starts another one")

    trap_points.reach = reach
    set_environment(environment)
    with pytest.raises(StartError):
        connect_or_start("myapp", start_timeout=0.1)
    pipe.send("waits")
    start(pipe, environment)


def test_a_runtime_folder_that_comes_during_a_start(run_user: Path, fork: BaseContext, children: Children, pipe: Pipe) -> None:
    """A process that would start its broker there waits for the one that is being started in the other folder."""
    slow = children(fork, start_slowly, pipe[1], {})
    assert answer(pipe[0]) == "starting for all"
    made(run_user)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        other = children(fork, start_meanwhile, theirs, {"XDG_RUNTIME_DIR": str(run_user)})
        assert answer(ours) == "waits"
        pipe[0].send("start")
        found = answer(pipe[0], PATIENCE)
        assert answer(ours, PATIENCE) == found
        assert not os.listdir(run_user)
        ours.send("end")
        finish(other)
    pipe[0].send("end")
    finish(slow)
    end(found[0])


def test_the_error_names_every_path(
    run_user: Path, runtime: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a folder that is not looked at, with the reason."""
    own = temporary_folder / f"mpbroadcast-{os.geteuid()}"
    paths = [runtime / "mpbroadcast-absent", run_user / "mpbroadcast-absent", own / "absent"]
    for is_set in (True, False):
        if not is_set:
            monkeypatch.delenv("XDG_RUNTIME_DIR")
        with pytest.raises(BrokerLost) as caught:
            connect("absent")
        assert re.findall(r"'(/.*?)'", str(caught.value)) == [str(path) for path in paths[not is_set :]]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    made(run_user)
    run_user.chmod(0o755)
    with pytest.raises(BrokerLost) as caught:
        connect("absent")
    assert f"{str(paths[0])!r}, {str(paths[2])!r}; " in str(caught.value)
    assert f"{str(run_user)!r}, is open to other users (mode 0755" in str(caught.value)


@pytest.mark.parametrize("call", [connect, connect_or_start, lambda address: start_broadcaster(address=address)])
@pytest.mark.parametrize("kind", ["path", "relative path", "name"])
def test_a_path_that_is_too_long(
    call: Callable[[str], Any], kind: str, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says the limit, by how much the path exceeds it, and what to do; a path of the limit's length works."""
    monkeypatch.chdir(tmp_path)
    base = str(runtime / "mpbroadcast-") if kind == "name" else f"{tmp_path}/"
    longest = "x" * (MAX_ADDRESS - len(base))
    prefix = {"path": base, "relative path": "./"}.get(kind, "")
    advice = "use a shorter name" if kind == "name" else "use a shorter one, or a plain name without a slash"
    for more in (1, 25):
        with pytest.raises((AddressError, StartError)) as caught:
            call(prefix + longest + "y" * more)
        text = f"{base}{longest}{'y' * more}' has {MAX_ADDRESS + more} bytes, {more} more than the limit of the system"
        assert text in str(caught.value)
        assert f"takes {MAX_ADDRESS}: {advice}" in str(caught.value)
    with start_broadcaster(address=prefix + longest) as bus, connect(prefix + longest) as other:
        assert len(bus.address) == MAX_ADDRESS
        assert other.stats().pid == bus.stats().pid


def test_a_folder_that_is_absent_and_too_long_for_names(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not looked at, and the others are."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / ("x" * MAX_ADDRESS)))
    with pytest.raises(BrokerLost, match=f"more than the limit of the system, which takes {MAX_ADDRESS}"):
        connect("myapp")
    with start_broadcaster(address="myapp") as bus, connect("myapp") as other:
        assert other.stats().pid == bus.stats().pid


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand for ``/tmp``: a folder in which each user may make files, and nobody removes those of another user."""
    folder = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    folder.chmod(0o1777)
    for variable in VARIABLES[1:]:
        monkeypatch.setenv(variable, str(folder))
    yield folder
    shutil.rmtree(folder)


def be_another_user(pipe: Connection, call: Callable[..., Any], *args: Any) -> None:
    """Report what a call returns for a user without privileges, who may not be able to import anything more."""
    for module in ("launcher", "main", "ownerless"):
        importlib.import_module(f"mpbroadcast.broker.host.{module}")
    set_environment({name: os.environ[name] for name in VARIABLES[1:]})
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        pipe.send("cannot")
    else:
        pipe.send(call(*args))


@pytest.fixture
def as_another_user(fork: BaseContext, children: Children, pipe: Pipe) -> Callable[..., Any]:
    """Call a function as another user, and return what it returns."""

    def call(*args: Any) -> Any:
        process = children(fork, be_another_user, pipe[1], *args)
        result = answer(pipe[0], PATIENCE)
        finish(process)
        if result == "cannot":
            pytest.skip("root cannot become another user here")
        return result

    return call


def outcome(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return the address that a call reaches, or its error."""
    try:
        with call(*args, **options) as bus:
            return str(bus.address)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def meet_own(folder: str, roots: str) -> list[Any]:
    """Start a broker with a name that a broker of root has, too; and look at root's."""
    context = multiprocessing.get_context("fork")
    found: list[Any] = [outcome(connect, "myapp"), outcome(connect, roots)]
    with start_broadcaster(address="myapp", context=context) as bus:
        found += [bus.address, stat.filemode(os.stat(folder).st_mode)]
        with connect("myapp") as one, connect_or_start("myapp") as other:
            found.append({each.stats().pid for each in (bus, one, other)} == {bus.stats().pid})
    return [*found, os.path.exists(folder)]


@only_root
def test_another_user_meets_its_own(shared: Path, as_another_user: Callable[..., Any]) -> None:
    """Brokers of two users have the same name, and neither user reaches that of the other."""
    folder = shared / f"mpbroadcast-{NOBODY}"
    with start_broadcaster(address="myapp") as bus:
        assert bus.address == f"{shared}/mpbroadcast-0/myapp"
        lost, roots, *others = as_another_user(meet_own, str(folder), bus.address)
        assert lost.startswith("BrokerLost: no broker answers at any of")
        assert bus.address not in lost
        assert "denied" in roots
        assert others == [f"{folder}/myapp", "drwx------", True, False]
        with connect("myapp") as other:
            assert other.stats().pid == bus.stats().pid


def start_own(folder: str) -> str:
    """Start a broker that belongs to no process, if this user may run the interpreter."""
    try:
        subprocess.run([sys.executable, "-c", "import mpbroadcast, psutil"], stderr=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "cannot run"
    with connect_or_start("myapp", linger=0, start_timeout=PATIENCE) as bus, connect("myapp") as other:
        assert other.stats().pid == bus.stats().pid
        return bus.address


@only_root
def test_another_user_starts_its_own(shared: Path, as_another_user: Callable[..., Any]) -> None:
    folder = shared / f"mpbroadcast-{NOBODY}"
    with start_broadcaster(address="myapp"):
        address = as_another_user(start_own, str(folder))
    if address == "cannot run":
        pytest.skip("another user cannot run this interpreter")
    assert address == f"{folder}/myapp"
    wait_until(lambda: not folder.exists(), DEADLINE)


def try_all(runtime: str | None) -> list[str]:
    """Return what comes of each call that takes a name."""
    if runtime is not None:
        os.environ["XDG_RUNTIME_DIR"] = runtime
    context = multiprocessing.get_context("fork")
    return [
        outcome(connect, "myapp"),
        outcome(start_broadcaster, address="myapp", context=context),
        outcome(connect_or_start, "myapp", linger=0, start_timeout=PATIENCE),
    ]


class Bait:
    """A folder with a socket that anyone may connect to: a program that took it for a broker's would be known by that."""

    def __init__(self, folder: Path, name: str, mode: int, owner: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"{folder}/{name}")
        self._socket.listen()
        self._socket.setblocking(False)
        (folder / name).chmod(0o666)
        os.chown(folder, owner, owner)
        folder.chmod(mode)
        self._before = os.listdir(folder), os.stat(folder)

    def end(self) -> None:
        """Close it: nobody has connected, or changed anything."""
        with self._socket, pytest.raises(BlockingIOError):
            self._socket.accept()
        names, before = self._before
        now = os.stat(self._folder)
        assert (os.listdir(self._folder), now.st_mode, now.st_uid) == (names, before.st_mode, before.st_uid)


@only_root
@pytest.mark.parametrize("where", ["own folder", "runtime folder", "variable"])
@pytest.mark.parametrize(
    ("owner", "mode", "problem"),
    [
        (0, 0o700, "is user 0's, and not user 65534's"),
        (0, 0o755, "is user 0's, and not user 65534's"),
        (0, 0o777, "is user 0's, and not user 65534's"),
        (NOBODY, 0o755, "is open to other users (mode 0755, must be 0700)"),
    ],
)
def test_a_folder_that_another_user_may_have_filled(
    where: str, owner: int, mode: int, problem: str, shared: Path, as_another_user: Callable[..., Any]
) -> None:
    """No call connects to what is in it, or makes anything in it."""
    folder = {
        "own folder": shared / f"mpbroadcast-{NOBODY}",
        "runtime folder": shared / "run-user" / str(NOBODY),
        "variable": shared / "runtime",
    }[where]
    bait = Bait(folder, "myapp" if where == "own folder" else "mpbroadcast-myapp", mode, owner)
    for text in as_another_user(try_all, str(folder) if where == "variable" else None):
        assert text.startswith(("AddressError: ", "StartError: "))
        assert f"{str(folder)!r}, {problem}: correct that" in text
    bait.end()


@only_root
def test_a_later_folder_that_another_user_has_filled(shared: Path, as_another_user: Callable[..., Any]) -> None:
    """It is left out, and the error says so; a broker starts in the folder before it."""
    folder, runtime = shared / f"mpbroadcast-{NOBODY}", shared / "runtime"
    made(runtime)
    os.chown(runtime, NOBODY, NOBODY)
    bait = Bait(folder, "myapp", 0o755, 0)
    lost, address, _ = as_another_user(try_all, str(runtime))
    assert lost.startswith("BrokerLost: ")
    assert f"{str(folder)!r}, is user 0's" in lost
    assert address == f"{runtime}/mpbroadcast-myapp"
    bait.end()
    wait_until(lambda: not os.listdir(runtime), DEADLINE)


@only_root
def test_a_folder_that_cannot_be_seen(shared: Path, as_another_user: Callable[..., Any]) -> None:
    """Each call names it, and the reason."""
    hidden = made(shared / "closed") / "runtime"
    for text in as_another_user(try_all, str(hidden)):
        assert text.startswith(("AddressError: ", "StartError: "))
        assert f"$XDG_RUNTIME_DIR, {str(hidden)!r}, cannot be used (Permission denied): correct that" in text
