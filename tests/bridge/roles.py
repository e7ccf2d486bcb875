"""The processes of the chaos run: on each machine a host, perhaps a second caller, publishers and readers; and a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, Final
from zlib import crc32

import numpy

from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, BrokerRestarted, Lagged, connect, start_broadcaster
from mpbroadcast.bridge import Bridge, bridge
from tests.bridge.checker import COUNTED, ERROR, FOREIGN, LAGGED, RESTARTED, SPOILED, Layout, Log, Source
from tests.support.helpers import wait_for, wait_until

MACHINES: Final = "ABC"
HANDLES: Final = 2  # of each machine's publisher
KINDS: Final = ("room", "via", "local")
TOPICS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "chaos": {"A": ("room:*", "via:*"), "B": (), "C": ("room:*",)},
    "side": {"B": ("room:*", "via:*"), "C": ("room:*", "via:*")},
}
"""Each machine's topics of each stream. What is published to "room" goes over the first one to all. What is published to "via"
on A reaches B, and would reach C over two bridges only. "local" leaves B only, and no other machine takes it."""
LAYOUT: Final = Layout(
    {
        stream: {
            machine: frozenset(kind for kind in KINDS if not topics or f"{kind}:*" in topics) for machine, topics in row.items()
        }
        for stream, row in TOPICS.items()
    }
)
SOURCES: Final = [Source(machine, number, kind) for machine in MACHINES for number in range(HANDLES) for kind in KINDS]
KEYS: Final = ("the key of yesterday", "the key of tomorrow")
PATIENCE: Final = float(
    os.environ.get("MPBROADCAST_PATIENCE", "90")
)  # seconds for what happens soon on a machine with nothing else to do


@dataclass(frozen=True)
class Settings:
    """What a run does. Sizes in bytes, times in seconds."""

    engine: str = "redis"
    seconds: float = 30.0
    seed: int = 1
    pause: float = 1.0  # the longest time between two things that happen
    buses: bool = False  # brokers are killed, too
    trims: bool = False  # the logs are emptied, too
    large: float = 0.004  # the share of messages of 70 kB to 5 MB
    overflow: str = "block"
    capacity: int = 64 << 20
    messages: int = 0  # not until the time is over, but so many small messages, in batches
    only: tuple[str, ...] = ()  # of all that can happen
    folder: str = ""  # of the sockets, logs and what processes write to standard error

    def address(self, machine: str) -> str:
        return os.path.join(self.folder, machine)


Role = Callable[..., None]


def main(role: Role, settings: Settings, orders: Connection, name: str, *arguments: Any) -> None:
    """Run a role in a process of its own. What it writes to standard error is in a file, also what its children write."""
    descriptor = os.open(os.path.join(settings.folder, f"{name}.err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 2)
    try:
        role(settings, orders, *arguments)
    except (EOFError, BrokenPipeError):
        pass  # the run has ended
    except BaseException:
        traceback.print_exc()
        raise


def orders_of(orders: Connection, pause: float) -> Iterator[tuple[str, Any] | None]:
    """Yield each order with its argument when it comes, and ``None`` when none has come for that time."""
    parent = os.getppid()
    while os.getppid() == parent:
        yield orders.recv() if orders.poll(pause) else None


def connected(settings: Settings, machine: str) -> Broadcaster[Any]:
    """Connect to a broker that is killed now and then."""

    def trial() -> Broadcaster[Any] | None:
        with contextlib.suppress(BrokerLost):
            return connect(settings.address(machine))
        return None

    bus: Broadcaster[Any] = wait_until(trial, PATIENCE)
    return bus


def call_bridges(settings: Settings, orders: Connection, machine: str, url: str, is_host: bool) -> None:
    """Call ``bridge()`` for each stream of a machine, again whenever one has ended. The host starts the broker as well."""
    bus = (
        start_broadcaster(address=settings.address(machine), restart=settings.buses)
        if is_host
        else connected(settings, machine)
    )
    keys = KEYS if machine != "B" else KEYS[::-1]
    links: dict[str, Bridge] = {}
    ended: list[Bridge] = []  # close() would forget the stream's place
    start_timeout = PATIENCE
    for order in orders_of(orders, 0.05):
        for stream, row in TOPICS.items():
            if machine not in row or (stream in links and links[stream].alive) or (not links and order != ("link", None)):
                continue
            if stream in links:
                ended.append(links.pop(stream))
            options: dict[str, Any] = {"overflow": settings.overflow, "capacity": settings.capacity}
            options |= {"topics": row[machine], "stream": stream, "key": keys, "max_bytes": 2 << 30}
            try:
                links[stream] = bridge(bus, url, start_timeout=start_timeout, **options)
            except BroadcastError:
                traceback.print_exc()
        match order:
            case ("link", _):
                start_timeout = 0.0
                orders.send(sorted(links))
            case ("stats", _):
                orders.send(statistics(bus))
            case ("rotate", _):
                keys = keys[::-1]
                orders.send(keys)
            case ("flush", _):
                orders.send(flushed(links))
            case ("end", _):
                for link in links.values():
                    link.close(10)
                bus.close(10)
                orders.send("ended")
                return


def statistics(bus: Broadcaster[Any]) -> tuple[int, dict[str, Any]] | None:
    """Return the broker's process ID and the row of each bridge; ``None`` if there is no broker just now."""
    try:
        stats = bus.stats()
    except (BroadcastError, TimeoutError):
        traceback.print_exc()
        return None
    return stats.pid, dict(stats.bridges)


def flushed(links: dict[str, Bridge]) -> str:
    """Flush each bridge; return what went wrong."""
    try:
        for link in links.values():
            link.flush(PATIENCE)
    except Exception as error:
        return f"{error!r} over {link!r}"
    return ""


@cache
def noise() -> bytes:
    return random.Random(0).randbytes(6 << 20)


def payload(rng: random.Random, large: float) -> Any:
    """Return some bytes, seldom many; some are in a buffer that a publisher keeps out of its pickle."""
    sizes = [0, 10, 100, 100, 1000, 3000] if rng.random() > large else [70_000, 600_000, 2_500_000, 5_000_000]
    size = rng.choice(sizes)
    begin = rng.randrange(1 << 20)
    data = noise()[begin : begin + size]
    return numpy.frombuffer(data, dtype=numpy.uint8) if size > 1000 and rng.random() < 0.5 else data


class Publisher:
    """One handle, its sources, and how many messages each has published."""

    def __init__(self, bus: Broadcaster[Any], machine: str, number: int, rng: random.Random) -> None:
        self.bus = bus
        self.rng = rng
        self.first = SOURCES.index(Source(machine, number, KINDS[0]))
        self.counts = [0] * len(KINDS)

    def publish(self, kind: int, data: Any) -> None:
        number = self.counts[kind]
        suffix = self.rng.randrange(3)
        self.bus.publish((self.first + kind, number, suffix, crc32(data), data), topic=f"{KINDS[kind]}:{suffix}")
        self.counts[kind] += 1

    def publish_many(self, kind: int, count: int) -> None:
        number = self.counts[kind]
        suffix = self.rng.randrange(3)
        source = self.first + kind
        messages = [(source, each, suffix, 0, b"") for each in range(number, number + count)]
        self.bus.publish_many(messages, topic=f"{KINDS[kind]}:{suffix}")
        self.counts[kind] += count

    def some_kind(self) -> int:
        return self.rng.choice([0, 0, 0, 0, 0, 0, 0, 1, 1, 2])


def publish(settings: Settings, orders: Connection, machine: str) -> None:
    """Publish until the order to pause comes, or as many as were asked for; then, on an order, one last message each."""
    rng = random.Random(f"{settings.seed}{machine}")
    publishers = [Publisher(connected(settings, machine), machine, number, rng) for number in range(HANDLES)]
    share = settings.messages // len(MACHINES) // HANDLES
    orders.send("up")
    is_paused = False
    for order in orders_of(orders, 0 if settings.messages else rng.random() * 0.04):
        if order is None and not is_paused:
            for each in publishers:
                if settings.messages:
                    each.publish_many(each.some_kind(), 500)
                else:
                    for _ in range(rng.choice([1, 1, 5, 40])):
                        each.publish(each.some_kind(), payload(rng, settings.large))
            if settings.messages and all(sum(each.counts) >= share for each in publishers):
                is_paused = True
        elif order is None:
            time.sleep(0.01)
        elif order[0] == "is paused":
            orders.send(is_paused)
        elif order[0] == "pause":
            is_paused = True
            orders.send("paused")
        elif order[0] == "finish":
            for each in publishers:
                for kind in range(len(KINDS)):
                    each.publish(kind, b"the last")
                with contextlib.suppress(BrokerRestarted):  # of what was published long ago
                    each.bus.flush(PATIENCE)
            orders.send([each.counts for each in publishers])


def read(settings: Settings, orders: Connection, machine: str, name: str, kinds: tuple[str, ...]) -> None:
    """Note all that one channel is given."""
    bus = connected(settings, machine)
    topics = [f"{kind}:*" for kind in kinds] if len(kinds) < len(KINDS) else []
    channel = bus.subscribe(*topics, with_topic=True)
    log = Log()
    latest = [-1] * len(SOURCES)
    errors: list[str] = []
    channel.poll()
    orders.send("up")
    parent = os.getppid()
    while os.getppid() == parent:
        ready = wait_for([channel, orders], 1.0)
        if channel in ready:
            try:
                for topic, message in channel.recv_many(1000, 0):
                    note(log, latest, topic, message)
            except TimeoutError:
                pass  # woken for what is no message
            except Lagged as error:
                log.add(LAGGED if error.missed is None else COUNTED, number=error.missed or 0)
            except BrokerRestarted:
                log.add(RESTARTED)
            except EOFError:
                return
            except Exception as error:
                log.add(ERROR)
                errors.append(repr(error))
                if isinstance(error, BroadcastError):
                    orders.send(("failed", errors))
                    return
        if orders in ready:
            order, argument = orders.recv()
            if order == "latest":
                orders.send((len(log.records), latest))
            elif order == "save":
                with open(argument, "wb") as file:
                    log.records.tofile(file)
                orders.send(errors)


def note(log: Log, latest: list[int], topic: str, message: Any) -> None:
    """Note a message, whatever it is."""
    try:
        source, number, suffix, crc, data = message
        is_sound = topic == f"{SOURCES[source].kind}:{suffix}" and crc32(data) == crc
    except (TypeError, ValueError, IndexError):
        return log.add(FOREIGN)
    if not is_sound:
        return log.add(SPOILED)
    latest[source] = max(latest[source], number)
    return log.message(source, number)


def forward(settings: Settings, orders: Connection, port: int) -> None:
    """Forward each machine's connections to the engine, and stop that on an order: nothing is lost, nothing comes through."""
    asyncio.run(Proxy(orders, port).run())


class Proxy:
    """A port for each machine, a gate behind it, and the connections that are open."""

    def __init__(self, orders: Connection, port: int) -> None:
        self.orders = orders
        self.port = port
        self.gates = {machine: asyncio.Event() for machine in MACHINES}
        self.open: dict[str, set[asyncio.StreamWriter]] = {machine: set() for machine in MACHINES}

    async def run(self) -> None:
        servers = {}
        for machine in MACHINES:
            self.gates[machine].set()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, machine: str = machine) -> None:
                await self.serve(machine, reader, writer)

            servers[machine] = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.orders.send({machine: server.sockets[0].getsockname()[1] for machine, server in servers.items()})
        parent = os.getppid()
        while os.getppid() == parent:
            await asyncio.sleep(0.05)
            while select.select([self.orders], [], [], 0)[0]:
                order, machine = self.orders.recv()
                if order == "stop":
                    self.gates[machine].clear()
                elif order == "go on":
                    self.gates[machine].set()
                elif order == "cut":
                    for writer in [*self.open[machine]]:
                        writer.transport.abort()
                self.orders.send("done")

    async def serve(self, machine: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of a bridge."""
        writers = {writer}
        try:
            onwards, back = await asyncio.open_connection("127.0.0.1", self.port)
            writers.add(back)
            self.open[machine] |= writers
            gate = self.gates[machine]
            tasks = [asyncio.create_task(pump(reader, back, gate)), asyncio.create_task(pump(onwards, writer, gate))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        except OSError:
            pass  # no engine just now
        finally:
            self.open[machine] -= writers
            for each in writers:
                each.transport.abort()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            await gate.wait()
            writer.write(data)
            await writer.drain()
