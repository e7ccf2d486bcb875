"""What only another namespace, or a user without privileges, shows: process IDs, a full file system, limits of a user."""

import contextlib
import errno
import fcntl
import importlib
import json
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
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerRestarted, StartError, connect, start_broadcaster
from mpbroadcast.broker import peers, registry
from tests.support import victims
from tests.support.helpers import DEADLINE, Background, Children, answer, wait_until
from tests.support.large_workers import limited

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and limits are as Linux has them")

Bus = Broadcaster[Any]
NOBODY = 65534
CANNOT = 77  # exit code of a program that cannot do here what it is for


def command(call: str, *prefix: str) -> list[str]:
    """The command that prints what a function of this module returns, in an interpreter that ``prefix`` starts."""
    code = f"import json; from tests.faults import test_namespaces; print(json.dumps(test_namespaces.{call}))"
    return [*prefix, sys.executable, "-c", code]


def result_of(call: str, *prefix: str) -> Any:
    """What that function returns, unless it cannot do that here."""
    done = subprocess.run(command(call, *prefix), capture_output=True, text=True, timeout=2 * DEADLINE, check=False)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def give_up(reason: str) -> None:
    """End this program, which is not one of the tests' own processes: the test is skipped."""
    print(reason, file=sys.stderr)
    sys.exit(CANNOT)


def namespace(*kinds: str) -> list[str]:
    """The command that runs another one in namespaces of its own, or skip the test."""
    if shutil.which("unshare") is None:
        pytest.skip("the command `unshare` is not installed")
    for user in ([], ["--user", "--map-root-user"]):
        prefix = ["unshare", *user, *kinds]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    pytest.skip("this user may make no namespaces")


PROCESSES = "--pid", "--fork", "--mount-proc"


def start_in(folder: str) -> str:
    """Start a broadcaster whose temporary folder is this one; ``"works"``, or the error, which must be a ``StartError``."""
    tempfile.tempdir = folder
    try:
        with start_broadcaster() as bus:
            bus.flush()
    except StartError as error:
        return f"{getattr(error.__cause__, 'errno', None)}: {error}"
    return "works"


def again(pid: int, call: Callable[[], None]) -> int:
    """Fork a process with this ID."""
    for _ in range(100):
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError:
            give_up("the ID of a process cannot be chosen here")
        child = os.fork()
        if child == 0:
            if os.getpid() == pid:
                call()
                signal.pause()
            os._exit(0)
        if child == pid:
            return child
        os.waitpid(child, 0)
    give_up("another process takes the ID each time")
    return -1


def refuse_pidfds(*_: int) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def live_with_ids_that_come_again(pidfds: bool) -> dict[str, Any]:
    """Kill a subscriber whose pipes a child of its own keeps open, and give its ID to a new client of the broker. The broker is
    stopped meanwhile, so that the newcomer connects before the death can have been noticed."""
    if not pidfds:
        os.pidfd_open = refuse_pidfds  # type: ignore[assignment]
    peers.SWEEP = 0.3  # type: ignore[misc]
    bus: Bus = start_broadcaster()
    own = bus.subscribe("own")
    own.fileno()
    ours, theirs = Pipe()
    victim = multiprocessing.get_context("fork").Process(target=victims.held_subscriber, args=(bus, theirs))
    victim.start()
    bus.wait_for_subscribers(2, timeout=DEADLINE)
    bus.publish(1)
    holder = answer(ours)
    time.sleep(0.02)  # the next process needs another start time, which the system counts in hundredths of a second
    broker = bus.stats().pid
    os.kill(broker, signal.SIGSTOP)
    victim.kill()
    victim.join()

    def subscribe_and_stay() -> None:
        outcome = "harmed"
        with contextlib.suppress(BaseException):
            theirs.send("comes")
            channel = bus.subscribe("newcomer")
            channel.fileno()
            bus.wait_for_subscribers(3, topic="gone", timeout=DEADLINE)
            bus.publish("hello", topic="newcomer")
            outcome = str(channel.recv(timeout=DEADLINE))
        theirs.send(outcome)

    assert victim.pid is not None
    other = again(victim.pid, subscribe_and_stay)
    assert answer(ours) == "comes"
    wait_until(lambda: victims.asleep(other))  # it has connected, and waits for the broker
    os.kill(broker, signal.SIGCONT)
    wait_until(lambda: not any("*" in row.topics for row in bus.stats().subscribers))
    bus.publish(2, topic="own")
    result = {"own": own.recv(timeout=DEADLINE), "is alive": victims.alive(other)}
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(bus.subscribe("gone"))
        result["newcomer"] = answer(ours)
    for process in (holder, other):
        os.kill(process, signal.SIGKILL)
    os.waitpid(other, 0)
    bus.close()
    return result


@pytest.mark.parametrize("pidfds", [True, False], ids=["pidfds", "no pidfds"])
def test_a_process_id_that_comes_again(pidfds: bool) -> None:
    """The subscription of a dead process goes although its ID is another one's, which is not taken for it."""
    if pidfds and not hasattr(os, "pidfd_open"):
        pytest.skip("there are no pidfds here")
    outcome = result_of(f"live_with_ids_that_come_again({pidfds})", *namespace(*PROCESSES))
    assert outcome == {"own": 2, "is alive": True, "newcomer": "hello"}


def serve_from_another_namespace(address: str) -> None:
    """Stop or kill the broker of a broadcaster, which sees no process of the test's, by orders on standard input."""
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
    """Yield what gives orders to a broadcaster whose processes are in a PID namespace of their own."""
    call = command(f"serve_from_another_namespace({address!r})", *namespace(*PROCESSES))
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        orders, replies = program.stdin, program.stdout
        assert orders is not None
        assert replies is not None
        assert replies.readline() == "ready\n"

        def order(text: str) -> None:
            print(text, file=orders, flush=True)
            assert replies.readline() == "done\n"

        yield order
        orders.close()


def subscribe_and_wait(address: str, report: Connection) -> None:
    """Open a channel, report that, and stay."""
    bus: Bus = connect(address, authkey=b"shared")
    channel = bus.subscribe("victim")
    channel.fileno()
    report.send("there")
    signal.pause()


def test_processes_of_another_pid_namespace(temporary_folder: Path, fork: BaseContext, children: Children) -> None:
    """A process without an ID where the broker is gets all, is not taken for another such one, and ends with its connection. A
    broker that takes over keeps what it has open, and for a while only, as no end of it would be seen."""
    address = str(temporary_folder / "shared")
    ours, theirs = Pipe()
    with ours, theirs, another_namespace(address) as order, connect(address, authkey=b"shared") as bus:
        channel = bus.subscribe("own")
        bus.publish(1, topic="own")
        assert channel.recv(timeout=DEADLINE) == 1
        assert [row.pid for row in bus.stats().subscribers] == [0]
        one, other = (children(fork, subscribe_and_wait, address, theirs) for _ in range(2))
        assert [answer(ours), answer(ours)] == ["there"] * 2
        one.kill()
        wait_until(lambda: [row.topics for row in bus.stats().subscribers] == [("own",), ("victim",)])
        waiting = Background(channel.recv, DEADLINE)
        order("stop")
        other.kill()
        other.join()
        order("kill")
        assert isinstance(waiting.error(), BrokerRestarted)
        for number in (2, 3):
            bus.publish(number, topic="own")
            assert channel.recv(timeout=DEADLINE) == number
            wait_until(lambda: [row.topics for row in bus.stats().subscribers] == [("own",)])


def start_in_full_folders(folder: str) -> list[list[str]]:
    """Start a broadcaster in file systems that have room for so many files only."""
    outcomes = []
    for files in range(1, 5):
        mount = ["mount", "-t", "tmpfs", "-o", f"nr_inodes={files},size=4k", "none", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            give_up("no file system can be mounted here")
        outcomes.append([start_in(folder), *os.listdir(folder)])
        subprocess.run(["umount", folder], check=True)
    return outcomes


def test_a_full_temporary_folder() -> None:
    """Without room for its folder, or for the socket in it, it is a ``StartError``, and nothing is left there."""
    with tempfile.TemporaryDirectory(prefix="full-", dir="/tmp") as folder:
        outcomes = result_of(f"start_in_full_folders({folder!r})", *namespace("--mount"))
    for outcome, *left in outcomes[:2]:
        assert outcome.startswith(f"{errno.ENOSPC}: ")
        assert folder in outcome
        assert not left
    assert outcomes[-1] == ["works"]


def as_nobody(call: Callable[[str], list[Any]], folder: str) -> list[Any]:
    """Return what a call returns for a user without privileges, which may not be able to import anything more."""
    start_in(tempfile.gettempdir())
    for module in ("launcher", "main"):
        importlib.import_module(f"mpbroadcast.broker.host.{module}")
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:
            give_up("root cannot become another user here")
    tempfile.tempdir = folder
    return call(folder)


def result_as_nobody(call: str) -> Any:
    """What a function of this module returns for such a user, given a folder that it may write."""
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as folder:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        return result_of(f"as_nobody(test_namespaces.{call}, {folder!r})")


def start_with_limits(folder: str) -> list[list[str]]:
    """Start a broadcaster in a folder that is read-only; while this user may have no process more; and when it may."""
    os.mkdir(f"{folder}/r", 0o555)
    outcomes = [[start_in(f"{folder}/r"), *os.listdir(f"{folder}/r")]]
    os.rmdir(f"{folder}/r")
    with limited(resource.RLIMIT_NPROC, 1):
        outcomes.append([start_in(folder)])
    return [*outcomes, [start_in(folder), *os.listdir(folder)]]


def test_a_user_with_too_many_processes_and_a_read_only_folder() -> None:
    """Each is a ``StartError`` with the cause, and nothing is left."""
    (read_only, *left), (few,), (later, *left_later) = result_as_nobody("start_with_limits")
    assert read_only.startswith(f"{errno.EACCES}: ")
    assert "/r'" in read_only
    assert (left, later, left_later) == ([], "works", [])
    if few == "works" and Path("/proc/self/uid_map").read_text().split()[0] != "0":
        pytest.skip("this user may be root outside of its namespace, and root has as many processes as it likes")
    assert few.startswith(f"{errno.EAGAIN}: the broker process could not be started")


def use_up_pipes(folder: str) -> list[int]:
    """Publish while this user may have no more memory for pipes. Return the size of a new pipe, and what was received."""
    pipes: list[tuple[int, int]] = []
    size = 1 << 20
    while size >= 1 << 16:
        pipes.append(os.pipe())
        size = fcntl.fcntl(pipes[-1][0], fcntl.F_GETPIPE_SZ)
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipes[-1][0], fcntl.F_SETPIPE_SZ, 1 << 20)
    with start_broadcaster() as bus, bus.subscribe() as channel:
        received = []
        for number, length in enumerate([1, 3000, 60_000, 300_000, 3 << 20] * 2):
            bus.publish((number, bytes(length)), timeout=DEADLINE)
            received.append(channel.recv(DEADLINE)[0])
    return [size, *received]


@pytest.mark.xdist_group("one_user")
def test_a_user_whose_memory_for_pipes_is_used_up() -> None:
    """Such a user has all messages in order."""
    if not 0 < int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text()) <= 1 << 16:
        pytest.skip("there is no limit on the memory for pipes here, or a very high one")
    size, *received = result_as_nobody("use_up_pipes")
    assert size < 1 << 16
    assert received == list(range(10))
