"""ZeroMQ for large data: the buffers travel beside the pickle, each in a frame of its own, and only ZeroMQ copies them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from benchmarks.peers.base import PROTOCOL, Endpoint, Shape, Source
from benchmarks.peers.zeromq import ZeroMQ, ZeroMQEndpoint, ZeroMQSource


class _Source(ZeroMQSource):
    def make_publish(self) -> Any:
        send, dumps, buffer = self.socket.send_multipart, pickle.dumps, pickle.PickleBuffer

        def publish(message: Any) -> None:
            buffers: list[pickle.PickleBuffer] = []
            if type(message) is bytes:  # these have no out-of-band way of their own
                message = buffer(message)
            head = dumps(message, PROTOCOL, buffer_callback=buffers.append)
            send([head, *buffers], copy=False)

        return publish


class _Endpoint(ZeroMQEndpoint):
    def messages(self, socket: Any) -> Iterator[Any]:
        receive, loads = socket.recv_multipart, pickle.loads
        while True:
            head, *frames = receive(copy=False)
            yield loads(head.buffer, buffers=[frame.buffer for frame in frames])


class ZeroMQLarge(ZeroMQ):
    name = "pyzmq PUB/SUB, out-of-band"
    setting = "as pyzmq PUB/SUB, pickle 5 with buffers as frames of their own, copy=False both ways; bytes come as memoryview"
    kinds = frozenset({"bytes", "array"})

    @classmethod
    def unfit(cls, shape: Shape) -> str | None:
        return "" if shape.size < 65_536 else super().unfit(shape)

    def source(self, index: int) -> Source:
        return _Source(self.addresses[index], self.shape)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self.addresses, None)
