"""Who is hit by which signal at which moment, with and without ``restart=True``: one table.

After each fault the others have all that they should. A trap (``support/traps.py``) springs at the moment itself. By default a
sample of the table runs; with ``MPBROADCAST_FAULTS=all`` in the environment all of it does, under each start method.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
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
)
from mpbroadcast.posix.shared_memory import available
from tests.support.fault_processes import (
    EARLY,
    GAP,
    IN_MEMORY,
    LONG,
    MANY,
    SHORT,
    SMALL,
    heard,
    message,
    publishing_victim,
    read_to_the_end,
    starting_victim,
    subscribing_victim,
    whole,
    witness,
)
from tests.support.helpers import DEADLINE, Background, Children, answer, finish, receive_all, wait_until
from tests.support.traps import DEAF, IN_RING, INTERRUPTED, WAITING, Trap, trapping
from tests.support.victims import alive, asleep, descriptors, shared_maps, stopped

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks at descriptors and maps in /proc")

LETHAL: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
AT_ONCE: Final = 5.0  # seconds; who went on looking for a broker that will not come would take 10


# ---------------------------------------------------------------------------------------------------------- the table

VICTIMS: Final = ("publisher", "subscriber", "broker", "starter", "bystander", "supervisor")
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
    "replacing",  # the first broker is dead: the next one restores what there was, or the supervisor is about to start it
    "orphaned",  # the supervisor is dead
)
REPLACED: Final = ("replacing", "orphaned")
IN_FLIGHT: Final = ("pipe in flight", "mid-frame", "mid-ring", "mid-memory", "memory in flight")  # of one message
SHARED: Final = ("mid-ring", "mid-memory", "memory in flight")  # that there are with shared memory only
METHODS: Final = ("fork", "spawn", "forkserver")


class Case(NamedTuple):
    """A row of the table."""

    victim: str
    signal: signal.Signals
    moment: str
    method: str
    restart: bool

    @property
    def lethal(self) -> bool:
        """Whether the victim does not survive it."""
        return self.signal in LETHAL and not (self.victim in DEAF and self.signal == signal.SIGINT)

    @property
    def in_sample(self) -> bool:
        """Whether it runs by default: each victim, signal and moment does with each other one, and SIGKILL at each moment."""
        index = VICTIMS.index(self.victim) + MOMENTS.index(self.moment) + self.restart
        usual = self.signal == SIGNALS[index % 4]
        killed = self.signal == signal.SIGKILL and self.victim not in ("bystander", "supervisor")
        method = METHODS[index % 3 if usual and index % 7 == 0 and self.victim != "bystander" else 0]
        return self.method == method and (killed or usual or self.moment in REPLACED)

    def __str__(self) -> str:
        names = (self.victim, "restart" * self.restart, self.signal.name, self.moment.replace(" ", "_"), self.method)
        return "-".join(filter(None, names))


LEFT_OUT: Final[dict[str, Callable[[Case], bool]]] = {
    "only who is forked inherits a handle": lambda case: case.victim == "bystander" and case.method != "fork",
    "a broker without a supervisor is not replaced": lambda case: (
        not case.restart and (case.victim == "supervisor" or case.moment in REPLACED)
    ),
    "a supervisor has no part in what these do": lambda case: case.restart and case.victim not in DEAF,
    "the supervisor is who is dead then": lambda case: (case.victim, case.moment) == ("supervisor", "orphaned"),
}
"""The rows that make no sense, and why."""


def table() -> list[Case]:
    """All rows that make sense."""
    rows = itertools.starmap(Case, itertools.product(VICTIMS, SIGNALS, MOMENTS, METHODS, (False, True)))
    return [case for case in rows if not any(left_out(case) for left_out in LEFT_OUT.values())]


def outcome(case: Case) -> str:
    """What becomes of the broker when it, or its supervisor, is hit.

    It "goes on", or is "replaced"; or it "ends", as it was told to; or is "lost", for it has died and nobody replaces it.
    """
    replacing = case.moment == "replacing"
    if case.signal == signal.SIGTERM:
        return "lost" if replacing and case.victim == "supervisor" else "ends"
    if case.signal != signal.SIGKILL:
        return "replaced" if replacing else "goes on"
    if case.victim == "supervisor":
        return "lost" if replacing else "goes on"
    return "replaced" if case.restart and case.moment not in ("draining", "orphaned") else "lost"


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


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    """The stage of a row of the table."""
    case: Case = request.param
    if case.moment in SHARED and not available():
        pytest.skip("there is no memory to share here")
    if case.moment == "mid-frame":
        monkeypatch.setenv("MPBROADCAST_INLINE", "1")
    made = Stage(case, tmp_path, children)
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
        if case.lethal:
            stage.catch_up()
            wait_until(lambda: bus.stats().memory == 0 or case.moment == "mid-ring")
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
    if case.moment in SHARED:
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


def shared_by(pid: int) -> set[tuple[int, int]]:
    """The pipes and the memory that a process has open: the device and inode of each, the same in all processes."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with contextlib.suppress(FileNotFoundError):  # closed in between
            if os.readlink(path).startswith(("pipe:", "/memfd:")):
                status = os.stat(path)
                found.add((status.st_dev, status.st_ino))
    return found


def hung_up() -> set[str]:
    """Those sockets of this process whose other end nobody has any more."""
    poll = select.poll()
    for name in os.listdir("/proc/self/fd"):
        poll.register(int(name), 0)
    found = set()
    for number, events in poll.poll(0):
        if events & select.POLLHUP:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return {target for target in found if target.startswith("socket:")}


def subscriptions(bus: Broadcaster[Any]) -> list[tuple[Any, ...]]:
    """What they are, and whose."""
    return [(row.id, row.pid, row.topics, row.capacity) for row in bus.stats().subscribers]


def play_broker(stage: Stage) -> None:
    """The broker, or its supervisor, is hit."""
    case, trap = stage.case, stage.trap
    bus = start_broadcaster(context=trapping(case.method, trap), restart=case.restart)
    folder = Path(bus.address).parent
    stage.open(bus)
    first = stage.broker
    supervisor = psutil.Process(first).ppid() if case.restart else first
    full = bus.subscribe(capacity=SMALL) if case.moment == "blocked" else None
    if full is not None:
        full.poll(0)
    other = connect(bus.address)
    if case.moment in SHARED:
        stage.share_memory()
    stage.look()
    bus.flush(DEADLINE, delivered=True)
    before = Before(stage, supervisor) if case.restart else None
    sure = [*stage.sent]  # has come to all, or is in their pipes
    act = provoke(stage, other)
    if case.signal == signal.SIGTERM:
        sure = [*stage.sent]  # what is published later, while the broker is being ended, may be too late
    if case.moment == "replacing":
        trap.arm()
        os.kill(first, signal.SIGKILL)
    elif case.moment == "orphaned":
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not alive(supervisor))
    hit = supervisor if case.victim == "supervisor" else first
    if case.moment in (*WAITING, "orphaned"):
        wait_until(lambda: asleep(first))
        trap.hit(hit)
    else:
        wait_until(lambda: trap.sprung)
    if case.moment == "replacing":
        (hit,) = trap.companions
    if case.signal == signal.SIGSTOP:
        wait_until(lambda: stopped(hit))
        if case.victim == "supervisor" and case.moment not in ("replacing", "blocked", "draining"):
            stage.publish(5)
            stage.catch_up()  # nobody waits for it
        os.kill(hit, signal.SIGCONT)
    elif case.signal == signal.SIGKILL:
        wait_until(lambda: not alive(hit))
    if case.moment == "draining":
        stage.watch.send("go on")
    began = time.monotonic()
    match outcome(case):
        case "goes on":
            check_it_goes_on(stage, full, act)
        case "replaced":
            assert before is not None
            wait_until(lambda: bus.stats().pid != first)
            check_it_is_replaced(stage, before, other, full, act)
        case "ends" if case.moment == "replacing":
            check_the_next_one_ends(stage)
        case "ends":
            check_the_end(stage, sure, full, act, "EOFError")
        case "lost":
            check_the_end(stage, sure, full, act, "BrokerLost")
            assert time.monotonic() - began < AT_ONCE
    supervisor_killed = case.moment == "orphaned" or (case.victim, case.signal) == ("supervisor", signal.SIGKILL)
    if outcome(case) == "ends" or (outcome(case) == "lost" and case.restart and not supervisor_killed):
        wait_until(lambda: not folder.exists())  # also if nobody calls close()
    other.close()
    bus.close()
    assert not any(map(alive, (supervisor, first, hit, stage.broker)))
    assert not folder.exists()
    if full is not None:
        full.close()


class Before:
    """How things were before the broker died."""

    def __init__(self, stage: Stage, supervisor: int) -> None:
        (self._witness,) = {row.pid for row in stage.bus.stats().subscribers} - {os.getpid()}
        wait_until(lambda: asleep(self._witness))  # it has read what has come
        self._bus = stage.bus
        self._supervisor = supervisor
        self._subscriptions = subscriptions(stage.bus)
        self._dead = stage.broker
        self._deads = shared_by(stage.broker) - shared_by(supervisor)  # what those who come after it have of its supervisor
        self._of_supervisor = descriptors(supervisor)
        self._maps = self._count_maps(stage.broker)
        self._hung_up = hung_up()

    def _count_maps(self, broker: int) -> list[int]:
        return [shared_maps(pid) for pid in (os.getpid(), self._witness, broker)]

    def check_it_is_so_again(self, broker: int) -> None:
        """All that were subscribed still are; nothing of the broker that died is left, and this one has as much as that had."""
        assert subscriptions(self._bus) == self._subscriptions
        assert not alive(self._dead)
        assert descriptors(self._supervisor) == self._of_supervisor
        for pid in (os.getpid(), self._witness, broker):
            wait_until(lambda pid=pid: not shared_by(pid) & self._deads)  # type: ignore[misc]
        wait_until(lambda: self._count_maps(broker) == self._maps)
        assert hung_up() == self._hung_up


def check_it_is_replaced(
    stage: Stage, before: Before, other: Broadcaster[Any], full: Channel[Any] | None, act: Background | None
) -> None:
    """Another broker is there: each channel hears of it once, and what is published from now on comes."""
    case, bus = stage.case, stage.bus
    error = None if act is None else act.error()  # nobody waits for a full backlog until it has been received from again
    assert error is None or (isinstance(error, BrokerLost) and case.moment in ("connecting", "handshake"))
    stage.broker = bus.stats().pid
    known = len(stage.sent)
    stage.publish(5)
    with pytest.raises(BrokerRestarted):
        bus.flush(DEADLINE)
    bus.flush(DEADLINE)
    if case.moment == "pipe in flight":
        with contextlib.suppress(BrokerRestarted):  # what it has published may have been in that pipe already
            other.flush(DEADLINE)
    other.flush(DEADLINE)  # it has said it, or has published nothing to the broker that died
    while stage.sent[-1] not in stage.seen:
        stage.seen.append(heard(stage.channel))
    held = [heard(full)] if full is not None else []
    while full is not None and held[-1] != stage.sent[-1]:
        held.append(heard(full))
    if case.moment in SHARED:
        stage.share_memory()
    before.check_it_is_so_again(stage.broker)
    for channel in filter(None, (stage.channel, full)):
        bus.unsubscribe(channel)
    seen, end = read_to_the_end(stage.channel)
    assert end == "EOFError"
    stage.seen += seen
    if full is not None:
        seen, end = read_to_the_end(full)
        assert end == "EOFError"
        held += seen
    bus.close()
    others, end = answer(stage.watch)
    assert end == "EOFError"
    for seen in (stage.seen, others):
        check_around_the_gap(stage, seen, stage.sent, known)
    if full is not None:
        check_around_the_gap(stage, held, stage.sent[5:], known - 5)


def check_around_the_gap(stage: Stage, seen: list[tuple[str, int]], sent: list[tuple[str, int]], known: int) -> None:
    """There is one; nothing is missing but in its place, and nothing of what came behind the ``known`` ones; no copies."""
    assert seen.count(GAP) == 1
    place = seen.index(GAP)
    earlier, later = [[entry for entry in part if entry[0] == "test"] for part in (seen[:place], seen[place:])]
    assert earlier == sent[: len(earlier)]
    assert later == sent[len(sent) - len(later) :]
    assert len(sent) - known <= len(later) <= len(sent) - len(earlier)
    if stage.case.moment != "blocked":
        assert len(earlier) == known  # all of the others had come before
    assert seen.count(("other", 0)) <= (stage.case.moment in IN_FLIGHT)


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


def check_the_next_one_ends(stage: Stage) -> None:
    """The broker that takes over was told to end before it began: everybody hears of the gap, and then has a clean end."""
    assert read_to_the_end(stage.channel) == ([GAP], "EOFError")
    assert answer(stage.watch) == ([*stage.sent, GAP], "EOFError")
    wait_until(lambda: not alive(stage.trap.companions[0]))
    for call in (stage.bus.stats, lambda: stage.bus.publish("late"), lambda: connect(stage.bus.address)):
        with pytest.raises(BroadcastError):
            call()


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
    "supervisor": play_broker,
    "starter": play_starter,
}


@pytest.mark.parametrize(
    "stage",
    [case for case in table() if case.in_sample or os.environ.get("MPBROADCAST_FAULTS") == "all"],
    ids=str,
    indirect=True,
)
def test_a_fault(stage: Stage) -> None:
    """Whoever is hit, by whatever, whenever: the others have what they should, in order, and nothing of the dead is left."""
    SCENES[stage.case.victim](stage)


def test_the_sample_has_each_signal_of_each_victim_and_each_moment() -> None:
    """What runs by default has all pairs of two columns that the table has; and each reason leaves something out."""
    for columns in itertools.combinations((0, 1, 2), 2):
        whole, sample = (
            {(case[columns[0]], case[columns[1]]) for case in rows}
            for rows in (table(), [case for case in table() if case.in_sample])
        )
        assert sample == whole
    rows = [*itertools.starmap(Case, itertools.product(VICTIMS, SIGNALS, MOMENTS, METHODS, (False, True)))]
    assert all(any(map(left_out, rows)) for left_out in LEFT_OUT.values())
