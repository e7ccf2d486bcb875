"""Messages in shared memory between real processes: a slow, stopped, killed or new reader neither loses nor spoils any."""

import contextlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count, islice
from multiprocessing.context import BaseContext
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, connect
from mpbroadcast.client import ring, shared_writer
from mpbroadcast.client.shared_writer import SHARED_FROM
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.protocol.frames import PIPE_BUF
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS, LONGEST, RingAllocator
from tests.support import large_workers
from tests.support.helpers import DEADLINE, Background, Children, finish, only_subscriber, pattern, rest, take, wait_until
from tests.support.large_workers import ReaderProcess, Size, exchange, number_of
from tests.support.victims import memories, shared_maps, written

Bus = Broadcaster[Any]
MakeReader = Callable[..., ReaderProcess]

pytestmark = pytest.mark.skipif(not available(), reason="there is no memory to share here")

RING = CHUNK * CHUNKS
SIZE = 16_000  # bytes of a usual message here
USUAL = Size(SIZE)
PRIME = 1 << 20  # the number of messages that only bring the ring into use
LAST = PRIME + 1  # the number of the last of them


def numbers(received: Iterable[Any]) -> list[int]:
    """Return the numbers of messages that must be whole, without those that bring a ring into use."""
    return [number for number in large_workers.numbers(received) if number < PRIME]


def prime(bus: Bus, *pids: int, channels: Iterable[Channel[Any]] = (), maps: int = 1, topic: str = "") -> None:
    """Publish until each of these processes has so many maps of rings; the channels, of this process, are read empty."""

    def ready() -> bool:
        bus.publish(USUAL.message(PRIME), topic=topic)
        for channel in channels:
            with contextlib.suppress(TimeoutError):
                channel.recv_many(timeout=0)
        return all(shared_maps(pid) >= maps for pid in pids)

    wait_until(ready)
    bus.publish(Size(10).message(LAST), topic=topic)
    for channel in channels:
        while channel.recv(timeout=DEADLINE)[0] != LAST:
            pass


def uses_ring(bus: Bus, channel: Channel[Any]) -> bool:
    """Return True if ten messages, which the channel takes, take next to nothing of this process's pipe."""
    before = written(os.getpid())
    for _ in range(10):
        bus.publish(USUAL.message(PRIME))
        assert number_of(channel.recv(timeout=DEADLINE)) == PRIME
    return written(os.getpid()) - before < SIZE


def all_numbers(reader: ReaderProcess) -> list[int]:
    """Return the numbers of all that it has read, up to the clean end."""
    found, end = reader.result()
    assert end == "EOFError"
    return [number for number in found if number < PRIME]


@pytest.fixture
def reader(bus: Bus, children: Children, fork: BaseContext) -> MakeReader:
    """Start processes that read all."""
    return lambda **options: ReaderProcess(bus.subscribe(**options), children, fork)


def test_a_reader_that_is_stopped_killed_or_unopened_holds_up_no_other(bus: Bus, reader: MakeReader) -> None:
    """Readers stopped at four places of the ring: a fifth goes on; all get all, also one that is opened late or gets little."""
    late, quick, rare = bus.subscribe(), bus.subscribe(), bus.subscribe("rare")
    others = [reader() for _ in range(4)]
    prime(bus, os.getpid(), channels=[quick, rare], maps=3, topic="rare")
    prime(bus, *(other.pid for other in others), channels=[quick])
    fresh = count()
    large = Size(4 * SIZE)

    def publish(size: int) -> None:
        for number in islice(fresh, size // large.length):
            bus.publish(large.message(number), topic="" if number % 25 else "rare")
            assert number_of(quick.recv(timeout=DEADLINE)) == number

    for other in others:
        publish(RING // 6)
        other.stop()
    publish(3 * RING // 2)
    others[0].kill()
    for other in others[1:]:
        other.go()
    publish(RING // 2)
    wait_until(lambda: uses_ring(bus, quick))
    bus.flush(timeout=DEADLINE)
    for channel in (late, quick, rare, *(other.channel for other in others)):
        bus.unsubscribe(channel)
    total = list(range(next(fresh)))
    for other in others[1:]:
        assert all_numbers(other) == total
    assert numbers(rest(late)) == total
    assert numbers(rest(rare)) == total[::25]
    assert numbers(rest(quick)) == []


def test_every_size_comes_in_order(bus: Bus) -> None:
    """Around each size from which on a message takes another route, and buffers that lie beside their pickle."""
    channel = bus.subscribe()
    prime(bus, os.getpid(), channels=[channel], maps=2)
    limits = [SHARED_FROM, PIPE_BUF, CHUNK, LONGEST, RING]
    sizes = [60, *(limit + off for limit in limits for off in (-1, 0, 1)), 3 * CHUNK, 100, 5000]
    Random(1).shuffle(sizes)

    def publish() -> None:
        for number, size in enumerate(sizes):
            around = len(pickle.dumps(Size(size).message(number), 5)) - size
            one = Size(size - around).message(number)
            assert len(pickle.dumps(one, 5)) == size
            bus.publish(one)

    publishing = Background(publish)
    assert numbers(take(channel, len(sizes))) == list(range(len(sizes)))
    publishing.result()
    buffers = [pattern(number, 70_000) for number in range(6)]  # some of them behind one another in a chunk
    for buffer in buffers:
        bus.publish(pickle.PickleBuffer(bytearray(buffer)))
    assert [bytes(buffer) for buffer in take(channel, len(buffers))] == buffers


def test_a_thread_does_not_write_into_the_ring_that_another_one_has_replaced(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker would end the pipe of a publisher that goes back to the ring before."""
    channel = bus.subscribe()
    prime(bus, os.getpid(), channels=[channel], maps=2)
    begun, replaced, large = threading.Event(), threading.Event(), Size(100_000)

    def get_ident() -> int:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert replaced.wait(DEADLINE)
        return threading.get_ident()

    monkeypatch.setattr(shared_writer, "threading", SimpleNamespace(get_ident=get_ident))
    late = Background(bus.publish, Size(3000).message(0))
    assert begun.wait(DEADLINE)
    with monkeypatch.context() as patch:
        patch.setattr(RingAllocator, "take", lambda *_: None)  # no chunk of this ring is free
        while shared_maps(os.getpid()) < 3:
            bus.publish(large.message(PRIME))
            channel.recv(timeout=DEADLINE)
    for _ in range(RING // large.length + 10):
        bus.publish(large.message(PRIME))
        bus.flush(timeout=DEADLINE)
        channel.recv(timeout=DEADLINE)
    replaced.set()
    late.result()
    bus.publish(large.message(LAST))
    assert numbers(iter(partial(channel.recv, DEADLINE), large.message(LAST))) == [0]


DECODING, GO_ON = threading.Event(), threading.Event()


def _slowly(data: bytes) -> int:
    DECODING.set()
    assert GO_ON.wait(DEADLINE)
    return len(data)


class Slow:
    """A message that is being unpickled for as long as a test likes."""

    def __reduce__(self) -> tuple[Callable[[bytes], int], tuple[bytes]]:
        return _slowly, (bytes(SIZE),)


def test_a_child_keeps_no_descriptor_of_a_ring_that_another_thread_reads(
    bus: Bus, children: Children, fork: BaseContext
) -> None:
    """That thread does not exist in the child, where nothing releases what it refers to."""
    channel = bus.subscribe()
    prime(bus, os.getpid(), channels=[channel], maps=2)
    reading = Background(channel.recv, DEADLINE)
    bus.publish(Slow())
    assert DECODING.wait(DEADLINE)
    finish(children(fork, lambda: sys.exit(memories(os.getpid()))))
    GO_ON.set()
    assert reading.result() == SIZE


def test_without_memory_for_a_ring_no_chunk_is_waited_for(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message goes through the pipe at once."""
    channel = bus.subscribe()
    prime(bus, os.getpid(), channels=[channel], maps=2)
    monkeypatch.setattr(ring, "populate", lambda *_: False)
    monkeypatch.setattr("mpbroadcast.posix.fd_socket.DescriptorSocket.send_packet", None)  # which asks for a chunk
    exchange(bus, channel, CHUNK // SIZE * [Size(2 * SIZE)])


def test_a_publisher_that_closes_takes_its_memory_along(bus: Bus, reader: MakeReader) -> None:
    """Once all has been read, no process has a map or a descriptor of it: not the publisher, the broker, or a reader."""
    one = reader()
    pids = (os.getpid(), bus.stats().pid, one.pid)
    with connect(bus.address) as other:
        prime(other, *pids)
        for number, length in enumerate([SIZE, 2 * LONGEST, SIZE]):
            other.publish(Size(length).message(number))
    wait_until(lambda: [shared_maps(pid) + memories(pid) for pid in pids] == [0, 0, 0])
    bus.unsubscribe(one.channel)
    assert all_numbers(one) == [0, 1, 2]


def test_a_close_does_not_wait_for_messages_that_its_own_channel_has_not_read(bus: Bus, own_memory: None) -> None:
    """The pipe has room, and gets no more before some are read; the process that closes has the channel open itself."""
    channel = bus.subscribe()
    channel.poll(0)
    bus.publish_many([bytes(10_000)] * 100)
    bus.flush()
    assert 0 < only_subscriber(bus).delivered < 100
    Background(bus.close, None).result()
