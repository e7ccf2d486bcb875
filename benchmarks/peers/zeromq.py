"""ZeroMQ: publisher sockets bound to ``ipc`` addresses, without high-water marks, so that they drop nothing.

Topics are the first frame of a message; a pattern is a prefix.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, TO_ALL, Endpoint, Peer, Shape, Source, folder, module


@dataclass
class ZeroMQSource(Source):
    address: str
    shape: Shape
    bind: bool = True
    context: Any = field(default=None, init=False)
    socket: Any = field(default=None, init=False)

    def open(self) -> None:
        zmq = module("zmq")
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PUB)
        without_limits(self.socket)
        if self.bind:
            self.socket.bind(self.address)
        else:
            self.socket.connect(self.address)
        self.publish = self.make_publish()

    def make_publish(self) -> Any:
        send, dumps = self.socket.send, pickle.dumps
        if self.shape.topics is None:
            return lambda message: send(dumps(message, PROTOCOL))
        send_multipart, topic = self.socket.send_multipart, TO_ALL.encode()
        return lambda message: send_multipart([topic, dumps(message, PROTOCOL)])

    def publish_topics(self, messages: Iterable[tuple[str, Any]]) -> None:
        send, dumps = self.socket.send_multipart, pickle.dumps
        for topic, message in messages:
            send([topic.encode(), dumps(message, PROTOCOL)])

    def close(self) -> None:
        self.context.destroy(linger=0)


@dataclass
class ZeroMQEndpoint(Endpoint):
    addresses: list[str]
    topics: tuple[str, ...] | None
    context: Any = field(default=None, init=False)

    def open(self) -> Iterator[Any]:
        zmq = module("zmq")
        self.context = zmq.Context()
        socket = self.context.socket(zmq.SUB)
        without_limits(socket)
        for topic in ("",) if self.topics is None else self.topics:
            socket.setsockopt(zmq.SUBSCRIBE, topic.removesuffix("*").encode())
        for address in self.addresses:
            socket.connect(address)
        return self.messages(socket)

    def messages(self, socket: Any) -> Iterator[Any]:
        if self.topics is None:
            return map(pickle.loads, iter(socket.recv, None))
        return (pickle.loads(payload) for _, payload in iter(socket.recv_multipart, None))

    def close(self) -> None:
        self.context.destroy(linger=0)


def without_limits(socket: Any) -> None:
    """Both ways: subscriptions travel against the messages, and those that find no room are dropped, too."""
    zmq = module("zmq")
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)


class ZeroMQ(Peer):
    name = "pyzmq PUB/SUB"
    setting = "PUB to SUB over ipc, no high-water marks; with several publishers, subscribers connect to each"
    limits = "no one order of several publishers; no limit, or, with high-water marks, losses without notice"
    modules = ("zmq",)
    packages = ("pyzmq",)
    has_topics = True

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self.shape = shape
        self._folder = folder()
        self.addresses = [f"ipc://{self._folder.name}/{index}" for index in range(shape.publishers)]

    def topics(self, index: int) -> tuple[str, ...] | None:
        return None if self.shape.topics is None else self.shape.topics[index]

    def source(self, index: int) -> Source:
        return ZeroMQSource(self.addresses[index], self.shape)

    def endpoint(self, index: int) -> Endpoint:
        return ZeroMQEndpoint(self.addresses, self.topics(index))

    def close(self) -> None:
        self._folder.cleanup()
