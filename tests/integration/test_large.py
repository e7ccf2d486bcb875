"""Large messages in shared memory: not copied, each reader's own, freed; what is short, broken or hostile harms no other."""

import contextlib
import errno
import fcntl
import gc
import os
import pickle
import random
import resource
import threading
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import Broadcaster, Channel, connect, trap_points
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.posix.shared_memory import MemoryRefused, available, check_message, check_ring
from mpbroadcast.protocol.fd_packets import MEMORY, RING, pack
from mpbroadcast.protocol.frames import memory_frame, reference_frame
from tests.support.helpers import DEADLINE, Background, Children, only_subscriber, rest, take, wait_until
from tests.support.large_workers import (
    ReaderProcess,
    Size,
    descriptors_left,
    exchange,
    keep_all,
    limited,
    maps,
    number_of,
    numbers,
)
from tests.support.rude import Lent, any_file
from tests.support.victims import descriptors, memories, shared_maps

pytestmark = pytest.mark.skipif(not available(), reason="there is no shared memory here, or it is forbidden")

Bus = Broadcaster[Any]
LARGE = Size(3 << 20)
MIDDLE = Size(300_000)
SIZES = (Size(100), Size(5000), MIDDLE, LARGE)
TOLERANCE = 8  # maps and descriptors: of rings, and of what a stream writes again
SOAK = int(float(os.environ.get("MPBROADCAST_SOAK", "1")))


def shared(pid: int) -> int:
    """Return how many maps and descriptors of shared memory a process has."""
    return shared_maps(pid) + memories(pid)


def in_a_map(address: int) -> bool:
    """Return True if this address lies in a map of a message's memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return "memfd:mpbroadcast" in line
    return False


def quiet(bus: Bus) -> tuple[int, int]:
    """Return the broker's PID and its descriptors, once it has served this process with all that it makes on first use."""
    with bus.subscribe("quiet") as channel:
        exchange(bus, channel, SIZES[:0:-1], "quiet")
    pid = bus.stats().pid
    wait_until(lambda: not any(row.topics == ("quiet",) for row in bus.stats().subscribers))
    return pid, descriptors(pid)


@pytest.mark.parametrize("is_interrupted", [True, False], ids=["interrupted", "no room"])
def test_what_was_not_acknowledged_is_acknowledged_before_a_wait(
    is_interrupted: bool, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the broker waits for the acknowledgement with the next message, and the reader for that message."""

    def fail(*_: object) -> bool:
        if is_interrupted:
            raise KeyboardInterrupt
        return False

    with bus.subscribe(overflow="drop_oldest", capacity=5 * LARGE.length) as channel:
        assert not channel.poll()
        for number in (0, 1):
            bus.publish(bytes([number]) * LARGE.length)
        wait_until(lambda: only_subscriber(bus).waiting == 1)
        received = []
        with monkeypatch.context() as failing, contextlib.suppress(KeyboardInterrupt):
            failing.setattr("mpbroadcast.posix.fd_socket.DescriptorSocket.send_packet", fail)
            received.append(channel.recv(DEADLINE))
        assert len(received) == 1 - is_interrupted
        received += take(channel, 2 - len(received))
        assert [message[0] for message in received] == [0, 1]


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


def test_a_subscriber_without_descriptors(bus: Bus) -> None:
    """It has one clear error for each message at the most, and its neighbour none; then it goes on."""
    came: list[int | None] = []
    with bus.subscribe() as neighbour, bus.subscribe() as channel:
        exchange(bus, channel, [LARGE, LARGE])  # the next ones come in memory of their own
        bus.publish_many(map(LARGE.message, range(2)))
        bus.flush()
        with descriptors_left(0):
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


FAILING = {
    "system call": ["os.memfd_create"],
    "maps": ["mpbroadcast.posix.shared_memory.map_privately", "mpbroadcast.posix.shared_memory.map_for_reading"],
}


@pytest.mark.parametrize("need", ["file size", *FAILING])
def test_a_process_in_need(need: str, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that can get no memory or no map, from the beginning or later, has no error."""

    def fail(*_: object) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with bus.subscribe() as channel:
        for earlier in ([Size(100)], SIZES):
            with connect(bus.address) as handle, contextlib.ExitStack() as stack:
                exchange(handle, channel, earlier)
                if need == "file size":
                    stack.enter_context(limited(resource.RLIMIT_FSIZE, 100_000))
                patch = stack.enter_context(monkeypatch.context())
                for name in FAILING.get(need, []):
                    patch.setattr(name, fail)
                exchange(handle, channel, SIZES)
        exchange(bus, channel, [LARGE])


@pytest.mark.soak
@pytest.mark.timeout(60 + 10 * SOAK)
def test_nothing_leaks(bus: Bus, fork: BaseContext, children: Children) -> None:
    """Many large messages, through subscribers that are killed one by one: then descriptors, maps and memory are back."""
    chance = random.Random(5)
    pid, held = quiet(bus)
    mapped = maps(os.getpid())
    before = {one: shared(one) for one in (pid, os.getpid())}
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
    wait_until(lambda: maps(os.getpid()) <= mapped and maps(pid) == 0)
    # A request releases what a stream has left.
    wait_until(lambda: bus.stats() and all(shared(one) <= count + TOLERANCE for one, count in before.items()))


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


def a_flood_of_memory(hostile: Lent) -> None:
    hostile.ring(1)
    hostile.write(reference_frame(1, 0, 100, b""))
    for number in range(300):
        hostile.memory(1000 + number, 100)


ATTACKS: dict[str, list[Attack]] = {
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


def test_memory_of_any_kind() -> None:
    """What passes the checks has that size and cannot shrink; all else is ``MemoryRefused``."""
    for number in range(300):
        choose = random.Random(f"memory {number}")
        with any_file(choose) as fd:
            size = choose.choice([0, 1, 3000, 4096, 1 << 20, 1 << 63])
            with contextlib.suppress(MemoryRefused):
                check_message(fd, size)
                assert os.fstat(fd).st_size >= size
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
                assert seals & 6 == 6
                assert seals & 24, "others could change it"
            with contextlib.suppress(MemoryRefused):
                assert check_ring(fd) == os.fstat(fd).st_size > 0
                assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 22 == 22
    for fd in (-1, 1 << 20):
        with pytest.raises((MemoryRefused, ValueError)):
            check_ring(fd)


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
            thread.wait_until_blocked("publish")
        assert len(filling) < 64  # the broker takes no more of a publisher that it does not read from
        may_fill.set()
        messages = take(channel, 90)
        assert {message[0] for message in messages if message} == set(range(80))
        for thread in threads:
            thread.result()
