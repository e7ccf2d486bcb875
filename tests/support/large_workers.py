"""What child processes of the tests on messages of all sizes run, and how such messages are made and checked."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from mpbroadcast import Broadcaster, Channel
from tests.support.helpers import DEADLINE, pattern, receive_all


class Size(NamedTuple):
    """How large a message is, and whether its bytes are a buffer that is left out of the pickle."""

    length: int
    buffer: bool = False

    def message(self, number: int) -> tuple[int, Any]:
        """The message of this number: no other has its bytes."""
        data = pattern(number, self.length)
        return number, pickle.PickleBuffer(data) if self.buffer else data

    @property
    def charge(self) -> int:
        """What it counts in a backlog, or a little more."""
        return self.length + 512


SIZES = {
    "100": Size(100),
    "2100": Size(2100),
    "60000": Size(60_000),
    "3 MiB": Size(3 << 20),
    "buffer": Size(300_000, True),
}
"""On both sides of each limit at which messages take another route."""
TRANSPORTS = {"pipe": SIZES["100"], "ring": SIZES["60000"], "memory": SIZES["3 MiB"], "buffers": SIZES["buffer"]}
"""One size for each route: the pipe, a ring, memory of their own, and buffers out of band."""


def number_of(message: tuple[int, Any]) -> int:
    """The number of a message that is whole."""
    number, data = message
    assert data == pattern(number, len(data)), f"the bytes of message {number} are not what they were"
    return number


def numbers_until_end(channel: Channel[Any]) -> tuple[list[int], str]:
    """Return the numbers of all messages that come, each of which must be whole, and the name of the error that ends them."""
    messages, error = receive_all(channel)
    return list(map(number_of, messages)), type(error).__name__


def report_numbers(channel: Channel[Any], results: Connection) -> None:
    """Open the channel, report that, and send home the numbers of all messages up to the end, and what that was."""
    channel.fileno()
    results.send("open")
    results.send(numbers_until_end(channel))


def publish_back(bus: Broadcaster[Any], channel: Channel[Any]) -> None:
    """Publish each message of the channel again, as it came, until its end."""
    for number, data in channel:
        bus.publish((number, pickle.PickleBuffer(data) if isinstance(data, memoryview) else data), topic="back")


# ----------------------------------------------------------------------------------------------------------- shared memory


def lowest_free(pid: int) -> int:
    """The descriptor that a process would get next."""
    there = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in range(len(there) + 2) if number not in there)


@contextlib.contextmanager
def limited(which: int, soft: int, pid: int = 0) -> Iterator[None]:
    """A process has this limit within."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, which, before)


@contextlib.contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """A process can get no descriptor within."""
    with limited(resource.RLIMIT_NOFILE, lowest_free(pid), pid):
        yield


def receive_in_need(channel: Channel[Any], orders: Connection, need: str) -> None:
    """Receive the first messages while descriptors, or address space, are short, and then all up to the end.

    Sends home what came: numbers, and the names of errors.
    """
    channel.fileno()
    came: list[int | str] = []

    def receive() -> None:
        try:
            came.append(number_of(channel.recv(timeout=DEADLINE)))
        except OSError as error:
            came.append(f"OSError {error.errno}" if str(error) else "an OSError without a text")

    orders.send("open")
    orders.recv()
    if need == "descriptors":
        with without_descriptors(os.getpid()):
            receive()
            receive()
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        with limited(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGESIZE") + (1 << 20)):
            receive()
            receive()
    orders.send("rich again")
    with contextlib.suppress(EOFError):
        while True:
            came.append(number_of(channel.recv(timeout=DEADLINE)))
    orders.send(came)


def keep_all(channel: Channel[Any], results: Connection, limit: int) -> None:
    """With at most so many descriptors, keep all that comes until the end; send home how many, and how many are maps."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    results.send("open" if channel.fileno() >= 0 else "")
    kept = list(channel)
    assert all(number == array[0] and len(array) == len(kept[0][1]) for number, array in kept)
    results.send((len(kept), maps(os.getpid())))


def maps(pid: int) -> int:
    """How many private maps of messages' memory a process has, neighbours counted once."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("memfd:mpbroadcast" in line and " rw-p " in line for line in lines)


def receive_with_little_memory(channel: Channel[Any], orders: Connection, room: int) -> None:
    """Receive twice with only so much address space more, then all up to the end; send home numbers, and the errors' names."""
    channel.fileno()
    assert number_of(channel.recv(timeout=DEADLINE)) == 0
    orders.send("open")
    orders.recv()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    came: list[int | str] = []
    with limited(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGESIZE") + room):
        for _ in range(2):
            try:
                came.append(number_of(channel.recv(timeout=DEADLINE)))
            except (MemoryError, OSError) as error:
                came.append(type(error).__name__)
    with contextlib.suppress(EOFError):
        while True:
            came.append(number_of(channel.recv(timeout=DEADLINE)))
    orders.send(came)
