"""``multiprocessing.Pipe``: one for each subscriber, the publisher sends to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import Endpoint, Peer, Shape, Source, forever


@dataclass
class _Source(Source):
    writers: list[Connection]

    def open(self) -> None:
        sends = [writer.send for writer in self.writers]

        def publish(message: Any) -> None:
            for send in sends:
                send(message)

        self.publish = publish


@dataclass
class _Endpoint(Endpoint):
    reader: Connection

    def open(self) -> Iterator[Any]:
        return forever(self.reader.recv)


class Pipes(Peer):
    name = "multiprocessing.Pipe"
    setting = "one for each subscriber, send() to each"
    limits = "one publisher; a subscriber that stops reading blocks it; all subscribers are known before the start"
    most_publishers = 1

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        pairs = [context.Pipe(duplex=False) for _ in range(shape.subscribers)]
        self._readers = [reader for reader, _ in pairs]
        self._writers = [writer for _, writer in pairs]

    def source(self, index: int) -> Source:
        return _Source(self._writers)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._readers[index])

    def close(self) -> None:
        for connection in (*self._readers, *self._writers):
            connection.close()
