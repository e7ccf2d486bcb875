"""ezmsg: its low-level ``Publisher`` and ``Subscriber``, with shared memory, and its graph server in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import Endpoint, Peer, Shape, Source, module

_TOPIC = "benchmark"


def _serve(there: Connection) -> None:
    logging.disable()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *unused: ended.set())
    server = module("ezmsg.core.graphserver").GraphServer()
    server.start(("127.0.0.1", 0))
    there.send(tuple(server.address))
    ended.wait()
    server.stop()


@dataclass
class _Source(Source):
    address: tuple[str, int]
    size: int
    loop: Any = field(default=None, init=False)
    publisher: Any = field(default=None, init=False)

    def open(self) -> None:
        logging.disable()
        self.loop = asyncio.new_event_loop()  # it has to run all the time, for those who connect
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        make = module("ezmsg.core.pubclient").Publisher.create
        buffers = 32 if self.size < 1 << 22 else 2
        self.publisher = self._run(
            make(_TOPIC, self.address, host="127.0.0.1", buf_size=max(1 << 16, self.size + (1 << 16)), num_buffers=buffers)
        )
        self.publish = lambda message: self._run(self.publisher.broadcast(message))

    def _run(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result()

    def publish_all(self, messages: Iterable[Any]) -> None:
        self._run(self._all(messages))

    async def _all(self, messages: Iterable[Any]) -> None:
        broadcast = self.publisher.broadcast
        for message in messages:
            await broadcast(message)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.publisher.close)
        self._run(self.publisher.wait_closed())


@dataclass
class _Endpoint(Endpoint):
    address: tuple[str, int]
    loop: Any = field(default=None, init=False)
    subscriber: Any = field(default=None, init=False)

    def open(self) -> Iterator[Any]:
        logging.disable()
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        make = module("ezmsg.core.subclient").Subscriber.create
        self.subscriber = self.loop.run_until_complete(make(_TOPIC, self.address))
        return self._messages()

    def _messages(self) -> Iterator[Any]:
        run, receive = self.loop.run_until_complete, self.subscriber.recv_zero_copy
        while True:
            lease = receive()
            yield run(lease.__aenter__())
            run(lease.__aexit__(None, None, None))

    def close(self) -> None:
        self.subscriber.close()
        self.loop.run_until_complete(self.subscriber.wait_closed())


class Ezmsg(Peer):
    name = "ezmsg"
    setting = "Publisher.broadcast() and Subscriber.recv_zero_copy(), shared memory, 32 buffers, or 2 of large messages"
    limits = "no one order of several publishers; a received array has to be given back before the buffers run out"
    modules = ("ezmsg.core",)
    packages = ("ezmsg",)
    has_broker = True

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._size = shape.size
        answer, there = context.Pipe(duplex=False)
        self._process: Any = context.Process(target=_serve, args=(there,), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        there.close()
        if not answer.poll(30):
            self.close()
            raise TimeoutError("the graph server has not started after 30 s")
        self._address: tuple[str, int] = answer.recv()
        answer.close()

    def source(self, index: int) -> Source:
        return _Source(self._address, self._size)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._address)

    def broker_pids(self) -> list[int]:
        return [self._process.pid]

    def close(self) -> None:
        self._process.terminate()
        self._process.join(5)
        self._process.kill()
        self._process.join()
