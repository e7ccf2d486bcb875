"""Functions that child processes of the tests on messages of all sizes run; how such messages are made and checked."""

import contextlib
import itertools
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mpbroadcast import Broadcaster, Channel
from tests.support.helpers import DEADLINE, Children, answer, finish, pattern, receive_all, rest, wait_until
from tests.support.victims import stopped


class Size(NamedTuple):
    """How large a message is, and whether its bytes are a buffer that is left out of the pickle."""

    length: int
    buffer: bool = False

    def message(self, number: int) -> tuple[int, Any]:
        """Return the message of this number: no other one has its bytes."""
        data = pattern(number, self.length)
        return number, pickle.PickleBuffer(data) if self.buffer else data

    @property
    def charge(self) -> int:
        """Return what it counts in a backlog, or a little more."""
        return self.length + 512


SIZES = {"100": Size(100), "2100": Size(2100), "60000": Size(60_000), "3 MiB": Size(3 << 20), "buffer": Size(300_000, True)}
"""On both sides of each limit at which messages take another route."""
TRANSPORTS = {"pipe": SIZES["100"], "ring": SIZES["60000"], "memory": SIZES["3 MiB"], "buffers": SIZES["buffer"]}
"""One size for each route: the pipe, a ring, memory of their own, and buffers out of band."""


def number_of(message: tuple[int, Any]) -> int:
    number, data = message
    assert data == pattern(number, len(data)), f"the bytes of message {number} are not what they were"
    return number


def numbers(messages: Iterable[tuple[int, Any]]) -> list[int]:
    """Return the numbers of these messages, each of which must be whole."""
    return [number_of(message) for message in messages]


def numbers_until_end(channel: Channel[Any]) -> tuple[list[int], str]:
    """Return the numbers of all messages that come, each of which must be whole, and the name of the error that ends them."""
    messages, error = receive_all(channel)
    return numbers(messages), type(error).__name__


def exchange(bus: Broadcaster[Any], channel: Channel[Any], sizes: Iterable[Size], topic: str = "") -> None:
    """Publish a message of each size, and receive it from the channel."""
    for number, size in enumerate(sizes):
        bus.publish(size.message(number), topic=topic)
        assert number_of(channel.recv(timeout=DEADLINE)) == number


def open_and_receive(channel: Channel[Any], reports: Connection, receive: Callable[..., Any], *arguments: Any) -> None:
    """Open the channel, report that, and send home what ``receive`` returns, or what it raises instead."""
    channel.fileno()
    reports.send("open")
    try:
        reports.send(receive(channel, *arguments))
    except BaseException as error:
        reports.send(repr(error))


def hold(_: Channel[Any]) -> NoReturn:
    """Do not read a channel."""
    while True:
        signal.pause()


class ReaderProcess:
    """A process that opens a channel, and reports what ``receive`` returns for it; it can be stopped meanwhile."""

    def __init__(
        self,
        channel: Channel[Any],
        children: Children,
        context: BaseContext,
        receive: Callable[..., Any] = numbers_until_end,
        *arguments: Any,
    ) -> None:
        self.channel = channel
        self._reports: Connection
        self._reports, theirs = context.Pipe()
        self.process = children(context, open_and_receive, channel, theirs, receive, *arguments)
        theirs.close()
        assert answer(self._reports) == "open"
        self.pid = self.process.pid or 0

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: stopped(self.pid))

    def go(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(DEADLINE)

    def result(self) -> Any:
        found = answer(self._reports)
        finish(self.process)
        self._reports.close()
        return found


def publish_counted(bus: Broadcaster[Any], counter: memoryview, topic: str) -> None:
    """Publish messages for ever, and count those whose ``publish`` has returned."""
    for number in itertools.count():
        bus.publish(bytes(1000), topic=topic)
        counter[0] = number + 1


def room_for(count: int, pid: int) -> int:
    """Return the limit on descriptors with which a process can get so many more, and none after that."""
    folder = f"/proc/{pid}/fd"
    there = {int(name) for name in os.listdir(folder) if os.path.exists(f"{folder}/{name}")}  # without the one that listed it
    limit = 0
    while count or limit in there:
        count -= limit not in there
        limit += 1
    return limit


@contextlib.contextmanager
def limited(which: int, soft: int, pid: int = 0) -> Iterator[None]:
    """Give a process this limit meanwhile."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, which, before)


@contextlib.contextmanager
def descriptors_left(count: int, pid: int = 0) -> Iterator[None]:
    """Let a process get so many descriptors more meanwhile."""
    with limited(resource.RLIMIT_NOFILE, room_for(count, pid or os.getpid()), pid):
        yield


def keep_all(channel: Channel[Any], limit: int) -> tuple[int, int]:
    """With at most so many descriptors, keep all that comes until the end; return how many, and how many are maps."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    kept = list(channel)
    assert all(number == array[0] and len(array) == len(kept[0][1]) for number, array in kept)
    return len(kept), maps(os.getpid())


def maps(pid: int) -> int:
    """Return how many private maps of messages' memory a process has, neighbours counted once."""
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
    orders.send(came + numbers(rest(channel)))
