"""Redis pub/sub, through redis-py: a private ``redis-server`` on a Unix socket."""

from __future__ import annotations

import pickle
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, TO_ALL, Endpoint, Peer, Shape, Source, end_program, folder, module


@dataclass
class _Source(Source):
    address: str
    client: Any = field(default=None, init=False)

    def open(self) -> None:
        self.client = module("redis").Redis(unix_socket_path=self.address)
        publish, dumps = self.client.publish, pickle.dumps
        self.publish = lambda message: publish(TO_ALL, dumps(message, PROTOCOL))

    def publish_all(self, messages: Iterable[Any]) -> None:
        self.publish_topics((TO_ALL, message) for message in messages)

    def publish_topics(self, messages: Iterable[tuple[str, Any]]) -> None:
        dumps = pickle.dumps
        pipeline = self.client.pipeline(transaction=False)
        waiting = 0
        for topic, message in messages:
            payload = dumps(message, PROTOCOL)
            pipeline.publish(topic, payload)
            waiting += 1024 + len(payload)
            if waiting > 100 * 1024:
                pipeline.execute()
                waiting = 0
        pipeline.execute()

    def close(self) -> None:
        self.client.close()


@dataclass
class _Endpoint(Endpoint):
    address: str
    topics: tuple[str, ...]
    client: Any = field(default=None, init=False)

    def open(self) -> Iterator[Any]:
        self.client = module("redis").Redis(unix_socket_path=self.address)
        subscription = self.client.pubsub(ignore_subscribe_messages=True)
        names = [topic for topic in self.topics if not topic.endswith("*")]
        patterns = [topic for topic in self.topics if topic.endswith("*")]
        if names:
            subscription.subscribe(*names)
        if patterns:
            subscription.psubscribe(*patterns)
        return (pickle.loads(message["data"]) for message in subscription.listen() if message)

    def close(self) -> None:
        self.client.close()


class Redis(Peer):
    name = "redis pub/sub"
    setting = (
        "redis-server on a Unix socket, no saving, no limit for a slow subscriber; hiredis; publishes in pipelines of up to 100"
    )
    limits = "at most once: a slow or disconnected subscriber loses; no limit here"
    modules = ("redis", "hiredis")
    packages = ("redis", "hiredis")
    program = "redis-server"
    has_topics = has_broker = True
    largest = 64 << 20  # with more, a row takes minutes

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._shape = shape
        self._folder = folder()
        self._address = f"{self._folder.name}/redis.sock"
        options = {
            "port": "0",
            "unixsocket": self._address,
            "dir": self._folder.name,
            "save": "",
            "appendonly": "no",
            "client-output-buffer-limit": "pubsub 0 0 0",
        }
        command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def _await(self) -> None:
        redis = module("redis")
        deadline = time.monotonic() + 10
        while True:
            try:
                with redis.Redis(unix_socket_path=self._address) as client:
                    client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline or self._server.poll() is not None:
                    raise
                time.sleep(0.002)

    def source(self, index: int) -> Source:
        return _Source(self._address)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._address, self._shape.topics[index] if self._shape.topics else (TO_ALL,))

    def broker_pids(self) -> list[int]:
        return [self._server.pid]

    def close(self) -> None:
        end_program(self._server)
        self._folder.cleanup()
