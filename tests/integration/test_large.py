"""Large messages in shared memory: not copied, nobody else's, freed; and what is short, broken or hostile harms nobody else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import resource
import signal
import socket
import struct
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, Channel, Lagged, connect, trap_points
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.shared_reader import SharedReader
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.shared_memory import available, message_memory, ring_memory
from mpbroadcast.protocol.fd_packets import MAPPED, MEMORY, READ, RING, WANTED, pack
from mpbroadcast.protocol.frames import IMAGE, MemfdMessage, frame_head, memory_frame, reference_frame
from mpbroadcast.protocol.runs import memory_run, read_run
from mpbroadcast.validation import Policy
from tests.support import large_workers as workers
from tests.support.helpers import DEADLINE, Background, Children, answer, finish, only_subscriber, take, wait_until
from tests.support.large_workers import Size, limited, maps, number_of, without_descriptors
from tests.support.rude import Lent
from tests.support.victims import descriptors

pytestmark = pytest.mark.skipif(not available(), reason="there is no shared memory here, or it is forbidden")

Bus = Broadcaster[Any]
LARGE = Size(3 << 20)
MIDDLE = Size(300_000)
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
    """Whether this address lies in a map of a message's memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return "memfd:mpbroadcast" in line
    return False


def quiet(bus: Bus) -> tuple[int, int]:
    """The broker, and its descriptors, once it has served this process with all that it makes on first use."""
    with bus.subscribe("quiet") as channel:
        for size in (LARGE, MIDDLE, Size(5000)):
            bus.publish(size.message(0), topic="quiet")
            number_of(channel.recv(timeout=DEADLINE))
    pid = bus.stats().pid
    wait_until(lambda: not any(row.topics == ("quiet",) for row in bus.stats().subscribers))
    return pid, descriptors(pid)


# --------------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("size", [300_000, 3 << 20])
def test_arrays_are_everybodys_own(size: int, bus: Bus) -> None:
    """Arrays, anywhere in a message, arrive equal and writable, and what is written there nobody else sees. The buffers of a
    very large one are not copied, and released when nothing refers to them any more."""
    numpy = pytest.importorskip("numpy")
    sent = {"one": numpy.arange(size // 8), "more": [{"two": numpy.ones((size // 8, 2), order="F")}], "bytes": bytes(size)}
    sent["bytearray"] = bytearray(size)
    sent["buffer"] = pickle.PickleBuffer(bytearray(size))
    before, held = maps(os.getpid()), descriptors(os.getpid())
    with bus.subscribe() as channel, bus.subscribe() as other:
        for _ in range(2):
            bus.publish(sent)
            got, theirs = (each.recv(timeout=DEADLINE) for each in (channel, other))
            for message in (got, theirs):
                for name in ("bytes", "bytearray", "buffer"):
                    assert message[name] == bytes(size)
                assert numpy.array_equal(message["one"], sent["one"])
                assert numpy.array_equal(message["more"][0]["two"], sent["more"][0]["two"])
            if size > 1 << 21:
                assert in_a_map(got["one"].ctypes.data)
                assert in_a_map(got["more"][0]["two"].ctypes.data)
                assert maps(os.getpid()) > before
            assert got["one"].flags.writeable
            got["one"][:] = -1
            got["more"][0]["two"][:] = -1
            got["bytearray"][0] = got["buffer"][0] = 255
            for message in (sent, theirs):
                assert message["one"][3] == 3
                assert message["more"][0]["two"][0][0] == 1
                assert message["bytearray"][0] == 0
            assert theirs["buffer"][0] == 0
            del got, theirs, message
            wait_until(lambda: maps(os.getpid()) == before)
        wait_until(lambda: bus.stats().memory == 0)
    bus.close()
    gc.collect()
    wait_until(lambda: descriptors(os.getpid()) <= held)


def test_many_kept_arrays_need_no_descriptors(
    own_memory: None, bus: Bus, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """A subscriber with 1,024 descriptors at the most can keep 2,000 arrays, each in a map of its own."""
    numpy = pytest.importorskip("numpy")
    channel = bus.subscribe()
    process = children(multiprocessing.get_context("forkserver"), workers.keep_all, channel, pipe[1], 1024)
    assert answer(pipe[0]) == "open"
    for first in range(0, 2000, 100):
        bus.publish_many((number, numpy.full(1000, number)) for number in range(first, first + 100))
        bus.flush(timeout=DEADLINE, delivered=True)  # else the broker may have too many to keep a descriptor for each
    bus.unsubscribe(channel)
    assert answer(pipe[0]) == (2000, 2000)
    finish(process)


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
        assert [number_of(message) for message in take(quick, 2)] == [1, 2]
        assert number_of(full.recv(timeout=DEADLINE)) == 2


def test_many_threads_take_no_more_than_there_is(own_memory: None, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 threads that begin at once, few have memory on its way to a broker that routes nothing; all messages arrive."""
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
                for number in range(10):
                    other.publish(Size(20_000).message(number))
                    other.flush()
                    if number < 7:
                        assert number_of(channel.recv(timeout=DEADLINE)) == number
            wait_until(lambda: bus.stats().publishers == 0)
            take(channel, 3)
            wait_until(lambda: bus.stats().memory == 0)


# ------------------------------------------------------------------------------------------------------------ what is short


@pytest.mark.parametrize("need", ["descriptors", "memory"])
def test_a_subscriber_in_need(
    need: str, bus: Bus, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """A subscriber without descriptors, or memory, has one clear error for each message at the most, and its neighbour none;
    then it goes on."""
    with bus.subscribe() as neighbour:
        channel = bus.subscribe()
        process = children(fork, workers.receive_in_need, channel, pipe[1], need)
        assert answer(pipe[0]) == "open"
        for number in range(2):
            bus.publish(LARGE.message(number))
        bus.flush()
        pipe[0].send("go")
        assert answer(pipe[0]) == "rich again"
        for number in range(2, 5):
            bus.publish(LARGE.message(number))
        bus.flush()
        bus.unsubscribe(channel)
        came = answer(pipe[0])
        assert came[2:] == [2, 3, 4]
        number = errno.EMFILE if need == "descriptors" else errno.ENOMEM
        assert all(one in (place, f"OSError {number}") for place, one in enumerate(came))
        assert [number_of(message) for message in take(neighbour, 5)] == list(range(5))
        finish(process)


@pytest.mark.parametrize("since", ["the beginning", "later"])
def test_a_broker_without_descriptors(since: str, bus: Bus) -> None:
    """A broker that can get no descriptor loses nothing, however many messages come at once, and does not hang."""
    with bus.subscribe() as channel, bus.subscribe(overflow="latest") as state:
        channel.fileno()
        state.fileno()
        bus.publish(Size(100).message(0))
        if since == "later":
            bus.publish(LARGE.message(0))
            channel.recv(timeout=DEADLINE)
        channel.recv(timeout=DEADLINE)
        pid = bus.stats().pid
        with without_descriptors(pid):
            for first in (0, 7):
                os.kill(pid, signal.SIGSTOP)
                if since == "later":
                    for number in range(first, first + 7):
                        bus.publish(LARGE.message(number))
                os.kill(pid, signal.SIGCONT)
                if since != "later":
                    for number in range(first, first + 7):
                        bus.publish(LARGE.message(number))
                assert [number_of(message) for message in take(channel, 7)] == list(range(first, first + 7))
        bus.publish(LARGE.message(20))
        assert number_of(channel.recv(timeout=DEADLINE)) == 20
        wait_until(lambda: number_of(state.recv(timeout=DEADLINE)) == 20)


def no_memory(number: int) -> Callable[..., int]:
    """What can stand for ``os.memfd_create`` where there is none to have."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("need", ["descriptors", "file size", "memory", "system call"])
@pytest.mark.parametrize("since", ["the beginning", "later"])
def test_a_publisher_in_need(need: str, since: str, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher that can get no memory, or no descriptor, uses the pipe: nothing is lost, and nothing is raised."""
    sizes = (Size(100), Size(5000), MIDDLE, LARGE)
    with bus.subscribe() as channel, contextlib.ExitStack() as stack:
        channel.fileno()
        bus.publish(0)
        if since == "later":
            for size in sizes:
                bus.publish(size.message(0))
                channel.recv(timeout=DEADLINE)
        channel.recv(timeout=DEADLINE)
        if need == "descriptors":
            stack.enter_context(without_descriptors(os.getpid()))
        elif need == "file size":
            stack.enter_context(limited(resource.RLIMIT_FSIZE, 100_000))
        else:
            monkeypatch.setattr(os, "memfd_create", no_memory(errno.ENOMEM if need == "memory" else errno.ENOSYS))
        for number, size in enumerate(sizes):
            bus.publish(size.message(number))
            assert number_of(channel.recv(timeout=DEADLINE)) == number
    monkeypatch.undo()
    with bus.subscribe() as channel:
        bus.publish(LARGE.message(9))
        assert number_of(channel.recv(timeout=DEADLINE)) == 9


def test_maps_that_fail(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscriber whose system maps neither messages nor rings gets all the same messages."""

    def fail(*_: object) -> Any:
        raise OSError(errno.ENOMEM, "no map")

    monkeypatch.setattr("mpbroadcast.posix.shared_memory.map_privately", fail)
    monkeypatch.setattr("mpbroadcast.posix.shared_memory.map_for_reading", fail)
    with bus.subscribe() as channel:
        for number, size in enumerate([LARGE, MIDDLE, Size(5000), MIDDLE, LARGE] * 2):
            bus.publish(size.message(number))
            assert number_of(channel.recv(timeout=DEADLINE)) == number


# ------------------------------------------------------------------------------------------------------- who does not read


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest"])
def test_who_does_not_read_keeps_little(overflow: Policy, bus: Bus) -> None:
    """Large messages that are dropped are freed, also when the pipe is full to the last byte."""
    channel = bus.subscribe(overflow=overflow, capacity=8 << 20)
    channel.fileno()
    exact = bytes(2023 - len(pickle.dumps(bytes(300), 5)) + 300)  # half a page of the pipe, with all that is around it
    for _ in range(128):
        bus.publish(exact)
        bus.flush()
    before = shared_memory()
    for number in range(32):
        bus.publish(LARGE.message(number))
    bus.flush()
    row = only_subscriber(bus)
    assert row.delivered + row.missed + row.waiting == row.published == 160
    assert row.waiting_bytes <= 8 << 20
    wait_until(lambda: shared_memory() - before <= (8 << 20) + TOLERANCE)
    bus.unsubscribe(channel)
    last = None
    with contextlib.suppress(EOFError):
        while True:
            with contextlib.suppress(Lagged):
                last = channel.recv(timeout=DEADLINE)
    if overflow != "drop_newest":
        assert last is not None
        assert number_of(last) == 31
    channel.close()


def test_a_stopped_subscriber_holds_up_no_answer(
    own_memory: None, bus: Bus, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """While very many large messages are on their way to one who was stopped, the broker answers, and gives descriptors."""
    channel = bus.subscribe("")
    process = children(fork, workers.report_numbers, channel, pipe[1])
    assert answer(pipe[0]) == "open"
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)
    bus.publish_many(map(Size(20_000).message, range(600)), timeout=DEADLINE)
    bus.flush(timeout=DEADLINE)
    start = time.monotonic()
    assert only_subscriber(bus).published == 600
    with bus.subscribe("other") as other, connect(bus.address) as handle:
        handle.publish(LARGE.message(0), topic="other")
        assert number_of(other.recv(timeout=DEADLINE)) == 0
    assert time.monotonic() - start < DEADLINE / 2
    os.kill(process.pid, signal.SIGCONT)
    bus.unsubscribe(channel)
    received, end = answer(pipe[0])
    assert (len(received), end) == (600, "EOFError")
    assert received == list(range(600))
    finish(process)


@pytest.mark.soak
@pytest.mark.timeout(60 + 10 * SOAK)
def test_nothing_leaks(bus: Bus, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]) -> None:
    """Many large messages of two publishers, through four subscribers of which one after the other is killed: then all
    descriptors, maps and shared memory are back."""
    chance = random.Random(5)
    pid, held = quiet(bus)
    mapped, before = maps(os.getpid()), shared_memory()
    own = bus.subscribe("soak", capacity=1 << 30)
    victims = []

    def start_one() -> None:
        victims.append(children(fork, workers.report_numbers, bus.subscribe("soak", overflow="drop_oldest"), pipe[1]))
        assert answer(pipe[0]) == "open"

    for _ in range(3):
        start_one()
    with connect(bus.address) as other:
        for number in range(150 * SOAK):
            handle = (bus, other)[number % 2]
            handle.publish(chance.choice((LARGE, MIDDLE, MIDDLE)).message(number), topic="soak")
            handle.flush()
            assert number_of(own.recv(timeout=DEADLINE)) == number
            if number % 15 == 7:
                victims.pop(chance.randrange(3)).kill()
                start_one()
    for victim in victims:
        victim.kill()
    own.close()
    wait_until(lambda: not bus.stats().subscribers and bus.stats().memory == 0)
    wait_until(lambda: descriptors(pid) <= held)
    wait_until(lambda: maps(pid) == 0)
    wait_until(lambda: maps(os.getpid()) <= mapped)
    wait_until(lambda: bus.stats() and shared_memory() <= before + TOLERANCE)  # what a stream has left goes with a request


# ------------------------------------------------------------------------------------------------------------ who is hostile


class Hostile(Lent):
    """A publisher of the same user that has the key, and sends what it likes."""

    def __init__(self, bus: Bus) -> None:
        self.link = BrokerClient(bus.address)
        super().__init__(self.link, fd_socket=True)
        self._numbers = itertools.count(1)

    def send_packet(self, packet: bytes, *fds: int) -> None:
        """Send a packet with descriptors, as soon as there is room for it; or not, when the broker has hung up."""
        fd_socket = self.fd_socket
        assert fd_socket is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []

        def sent() -> bool:
            with contextlib.suppress(BlockingIOError):
                fd_socket.sendmsg([packet], rights)
                return True
            return False

        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wait_until(sent)

    def message(self, fd: int, length: int, image: bool = False) -> None:
        """Publish what is in this file."""
        number = next(self._numbers)
        self.send_packet(pack(MEMORY, 0, number), fd)
        self.write(memory_frame(number, length, b"", 0, image))

    def close(self) -> None:
        super().close()
        self.link.close()


@contextlib.contextmanager
def memfd(size: int, seals: int = 0) -> Iterator[int]:
    """Anonymous memory of so many zeros, with these seals."""
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


SHRINK, GROW, WRITE = 2, 4, 8


def unsealed(hostile: Hostile) -> None:
    for seals in (0, WRITE, SHRINK, SHRINK | GROW):
        with memfd(5000, seals) as fd:
            hostile.message(fd, 5000)
            hostile.send_packet(pack(RING, 1 + seals, 4096), fd)


def wrong_size(hostile: Hostile) -> None:
    for there, claimed in ((100, 5000), (9000, 5000), (0, 5000), (5000, 0xFFFF_0000), (5000, 0)):
        with memfd(there, SHRINK | GROW | WRITE) as fd:
            hostile.message(fd, claimed)


def sparse(hostile: Hostile) -> None:
    with memfd(1 << 30, SHRINK | GROW | WRITE) as fd:
        hostile.message(fd, 1 << 30)
    with memfd(1 << 40, SHRINK | GROW | WRITE) as fd:
        hostile.send_packet(pack(MEMORY, 0, 9), fd)
        hostile.send_packet(pack(RING, 1, 1 << 40), fd)


def garbage(hostile: Hostile) -> None:
    hostile.send_packet(pack(WANTED, 99, 1))
    hostile.send_packet(pack(READ, 99, 1))
    hostile.send_packet(random.Random(3).randbytes(64))
    hostile.send_packet(b"x")


def other_files(hostile: Hostile) -> None:
    read, write = os.pipe()
    with tempfile.TemporaryFile() as file:
        file.truncate(5000)
        for fd in (file.fileno(), read, write, hostile.pipe.fd):
            hostile.message(fd, 5000)
            hostile.send_packet(pack(RING, 5, 4096), fd)
    os.close(read)
    os.close(write)


def a_flood_of_memory(hostile: Hostile) -> None:
    hostile.ring(1)
    hostile.write(reference_frame(1, 0, 100, b""))
    for number in range(300):
        descriptor = message_memory([b"x" * 100])
        hostile.send_packet(pack(MEMORY, 0, 1000 + number), descriptor.fd)


def a_flood_of_rings(hostile: Hostile) -> None:
    for number in range(300):
        descriptor, memory = ring_memory(1 << 16)
        hostile.send_packet(pack(RING, number, 1 << 12), descriptor.fd)
        memory.close()


def a_flood_of_descriptors(hostile: Hostile) -> None:
    with memfd(100, SHRINK | GROW | WRITE) as fd:
        for number in range(300):
            hostile.send_packet(pack(MEMORY, 0, 1000 + number % 2), *[fd] * 2)
            hostile.send_packet(pack(WANTED, 1), *[fd] * 20)


def referring(frame: bytes) -> Callable[[Hostile], None]:
    """One whose frame refers to what is not there."""

    def attack(hostile: Hostile) -> None:
        hostile.ring(1)
        hostile.write(frame)

    return attack


ATTACKS = {
    "outside of the ring": referring(reference_frame(1, (1 << 20) - 10, 100, b"")),
    "far outside of the ring": referring(reference_frame(1, 0xFFFF_FFFF, 0xFFFF_0000, b"")),
    "nothing of the ring": referring(reference_frame(1, 0, 0, b"")),
    "an unknown ring": referring(reference_frame(77, 0, 100, b"")),
    "memory that never came": referring(memory_frame(5, 5000, b"")),
    "a huge length": referring(memory_frame(5, 1 << 60, b"")),
}
for one in (unsealed, wrong_size, sparse, garbage, other_files, a_flood_of_memory, a_flood_of_rings, a_flood_of_descriptors):
    ATTACKS[one.__name__] = one


@pytest.fixture
def undisturbed(bus: Bus) -> Iterator[Channel[Any]]:
    """A channel that receives all without a topic. What the test does harms nobody else, and leaves nothing in the broker."""
    pid, _ = quiet(bus)
    memory = psutil.Process(pid).memory_info().rss
    with bus.subscribe("") as channel:
        channel.fileno()
        held = descriptors(pid)
        yield channel
        with bus.subscribe("check") as check:
            for number, size in enumerate([Size(100), Size(5000), MIDDLE, LARGE]):
                bus.publish(size.message(number), topic="check")
                assert number_of(check.recv(timeout=DEADLINE)) == number
        wait_until(lambda: descriptors(pid) <= held)
        assert psutil.Process(pid).memory_info().rss - memory < 32 << 20
        assert bus.stats().pid == pid


def until(channel: Channel[Any], last: object) -> list[Exception]:
    """The errors that a channel raises before it gives this message."""
    errors: list[Exception] = []
    while True:
        try:
            if channel.recv(timeout=DEADLINE) == last:
                return errors
        except TimeoutError:
            raise
        except (pickle.UnpicklingError, OSError, RuntimeError) as error:
            errors.append(error)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_hostile_publisher(attack: Callable[[Hostile], None], bus: Bus, undisturbed: Channel[Any]) -> None:
    """Whatever one sends, the broker and the subscribers live on: what others publish arrives, there is one error at the most,
    the broker keeps few descriptors of it, and none when it is gone."""
    hostile = Hostile(bus)
    try:
        before = descriptors(bus.stats().pid)
        attack(hostile)
        bus.flush()
        bus.publish(LARGE.message(3))
        assert len(until(undisturbed, LARGE.message(3))) <= 1
        assert descriptors(bus.stats().pid) - before < 150
    finally:
        hostile.close()


def test_a_hostile_subscriber(bus: Bus, undisturbed: Channel[Any]) -> None:
    """One that acknowledges nonsense harms nobody else, neither while it is there nor afterwards."""
    link = BrokerClient(bus.address)
    try:
        link.request("subscribe", topics=["*"], overflow="block", capacity=64 << 20, replay=0, subscription=77, publisher=None)
        reply = link.request("open", subscription=77, shared=True)
        link.request("opened", subscription=77, token=reply.body["token"])
        fd_socket = reply.fd_socket
        assert fd_socket is not None
        for number in range(40):
            bus.publish((Size(5000), MIDDLE)[number % 2].message(number))
            fd_socket.send_packet(pack(MAPPED, number))
            fd_socket.send_packet(pack(READ, 0, 1 << (number + 20)))
            with memfd(100) as fd:
                fd_socket.send_packet(pack(RING, number), fd)
            assert number_of(undisturbed.recv(timeout=DEADLINE)) == number
        fd_socket.send_packet(b"garbage")
        bus.publish(LARGE.message(41))
        assert number_of(undisturbed.recv(timeout=DEADLINE)) == 41
        fd_socket.close()
        assert reply.pipe is not None
        reply.pipe.close()
    finally:
        link.close()


def test_an_image_that_lies(bus: Bus, undisturbed: Channel[Any]) -> None:
    """A message whose buffers are not where its head has them raises an unpickling error, wherever it came from."""
    good = pickle.dumps("x")
    head = struct.Struct("<II")
    part = struct.Struct("<QQ")
    images = [
        b"x",
        head.pack(0, 0),
        head.pack(0xFFFF_FFFF, 0),
        head.pack(1, 0) + part.pack(24, 1 << 63) + good,
        head.pack(1, 0) + part.pack(1 << 63, len(good)) + good,
        head.pack(2, 0) + part.pack(40, len(good)) + part.pack(40, 1000) + good,
        head.pack(1, 0) + part.pack(24, 30) + pickle.dumps(pickle.PickleBuffer(b"y"), 5, buffer_callback=lambda _: None),
    ]
    hostile = Hostile(bus)
    try:
        for image in images:
            hostile.write(frame_head(len(image), b"", 0, IMAGE) + image)
            memory = message_memory([image])
            hostile.message(memory.fd, len(image), image=True)
            for _ in range(2):
                with pytest.raises(pickle.UnpicklingError):
                    undisturbed.recv(timeout=DEADLINE)
    finally:
        hostile.close()
