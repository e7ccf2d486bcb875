"""What several test modules need: waiting with deadlines, receiving until the end, threads that return a result."""

import asyncio
import contextlib
import functools
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from mpbroadcast import Broadcaster, BroadcastError, Channel, Lagged, Overflowed, SubscriberStats, channel_to_selector
from mpbroadcast.protocol.control import client_handshake
from mpbroadcast.protocol.version import OWN, announce

Pipe = tuple[Connection, Connection]
DEADLINE = 20.0
"""How long a test waits for what must happen, in seconds. No test needs it when all is well."""


def wait_until(predicate: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Return the first true value of ``predicate``, or fail once ``timeout`` seconds have passed."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        assert time.monotonic() < deadline, f"still {value!r} after {timeout} s"
        time.sleep(0.005)


async def until_tasks_wait() -> None:
    """Let the other tasks of the event loop run as far as they get."""
    for _ in range(20):
        await asyncio.sleep(0)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Meanwhile the broker does nothing, so that all that happens is there at once when it goes on."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def kill_broker(bus: Broadcaster[Any]) -> None:
    """Kill the broker, and wait until another one is there."""
    pid = bus.stats().pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: bus.stats().pid != pid)


def take(channel: Channel[Any], count: int) -> list[Any]:
    return [channel.recv(timeout=DEADLINE) for _ in range(count)]


def calls_that_receive(channel: Channel[Any]) -> dict[str, Callable[[], list[Any]]]:
    """Return each call that receives, as one that returns a list of messages."""
    selector = channel_to_selector(channel)

    async def first() -> Any:
        return await anext(channel)

    return {
        "recv": lambda: [channel.recv(DEADLINE)],
        "recv_many": lambda: channel.recv_many(2, DEADLINE),
        "next": lambda: [next(channel)],
        "for": lambda: [next(iter(channel))],
        "messages": lambda: [next(channel.messages("yield"))],
        "async for": lambda: [asyncio.run(first())],
        "selector": lambda: [selector.receive(DEADLINE)],
    }


def receive_all(channel: Channel[Any], timeout: float = DEADLINE) -> tuple[list[Any], BaseException]:
    """Return all messages that come, and the error that ends them."""
    messages = []
    while True:
        try:
            messages.append(channel.recv(timeout))
        except (EOFError, BroadcastError) as error:
            return messages, error


def rest(channel: Channel[Any]) -> list[Any]:
    """Return all messages up to the clean end, which must come."""
    messages, error = receive_all(channel)
    if not isinstance(error, EOFError):
        raise error
    return messages


def record(channel: Channel[Any]) -> list[tuple[str, int]]:
    """Return all that a channel of ``(number, pattern)`` messages gives up to its clean end, by kind. ``("message", number)``,
    ``("lagged", how many)`` and ``("overflowed", 0)``."""
    events = []
    while True:
        try:
            number, data = channel.recv(timeout=DEADLINE)
        except Lagged as error:
            events.append(("lagged", error.missed or 0))
        except Overflowed:
            events.append(("overflowed", 0))
        except EOFError:
            return events
        else:
            assert data == pattern(number, len(data))
            events.append(("message", number))


def positions_of(events: list[tuple[str, int]]) -> tuple[list[int], int]:
    """Return the numbers that were received, each at its position behind the gaps, and the one that would come next."""
    numbers = []
    position = 0
    for kind, value in events:
        if kind == "lagged":
            assert value > 0
            position += value
        elif kind == "message":
            assert value == position, f"{value} came instead of {position}"
            numbers.append(value)
            position += 1
    return numbers, position


def only_subscriber(bus: Broadcaster[Any]) -> SubscriberStats:
    (subscriber,) = bus.stats().subscribers
    return subscriber


def fill(bus: Broadcaster[Any], *, topic: str = "", size: int = 1000, timeout: float = 0.5) -> list[int]:
    """Publish ``(number, bytes)`` until one waits too long for a full backlog; return the numbers that were published."""
    published = 0
    while published < 1_000_000:
        try:
            bus.publish((published, bytes(size)), topic=topic, timeout=timeout)
            published += 1
        except TimeoutError:
            if any(row.stalls for row in bus.stats().subscribers):  # else the machine is just busy
                return [*range(published)]
    raise AssertionError("a full backlog never made publish wait")


def pattern(number: int, size: int) -> bytes:
    """Return ``size`` bytes that no other number has (from 5 bytes on) and that show a piece at the wrong position."""
    step = _step(number)
    return (step * (size // len(step) + 1))[:size]


@functools.lru_cache(4096)
def _step(number: int) -> bytes:
    return b"".join((number * 1009 + index).to_bytes(5, "big") for index in range(251))


def wait_for(waitables: list[Any], timeout: float = 0.0) -> list[Any]:
    """Call ``multiprocessing.connection.wait``, whose declared types leave out what merely has ``fileno()``."""
    return multiprocessing.connection.wait(waitables, timeout)


def readable(waitable: Any) -> bool:
    """Return whether the waitable is ready right now, as ``multiprocessing.connection.wait`` sees it."""
    return bool(wait_for([waitable]))


def keyed_connection(address: str, key: bytes | None = None, announcement: bytes = announce(OWN)) -> Connection:
    """Return a control connection on which this process has proved that it has the key, as any program could make it."""
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(address)
        connection = Connection(connected.detach())
    handshake = client_handshake(key or bytes(multiprocessing.current_process().authkey), announcement)
    next(handshake)  # the broker speaks first
    try:
        while True:
            connection.send_bytes(handshake.send(connection.recv_bytes())[4:])  # which adds the length itself
    except StopIteration as done:
        connection.send_bytes(done.value.last[4:])
    except BaseException:
        connection.close()
        raise
    return connection


def answer(pipe: Connection, timeout: float = DEADLINE) -> Any:
    """Return what the other end of ``pipe`` sends next."""
    assert pipe.poll(timeout), f"no answer within {timeout} s"
    return pipe.recv()


def finish(process: BaseProcess) -> None:
    """Wait for the end of a process, which must be a success."""
    process.join(DEADLINE)
    assert process.exitcode == 0


class Background(threading.Thread):
    """A thread that calls a function and keeps what comes of it."""

    def __init__(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        super().__init__(daemon=True)
        self._function = functools.partial(function, *args, **keywords)
        self._outcome: Future[Any] = Future()
        self.start()

    def run(self) -> None:
        try:
            self._outcome.set_result(self._function())
        except BaseException as error:
            self._outcome.set_exception(error)

    def ended(self, timeout: float) -> Future[Any]:
        self.join(timeout)
        assert not self.is_alive(), f"still running after {timeout} s"
        return self._outcome

    def result(self, timeout: float = DEADLINE) -> Any:
        """Wait for the end of the call; return its value or raise its error."""
        return self.ended(timeout).result(0)

    def error(self, timeout: float = DEADLINE) -> BaseException | None:
        """Wait for the end of the call; return the error that it raised, or ``None``."""
        return self.ended(timeout).exception(0)

    def wait_until_blocked(self, function: str) -> None:
        """Wait until the thread sleeps in the kernel somewhere below the function of this name. It is looked at several times:
        once, it may wait for the interpreter's lock only."""
        for _ in range(5):
            wait_until(lambda: self._sleeps_below(function))
            time.sleep(0.002)

    def _sleeps_below(self, function: str) -> bool:
        names = {frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._current_frames().get(self.ident or 0))}
        stat = Path(f"/proc/{os.getpid()}/task/{self.native_id}/stat").read_text()
        return function in names and stat.rpartition(")")[2].split()[0] == "S"


class Children:
    """Starts processes, and ends those that are left."""

    def __init__(self) -> None:
        self._started: list[BaseProcess] = []

    def __call__(self, context: BaseContext, target: Callable[..., Any], *args: Any) -> BaseProcess:
        process: BaseProcess = context.Process(target=target, args=args)  # type: ignore[attr-defined]
        process.start()
        self._started.append(process)
        return process

    def end(self) -> None:
        """Join all; kill those that are still there after a moment."""
        deadline = time.monotonic() + 2.0
        for process in self._started:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(DEADLINE)
            process.close()
        self._started.clear()
