"""``multiprocessing.Pipe``: one for each subscriber, the publisher sends to each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

from benchmarks.peers.base import Endpoint, Message, Peer


@dataclass
class _Endpoint:
    connection: Connection

    def open(self) -> Iterable[Message]:
        return iter(self.connection.recv, None)


class Pipes(Peer):
    name = "multiprocessing.Pipe"

    def __init__(self, context: BaseContext, subscribers: int) -> None:
        pairs = [context.Pipe(duplex=False) for _ in range(subscribers)]
        self._readers = [reader for reader, _ in pairs]
        self._writers = [writer for _, writer in pairs]
        sends = [writer.send for writer in self._writers]

        def publish(message: Message) -> None:
            for send in sends:
                send(message)

        self.publish = publish

    def endpoints(self) -> list[Endpoint]:
        return [_Endpoint(reader) for reader in self._readers]

    def close(self) -> None:
        for connection in (*self._readers, *self._writers):
            connection.close()
