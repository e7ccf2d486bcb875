"""Memory that is written again: never while anybody has it, and kept no longer than it is of use."""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import mmap
import os
import pickle
import resource
import signal
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, start_broadcaster, trap_points
from mpbroadcast.posix import memory_pool, shared_memory
from mpbroadcast.posix.descriptors import OwnedDescriptor
from mpbroadcast.posix.memory_pool import KeptMemory, MemoryPool
from mpbroadcast.posix.shared_memory import available, check_message
from tests.support.helpers import DEADLINE, Background, Children, answer, finish, pattern, wait_until
from tests.support.large_workers import limited, lowest_free
from tests.support.victims import memories

pytestmark = pytest.mark.skipif(not available(), reason="there is no shared memory here, or it is forbidden")

Bus = Broadcaster[Any]
SIZE = 100_000


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes within the deadline is a stream, and who reads is waited for, also on a busy machine."""
    monkeypatch.setattr(memory_pool, "STREAM", DEADLINE)
    monkeypatch.setattr(memory_pool, "PATIENCE", 1.0 / SIZE)


def numbered(number: int, size: int = SIZE) -> tuple[int, pickle.PickleBuffer]:
    """A message whose bytes are its reader's without a copy, and have its number in them."""
    return number, pickle.PickleBuffer(bytearray(pattern(number, size)))


def inodes(kind: str) -> list[int]:
    """Of the memory of messages that this process has mapped: ``"s"`` to write it for others, ``"p"`` privately."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [int(line.split()[4]) for line in lines if "memfd:mpbroadcast" in line and f"rw-{kind} " in line]


def content(descriptor: OwnedDescriptor) -> bytes:
    """What is in the shared_memory."""
    return os.pread(descriptor.fd, os.fstat(descriptor.fd).st_size, 0)


# ------------------------------------------------------------------------------------------------------- who has what


@pytest.fixture
def kept() -> Iterator[KeptMemory]:
    """Memory that is kept."""
    made = KeptMemory(5003)
    made.fill([b"abc", bytes(5000)])
    yield made
    made.close()


Hold = Callable[[OwnedDescriptor], Callable[[], object]]


def hold_a_descriptor(reader: OwnedDescriptor) -> Callable[[], object]:
    return reader.close


def hold_a_duplicate(reader: OwnedDescriptor) -> Callable[[], object]:
    copy = os.dup(reader.fd)
    reader.close()
    return lambda: os.close(copy)


def hold_a_map(reader: OwnedDescriptor) -> Callable[[], object]:
    mapped: list[Any] = [shared_memory.map_privately(reader.fd, 100)]
    reader.close()
    return mapped.clear


def hold_it_in_a_socket(reader: OwnedDescriptor) -> Callable[[], object]:
    one, other = socket.socketpair()
    one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [reader.fd]))])
    reader.close()
    one.close()
    return other.close


def hold_it_in_a_child(reader: OwnedDescriptor) -> Callable[[], object]:
    mapped: list[Any] = [shared_memory.map_privately(reader.fd, 100)]
    reader.close()
    pid = os.fork()
    if not pid:
        signal.pause()
    mapped.clear()

    def end() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    return end


@pytest.mark.parametrize(
    "hold", [hold_a_descriptor, hold_a_duplicate, hold_a_map, hold_it_in_a_socket, hold_it_in_a_child], ids=lambda f: f.__name__
)
def test_somebody_has_it_as_long_as_it_can_be_read(hold: Hold, kept: KeptMemory) -> None:
    """Whoever has it, however, and even if that is a child of a reader's: it is not free before that is gone."""
    assert kept.is_unused()
    reader = kept.reader()
    assert not kept.is_unused()
    release = hold(reader)
    assert not kept.is_unused()
    release()
    wait_until(kept.is_unused)


def test_only_its_publisher_can_change_it(kept: KeptMemory) -> None:
    """Who is given it can neither write nor resize it, also not through a new file; and passes the check for a message."""
    reader = kept.reader()
    check_message(reader.fd, 5003)
    again = OwnedDescriptor(os.open(f"/proc/self/fd/{reader.fd}", os.O_RDWR))
    for fd in (reader.fd, again.fd):
        for change in (lambda fd: os.pwrite(fd, b"x", 0), lambda fd: os.ftruncate(fd, 0), lambda fd: os.ftruncate(fd, 1 << 20)):
            with pytest.raises(OSError, match=r"not permitted|Bad file|Invalid"):
                change(fd)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 100)
    assert content(reader)[:3] == b"abc"
    kept.fill([b"new"])
    assert content(reader)[:3] == b"new"
    assert not kept.is_unused()


def test_who_opens_it_at_the_wrong_moment_does_no_harm(kept: KeptMemory) -> None:
    """One that looks at all files of this process while that asks who has them neither ends it nor is held up for long."""
    path = f"/proc/{os.getpid()}/fd/{kept.descriptor.fd}"
    reports, report = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            for _ in range(3000):
                os.close(os.open(path, os.O_RDONLY))
            os.write(report, b"done")
        finally:
            os._exit(0)
    os.close(report)
    asked = 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        kept.is_unused()
        asked += 1
    assert os.read(reports, 10) == b"done"
    os.close(reports)
    assert asked
    assert kept.is_unused()


# ------------------------------------------------------------------------------------------------------------- the pool


def test_a_stream_is_written_into_the_same_memory(unhurried: None) -> None:
    """From the second message of about a size on memory is kept, and it is written when its reader has released it."""
    there = MemoryPool()
    used = []
    for number in range(20):
        data = pattern(number, SIZE - number)
        reader = there.memory([data[:10], data[10:]], len(data))
        assert content(reader)[: len(data)] == data
        used.append(os.fstat(reader.fd).st_ino)
        reader.close()
    assert len(set(used)) == 2
    assert len(inodes("s")) == 1


def test_memory_that_somebody_has_is_not_written(unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps all messages of a stream keeps them as they were; the pool keeps four, whoever reads or does not."""
    monkeypatch.setattr(memory_pool, "PATIENCE", 0.0)
    there = MemoryPool()
    readers = [there.memory([pattern(number, SIZE)], SIZE) for number in range(20)]
    assert len(inodes("s")) == 4
    for number, reader in enumerate(readers):
        assert content(reader)[:SIZE] == pattern(number, SIZE)
        reader.close()
    for number in range(4):
        assert content(there.memory([pattern(number, SIZE)], SIZE))[:SIZE] == pattern(number, SIZE)
    assert len(inodes("s")) == 4


def test_two_large_memories_are_kept_and_none_that_are_very_large(unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of bytes there are no more than two; and of messages beyond another none."""
    monkeypatch.setattr(memory_pool, "PATIENCE", 0.0)
    for limit, most in (("MOST_KEPT", 2), ("LARGEST", 0)):
        monkeypatch.setattr(memory_pool, limit, SIZE - 1)
        there = MemoryPool()
        readers = [there.memory([bytes(SIZE)], SIZE) for _ in range(5)]
        assert len(inodes("s")) == most
        del readers


@pytest.mark.parametrize("growth", ["by turns", "slowly", "at random"])
def test_a_stream_may_have_several_sizes(growth: str, unhurried: None) -> None:
    """Two sizes by turns have a memory each; one that grows, or changes a little, finds room in the one before."""
    sizes = {
        "by turns": [SIZE, 3 * SIZE] * 20,
        "slowly": [SIZE + 100 * number for number in range(40)],
        "at random": [SIZE + 2500 * (number * 7 % 5) for number in range(40)],
    }[growth]
    there = MemoryPool()
    used = set()
    for number, size in enumerate(sizes):
        reader = there.memory([pattern(number, size)], size)
        assert content(reader)[:size] == pattern(number, size)
        used.add(os.fstat(reader.fd).st_ino)
        reader.close()
    assert len(used) <= 6


def test_what_is_no_stream_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that come seldom have memory of their own; what was kept before is released."""
    times = itertools.chain([0.0, 0.1, 0.2], itertools.count(2.0, 1.1))
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    there = MemoryPool()
    for number in range(6):
        there.memory([bytes(SIZE)], SIZE)
        assert len(inodes("s")) == (number in (1, 2))
    assert memories(os.getpid()) == 0


def test_it_lets_go_when_nothing_comes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next occasion after a second."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    there = MemoryPool()
    for _ in range(2):
        there.memory([bytes(SIZE)], SIZE)
    there.rest()
    assert len(inodes("s")) == 1
    now = 101.0
    there.rest()
    assert inodes("s") == []
    assert memories(os.getpid()) == 0


def test_a_signals_handler_may_come_while_memory_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the next occasion to release all: the message that it has interrupted has its memory all the same."""
    now = 100.0
    asked = 0

    def interrupted(*args: Any) -> Any:
        nonlocal now, asked
        if args[1] == fcntl.F_SETLEASE and now < 101.0:
            now += 1.0
            there.rest()
            asked += 1
        return real(*args)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    there = MemoryPool()
    for _ in range(2):
        there.memory([bytes(SIZE)], SIZE)
    assert len(inodes("s")) == 1
    real = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", interrupted)
    reader = there.memory([pattern(1, SIZE)], SIZE)
    assert asked
    assert content(reader)[:SIZE] == pattern(1, SIZE)


@pytest.mark.parametrize("missing", ["leases", "/proc", "seals", "memory"])
def test_where_the_system_does_not_say_who_has_it(missing: str, unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message has memory of its own, nothing is kept, and hardly one is written twice."""
    writes = []
    writev = os.writev

    def counted(fd: int, views: list[Any]) -> int:
        writes.append(fd)
        return writev(fd, views)

    monkeypatch.setattr(os, "writev", counted)
    if missing == "memory":

        def no_map(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOMEM, "no room for a map")

        monkeypatch.setattr(mmap, "mmap", no_map)
    elif missing != "/proc":
        refused = fcntl.F_SETLEASE if missing == "leases" else fcntl.F_ADD_SEALS
        real = fcntl.fcntl

        def unknown(fd: int, command: int, argument: int = 0) -> Any:
            if command == refused and (missing == "leases" or argument & 0x10):  # a seal against later writing
                raise OSError(errno.EINVAL, "the system does not know this")
            return real(fd, command, argument)

        monkeypatch.setattr(fcntl, "fcntl", unknown)
    else:
        original = os.open

        def without_proc(path: str, *args: Any) -> int:
            if str(path).startswith("/proc"):
                raise FileNotFoundError(path)
            return original(path, *args)

        monkeypatch.setattr(os, "open", without_proc)
    there = MemoryPool()
    used = []
    for number in range(5):
        reader = there.memory([pattern(number, SIZE)], SIZE)
        used.append(reader)
        assert content(reader)[:SIZE] == pattern(number, SIZE)
        assert inodes("s") == []
    assert len({os.fstat(reader.fd).st_ino for reader in used}) == 5
    assert len(writes) == 5 + (missing == "seals")


@pytest.mark.parametrize("free", [1, 2, 3, 4])
def test_with_few_descriptors_there_is_still_memory(free: int, unhurried: None) -> None:
    """One that is left is enough for a message; that there are too few to keep anything is no reason to go without."""
    there = MemoryPool()
    with limited(resource.RLIMIT_NOFILE, lowest_free(os.getpid()) + free):
        for number in range(4):
            reader = there.memory([pattern(number, SIZE)], SIZE)
            assert content(reader)[:SIZE] == pattern(number, SIZE)
            reader.close()


def test_a_child_lets_go_at_a_fork(unhurried: None) -> None:
    """A child has neither the descriptors nor the maps, and its parent goes on."""
    there = MemoryPool()
    for _ in range(3):
        there.memory([bytes(SIZE)], SIZE)
    pid = os.fork()
    if not pid:
        os._exit(len(inodes("s")) + memories(os.getpid()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert content(there.memory([b"x" * SIZE], SIZE))[:SIZE] == b"x" * SIZE


@pytest.mark.parametrize("moment", ["mapping kept memory", "unmapping kept memory"])
def test_a_fork_by_another_thread_at_the_wrong_moment(moment: str, unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child has no map while memory is being made, or released: a fork waits until that is done, or comes before."""
    forked: list[Background] = []
    about_to = threading.Event()

    def fork() -> int:
        about_to.set()
        pid = os.fork()
        if not pid:
            os._exit(len(inodes("s")) + memories(os.getpid()))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def reach(name: str, subject: object = None) -> None:
        if name == moment and not forked:  # else it is the child that releases it
            forked.append(Background(fork))
            about_to.wait(DEADLINE)
            forked[0].wait_until_blocked("fork")

    monkeypatch.setattr(trap_points, "reach", reach)
    there = MemoryPool()
    for _ in range(2):
        there.memory([bytes(SIZE)], SIZE)
    for thread in forked:
        thread.join(DEADLINE)  # or it may fork in a collection, between the end of the hooks and the finalisers
    cycle: list[Any] = [there]
    cycle.append(cycle)
    del there, cycle
    gc.collect()  # which has no weak references left when it finalises what was in a cycle, and so no hooks for forks
    assert [thread.result() for thread in forked] == [0]


# ---------------------------------------------------------------------------------------------------- with a broadcaster


def read_a_stream(channel: Channel[Any], results: Connection, keep: bool) -> None:
    """Receive all up to the end, keep each or release it, and write over every second; report what there was, and where."""
    channel.fileno()
    results.send("open")
    kept: list[tuple[int, Any]] = []
    places = []
    right = True
    for number, data in channel:
        right = right and data == pattern(number, len(data))
        if number % 2:
            memoryview(data)[:] = bytes(len(data))
        if keep:
            kept.append((number, data))
        places += inodes("p") if not keep else []
    for number, data in kept:
        right = right and data == (bytes(len(data)) if number % 2 else pattern(number, len(data)))
    results.send((right, len(kept), len(set(places))))


def test_a_streams_readers_and_keepers(own_memory: None, unhurried: None, fork: BaseContext, children: Children) -> None:
    """One subscriber releases each message, and one keeps them all as they were and as it has changed them: with the first,
    memory is written again and again; with the second, never while it is there."""
    for keep, most in ((False, 20), (True, 0)):
        ours, theirs = fork.Pipe()
        with ours, theirs, start_broadcaster() as bus:
            channel = bus.subscribe()
            process = children(fork, read_a_stream, channel, theirs, keep)
            assert answer(ours) == "open"
            for number in range(40):
                bus.publish(numbered(number))
                bus.flush(timeout=DEADLINE, delivered=True)
            bus.unsubscribe(channel)
            right, count, places = answer(ours)
            assert right
            assert count == 40 * keep
            assert places <= most
            finish(process)


def test_streams_of_several_threads(own_memory: None, unhurried: None, bus: Bus) -> None:
    """Threads that publish streams through one handle, of one size and of several, find no memory that another one writes."""
    with bus.subscribe() as channel:
        channel.fileno()
        threads = [
            Background(
                bus.publish_many, [numbered(number, SIZE + 40_000 * (start // 200)) for number in range(start, start + 60)]
            )
            for start in (0, 100, 200)
        ]
        seen = []
        for _ in range(180):
            number, data = channel.recv(timeout=DEADLINE)
            assert data == pattern(number, len(data))
            seen.append(number)
        for thread in threads:
            thread.result()
        for start in (0, 100, 200):
            assert [number for number in seen if start <= number < start + 100] == list(range(start, start + 60))


def test_a_handle_lets_go(own_memory: None, unhurried: None, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has ended leaves nothing behind the next call that asks the broker, and none behind ``close()``."""
    with bus.subscribe() as channel:
        for then in (bus.stats, bus.close):
            for number in range(5):
                bus.publish(numbered(number))
                assert channel.recv(timeout=DEADLINE)[0] == number
            assert inodes("s")
            monkeypatch.setattr(memory_pool, "STREAM", 0.0)
            then()
            monkeypatch.setattr(memory_pool, "STREAM", DEADLINE)
            gc.collect()
            assert inodes("s") == []
