"""``multiprocessing.Queue``: one for each subscriber, the publisher puts into each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue

from benchmarks.peers.base import Endpoint, Message, Peer


@dataclass
class _Endpoint:
    queue: Queue[Message]

    def open(self) -> Iterable[Message]:
        return iter(self.queue.get, None)


class Queues(Peer):
    name = "multiprocessing.Queue"

    def __init__(self, context: BaseContext, subscribers: int) -> None:
        self._queues: list[Queue[Message]] = [context.Queue() for _ in range(subscribers)]
        puts = [queue.put for queue in self._queues]

        def publish(message: Message) -> None:
            for put in puts:
                put(message)

        self.publish = publish

    def endpoints(self) -> list[Endpoint]:
        return [_Endpoint(queue) for queue in self._queues]

    def close(self) -> None:
        for queue in self._queues:
            queue.cancel_join_thread()  # a subscriber that was given up on reads no more
            queue.close()
