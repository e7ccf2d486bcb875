"""Fixtures of all tests: a broadcaster, start methods, child processes; and the check that each test leaves nothing."""

import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, start_broadcaster
from mpbroadcast.client import shared_writer
from mpbroadcast.protocol import pickling
from tests.support.helpers import DEADLINE, Children, Pipe, wait_until
from tests.support.large_workers import TRANSPORTS, Size
from tests.support.victims import ROOT

FAILED = pytest.StashKey[bool]()
WORKERS = min(8, 2 * (os.cpu_count() or 1))  # tests wait for more than half of their time, and not for the CPU


def pytest_configure() -> None:
    """Fork by default: tests change what the broker does by what it inherits. Whole programs show Python's own default."""
    multiprocessing.set_start_method("fork")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; the tests' programs would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes run the tests: for folders several, for files and with ``-s`` none beside pytest's own."""
    has_folder = any(os.path.isdir(argument) for argument in config.args)
    return WORKERS if has_folder and config.option.capture != "no" else 0


@pytest.fixture(scope="session", autouse=True)
def temporary_folder() -> Iterator[Path]:
    """A short temporary folder of this run, for this process and all that it starts."""
    multiprocessing.util.get_temp_dir()  # multiprocessing keeps its first one for the whole run: not inside ours
    folder = tempfile.mkdtemp(prefix="mt-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        # So that names are in this folder, and those of two runs apart.
        patch.delenv("XDG_RUNTIME_DIR", raising=False)
        patch.setenv("_MPBROADCAST_TMP", folder)
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # for whole programs
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # or each of them would compile the package
        # These two live as long as this process: started here, they belong to no test.
        multiprocessing.resource_tracker.ensure_running()
        multiprocessing.forkserver.set_forkserver_preload(
            [f"tests.support.{name}" for name in ("workers", "large_workers", "victims")]
        )
        multiprocessing.forkserver.ensure_running()
        # What the run itself has allocated stays: each test's collection need not go through it.
        gc.collect()
        gc.freeze()
        yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


def child_processes() -> list[psutil.Process]:
    """Return all processes below this one, but for those that multiprocessing starts for itself, once in a run."""
    helpers = {
        multiprocessing.forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        multiprocessing.resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
    }
    return [child for child in psutil.Process().children(recursive=True) if child.pid not in helpers]


def descriptors() -> set[tuple[int, str]]:
    """The open descriptors of this process, and what each one is."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except OSError:
            continue  # the one that listed the folder
    return found


def leaked(interrupts: int) -> int:
    """How many descriptors so many interrupts may leak at the most: few come just as one is made, handed over or closed."""
    return interrupts and 4 + interrupts // 8


def left_over(before: set[tuple[int, str]], folder: Path, interrupts: int = 0) -> list[str]:
    """What is there now and was not before: processes, folders, and descriptors beyond what interrupts may leak."""
    gc.collect()
    found = [f"process {child}" for child in child_processes()]
    found += [f"descriptor {number} {target}" for number, target in sorted(descriptors() - before)][leaked(interrupts) :]
    found += [f"file {path}" for path in folder.glob("mpbroadcast-*")]
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Note which tests fail: their traceback keeps objects alive, and so nothing is asked of what they leave."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest, temporary_folder: Path) -> Iterator[None]:
    """After each test: no process, no descriptor, and no file is left, within a deadline. A test with the marker
    ``interrupted(count)`` has raised so many interrupts, which may leak a few descriptors."""
    gc.collect()
    before = descriptors()
    yield
    interrupts = sum(marker.args[0] for marker in request.node.iter_markers("interrupted"))
    try:
        if not request.node.stash.get(FAILED, False):
            wait_until(lambda: not left_over(before, temporary_folder, interrupts))
            if interrupts:  # other tests count what is open
                for number, _ in descriptors() - before:
                    os.close(number)
    except AssertionError:
        pytest.fail("left behind: " + "; ".join(left_over(before, temporary_folder, interrupts)), pytrace=False)
    finally:
        if multiprocessing.active_children() or request.node.stash.get(FAILED, False):
            lost = child_processes()
            for child in lost:
                child.kill()
            psutil.wait_procs(lost, timeout=5)
        for path in temporary_folder.glob("mpbroadcast-*"):
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def bus(leaves_nothing: None) -> Iterator[Broadcaster[Any]]:
    """A broadcaster, closed at the end."""
    broadcaster: Broadcaster[Any] = start_broadcaster()
    yield broadcaster
    broadcaster.close(timeout=2.0)


@pytest.fixture
def pipe(leaves_nothing: None) -> Iterator[Pipe]:
    """Yield a pipe for a child process: this process's end, and the child's."""
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def tmp_path(temporary_folder: Path) -> Iterator[Path]:
    """Yield a folder whose path is short whatever ``$TMPDIR`` and the test's name: sockets are made in it."""
    folder = tempfile.mkdtemp(prefix="t-", dir=temporary_folder)
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def runtime(leaves_nothing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder of this user's, with the sockets that have a name: empty in the end."""
    folder = tmp_path / "runtime"
    folder.mkdir(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    wait_until(lambda: not [*folder.iterdir()], DEADLINE)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """All messages go through the pipes, also large ones."""
    monkeypatch.setenv("MPBROADCAST_INLINE", "1")


@pytest.fixture
def own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All messages from 2 KiB on go in memory of their own, their buffers uncopied, so that tests need not be large."""
    monkeypatch.setattr(shared_writer, "LONGEST", 0)
    monkeypatch.setattr(shared_writer, "MEMORY_FROM", 0)
    monkeypatch.setattr(pickling, "OUT_OF_BAND", 2048)


@pytest.fixture(params=["fork", "forkserver"])
def context(request: pytest.FixtureRequest) -> BaseContext:
    """Return a context under which a process inherits its arguments, then one under which they are pickled."""
    return multiprocessing.get_context(request.param)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Size:
    """Return the size of messages that take each route in turn."""
    return TRANSPORTS[request.param]


@pytest.fixture
def fork() -> BaseContext:
    """The quickest start method, for tests in which it makes no difference."""
    return multiprocessing.get_context("fork")


@pytest.fixture
def children(leaves_nothing: None) -> Iterator[Children]:
    """Starts processes, and joins or kills them at the end."""
    started = Children()
    yield started
    started.end()
