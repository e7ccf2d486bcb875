"""ZeroMQ through a broker: ``zmq.proxy`` between XSUB and XPUB, in a process of its own."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import Endpoint, Shape, Source, module
from benchmarks.peers.zeromq import ZeroMQ, ZeroMQEndpoint, ZeroMQSource, without_limits


def _proxy(front: str, back: str, ready: Connection) -> None:
    zmq = module("zmq")
    context = zmq.Context()
    publishers, subscribers = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
    without_limits(publishers)
    without_limits(subscribers)
    publishers.bind(front)
    subscribers.bind(back)
    ready.send(None)
    ready.close()
    zmq.proxy(publishers, subscribers)


class ZeroMQProxy(ZeroMQ):
    name = "pyzmq through zmq.proxy"
    setting = "PUB to XSUB and XPUB to SUB over ipc, the proxy in a process of its own, no high-water marks"
    limits = "no limit, or, with high-water marks, losses without notice"
    has_broker = True

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        super().__init__(context, shape)
        self._front, self._back = (f"ipc://{self._folder.name}/{end}" for end in ("front", "back"))
        ready, there = context.Pipe(duplex=False)
        self._process: Any = context.Process(  # type: ignore[attr-defined]
            target=_proxy, args=(self._front, self._back, there), daemon=True
        )
        self._process.start()
        there.close()
        start = time.monotonic()
        if not ready.poll(30):
            raise TimeoutError(f"the proxy has not started after {time.monotonic() - start:.0f} s")
        ready.recv()
        ready.close()

    def source(self, index: int) -> Source:
        return ZeroMQSource(self._front, self.shape, bind=False)

    def endpoint(self, index: int) -> Endpoint:
        return ZeroMQEndpoint([self._back], self.topics(index))

    def broker_pids(self) -> list[int]:
        return [self._process.pid]

    def close(self) -> None:
        self._process.kill()  # zmq.proxy has no other end
        self._process.join()
        super().close()
