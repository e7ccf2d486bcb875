"""NATS, through nats-py: a private ``nats-server`` on a free port of the loopback interface."""

from __future__ import annotations

import asyncio
import json
import pathlib
import pickle
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, TO_ALL, Endpoint, Peer, Shape, Source, end_program, folder, module

_LARGEST = 512 << 20


async def _connect(address: str) -> Any:
    options = {"allow_reconnect": False, "pending_size": _LARGEST, "max_outstanding_pings": 1000, "connect_timeout": 10}
    return await module("nats").connect(address, error_cb=_ignore, **options)


async def _ignore(error: Exception) -> None:
    """What is wrong is seen in what is missing."""


@dataclass
class _Source(Source):
    address: str
    loop: Any = field(default=None, init=False)
    client: Any = field(default=None, init=False)

    def open(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(_connect(self.address))
        self.publish = lambda message: self.loop.run_until_complete(self._now(message))

    async def _now(self, message: Any) -> None:
        await self.client.publish(TO_ALL, pickle.dumps(message, PROTOCOL))
        await asyncio.sleep(0)  # its flusher, a task, writes
        await asyncio.sleep(0)

    def publish_all(self, messages: Iterable[Any]) -> None:
        self.publish_topics((TO_ALL, message) for message in messages)

    def publish_topics(self, messages: Iterable[tuple[str, Any]]) -> None:
        self.loop.run_until_complete(self._all(messages))

    async def _all(self, messages: Iterable[tuple[str, Any]]) -> None:
        publish, dumps, flush = self.client.publish, pickle.dumps, self.client.flush
        waiting = 0
        for topic, message in messages:
            payload = dumps(message, PROTOCOL)
            await publish(topic, payload)
            waiting += 100 + len(payload)
            if waiting > 1 << 20:
                await flush(600)
                waiting = 0
        await flush(600)

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())


@dataclass
class _Endpoint(Endpoint):
    address: str
    topics: tuple[str, ...]
    loop: Any = field(default=None, init=False)
    client: Any = field(default=None, init=False)

    def open(self) -> Iterator[Any]:
        self.loop = asyncio.new_event_loop()
        arrived: list[bytes] = []
        some = asyncio.Event()

        async def receive(message: Any) -> None:
            arrived.append(message.data)
            some.set()

        async def subscribe() -> None:
            self.client = await _connect(self.address)
            for topic in self.topics:
                await self.client.subscribe(topic, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0)
            await self.client.flush(60)

        async def take() -> list[bytes]:
            await some.wait()
            some.clear()
            taken = arrived.copy()
            arrived.clear()
            return taken

        self.loop.run_until_complete(subscribe())
        return (
            pickle.loads(payload)
            for payloads in iter(lambda: self.loop.run_until_complete(take()), None)
            for payload in payloads
        )

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())


class NATS(Peer):
    name = "nats"
    setting = "nats-server on the loopback interface, max_payload and max_pending raised; flush() after every 1 MiB; callbacks"
    limits = "at most once: a slow or disconnected subscriber loses; no limit here"
    modules = ("nats",)
    packages = ("nats-py",)
    program = "nats-server"
    has_topics = has_broker = True
    largest = 64 << 20  # with more, a row takes minutes

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._shape = shape
        self._folder = folder()
        settings = pathlib.Path(self._folder.name, "nats.conf")
        settings.write_text(f"max_payload: {_LARGEST}\nmax_pending: {8 << 30}\nwrite_deadline: '600s'\n")
        command = ["nats-server", "-a", "127.0.0.1", "-p", "-1", "-c", str(settings), "--ports_file_dir", self._folder.name]
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._address = self._await()
        except BaseException:
            self.close()
            raise

    def _await(self) -> str:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for file in pathlib.Path(self._folder.name).glob("*.ports"):
                try:
                    return str(json.loads(file.read_text())["nats"][0])
                except ValueError:  # half of it is written
                    pass
            if self._server.poll() is not None:
                raise RuntimeError(f"nats-server has ended with {self._server.returncode}")
            time.sleep(0.002)
        raise TimeoutError("nats-server has not started after 10 s")

    def source(self, index: int) -> Source:
        return _Source(self._address)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._address, self._shape.topics[index] if self._shape.topics else (TO_ALL,))

    def broker_pids(self) -> list[int]:
        return [self._server.pid]

    def close(self) -> None:
        end_program(self._server)
        self._folder.cleanup()
