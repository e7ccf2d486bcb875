"""The rows of the fault table for ``restart=True``: the broker that is replaced when it dies, and the keeper beside it.

All is as in ``test_faults.py``. The keeper has no part in what is published, so the moments are those of the broker: the trap
springs there, and the broker goes on once its keeper has what it was sent. Two moments are of these victims only.

By default some of the rows run, most of them under ``fork``; with ``MPBROADCAST_FAULTS=all`` in the environment, all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, BrokerRestarted, Channel, connect, start_broadcaster
from tests.faults.test_faults import (
    GAP,
    IN_FLIGHT,
    METHODS,
    MOMENTS,
    SHARED,
    SIGNALS,
    SMALL,
    WAITING,
    Case,
    Stage,
    check_it_goes_on,
    check_the_end,
    heard,
    provoke,
    read_to_the_end,
    staged,
    trapping,
)
from tests.support.helpers import DEADLINE, Background, Children, answer, wait_until
from tests.support.victims import alive, asleep, descriptors, shared_maps, stopped

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks at descriptors and maps in /proc")

AT_ONCE: Final = 5.0  # seconds; who went on looking for a broker that will not come would take 10


# ---------------------------------------------------------------------------------------------------------- the table

KEPT_VICTIMS: Final = ("kept broker", "keeper")
KEPT_MOMENTS: Final = (
    *MOMENTS,
    "replacing",  # the first broker is dead: the next one restores what there was, or the keeper is about to start it
    "orphaned",  # its keeper is dead
)

KEPT_LEFT_OUT: Final[dict[tuple[str, str], str]] = {
    ("keeper", "orphaned"): "the keeper is who is dead then",
}
"""A victim and a moment that make no sense together; and why."""

KEPT_SAMPLE: Final = (
    *(("kept broker", signal.SIGKILL, moment, "fork") for moment in KEPT_MOMENTS),
    ("kept broker", signal.SIGKILL, "mid-frame", "spawn"),
    ("kept broker", signal.SIGTERM, "replacing", "fork"),
    ("kept broker", signal.SIGTERM, "blocked", "fork"),
    ("kept broker", signal.SIGSTOP, "replacing", "fork"),
    ("kept broker", signal.SIGINT, "mid-ring", "fork"),
    ("keeper", signal.SIGKILL, "replacing", "fork"),
    ("keeper", signal.SIGKILL, "memory in flight", "fork"),
    ("keeper", signal.SIGKILL, "draining", "forkserver"),
    ("keeper", signal.SIGTERM, "mid-frame", "fork"),
    ("keeper", signal.SIGTERM, "replacing", "fork"),
    ("keeper", signal.SIGSTOP, "replacing", "fork"),
    ("keeper", signal.SIGSTOP, "blocked", "fork"),
    ("keeper", signal.SIGINT, "idle", "fork"),
)
"""What runs by default."""


def kept_combinations() -> list[Case]:
    """All rows that there could be."""
    return list(itertools.starmap(Case, itertools.product(KEPT_VICTIMS, SIGNALS, KEPT_MOMENTS, METHODS)))


def kept_table() -> list[Case]:
    """All rows that make sense."""
    return [case for case in kept_combinations() if (case.victim, case.moment) not in KEPT_LEFT_OUT]


def kept_chosen() -> list[Case]:
    """The rows that are run."""
    if os.environ.get("MPBROADCAST_FAULTS") == "all":
        return kept_table()
    return [case for case in kept_table() if case in KEPT_SAMPLE]


def outcome(case: Case) -> str:
    """What becomes of the broker.

    It "goes on", or is "replaced"; or it "ends", as it was told to; or is "lost", for it has died and nobody replaces it.
    """
    replacing = case.moment == "replacing"
    if case.signal == signal.SIGTERM:
        return "lost" if replacing and case.victim == "keeper" else "ends"
    if case.signal != signal.SIGKILL:
        return "replaced" if replacing else "goes on"
    if case.victim == "keeper":
        return "lost" if replacing else "goes on"
    return "lost" if case.moment in ("draining", "orphaned") else "replaced"


# ---------------------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    """The stage of a row of this table."""
    yield from staged(request.param, tmp_path, children, monkeypatch)


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


# ---------------------------------------------------------------------------------------------------------- the scenes


def play_kept(stage: Stage) -> None:
    """The broker, or its keeper, is hit."""
    case, trap = stage.case, stage.trap
    bus = start_broadcaster(context=trapping(case.method, trap), restart=True)
    folder = Path(bus.address).parent
    stage.open(bus)
    first, keeper = stage.broker, psutil.Process(stage.broker).ppid()
    full = bus.subscribe(capacity=SMALL) if case.moment == "blocked" else None
    if full is not None:
        full.poll(0)
    other = connect(bus.address)
    if case.moment in SHARED:
        stage.share_memory()
    stage.look()
    bus.flush(DEADLINE, delivered=True)
    before = Before(stage, keeper)
    sure = [*stage.sent]  # has come to all, or is in their pipes
    act = provoke(stage, other)
    if case.signal == signal.SIGTERM:
        sure = [*stage.sent]  # what is published later, while the broker is being ended, may be too late
    if case.moment == "replacing":
        trap.arm()
        os.kill(first, signal.SIGKILL)
    elif case.moment == "orphaned":
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not alive(keeper))
    hit = keeper if case.victim == "keeper" else first
    if case.moment in (*WAITING, "orphaned"):
        wait_until(lambda: asleep(first))
        trap.hit(hit)
    else:
        wait_until(lambda: trap.sprung)
    if case.moment == "replacing":
        (hit,) = trap.companions
    if case.signal == signal.SIGSTOP:
        wait_until(lambda: stopped(hit))
        if case.victim == "keeper" and case.moment not in ("replacing", "blocked", "draining"):
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
            wait_until(lambda: bus.stats().pid != first)
            check_it_is_replaced(stage, before, other, full, act)
        case "ends" if case.moment == "replacing":
            check_the_next_one_ends(stage)
        case "ends":
            check_the_end(stage, sure, full, act, "EOFError")
        case "lost":
            check_the_end(stage, sure, full, act, "BrokerLost")
            assert time.monotonic() - began < AT_ONCE
    keeper_killed = case.moment == "orphaned" or (case.victim, case.signal) == ("keeper", signal.SIGKILL)
    if outcome(case) == "ends" or (outcome(case) == "lost" and not keeper_killed):
        wait_until(lambda: not folder.exists())  # also if nobody calls close()
    other.close()
    bus.close()
    assert not any(map(alive, (keeper, first, hit, stage.broker)))
    assert not folder.exists()
    if full is not None:
        full.close()


class Before:
    """How things were before the broker died."""

    def __init__(self, stage: Stage, keeper: int) -> None:
        (self._witness,) = {row.pid for row in stage.bus.stats().subscribers} - {os.getpid()}
        wait_until(lambda: asleep(self._witness))  # it has read what has come
        self._bus = stage.bus
        self._keeper = keeper
        self._subscriptions = subscriptions(stage.bus)
        self._dead = stage.broker
        self._deads = shared_by(stage.broker) - shared_by(keeper)  # what those who come after it have of its keeper
        self._of_keeper = descriptors(keeper)
        self._maps = self._count_maps(stage.broker)
        self._hung_up = hung_up()

    def _count_maps(self, broker: int) -> list[int]:
        return [shared_maps(pid) for pid in (os.getpid(), self._witness, broker)]

    def check_it_is_so_again(self, broker: int) -> None:
        """All that were subscribed still are; nothing of the broker that died is left, and this one has as much as that had."""
        assert subscriptions(self._bus) == self._subscriptions
        assert not alive(self._dead)
        assert descriptors(self._keeper) == self._of_keeper
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


def check_the_next_one_ends(stage: Stage) -> None:
    """The broker that takes over was told to end before it began: everybody hears of the gap, and then has a clean end."""
    assert read_to_the_end(stage.channel) == ([GAP], "EOFError")
    assert answer(stage.watch) == ([*stage.sent, GAP], "EOFError")
    wait_until(lambda: not alive(stage.trap.companions[0]))
    for call in (stage.bus.stats, lambda: stage.bus.publish("late"), lambda: connect(stage.bus.address)):
        with pytest.raises(BroadcastError):
            call()


@pytest.mark.parametrize("stage", kept_chosen(), ids=str, indirect=True)
def test_a_fault(stage: Stage) -> None:
    """Whoever is hit, by whatever, whenever: the others have what they should, in order, and nothing of the dead is left."""
    play_kept(stage)


def test_each_row_that_is_not_run_has_a_reason() -> None:
    """All combinations are in the table but for those with a reason, and what runs by default is of the table."""
    table = kept_table()
    assert {(case.victim, case.moment) for case in kept_combinations() if case not in table} == {*KEPT_LEFT_OUT}
    assert {*table} >= {*KEPT_SAMPLE}
