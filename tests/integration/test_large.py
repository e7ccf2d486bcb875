"""Large messages in shared memory: not copied, each reader's own, freed; what is short, broken or hostile harms no other."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import pickle
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, Channel, connect, start_broadcaster, trap_points
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.shared_reader import SharedReader
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.shared_memory import available, message_memory
from mpbroadcast.protocol.fd_packets import MEMORY, READ, RING, pack
from mpbroadcast.protocol.frames import MemfdMessage, frame_head, memory_frame, reference_frame
from mpbroadcast.protocol.runs import memory_run, read_run
from mpbroadcast.validation import Policy
from tests.support.helpers import DEADLINE, Background, Children, only_subscriber, record, rest, take, wait_until
from tests.support.large_workers import (
    ReaderProcess,
    Size,
    keep_all,
    limited,
    maps,
    number_of,
    numbers,
    without_descriptors,
)
from tests.support.rude import Lent
from tests.support.victims import descriptors

pytestmark = pytest.mark.skipif(not available(), reason="there is no shared memory here, or it is forbidden")

Bus = Broadcaster[Any]
LARGE = Size(3 << 20)
MIDDLE = Size(300_000)
SIZES = (Size(100), Size(5000), MIDDLE, LARGE)
TOLERANCE = 40 << 20  # bytes of shared memory: two rings, and some messages
SOAK = int(float(os.environ.get("MPBROADCAST_SOAK", "1")))


def shared_memory() -> int:
    """Return the bytes of shared memory that this process and those below it keep alive by a descriptor or a map."""
    kept: dict[int, int] = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        folder = Path(f"/proc/{process.pid}")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in (folder / "maps").read_text().splitlines():
                if "memfd:mpbroadcast" in line:
                    start, end = (int(part, 16) for part in line.split()[0].split("-"))
                    kept.setdefault(int(line.split()[4]), end - start)
            for fd in list((folder / "fd").iterdir()):
                if "memfd:mpbroadcast" in os.readlink(fd):
                    found = fd.stat()
                    kept[found.st_ino] = found.st_blocks * 512
    return sum(kept.values())


def in_a_map(address: int) -> bool:
    """Return True if this address lies in a map of a message's memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return "memfd:mpbroadcast" in line
    return False


def exchange(bus: Bus, channel: Channel[Any], sizes: Iterable[Size], topic: str = "") -> None:
    """Publish a message of each size, and receive it from the channel."""
    for number, size in enumerate(sizes):
        bus.publish(size.message(number), topic=topic)
        assert number_of(channel.recv(timeout=DEADLINE)) == number


def quiet(bus: Bus) -> tuple[int, int]:
    """Return the broker's PID and its descriptors, once it has served this process with all that it makes on first use."""
    with bus.subscribe("quiet") as channel:
        exchange(bus, channel, SIZES[:0:-1], "quiet")
    pid = bus.stats().pid
    wait_until(lambda: not any(row.topics == ("quiet",) for row in bus.stats().subscribers))
    return pid, descriptors(pid)


def failing(number: int) -> Callable[..., Any]:
    """Return a system call that always fails with this error."""

    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# --------------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("size", [300_000, 3 << 20])
def test_arrays_are_each_readers_own(size: int, bus: Bus) -> None:
    """Arrays, anywhere in a message, arrive equal and writable, and what is written there no other reader sees. The buffers of
    a very large one are not copied, and released when nothing refers to them any more."""
    numpy = pytest.importorskip("numpy")

    def check(message: Any) -> None:
        assert numpy.array_equal(message["one"], numpy.arange(size // 8))
        assert numpy.array_equal(message["more"][0]["two"], numpy.ones((size // 8, 2)))
        for name in ("bytes", "bytearray", "buffer"):
            assert message[name] == bytes(size)

    sent = {"one": numpy.arange(size // 8), "more": [{"two": numpy.ones((size // 8, 2), order="F")}], "bytes": bytes(size)}
    sent["bytearray"] = bytearray(size)
    before, held = maps(os.getpid()), descriptors(os.getpid())
    with bus.subscribe() as channel, bus.subscribe() as other:
        for _ in range(2):
            bus.publish({**sent, "buffer": pickle.PickleBuffer(bytearray(size))})
            got, theirs = (each.recv(timeout=DEADLINE) for each in (channel, other))
            check(got)
            if size > 1 << 21:
                assert in_a_map(got["one"].ctypes.data)
                assert in_a_map(got["more"][0]["two"].ctypes.data)
                assert maps(os.getpid()) > before
            got["one"][:] = got["more"][0]["two"][:] = -1
            got["bytearray"][0] = got["buffer"][0] = 255
            check(theirs)
            check({**sent, "buffer": bytes(size)})
            del got, theirs
            wait_until(lambda: maps(os.getpid()) == before)
        wait_until(lambda: bus.stats().memory == 0)
    bus.close()
    gc.collect()
    wait_until(lambda: descriptors(os.getpid()) <= held)


def test_many_kept_arrays_need_no_descriptors(own_memory: None, bus: Bus, children: Children, fork: BaseContext) -> None:
    """A subscriber with 256 descriptors at the most can keep 600 arrays, each in a map of its own."""
    numpy = pytest.importorskip("numpy")
    reader = ReaderProcess(bus.subscribe(), children, fork, keep_all, 256)
    for first in range(0, 600, 100):
        bus.publish_many((number, numpy.full(1000, number)) for number in range(first, first + 100))
        bus.flush(timeout=DEADLINE, delivered=True)  # else the broker may have too many to keep a descriptor for each
    bus.unsubscribe(reader.channel)
    assert reader.result() == (600, 600)


def test_memory_comes_in_another_order_than_messages(bus: Bus) -> None:
    """One whose publisher had to wait behind another reader comes later than it was written, and is still there."""
    with (
        connect(bus.address) as other,
        bus.subscribe("both", "quick") as quick,
        bus.subscribe("both", "fill", capacity=1000) as full,
    ):
        quick.fileno()
        full.fileno()
        bus.publish_many([bytes(800)] * 2, topic="fill")
        bus.publish(LARGE.message(2), topic="both")
        wait_until(lambda: any(row.stalls for row in bus.stats().subscribers))
        other.publish(LARGE.message(1), topic="quick")
        other.flush(timeout=DEADLINE)
        take(full, 2)
        bus.flush(timeout=DEADLINE)
        assert numbers(take(quick, 2)) == [1, 2]
        assert numbers(take(full, 1)) == [2]


def test_many_threads_take_no_more_than_there_is(own_memory: None, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 threads that begin at once, few have sent memory to a broker that routes nothing; all messages arrive."""
    filling: list[int] = []
    may_fill = threading.Event()

    def reach(name: str, subject: object = None) -> None:
        if name == "filling memory":
            filling.append(threading.get_ident())
            may_fill.wait(DEADLINE)

    with bus.subscribe(capacity=1000) as channel:
        channel.fileno()
        bus.publish(bytes(3000))  # the socket beside the pipe is there
        assert len(channel.recv(timeout=DEADLINE)) == 3000
        bus.publish_many([bytes(200)] * 10)
        wait_until(lambda: only_subscriber(bus).stalls)
        monkeypatch.setattr(trap_points, "reach", reach)
        threads = [Background(bus.publish, bytes([number]) * 3000) for number in range(80)]
        for thread in threads:
            thread.wait_until_blocked("wait")
        assert len(filling) < 64  # the broker takes no more of a publisher that it does not read from
        may_fill.set()
        messages = take(channel, 90)
        assert {message[0] for message in messages if message} == set(range(80))
        for thread in threads:
            thread.result()


def test_memory_that_came_before_the_broker_closed_is_read() -> None:
    """What the broker has sent is there when it has closed its end, also if it has not read the last acknowledgement."""
    ours, number = DescriptorSocket.pair()
    theirs = DescriptorSocket(number)
    inlet = SharedReader(theirs)
    pickled = pickle.dumps(LARGE.message(1))
    memory = message_memory([pickled])
    for name in (1, 2):
        assert ours.send_packet(pack(MEMORY, 0, name), memory.fd)
    theirs.send_packet(pack(READ, 0, 7))
    ours.close()
    for name in (1, 2):
        data = memory_run(MemfdMessage(name, len(pickled), b"", 0, frame_head(len(pickled), b""), False), name)
        run = read_run(data, 0)
        assert run is not None
        (message,), whole, _ = inlet.load_run(data, run)
        assert whole
        assert number_of(message) == 1
        inlet.commit(name)
    inlet.close()


def test_statistics_while_rings_end(bus: Bus) -> None:
    """The broker can be asked at each moment between a publisher's end and that of its ring, which is still read."""
    with bus.subscribe() as channel:
        for _ in range(5):
            with connect(bus.address) as other:
                exchange(other, channel, [Size(20_000)] * 7)
                other.publish_many(map(Size(20_000).message, range(3)))
            wait_until(lambda: bus.stats().publishers == 0)
            take(channel, 3)
            wait_until(lambda: bus.stats().memory == 0)


# ------------------------------------------------------------------------------------------------------------ what is short


def test_a_subscriber_without_descriptors(bus: Bus) -> None:
    """It has one clear error for each message at the most, and its neighbour none; then it goes on."""
    came: list[int | None] = []
    with bus.subscribe() as neighbour, bus.subscribe() as channel:
        exchange(bus, channel, [LARGE, LARGE])  # the next ones come in memory of their own
        bus.publish_many(map(LARGE.message, range(2)))
        bus.flush()
        with without_descriptors(os.getpid()):
            for _ in range(2):
                try:
                    came.append(number_of(channel.recv(timeout=DEADLINE)))
                except OSError as error:
                    came.append(error.errno)
        bus.publish_many(map(LARGE.message, range(2, 5)))
        bus.flush()
        bus.unsubscribe(channel)
        came += numbers(rest(channel))
        assert came == [errno.EMFILE, errno.EMFILE, 2, 3, 4]
        assert numbers(take(neighbour, 7)) == [0, 1, *range(5)]


@pytest.mark.parametrize("since", ["the beginning", "later"])
def test_a_broker_without_descriptors(since: str, bus: Bus) -> None:
    """A broker that can get no descriptor loses nothing, however many messages come at once, and does not hang."""
    with bus.subscribe() as channel, bus.subscribe(overflow="latest") as state:
        channel.fileno()
        state.fileno()
        exchange(bus, channel, [Size(100)] if since == "the beginning" else [Size(100), LARGE])
        pid = bus.stats().pid
        with without_descriptors(pid):
            for first in (0, 7):
                os.kill(pid, signal.SIGSTOP)
                if since == "the beginning":  # it has to ask for what its messages go through
                    os.kill(pid, signal.SIGCONT)
                bus.publish_many(map(LARGE.message, range(first, first + 7)))
                os.kill(pid, signal.SIGCONT)
                assert numbers(take(channel, 7)) == list(range(first, first + 7))
        bus.publish(LARGE.message(20))
        assert numbers(take(channel, 1)) == [20]
        wait_until(lambda: number_of(state.recv(timeout=DEADLINE)) == 20)


@pytest.mark.parametrize("need", ["descriptors", "file size", "memory", "system call"])
def test_a_publisher_in_need(need: str, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher that can get no memory, or no descriptor, from the beginning or later, uses the pipe, and raises nothing."""
    with bus.subscribe() as channel:
        for earlier in ([Size(100)], SIZES):
            with connect(bus.address) as handle, contextlib.ExitStack() as stack:
                exchange(handle, channel, earlier)
                if need == "descriptors":
                    stack.enter_context(without_descriptors(os.getpid()))
                elif need == "file size":
                    stack.enter_context(limited(resource.RLIMIT_FSIZE, 100_000))
                else:
                    patch = stack.enter_context(monkeypatch.context())
                    patch.setattr(os, "memfd_create", failing(errno.ENOMEM if need == "memory" else errno.ENOSYS))
                exchange(handle, channel, SIZES)
        exchange(bus, channel, [LARGE])


def test_maps_that_fail(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscriber whose system maps neither messages nor rings gets all the same messages."""
    monkeypatch.setattr("mpbroadcast.posix.shared_memory.map_privately", failing(errno.ENOMEM))
    monkeypatch.setattr("mpbroadcast.posix.shared_memory.map_for_reading", failing(errno.ENOMEM))
    with bus.subscribe() as channel:
        exchange(bus, channel, [LARGE, MIDDLE, Size(5000), MIDDLE, LARGE] * 2)


# ------------------------------------------------------------------------------------------------------- slow readers


@pytest.mark.parametrize("through", ["memory", "pipe"])
@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest"])
def test_large_messages_that_are_dropped_are_freed(overflow: Policy, through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that is not read keeps a few at the most, also when its pipe is full to the last byte."""
    monkeypatch.setenv("MPBROADCAST_INLINE", str(int(through == "pipe")))
    with start_broadcaster() as bus:
        memory = psutil.Process(quiet(bus)[0]).memory_info
        channel = bus.subscribe(overflow=overflow, capacity=8 << 20)
        channel.fileno()
        around = len(pickle.dumps(Size(300).message(0), 5)) - 300
        exact = Size(2023 - around).message(0)  # half a page of the pipe, with all that is around it
        for _ in range(128):
            bus.publish(exact)
            bus.flush()
        before = shared_memory() + memory().rss
        for number in range(32):
            bus.publish(LARGE.message(number))
        bus.flush()
        row = only_subscriber(bus)
        assert row.delivered + row.missed + row.waiting == row.published == 160
        assert row.waiting_bytes <= 8 << 20
        wait_until(lambda: shared_memory() + memory().rss - before <= (8 << 20) + TOLERANCE)
        bus.unsubscribe(channel)
        events = record(channel)
        assert overflow == "drop_newest" or events[-1] == ("message", 31)


def test_a_stopped_subscriber_holds_up_no_answer(own_memory: None, bus: Bus, fork: BaseContext, children: Children) -> None:
    """While very many large messages wait for a stopped reader, the broker answers, and gives descriptors."""
    reader = ReaderProcess(bus.subscribe(""), children, fork)
    reader.stop()
    bus.publish_many(map(Size(20_000).message, range(600)), timeout=DEADLINE)
    bus.flush(timeout=DEADLINE)
    start = time.monotonic()
    assert only_subscriber(bus).published == 600
    with bus.subscribe("other") as other, connect(bus.address) as handle:
        exchange(handle, other, [LARGE], "other")
    assert time.monotonic() - start < DEADLINE / 2
    reader.go()
    bus.unsubscribe(reader.channel)
    assert reader.result() == (list(range(600)), "EOFError")


@pytest.mark.soak
@pytest.mark.timeout(60 + 10 * SOAK)
def test_nothing_leaks(bus: Bus, fork: BaseContext, children: Children) -> None:
    """Many large messages of two publishers, through four subscribers of which one after the other is killed: then all
    descriptors, maps and shared memory are back."""
    chance = random.Random(5)
    pid, held = quiet(bus)
    mapped, before = maps(os.getpid()), shared_memory()
    own = bus.subscribe("soak", capacity=1 << 30)

    def victim() -> ReaderProcess:
        return ReaderProcess(bus.subscribe("soak", overflow="drop_oldest"), children, fork)

    victims = [victim() for _ in range(3)]
    with connect(bus.address) as other:
        for number in range(100 * SOAK):
            handle = (bus, other)[number % 2]
            handle.publish(chance.choice((LARGE, MIDDLE, MIDDLE)).message(number), topic="soak")
            handle.flush()
            assert number_of(own.recv(timeout=DEADLINE)) == number
            if number % 15 == 7:
                victims.pop(chance.randrange(3)).kill()
                victims.append(victim())
    while victims:
        victims.pop().kill()
    own.close()
    wait_until(lambda: not bus.stats().subscribers and bus.stats().memory == 0)
    wait_until(lambda: descriptors(pid) <= held)
    wait_until(lambda: maps(pid) == 0)
    wait_until(lambda: maps(os.getpid()) <= mapped)
    wait_until(lambda: bus.stats() and shared_memory() <= before + TOLERANCE)  # what a stream has left goes with a request


# -------------------------------------------------------------------------------------------------- hostile processes


SHRINK, GROW, WRITE = 2, 4, 8
SEALED = SHRINK | GROW | WRITE
Attack = Callable[[Lent], None]


def memory(size: int, seals: int, claimed: int) -> Attack:
    """Return an attack with memory of that size and seals, as a message of the claimed length, and as a ring."""

    def attack(hostile: Lent) -> None:
        fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        hostile.send_packet(pack(MEMORY, 0, 1), fd)
        hostile.write(memory_frame(1, claimed, b""))
        hostile.send_packet(pack(RING, 1, max(claimed, 4096)), fd)
        os.close(fd)

    return attack


def frame(data: bytes) -> Attack:
    """Return an attack with a frame that refers to memory that is not there."""

    def attack(hostile: Lent) -> None:
        hostile.ring(1)
        hostile.write(data)

    return attack


def a_flood_of_memory(hostile: Lent) -> None:
    hostile.ring(1)
    hostile.write(reference_frame(1, 0, 100, b""))
    for number in range(300):
        hostile.memory(1000 + number, 100)


ATTACKS: dict[str, list[Attack]] = {
    "references": [
        frame(reference_frame(1, (1 << 20) - 10, 100, b"")),
        frame(reference_frame(1, 0xFFFF_FFFF, 0xFFFF_0000, b"")),
        frame(reference_frame(1, 0, 0, b"")),
        frame(reference_frame(77, 0, 100, b"")),
        frame(memory_frame(5, 5000, b"")),
        frame(memory_frame(5, 1 << 60, b"")),
    ],
    "unsealed": [memory(5000, seals, 5000) for seals in (0, WRITE, SHRINK, SHRINK | GROW)],
    "another size": [
        memory(size, SEALED, claimed)
        for size, claimed in ((100, 5000), (9000, 5000), (0, 5000), (5000, 0xFFFF_0000), (5000, 0))
    ],
    "sparse": [memory(1 << 30, SEALED, 1 << 30), memory(1 << 40, SEALED, 1 << 40)],
    "a flood": [a_flood_of_memory],
}


def until(channel: Channel[Any], last: object) -> list[Exception]:
    """Return the errors that a channel raises before it gives this message."""
    errors: list[Exception] = []
    while True:
        try:
            if channel.recv(timeout=DEADLINE) == last:
                return errors
        except (pickle.UnpicklingError, OSError, RuntimeError) as error:
            errors.append(error)
            if isinstance(error, TimeoutError):
                raise


@pytest.mark.parametrize("kind", ATTACKS)
def test_a_hostile_publisher(kind: str, bus: Bus) -> None:
    """Whatever one sends, the broker and the subscribers live on: what others publish arrives, there is one error at the most,
    the broker keeps few descriptors of it, and none when it is gone."""
    pid, _ = quiet(bus)
    rss = psutil.Process(pid).memory_info().rss
    with bus.subscribe("") as channel:
        channel.fileno()
        held = descriptors(pid)
        for attack in ATTACKS[kind]:
            link = BrokerClient(bus.address)
            with contextlib.closing(link), contextlib.closing(Lent(link, fd_socket=True)) as hostile:
                before = descriptors(pid)
                attack(hostile)
                bus.flush()
                bus.publish(LARGE.message(3))
                assert len(until(channel, LARGE.message(3))) <= 1
                assert descriptors(pid) - before < 150
        with bus.subscribe("check") as check:
            exchange(bus, check, SIZES, "check")
        wait_until(lambda: descriptors(pid) <= held)
        assert psutil.Process(pid).memory_info().rss - rss < 32 << 20
        assert bus.stats().pid == pid
