"""Memory that is written again: never while any process has it, and kept no longer than it is of use."""

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, start_broadcaster, trap_points
from mpbroadcast.posix import memory_pool
from mpbroadcast.posix.descriptors import OwnedDescriptor
from mpbroadcast.posix.memory_pool import KeptMemory, MemoryPool
from mpbroadcast.posix.shared_memory import available, check_message, map_privately
from tests.support.helpers import DEADLINE, Background, Children, pattern, wait_until
from tests.support.large_workers import ReaderProcess, number_of
from tests.support.victims import memories

pytestmark = pytest.mark.skipif(not available(), reason="there is no shared memory here, or it is forbidden")

Bus = Broadcaster[Any]
SIZE = 100_000


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes within the deadline is a stream, and readers are waited for, also on a busy machine."""
    monkeypatch.setattr(memory_pool, "STREAM", DEADLINE)
    monkeypatch.setattr(memory_pool, "PATIENCE", 1.0 / SIZE)


def uncopied(number: int, size: int = SIZE) -> tuple[int, pickle.PickleBuffer]:
    """Return a message whose bytes are its reader's own, without a copy."""
    return number, pickle.PickleBuffer(bytearray(pattern(number, size)))


def inodes(kind: str) -> list[int]:
    """Of the memory of messages that this process has mapped: ``"s"`` to write it for others, ``"p"`` privately."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [int(line.split()[4]) for line in lines if "memfd:mpbroadcast" in line and f"rw-{kind} " in line]


def content(descriptor: OwnedDescriptor) -> bytes:
    return os.pread(descriptor.fd, os.fstat(descriptor.fd).st_size, 0)


def written(pool: MemoryPool, number: int = 0, size: int = SIZE) -> OwnedDescriptor:
    """Return a reader's descriptor of memory in which a message of this number is."""
    data = pattern(number, size)
    reader = pool.memory([data[:10], data[10:]], size)
    assert content(reader)[:size] == data
    return reader


@pytest.fixture
def kept() -> Iterator[KeptMemory]:
    made = KeptMemory(5003)
    made.fill([b"abc", bytes(5000)])
    yield made
    made.close()


@contextlib.contextmanager
def held(by: str, reader: OwnedDescriptor) -> Iterator[None]:
    """Keep the memory by one of several means meanwhile."""
    with contextlib.ExitStack() as stack:
        if by == "a duplicate":
            stack.callback(os.close, os.dup(reader.fd))
        elif by == "a socket":
            one, other = socket.socketpair()
            socket.send_fds(one, [b"x"], [reader.fd])
            one.close()
            stack.enter_context(other)
        elif by in ("a map", "a child"):
            mapped: list[Any] = [map_privately(reader.fd, 100)]
            stack.callback(mapped.clear)
            if by == "a child":
                pid = os.fork()
                if not pid:
                    signal.pause()
                stack.callback(os.waitpid, pid, 0)
                stack.callback(os.kill, pid, signal.SIGKILL)
                mapped.clear()
        if by == "a descriptor":
            stack.callback(reader.close)
        else:
            reader.close()
        yield


@pytest.mark.parametrize("by", ["a descriptor", "a duplicate", "a socket", "a map", "a child"])
def test_memory_is_in_use_as_long_as_it_can_be_read(by: str, kept: KeptMemory) -> None:
    """Whichever process has it, however, and even if that is a child of a reader's: it is not free before that is gone."""
    assert kept.is_unused()
    reader = kept.reader()
    assert not kept.is_unused()
    with held(by, reader):
        assert not kept.is_unused()
    wait_until(kept.is_unused)


def test_only_its_publisher_can_change_it(kept: KeptMemory) -> None:
    """A reader can neither write nor resize it, also not through a new file; and it passes the check for a message."""
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


def test_pages_are_entered_many_at_once() -> None:
    """The second fill enters what the first one has allocated: page by page, that takes as long as writing it."""
    pages = 1024
    with mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as tried:
        try:
            tried.madvise(22)  # MADV_POPULATE_READ
        except OSError:
            pytest.skip("the system enters a page when it is touched")
    if mmap.PAGESIZE > 4096:
        pytest.skip("the system enters 64 KiB at once")
    kept, message = KeptMemory(pages * mmap.PAGESIZE), bytes(pages * mmap.PAGESIZE)
    kept.fill([message])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept.fill([message])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 2


def test_a_process_that_opens_it_at_the_wrong_moment_does_no_harm(kept: KeptMemory) -> None:
    """One that opens it while this process asks which processes have it neither ends this one nor is held up for long."""
    path = f"/proc/{os.getpid()}/fd/{kept.descriptor.fd}"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for _ in range(3000):
                os.close(os.open(path, os.O_RDONLY))
            code = 0
        finally:
            os._exit(code)
    asked = 0
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        kept.is_unused()
        asked += 1
    assert ended == (pid, 0)
    assert asked
    assert kept.is_unused()


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        (range(SIZE, SIZE - 20, -1), 2),
        ([SIZE, 3 * SIZE] * 20, 6),
        (range(SIZE, SIZE + 4000, 100), 6),
        ([SIZE + 2500 * (number * 7 % 5) for number in range(40)], 6),
    ],
    ids=["about the same", "by turns", "growing", "at random"],
)
def test_a_stream_is_written_into_the_same_memory(sizes: Sequence[int], most: int, unhurried: None) -> None:
    """From the second message of about a size on memory is kept, and written again when its reader releases it. Two sizes by
    turns have a memory each; one that grows, or changes a little, finds room in the one before."""
    pool = MemoryPool()
    used = set()
    for number, size in enumerate(sizes):
        reader = written(pool, number, size)
        used.add(os.fstat(reader.fd).st_ino)
        reader.close()
    assert len(used) <= most
    assert len(inodes("s")) <= most // 2


def test_a_quick_reader_is_waited_for_before_there_is_more_memory(unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only memory that is kept comes free while the publisher waits: it is written again. One that does not is not."""
    pool = MemoryPool()
    written(pool).close()  # which is not kept
    reader = written(pool)
    kept = os.fstat(reader.fd).st_ino
    with monkeypatch.context() as pausing:
        pausing.setattr(time, "sleep", lambda _: reader.close())
        later = written(pool)
    assert os.fstat(later.fd).st_ino == kept
    assert os.fstat(written(pool).fd).st_ino != kept


@pytest.mark.parametrize(("limit", "most"), [("", 4), ("MOST_KEPT", 2), ("LARGEST", 0)])
def test_memory_that_is_in_use_is_not_written(limit: str, most: int, unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that a reader keeps stay as they were; the pool keeps four, two that are large, and none that is very large."""
    monkeypatch.setattr(memory_pool, "PATIENCE", 0.0)
    if limit:
        monkeypatch.setattr(memory_pool, limit, SIZE - 1)
    pool = MemoryPool()
    readers = [written(pool, number) for number in range(20)]
    assert len(inodes("s")) == most
    for number, reader in enumerate(readers):
        assert content(reader)[:SIZE] == pattern(number, SIZE)
        reader.close()
    for number in range(4):
        written(pool, number)
    assert len(inodes("s")) == most


def test_threads_that_write_at_once_write_into_different_memory(unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread looks at memory, no other can take it: another message would be written over one on its way."""
    monkeypatch.setattr(memory_pool, "PATIENCE", 0.0)
    pool = MemoryPool()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def publish(number: int) -> None:
        for _ in range(300):
            reader = written(pool, number, 5000)
            time.sleep(0)
            assert content(reader)[:5000] == pattern(number, 5000)
            reader.close()

    try:
        for thread in [Background(publish, number) for number in range(8)]:
            thread.result()
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    ("missing", "module", "name", "error"),
    [
        ("leases", fcntl, "fcntl", errno.EINVAL),
        ("seals", fcntl, "fcntl", errno.EINVAL),
        ("memory", mmap, "mmap", errno.ENOMEM),
        ("/proc", os, "open", errno.ENOENT),
    ],
)
def test_where_the_system_does_not_report_its_readers(
    missing: str, module: Any, name: str, error: int, unhurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message has memory of its own, and nothing is kept."""
    real = getattr(module, name)

    def is_refused(*args: Any) -> bool:
        if missing == "leases":
            return bool(args[1] == fcntl.F_SETLEASE)
        if missing == "seals":
            return args[1] == fcntl.F_ADD_SEALS and bool(args[2] & 0x10)  # a seal against later writing
        return missing == "memory" or str(args[0]).startswith("/proc")

    def call(*args: Any, **keywords: Any) -> Any:
        if is_refused(*args):
            raise OSError(error, os.strerror(error))
        return real(*args, **keywords)

    monkeypatch.setattr(module, name, call)
    pool = MemoryPool()
    used = []
    for number in range(5):
        used.append(written(pool, number))
        assert inodes("s") == []
    assert len({os.fstat(reader.fd).st_ino for reader in used}) == 5


def inherited() -> int:
    """Fork. Return how many maps and descriptors of such memory the child has."""
    pid = os.fork()
    if not pid:
        os._exit(len(inodes("s")) + memories(os.getpid()))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("moment", ["mapping kept memory", "unmapping kept memory"])
def test_a_fork_by_another_thread_at_the_wrong_moment(moment: str, unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child has no map while memory is being made, or released: a fork waits until that is done, or comes before."""
    forked: list[Background] = []
    about_to = threading.Event()

    def fork() -> int:
        about_to.set()
        return inherited()

    def reach(name: str, subject: object = None) -> None:
        if name == moment and not forked:  # else it is the child that releases it
            forked.append(Background(fork))
            about_to.wait(DEADLINE)
            forked[0].wait_until_blocked("inherited")

    monkeypatch.setattr(trap_points, "reach", reach)
    pool = MemoryPool()
    for _ in range(2):
        written(pool)
    for thread in forked:
        thread.join(DEADLINE)  # or it may fork in a collection, between the end of the hooks and the finalisers
    cycle: list[Any] = [pool]
    cycle.append(cycle)
    del pool, cycle
    gc.collect()  # which has no weak references left when it finalises what was in a cycle, and so no hooks for forks
    assert [thread.result() for thread in forked] == [0]


def read_a_stream(channel: Channel[Any], keep: bool) -> tuple[int, int]:
    """Receive all up to the end, keep each or release it, and write over every second; return how many were kept, and where."""
    kept: list[tuple[int, Any]] = []
    found: set[int] = set()
    for number, data in channel:
        number_of((number, data))
        if number % 2:
            memoryview(data)[:] = bytes(len(data))
        if keep:
            kept.append((number, data))
        else:
            found |= {*inodes("p")}
    for number, data in kept:
        assert data == (bytes(len(data)) if number % 2 else pattern(number, len(data)))
    return len(kept), len(found)


@pytest.mark.parametrize(("keep", "most"), [(False, 20), (True, 0)])
def test_a_streams_memory_is_its_readers_for_as_long_as_it_likes(
    keep: bool, most: int, own_memory: None, unhurried: None, fork: BaseContext, children: Children
) -> None:
    """One subscriber releases each message, and one keeps them all as they were and as it has changed them: with the first,
    memory is written again and again; with the second, never while it is there."""
    with start_broadcaster() as bus:
        reader = ReaderProcess(bus.subscribe(), children, fork, read_a_stream, keep)
        for number in range(40):
            bus.publish(uncopied(number))
            bus.flush(timeout=DEADLINE, delivered=True)
        bus.unsubscribe(reader.channel)
        count, memories_used = reader.result()
        assert count == 40 * keep
        assert memories_used <= most


def test_a_handle_releases_what_a_stream_has_left(
    own_memory: None, unhurried: None, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that has ended leaves nothing behind the next call that asks the broker, and none behind ``close()``."""
    with bus.subscribe() as channel:
        for then in (bus.stats, bus.close):
            for number in range(5):
                bus.publish(uncopied(number))
                assert channel.recv(timeout=DEADLINE)[0] == number
            assert inodes("s")
            monkeypatch.setattr(memory_pool, "STREAM", 0.0)
            then()
            monkeypatch.setattr(memory_pool, "STREAM", DEADLINE)
            gc.collect()
            assert inodes("s") == []
