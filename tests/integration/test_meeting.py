"""Processes that meet at an address: names, key files, and the environment."""

import errno
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import AddressError, AuthenticationFailed, BrokerLost, StartError, connect, start_broadcaster, trap_points
from mpbroadcast.broker.host.main import Settings
from mpbroadcast.broker.host.socket_file import Listening, remove_forgotten_folders, remove_leftovers
from mpbroadcast.posix.addresses import candidates, make_own_folder
from mpbroadcast.posix.key_file import is_key_file, read_key, write_key
from tests.support.helpers import DEADLINE, Children, take
from tests.support.large_workers import descriptors_left

KEY = bytes(range(32))
STRANGER = """
import os, sys
from mpbroadcast import connect
for address, variable in ((["myapp"], ""), ([], "myapp"), ([], sys.argv[1])):
    os.environ["MPBROADCAST_ADDRESS"] = variable
    with connect(*address) as bus:
        bus.publish(repr(bus))
"""


@pytest.fixture
def no_runtime(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for names where there is no runtime folder."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return temporary_folder / f"mpbroadcast-{os.geteuid()}"


def test_what_an_address_stands_for(
    runtime: Path, temporary_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word is a name, in a folder of the user's; what has a slash, and a ``Path``, is a path."""
    monkeypatch.chdir(tmp_path)
    names = temporary_folder / f"mpbroadcast-{os.geteuid()}"
    (link := tmp_path / "link").symlink_to(runtime)
    for folder in (link, runtime):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        assert candidates("my app").made == str(folder / "mpbroadcast-my app")
    for variable in ("", "relative/folder"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", variable)
        assert candidates("myapp").made == str(names / "myapp")
    assert not names.exists()
    assert [candidates(path).made for path in ("./myapp", Path("myapp"))] == [str(tmp_path / "myapp")] * 2
    for name in (".", "..", ".hidden", "x" * 108):
        with pytest.raises(AddressError, match=r"slash|bytes"):
            candidates(name)


@pytest.mark.parametrize("kind", ["open to others", "link", "file", "another user's", "absent"])
@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "_MPBROADCAST_TMP"])
def test_a_folder_for_names_that_is_not_safe(
    kind: str, variable: str, tmp_path: Path, no_runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse it, from each call that takes a name, and leave it as it is."""
    folder = no_runtime
    if variable == "XDG_RUNTIME_DIR":
        folder = tmp_path / "unsafe"
        monkeypatch.setenv(variable, str(folder))
    if kind == "link":
        folder.symlink_to("/etc")  # is open to others, if it is followed
    elif kind == "file":
        folder.touch(0o600)
    elif kind != "absent":
        folder.mkdir(0o750 if kind == "open to others" else 0o700)
    if kind == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
        if variable == "_MPBROADCAST_TMP":
            folder = folder.rename(folder.with_name("mpbroadcast-54321"))
    if kind == "absent":  # then the next one counts, or there is no broker with a name
        with pytest.raises(BrokerLost, match=re.escape(str(folder))):
            connect("myapp")
        assert not folder.exists()
        return
    with pytest.raises(AddressError, match=r"folder|XDG"):
        connect("myapp")
    with pytest.raises(StartError, match=r"folder|XDG"):
        start_broadcaster(address="myapp")
    if variable == "_MPBROADCAST_TMP":
        with pytest.raises(AddressError, match="folder"):  # also where it has come just now
            make_own_folder(str(folder))
    if folder.is_dir() and not folder.is_symlink():
        folder.rmdir()
    else:
        folder.unlink(missing_ok=True)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("has_runtime", [False, True])
def test_a_stranger_needs_the_name_only(
    restart: bool, has_runtime: bool, runtime: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reach the broker from a process that is no child, by name and by the environment; also the one that takes over."""
    if not has_runtime:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    with start_broadcaster(address="myapp", restart=restart) as bus, bus.subscribe(overflow="drop_oldest") as channel:
        key = Path(bus.address + ".key")
        written = key.read_bytes()
        assert key.stat().st_mode == 0o100600
        subprocess.run([sys.executable, "-c", STRANGER, bus.address], timeout=DEADLINE, check=True)
        assert take(channel, 3) == [f"<mpbroadcast.Broadcaster at '{bus.address}'>"] * 3
        if restart:
            os.kill(bus.stats().pid, signal.SIGKILL)
            connect("myapp").close()
            assert key.read_bytes() == written
    assert not [*runtime.iterdir()]
    with pytest.raises(BrokerLost, match="no broker"):
        connect("myapp")


def test_without_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv("MPBROADCAST_ADDRESS", raising=False)
        if value is not None:
            monkeypatch.setenv("MPBROADCAST_ADDRESS", value)
        with pytest.raises(AddressError, match=r"MPBROADCAST_ADDRESS.*mpbroadcast run"):
            connect()


def test_which_brokers_write_a_key(runtime: Path) -> None:
    """Not one at an address that was made for it, nor one that is given a key, whose start removes what a dead one has left."""
    with start_broadcaster() as bus:
        assert os.listdir(os.path.dirname(bus.address)) == ["broker"]
    Path(candidates("myapp").made + ".key").write_text(KEY.hex() + "\n")
    with start_broadcaster(address="myapp", authkey=b"mine") as bus:
        assert [path.name for path in runtime.iterdir()] == ["mpbroadcast-myapp"]
        with connect("myapp", authkey=b"mine") as other:
            assert other.stats().pid == bus.stats().pid


def replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


UNSAFE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "open to others": (lambda path: path.chmod(0o640), "open to other users"),
    "link": (lambda path: path.symlink_to(path.rename(path.with_name("moved"))), "is a link"),
    "pipe": (lambda path: replace(path, os.mkfifo), "no plain file"),
    "folder": (lambda path: replace(path, Path.mkdir), "no plain file"),
    "socket": (lambda path: replace(path, lambda at: os.mknod(at, stat.S_IFSOCK | 0o600)), "cannot be read"),
    "cut": (lambda path: path.write_text(path.read_text()[:40]), "holds no key"),
    "empty": (lambda path: path.write_text(""), "holds no key"),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_a_key_file_that_is_not_safe_is_refused(kind: str, runtime: Path) -> None:
    spoil, text = UNSAFE[kind]
    with start_broadcaster(address="myapp") as bus:
        key = Path(bus.address + ".key")
        spoil(key)
        with pytest.raises(AuthenticationFailed, match=text) as caught:
            connect("myapp")
        assert KEY.hex()[:20] not in str(caught.value)
    shutil.rmtree(runtime)
    runtime.mkdir()


def test_a_key_file_of_another_user(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_broadcaster(address="myapp") as bus:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
        with pytest.raises(AuthenticationFailed, match="user"):
            read_key(bus.address)
        assert not is_key_file(f"{bus.address}.key")
        monkeypatch.undo()
        assert is_key_file(f"{bus.address}.key")
        with descriptors_left(0), pytest.raises(OSError, match="open files"):  # which is not the file's fault
            read_key(bus.address)


def test_a_key_is_there_before_its_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its name only when it is whole, and goes before the socket; under each name it has mode 0600."""
    address = str(tmp_path / "socket")
    seen: list[tuple[str, list[str], bytes | None]] = []

    def reach(name: str, subject: object = None) -> None:
        if name in ("naming the key", "naming the socket"):
            assert os.stat("socket.key").st_mode == 0o100600
            seen.append((name, sorted(path for path in os.listdir(".") if not path.startswith(".")), read_key("socket")))

    monkeypatch.setattr(trap_points, "reach", reach)
    unlinked: list[str] = []
    unlink = os.unlink

    def note(path: str) -> None:
        unlinked.append(os.path.basename(path))
        unlink(path)

    monkeypatch.setattr(os, "unlink", note)
    before = os.umask(0o077 << 3)
    try:
        listening = Listening(address, "", KEY)
    finally:
        os.umask(before)
    assert seen == [(name, ["socket.key"], KEY) for name in ("naming the key", "naming the socket")]
    assert read_key(address) == KEY
    unlinked.clear()
    listening.remove()
    assert unlinked == ["socket.key", "socket"]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("left", ["key", "socket", "key and socket"])
def test_what_a_killed_broker_has_left(left: str, tmp_path: Path) -> None:
    """The next start removes it, and writes a new key; so does the end of its starter."""
    address = str(tmp_path / "socket")
    for remove in (lambda: None, lambda: remove_leftovers(address)):
        Listening(address, "", None if left == "socket" else KEY).socket.close()  # as a kill closes it
        if left == "key":
            os.unlink(address)
        remove()
        if left != "key":
            assert bool(os.listdir(tmp_path)) == (remove.__code__.co_names == ())
        with start_broadcaster(address=address), connect(address) as bus:
            assert read_key(address) not in (None, KEY)
            assert bus.stats().publishers == 0
        assert not os.listdir(tmp_path)


def test_what_a_killed_start_has_left_of_a_key(tmp_path: Path) -> None:
    """It had this process's ID, and so the same name for a key that is not whole."""
    passing, address = tmp_path / "passing", str(tmp_path / "socket")
    passing.symlink_to(tmp_path / "target")
    write_key(address, KEY, str(passing))
    assert read_key(address) == KEY
    assert os.listdir(tmp_path) == ["socket.key"]


def test_a_forgotten_folder_with_a_key(temporary_folder: Path) -> None:
    """A start removes it, as it does one without."""
    listening = Listening(None, str(temporary_folder), KEY)
    folder = os.path.dirname(listening.address)
    remove_forgotten_folders(str(temporary_folder))
    assert sorted(os.listdir(folder)) == ["broker", "broker.key"]
    listening.socket.close()
    remove_forgotten_folders(str(temporary_folder))
    assert not os.path.exists(folder)


@pytest.mark.parametrize("content", ["precious", "link", "folder"])
def test_what_is_no_key_file_stays(content: str, tmp_path: Path) -> None:
    """A start that would write a key there fails, and names it; nothing is followed."""
    key, target = tmp_path / "socket.key", tmp_path / "target"
    target.write_text(KEY.hex() + "\n")
    if content == "link":
        key.symlink_to(target)
    elif content == "folder":
        key.mkdir()
    else:
        key.write_text(content)
    with pytest.raises(StartError, match=r"socket\.key"):
        start_broadcaster(address=tmp_path / "socket")
    with pytest.raises(OSError, match="no key file") as caught:
        Listening(str(tmp_path / "socket"), "", KEY)
    assert caught.value.errno == errno.EADDRINUSE
    assert sorted(os.listdir(tmp_path)) == ["socket.key", "target"]
    assert target.read_text() == KEY.hex() + "\n"


def test_another_broker_has_taken_over_between_the_key_and_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has read the key of the one before reads the file again."""
    address = str(tmp_path / "socket")
    with start_broadcaster(address=address):
        keys = [KEY]
        real = read_key
        monkeypatch.setattr("mpbroadcast.client.broker_client.read_key", lambda path: keys.pop() if keys else real(path))
        with connect(address) as bus:
            assert bus.stats().publishers == 0
    assert not keys


def test_a_key_is_shown_nowhere(tmp_path: Path) -> None:
    """Not in the log, whatever its level, in what is shown of objects, or in a traceback with the values of variables."""
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "log")}
    log = {"version": 1, "handlers": {"file": handler}, "root": {"handlers": ["file"], "level": "DEBUG"}}
    settings = Settings(None, KEY, 0, None, None, False, keys=[KEY])
    shown = [repr(settings), str(vars(settings)["starter"])]
    with start_broadcaster(address=tmp_path / "socket", log_config=log) as bus, connect(bus.address) as other:
        path = Path(bus.address + ".key")
        key = path.read_text().strip()
        shown += [repr(bus), repr(other), pickle.dumps(other).decode("latin-1"), str(sys.argv), str(os.environ)]
        path.write_text(KEY.hex() + "\n")
        with pytest.raises(AuthenticationFailed) as caught:
            connect(bus.address)
        error, frames = caught.value, caught.tb.tb_next  # without that of this test, which has the key
        shown += traceback.TracebackException(type(error), error, frames, capture_locals=True).format()
        path.unlink()
        bus.subscribe().close()
    shown.append((tmp_path / "log").read_text())
    assert "<key>" in "".join(shown)
    for one in (KEY, bytes.fromhex(key)):
        for form in (one.hex(), repr(one)[2:-1], one.decode("latin-1")):
            assert form not in "".join(shown)


def use(bus: Any) -> None:
    bus.publish("from a child of a stranger")


def test_a_pickled_handle_carries_no_key(runtime: Path, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child of a process that is no child of the starter reads the key file, too."""
    with start_broadcaster(address="myapp") as bus, bus.subscribe() as channel:
        monkeypatch.setattr(multiprocessing.current_process(), "authkey", os.urandom(32))  # as in another program
        with connect("myapp") as other:
            children(multiprocessing.get_context("spawn"), use, other)
            assert channel.recv(DEADLINE) == "from a child of a stranger"
        monkeypatch.undo()
