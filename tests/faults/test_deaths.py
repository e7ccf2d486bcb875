"""Deaths beside the table of ``test_faults.py``: ends that no pipe shows, calls that wait, and what a dead broker leaves."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerLost, channel_to_selector, connect, start_broadcaster
from mpbroadcast.broker.host.socket_file import Listening
from tests.support import victims
from tests.support.helpers import DEADLINE, Background, Children, answer, wait_until
from tests.support.victims import SOON, Program, alive, descriptors


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists descriptors in /proc")
@pytest.mark.parametrize("end", ["killed", "killed, and no pidfds", "another program"])
def test_a_subscriber_whose_pipe_stays_open_is_gone(
    end: str,
    fork: BaseContext,
    children: Children,
    pipe: tuple[Connection, Connection],
    monkeypatch: pytest.MonkeyPatch,
    leaves_nothing: None,
) -> None:
    """Neither EOF nor EPIPE shows that it was killed while its child keeps each end open, or became another program."""
    if "no pidfds" in end:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    with start_broadcaster() as bus:
        bus.publish("this makes the pipe of this process")
        broker = bus.stats().pid
        before = descriptors(broker)
        victim = children(
            fork, victims.changing_subscriber if end == "another program" else victims.held_subscriber, bus, pipe[1]
        )
        bus.wait_for_subscribers(1, timeout=DEADLINE)
        bus.publish("one")
        keeper = answer(pipe[0])  # the child, or the process itself
        try:
            if end != "another program":
                assert [row.pid for row in bus.stats().subscribers] == [victim.pid]
                victim.kill()
            wait_until(lambda: not bus.stats().subscribers, SOON)
            wait_until(lambda: descriptors(broker) == before)
            assert alive(keeper), "it was to keep the ends open all the time"
            with bus.subscribe() as channel:
                bus.publish("on")
                assert channel.recv(DEADLINE) == "on"
        finally:
            os.kill(keeper, signal.SIGKILL)


def test_calls_that_wait_raise_when_the_broker_dies(bus: Broadcaster[Any]) -> None:
    """``recv``, a selector, ``publish`` and ``wait_for_subscribers`` raise ``BrokerLost`` promptly."""
    channels = [bus.subscribe(topic, capacity=100_000) for topic in ("quiet", "quiet", "full")]
    for channel in channels:
        channel.poll(0)
    other = connect(bus.address)
    calls = {
        "recv": channels[0].recv,
        "receive": channel_to_selector(channels[1]).receive,
        "publish_many": lambda: bus.publish_many(itertools.repeat(b"v" * 10_000), topic="full"),
        "wait_for_subscribers": lambda: other.wait_for_subscribers(1000),
    }
    waiting = {name: Background(call) for name, call in calls.items()}
    for name, call in waiting.items():
        call.wait_until_blocked(name)
    wait_until(lambda: any(row.stalls for row in bus.stats().subscribers))
    os.kill(bus.stats().pid, signal.SIGKILL)
    assert {name: type(call.error(SOON)) for name, call in waiting.items()} == dict.fromkeys(calls, BrokerLost)
    for channel in channels:
        channel.close()
    other.close()


# ------------------------------------------------------------------------------------------- what a start finds, and leaves

KEY = b"a key of the test"
STARTER = f"""
import json, os, signal
from mpbroadcast import start_broadcaster

bus = start_broadcaster(authkey={KEY!r})
for name in os.listdir("/proc/self/fd"):
    try:
        os.set_inheritable(os.dup(int(name)), True)
    except OSError:
        pass
child = os.fork()
if child:
    print(json.dumps([bus.address, bus.stats().pid, child]), flush=True)
signal.pause()
"""


def test_the_next_start_cleans_up_after_starter_and_broker_killed_at_once() -> None:
    """Without one of them the folder stays; and a broker that is stopped is not taken for dead.

    It ends with its starter, although a child of that, with all that it has inherited, lives on.
    """
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


# ------------------------------------------------------------------------------------------------------------ a dead starter

BEFORE_ITS_WORKER = """
import multiprocessing, os, signal, sys
from mpbroadcast import start_broadcaster

def work(channel):
    multiprocessing.parent_process().join()
    print(sum(1 for _ in channel), flush=True)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    bus = start_broadcaster(restart=sys.argv[2] == "restart")
    worker = multiprocessing.Process(target=work, args=(bus.subscribe(),))
    worker.start()
    bus.publish_many(bytes(100) for _ in range(5000))
    bus.flush()
    if sys.argv[3] == "exit":
        os._exit(0)
    os.kill(os.getpid(), int(sys.argv[3]))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("fork", "once", str(signal.SIGKILL.value)),
        ("spawn", "once", str(signal.SIGTERM.value)),
        ("fork", "once", "exit"),
        ("fork", "restart", str(signal.SIGKILL.value)),
    ],
    ids=" ".join,
)
def test_what_a_dead_starter_handed_on_is_delivered(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Its worker opens the channel only when the starter is dead, and gets all, and a clean end."""
    script = tmp_path / "program.py"
    script.write_text(BEFORE_ITS_WORKER)
    with Program(str(script), *arguments) as program:
        _, printed, errors = program.end()
        assert (printed, errors) == ("5000\n", "")
        wait_until(lambda: not program.processes())
