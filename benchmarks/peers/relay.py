"""A process that reads a pipe and writes what it has read to a pipe of each subscriber, and looks at nothing.

It is no peer, as it keeps no promise: what it takes is what a message through any broker takes at least. It polls before it
reads, as a broker with more than one publisher must. Every message is padded to one length, so that each read of a subscriber
is one message.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, Endpoint, Peer, Shape, Source, forever

_LENGTH = 128  # bytes; a write of so many to a pipe is not mixed with that of another publisher
_MOST = 512 * _LENGTH  # that the relay reads at once


def _relay(source: Connection, sinks: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that measures
    reader, writers, read, write = source.fileno(), [sink.fileno() for sink in sinks], os.read, os.write
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    while poller.poll():
        data = read(reader, _MOST)
        for writer in writers:
            write(writer, data)


@dataclass
class _Source(Source):
    writer: Connection

    def open(self) -> None:
        fd, write, dumps = self.writer.fileno(), os.write, pickle.dumps

        def publish(message: Any) -> None:
            write(fd, dumps(message, PROTOCOL).ljust(_LENGTH, b"\0"))

        self.publish = publish


@dataclass
class _Endpoint(Endpoint):
    reader: Connection

    def open(self) -> Iterator[Any]:
        fd, read, loads, poller = self.reader.fileno(), os.read, pickle.loads, select.poll()
        poller.register(fd, select.POLLIN)

        def receive() -> Any:
            poller.poll()
            return loads(read(fd, _LENGTH))

        return forever(receive)


class Relay(Peer):
    name = "relay that does nothing"
    setting = "a process that reads a pipe and writes to one for each subscriber, without a look at what it has read"
    limits = "promises nothing: the floor of the latency through a broker"
    kinds = frozenset({"latency"})
    has_broker = True
    is_floor = True

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._reader, self._writer = context.Pipe(duplex=False)
        self._pairs = [context.Pipe(duplex=False) for _ in range(shape.subscribers)]
        sinks = [writer for _, writer in self._pairs]
        self._process: Any = context.Process(target=_relay, args=(self._reader, sinks), daemon=True)  # type: ignore[attr-defined]
        self._process.start()

    def source(self, index: int) -> Source:
        return _Source(self._writer)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._pairs[index][0])

    def broker_pids(self) -> list[int]:
        return [self._process.pid]

    def close(self) -> None:
        self._process.kill()  # it has no other end
        self._process.join()
        for connection in (self._reader, self._writer, *(end for pair in self._pairs for end in pair)):
            connection.close()
