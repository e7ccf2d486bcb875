"""``multiprocessing.Queue``: one for each subscriber, the publisher puts into each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from typing import Any

from benchmarks.peers.base import Endpoint, Peer, Shape, Source, forever


@dataclass
class _Source(Source):
    queues: list[Queue[Any]]

    def open(self) -> None:
        puts = [queue.put for queue in self.queues]

        def publish(message: Any) -> None:
            for put in puts:
                put(message)

        self.publish = publish

    def close(self) -> None:
        for queue in self.queues:
            queue.cancel_join_thread()  # a subscriber that was given up on reads no more
            queue.close()


@dataclass
class _Endpoint(Endpoint):
    queue: Queue[Any]

    def open(self) -> Iterator[Any]:
        return forever(self.queue.get)


class Queues(Peer):
    name = "multiprocessing.Queue"
    setting = "one for each subscriber, put() into each, without a limit"
    limits = "no one order of several publishers; no limit; a process killed in put() or get() can block a queue for good"

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._queues: list[Queue[Any]] = [context.Queue() for _ in range(shape.subscribers)]

    def source(self, index: int) -> Source:
        return _Source(self._queues)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._queues[index])

    def close(self) -> None:
        for queue in self._queues:
            queue.cancel_join_thread()
            queue.close()
