"""ZeroMQ: a publisher socket bound to an ``ipc`` address, without high-water marks, so that it drops nothing.

Its socket type is XPUB, which is PUB that also lets the publisher read who has subscribed: so each subscriber has
joined before the first message is sent.
"""

from __future__ import annotations

import importlib.util
import pickle
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import Endpoint, Message, Peer

_PROTOCOL = 5


@dataclass
class _Endpoint:
    address: str

    def open(self) -> Iterable[Message]:
        import zmq

        socket: Any = zmq.Context().socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(self.address)
        return map(pickle.loads, iter(socket.recv, None))


class ZeroMQ(Peer):
    name = "ZeroMQ PUB/SUB (pyzmq)"

    def __init__(self, context: BaseContext, subscribers: int) -> None:
        self._subscribers = subscribers
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._address = f"ipc://{self._folder.name}/publisher"
        self._context: Any = None

    @classmethod
    def missing(cls) -> str | None:
        return None if importlib.util.find_spec("zmq") else "pyzmq is not installed"

    def endpoints(self) -> list[Endpoint]:
        return [_Endpoint(self._address)] * self._subscribers

    def join(self) -> None:
        import zmq

        self._context = zmq.Context()  # only now: its threads must not be there at a fork
        socket: Any = self._context.socket(zmq.XPUB)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        socket.bind(self._address)
        for _ in range(self._subscribers):
            socket.recv()
        send, dumps = socket.send, pickle.dumps

        def publish(message: Message) -> None:
            send(dumps(message, _PROTOCOL))

        self.publish = publish

    def close(self) -> None:
        if self._context is not None:
            self._context.destroy(linger=0)
        self._folder.cleanup()
