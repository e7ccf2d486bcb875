"""Every kind of death, by real signals: what the dead had said is heard, the others notice nothing, nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerLost, connect, start_broadcaster
from mpbroadcast.broker.host.socket_file import Listening
from tests.support import victims
from tests.support.helpers import DEADLINE, Children, answer, receive_all, take, wait_until
from tests.support.victims import Program, alive, descriptors

SMALL = 100_000  # bytes of a backlog that is soon full, its pipe included
SOON = 5.0  # seconds: the promise is one; a busy machine gets more


def pid_of(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


def subscribers(bus: Broadcaster[Any]) -> set[int]:
    return {subscriber.pid for subscriber in bus.stats().subscribers}


# ---------------------------------------------------------------------------------------------------------- subscribers


def test_a_killed_subscriber_is_gone_and_the_others_get_everything(
    bus: Broadcaster[Any], context: BaseContext, children: Children
) -> None:
    """Subscribers that are killed in the middle of traffic leave neither subscription nor descriptor, and cost no message."""
    reports = [Pipe() for _ in range(4)]
    children(context, victims.subscriber, bus, reports[0][1])
    answer(reports[0][0])
    broker = bus.stats().pid
    bus.publish("first")
    wait_until(lambda: bus.stats().subscribers[0].delivered == 1)
    before = descriptors(broker)
    for _, theirs in reports[1:]:
        children(context, victims.subscriber, bus, theirs)
    killed = {answer(ours) for ours, _ in reports[1:]}
    with bus.subscribe() as own:
        for number in range(1000):
            bus.publish(number)
            if number == 500:
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not killed & subscribers(bus), SOON)
        assert take(own, 1000) == list(range(1000))
    wait_until(lambda: descriptors(broker) == before)
    bus.publish(None)
    assert answer(reports[0][0]) == ["first", *range(1000)]
    for end in chain(*reports):
        end.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists descriptors in /proc")
def test_a_killed_subscriber_whose_child_keeps_its_pipe_is_gone(
    bus: Broadcaster[Any], fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """Neither EOF nor EPIPE tells of this death: a child of the dead keeps each end open. It is noticed."""
    bus.publish("nobody hears this, but it opens this process's own pipe")
    broker = bus.stats().pid
    before = descriptors(broker)
    victim = children(fork, victims.held_subscriber, bus, pipe[1])
    bus.wait_for_subscribers(1, timeout=DEADLINE)
    bus.publish("one")
    keeper = answer(pipe[0])
    try:
        pid = pid_of(victim)
        assert pid in subscribers(bus)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in subscribers(bus), SOON)
        wait_until(lambda: descriptors(broker) == before)
        assert alive(keeper), "the child was to keep the ends open all the time"
        with bus.subscribe() as channel:
            bus.publish("on")
            assert channel.recv(DEADLINE) == "on"
    finally:
        os.kill(keeper, signal.SIGKILL)


def test_a_subscriber_that_becomes_another_program_is_gone(
    bus: Broadcaster[Any], fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """``exec`` ends a subscription although the process lives on."""
    bus.publish("nobody hears this, but it opens this process's own pipe")
    broker = bus.stats().pid
    before = descriptors(broker)
    victim = children(fork, victims.changing_subscriber, bus, pipe[1])
    bus.wait_for_subscribers(1, timeout=DEADLINE)
    bus.publish("one")
    assert answer(pipe[0]) == "one"
    wait_until(lambda: pid_of(victim) not in subscribers(bus), SOON)
    wait_until(lambda: descriptors(broker) == before)
    assert alive(pid_of(victim))
    victim.kill()


# ----------------------------------------------------------------------------------------------------------- publishers


def test_what_publish_returned_for_is_delivered_though_the_publisher_is_killed_next(
    bus: Broadcaster[Any], context: BaseContext, children: Children
) -> None:
    """``publish`` returns when the message is out of the process: a SIGKILL at that moment loses nothing."""
    with bus.subscribe() as channel:
        victim = children(context, victims.publish_and_die, bus, 300)
        victim.join(DEADLINE)
        assert victim.exitcode == -signal.SIGKILL
        assert take(channel, 300) == [("victim", number) for number in range(300)]
        bus.publish("on")
        assert channel.recv(DEADLINE) == "on"


# --------------------------------------------------------------------------------------------------------------- broker


def test_a_killed_brokers_last_words_are_received_before_the_loss(bus: Broadcaster[Any]) -> None:
    """What had arrived when the broker was killed can be received; then every call says ``BrokerLost``, at once."""
    channel = bus.subscribe()
    channel.poll(0)
    unopened = bus.subscribe("quiet")
    for number in range(100):
        bus.publish(number, topic="loud")
    wait_until(lambda: any(s.delivered == 100 for s in bus.stats().subscribers))
    broker = bus.stats().pid
    os.kill(broker, signal.SIGKILL)
    received, error = receive_all(channel)
    assert received == list(range(100))
    assert isinstance(error, BrokerLost)
    start = time.monotonic()
    for call in (
        channel.recv,
        channel.recv_many,
        unopened.recv,
        lambda: next(iter(channel)),
        lambda: bus.publish("more"),
        lambda: bus.publish_many(["more"]),
        bus.subscribe,
        bus.stats,
        bus.flush,
        lambda: bus.wait_for_subscribers(1),
    ):
        with pytest.raises(BrokerLost) as caught:
            call()
        assert str(caught.value)
    bus.close()
    channel.close()
    unopened.close()
    assert time.monotonic() - start < SOON


@pytest.mark.parametrize("action", ["recv", "select", "publish", "wait_for_subscribers"])
def test_who_waits_hears_of_the_brokers_death(
    action: str, bus: Broadcaster[Any], fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """A call that waits when the broker is killed raises ``BrokerLost`` promptly, in any process."""
    stuck = bus.subscribe("full", capacity=SMALL)
    stuck.poll(0)
    waiter = children(fork, victims.report_error_of, action, bus, pipe[1])
    assert answer(pipe[0]) == "waiting"
    wait_until(lambda: victims.stalled(pid_of(waiter)))
    broker = bus.stats().pid
    start = time.monotonic()
    os.kill(broker, signal.SIGKILL)
    name, text = answer(pipe[0])
    print(f"heard after {time.monotonic() - start:.3f} s: {text}")
    assert name == "BrokerLost"
    assert time.monotonic() - start < SOON
    waiter.join(DEADLINE)
    assert waiter.exitcode == 0
    stuck.close()


def test_a_killed_brokers_folder_goes_with_its_starter_or_the_next(temporary_folder: Path) -> None:
    """No socket file of a killed broker stays: closing removes it."""
    bus: Broadcaster[Any] = start_broadcaster()
    folder = Path(bus.address).parent
    os.kill(bus.stats().pid, signal.SIGKILL)
    with start_broadcaster() as other:
        other.publish("works")
        bus.close()
        assert not folder.exists()


# -------------------------------------------------------------------------------------------------------------- starter

STARTER = """
import json, multiprocessing, sys
from mpbroadcast import start_broadcaster

if __name__ == "__main__":
    bus = start_broadcaster(context=multiprocessing.get_context("fork"), authkey=bytes.fromhex(sys.argv[1]))
    print(json.dumps([bus.address, bus.stats().pid]), flush=True)
    sys.stdin.read()
"""
KEY = b"a key of the test"


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Any]:
    """Starts a program that starts a broadcaster; gives it, and the address and the PID of its broker."""
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    programs = []

    def start() -> tuple[Program, str, int]:
        program = Program(str(script), KEY.hex())
        programs.append(program)
        address, broker = json.loads(program.line())
        return program, address, broker

    yield start
    for program in programs:
        if program.process.poll() is None and program.process.stdin:
            program.process.stdin.close()  # it ends by itself, and leaves nothing
            program.process.wait(DEADLINE)
        program.__exit__()


def test_a_killed_starters_child_does_not_keep_the_broker(starter: Any, tmp_path: Path) -> None:
    """The broker notices the starter's death although a child of the starter, with all that it inherited, lives on."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from mpbroadcast import start_broadcaster\n"
        "bus = start_broadcaster()\n"
        "for name in os.listdir('/proc/self/fd'):\n"
        "    try:\n"
        "        os.set_inheritable(os.dup(int(name)), True)\n"
        "    except OSError:\n"
        "        pass\n"
        "child = os.fork()\n"
        "if child:\n"
        "    print(child, bus.stats().pid, bus.address, flush=True)\n"
        "signal.pause()\n"
    )
    with Program(str(script)) as program:
        child, broker, address = program.line().split()
        os.kill(program.pid, signal.SIGKILL)
        wait_until(lambda: not alive(int(broker)))
        wait_until(lambda: not Path(address).parent.exists())
        assert alive(int(child))


def test_the_next_start_cleans_up_after_starter_and_broker_killed_at_once(starter: Any) -> None:
    """When nobody was left to remove the folder, the next ``start_broadcaster`` does; a living one's folder stays."""
    living, kept, _ = starter()
    program, address, broker = starter()
    os.kill(broker, signal.SIGSTOP)  # so that it cannot notice the starter's death first
    os.kill(program.pid, signal.SIGKILL)
    os.kill(broker, signal.SIGKILL)
    program.process.wait(DEADLINE)
    wait_until(lambda: not alive(broker))
    folder = Path(address).parent
    assert folder.exists(), "nobody was left to remove it"
    with start_broadcaster() as bus:
        wait_until(lambda: not folder.exists())
        bus.publish("works")
        assert Path(kept).exists()
        with connect(kept, authkey=KEY) as other:
            assert other.stats().published == 0
    assert living.process.poll() is None


def _dead_socket(path: Path) -> None:
    listening = Listening(str(path), "")
    listening.socket.close()  # as its end would be, by a kill


OTHERS = {
    "a source tree": ("mpbroadcast-0.1.0", "README.md"),
    "a checkout": ("mpbroadcast-checkout", "src"),
    "a folder of ours with a file": ("mpbroadcast-broker-12345678", "notes"),
    "a file of the socket's name": ("mpbroadcast-broker-1234_678", "broker"),
    "an empty folder": ("mpbroadcast-empty", ""),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_start_removes_no_folder_of_the_users(what: str, temporary_folder: Path) -> None:
    """A folder is removed when it has a name as ours have, and nothing is in it but what a dead broker has left."""
    name, content = OTHERS[what]
    folder = temporary_folder / name
    folder.mkdir(mode=0o700)
    if content:
        (folder / content).write_text("precious")
    os.utime(folder, (0, 0))
    with start_broadcaster():
        assert folder.exists()
        if content:
            assert (folder / content).read_text() == "precious"
    shutil.rmtree(folder)


def test_a_start_removes_no_socket_that_may_be_anybodys(temporary_folder: Path) -> None:
    """Neither one that is bound and does not listen yet, nor a dead broker's beside a file that no broker makes."""
    folder, dead, other = (temporary_folder / f"mpbroadcast-broker-{number}234567_" for number in (1, 2, 3))
    for one in (folder, dead, other):
        one.mkdir(mode=0o700)
    _dead_socket(dead / "broker")
    _dead_socket(other / "broker")
    (other / "notes").write_text("precious")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "broker"))
        for one in (folder, dead, other):
            os.utime(one, (0, 0))
        with start_broadcaster():
            assert not dead.exists()
            assert (folder / "broker").is_socket()
            assert (other / "broker").is_socket()
            assert (other / "notes").read_text() == "precious"
    shutil.rmtree(folder)
    shutil.rmtree(other)


def test_a_start_removes_what_a_start_has_left(temporary_folder: Path) -> None:
    """A folder whose broker was killed before its socket listened is removed when it is a minute old, and not before."""
    folders = [temporary_folder / f"mpbroadcast-broker-{number}234567_" for number in range(2)]
    for folder in folders:
        folder.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as half:
            before = os.umask(0o777)
            half.bind(str(folder / ".mpbroadcast-1a~"))
            os.umask(before)
    os.utime(folders[0], (0, 0))
    with start_broadcaster():
        assert not folders[0].exists()
        assert folders[1].exists()
    shutil.rmtree(folders[1])


def test_a_stopped_broker_is_not_taken_for_dead(starter: Any) -> None:
    """A broker that is stopped (SIGSTOP) for a moment still has its folder, and works when it goes on."""
    _, address, broker = starter()
    os.kill(broker, signal.SIGSTOP)
    wait_until(lambda: victims.stopped(broker))
    with start_broadcaster():
        assert Path(address).exists()
    os.kill(broker, signal.SIGCONT)
    with connect(address, authkey=KEY) as other:
        assert other.stats().pid == broker


BEFORE_ITS_WORKER = """
import multiprocessing, os, signal, sys
from mpbroadcast import start_broadcaster

def work(channel):
    multiprocessing.parent_process().join()
    count = 0
    for _ in channel:
        count += 1
    print(count, flush=True)

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
