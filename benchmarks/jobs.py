"""``python -m benchmarks.jobs``: how long workers take for many short jobs, which they share.

Each job sleeps, for 1 to 20 ms by default. Printed is the time from the first job to the end of the last worker, and what that
is of the best possible: all sleeping, divided by the workers. Compared are a group of this library, with a ``prefetch`` of 1
and of 32, a ``multiprocessing.Queue``, and a ``ProcessPoolExecutor``. Nothing is asserted: it is the machine's answer as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue, SimpleQueue
from typing import Any

from mpbroadcast import Broadcaster, start_broadcaster

Ready = SimpleQueue[int]


def work_in_group(bus: Broadcaster[float], prefetch: int, ready: Ready) -> None:
    with bus.subscribe("jobs", group="workers", prefetch=prefetch) as jobs:
        jobs.fileno()
        ready.put(1)
        for seconds in jobs:
            time.sleep(seconds)


def work_from_queue(jobs: Queue[float | None], ready: Ready) -> None:
    ready.put(1)
    while (seconds := jobs.get()) is not None:
        time.sleep(seconds)


def started(count: int, target: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """Start so many processes, and wait until each works."""
    ready: Ready = multiprocessing.SimpleQueue()
    workers = [multiprocessing.Process(target=target, args=(*arguments, ready)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.get()
    return [*workers]


def in_group(jobs: list[float], count: int, prefetch: int) -> float:
    with start_broadcaster() as bus:
        workers = started(count, work_in_group, bus, prefetch)
        begin = time.monotonic()
        bus.publish_many(jobs, topic="jobs")
        bus.close(timeout=None)
        for worker in workers:
            worker.join()
    return time.monotonic() - begin


def in_queue(jobs: list[float], count: int) -> float:
    queue: Queue[float | None] = multiprocessing.Queue()
    workers = started(count, work_from_queue, queue)
    begin = time.monotonic()
    for job in (*jobs, *[None] * count):
        queue.put(job)
    for worker in workers:
        worker.join()
    return time.monotonic() - begin


def in_executor(jobs: list[float], count: int) -> float:
    with ProcessPoolExecutor(count) as executor:
        [*executor.map(time.sleep, [0.1] * count)]  # starts all
        begin = time.monotonic()
        [*executor.map(time.sleep, jobs)]
        return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--shortest", type=float, default=1.0, help="milliseconds")
    parser.add_argument("--longest", type=float, default=20.0, help="milliseconds")
    arguments = parser.parse_args()
    choose = random.Random(1)
    jobs = [choose.uniform(arguments.shortest, arguments.longest) / 1000 for _ in range(arguments.jobs)]
    best = sum(jobs) / arguments.workers
    print(f"{arguments.jobs:,} jobs, {arguments.workers} workers: {best:.2f} s at best")
    kinds: dict[str, Callable[[list[float], int], float]] = {
        "group, prefetch=1": partial(in_group, prefetch=1),
        "group, prefetch=32": partial(in_group, prefetch=32),
        "multiprocessing.Queue": in_queue,
        "ProcessPoolExecutor": in_executor,
    }
    for name, measure in kinds.items():
        seconds = measure(jobs, arguments.workers)
        print(f"{name:24} {seconds:8.2f} s, {seconds / best:.3f} of that")


if __name__ == "__main__":
    main()
