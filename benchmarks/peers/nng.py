"""nng, through pynng: Pub0/Sub0, its fan-out, which drops for a slow subscriber; and a Pair0 for each, which does not."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, Endpoint, Peer, Shape, Source, folder, module

_MOST = 8192  # messages: the longest queue that nng has


def _buffer(size: int) -> int:
    return max(4, min(_MOST, (64 << 20) // size))


@dataclass
class _Source(Source):
    kind: str
    addresses: list[str]
    size: int
    sockets: list[Any] = field(default_factory=list, init=False)

    def open(self) -> None:
        make = getattr(module("pynng"), self.kind)
        self.sockets = [make(listen=address, send_buffer_size=_buffer(self.size)) for address in self.addresses]
        sends, dumps = [socket.send for socket in self.sockets], pickle.dumps

        def publish(message: Any) -> None:
            payload = dumps(message, PROTOCOL)
            for send in sends:
                send(payload)

        self.publish = publish

    def close(self) -> None:
        for socket in self.sockets:
            socket.close()


@dataclass
class _Endpoint(Endpoint):
    kind: str
    addresses: list[str]
    size: int
    socket: Any = field(default=None, init=False)

    def open(self) -> Iterator[Any]:
        options = {"topics": b""} if self.kind == "Sub0" else {}
        self.socket = getattr(module("pynng"), self.kind)(
            recv_buffer_size=_buffer(self.size), recv_max_size=0, reconnect_time_min=1, **options
        )
        for address in self.addresses:
            self.socket.dial(address, block=True)
        return map(pickle.loads, iter(self.socket.recv, None))

    def close(self) -> None:
        self.socket.close()


class PubSub(Peer):
    name = "pynng Pub0/Sub0"
    setting = (
        "ipc, the longest buffers; drops what a subscriber has no room for; its last message is repeated until all have it"
    )
    limits = "loses without notice; no one order of several publishers"
    modules = ("pynng",)
    packages = ("pynng",)
    lossy = True

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._folder = folder()
        self._size = shape.size
        self._addresses = [f"ipc://{self._folder.name}/{index}" for index in range(shape.publishers)]

    def source(self, index: int) -> Source:
        return _Source("Pub0", [self._addresses[index]], self._size)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint("Sub0", self._addresses, self._size)

    def close(self) -> None:
        self._folder.cleanup()


class Pairs(PubSub):
    name = "pynng Pair0"
    setting = "ipc, a Pair0 for each subscriber, the longest buffers; send() to each, which waits when it is full"
    limits = "one publisher; a subscriber that stops reading blocks it"
    lossy = False
    most_publishers = 1

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        super().__init__(context, shape)
        self._addresses = [f"ipc://{self._folder.name}/{index}" for index in range(shape.subscribers)]

    def source(self, index: int) -> Source:
        return _Source("Pair0", self._addresses, self._size)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint("Pair0", [self._addresses[index]], self._size)
