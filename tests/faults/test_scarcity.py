"""Scarcity: with too few descriptors or processes, or too little memory or room, all is slower or raises, and never wrong. What
is short is short for one process: nothing here changes a setting of the system."""

import errno
import mmap
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mpbroadcast import Broadcaster, StartError, connect, start_broadcaster
from mpbroadcast.client import broadcaster, broker_client, ring
from mpbroadcast.client.ring import Ring
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.protocol.pickling import Payload
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS
from mpbroadcast.testing import drain
from tests.support.helpers import DEADLINE, Children, answer, finish, take
from tests.support.large_workers import SIZES, Size, descriptors_left, exchange, number_of, receive_with_little_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are as Linux has them")

Bus = Broadcaster[Any]


def outcome_of(call: Callable[[], Any]) -> str:
    """Return ``""`` when the call goes well, else the name of its error, its number and its text, which it must have."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'errno', None)}: {str(error) or 'no text'}"
    return ""


def no_descriptor(outcome: str) -> bool:
    """Whether this is success, or the error of one that had no descriptor left, here or in the broker."""
    return not outcome or outcome.startswith(f"OSError {errno.EMFILE}:")


def check_all_works(address: str) -> None:
    """A new client of the broker can publish and subscribe, with messages of all routes."""
    with connect(address) as other, other.subscribe("works") as channel:
        exchange(other, channel, SIZES.values(), "works")


def in_child(call: Callable[..., Any], *args: Any) -> Any:
    """What a call returns, or raises, in a forked process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(call, *args).result(2 * DEADLINE)


def attach_and_use(address: str, patience: float) -> str:
    """Connect, subscribe and publish as a client that cannot wait for long. Return the error, if there is one."""
    broker_client.CONNECT_TIMEOUT = patience  # type: ignore[misc]
    return outcome_of(lambda: check_all_works(address))


@pytest.mark.parametrize("count", [*range(0, 11, 2), 11])
def test_so_many_descriptors_left_in_the_broker(count: int, bus: Bus) -> None:
    """However few descriptors the broker has left, a newcomer is served or gets an error with the reason."""
    with bus.subscribe("old") as channel:
        bus.publish(0, topic="old")
        assert channel.recv(timeout=DEADLINE) == 0
        broker = bus.stats().pid
        patience = 2.0 if count == 11 else 0.1  # seconds that one that is not served waits
        with descriptors_left(count, broker):
            outcome = in_child(attach_and_use, bus.address, patience)
            bus.publish(1, topic="old")
            assert channel.recv(timeout=DEADLINE) == 1
        assert no_descriptor(outcome) or outcome.startswith("TimedOut")
        assert count < 11 or not outcome
        bus.publish(2, topic="old")
        assert channel.recv(timeout=DEADLINE) == 2
        check_all_works(bus.address)
        assert bus.stats().pid == broker


def test_large_messages_that_take_all_descriptors(bus: Bus) -> None:
    """When large messages that wait for a channel to be opened have all descriptors of the broker, none of them is lost."""
    with bus.subscribe(capacity=1 << 30) as channel, bus.subscribe() as neighbour:
        large = Size(3 << 20)
        bus.publish(large.message(0))
        assert number_of(neighbour.recv(timeout=DEADLINE)) == 0
        with descriptors_left(8, bus.stats().pid):
            for number in range(1, 12):
                bus.publish(large.message(number))
                assert number_of(neighbour.recv(timeout=DEADLINE)) == number
            assert no_descriptor(outcome_of(channel.fileno))
        assert [number_of(message) for message in take(channel, 12)] == list(range(12))
        check_all_works(bus.address)


@pytest.mark.parametrize("count", range(5))
def test_so_many_descriptors_left_in_a_subscriber(count: int, bus: Bus) -> None:
    """Opening a channel without descriptors raises, and takes nothing away: it can be opened later, and has all."""
    with bus.subscribe() as neighbour, bus.subscribe() as channel:
        bus.publish(0)
        assert neighbour.recv(timeout=DEADLINE) == 0
        with descriptors_left(count):
            outcomes = [outcome_of(channel.fileno) for _ in range(3)]
            bus.publish(1)
        assert all(map(no_descriptor, outcomes)), outcomes
        assert not any(outcomes) or count < 4
        for number, size in enumerate(SIZES.values()):
            bus.publish(size.message(number))
        for each, first in ((neighbour, [1]), (channel, [0, 1])):
            assert take(each, len(first)) == first
            assert [number_of(message) for message in take(each, len(SIZES))] == list(range(len(SIZES)))


@pytest.mark.parametrize("size", [100, 3 << 20])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_so_many_descriptors_left_in_a_publisher(count: int, size: int, bus: Bus) -> None:
    """``connect`` and a first publish work or raise, and then nothing was published; the next ones go when they can."""
    with bus.subscribe() as channel:
        channel.fileno()
        handles: list[Bus] = []
        with descriptors_left(count):
            outcome = outcome_of(lambda: handles.append(connect(bus.address)))
        assert no_descriptor(outcome)
        assert bool(outcome) == (count < 1)
        other = handles[0] if handles else connect(bus.address)
        published = []
        outcomes = []
        with other:
            with descriptors_left(count):
                for number in range(3):
                    outcomes.append(outcome_of(lambda number=number: other.publish(Size(size).message(number))))  # type: ignore[misc]
                    if not outcomes[-1]:
                        published.append(number)
            assert all(map(no_descriptor, outcomes)), outcomes
            assert not any(outcomes) or count < 4
            for number in range(3, 6):
                other.publish(Size(size).message(number))
            assert [number_of(message) for message in drain(other, channel)] == [*published, 3, 4, 5]


def start_with(count: int, method: str) -> str:
    """Start a broadcaster with so many descriptors left. Return the error, if there is one."""
    broker_client.CONNECT_TIMEOUT = 2.0  # type: ignore[misc]
    broadcaster.CLOSE_TIMEOUT = 0.1  # type: ignore[misc]
    started: list[Bus] = []
    with descriptors_left(count):
        outcome = outcome_of(lambda: started.append(start_broadcaster(context=multiprocessing.get_context(method))))
    for bus in started:
        bus.close(timeout=0)
    assert not multiprocessing.active_children()
    return outcome


@pytest.mark.parametrize(("method", "counts"), [("fork", range(15)), ("spawn", (1, 5, 20))])
def test_so_many_descriptors_left_for_the_start(method: str, counts: Iterable[int], temporary_folder: Path) -> None:
    """``start_broadcaster`` works, or is a ``StartError`` that has the reason and leaves no file, with few descriptors."""
    outcomes = []
    for count in counts:
        outcome = in_child(start_with, count, method)
        reasons = (os.strerror(errno.EMFILE), "standard error", "in time")
        assert not outcome or (outcome.startswith("StartError") and any(reason in outcome for reason in reasons))
        assert not list(temporary_folder.glob("mpbroadcast-*"))
        outcomes.append(outcome)
    assert os.strerror(errno.EMFILE) in outcomes[0]
    assert not outcomes[-1]


@pytest.mark.parametrize(("name", "number"), [("missing", errno.ENOENT), ("file", errno.ENOTDIR)])
def test_a_missing_temporary_folder(name: str, number: int, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a ``StartError`` that names it, and has the cause."""
    file = temporary_folder / "file"
    file.touch()
    monkeypatch.setattr(tempfile, "tempdir", f"{temporary_folder}/{name}")
    with pytest.raises(StartError, match=f"{temporary_folder}/{name}") as caught:
        start_broadcaster()
    assert getattr(caught.value.__cause__, "errno", None) == number
    file.unlink()


@pytest.mark.parametrize("length", [*range(79, 84), 107, 200])
def test_a_temporary_folder_with_a_long_path(length: int, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It works also near to the length of the longest address of a socket, and nothing is left there."""
    folder = temporary_folder / ("x" * (length - len(str(temporary_folder)) - 1))
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with start_broadcaster() as bus, bus.subscribe() as channel:
        bus.publish("works")
        assert channel.recv(timeout=DEADLINE) == "works"
    folder.rmdir()


def test_a_subscriber_without_memory(children: Children, inline: None) -> None:
    """A subscriber without memory for a message has an error for that, and its neighbour none; it goes on."""
    ours, theirs = Pipe()
    with ours, theirs, start_broadcaster() as bus, bus.subscribe() as neighbour:
        # Spawned, so that it has not what this process has released, and its C library has kept.
        process = children(multiprocessing.get_context("spawn"), receive_with_little_memory, bus.subscribe(), theirs, 1 << 20)
        bus.publish(Size(100).message(0))
        assert answer(ours) == "open"
        ours.send("go")
        for number, size in enumerate([10 << 20, 100, 60_000, 100], 1):
            bus.publish(Size(size).message(number))
            assert number_of(neighbour.recv(timeout=DEADLINE)) == number - 1
        assert number_of(neighbour.recv(timeout=DEADLINE)) == 4
        bus.close()
        came = answer(ours)
        finish(process)
    # In the place of the message, or before it, if that is still in the pipe.
    assert came in (["MemoryError", 2, 3, 4], ["MemoryError", 1, 2, 3, 4], ["MemoryError"] * 2 + [1, 2, 3, 4])


@pytest.mark.skipif(not available(), reason="there is no memory to share here")
def test_a_system_without_memory_for_a_ring(monkeypatch: pytest.MonkeyPatch, bus: Bus) -> None:
    """A write to a page that cannot be had would be the end: so it is populated before, and the message has another route."""
    fd = os.memfd_create("short")
    os.ftruncate(fd, CHUNK * CHUNKS)
    short = Ring(1, mmap.mmap(fd, CHUNK * CHUNKS))
    os.ftruncate(fd, CHUNK)  # what lies behind cannot be had any more
    os.close(fd)
    assert not short.copy(CHUNK - 1, Payload((bytes(2),), 2, False))
    short.close()
    populate = Mock(return_value=False)
    monkeypatch.setattr(ring, "populate", populate)
    with bus.subscribe() as channel:
        channel.fileno()
        exchange(bus, channel, map(Size, [3000, 20_000, 400_000] * 3))
    assert populate.called
