"""``python -m benchmarks.bridges``: two buses linked over Redis and over NATS, beside the plain clients of both.

All of it runs on one machine: two brokers, two bridges, the engine, a publisher and a subscriber share its CPUs. The plain
clients write and read the same pickles by the same engine's log, in batches of 100, without signature, positions or local bus.
Each row is the median of some rounds, in which all take turns. Redis syncs each write to its file, as exactly once needs it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import pickle
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from mpbroadcast import Broadcaster, start_broadcaster
from mpbroadcast.bridge import bridge

MESSAGE = {"user": 12345, "room": "lobby", "text": "x" * 40}  # with its number, about 100 bytes as a pickle
TOGETHER = 100  # messages of a plain client's write
PACED = 400  # messages of a round whose latency is measured
PAUSE = 0.004  # seconds between two messages whose latency is measured
KEY = "a key for benchmarks only"
ENGINES = ("redis", "nats")
fork = multiprocessing.get_context("fork")

Row = tuple[str, str]


@contextlib.contextmanager
def engine(name: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server of this engine with an empty log on loopback, and yield its URL and its process."""
    folder = Path(tempfile.mkdtemp(prefix="engine-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if name == "redis":
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
        command += ["--appendonly", "yes", "--appendfsync", "always"]
    else:
        options = {"listen": f"127.0.0.1:{port}", "jetstream": {"store_dir": str(folder)}}
        (folder / "nats.conf").write_text(json.dumps(options))
        command = ["nats-server", "-c", str(folder / "nats.conf")]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        time.sleep(0.5)
        yield f"{name}://127.0.0.1:{port}", psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def numbered(count: int) -> Iterator[dict[str, Any]]:
    """Yield messages, each with its number and the time at which it was made."""
    for number in range(count):
        yield {**MESSAGE, "number": number, "at": time.monotonic()}


def paced(count: int) -> Iterator[dict[str, Any]]:
    """Yield messages one by one, with pauses."""
    for message in numbered(count):
        time.sleep(PAUSE)
        yield {**message, "at": time.monotonic()}


def publish(bus: Broadcaster[Any], topic: str, messages: Iterator[Any], *, is_paced: bool) -> None:
    if is_paced:
        for message in messages:
            bus.publish(message, topic=topic)
    else:
        bus.publish_many(messages, topic=topic)
    bus.flush()


def in_process(function: Callable[..., None], *arguments: Any) -> Any:
    """Start a process. Return a function that returns what it sends when it has ended."""
    ours, theirs = fork.Pipe()
    process = fork.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()

    def result() -> Any:
        with ours:
            found = ours.recv()
        process.join()
        return found

    return ours, result


def receive(done: Connection, channel: Any, count: int, *, is_paced: bool) -> None:
    """Receive so many messages. Send the times of the first and the last one, or how old each was."""
    channel.fileno()
    done.send("ready")
    ages: list[float] = []
    left = count
    first = 0.0
    while left:
        messages = channel.recv_many()
        first = first or time.monotonic()
        left -= len(messages)
        if is_paced:
            now = time.monotonic()
            ages += [now - message["at"] for message in messages]
    done.send(ages if is_paced else (first, time.monotonic()))


def through(left: Broadcaster[Any], right: Broadcaster[Any], topic: str, count: int, *, is_paced: bool = False) -> Any:
    """Return messages a second from a publisher of ``left`` to a subscriber of ``right``, or their ages in seconds."""
    with right.subscribe(topic) as channel:
        ours, result = in_process(lambda done: receive(done, channel, count, is_paced=is_paced))
        assert ours.recv() == "ready"
        began = time.monotonic()
        publish(left, topic, (paced if is_paced else numbered)(count), is_paced=is_paced)
        found = result()
        return found if is_paced else count / (found[1] - began)


def cpu(*processes: psutil.Process) -> list[float]:
    """Return the seconds of CPU that each has used."""
    return [sum(process.cpu_times()[:2]) for process in processes]


def legs(left: Broadcaster[Any], right: Broadcaster[Any], url: str, count: int) -> dict[str, float]:
    """Return messages a second into the engine, and out of it: of what is published while the other's bridge is away."""
    options: dict[str, Any] = {"topics": ["legs"], "stream": "legs", "key": KEY, "overflow": "block"}
    away = bridge(right, url, **options)
    with bridge(left, url, **options) as here, right.subscribe("legs") as channel:
        away.close(forget=False)
        began = time.monotonic()
        publish(left, "legs", numbered(count), is_paced=False)
        here.flush()
        out = count / (time.monotonic() - began)
        ours, result = in_process(lambda done: receive(done, channel, count, is_paced=False))
        assert ours.recv() == "ready"
        with bridge(right, url, **options):
            first, last = result()
            return {"out": out, "in": count / (last - first)}


def whole(left: Broadcaster[Any], right: Broadcaster[Any], server: psutil.Process, count: int) -> dict[str, float]:
    """Return messages a second from bus to bus, and the microseconds of CPU that each took."""
    sender, reader = (psutil.Process(bus.stats().bridges["mpbroadcast"].pid) for bus in (left, right))
    before = cpu(server, sender, reader)
    rate = through(left, right, "room:1", count)
    while left.stats().bridges["mpbroadcast"].lag:  # the one that sends reads all, too
        time.sleep(0.02)
    used = [1e6 * (after - earlier) / count for after, earlier in zip(cpu(server, sender, reader), before, strict=True)]
    return {"both": rate, "engine": used[0], "sender": used[1], "reader": used[2]}


def plain_redis(url: str, count: int, *, is_paced: bool) -> Any:
    """The same with redis-py alone: pipelines of XADD, and XREAD."""
    import redis

    together = 1 if is_paced else TOGETHER
    key = f"plain{time.monotonic_ns()}"

    def read(done: Connection) -> None:
        client = redis.Redis.from_url(url)
        done.send("ready")
        ages: list[float] = []
        last, left = b"0", count
        while left:
            found: Any = client.xread({key: last}, count=1000, block=5000)
            for _, entries in found:
                last = entries[-1][0]
                messages = [pickle.loads(fields[b"m"]) for _, fields in entries]
                left -= len(messages)
                if is_paced:
                    now = time.monotonic()
                    ages += [now - message["at"] for message in messages]
        done.send(ages if is_paced else time.monotonic())

    ours, result = in_process(read)
    assert ours.recv() == "ready"
    client = redis.Redis.from_url(url)
    began = time.monotonic()
    pipeline = client.pipeline(transaction=False)
    for number, message in enumerate((paced if is_paced else numbered)(count), 1):
        pipeline.xadd(key, {"m": pickle.dumps(message, 5)})
        if number % together == 0:
            pipeline.execute()
    pipeline.execute()
    found = result()
    client.delete(key)
    client.close()
    return found if is_paced else count / (found - began)


def plain_nats(url: str, count: int, *, is_paced: bool) -> Any:
    """The same with nats-py alone: so many publishes at once, and a pull consumer."""
    import nats
    from nats.js.api import AckPolicy, ConsumerConfig

    together = 1 if is_paced else TOGETHER
    name = f"plain{time.monotonic_ns()}"

    async def reading(done: Connection) -> None:
        client = await nats.connect(url)
        stream = client.jetstream()
        await stream.add_stream(name=name, subjects=[name])
        pull = await stream.pull_subscribe(name, config=ConsumerConfig(ack_policy=AckPolicy.NONE))
        done.send("ready")
        ages: list[float] = []
        left = count
        while left:
            with contextlib.suppress(TimeoutError):
                messages = [pickle.loads(one.data) for one in await pull.fetch(1 if is_paced else 500, timeout=5)]
                left -= len(messages)
                if is_paced:
                    now = time.monotonic()
                    ages += [now - message["at"] for message in messages]
        done.send(ages if is_paced else time.monotonic())
        await client.close()

    async def writing() -> None:
        client = await nats.connect(url)
        stream = client.jetstream()
        waiting = []
        for message in (paced if is_paced else numbered)(count):
            waiting.append(stream.publish(name, pickle.dumps(message, 5)))
            if len(waiting) == together:
                await asyncio.gather(*waiting)
                waiting = []
        await asyncio.gather(*waiting)
        await client.close()

    ours, result = in_process(lambda done: asyncio.run(reading(done)))
    assert ours.recv() == "ready"
    began = time.monotonic()
    asyncio.run(writing())
    found = result()
    return found if is_paced else count / (found - began)


def ratio(linked: Broadcaster[Any], alone: Broadcaster[Any], count: int) -> float:
    """Return how fast topics are that are not bridged, on a bus with a bridge, as a multiple of one without. In turns, so that
    what the machine does meanwhile is in both."""
    rates = {id(bus): 0.0 for bus in (linked, alone)}
    for bus in (linked, alone, alone, linked):
        rates[id(bus)] += through(bus, bus, "other", count)
    return rates[id(linked)] / rates[id(alone)]


PLAIN = {"redis": plain_redis, "nats": plain_nats}


def milliseconds(ages: list[float]) -> str:
    """Return the median and the 99th percentile of these seconds."""
    cuts = statistics.quantiles(ages, n=100)
    return f"{1000 * cuts[49]:.2f} / {1000 * cuts[98]:.2f} ms"


def measure(name: str, count: int, rounds: int) -> list[Row]:
    """Return the rows of one engine."""
    plain = PLAIN[name]
    rates: dict[str, list[float]] = {}
    singly = 0.0  # seconds of the engine's CPU for messages that come one by one
    ages: dict[str, list[float]] = {"plain": [], "bridge": [], "local": []}
    with engine(name) as (url, server), start_broadcaster() as left, start_broadcaster() as right, start_broadcaster() as alone:
        options: dict[str, Any] = {"topics": ["room:*"], "key": KEY, "overflow": "block"}
        with bridge(left, url, **options), bridge(right, url, **options):
            for _ in range(rounds):
                rates.setdefault("plain", []).append(plain(url, count, is_paced=False))
                for key, value in {**whole(left, right, server, 3 * count), **legs(left, right, url, count)}.items():
                    rates.setdefault(key, []).append(value)
                rates.setdefault("ratio", []).extend(ratio(left, alone, 4 * count) for _ in range(4))
                ages["plain"] += plain(url, PACED, is_paced=True)
                (before,) = cpu(server)
                ages["bridge"] += through(left, right, "room:1", PACED, is_paced=True)
                singly += cpu(server)[0] - before
                ages["local"] += through(left, left, "room:1", PACED, is_paced=True)
    middle = {key: statistics.median(values) for key, values in rates.items()}
    return [
        ("plain client, end to end", f"{middle['plain']:,.0f}/s"),
        ("two buses, end to end", f"{middle['both']:,.0f}/s"),
        ("the leg into the engine", f"{middle['out']:,.0f}/s"),
        ("the leg out of it", f"{middle['in']:,.0f}/s"),
        ("CPU of the engine for a message, once in and twice out", f"{middle['engine']:.1f} µs"),
        ("the same for messages that come one by one", f"{1e6 * singly / (PACED * rounds):.0f} µs"),
        (
            "CPU of the bridges for a message: that which sends, that which receives",
            f"{middle['sender']:.1f} / {middle['reader']:.1f} µs",
        ),
        ("latency of the plain client, p50 / p99", milliseconds(ages["plain"])),
        ("latency from bus to bus", milliseconds(ages["bridge"])),
        ("latency within one bus", milliseconds(ages["local"])),
        (
            "local topics, with a bridge : without",
            f"{middle['ratio']:.2f} ({min(rates['ratio']):.2f}-{max(rates['ratio']):.2f})",
        ),
    ]


def main() -> None:
    """Measure the engines, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridges", description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, action="append", help="one engine only")
    parser.add_argument("--count", type=int, default=20_000, metavar="N", help="messages of a round")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    for name in arguments.engine or ENGINES:
        if shutil.which(f"{name}-server") is None:
            print(f"skipped: {name}-server is not installed")
            continue
        print(f"\n| {name} | |\n|---|---|")
        for what, figure in measure(name, arguments.count, arguments.rounds):
            print(f"| {what} | {figure} |", flush=True)


if __name__ == "__main__":
    main()
