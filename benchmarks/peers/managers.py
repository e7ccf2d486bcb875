"""Queues of a ``multiprocessing`` manager: one for each subscriber, all in the manager's process."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.managers import SyncManager
from typing import Any

from benchmarks.peers.base import Endpoint, Peer, Shape, Source, forever


@dataclass
class _Source(Source):
    queues: list[queue.Queue[Any]]

    def open(self) -> None:
        puts = [each.put for each in self.queues]

        def publish(message: Any) -> None:
            for put in puts:
                put(message)

        self.publish = publish


@dataclass
class _Endpoint(Endpoint):
    queue: queue.Queue[Any]

    def open(self) -> Iterator[Any]:
        return forever(self.queue.get)


class Managers(Peer):
    name = "multiprocessing Manager queue"
    setting = "one Manager().Queue() for each subscriber, put() into each: two round trips for each delivery"
    limits = "no one order of several publishers; no limit, and no notice of a subscriber that is gone"
    has_broker = True
    largest = 64 << 20  # with more, a row takes minutes

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._manager: SyncManager = context.Manager()
        self._queues = [self._manager.Queue() for _ in range(shape.subscribers)]

    def source(self, index: int) -> Source:
        return _Source(self._queues)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._queues[index])

    def broker_pids(self) -> list[int]:
        process: Any = self._manager._process  # type: ignore[attr-defined]
        return [process.pid]

    def close(self) -> None:
        self._manager.shutdown()
