"""Who is hit by which signal at which moment: one table, and after each fault the others have all that they should.

A **trap** is put into the victim. It springs at the moment itself, in the middle of the call that is being tested, and so no
test sleeps and hopes. At moments at which the victim waits in the kernel, the test sends the signal once it sees it sleep.

By default the whole table runs under ``fork``, and a few of its rows under the other start methods; with
``MPBROADCAST_FAULTS=all`` in the environment, all of it runs under each. The rows in which a keeper stands beside the broker
are in ``test_faults_kept.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import (
    BaseContext,
    ForkContext,
    ForkProcess,
    ForkServerContext,
    ForkServerProcess,
    SpawnContext,
    SpawnProcess,
)
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import pytest

from mpbroadcast import (
    Broadcaster,
    BroadcastError,
    BrokerLost,
    BrokerRestarted,
    Channel,
    connect,
    start_broadcaster,
    trap_points,
)
from mpbroadcast.posix.shared_memory import available
from tests.support.helpers import DEADLINE, Background, Children, answer, finish, wait_until
from tests.support.victims import alive, asleep, descriptors, receive_all, shared_maps, stopped

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks at descriptors and maps in /proc")

SMALL: Final = 100_000  # bytes of a backlog that is soon full, its pipe included
SHORT: Final = 1_900  # bytes of a message that goes through the pipe
LONG: Final = 600_000  # bytes of a message that no pipe takes at once
IN_RING: Final = 100_000
IN_MEMORY: Final = 3_000_000
MANY: Final = 400  # short messages: more than a small backlog and the pipes before it take
INTERRUPTED: Final = 130  # exit code of who was ended by Ctrl-C
LETHAL: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DEAF: Final = ("broker", "kept broker", "keeper")  # they ignore Ctrl-C, and are in the test's own group
GAP: Final = ("gap", 0)  # stands among the messages that were received where a channel said that the broker is another one


# ---------------------------------------------------------------------------------------------------------- the table

VICTIMS: Final = ("publisher", "subscriber", "broker", "starter", "bystander")
SIGNALS: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGINT)
MOMENTS: Final = (
    "connecting",  # connected, and nothing said
    "handshake",  # half of an answer was sent
    "pipe in flight",  # its end is in a socket, with a reply that nobody has read
    "mid-frame",  # some pieces of a message are out
    "mid-ring",  # a message has its room in a ring, or it is being read there
    "mid-memory",  # half of a message is written into memory of its own, or it is being read there
    "memory in flight",  # that memory's descriptor is in a socket, and its frame not in the pipe, or not read
    "blocked",  # by a full backlog
    "draining",  # the starter is in close()
    "idle",
)
WAITING: Final = ("blocked", "draining", "idle")  # the victim sleeps in the kernel
EARLY: Final = ("connecting", "handshake", "pipe in flight")  # it comes by itself in the first use of a handle
IN_FLIGHT: Final = ("pipe in flight", "mid-frame", "mid-ring", "mid-memory", "memory in flight")  # of one message
METHODS: Final = ("fork", "spawn", "forkserver")


class Case(NamedTuple):
    """A row of the table."""

    victim: str
    signal: signal.Signals
    moment: str
    method: str

    @property
    def lethal(self) -> bool:
        """Whether the victim does not survive it."""
        return self.signal in LETHAL and not (self.victim in DEAF and self.signal == signal.SIGINT)

    def __str__(self) -> str:
        return "-".join((self.victim, self.signal.name, self.moment.replace(" ", "_"), self.method))


LEFT_OUT: Final[dict[tuple[str, str], str]] = {
    ("bystander", "spawn"): "a process that is spawned inherits no handle, so it is no bystander",
    ("bystander", "forkserver"): "a process that comes from a fork server inherits no handle of its starter's",
}
"""A victim and a moment, or a victim and a start method, that make no sense together; and why."""

SAMPLE: Final = (
    ("publisher", signal.SIGKILL, "memory in flight"),
    ("subscriber", signal.SIGSTOP, "mid-ring"),
    ("broker", signal.SIGKILL, "mid-memory"),
    ("starter", signal.SIGINT, "blocked"),
)
"""What runs by default under the start methods other than fork."""


def why_left_out(case: Case) -> str | None:
    """Why a row is not run, if it is not."""
    return LEFT_OUT.get((case.victim, case.moment)) or LEFT_OUT.get((case.victim, case.method))


def table() -> list[Case]:
    """All rows that make sense."""
    rows = itertools.starmap(Case, itertools.product(VICTIMS, SIGNALS, MOMENTS, METHODS))
    return [case for case in rows if why_left_out(case) is None]


def chosen() -> list[Case]:
    """The rows that are run."""
    if os.environ.get("MPBROADCAST_FAULTS") == "all":
        return table()
    return [case for case in table() if case.method == "fork" or case[:3] in SAMPLE]


# ---------------------------------------------------------------------------------------------------------- the trap


@dataclass(frozen=True)
class Trap:
    """Hits the process that it was put into with a signal at a moment, once, from when it is armed on.

    What has happened stands in files in ``folder``: they outlive whoever is killed, and all processes see them.
    """

    folder: str
    victim: str
    signal: signal.Signals
    moment: str

    def _file(self, name: str) -> Path:
        return Path(self.folder, name)

    def arm(self) -> None:
        """From now on it springs."""
        self._file("armed").touch()

    @property
    def write_interest(self) -> bool:
        """Whether it springs at the next occasion."""
        return self._file("armed").exists() and not self.sprung

    @property
    def sprung(self) -> bool:
        """Whether it has."""
        return self._file("sprung").exists()

    @property
    def companions(self) -> list[int]:
        """The victim's own processes at that moment; for a bystander, a broker or a keeper, that one."""
        return [int(pid) for pid in self._file("sprung").read_text().split()]

    def spring(self) -> None:
        """This is the moment: if it is armed, hit this process, or note that it will wait now, for the test to hit it."""
        if not self.write_interest:
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
        if self.victim == "keeper" and self.moment != "replacing":
            self._hit_keeper()
        else:
            self.hit(os.getpid())

    def _hit_keeper(self) -> None:
        """In the broker, which stays where it is until its keeper is dead or stopped, if that is what becomes of it."""
        keeper = os.getppid()
        self.hit(keeper)
        if self.signal == signal.SIGKILL:
            wait_until(lambda: os.getppid() != keeper)
        elif self.signal == signal.SIGSTOP:
            wait_until(lambda: stopped(keeper))

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
        kept = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(("pipe:", "socket:", "/memfd:")):
                    kept.append(os.dup(int(name)))  # nothing in the child knows of these, and so nothing closes them
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


def patch(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function, in this process, for good, by what ``make`` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


def spring_at(point: str, trap: Trap, when: Callable[[Any], bool] = lambda _: True) -> None:
    """The trap springs at the trap point of this name, if ``when`` says yes to its subject; also in forked processes."""

    def reach(name: str, subject: object = None) -> None:
        if name == point and trap.write_interest and when(subject):
            trap.spring()

    trap_points.reach = reach


def set_trap(trap: Trap) -> None:
    """In a publisher, subscriber or starter: lead a group of its own, take signals as they come, and set the trap."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if trap.moment == "mid-frame":
        os.environ["MPBROADCAST_INLINE"] = "1"
    reader = trap.victim == "subscriber"
    match trap.moment:
        case "connecting":
            spring_at("connected", trap)
        case "handshake":
            spring_at("answering", trap, lambda _: _send_half_first(trap))
        case "pipe in flight":
            spring_at("waiting for a reply", trap, _has_come_with_a_pipe)
        case "mid-frame" if reader:
            spring_at("waiting for messages", trap, lambda stream: any(stream.chunks))
        case "mid-frame":
            spring_at("sending the last piece", trap)
        case "mid-ring" | "mid-memory" if reader:
            Bait.trap, Bait.read = trap, bytes_read()
        case "mid-ring":
            spring_at("populating a ring", trap)
        case "mid-memory":
            _trap_half_in_memory(trap)
        case "memory in flight":
            spring_at("taking memory" if reader else "publishing memory", trap)
        case "idle" if reader:
            spring_at("waiting for messages", trap)
        case "draining" if trap.victim == "starter":
            spring_at("ending the broker", trap)


def _blocked(fd: int, bus: Broadcaster[Any]) -> bool:
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

    def make(original: Callable[..., int]) -> Callable[..., int]:
        def send(connection: socket.socket, data: bytes) -> int:
            if not trap.write_interest:
                return original(connection, data)
            sent = original(connection, data[: len(data) // 2])
            trap.spring()
            return sent

        return send

    patch(socket.socket, "send", make)
    return False


def bytes_read() -> int:
    """How many bytes this process has read so far, from files, pipes and sockets."""
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
            before, Bait.read = Bait.read, bytes_read()
            if Bait.read - before < IN_RING:
                Bait.trap.spring()
        return text


def _trap_half_in_memory(trap: Trap) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def writev(descriptor: int, parts: Any) -> int:
            if not trap.write_interest:
                return int(original(descriptor, parts))
            data = b"".join(parts)
            written = int(original(descriptor, [data[: len(data) // 2]]))
            trap.spring()
            return written

        return writev

    patch(os, "writev", make)


def set_trap_in_broker(trap: Trap) -> None:
    """In the broker, before it begins; in its keeper, from which each broker inherits the trap, if there is one."""
    points = BROKERS_POINTS | ({"replacing": "replacing"} if trap.victim == "keeper" else {})
    if trap.moment in points:
        spring_at(points[trap.moment], trap)


BROKERS_POINTS: Final = {
    "replacing": "restoring",
    "connecting": "accepting",
    "handshake": "checking a key",
    "pipe in flight": "replied with descriptors",
    "mid-frame": "routing",
    "mid-ring": "routing",
    "mid-memory": "fetched memory",
    "memory in flight": "sent memory",
}


class _BrokersProcess(BaseProcess):
    """A broker's process with a trap in it."""

    trap: Trap

    def run(self) -> None:
        """Set the trap, then be a broker."""
        set_trap_in_broker(self.trap)
        super().run()


class ForkedBroker(_BrokersProcess, ForkProcess):
    """By fork."""


class SpawnedBroker(_BrokersProcess, SpawnProcess):
    """By spawn."""


class ServedBroker(_BrokersProcess, ForkServerProcess):
    """By a fork server."""


def trapping(method: str, trap: Trap) -> BaseContext:
    """A start method whose processes have a trap in them."""
    made: dict[str, tuple[type[BaseContext], type[_BrokersProcess]]] = {
        "fork": (ForkContext, ForkedBroker),
        "spawn": (SpawnContext, SpawnedBroker),
        "forkserver": (ForkServerContext, ServedBroker),
    }
    context, process = made[method]

    def make(*args: Any, **keywords: Any) -> BaseProcess:
        broker = process(*args, **keywords)
        broker.trap = trap
        return broker

    instance = context()
    instance.Process = make  # type: ignore[attr-defined]
    return instance


# ------------------------------------------------------------------------------------------------------- the processes


def message(who: str, number: int, size: int) -> tuple[str, int, bytes]:
    """A message that shows whether all of it has come."""
    return Bait(who), number, bytes([number % 251]) * size


def whole(received: Any) -> tuple[str, int]:
    """Whose and which message it is; all of its bytes must have come."""
    who, number, data = received
    assert data == bytes([number % 251]) * len(data), f"the bytes of message {number} of {who} are not those that it had"
    return who, number


def heard(channel: Channel[Any]) -> tuple[str, int]:
    """What a channel gives next: a message, or the gap that a broker which has died leaves."""
    try:
        return whole(channel.recv(DEADLINE))
    except BrokerRestarted:
        return GAP


def read_to_the_end(channel: Channel[Any]) -> tuple[list[tuple[str, int]], str]:
    """All that a channel gives, and the name of what ends it."""
    seen = []
    try:
        while True:
            seen.append(heard(channel))
    except (EOFError, BroadcastError) as error:
        return seen, type(error).__name__


def witness(bus: Broadcaster[Any], orders: Connection, patient: bool) -> None:
    """Hears everything, and reports all of it at the end; who is patient does not read before it is told to."""
    channel = bus.subscribe()
    channel.poll(0)
    orders.send("open")
    if patient:
        answer(orders)
    orders.send(read_to_the_end(channel))


def publishing_victim(bus: Broadcaster[Any], trap: Trap, orders: Connection) -> None:
    """Publishes, and meets its moment on the way."""
    set_trap(trap)
    try:
        publish_into_trap(bus, trap, orders)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def publish_into_trap(bus: Broadcaster[Any], trap: Trap, orders: Connection) -> None:
    """Some messages, the one in which the trap springs, and two more."""
    numbers = itertools.count()

    def say(size: int = 10, topic: str = "") -> None:
        bus.publish(message("victim", next(numbers), size), topic=topic)
        trap.count_one()

    if trap.moment in EARLY:
        trap.arm()
    for _ in range(3):
        say()
    match trap.moment:
        case "mid-frame":
            trap.arm()
            say(LONG)
        case "mid-ring":
            trap.arm()
            while not trap.sprung:  # the first few come before there is a ring
                say(IN_RING)
                bus.flush(DEADLINE)
        case "mid-memory" | "memory in flight":
            trap.arm()
            say(IN_MEMORY)
        case "blocked":
            spring_at("waiting for room", trap, lambda fd: _blocked(fd, bus))
            trap.arm()
            while not trap.sprung:
                say(SHORT, "full")
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
                say(SHORT)
            return
    for _ in range(2):
        say()
    bus.flush(DEADLINE)


def subscribing_victim(bus: Broadcaster[Any], trap: Trap, orders: Connection) -> None:
    """Subscribes and receives, and meets its moment on the way; reports all that it has received."""
    set_trap(trap)
    try:
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
        orders.send(read_to_the_end(channel))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def starting_victim(method: str, trap: Trap, orders: Connection) -> None:
    """Starts a broadcaster, in a session of its own, publishes through it, and closes it."""
    set_trap(trap)
    try:
        if trap.moment in ("connecting", "handshake"):
            trap.arm()
        bus = start_broadcaster(context=multiprocessing.get_context(method))
        orders.send((bus.address, bus.stats().pid))
        answer(orders)  # the witnesses are there
        publish_into_trap(bus, trap, orders)
        if trap.moment == "draining":
            trap.arm()
        else:
            orders.send("published")
            answer(orders)
        bus.close()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


# ----------------------------------------------------------------------------------------------------------- the stage


class Stage:
    """A broker, the test's own publisher and channel on it, and another process that hears everything."""

    def __init__(self, case: Case, folder: Path, children: Children) -> None:
        self.case = case
        self.context = multiprocessing.get_context(case.method)
        self.trap = Trap(str(folder), case.victim, case.signal, case.moment)
        self.children = children
        self.sent: list[tuple[str, int]] = []  # by the test
        self.seen: list[tuple[str, int]] = []  # by the test
        self._pipes: list[Connection] = []
        self._before = (0, 0, 0)
        self.bus: Broadcaster[Any]
        self.channel: Channel[Any]
        self.broker = 0
        self.watch: Connection  # the other process's

    def pipe(self) -> tuple[Connection, Connection]:
        """Two ends, closed at the end."""
        ends = Pipe()
        self._pipes += ends
        return ends

    def open(self, bus: Broadcaster[Any]) -> None:
        """Let the witnesses come."""
        self.bus = bus
        self.broker = bus.stats().pid
        self.watch, theirs = self.pipe()
        self.children(self.context, witness, bus, theirs, self.case.moment == "draining")
        self.channel = bus.subscribe()
        self.channel.poll(0)
        assert answer(self.watch) == "open"
        self.publish(5)

    def publish(self, count: int = 1, size: int = 10) -> None:
        """Publish in the test's name."""
        for _ in range(count):
            number = len(self.sent)
            self.bus.publish(message("test", number, size))
            self.sent.append(("test", number))

    def catch_up(self) -> None:
        """Receive until all has come that the test has published."""
        while len([entry for entry in self.seen if entry[0] == "test"]) < len(self.sent):
            self.seen.append(whole(self.channel.recv(DEADLINE)))

    def share_memory(self) -> None:
        """Let the test's publisher have a ring that is in use."""

        def in_use() -> bool:
            self.publish(1, IN_RING)
            self.bus.flush(DEADLINE)
            self.catch_up()
            return shared_maps(self.broker) > 0

        wait_until(in_use)

    def look(self) -> None:
        """Remember how the broker is before the victim comes."""
        self.bus.flush(DEADLINE)
        self.catch_up()
        stats = self.bus.stats()
        self._before = (descriptors(self.broker), shared_maps(self.broker), stats.publishers)

    def wait_until_nothing_is_left_of(self, *pids: int) -> None:
        """Wait until the broker is as it was before the victim came, and does not know it any more."""

        def as_before() -> bool:
            self.channel.poll(0)  # rings are unmapped where their end is read
            stats = self.bus.stats()
            # Fewer, if a connection was just being closed before the victim came.
            fewer = descriptors(self.broker) <= self._before[0]
            now = (shared_maps(self.broker), stats.publishers)
            return fewer and now == self._before[1:] and not {row.pid for row in stats.subscribers} & {*pids}

        wait_until(as_before)

    def meet(self, victim: BaseProcess) -> int:
        """Wait for the moment, and for what the signal does to the victim; its process ID."""
        pid = victim.pid
        assert pid is not None
        wait_until(lambda: self.trap.sprung or victim.exitcode is not None)
        assert self.trap.sprung, f"it ended with {victim.exitcode} before its moment"
        if self.case.victim == "bystander":
            return self.trap.companions[0]
        if self.case.moment in WAITING:
            wait_until(lambda: asleep(pid))
            self.trap.hit(pid)
        if not self.case.lethal:
            wait_until(lambda: stopped(pid))
        elif self.case.victim != "starter":
            self.bury(victim)
        return pid

    def bury(self, victim: BaseProcess) -> None:
        """Wait for the end of who was hit. A starter that was interrupted lets its broker drain before that."""
        victim.join(DEADLINE)
        assert victim.exitcode == (INTERRUPTED if self.case.signal == signal.SIGINT else -self.case.signal)

    def check_victims_messages(self, *, exactly: int) -> None:
        """All that the victim has published has come to the test, in order, and nothing else of it."""
        assert [number for who, number in self.seen if who == "victim"] == list(range(exactly))

    def end_and_compare(self) -> None:
        """Close the broadcaster: both witnesses have seen the same, and all that the test has published."""
        self.bus.flush(DEADLINE)
        self.bus.unsubscribe(self.channel)
        seen, end = read_to_the_end(self.channel)
        self.seen += seen
        assert end == "EOFError"
        assert [entry for entry in self.seen if entry[0] == "test"] == self.sent
        assert GAP not in self.seen
        self.bus.close()
        assert answer(self.watch) == (self.seen, "EOFError")

    def close(self) -> None:
        """Let go of all, whatever has happened."""
        if (self.case.victim, self.case.signal) == ("bystander", signal.SIGSTOP) and self.trap.sprung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.trap.companions[0], signal.SIGKILL)  # one that is stopped would stay for ever
        for handle in (getattr(self, "channel", None), getattr(self, "bus", None), *self._pipes):
            if handle is not None:
                handle.close()
        assert not shared_maps(os.getpid())


SHARED = ("mid-ring", "mid-memory", "memory in flight")  # moments that there are with shared memory only


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    """The stage of a row of the table."""
    yield from staged(request.param, tmp_path, children, monkeypatch)


def staged(case: Case, folder: Path, children: Children, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """The stage of this row, until the row is done."""
    if case.moment in SHARED and not available():
        pytest.skip("there is no memory to share here")
    if case.moment == "mid-frame":
        monkeypatch.setenv("MPBROADCAST_INLINE", "1")
    made = Stage(case, folder, children)
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------------- the scenes


def play_publisher(stage: Stage) -> None:
    """A publisher, or a child that it has forked, is hit."""
    case, trap = stage.case, stage.trap
    stage.open(start_broadcaster(context=stage.context))
    bus = stage.bus
    full = bus.subscribe("full", capacity=SMALL) if case.moment == "blocked" else None
    if full is not None:
        full.poll(0)
    closing: Background | None = None
    other = connect(bus.address)
    stage.look()
    orders, theirs = stage.pipe()
    victim = stage.children(stage.context, publishing_victim, bus, trap, theirs)
    if case.moment == "draining":
        assert answer(orders) == "published"
        stage.publish(MANY, SHORT)
        bus.flush(DEADLINE)
        stage.catch_up()
        closing = Background(bus.close, DEADLINE)
        wait_until(lambda: other.stats().publishers == 0)
        orders.send("close() has begun")
    hit = stage.meet(victim)
    assert victim.pid is not None
    if closing is None:
        stage.publish(5)
        stage.catch_up()  # nobody waits for who is stopped, and what is dead disturbs nobody
    stays = case.signal == signal.SIGSTOP
    published = trap.returned()
    if stays and case.victim == "publisher":
        os.kill(hit, signal.SIGCONT)
    if full is not None:
        # Those that were published before, and, of who lives on, one more and two that come behind.
        assert len([full.recv(DEADLINE) for _ in range(published - 3)]) == published - 3
    if case.victim == "bystander" or stays:
        if case.moment in ("idle", "draining"):
            orders.send("go on")
        # Not join(), which waits for a pipe that the bystander has inherited as well.
        wait_until(lambda: victim.exitcode is not None)
        finish(victim)
        published = trap.returned()
        assert published >= 3
    if closing is None:
        stage.wait_until_nothing_is_left_of(victim.pid)
        if full is not None:
            bus.unsubscribe(full)
            receive_all(full)
            full.close()
        stage.publish(5)
        stage.end_and_compare()
    else:
        stage.watch.send("go on")
        closing.result()
        seen, end = read_to_the_end(stage.channel)
        assert (seen, end) == ([], "EOFError")
        assert answer(stage.watch) == (stage.seen, "EOFError")
    stage.check_victims_messages(exactly=published)
    if stays and case.victim == "bystander":
        assert stopped(hit), "it was to be stopped, with all that it had inherited, all the time"
    other.close()


def play_subscriber(stage: Stage) -> None:
    """A subscriber is hit."""
    case, trap = stage.case, stage.trap
    stage.open(start_broadcaster(context=stage.context))
    bus = stage.bus
    other = connect(bus.address)
    if case.moment in ("mid-ring", "mid-memory", "memory in flight"):
        stage.share_memory()
    stage.look()
    orders, theirs = stage.pipe()
    first = len(stage.sent)
    busy: Background | None = None
    victim = stage.children(stage.context, subscribing_victim, bus, trap, theirs)
    if case.moment not in EARLY:
        assert answer(orders) == "open"
    match case.moment:
        case "mid-frame":
            stage.publish(1, LONG)
        case "mid-ring":

            def sprung() -> bool:
                stage.publish(1, IN_RING)  # the first few come before it has mapped the ring
                return trap.sprung

            wait_until(sprung)
        case "mid-memory" | "memory in flight":
            stage.publish(1, IN_MEMORY)
        case "blocked":
            busy = Background(stage.publish, MANY, SHORT)
            wait_until(lambda: any(row.stalls for row in bus.stats().subscribers))
            busy.wait_until_blocked("publish")
        case "draining":
            stage.publish(MANY, SHORT)
            bus.flush(DEADLINE)
            stage.catch_up()
            busy = Background(bus.close, DEADLINE)
            wait_until(lambda: other.stats().publishers == 0)
    pid = stage.meet(victim)
    if case.signal == signal.SIGSTOP:
        if busy is None:
            stage.publish(5)
            stage.catch_up()  # nobody waits for it
        os.kill(pid, signal.SIGCONT)
        if case.moment in EARLY:
            assert answer(orders) == "open"
        if case.moment in ("connecting", "handshake"):
            first = len(stage.sent)  # its subscription begins behind these
        if busy is not None:
            orders.send("go on")
    if case.moment == "draining":
        stage.watch.send("go on")
        assert busy is not None
        busy.result()
        assert read_to_the_end(stage.channel) == ([], "EOFError")
        assert answer(stage.watch) == (stage.seen, "EOFError")
    else:
        if busy is not None:
            busy.result()
        stage.publish(5)
        if case.lethal:
            stage.wait_until_nothing_is_left_of(pid)
            stage.catch_up()
            wait_until(lambda: bus.stats().memory == 0 or case.moment == "mid-ring")
        stage.end_and_compare()
    if not case.lethal:
        assert answer(orders) == (stage.sent[first:], "EOFError")
        finish(victim)
    other.close()


def provoke(stage: Stage, other: Broadcaster[Any]) -> Background | None:
    """Let the broker meet its moment: what does it."""
    bus, address = stage.bus, stage.bus.address
    match stage.case.moment:
        case "connecting" | "handshake":

            def come() -> None:
                with connect(address):
                    pass

            stage.trap.arm()
            return Background(come)
        case "pipe in flight":
            stage.trap.arm()
            return Background(other.publish, message("other", 0, 10))
        case "mid-frame":
            stage.trap.arm()
            return Background(bus.publish, message("other", 0, LONG))
        case "mid-ring":
            stage.trap.arm()
            return Background(bus.publish, message("other", 0, IN_RING))
        case "mid-memory" | "memory in flight":
            stage.trap.arm()
            return Background(bus.publish, message("other", 0, IN_MEMORY))
        case "blocked":
            blocked = Background(stage.publish, MANY, SHORT)
            wait_until(lambda: any(row.stalls for row in bus.stats().subscribers))
            blocked.wait_until_blocked("publish")
            return blocked
        case "draining":
            stage.publish(MANY, SHORT)
            bus.flush(DEADLINE)
            stage.catch_up()
            closing = Background(bus.close, DEADLINE)
            wait_until(lambda: stage.channel.poll(0))  # as it has read all, this is its end
            return closing
    return None


def play_broker(stage: Stage) -> None:
    """The broker is hit."""
    case, trap = stage.case, stage.trap
    bus = start_broadcaster(context=trapping(case.method, trap))
    folder = Path(bus.address).parent
    stage.open(bus)
    full = bus.subscribe(capacity=SMALL) if case.moment == "blocked" else None
    if full is not None:
        full.poll(0)
    other = connect(bus.address)
    if case.moment in ("mid-ring", "mid-memory", "memory in flight"):
        stage.share_memory()
    stage.look()
    bus.flush(DEADLINE, delivered=True)
    sure = [*stage.sent]  # has come to all, or is in their pipes
    act = provoke(stage, other)
    if case.signal == signal.SIGTERM:
        sure = [*stage.sent]  # what is published later, while the broker is being ended, may be too late
    if case.moment in WAITING:
        wait_until(lambda: asleep(stage.broker))
        trap.hit(stage.broker)
    else:
        wait_until(lambda: trap.sprung)
    if case.signal == signal.SIGSTOP:
        wait_until(lambda: stopped(stage.broker))
        os.kill(stage.broker, signal.SIGCONT)
    ends = "EOFError"
    if case.signal == signal.SIGKILL:
        wait_until(lambda: not alive(stage.broker))
        ends = "BrokerLost"
    if case.moment == "draining":
        stage.watch.send("go on")
    if case.lethal:
        check_the_end(stage, sure, full, act, ends)
        bus.close()
        wait_until(lambda: not folder.exists())
    else:
        check_it_goes_on(stage, full, act)
    if full is not None:
        full.close()
    other.close()


def check_the_end(
    stage: Stage, sure: list[tuple[str, int]], full: Channel[Any] | None, act: Background | None, ends: str
) -> None:
    """The broker ends, and everybody hears of it by an error of the name ``ends``."""
    draining = stage.case.moment == "draining"
    told = ends == "EOFError"
    late: list[tuple[str, int]] = []
    if full is not None and told:  # it is what everybody waits for
        late, end = read_to_the_end(full)
        assert end == ends
    error = None if act is None else act.error()
    assert error is None or isinstance(error, BrokerLost)
    seen, end = read_to_the_end(stage.channel)
    stage.seen += seen
    assert end == ("EOFError" if draining else ends)  # it had read all, and its end was said
    others, end = answer(stage.watch)
    assert end == ends
    wait_until(lambda: not alive(stage.broker))
    bus = stage.bus
    if not draining:
        for call in (bus.stats, bus.subscribe, lambda: bus.publish("late"), lambda: connect(bus.address)):
            with pytest.raises(BroadcastError):
                call()
    check_after_brokers_end(stage, sure, others, late, told)


def check_it_goes_on(stage: Stage, full: Channel[Any] | None, act: Background | None) -> None:
    """What has happened disturbs nobody, and the broadcaster is closed as ever."""
    moment = stage.case.moment
    if full is not None:  # it is what everybody waits for
        for _ in range(MANY):
            whole(full.recv(DEADLINE))
    assert act is None or act.error() is None
    if moment == "draining":
        assert read_to_the_end(stage.channel) == ([], "EOFError")
        assert answer(stage.watch) == (stage.seen, "EOFError")
        return
    stage.publish(5)
    if full is not None:
        stage.bus.flush(DEADLINE)
        stage.bus.unsubscribe(full)
        receive_all(full)
    stage.end_and_compare()
    assert stage.seen.count(("other", 0)) == (moment in IN_FLIGHT)


def check_after_brokers_end(
    stage: Stage, sure: list[tuple[str, int]], others: list[tuple[str, int]], late: list[tuple[str, int]], told: bool
) -> None:
    """What had arrived was received, in order, and without gaps; of a broker that was told to end, all that was published."""
    assert late == [("test", 5 + number) for number in range(len(late))]
    assert not late or len(late) >= len(sure) - 5
    for seen in (stage.seen,) if stage.case.moment == "draining" and not told else (stage.seen, others):
        numbers = [entry for entry in seen if entry[0] == "test"]
        assert numbers[: len(sure)] == sure
        assert numbers == [("test", number) for number in range(len(numbers))]
        assert seen.count(("other", 0)) <= 1
        assert GAP not in seen
    shorter, longer = sorted((stage.seen, others), key=len)
    assert longer[: len(shorter)] == shorter
    if told:
        assert stage.seen == others


def play_starter(stage: Stage) -> None:
    """The starter is hit, in a session of its own; the test and its witness have attached to its broker."""
    case, trap = stage.case, stage.trap
    temporary = Path(os.environ["TMPDIR"])
    orders, theirs = stage.pipe()
    victim = stage.children(stage.context, starting_victim, case.method, trap, theirs)
    if case.moment in ("connecting", "handshake"):
        pid = stage.meet(victim)
        (broker,) = trap.companions
        if not case.lethal:
            assert alive(broker)
            os.kill(pid, signal.SIGCONT)
            address, broker = answer(orders)
            stage.open(connect(address))
            orders.send("go on")
            assert answer(orders) == "published"
            finish_starter(stage, orders, victim)
        else:
            stage.bury(victim)
            wait_until(lambda: not alive(broker))
        wait_until(lambda: not list(temporary.glob("mpbroadcast-*")))
        return
    address, broker = answer(orders)
    stage.open(connect(address))
    full = stage.bus.subscribe("full", capacity=SMALL) if case.moment == "blocked" else None
    if full is not None:
        full.poll(0)
    orders.send("go on")
    pid = stage.meet(victim)
    if not case.lethal:
        if case.moment != "draining":
            stage.publish(5)
            stage.catch_up()  # nobody waits for it
        os.kill(pid, signal.SIGCONT)
    published = trap.returned()
    if full is not None:
        assert len([full.recv(DEADLINE) for _ in range(published - 3)]) == published - 3
    if case.moment == "draining":
        stage.watch.send("go on")
    if case.lethal or case.moment == "draining":
        seen, end = read_to_the_end(stage.channel)
        stage.seen += seen
        assert end == "EOFError"
        assert answer(stage.watch) == (stage.seen, "EOFError")
        if case.lethal:
            stage.bury(victim)
        else:
            finish(victim)
    else:
        if case.moment == "idle":
            orders.send("go on")
        assert answer(orders) == "published"
        if full is not None:
            stage.bus.unsubscribe(full)
            receive_all(full)
        finish_starter(stage, orders, victim)
    stage.check_victims_messages(exactly=trap.returned())
    assert [entry for entry in stage.seen if entry[0] == "test"] == stage.sent
    if full is not None:
        full.close()
    wait_until(lambda: not alive(broker))
    wait_until(lambda: not Path(address).parent.exists())


def finish_starter(stage: Stage, orders: Connection, victim: BaseProcess) -> None:
    """Who was only stopped closes its broadcaster, and all have all."""
    stage.publish(5)
    stage.bus.flush(DEADLINE)
    orders.send("close it")
    seen, end = read_to_the_end(stage.channel)
    stage.seen += seen
    assert end == "EOFError"
    assert answer(stage.watch) == (stage.seen, "EOFError")
    finish(victim)


SCENES: Final[dict[str, Callable[[Stage], None]]] = {
    "publisher": play_publisher,
    "bystander": play_publisher,
    "subscriber": play_subscriber,
    "broker": play_broker,
    "starter": play_starter,
}


@pytest.mark.parametrize("stage", chosen(), ids=str, indirect=True)
def test_a_fault(stage: Stage) -> None:
    """Whoever is hit, by whatever, whenever: the others have what they should, in order, and nothing of the dead is left."""
    SCENES[stage.case.victim](stage)


def test_each_row_that_is_not_run_has_a_reason() -> None:
    """All combinations are in the table but for those with a reason, and each reason leaves something out."""
    rows = list(itertools.starmap(Case, itertools.product(VICTIMS, SIGNALS, MOMENTS, METHODS)))
    reasons = [why_left_out(case) for case in rows]
    assert len(table()) + sum(map(bool, reasons)) == len(rows)
    assert {*LEFT_OUT.values()} == {*filter(None, reasons)}
    assert {case[:3] for case in table() if case.method == "fork"} >= {*SAMPLE}
