"""faster-fifo: one queue for each subscriber, a ring buffer in shared memory; the subscribers call ``get_many()``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import Endpoint, Peer, Shape, Source, module

_FOREVER = 1e6


@dataclass
class _Source(Source):
    queues: list[Any]

    def open(self) -> None:
        puts = [queue.put for queue in self.queues]

        def publish(message: Any) -> None:
            for put in puts:
                put(message, timeout=_FOREVER)

        self.publish = publish


@dataclass
class _Endpoint(Endpoint):
    queue: Any

    def open(self) -> Iterator[Any]:
        get_many = self.queue.get_many
        return (message for messages in iter(lambda: get_many(timeout=_FOREVER), None) for message in messages)


class FasterFifo(Peer):
    name = "faster-fifo"
    setting = "one queue for each subscriber, put() into each, get_many(); each has room for 16 MiB, or for two messages"
    limits = "no one order of several publishers; a subscriber that is gone blocks the publishers once its queue is full"
    modules = ("faster_fifo",)
    packages = ("faster-fifo",)

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        room = max(16 << 20, 2 * shape.size + (1 << 16))
        self._queues = [module("faster_fifo").Queue(room) for _ in range(shape.subscribers)]

    def source(self, index: int) -> Source:
        return _Source(self._queues)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._queues[index])

    def close(self) -> None:
        for queue in self._queues:
            queue.close()
        self._queues = []
