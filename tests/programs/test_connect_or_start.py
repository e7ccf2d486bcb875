"""``connect_or_start``: a broker that belongs to no process."""

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import (
    AddressError,
    AuthenticationFailed,
    Broadcaster,
    BrokerLost,
    BrokerRestarted,
    StartError,
    aconnect_or_start,
    connect,
    connect_or_start,
    start_broadcaster,
    trap_points,
)
from tests.support.helpers import DEADLINE, Children, Pipe, answer, finish, kill_broker, rest, wait_until
from tests.support.loops import LOOPS, Cancelled, made, uvloop_has_its_pipe
from tests.support.victims import Program, alive, reached

__all__ = ["uvloop_has_its_pipe"]

Bus = Broadcaster[Any]
SOON = 0.1  # seconds of lingering, where a test waits for the end
LATER = 60.0  # where it must not end
PATIENCE = 2 * DEADLINE  # for a start
SOAK = float(os.environ.get("MPBROADCAST_SOAK", "1"))  # seconds

pytestmark = pytest.mark.usefixtures("runtime")


def end(pid: int) -> None:
    """End a broker that lingers for long, and wait for that."""
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not alive(pid))


def report_broker(pipe: Connection, address: str = "myapp", linger: float = LATER) -> None:
    with connect_or_start(address, linger=linger, start_timeout=PATIENCE) as bus:
        pipe.send(bus.stats().pid)
        answer(pipe, 3 * DEADLINE)


@pytest.mark.parametrize("name", [*LOOPS, "uvloop"])
def test_in_tasks(name: str) -> None:
    """Many tasks at once get the same broker, and the loop runs on while one of them starts it."""
    loop = made(name)
    pids: list[int] = []

    async def note_pid() -> None:
        async with aconnect_or_start("tasks", linger=LATER, start_timeout=PATIENCE) as bus:
            pids.append((await bus.astats()).pid)

    async def main() -> None:
        turns = 0
        tasks = [loop.start(note_pid) for _ in range(5)]
        while len(pids) < len(tasks):
            await loop.sleep(0.001)
            turns += 1
        assert turns > 5  # a start takes far longer
        for task in tasks:
            await task.result()
        assert len({*pids}) == 1
        end(pids.pop())
        with pytest.raises(StartError):
            await aconnect_or_start("tasks", start_timeout=0)
        with pytest.raises(AddressError):
            await aconnect_or_start("absent/folder/broker")
        with pytest.raises(ValueError, match="linger"):
            await aconnect_or_start("tasks", linger=-1)

    loop.run(main)


@pytest.mark.parametrize("name", LOOPS)
def test_cancelled_in_a_task(name: str) -> None:
    """It leaves no descriptor, no process in between, and no broker that stays."""
    loop = made(name)

    async def start() -> None:
        async with aconnect_or_start("cancelled", linger=SOON, start_timeout=PATIENCE):
            pass

    async def main() -> None:
        await start()
        before, children = psutil.Process().num_fds(), psutil.Process().children()
        for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
            task = loop.start(start)
            await loop.sleep(delay)
            task.cancel()
            with contextlib.suppress(Cancelled):
                await task.result()
            assert psutil.Process().children() == children
            assert psutil.Process().num_fds() == before
        await start()  # nothing holds the lock

    loop.run(main)


def test_fifty_processes_at_once_get_the_same_broker(fork: BaseContext, children: Children) -> None:
    pipes = [multiprocessing.Pipe() for _ in range(50)]
    for _, theirs in pipes:
        children(fork, report_broker, theirs)
    brokers = {answer(ours, 3 * DEADLINE) for ours, _ in pipes}
    assert len(brokers) == 1
    for ours, theirs in pipes:
        ours.send("end")
        ours.close()
        theirs.close()
    end(*brokers)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver", "daemon"])
def test_under_each_start_method(method: str, runtime: Path, pipe: Pipe) -> None:
    """Also in a daemonic process, such as a pool's worker, which can start no broker of its own."""
    (ours, theirs), address = pipe, str(runtime / "socket")
    context = multiprocessing.get_context("fork" if method == "daemon" else method)
    process = context.Process(target=report_broker, args=(theirs, address), daemon=method == "daemon")  # type: ignore[attr-defined]
    process.start()
    broker = answer(ours, 3 * DEADLINE)
    with connect(address) as bus:
        assert bus.stats().pid == broker
        ours.send("end")
        finish(process)
        process.close()
        assert bus.stats().pid == broker
    end(broker)


def test_it_belongs_to_no_process() -> None:
    """It has another session, no descriptor, terminal or folder of its caller's, and is the child of none of its processes."""
    code = f"import mpbroadcast; print(mpbroadcast.connect_or_start('myapp', linger={LATER}, start_timeout=60).stats().pid)"
    # The end of its output comes although the broker lives on.
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, capture_output=True, timeout=60, text=True, check=True
    )
    assert done.stderr == ""
    broker = psutil.Process(int(done.stdout))
    assert os.getpid() not in [parent.pid for parent in broker.parents()]
    assert broker.cwd() == "/"
    assert broker.terminal() is None
    assert os.getsid(broker.pid) not in (os.getsid(0), broker.pid)
    assert broker.num_fds() < 20
    for number in range(3):
        assert os.readlink(f"/proc/{broker.pid}/fd/{number}") == os.devnull
    assert Path(broker.environ()["XDG_RUNTIME_DIR"], "mpbroadcast-myapp.key").read_text().strip() not in str(broker.cmdline())
    end(broker.pid)


CALLER = """
import signal, sys
from mpbroadcast import connect_or_start
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # ignored in what is started in the background, or by nohup
    signal.signal(number, signal.SIG_DFL)
bus = connect_or_start("myapp", linger=float(sys.argv[1]))
print(bus.stats().pid, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_a_signal_to_the_group_of_the_caller(number: signal.Signals) -> None:
    """The broker goes on, and ends when the other handle has gone."""
    with Program("-c", CALLER, "0.5") as program:
        broker = int(program.line())
        with connect("myapp") as bus, bus.subscribe() as channel:
            os.killpg(program.pid, number)
            program.process.wait(DEADLINE)
            bus.publish("goes on")
            assert channel.recv(DEADLINE) == "goes on"
            assert bus.stats().pid == broker
        wait_until(lambda: not alive(broker))


def die_at(moment: str, linger: float) -> None:
    def reach(name: str, subject: object = None) -> None:
        if name == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    trap_points.reach = reach
    connect_or_start("myapp", linger=linger, start_timeout=PATIENCE)


def be_first() -> None:
    os.setpgid(0, 0)
    connect_or_start("myapp", linger=0.3, start_timeout=PATIENCE)
    signal.pause()


@pytest.mark.soak
@pytest.mark.timeout(SOAK + 60)
def test_the_first_caller_is_killed_at_any_moment_with_its_group_or_alone(fork: BaseContext, children: Children) -> None:
    """Others get the same broker, and it ends: before anything has begun, on the way, or when all is there."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    moments = random.Random(seed)
    end = time.monotonic() + SOAK
    is_first = True
    while is_first or time.monotonic() < end:
        is_first = False
        victim = children(fork, be_first)
        assert victim.pid
        time.sleep(moments.uniform(0, 0.5))
        pipes = [multiprocessing.Pipe() for _ in range(3)]
        processes = [children(fork, report_broker, theirs, "myapp", 0.3) for _, theirs in pipes]
        time.sleep(moments.uniform(0, 0.1))
        (os.killpg if moments.random() < 0.5 and os.getpgid(victim.pid) == victim.pid else os.kill)(victim.pid, signal.SIGKILL)
        (broker,) = {answer(ours, 3 * DEADLINE) for ours, _ in pipes}
        for ours, theirs in pipes:
            ours.send("end")
            ours.close()
            theirs.close()
        for process in processes:
            finish(process)
        wait_until(lambda broker=broker: not alive(broker), DEADLINE)  # type: ignore[misc]
        assert reached("myapp") is None


@pytest.mark.parametrize(
    ("moment", "linger"),
    [("starting for all", SOON), *itertools.product(("waiting for all", "connected"), (SOON, LATER))],
)
def test_the_first_caller_is_killed(moment: str, linger: float, fork: BaseContext, children: Children) -> None:
    """Another one gets a broker all the same, also the one that was begun to be started; and all of it ends."""
    process = children(fork, die_at, moment, linger)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    is_there = linger == LATER
    with wait_until(lambda: reached("myapp") if is_there else connect_or_start("myapp", linger=SOON), DEADLINE) as bus:
        with bus.subscribe() as channel:
            bus.publish("here")
            assert channel.recv(DEADLINE) == "here"
        broker = bus.stats().pid
    if is_there:
        os.kill(broker, signal.SIGTERM)
    wait_until(lambda: not alive(broker))


def test_a_group_that_is_signalled_during_the_start(fork: BaseContext, children: Children, pipe: Pipe) -> None:
    """What is between the caller and its broker does not end by it."""

    def start(pipe: Connection) -> None:
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else lambda *_: None)

        def reach(name: str, subject: object = None) -> None:
            if name == "waiting for all":
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    os.killpg(0, number)

        trap_points.reach = reach
        report_broker(pipe)

    process = children(fork, start, pipe[1])
    broker = answer(pipe[0], DEADLINE)
    assert alive(broker)
    pipe[0].send("end")
    finish(process)
    end(broker)


def test_it_goes_on_under_churn() -> None:
    """Handles that are there for a moment only keep it, for longer than it lingers."""
    with connect_or_start("myapp", linger=1.0) as bus:
        broker = bus.stats().pid
    end_of_churn = time.monotonic() + 2.5
    while time.monotonic() < end_of_churn:
        with connect("myapp") as bus:
            assert bus.stats().pid == broker
        time.sleep(0.05)
    wait_until(lambda: not alive(broker))
    with pytest.raises(BrokerLost):
        connect("myapp")


def test_a_broker_that_does_not_linger_has_its_first_handle() -> None:
    with connect_or_start("myapp", linger=0, start_timeout=PATIENCE) as bus:
        broker = bus.stats().pid
    wait_until(lambda: not alive(broker))


@pytest.mark.parametrize("last", ["channel", "handle", "unopened channel"])
def test_what_keeps_it(last: str) -> None:
    """It lives as long as one of them does, though for longer than it lingers."""
    bus = connect_or_start("myapp", linger=SOON)
    broker, channel = bus.stats().pid, bus.subscribe()
    if last == "channel":
        channel.fileno()
    if last == "handle":
        channel.close()
    else:
        bus.close()
    time.sleep(5 * SOON)
    assert alive(broker)
    channel.close()
    bus.close()
    wait_until(lambda: not alive(broker))


def test_a_broker_that_is_killed_is_replaced_and_awaits_its_handles(fork: BaseContext, children: Children, pipe: Pipe) -> None:
    """A handle that is not used meanwhile keeps the next one, too; that ends when its process has."""
    with connect_or_start("myapp", linger=SOON, restart=True) as bus:
        process = children(fork, report_broker, pipe[1])
        first = answer(pipe[0], DEADLINE)
        assert bus.stats().pid == first
        kill_broker(bus)
        second = bus.stats().pid
    time.sleep(5 * SOON)
    assert alive(second)
    pipe[0].send("end")
    finish(process)
    wait_until(lambda: not alive(second))


def test_messages_over_a_restart(runtime: Path) -> None:
    """Both the key file and the socket stay."""
    with connect_or_start("myapp", linger=SOON, restart=True) as bus, bus.subscribe() as channel:
        channel.fileno()
        key = Path(bus.address + ".key").read_text()
        os.kill(bus.stats().pid, signal.SIGKILL)
        with pytest.raises(BrokerRestarted):
            channel.recv(DEADLINE)
        bus.publish("behind it")
        assert channel.recv(DEADLINE) == "behind it"
        assert Path(bus.address + ".key").read_text() == key


def test_options_count_for_the_first_caller_only(runtime: Path) -> None:
    with connect_or_start("myapp", linger=SOON, history=2) as bus, connect_or_start("myapp", linger=0, history=0) as other:
        bus.publish_many(range(5))
        bus.flush()
        with other.subscribe(replay=5) as channel:
            other.unsubscribe(channel)
            assert rest(channel) == [3, 4]
    with start_broadcaster(address="other") as bus, connect_or_start("other") as other:
        assert other.stats().pid == bus.stats().pid


def test_with_a_key(runtime: Path) -> None:
    """There is no key file, and each caller needs the key."""
    with connect_or_start("myapp", authkey=b"mine", linger=SOON) as bus:
        assert [path.name for path in runtime.iterdir()] == ["mpbroadcast-myapp"]
        with connect_or_start("myapp", authkey=b"mine") as other:
            assert other.stats().pid == bus.stats().pid
        with pytest.raises(AuthenticationFailed):
            connect_or_start("myapp", authkey=b"another")


def test_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPBROADCAST_ADDRESS", "myapp")
    with connect_or_start(linger=SOON) as bus, connect() as other:
        assert bus.address == other.address


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (connect_or_start, AddressError, "MPBROADCAST_ADDRESS"),
        (lambda: connect_or_start("/no/such/folder/x"), AddressError, "folder"),
        (lambda: connect_or_start("myapp", linger=-1), ValueError, "linger"),
        (lambda: connect_or_start("myapp", linger="1"), TypeError, "linger"),  # type: ignore[arg-type]
        (lambda: connect_or_start("myapp", history="1"), TypeError, "history"),  # type: ignore[arg-type]
        (lambda: connect_or_start("myapp", context=None), TypeError, "context"),  # type: ignore[call-arg]
        (lambda: connect_or_start("precious"), StartError, "precious"),
        (lambda: connect_or_start("myapp", log_config={"version": 7}), StartError, "log_config"),
        (lambda: connect_or_start("myapp", start_timeout=0.001), StartError, "start_timeout"),
    ],
)
def test_errors(
    call: Callable[[], Bus], kind: type[Exception], text: str, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPBROADCAST_ADDRESS", raising=False)
    in_the_way = runtime / "mpbroadcast-precious"
    in_the_way.write_text("precious")
    with pytest.raises(kind, match=text):
        call()
    assert in_the_way.read_text() == "precious"
    in_the_way.unlink()


def test_a_log_in_a_file(tmp_path: Path) -> None:
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "log")}
    config = {"version": 1, "handlers": {"file": handler}, "root": {"handlers": ["file"], "level": "INFO"}}
    with connect_or_start("myapp", linger=SOON, log_config=config) as bus, bus.subscribe() as channel:
        channel.fileno()
    wait_until(lambda: "is removed" in (tmp_path / "log").read_text())
