"""Traps: a process is hit by a signal at a moment of a call, by the process itself, so that no test sleeps and hopes. At
moments at which the victim waits in the kernel, it only notes that, and the test sends the signal once it sees it sleep."""

import contextlib
import itertools
import multiprocessing
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, cast

import psutil

from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, BrokerRestarted, Channel, start_broadcaster, trap_points
from tests.support.helpers import DEADLINE, answer, wait_until
from tests.support.victims import duplicate_handles, stopped

INTERRUPTED: Final = 130  # exit code of a process that was ended by Ctrl-C
DEAF: Final = ("broker", "supervisor")  # they ignore Ctrl-C, and are in the test's own group
WAITING: Final = ("blocked", "draining", "idle")  # moments at which the victim sleeps in the kernel
IN_RING: Final = 100_000  # bytes of a message that goes through a ring
SMALL: Final = 100_000  # bytes of a backlog that is soon full, its pipe included
SHORT: Final = 1_900  # bytes of a message that goes through the pipe
LONG: Final = 600_000  # bytes of a message that no pipe takes at once
IN_MEMORY: Final = 3_000_000
MANY: Final = 400  # short messages: more than a small backlog and the pipes before it take
GAP: Final = ("gap", 0)  # stands among the messages that were received where a channel raised BrokerRestarted
STARTING: Final = ("connecting", "handshake")
EARLY: Final = (*STARTING, "pipe in flight")  # it comes by itself in the first use of a handle

Entry = tuple[str, int]
"""Whose message it is, and its number; or the gap."""


@dataclass(frozen=True)
class Trap:
    """Hits the process that it was put into with a signal at a moment, once, from when it is armed on. What has happened stands
    in files in ``folder``: they outlive whoever is killed, and all processes see them."""

    folder: str
    victim: str
    signal: signal.Signals
    moment: str

    def _file(self, name: str) -> Path:
        return Path(self.folder, name)

    def arm(self) -> None:
        self._file("armed").touch()

    @property
    def armed(self) -> bool:
        """Whether it springs at the next occasion."""
        return self._file("armed").exists() and not self.sprung

    @property
    def sprung(self) -> bool:
        return self._file("sprung").exists()

    @property
    def companions(self) -> list[int]:
        """The victim's own processes at that moment; for a bystander, a broker or a supervisor, that one."""
        return [int(pid) for pid in self._file("sprung").read_text().split()]

    def spring(self) -> None:
        """This is the moment: if it is armed, hit this process, or note that it will wait now, for the test to hit it."""
        if not self.armed:
            return
        if self.victim == "bystander":
            self._note(self._fork_bystander())
            return
        if self.victim in DEAF:
            self._note(os.getpid())
        else:
            self._note(*(child.pid or 0 for child in multiprocessing.active_children()))
        if self.moment in WAITING:
            return
        if self.victim == "supervisor" and self.moment != "replacing":
            self._hit_supervisor()
        else:
            self.hit(os.getpid())

    def _hit_supervisor(self) -> None:
        """In the broker, which stays where it is until its supervisor is dead or stopped, if that is what becomes of it."""
        supervisor = os.getppid()
        self.hit(supervisor)
        if self.signal == signal.SIGKILL:
            wait_until(lambda: os.getppid() != supervisor)
        elif self.signal == signal.SIGSTOP:
            wait_until(lambda: stopped(supervisor))

    def hit(self, pid: int) -> None:
        """Send the signal; Ctrl-C goes to all of the group that the victim leads, if it leads one."""
        if self.signal == signal.SIGINT and self.victim not in DEAF:
            os.killpg(pid, self.signal)
        else:
            os.kill(pid, self.signal)

    def _note(self, *pids: int) -> None:
        passing = self._file("passing")
        passing.write_text(" ".join(map(str, pids)))
        passing.rename(self._file("sprung"))

    def _fork_bystander(self) -> int:
        """A child that has all handles of this process, and duplicates of its pipes and sockets, is hit right here."""
        kept = duplicate_handles()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.setsid()  # in a mere group of its own, its parent's end would wake it
                self.hit(os.getpid())
            os._exit(INTERRUPTED)
        for descriptor in kept:
            os.close(descriptor)
        os.waitpid(pid, os.WUNTRACED)
        return pid

    def returned(self) -> int:
        """How many messages the victim has published, as far as ``publish`` has returned."""
        with contextlib.suppress(FileNotFoundError):
            return self._file("returned").stat().st_size
        return 0

    def count_one(self) -> None:
        """In the victim: ``publish`` has returned."""
        with self._file("returned").open("ab") as file:
            file.write(b".")


def spring_at(point: str, trap: Trap, when: Callable[[Any], bool] = lambda _: True) -> None:
    """Spring the trap at the trap point of this name, if ``when`` is true of its subject; also in forked processes."""

    def reach(name: str, subject: object = None) -> None:
        if name == point and trap.armed and when(subject):
            trap.spring()

    trap_points.reach = reach


_POINTS: Final = {
    "connecting": "connected",
    "handshake": "answering",
    "pipe in flight": "waiting for a reply",
    "mid-frame": "sending the last piece",
    "mid-ring": "populating a ring",
    "mid-memory": "filling memory",
    "memory in flight": "publishing memory",
    "draining": "ending the broker",
}
_READERS_POINTS: Final = {
    "mid-frame": "waiting for messages",
    "mid-ring": "",  # a bait springs it
    "mid-memory": "",
    "memory in flight": "taking memory",
    "idle": "waiting for messages",
}


def play_victim(start: Any, trap: Trap, orders: Connection) -> None:
    """Be the publisher, the subscriber or the starter that the trap hits; ``start`` is its broadcaster, or start method."""
    set_trap(trap)
    acts: dict[str, Callable[..., None]] = {"subscriber": subscribe_into_trap, "starter": start_into_trap}
    try:
        acts.get(trap.victim, publish_into_trap)(start, trap, orders)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def set_trap(trap: Trap) -> None:
    """Lead a group of its own, take signals as they come, and set the trap."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    is_reader = trap.victim == "subscriber"
    conditions: dict[str, Callable[[Any], bool]] = {
        "handshake": lambda _: _send_half_first(trap),
        "pipe in flight": _has_come_with_a_pipe,
        "mid-frame": lambda subject: not is_reader or any(subject.chunks),
    }
    if trap.moment == "mid-frame":
        os.environ["MPBROADCAST_INLINE"] = "1"
    if is_reader and trap.moment in ("mid-ring", "mid-memory"):
        Bait.trap, Bait.read = trap, _bytes_read()
    point = (_POINTS | (_READERS_POINTS if is_reader else {})).get(trap.moment, "")
    spring_at(point, trap, conditions.get(trap.moment, lambda _: True))


def blocked(fd: int, bus: Broadcaster[Any]) -> bool:
    """Whether a full backlog is what this publisher waits for; else its pipe is full for a moment only."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while not poll.poll(1):
        if any(row.stalls for row in bus.stats().subscribers):
            return not poll.poll(50)  # what was read last may have left room
    return False


def _has_come_with_a_pipe(asked: tuple[str, socket.socket]) -> bool:
    """Whether this is a request for a pipe; its reply is there then."""
    poll = select.poll()
    poll.register(asked[1], select.POLLIN)
    return asked[0] in ("publisher", "open") and bool(poll.poll(1000 * DEADLINE))


def _send_half_first(trap: Trap) -> bool:
    """The trap springs when half of what comes next is sent, and not here."""
    original = socket.socket.send

    def send(connection: socket.socket, data: bytes) -> int:
        if not trap.armed:
            return original(connection, data)
        sent = original(connection, data[: len(data) // 2])
        trap.spring()
        return sent

    socket.socket.send = send  # type: ignore[assignment, method-assign]
    return False


def _bytes_read() -> int:
    """Return how many bytes this process has read so far, from files, pipes and sockets."""
    return int(psutil.Process().io_counters().read_chars)


class Bait(str):
    """Springs the trap of the process that unpickles it, if it did not come through the pipe."""

    __slots__ = ()
    trap: Trap | None = None
    read = 0  # bytes that this process had read when it unpickled the last one

    def __reduce__(self) -> tuple[Any, ...]:
        return Bait.taken, (str(self),)

    @staticmethod
    def taken(text: str) -> str:
        """What it is for its reader."""
        if Bait.trap is not None:
            before, Bait.read = Bait.read, _bytes_read()
            if Bait.read - before < IN_RING:
                Bait.trap.spring()
        return text


def message(sender: str, number: int, size: int) -> tuple[str, int, bytes]:
    """A message that shows whether all of it has come."""
    return Bait(sender), number, bytes([number % 251]) * size


def whole(received: Any) -> tuple[str, int]:
    """Whose and which message it is; all of its bytes must have come."""
    sender, number, data = received
    assert data == bytes([number % 251]) * len(data), f"the bytes of message {number} of {sender} are not those that it had"
    return sender, number


def read(channel: Channel[Any]) -> Entry:
    """Return what a channel gives next: a message, or the gap that a broker which has died leaves."""
    try:
        return whole(channel.recv(DEADLINE))
    except BrokerRestarted:
        return GAP


def until_the_end(channel: Channel[Any]) -> list[Any]:
    """Return all that a channel gives, and the name of what ends it."""
    entries: list[Any] = []
    try:
        while True:
            entries.append(read(channel))
    except (EOFError, BroadcastError) as error:
        return [*entries, type(error).__name__]


def read_to_the_end(channel: Channel[Any], end: str) -> list[Entry]:
    """Return all that a channel gives up to the error of this name."""
    *entries, ended = until_the_end(channel)
    assert ended == end
    return entries


def witness(bus: Broadcaster[Any], orders: Connection, is_patient: bool) -> None:
    """Receive everything, and report all of it at the end; a patient one does not read before an order comes."""
    channel = bus.subscribe()
    channel.poll(0)
    orders.send("open")
    if is_patient:
        answer(orders)
    orders.send(until_the_end(channel))


def publish_into_trap(bus: Broadcaster[Any], trap: Trap, orders: Connection) -> None:
    """Publish some messages, the one in which the trap springs, and two more."""
    numbers = itertools.count()

    def publish(size: int = 10, topic: str = "") -> None:
        bus.publish(message("victim", next(numbers), size), topic=topic)
        trap.count_one()

    if trap.moment in EARLY:
        trap.arm()
    for _ in range(3):
        publish()
    match trap.moment:
        case "mid-frame":
            trap.arm()
            publish(LONG)
        case "mid-ring":
            trap.arm()
            while not trap.sprung:  # the first few come before there is a ring
                publish(IN_RING)
                bus.flush(DEADLINE)
        case "mid-memory" | "memory in flight":
            trap.arm()
            publish(IN_MEMORY)
        case "blocked":
            spring_at("waiting for room", trap, lambda fd: blocked(fd, bus))
            trap.arm()
            while not trap.sprung:
                publish(SHORT, "full")
        case "idle":
            bus.flush(DEADLINE)
            trap.arm()
            trap.spring()
            answer(orders)
        case "draining" if trap.victim != "starter":
            bus.flush(DEADLINE)
            orders.send("published")
            answer(orders)  # close() has begun
            trap.arm()
            trap.spring()
            answer(orders)
            with contextlib.suppress(BrokerLost):
                bus.publish("too late")
                raise AssertionError("a broker that is being closed has taken a message")
            return
        case "draining":
            for _ in range(MANY):
                publish(SHORT)
            return
    for _ in range(2):
        publish()
    bus.flush(DEADLINE)


def subscribe_into_trap(bus: Broadcaster[Any], trap: Trap, orders: Connection) -> None:
    """Subscribe and receive, and meet the moment on the way; report all that was received."""
    if trap.moment in EARLY:
        trap.arm()
    channel = bus.subscribe(capacity=SMALL if trap.moment == "blocked" else None)
    channel.poll(0)
    if trap.moment not in EARLY:
        trap.arm()
    orders.send("open")
    if trap.moment in ("blocked", "draining"):
        trap.spring()
        answer(orders)
    orders.send(until_the_end(channel))


def start_into_trap(method: str, trap: Trap, orders: Connection) -> None:
    if trap.moment in STARTING:
        trap.arm()
    bus = start_broadcaster(context=multiprocessing.get_context(method))
    orders.send(bus.address)
    answer(orders)  # the witnesses are there
    publish_into_trap(bus, trap, orders)
    if trap.moment == "draining":
        trap.arm()
    else:
        orders.send("published")
        answer(orders)
    bus.close()


_BROKERS_POINTS: Final = {
    "replacing": "restoring",
    "connecting": "accepting",
    "handshake": "checking a key",
    "pipe in flight": "replied with descriptors",
    "mid-frame": "routing",
    "mid-ring": "routing",
    "mid-memory": "fetched memory",
    "memory in flight": "sent memory",
}


def run_with_trap(trap: Trap, run: Callable[..., None], *args: Any) -> None:
    """Set the trap, then be a broker; or its supervisor, from which each broker inherits the trap."""
    points = _BROKERS_POINTS | ({"replacing": "replacing"} if trap.victim == "supervisor" else {})
    if trap.moment in points:
        spring_at(points[trap.moment], trap)
    run(*args)


def trapping(method: str, trap: Trap) -> BaseContext:
    """A start method whose processes have a trap in them."""
    context: Any = type(multiprocessing.get_context(method))()
    process = context.Process

    def make(*args: Any, target: Callable[..., None], **keywords: Any) -> BaseProcess:
        made: BaseProcess = process(*args, target=partial(run_with_trap, trap, target), **keywords)
        return made

    context.Process = make
    return cast(BaseContext, context)
