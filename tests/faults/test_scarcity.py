"""Scarcity: with too few descriptors or processes, or too little memory or room, all is slower or says why, and never wrong.

What is short is short for one process, or for one user for a moment: nothing here changes a setting of the system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import IO, Any, cast

import psutil
import pytest

from mpbroadcast import Broadcaster, BrokerRestarted, Channel, StartError, connect, start_broadcaster
from mpbroadcast.broker import peers, registry
from mpbroadcast.client import broadcaster, broker_client, ring
from mpbroadcast.client.ring import Ring
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.protocol.pickling import Payload
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS
from tests.conftest import descriptors as open_files
from tests.support.helpers import DEADLINE, Background, Children, answer, everything, finish, take, wait_until
from tests.support.large_workers import (
    SIZES,
    Size,
    limited,
    number_of,
    numbers_until_end,
    receive_with_little_memory,
    report_numbers,
)
from tests.support.victims import ROOT, Counter, alive, descriptors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and namespaces are looked at as Linux has them")

Bus = Broadcaster[Any]
EVERY_SIZE = [Size(0), Size(100), Size(2100), Size(4090), Size(60_000), Size(300_000), Size(3 << 20), Size(3 << 20, True)]
NOBODY = 61_234  # a user that nobody is
CANNOT = 77  # exit code of a program that cannot do here what it is for


# --------------------------------------------------------------------------------------------------------------- helpers


def room_for(count: int, pid: int) -> int:
    """The limit on descriptors with which a process can get so many more, and none after that."""
    there = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    if pid == os.getpid():
        there = {number for number in there if _is_open(number)}  # without the one that listed the folder
    limit = 0
    while count or limit in there:
        count -= limit not in there
        limit += 1
    return limit


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def descriptors_left(count: int, pid: int = 0) -> Iterator[None]:
    """A process can get so many descriptors more, within."""
    with limited(resource.RLIMIT_NOFILE, room_for(count, pid or os.getpid()), pid or os.getpid()):
        yield


def said(call: Callable[[], Any]) -> str:
    """``""`` when the call goes well, else the name of its error and what that says."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'errno', None)}: {str(error) or 'it does not say why'}"
    return ""


def no_descriptor(outcome: str) -> bool:
    """Whether this is success, or the error of one that had no descriptor left, here or in the broker."""
    return not outcome or outcome.startswith(f"OSError {errno.EMFILE}:")


def late(outcome: str) -> bool:
    """Whether this is success, or one of the errors of who needs a broker that has no descriptor left."""
    return no_descriptor(outcome) or outcome.startswith("TimedOut")


def check_all_works(bus: Bus) -> None:
    """A new client of the broker can publish and subscribe, with messages of all ways."""
    with connect(bus.address) as other, other.subscribe("works") as channel:
        for number, size in enumerate(SIZES.values()):
            other.publish(size.message(number), topic="works")
            assert number_of(channel.recv(timeout=DEADLINE)) == number


def in_child(call: Callable[..., Any], *args: Any) -> Any:
    """What a call returns, or raises, in a forked process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(call, *args).result(2 * DEADLINE)


def unprivileged(call: Callable[..., Any]) -> Any:
    """What a call returns in a forked process of a user without any privilege, whose temporary folder is its argument."""
    problem = in_child(said, _become_nobody)
    if problem:
        pytest.skip(f"root cannot become another user here ({problem})")
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as folder:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        value = in_child(_as_nobody, call, folder)
        for leaf in Path(folder).iterdir():
            leaf.chmod(0o700)
        return value


def _become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _as_nobody(call: Callable[..., Any], folder: str) -> Any:
    _become_nobody()
    tempfile.tempdir = folder
    return call(folder)


def start_in(folder: str) -> str:
    """Start a broadcaster whose temporary folder is this one, and try it; the error, which must be a ``StartError``."""
    tempfile.tempdir = folder
    try:
        bus = start_broadcaster()
    except StartError as error:
        return f"{getattr(error.__cause__, 'errno', None)}: {error}"
    with bus, bus.subscribe() as channel:
        bus.publish("works")
        return str(channel.recv(timeout=DEADLINE))


def in_interpreter(call: str) -> list[str]:
    """The command that calls a function of this module, and prints what it returns."""
    code = f"import json; from tests.faults import test_scarcity; print(json.dumps(test_scarcity.{call}))"
    return [sys.executable, "-c", code]


def with_path() -> dict[str, str]:
    """The environment in which that finds this module."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def run_program(call: str, *prefix: str) -> Any:
    """What a function of this module returns in an interpreter of its own, which the command ``prefix`` starts."""
    command = [*prefix, *in_interpreter(call)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE, check=False, env=with_path())
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def namespace(*kinds: str) -> list[str]:
    """The command that runs another one in namespaces of its own, or skip the test."""
    if shutil.which("unshare") is None:
        pytest.skip("the command `unshare` is not installed")
    for user in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *user, *kinds]
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("this user may make no namespaces")


# ------------------------------------------------------------------------------------------------ descriptors: the broker


def test_who_connects_waits_until_the_broker_has_descriptors(bus: Bus) -> None:
    """Without a single descriptor left in the broker a newcomer waits, the others go on, and then it is served."""
    with bus.subscribe() as channel:
        bus.publish(0)
        assert channel.recv(timeout=DEADLINE) == 0
        with descriptors_left(0, bus.stats().pid):
            newcomer = Background(connect, bus.address)
            newcomer.wait_until_blocked("connect")
            for number in range(1, 100):
                bus.publish(number)
                assert channel.recv(timeout=DEADLINE) == number
            assert newcomer.is_alive()
        with newcomer.result() as other:
            other.publish(100)
            assert channel.recv(timeout=DEADLINE) == 100


def attach_and_use(address: str, patience: float) -> list[str]:
    """What comes of each step of a client that cannot wait for long; what it could publish arrives, and nothing else."""
    broker_client.CONNECT_TIMEOUT = patience  # type: ignore[misc]
    handles: list[Bus] = []
    channels: list[Channel[Any]] = []
    outcomes = [said(lambda: handles.append(connect(address)))]
    for bus in handles:
        outcomes.append(said(lambda: channels.append(bus.subscribe("newcomer"))))  # noqa: B023
    opened = False
    for channel in channels:
        outcomes.append(said(channel.fileno))
        opened = not outcomes[-1]
    for bus in handles:
        published = []
        for size in (100, 100_000):
            outcomes.append(said(lambda: bus.publish(bytes(size), topic="newcomer")))  # noqa: B023
            published += [] if outcomes[-1] else [bytes(size)]
        if opened:
            assert take(channels[0], len(published)) == published
            assert not channels[0].poll(0)
    return outcomes


@pytest.mark.parametrize("count", [*range(0, 11, 2), 11])
def test_so_many_descriptors_left_in_the_broker(count: int, bus: Bus) -> None:
    """However few descriptors the broker has left, a newcomer is served or told what is wrong, and harms nobody."""
    with bus.subscribe("old") as channel:
        bus.publish(0, topic="old")
        assert channel.recv(timeout=DEADLINE) == 0
        broker = bus.stats().pid
        patience = 2.0 if count == 11 else 0.1  # how long whoever is not served waits
        with descriptors_left(count, broker):
            outcomes = in_child(attach_and_use, bus.address, patience)
            bus.publish(1, topic="old")
            assert channel.recv(timeout=DEADLINE) == 1
        assert isinstance(outcomes, list), outcomes
        assert all(map(late, outcomes)), outcomes
        assert count < 11 or not any(outcomes)
        bus.publish(2, topic="old")
        assert channel.recv(timeout=DEADLINE) == 2
        check_all_works(bus)
        assert bus.stats().pid == broker


def test_subscribers_until_the_broker_is_full(bus: Bus) -> None:
    """Who cannot open a channel any more is told so, loses nothing, and can as soon as another has been closed."""
    with contextlib.ExitStack() as stack:
        bus.publish("nobody hears this, but it makes this process's pipe")
        bus.flush()
        channels: list[Channel[Any]] = []
        outcome = ""
        with descriptors_left(25, bus.stats().pid):
            while not outcome:
                channels.append(stack.enter_context(bus.subscribe()))
                outcome = said(channels[-1].fileno)
            assert no_descriptor(outcome)
            assert "broker" in outcome
            assert len(channels) > 10
            bus.publish(1)
            bus.publish(bytes(100_000))
            for channel in channels[:-1]:
                assert take(channel, 2) == [1, bytes(100_000)]
            assert no_descriptor(said(channels[-1].fileno))
            channels[0].close()
            wait_until(lambda: not said(channels[-1].fileno))
            assert take(channels[-1], 2) == [1, bytes(100_000)]
        bus.publish(2)
        assert [channel.recv(timeout=DEADLINE) for channel in channels[1:]] == [2] * (len(channels) - 1)
        check_all_works(bus)


def test_large_messages_that_take_all_descriptors(bus: Bus) -> None:
    """When large messages that wait for a channel to be opened have all descriptors of the broker, none of them is lost."""
    with bus.subscribe(capacity=1 << 30) as channel, bus.subscribe() as neighbour:
        large = Size(3 << 20)
        bus.publish(large.message(0))
        assert number_of(neighbour.recv(timeout=DEADLINE)) == 0
        with descriptors_left(8, bus.stats().pid):
            for number in range(1, 12):
                bus.publish(large.message(number))
                assert number_of(neighbour.recv(timeout=DEADLINE)) == number
            assert no_descriptor(said(channel.fileno))
        assert [number_of(message) for message in take(channel, 12)] == list(range(12))
        check_all_works(bus)


def test_a_broker_without_descriptors_and_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that has to ask whether others live goes on when it has no descriptor left for that."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.setattr(peers, "SWEEP", 0.05)
    with start_broadcaster() as bus, bus.subscribe() as channel:
        channel.fileno()
        bus.publish(0)
        assert channel.recv(timeout=DEADLINE) == 0
        asked = Background(bus.wait_for_subscribers, 2)  # its answer comes after many times of asking who lives
        asked.wait_until_blocked("wait_for_subscribers")
        pid = bus.stats().pid
        with descriptors_left(0, pid):
            before = psutil.Process(pid).num_ctx_switches().voluntary
            wait_until(lambda: not alive(pid) or psutil.Process(pid).num_ctx_switches().voluntary > before + 10)
            assert alive(pid)
            bus.publish(1)
            assert channel.recv(timeout=DEADLINE) == 1
        with bus.subscribe():
            asked.result()


# ------------------------------------------------------------------------------------------------ descriptors: the others


@pytest.mark.parametrize("count", range(5))
def test_so_many_descriptors_left_in_a_subscriber(count: int, bus: Bus) -> None:
    """Opening a channel without descriptors raises, and takes nothing away: it can be opened later, and has all."""
    with bus.subscribe() as neighbour, bus.subscribe() as channel:
        bus.publish(0)
        assert neighbour.recv(timeout=DEADLINE) == 0
        with descriptors_left(count):
            outcomes = [said(channel.fileno) for _ in range(3)]
            bus.publish(1)
        assert all(map(no_descriptor, outcomes)), outcomes
        assert not any(outcomes) or count < 4
        for number, size in enumerate(SIZES.values()):
            bus.publish(size.message(number))
        for each, first in ((neighbour, [1]), (channel, [0, 1])):
            assert take(each, len(first)) == first
            assert [number_of(message) for message in take(each, len(SIZES))] == list(range(len(SIZES)))


@pytest.mark.parametrize("size", [100, 3 << 20])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_so_many_descriptors_left_in_a_publisher(count: int, size: int, bus: Bus) -> None:
    """``connect`` and a first publish work or raise, and then nothing was published; the next ones go when they can."""
    with bus.subscribe() as channel:
        channel.fileno()
        handles: list[Bus] = []
        with descriptors_left(count):
            outcome = said(lambda: handles.append(connect(bus.address)))
        assert no_descriptor(outcome)
        assert bool(outcome) == (count < 1)
        other = handles[0] if handles else connect(bus.address)
        published = []
        outcomes = []
        with other:
            with descriptors_left(count):
                for number in range(3):
                    outcomes.append(said(lambda number=number: other.publish(Size(size).message(number))))  # type: ignore[misc]
                    if not outcomes[-1]:
                        published.append(number)
            assert all(map(no_descriptor, outcomes)), outcomes
            assert not any(outcomes) or count < 4
            for number in range(3, 6):
                other.publish(Size(size).message(number))
            assert [number_of(message) for message in everything(other, channel)] == [*published, 3, 4, 5]


def start_with(count: int, method: str) -> tuple[str, int, list[str]]:
    """Start a broadcaster with so many descriptors left: the error, how many are lost by that, and the files that are left."""
    broker_client.CONNECT_TIMEOUT = 2.0  # type: ignore[misc]
    broadcaster.CLOSE_TIMEOUT = 0.1  # type: ignore[misc]
    temporary = tempfile.tempdir = tempfile.mkdtemp()
    context = multiprocessing.get_context(method)
    open_before = descriptors(os.getpid())
    outcome = ""
    try:
        with descriptors_left(count):
            try:
                bus: Bus | None = start_broadcaster(context=context)
            except StartError as error:
                outcome, bus = str(error), None
        gc.collect()
        if bus is not None:
            bus.close(timeout=0)
        assert not multiprocessing.active_children()
        return outcome, descriptors(os.getpid()) - open_before, os.listdir(temporary)
    finally:
        shutil.rmtree(temporary)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_so_many_descriptors_left_for_the_start(method: str) -> None:
    """``start_broadcaster`` works, or is a ``StartError`` that says why and leaves no file, with few descriptors."""
    counts = range(15) if method == "fork" else (1, 5, 20)
    outcomes = []
    for count in counts:
        outcome, lost, left = in_child(start_with, count, method)
        assert not outcome or any(text in outcome for text in (os.strerror(errno.EMFILE), "standard error", "in time"))
        assert not left
        assert method == "fork" or not lost
        outcomes.append(outcome)
    assert os.strerror(errno.EMFILE) in outcomes[0]
    assert not outcomes[-1]


def live_with_few(free: int, workers: int) -> None:
    """A program of some workers, and its own channel, with no more descriptors in any process: all get all."""
    limit = room_for(free, os.getpid())  # those of the test's own process are in all of them
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    count = 2 * len(EVERY_SIZE)
    processes = []
    with start_broadcaster(history=10) as bus, bus.subscribe() as own:
        for _ in range(workers):
            ours, theirs = Pipe()
            process = multiprocessing.Process(target=report_numbers, args=(bus.subscribe(), theirs))
            process.start()
            theirs.close()
            assert answer(ours) == "open"
            processes.append((process, ours))
        for number in range(count):
            bus.publish(EVERY_SIZE[number % len(EVERY_SIZE)].message(number))
            assert number_of(own.recv(timeout=DEADLINE)) == number
    for process, ours in processes:
        assert ours.recv() == (list(range(count)), "EOFError")
        process.join()


@pytest.mark.parametrize(("free", "workers"), [(46, 4), (22, 1)])
def test_a_program_with_few_descriptors(free: int, workers: int) -> None:
    """With few descriptors in any process, and so in the broker, a small program works as ever."""
    in_child(live_with_few, free, workers)


# ------------------------------------------------------------------------------------------------------- memory of pipes


def no_pipe_size(how: str) -> Callable[..., Any]:
    """What can stand for ``fcntl.fcntl`` where all memory for pipes is used up."""
    real = fcntl.fcntl

    def call(fd: int, command: int, argument: int = 0) -> Any:
        if command == fcntl.F_SETPIPE_SZ:
            if how == "refused":
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            return real(fd, command, os.sysconf("SC_PAGESIZE"))
        return real(fd, command, argument)

    return call


def in_order(bus: Bus, rounds: int) -> None:
    """Messages of every size to a quick subscriber, one with a small backlog, and a state: all in order, or counted."""
    count = rounds * len(EVERY_SIZE)
    with bus.subscribe() as quick, bus.subscribe(capacity=5000) as small, bus.subscribe(overflow="latest") as state:
        readers = [Background(take, channel, count) for channel in (quick, small)]
        for number in range(count):
            bus.publish(EVERY_SIZE[number % len(EVERY_SIZE)].message(number), timeout=DEADLINE)
        for reader in readers:
            assert [number_of(message) for message in reader.result()] == list(range(count))
        seen = [number_of(state.recv(timeout=DEADLINE))]
        while seen[-1] < count - 1:
            seen.append(number_of(state.recv(timeout=DEADLINE)))
        assert seen == sorted(set(seen))
        assert state.missed == count - len(seen)


@pytest.mark.parametrize("inline", [False, True], ids=["shared", "inline"])
@pytest.mark.parametrize("how", ["refused", "one page"])
def test_small_pipes(how: str, inline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pipes of a page, or of the size that the system gives, messages of every size arrive in order."""
    monkeypatch.setattr(fcntl, "fcntl", no_pipe_size(how))
    monkeypatch.setenv("MPBROADCAST_INLINE", str(int(inline)))
    with start_broadcaster() as bus:
        in_order(bus, 1)


def test_small_pipes_that_are_opened_late(monkeypatch: pytest.MonkeyPatch, fork: BaseContext, children: Children) -> None:
    """A worker that opens its channel while the broadcaster is being closed still gets all, however small its pipe is."""
    monkeypatch.setattr(fcntl, "fcntl", no_pipe_size("one page"))
    ours, theirs = Pipe()
    with ours, theirs, start_broadcaster() as bus, connect(bus.address) as other:
        process = children(fork, open_when_told, bus.subscribe(), theirs)
        bus.publish_many(Size(100).message(number) for number in range(1000))
        bus.flush()
        closing = Background(bus.close)
        wait_until(lambda: said(lambda: other.subscribe().close()))  # it has begun
        ours.send("open")
        assert answer(ours) == (list(range(1000)), "EOFError")
        closing.result()
        finish(process)


def open_when_told(channel: Channel[Any], orders: Connection) -> None:
    """Open a channel when that is said, and send home the numbers of all that comes, and how it ends."""
    orders.recv()
    orders.send(numbers_until_end(channel))


def use_up_pipes(folder: str) -> list[int]:
    """Use messages of every size while this user may have no more memory for pipes; the sizes of a new pipe and of ours."""
    pipes = []
    try:
        while True:
            pipes.append(os.pipe())
            if fcntl.fcntl(pipes[-1][0], fcntl.F_GETPIPE_SZ) < 1 << 16:
                break
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipes[-1][0], fcntl.F_SETPIPE_SZ, 1 << 20)
        with start_broadcaster() as bus:
            before = open_files()
            bus.publish("nobody hears this, but it makes the pipe")
            (fd,) = (number for number, target in open_files() - before if target.startswith("pipe:"))
            size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            in_order(bus, 2)
        return [fcntl.fcntl(pipes[-1][0], fcntl.F_GETPIPE_SZ), size]
    finally:
        for pipe in pipes:
            os.close(pipe[0])
            os.close(pipe[1])


@pytest.mark.xdist_group("one_user")
def test_a_user_whose_memory_for_pipes_is_used_up() -> None:
    """A user without privileges, who has used up what the system gives for pipes, has all messages in order."""
    limit = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
    if not 0 < limit <= 1 << 16:
        pytest.skip("there is no limit on the memory for pipes here, or a very high one")
    left, ours = unprivileged(use_up_pipes)
    assert left < 1 << 16
    assert ours < 1 << 16


# ------------------------------------------------------------------------------------------------------------- processes


def start_without_fork(number: int, method: str) -> tuple[Any, ...]:
    """Start a broadcaster where no process can be made."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", fail)
        patch.setattr("multiprocessing.util.spawnv_passfds", fail)
        open_before = descriptors(os.getpid())
        try:
            start_broadcaster(context=multiprocessing.get_context(method))
        except StartError as error:
            outcome = (str(error), getattr(error.__cause__, "errno", None))
        left = multiprocessing.active_children()
        gc.collect()
        lost = descriptors(os.getpid()) - open_before
    with start_broadcaster(context=multiprocessing.get_context(method)) as bus, bus.subscribe() as channel:
        bus.publish("works")
        works = channel.recv(timeout=DEADLINE)
    return *outcome, works, left, lost


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_no_process_to_be_had(method: str, number: int, temporary_folder: Path) -> None:
    """When the system makes no process, that is a ``StartError`` with the cause; nothing is left, and a later start works."""
    text, cause, works, left, lost = in_child(start_without_fork, number, method)
    assert os.strerror(number) in text
    assert (cause, works, left) == (number, "works", [])
    assert method == "fork" or lost == 0
    assert not list(temporary_folder.glob("mpbroadcast-*"))


# ------------------------------------------------------------------------------------------------- the temporary folder


def start_in_each(folder: str) -> dict[str, str]:
    """Start a broadcaster where no folder is, and in folders with paths of lengths near to the longest of a socket."""
    outcomes = {name: start_in(f"{folder}/{name}") for name in ("missing", "file")}
    for length in [*range(79, 84), 107, 200]:
        path = folder + "/" + "x" * (length - len(folder) - 1)
        os.mkdir(path)
        outcomes[str(length)] = start_in(path)
        os.rmdir(path)
    return outcomes


def test_a_missing_temporary_folder_and_one_with_a_long_path(temporary_folder: Path) -> None:
    """Without a folder it is a ``StartError`` that names it; however long its path is, nothing is left there."""
    file = temporary_folder / "file"
    file.touch()
    outcomes = in_child(start_in_each, str(temporary_folder))
    for name, number in (("missing", errno.ENOENT), ("file", errno.ENOTDIR)):
        outcome = outcomes.pop(name)
        assert outcome.startswith(f"{number}: ")
        assert f"{temporary_folder}/{name}" in outcome
    assert set(outcomes.values()) == {"works"}
    file.unlink()


def outside(user: int) -> int:
    """Who a user of this user namespace is outside of it; -1 when that is not known."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, there, count = map(int, line.split())
        if first <= user < first + count:
            return there + user - first
    return -1


def start_with_limits(folder: str) -> list[list[str]]:
    """Start a broadcaster in a folder that is read-only; while this user may have no process more; and when it may."""
    os.mkdir(f"{folder}/r", 0o555)
    outcomes = [[start_in(f"{folder}/r"), *os.listdir(f"{folder}/r")]]
    os.rmdir(f"{folder}/r")
    with limited(resource.RLIMIT_NPROC, 1):
        outcomes.append([start_in(folder)])
    return [*outcomes, [start_in(folder), *os.listdir(folder)]]


def test_a_user_with_too_many_processes_and_a_read_only_folder() -> None:
    """Each is a ``StartError`` that says so, and nothing is left."""
    (read_only, *left), (few,), (later, *left_later) = unprivileged(start_with_limits)
    assert read_only.startswith(f"{errno.EACCES}: ")
    assert "/r'" in read_only
    assert (left, later, left_later) == ([], "works", [])
    if few == "works" and outside(os.geteuid()) == 0:
        pytest.skip("this user is root outside of its namespace, and root has as many processes as it likes")
    assert few.startswith(f"{errno.EAGAIN}: the broker process could not be started")


def start_in_full_folders(folder: str) -> list[list[str]]:
    """Start a broadcaster in file systems that have room for so many files only."""
    outcomes = []
    for files in range(1, 5):
        mount = ["mount", "-t", "tmpfs", "-o", f"nr_inodes={files},size=4k", "none", folder]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode:
            print("no file system can be mounted here", file=sys.stderr)
            sys.exit(CANNOT)
        outcomes.append([start_in(folder), *os.listdir(folder)])
        subprocess.run(["umount", folder], check=True)
    return outcomes


def test_a_full_temporary_folder() -> None:
    """Without room for its folder, or for the socket in it, it is a ``StartError``, and nothing is left there."""
    with tempfile.TemporaryDirectory(prefix="full-", dir="/tmp") as folder:
        outcomes = run_program(f"start_in_full_folders({folder!r})", *namespace("--mount"))
    for outcome, *left in outcomes[:2]:
        assert outcome.startswith(f"{errno.ENOSPC}: ")
        assert folder in outcome
        assert not left
    assert outcomes[-1] == ["works"]


# ---------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("room", "inline"), [(1 << 20, True), (16 << 20, False)], ids=["none", "one copy"])
def test_a_subscriber_without_memory(room: int, inline: bool, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscriber without memory for a message has an error for that, at the most, and its neighbour none; it goes on."""
    monkeypatch.setenv("MPBROADCAST_INLINE", str(int(inline)))
    ours, theirs = Pipe()
    with ours, theirs, start_broadcaster() as bus, bus.subscribe() as neighbour:
        # Spawned, so that it has not what this process has released, and its C library has kept.
        process = children(multiprocessing.get_context("spawn"), receive_with_little_memory, bus.subscribe(), theirs, room)
        bus.publish(Size(100).message(0))
        assert answer(ours) == "open"
        ours.send("go")
        for number, size in enumerate([10 << 20, 100, 60_000, 100], 1):
            bus.publish(Size(size).message(number))
            assert number_of(neighbour.recv(timeout=DEADLINE)) == number - 1
        assert number_of(neighbour.recv(timeout=DEADLINE)) == 4
        bus.flush()
        bus.close()
        came = answer(ours)
        finish(process)
    errors = [one for one in came if isinstance(one, str)]
    assert set(errors) <= {"MemoryError", "OSError"}
    assert errors or room > 1 << 20
    # In the place of the message, or before it, if that is still in the pipe.
    assert [one for one in came if one not in errors] in ([1, 2, 3, 4], [2, 3, 4])
    assert len(came) < 5 or 1 in came


@pytest.mark.skipif(not available(), reason="there is no memory to share here")
def test_a_system_without_memory_for_a_ring(monkeypatch: pytest.MonkeyPatch, bus: Bus) -> None:
    """Who writes to a page that cannot be had would be ended: so it is asked for before, and the message goes another way."""
    fd = os.memfd_create("short")
    os.ftruncate(fd, CHUNK * CHUNKS)
    short = Ring(1, mmap.mmap(fd, CHUNK * CHUNKS))
    os.ftruncate(fd, CHUNK)  # what lies behind cannot be had any more
    os.close(fd)
    assert short.copy(0, Payload((bytes(CHUNK),), CHUNK, False))
    assert not short.copy(CHUNK - 1, Payload((bytes(2),), 2, False))
    short.close()
    asked: list[int] = []

    def populate(mapped: mmap.mmap, start: int, length: int) -> bool:
        asked.append(length)
        return False

    monkeypatch.setattr(ring, "populate", populate)
    with bus.subscribe() as channel:
        channel.fileno()
        for number, size in enumerate([3000, 20_000, 400_000] * 3):
            bus.publish(Size(size).message(number), timeout=DEADLINE)
            bus.flush(timeout=DEADLINE)
            assert number_of(channel.recv(timeout=DEADLINE)) == number
    assert asked


# ---------------------------------------------------------------------------------------------------- other PID namespaces


def serve_from_another_namespace(address: str) -> None:
    """A broadcaster whose broker sees no process of the test's; it is killed, and replaced, as standard input has it."""
    registry.UNCLAIMED = 1.0  # type: ignore[misc]
    with start_broadcaster(address=address, authkey=b"shared", restart=True) as bus:
        print("ready", flush=True)
        broker = bus.stats().pid
        for order in sys.stdin:
            os.kill(broker, signal.SIGKILL if order == "kill\n" else signal.SIGSTOP)
            if order == "kill\n":
                wait_until(lambda: bus.stats().pid != broker)
            print("done", flush=True)


@contextlib.contextmanager
def another_namespace(address: str) -> Iterator[Callable[[str], None]]:
    """Orders to a program whose processes are in a PID namespace of their own."""
    command = [*namespace("--pid", "--fork", "--mount-proc"), *in_interpreter(f"serve_from_another_namespace({address!r})")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=with_path()) as program:
        inputs, outputs = cast("IO[str]", program.stdin), cast("IO[str]", program.stdout)
        assert outputs.readline() == "ready\n"

        def order(text: str) -> None:
            print(text, file=inputs, flush=True)
            assert outputs.readline() == "done\n"

        yield order
        inputs.close()


def subscribe_and_wait(address: str, report: Connection) -> None:
    bus: Bus = connect(address, authkey=b"shared")
    channel = bus.subscribe("victim")
    channel.fileno()
    report.send("there")
    signal.pause()


def test_processes_of_another_pid_namespace(temporary_folder: Path, fork: BaseContext, children: Children) -> None:
    """Who has no number where the broker is gets all, is not taken for another such one, and ends with its connection.

    A broker that takes over keeps what it has open, and for a while only, as no end of it would be seen.
    """
    address = str(temporary_folder / "shared")
    with another_namespace(address) as order, connect(address, authkey=b"shared") as bus:
        channel = bus.subscribe("own")
        bus.publish(1, topic="own")
        assert channel.recv(timeout=DEADLINE) == 1
        assert [row.pid for row in bus.stats().subscribers] == [0]
        victims_ = []
        for _ in range(2):
            ours, theirs = fork.Pipe()
            with ours, theirs:
                victims_.append(children(fork, subscribe_and_wait, address, theirs))
                assert answer(ours) == "there"
        victims_[0].kill()
        wait_until(lambda: [row.topics for row in bus.stats().subscribers] == [("own",), ("victim",)])
        waiting = Background(channel.recv, DEADLINE)
        order("stop")
        victims_[1].kill()
        victims_[1].join()
        order("kill")
        assert isinstance(waiting.error(), BrokerRestarted)
        bus.publish(2, topic="own")
        assert channel.recv(timeout=DEADLINE) == 2
        wait_until(lambda: [row.topics for row in bus.stats().subscribers] == [("own",)])
        bus.publish(3, topic="own")
        assert channel.recv(timeout=DEADLINE) == 3


# ----------------------------------------------------------------------------------------------------------------- clocks


def test_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps, a day on or a year back, changes nothing, in the broker and outside; no folder seems forgotten."""
    jumps = Counter()
    real = time.time

    def jumping() -> float:
        jumps.value += 1
        return real() + (86400.0, -365 * 86400.0, 1e9)[jumps.value % 3]

    with start_broadcaster() as older:
        monkeypatch.setattr(time, "time", jumping)
        with start_broadcaster() as bus, bus.subscribe() as channel:
            assert Path(older.address).exists()
            channel.fileno()
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                channel.recv(timeout=0.1)
            with pytest.raises(TimeoutError):
                bus.wait_for_subscribers(5, timeout=0.1)
            assert 0.2 <= time.monotonic() - start < DEADLINE
            in_order(bus, 2)
        assert jumps.value
        older.flush()


# ----------------------------------------------------------------------------------------------------------------- one core


def work_on_one_core() -> None:
    """Broker, publisher and readers on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with start_broadcaster() as bus:
        in_order(bus, 3)


def test_one_core() -> None:
    """Broker, publishers and subscribers on one core: all arrives in order, also when one has to wait."""
    in_child(work_on_one_core)
