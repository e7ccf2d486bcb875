"""Which process is hit by which signal at which moment, with and without ``restart=True``: one table. After each fault the
others have all that they should. A trap (``support/traps.py``) springs at the moment itself. By default a sample of the table
runs; with ``MPBROADCAST_FAULTS=all`` in the environment all of it does, under each start method."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import pytest

import mpbroadcast
from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, BrokerRestarted, Channel, connect, start_broadcaster
from mpbroadcast.posix.shared_memory import available
from tests.support import traps, victims
from tests.support.helpers import DEADLINE, Background, Children, Pipe, answer, finish, wait_until
from tests.support.traps import DEAF, EARLY, GAP, WAITING, Entry, Trap, message, read, read_to_the_end, whole
from tests.support.victims import SOON, alive, asleep, descriptors, shared_maps, stopped

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks at descriptors and maps in /proc")

LETHAL: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
VICTIMS: Final = ("publisher", "subscriber", "broker", "starter", "bystander", "supervisor")
SIGNALS: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGINT)
MOMENTS: Final = (
    "connecting",  # connected, and nothing sent
    "handshake",  # half of an answer was sent
    "pipe in flight",  # its end is in a socket, with a reply that is not read
    "mid-frame",  # some pieces of a message are out
    "mid-ring",  # a message has its room in a ring, or it is being read there
    "mid-memory",  # memory of its own is about to be filled with a message, or it is being read there
    "memory in flight",  # that memory's descriptor is in a socket, and its frame not in the pipe, or not read
    "blocked",  # by a full backlog
    "draining",  # the starter is in close()
    "idle",
    "replacing",  # the first broker is dead: the next one restores what there was, or the supervisor is about to start it
    "orphaned",  # the supervisor is dead
)
REPLACED: Final = ("replacing", "orphaned")
IN_FLIGHT: Final = {  # moments of one message, and how large it is
    "pipe in flight": 10,
    "mid-frame": traps.LONG,
    "mid-ring": traps.IN_RING,
    "mid-memory": traps.IN_MEMORY,
    "memory in flight": traps.IN_MEMORY,
}
SHARED: Final = ("mid-ring", "mid-memory", "memory in flight")  # those that there are with shared memory only
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
        method = METHODS[index % 3 if usual and index % 8 == 0 and self.victim != "bystander" else 0]
        return self.method == method and (killed or usual or self.moment in REPLACED)

    def __str__(self) -> str:
        names = (self.victim, "restart" * self.restart, self.signal.name, self.moment.replace(" ", "_"), self.method)
        return "-".join(filter(None, names))


LEFT_OUT: Final[dict[str, Callable[[Case], bool]]] = {
    "only a forked process inherits a handle": lambda case: case.victim == "bystander" and case.method != "fork",
    "a broker without a supervisor is not replaced": lambda case: (
        not case.restart and (case.victim == "supervisor" or case.moment in REPLACED)
    ),
    "a supervisor has no part in what these do": lambda case: case.restart and case.victim not in DEAF,
    "the supervisor is dead then": lambda case: (case.victim, case.moment) == ("supervisor", "orphaned"),
}
"""The rows that make no sense, and why."""


ROWS: Final = [*itertools.starmap(Case, itertools.product(VICTIMS, SIGNALS, MOMENTS, METHODS, (False, True)))]
TABLE: Final = [case for case in ROWS if not any(left_out(case) for left_out in LEFT_OUT.values())]


def outcome(case: Case) -> str:
    """Return what becomes of the broker: it "goes on", is "replaced", "ends" as SIGTERM asks for, or is "lost" for good."""
    replacing = case.moment == "replacing"
    if case.signal == signal.SIGTERM:
        return "lost" if replacing and case.victim == "supervisor" else "ends"
    if case.signal != signal.SIGKILL:
        return "replaced" if replacing else "goes on"
    if case.victim == "supervisor":
        return "lost" if replacing else "goes on"
    return "replaced" if case.restart and case.moment not in ("draining", "orphaned") else "lost"


def of_test(entries: list[Entry]) -> list[Entry]:
    """Return those messages that the test has published."""
    return [entry for entry in entries if entry[0] == "test"]


class Stage:
    """A broker, the test's own publisher and channel on it, and another process that receives everything."""

    def __init__(self, case: Case, folder: Path, children: Children) -> None:
        self.case = case
        self.trap = Trap(str(folder), case.victim, case.signal, case.moment)
        self.sent: list[Entry] = []  # by the test
        self.seen: list[Entry] = []  # by the test
        self.full: Channel[Any] | None = None  # that the victim waits for
        self.act: Background | None = None  # what the test does meanwhile
        self.broker = 0
        self.bus: Broadcaster[Any]
        self.other: Broadcaster[Any]  # another handle
        self.channel: Channel[Any]
        self.watch: Connection  # to the other process
        self._children = children
        self._handles: list[Any] = []
        self._before = (0, 0, 0)

    def pipe(self) -> Pipe:
        """Two ends, closed at the end."""
        ends = multiprocessing.Pipe()
        self._handles += ends
        return ends

    def start(self, target: Callable[..., Any], *args: Any) -> BaseProcess:
        """Start a process by the method of this row."""
        return self._children(multiprocessing.get_context(self.case.method), target, *args)

    def open(self, bus: Broadcaster[Any], *full: str) -> None:
        """Start what receives; at the moment "blocked" also what does not, of the topics ``full``."""
        self.bus, self.other = bus, connect(bus.address)
        self.broker = bus.stats().pid
        self.watch, theirs = self.pipe()
        self.start(traps.witness, bus, theirs, self.case.moment == "draining")
        self.channel = bus.subscribe()
        self.channel.poll(0)
        self._handles += [self.channel, self.other, bus]
        assert answer(self.watch) == "open"
        self.publish(5)
        if self.case.moment == "blocked" and self.case.victim != "subscriber":
            self.full = bus.subscribe(*full, capacity=traps.SMALL)
            self.full.poll(0)
            self._handles.append(self.full)
        if self.case.moment in SHARED and self.case.victim in ("subscriber", *DEAF):
            self.share_memory()
        self.bus.flush(DEADLINE)
        self.catch_up()
        self._before = self._state()

    def publish(self, count: int = 1, size: int = 10) -> None:
        """Publish in the test's name."""
        for _ in range(count):
            entry = ("test", len(self.sent))
            self.bus.publish(message(*entry, size))
            self.sent.append(entry)

    def catch_up(self) -> None:
        """Receive until all has come that the test has published."""
        while len(of_test(self.seen)) < len(self.sent):
            self.seen.append(whole(self.channel.recv(DEADLINE)))

    def check_others_go_on(self) -> None:
        """No process waits for one that is stopped, and what is dead disturbs none."""
        self.publish(5)
        self.catch_up()

    def share_memory(self) -> None:
        """Let the test's publisher have a ring that is in use."""

        def in_use() -> bool:
            self.publish(1, traps.IN_RING)
            self.bus.flush(DEADLINE)
            self.catch_up()
            return shared_maps(self.broker) > 0

        wait_until(in_use)

    def provoke(self) -> None:
        """Do what brings a reader, or the broker, to its moment: in the background, for a broker that is hit may not answer."""
        moment, is_reader = self.case.moment, self.case.victim == "subscriber"
        self.trap.arm()
        if moment in ("blocked", "draining"):
            if moment == "draining":
                self.publish(traps.MANY, traps.SHORT)
                self.bus.flush(DEADLINE)
                self.catch_up()
                self.act = Background(self.bus.close, DEADLINE)
                wait_until(lambda: self.channel.poll(0))  # as it has read all, this is its end
                return
            self.act = Background(self.publish, traps.MANY, traps.SHORT)
            wait_until(lambda: any(row.stalls for row in self.bus.stats().subscribers))
            self.act.wait_until_blocked("publish")
        elif is_reader and moment == "mid-ring":
            while not self.trap.sprung:
                self.publish(1, traps.IN_RING)  # the first few come before it has mapped the ring
                self.bus.flush(DEADLINE)
        elif moment in IN_FLIGHT and not (is_reader and moment in EARLY):
            handle = self.other if moment == "pipe in flight" else self.bus
            self.act = Background(handle.publish, message("other", 0, IN_FLIGHT[moment]))
        elif moment in EARLY and not is_reader:
            self.act = Background(lambda: connect(self.bus.address).close())

    def _state(self) -> tuple[int, int, int]:
        return descriptors(self.broker), shared_maps(self.broker), self.bus.stats().publishers

    def wait_until_nothing_is_left_of(self, pid: int | None) -> None:
        """Wait until the broker is as it was before the victim came, and does not know it any more."""

        def as_before() -> bool:
            self.channel.poll(0)  # rings are unmapped where their end is read
            now = self._state()
            # There may be fewer descriptors, if a connection was just being closed before the victim came.
            return now[0] <= self._before[0] and now[1:] == self._before[1:]

        wait_until(lambda: all(row.pid != pid for row in self.bus.stats().subscribers), SOON)
        wait_until(as_before)
        self.drop_full()
        if self.case.lethal:
            self.catch_up()
            wait_until(lambda: self.bus.stats().memory == 0 or self.case.moment == "mid-ring")

    def drop_full(self) -> None:
        """Read what does not read to its end."""
        if self.full is not None:
            self.bus.unsubscribe(self.full)
            read_to_the_end(self.full, "EOFError")
            self.full = None

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
        """Wait for the end of a victim. A starter that was interrupted lets its broker drain before that."""
        victim.join(DEADLINE)
        assert victim.exitcode == (traps.INTERRUPTED if self.case.signal == signal.SIGINT else -self.case.signal)

    def end_and_compare(self, *, is_ended: bool) -> None:
        """Close the broadcaster, if it is not: all readers have seen the same, and all that the test has published."""
        if not is_ended:
            self.publish(5)
            self.bus.flush(DEADLINE)
            self.drop_full()
            self.bus.unsubscribe(self.channel)
        if self.case.moment == "draining":
            self.watch.send("go on")
            if self.act is not None:
                self.act.result()
        self.seen += read_to_the_end(self.channel, "EOFError")
        assert of_test(self.seen) == self.sent
        assert GAP not in self.seen
        if self.case.victim != "starter":
            self.bus.close()
        assert answer(self.watch) == [*self.seen, "EOFError"]

    def close(self) -> None:
        if (self.case.victim, self.case.signal) == ("bystander", signal.SIGSTOP) and self.trap.sprung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.trap.companions[0], signal.SIGKILL)  # one that is stopped would stay for ever
        self.act = None  # its error would keep what its call has held
        for handle in self._handles:
            handle.close()
        gc.collect()
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


def play_process(stage: Stage) -> None:
    """A publisher, a child that it has forked, a subscriber or a starter is hit."""
    case, trap = stage.case, stage.trap
    is_draining, is_reader, is_starter = case.moment == "draining", case.victim == "subscriber", case.victim == "starter"
    lives = not case.lethal or case.victim == "bystander"
    orders, theirs = stage.pipe()
    if is_starter:
        victim = stage.start(traps.play_victim, case.method, trap, theirs)
        if case.moment in traps.STARTING:
            check_a_start(stage, victim, lives)
            if not lives:
                return
        stage.open(connect(answer(orders)), "full")
        orders.send("go on")
    else:
        stage.open(start_broadcaster(context=multiprocessing.get_context(case.method)), "full")
        victim = stage.start(traps.play_victim, stage.bus, trap, theirs)
    first = len(stage.seen)  # of what a subscriber receives
    if is_reader:
        if case.moment not in EARLY:
            assert answer(orders) == "open"
        stage.provoke()
    elif is_draining and not is_starter:
        assert answer(orders) == "published"
        stage.provoke()
        orders.send("close() has begun")
    hit = 0 if is_starter and case.moment in traps.STARTING else stage.meet(victim)
    if not (is_draining or (is_reader and case.moment == "blocked") or (is_starter and case.lethal)):
        stage.check_others_go_on()
    published = trap.returned()
    if case.signal == signal.SIGSTOP and case.victim != "bystander" and hit:
        os.kill(hit, signal.SIGCONT)
    if is_reader and lives and case.moment in EARLY:
        assert answer(orders) == "open"
        if case.moment != "pipe in flight":
            first = len(stage.seen)  # its subscription begins behind these
    if stage.full is not None:
        # Those that were published before, and, if it lives on, one more and two that come behind.
        assert len([stage.full.recv(DEADLINE) for _ in range(published - 3)]) == published - 3
    if lives and (not is_starter or case.moment == "idle"):
        orders.send("go on")
    if is_starter and lives and not is_draining:
        assert answer(orders) == "published"
        stage.drop_full()
        stage.publish(5)
        stage.bus.flush(DEADLINE)
        orders.send("close it")
    elif lives and not is_reader and not is_starter:
        # Not join(), which waits for a pipe that the bystander has inherited as well.
        wait_until(lambda: victim.exitcode is not None)
    if stage.act is not None and not is_draining:
        stage.act.result()
    if not is_draining and not is_starter and (case.lethal or not is_reader):
        stage.wait_until_nothing_is_left_of(victim.pid)
    stage.end_and_compare(is_ended=is_draining or is_starter)
    if lives and is_reader:
        assert answer(orders) == [*stage.seen[first:], "EOFError"]
    if not is_reader:
        numbers = [number for name, number in stage.seen if name == "victim"]
        assert numbers == list(range(trap.returned())), "all that it has published has come, in order, and nothing else of it"
    if lives:
        finish(victim)
    elif is_starter:
        stage.bury(victim)
    if case.signal == signal.SIGSTOP and case.victim == "bystander":
        assert stopped(hit), "it was to be stopped, with all that it had inherited, all the time"
    wait_until(lambda: not alive(stage.broker))
    wait_until(lambda: not Path(stage.bus.address).parent.exists())


def check_a_start(stage: Stage, victim: BaseProcess, lives: bool) -> None:
    """A starter that is hit before its broker is there leaves nothing of it; one that was stopped goes on."""
    pid = stage.meet(victim)
    (broker,) = stage.trap.companions
    if lives:
        assert alive(broker)
        os.kill(pid, signal.SIGCONT)
    else:
        stage.bury(victim)
        wait_until(lambda: not alive(broker))
        wait_until(lambda: not list(Path(os.environ["TMPDIR"]).glob("mpbroadcast-*")))


def play_broker(stage: Stage) -> None:
    """The broker, or its supervisor, is hit."""
    case, trap = stage.case, stage.trap
    bus = start_broadcaster(context=traps.trapping(case.method, trap), restart=case.restart)
    folder = Path(bus.address).parent
    stage.open(bus)
    first = stage.broker
    supervisor = psutil.Process(first).ppid() if case.restart else first
    bus.flush(DEADLINE, delivered=True)
    before = Before(stage, supervisor) if case.restart else None
    sure = len(stage.sent)  # has come to all, or is in their pipes
    if case.moment in REPLACED:
        trap.arm()
        os.kill(first if case.moment == "replacing" else supervisor, signal.SIGKILL)
    else:
        stage.provoke()
    if case.signal == signal.SIGTERM:
        sure = len(stage.sent)  # what is published later, while the broker is being ended, may be too late
    hit = supervisor if case.victim == "supervisor" else first
    if case.moment in (*WAITING, "orphaned"):
        wait_until(lambda: asleep(first) and (case.moment != "orphaned" or not alive(supervisor)))
        trap.hit(hit)
    else:
        wait_until(lambda: trap.sprung)
    if case.moment == "replacing":
        (hit,) = trap.companions
    if case.signal == signal.SIGSTOP:
        wait_until(lambda: stopped(hit))
        if case.victim == "supervisor" and case.moment not in ("replacing", "blocked", "draining"):
            stage.check_others_go_on()
        os.kill(hit, signal.SIGCONT)
    elif case.signal == signal.SIGKILL:
        wait_until(lambda: not alive(hit))
    ending = outcome(case)
    if ending == "goes on":
        check_it_goes_on(stage)
    elif ending == "replaced":
        assert before is not None
        wait_until(lambda: bus.stats().pid != first)
        check_it_is_replaced(stage, before)
    else:
        check_the_end(stage, sure, is_lost=ending == "lost")
        is_alone = case.moment == "orphaned" or (case.victim, case.signal) == ("supervisor", signal.SIGKILL)
        if ending == "ends" or (case.restart and not is_alone):
            wait_until(lambda: not folder.exists())  # also without a close()
    bus.close()
    assert not any(map(alive, (supervisor, first, hit, stage.broker)))
    assert not folder.exists()


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
    """Those sockets of this process whose other end is closed."""
    poll = select.poll()
    for name in os.listdir("/proc/self/fd"):
        poll.register(int(name), 0)
    targets = {os.readlink(f"/proc/self/fd/{number}") for number, events in poll.poll(0) if events & select.POLLHUP}
    return {target for target in targets if target.startswith("socket:")}


class Before:
    """How things were before the broker died."""

    def __init__(self, stage: Stage, supervisor: int) -> None:
        (self._witness,) = {row.pid for row in stage.bus.stats().subscribers} - {os.getpid()}
        wait_until(lambda: asleep(self._witness))  # it has read what has come
        self._stage = stage
        self._supervisor = supervisor
        self._dead = stage.broker
        self._deads = shared_by(stage.broker) - shared_by(supervisor)  # its successors have what its supervisor has
        self._state = self._now(stage.broker)

    def _now(self, broker: int) -> tuple[object, ...]:
        rows = [(row.id, row.pid, row.topics, row.capacity) for row in self._stage.bus.stats().subscribers]
        maps = [shared_maps(pid) for pid in (os.getpid(), self._witness, broker)]
        return rows, maps, descriptors(self._supervisor), hung_up()

    def check_it_is_so_again(self, broker: int) -> None:
        """All that were subscribed still are; nothing of the broker that died is left, and this one has as much as that had."""
        assert not alive(self._dead)
        for pid in (os.getpid(), self._witness, broker):
            wait_until(lambda pid=pid: not shared_by(pid) & self._deads)  # type: ignore[misc]
        wait_until(lambda: self._now(broker) == self._state)


def check_it_is_replaced(stage: Stage, before: Before) -> None:
    """Another broker is there: each channel has one gap, and what is published from now on comes."""
    case, bus = stage.case, stage.bus
    if stage.act is not None:
        error = stage.act.error()  # nothing waits for a full backlog until it has been received from again
        assert error is None or (isinstance(error, BrokerLost) and case.moment in traps.STARTING)
    stage.broker = bus.stats().pid
    known = len(stage.sent)
    stage.publish(5)
    with pytest.raises(BrokerRestarted):
        bus.flush(DEADLINE)
    bus.flush(DEADLINE)
    if case.moment == "pipe in flight":
        with contextlib.suppress(BrokerRestarted):  # what it has published may have been in that pipe already
            stage.other.flush(DEADLINE)
    stage.other.flush(DEADLINE)  # it has raised that, or has published nothing to the broker that died
    readers = {stage.channel: stage.seen}
    if stage.full is not None:
        readers[stage.full] = []
    for channel, seen in readers.items():
        while stage.sent[-1] not in seen:
            seen.append(read(channel))
    if case.moment in SHARED:
        stage.share_memory()
    before.check_it_is_so_again(stage.broker)
    for channel, seen in readers.items():
        bus.unsubscribe(channel)
        seen.extend(read_to_the_end(channel, "EOFError"))
    bus.close()
    *others, end = answer(stage.watch)
    assert end == "EOFError"
    for seen in (others, *readers.values()):
        # There is one gap; nothing is missing but there, and nothing of what came behind the known ones; no copies.
        assert seen.count(GAP) == 1
        index = seen.index(GAP)
        earlier, later = of_test(seen[:index]), of_test(seen[index:])
        start = 0 if earlier[:1] == stage.sent[:1] else 5
        assert earlier == stage.sent[start : start + len(earlier)]
        assert later == stage.sent[len(stage.sent) - len(later) :]
        assert len(stage.sent) - known <= len(later) <= len(stage.sent) - start - len(earlier)
        assert len(earlier) == known or case.moment == "blocked"  # all of the others had come before
        assert seen.count(("other", 0)) <= (case.moment in IN_FLIGHT)


def check_the_end(stage: Stage, sure: int, *, is_lost: bool) -> None:
    """The broker ends: what had arrived is received, in order, and without gaps; then all calls raise, at once."""
    bus, channel, is_draining = stage.bus, stage.channel, stage.case.moment == "draining"
    began = time.monotonic()
    error = "BrokerLost" if is_lost else "EOFError"
    if is_draining:
        stage.watch.send("go on")
    late: list[Entry] = []
    if stage.full is not None and not is_lost:  # it is what all others wait for
        late = read_to_the_end(stage.full, error)
    failed = None if stage.act is None else stage.act.error()
    assert failed is None or isinstance(failed, BrokerLost)
    stage.seen += read_to_the_end(channel, "EOFError" if is_draining else error)  # which had read all, and has its end
    *others, end = answer(stage.watch)
    assert end == error
    gap = [GAP] if stage.case.moment == "replacing" and not is_lost else []  # the next one was to end before it began
    wait_until(lambda: not alive(stage.trap.companions[0] if gap else stage.broker))
    if not is_draining:
        calls: list[Callable[[], object]] = [bus.stats, bus.subscribe, bus.flush, lambda: bus.wait_for_subscribers(1)]
        calls += [lambda: bus.publish("late"), lambda: bus.publish_many(["late"])]
        calls += [channel.recv, channel.recv_many, lambda: next(channel)] if is_lost else []
        for call in calls:
            with pytest.raises(BrokerLost if is_lost else BroadcastError) as caught:
                call()
            assert str(caught.value)
        with pytest.raises(BroadcastError):
            connect(bus.address)
    assert not is_lost or time.monotonic() - began < SOON, "a search for the next broker would take 10 s"
    assert late == [("test", 5 + number) for number in range(len(late))]
    assert not late or len(late) >= sure - 5
    for seen in (stage.seen,) if is_draining and is_lost else (stage.seen, others):
        numbers = of_test(seen)
        assert numbers == stage.sent[: len(numbers)]
        assert len(numbers) >= sure
        assert seen.count(("other", 0)) <= 1
        assert [entry for entry in seen if entry == GAP] == gap
    shorter, longer = sorted((stage.seen, others), key=len)
    assert longer[: len(shorter)] == shorter
    assert is_lost or stage.seen == others


def check_it_goes_on(stage: Stage) -> None:
    """What has happened disturbs no process, and the broadcaster is closed as ever."""
    if stage.full is not None:  # it is what all others wait for
        for _ in range(traps.MANY):
            whole(stage.full.recv(DEADLINE))
    if stage.act is not None and stage.case.moment != "draining":
        stage.act.result()
    stage.end_and_compare(is_ended=stage.case.moment == "draining")
    assert stage.seen.count(("other", 0)) == (stage.case.moment in IN_FLIGHT)


@pytest.mark.parametrize(
    "stage", [case for case in TABLE if case.in_sample or os.environ.get("MPBROADCAST_FAULTS") == "all"], ids=str, indirect=True
)
def test_a_fault(stage: Stage) -> None:
    """Whatever is hit, by whatever, whenever: the others have what they should, in order, and nothing of the dead is left."""
    (play_broker if stage.case.victim in DEAF else play_process)(stage)


def test_the_sample_has_each_signal_of_each_victim_and_each_moment() -> None:
    """What runs by default has all pairs of two columns that the table has; and each reason leaves something out."""
    for one, other in itertools.combinations((0, 1, 2), 2):
        every = {(case[one], case[other]) for case in TABLE}
        assert {(case[one], case[other]) for case in TABLE if case.in_sample} == every
    assert all(any(map(left_out, ROWS)) for left_out in LEFT_OUT.values())


@pytest.mark.parametrize("end", ["killed", "killed, and no pidfds", "another program"])
def test_a_subscriber_whose_pipe_stays_open_is_gone(
    end: str, fork: BaseContext, children: Children, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither EOF nor EPIPE shows that it was killed while its child keeps each end open, or became another program."""
    if "no pidfds" in end:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    with start_broadcaster() as bus:
        bus.publish("this makes the pipe of this process")
        broker = bus.stats().pid
        before = descriptors(broker)
        victim = children(fork, victims.held_subscriber, bus, pipe[1], end == "another program")
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
        "receive": mpbroadcast.channel_to_selector(channels[1]).receive,
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
