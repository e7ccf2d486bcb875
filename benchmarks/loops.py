"""``python -m benchmarks.loops``: how late an event loop is while its tasks wait in this library.

A task publishes to a subscriber in another process that is too slow for it, so it waits for room all the time; a second one
receives what a third process publishes; a third one sleeps for 10 ms again and again. Printed is how much longer than that it
took it, under each loop that is installed. Nothing is asserted: it is the machine's answer as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from mpbroadcast import Broadcaster, Channel, start_broadcaster

TICK = 0.010  # seconds
PAUSE = 0.002  # seconds that the slow subscriber takes for each list of messages
CAPACITY = 100_000  # bytes of its backlog
LOOPS = ("asyncio", "uvloop", "trio")

Sleep = Callable[[float], Awaitable[None]]


def receive_slowly(channel: Channel[Any]) -> None:
    """Receive until the end, and pause again and again."""
    with contextlib.suppress(EOFError):
        while True:
            channel.recv_many(20)
            time.sleep(PAUSE)


def publish_often(bus: Broadcaster[Any], seconds: float) -> None:
    """Publish some hundred messages a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        bus.publish_many(range(5), topic="in")
        time.sleep(TICK)


async def publish(bus: Broadcaster[Any], counts: list[int]) -> None:
    message = bytes(1000)
    while True:
        await bus.apublish(message, topic="out")
        counts[0] += 1


async def receive(channel: Channel[Any], counts: list[int]) -> None:
    while True:
        await channel.arecv()
        counts[1] += 1


async def tick(sleep: Sleep, seconds: float) -> list[float]:
    """Return by how much each sleep was too long, in seconds."""
    late = []
    end = time.monotonic() + seconds
    while (begin := time.monotonic()) < end:
        await sleep(TICK)
        late.append(time.monotonic() - begin - TICK)
    return late


async def in_asyncio(bus: Broadcaster[Any], channel: Channel[Any], counts: list[int], seconds: float) -> list[float]:
    tasks = [asyncio.create_task(publish(bus, counts)), asyncio.create_task(receive(channel, counts))]
    late = await tick(asyncio.sleep, seconds)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return late


async def in_trio(bus: Broadcaster[Any], channel: Channel[Any], counts: list[int], seconds: float) -> list[float]:
    import trio

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish, bus, counts)
        nursery.start_soon(receive, channel, counts)
        late = await tick(trio.sleep, seconds)
        nursery.cancel_scope.cancel()
    return late


def run(name: str, *arguments: Any) -> list[float]:
    """Return how late the ticks were under this loop."""
    if name == "trio":
        import trio

        late: list[float] = trio.run(in_trio, *arguments)
        return late
    if name == "uvloop":
        import uvloop

        return uvloop.run(in_asyncio(*arguments))
    return asyncio.run(in_asyncio(*arguments))


def measure(name: str, seconds: float) -> str:
    """Return a line about one loop."""
    counts = [0, 0]  # messages that were published, and received
    with start_broadcaster() as bus, bus.subscribe("in") as channel:
        slow = bus.subscribe("out", capacity=CAPACITY)
        others = [
            multiprocessing.Process(target=receive_slowly, args=(slow,)),
            multiprocessing.Process(target=publish_often, args=(bus, seconds)),
        ]
        for other in others:
            other.start()
        late = run(name, bus, channel, counts, seconds)
        bus.unsubscribe(slow)
        for other in others:
            other.join()
    cuts = [1000 * cut for cut in statistics.quantiles(late, n=100)]
    return (
        f"{name:8} late by {cuts[49]:.2f} ms (median), {cuts[98]:.2f} ms (p99), {1000 * max(late):.2f} ms (most); "
        f"{counts[0] / seconds:,.0f} published and {counts[1] / seconds:,.0f} received a second"
    )


def main() -> None:
    """Measure each loop that is installed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="for each loop")
    arguments = parser.parse_args()
    for name in LOOPS:
        if importlib.util.find_spec(name) is None:
            print(f"skipped: {name} is not installed")
        else:
            print(measure(name, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
