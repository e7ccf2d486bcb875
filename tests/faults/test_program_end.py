"""How programs end: forgotten ``close()``, Ctrl-C, unguarded main modules, and what ``close()`` itself promises."""

import contextlib
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerLost, StartError, connect, start_broadcaster
from mpbroadcast.broker.host.socket_file import Listening
from tests.support import victims
from tests.support.helpers import DEADLINE, Children, Pipe, answer, finish, wait_until
from tests.support.victims import Program, alive

METHODS = ["fork", "spawn", "forkserver"] if os.environ.get("MPBROADCAST_FAULTS") == "all" else ["fork", "spawn"]

Write = Callable[[str], str]
IMPORTS = """
import atexit, contextlib, multiprocessing, os, signal, sys, threading, time
from mpbroadcast import BrokerLost, ClosedError, connect, start_broadcaster
"""


@pytest.fixture
def script(tmp_path: Path) -> Write:
    """Writes a program into a file; gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(IMPORTS + text)
        return str(path)

    return write


def ends(program: Program, code: int, out: str) -> str:
    """Check that the program ends with this code, and prints that; no process is left. Return its standard error."""
    ended, printed, errors = program.end()
    assert (ended, printed) == (code, out), errors
    return errors


def ends_well(program: Program, out: str, *, log: bool = False) -> None:
    """Check that the program succeeds, and prints only that; with ``log`` the broker may name a channel with a rest."""
    errors = ends(program, 0, out)
    if log:
        errors = re.sub(r"^mpbroadcast broker \d+: WARNING: channel \d+ .*\n", "", errors, flags=re.MULTILINE)
    assert errors == ""


FORGETFUL = """
def work(channel, is_patient):
    if is_patient:
        multiprocessing.parent_process().join()
    print(sum(channel), flush=True)

if __name__ == "__main__":
    method, restart, end = sys.argv[1:]
    multiprocessing.set_start_method(method)
    bus = start_broadcaster(restart=restart == "restart")
    for _ in range(2):
        multiprocessing.Process(target=work, args=(bus.subscribe(), end.isdigit())).start()
    bus.publish_many(range(1000))
    if end.isdigit():
        bus.flush()
        if end != "0":
            os.kill(os.getpid(), int(end))
        os._exit(0)
    if end:
        raise SystemExit(end)
"""


@pytest.mark.parametrize(("method", "error"), [*((method, "") for method in METHODS), ("fork", "the program has failed")])
def test_a_forgotten_close_still_delivers(method: str, error: str, script: Write) -> None:
    """A program that never calls ``close()``, or fails, delivers all to its workers, and exits; nothing else is shown."""
    with Program("-W", "error", script(FORGETFUL), method, "once", error) as program:
        assert ends(program, 1 if error else 0, "499500\n499500\n").strip() == error


@pytest.mark.parametrize(
    ("method", "restart", "number"),
    [
        ("fork", "once", signal.SIGKILL),
        ("spawn", "once", signal.SIGTERM),
        ("fork", "once", 0),  # os._exit
        ("fork", "restart", signal.SIGKILL),
    ],
)
def test_what_a_dead_starter_handed_on_is_delivered(method: str, restart: str, number: int, script: Write) -> None:
    """Its workers open their channels only when the starter is dead, and get all, and a clean end."""
    with Program(script(FORGETFUL), method, restart, str(int(number))) as program:
        assert ends(program, -number, "499500\n499500\n") == ""


DROPPED = """
def use(address, orders):
    with connect(address) as bus, bus.subscribe() as channel:
        orders.send("connected")
        orders.recv()

if __name__ == "__main__":
    needed_by, restart = sys.argv[1:]
    bus = start_broadcaster(restart=restart == "restart")
    address = bus.address
    context = multiprocessing.get_context("spawn" if needed_by == "process" else "fork")
    ours, theirs = multiprocessing.Pipe()
    channel = bus.subscribe() if needed_by == "channel" else None
    targets = {"process": (use, address, theirs), "forked": (lambda bus: theirs.recv(), bus)}
    broker = multiprocessing.active_children()
    if needed_by in targets:
        target, *args = targets[needed_by]
        other = context.Process(target=target, args=args)
        other.start()
    if needed_by == "process":
        ours.recv()
    del bus, targets
    target = args = None
    if needed_by != "nothing":
        print(connect(address).stats().published, flush=True)
        ours.send("end")
        if needed_by != "channel":
            other.join()
        channel = None
    if needed_by != "forked":
        for process in broker:
            process.join()
    print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("needed_by", "restart"),
    [(what, "once") for what in ("nothing", "channel", "process", "forked")] + [("nothing", "restart")],
)
def test_a_dropped_broadcaster_ends_its_broker(needed_by: str, restart: str, script: Write) -> None:
    """Once nothing needs it any more, at the latest with the program; and a ``ResourceWarning`` reports it as dropped."""
    with Program("-W", "always::ResourceWarning", script(DROPPED), needed_by, restart) as program:
        errors = ends(program, 0, "ended\n" if needed_by == "nothing" else "0\nended\n")
        assert errors.count("was dropped without close()") == 1


@pytest.mark.usefixtures("leaves_nothing")
def test_a_recorded_warning_keeps_no_broker() -> None:
    """The warning about a handle that was dropped does not keep what it is about."""
    bus: Broadcaster[Any] = start_broadcaster()
    pid = bus.stats().pid
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always", ResourceWarning)
        del bus
        gc.collect()
        wait_until(lambda: pid not in {process.pid for process in multiprocessing.active_children()})
    (warning,) = recorded
    assert "was dropped without close" in str(warning.message)
    assert warning.source is not None  # for tracemalloc


INTERRUPTED = """
def work(channel, opened):
    try:
        channel.poll(0)
        opened.send(True)
        for message in channel:
            pass
    except KeyboardInterrupt:
        pass

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    bus = start_broadcaster()
    mine, theirs = multiprocessing.Pipe()
    for _ in range(2):
        multiprocessing.Process(target=work, args=(bus.subscribe(), theirs)).start()
        mine.recv()
    channel = bus.subscribe("never")
    full = bus.subscribe("full", capacity=50_000)
    waits = {
        "recv": channel.recv,
        "publish": lambda: bus.publish(bytes(1000), topic="full"),
        "traffic": lambda: bus.publish(bytes(1000), topic="busy"),
        "wait_for_subscribers": lambda: bus.wait_for_subscribers(1000),
    }
    try:
        print("ready", flush=True)
        while True:
            waits[sys.argv[2]]()
    except KeyboardInterrupt:
        if "raise" in sys.argv:
            raise
        print("caught")
"""


@pytest.mark.parametrize(
    ("wait", "method", "end"),
    [
        *(("recv", method, "caught") for method in METHODS),
        *((wait, "fork", "caught") for wait in ("publish", "traffic")),
        *((wait, "fork", "raise") for wait in ("recv", "publish", "wait_for_subscribers")),
    ],
)
def test_ctrl_c_ends_all_without_a_word(wait: str, method: str, end: str, script: Write) -> None:
    """Ctrl-C reaches the whole group: only the user's own ``KeyboardInterrupt`` is seen, and no process is left."""
    with Program("-W", "error", script(INTERRUPTED), method, wait, end) as program:
        assert program.line() == "ready"
        if wait != "traffic":
            wait_until(lambda: victims.stalled(program.pid))
        os.killpg(program.pid, signal.SIGINT)
        if end == "caught":
            ends_well(program, "caught\n", log=True)
            return
        code, _, errors = program.end()
        assert code in (-signal.SIGINT, 128 + signal.SIGINT)
        assert errors.count("Traceback") == 1
        assert errors.rstrip().endswith("KeyboardInterrupt")


UNGUARDED = """
import multiprocessing
multiprocessing.set_start_method("{method}")
from mpbroadcast import start_broadcaster
print("main", flush=True)
with start_broadcaster(context={context}) as bus, bus.subscribe() as channel:
    bus.publish("hello")
    assert channel.recv(10) == "hello"
"""


@pytest.mark.parametrize(
    ("how", "method"),
    [("file", "fork"), ("file", "spawn"), ("-", "spawn"), ("-m", "spawn"), ("-c", "spawn"), ("-c", "forkserver")],
)
def test_without_a_context_no_guard_is_needed(
    how: str, method: str, script: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the default start method is, the broker imports nothing of the main module, however that was given."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    text = UNGUARDED.format(method=method, context=None)
    path = script(text)
    commands = {"file": [path], "-": ["-"], "-m": ["-m", "program"], "-c": ["-c", text]}
    with open(path) as file, Program("-W", "error", *commands[how], stdin=file) as program:
        ends_well(program, "main\n")


NEEDS_MAIN = """
import logging, multiprocessing
from mpbroadcast import start_broadcaster
class Handler(logging.NullHandler): pass
multiprocessing.set_start_method("spawn")
start_broadcaster(log_config={"version": 1, "handlers": {"own": {"()": Handler}}})
"""
GUARD = 'if __name__ == "__main__":'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (UNGUARDED.format(method="fork", context='multiprocessing.get_context("spawn")'), GUARD),
        (UNGUARDED.format(method="fork", context='multiprocessing.get_context("forkserver")'), GUARD),
        (NEEDS_MAIN, "what log_config names must stand in another one"),
    ],
    ids=["spawn", "forkserver", "log_config"],
)
def test_a_start_error_has_what_is_wrong_with_the_main_module(text: str, reason: str, script: Write) -> None:
    """With a context it is imported, and must have a guard; without one the broker has nothing of it. Nothing hangs."""
    with Program(script(text)) as program:
        code, _, errors = program.end()
        assert code != 0
        assert "StartError" in errors
        assert reason in errors


CLOSED = "import os, sys; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


def test_a_program_whose_standard_streams_are_closed(script: Write) -> None:
    """Its sockets take the numbers 0, 1 and 2, and stay its own."""
    with Program("-c", CLOSED, script(UNGUARDED.format(method="fork", context=None))) as program:
        ends_well(program, "")


def test_a_daemonic_process_cannot_start_a_broker(fork: BaseContext) -> None:
    with fork.Pool(1) as pool:
        with pytest.raises(StartError, match="daemonic"):
            pool.apply(start_broadcaster)
        pool.close()
        pool.join()


def test_the_broker_keeps_no_descriptor_of_its_starter(fork: BaseContext) -> None:
    """A forked broker releases what it inherited: a pipe of the user's ends when the user closes it."""
    reader, writer = os.pipe()
    with start_broadcaster(context=fork) as bus, open(reader, "rb") as file:
        os.close(writer)
        assert file.read() == b""
        bus.publish("works")


def test_close_gives_up_on_a_reader_that_never_reads(
    fork: BaseContext, children: Children, pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    """``close()`` returns within its timeout; a channel that was not drained gets ``BrokerLost``, and the log names it."""
    bus: Broadcaster[Any] = start_broadcaster()
    ours, theirs = fork.Pipe()
    with ours, theirs:
        channel = bus.subscribe("all")
        other = children(fork, victims.slow_reader, bus.subscribe("all", "other"), theirs, 0.0005)
        reader = children(fork, victims.slow_reader, channel, pipe[1], None)
        assert answer(pipe[0]) == answer(ours) == "open"
        for number in range(1000):
            bus.publish((number, bytes(3500)), topic="all" if number % 10 else "other")
        start = time.monotonic()
        bus.close(timeout=1.0)
        assert 0.5 < time.monotonic() - start < 1.0 + 4.0
        assert answer(ours) == (list(range(1000)), "EOFError"), "the others are drained, and end cleanly"
        pipe[0].send("go on")
        received, end = answer(pipe[0])
        assert end == BrokerLost.__name__
        assert 0 < len(received) < 900
        finish(reader)
        finish(other)
    assert re.search(rf"WARNING: channel {channel.id} .*{reader.pid}", capfd.readouterr().err)


@pytest.mark.parametrize(("count", "end"), [(10, "EOFError"), (1000, "BrokerLost")])
def test_close_that_may_not_wait(count: int, end: str, fork: BaseContext, children: Children, pipe: Pipe) -> None:
    """With a timeout of 0, what is in the pipe is received, and the end is clean if nothing else was published."""
    bus: Broadcaster[Any] = start_broadcaster()
    reader = children(fork, victims.slow_reader, bus.subscribe(), pipe[1], None)
    assert answer(pipe[0]) == "open"
    bus.publish_many((number, bytes(1900)) for number in range(count))
    bus.flush(timeout=DEADLINE)
    start = time.monotonic()
    bus.close(timeout=0)
    assert time.monotonic() - start < 2.0
    pipe[0].send("go on")
    received, ended = answer(pipe[0])
    assert (received == list(range(count)), ended) == (end == "EOFError", end)
    finish(reader)


@pytest.mark.parametrize("restart", [False, True])
def test_close_waits_for_a_reader_that_goes_on_reading(
    restart: bool, fork: BaseContext, children: Children, pipe: Pipe
) -> None:
    """Its timeout counts from the last progress: all is read, though that takes several times as long."""
    bus: Broadcaster[Any] = start_broadcaster(restart=restart)
    reader = children(fork, victims.slow_reader, bus.subscribe(), pipe[1], 0.001)
    assert answer(pipe[0]) == "open"
    count = bus.publish_many((number, bytes(1900)) for number in range(1200))
    bus.close(timeout=0.4)
    assert answer(pipe[0]) == (list(range(count)), "EOFError")
    finish(reader)


UNREAPED = """
def refuse(pid, number):
    raise AssertionError(f"signal {number} is sent to process {pid} by its number")

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    context = multiprocessing.get_context(sys.argv[1])
    bus = start_broadcaster(context=context, restart=sys.argv[2] == "restart")
    if sys.argv[2] == "killed":
        os.kill(bus.stats().pid, signal.SIGKILL)
    os.kill = refuse
    bus.close()
    print("closed", multiprocessing.active_children(), flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # from Python 3.13 on, multiprocessing waits for its tracker at the end
"""


@pytest.mark.parametrize(
    ("method", "what"), [("fork", "closed"), ("fork", "killed"), ("spawn", "killed"), ("forkserver", "restart")]
)
def test_a_starter_that_ignores_its_childrens_end(method: str, what: str, script: Write) -> None:
    """With ``SIGCHLD`` ignored, ``close`` ends the broker and raises nothing, and no signal goes to a mere number."""
    with Program(script(UNREAPED), method, what) as program:
        ends_well(program, "closed []\n")


BEGIN = """
quietly = contextlib.suppress(BrokerLost, ClosedError, EOFError)

def forever(function, *args):
    with quietly:
        while True:
            function(*args)

def background(function, *args):
    threading.Thread(target=forever, args=(function, *args), daemon=True).start()
"""

ENDS = {
    "handles in globals, atexit users and finalisers": """
bus = start_broadcaster()
opened, unopened = bus.subscribe("*"), bus.subscribe()
bus.publish_many([bytes(10_000), bytes(20), bytes(3_000_000)] * 3 + [bytes(1000)] * 3000)
opened.recv(10)
other = start_broadcaster()
handle = connect(other.address)
channel = handle.subscribe()
other.publish(1)
channel.poll(5)
sys.modules["kept"] = channel, handle
class Keeper:
    def __init__(self):
        self.bus = start_broadcaster()
        self.channel = self.bus.subscribe()
        self.channel.poll(0)
        self.me = self
    def __del__(self):
        with quietly:
            self.bus.publish(1)
        with quietly:
            self.channel.recv(0.0)
        self.channel.close()
        self.bus.close()
sys.keeper = Keeper()
keeper = Keeper()
last = other.subscribe("last")
atexit.register(other.close)
atexit.register(other.publish, "late")
atexit.register(lambda: (other.publish("last", topic="last"), other.flush(), print(last.recv(10))))
sys.exit(0)
""",
    "daemon threads": """
bus = start_broadcaster()
channels = [bus.subscribe("some") for _ in range(3)]
full = bus.subscribe("full", capacity=10_000)
other = connect(bus.address)
background(channels[0].recv)
background(channels[1].recv_many)
background(channels[2].poll, None)
bus.publish(1, topic="some")
background(bus.publish, bytes(10_000))
background(connect(bus.address).publish, bytes(3_000_000))
background(lambda: other.publish(bytes(1000), topic="full"))
background(bus.stats)
background(bus.flush)
background(bus.wait_for_subscribers, 100)
background(lambda: bus.subscribe("more").close())
while not any(row.stalls for row in bus.stats().subscribers):
    time.sleep(0.01)
""",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_program_ends_with_handles_open(name: str, script: Write) -> None:
    """Whatever is open and unread, or running in daemon threads, the program ends with success, and without a word."""
    start = time.monotonic()
    with Program("-W", "error", script(BEGIN + ENDS[name])) as program:
        ends_well(program, "last\n" if "atexit" in name else "", log=True)
    assert time.monotonic() - start < DEADLINE / 2


KEY = b"a key of the test"
STARTER = f"""
import json, os, signal
from mpbroadcast import start_broadcaster
from tests.support.victims import duplicate_handles

bus = start_broadcaster(authkey={KEY!r})
duplicate_handles()
child = os.fork()
if child:
    print(json.dumps([bus.address, bus.stats().pid, child]), flush=True)
signal.pause()
"""


def test_the_next_start_cleans_up_after_starter_and_broker_killed_at_once() -> None:
    """A stopped broker is not taken for dead; it ends with its starter, although a child with all its handles lives on."""
    with Program("-c", STARTER) as living, Program("-c", STARTER) as program:
        kept, stopped, child = json.loads(living.line())
        address, broker, _ = json.loads(program.line())
        for pid in (stopped, broker):
            os.kill(pid, signal.SIGSTOP)  # so that it cannot notice the starter's death first
            wait_until(lambda pid=pid: victims.stopped(pid))  # type: ignore[misc]
        for pid in (program.pid, broker):
            os.kill(pid, signal.SIGKILL)
        program.process.wait(DEADLINE)
        wait_until(lambda: not alive(broker))
        folder = Path(address).parent
        assert folder.exists(), "no process was left to remove it"
        with start_broadcaster():
            wait_until(lambda: not folder.exists())
            assert Path(kept).exists()
        os.kill(stopped, signal.SIGCONT)
        with connect(kept, authkey=KEY) as other:
            assert other.stats().pid == stopped
        os.kill(living.pid, signal.SIGKILL)
        wait_until(lambda: not alive(stopped))
        wait_until(lambda: not Path(kept).parent.exists())
        assert alive(child)


# a folder's name: what is in it
KEPT: dict[str, dict[str, str]] = {
    "mpbroadcast-0.1.0": {"README.md": "file"},
    "mpbroadcast-checkout": {"src": "file"},
    "mpbroadcast-empty": {},
    "mpbroadcast-broker-12345678": {"notes": "file"},
    "mpbroadcast-broker-1234_678": {"broker": "file"},
    "mpbroadcast-broker-1234567a": {"broker": "bound"},  # it does not listen yet
    "mpbroadcast-broker-1234567b": {"broker": "dead", "notes": "file"},
    "mpbroadcast-broker-1234567_": {".mpbroadcast-1a~": "new"},  # a start that is less than a minute old
}
REMOVED: dict[str, dict[str, str]] = {
    "mpbroadcast-broker-2234567_": {"broker": "dead"},
    "mpbroadcast-broker-2234567a": {".mpbroadcast-1a~": "half"},  # its broker was killed before its socket listened
}


def test_a_start_removes_only_what_a_dead_broker_has_left(temporary_folder: Path) -> None:
    """A folder is removed when it has a name as ours have, and nothing is in it but a dead broker's sockets."""
    with contextlib.ExitStack() as stack:
        for name, content in (KEPT | REMOVED).items():
            folder = temporary_folder / name
            folder.mkdir(mode=0o700)
            for entry, kind in content.items():
                if kind == "file":
                    (folder / entry).write_text("precious")
                elif kind == "dead":
                    Listening(str(folder / entry), "").socket.close()  # as a kill closes it
                else:
                    bound = stack.enter_context(socket.socket(socket.AF_UNIX))
                    before = os.umask(0 if kind == "bound" else 0o777)
                    bound.bind(str(folder / entry))
                    os.umask(before)
                    if kind != "bound":
                        bound.close()
            if "new" not in content.values():
                os.utime(folder, (0, 0))
        with start_broadcaster() as bus:
            own = Path(bus.address).parent.name
            assert {folder.name for folder in temporary_folder.glob("mpbroadcast-*")} == {*KEPT, own}
            for name, content in KEPT.items():
                assert {path.name for path in (temporary_folder / name).iterdir()} == {*content}
        for name in KEPT:
            shutil.rmtree(temporary_folder / name)
