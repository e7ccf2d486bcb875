"""mmbus: a ring of slots in a mapped file, a wake-up for each subscriber; without its log on disk."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, Endpoint, Peer, Shape, Source, folder, module

_TOPIC = "all"


def _bus(base: str, shape: Shape) -> Any:
    slots = 1 << max(1, min(12, ((32 << 20) // shape.size).bit_length() - 1))
    options = {"capacity": slots, "slot_size": shape.size + 1024, "max_subscribers": shape.subscribers, "wal_enabled": False}
    return module("mmbus").Bus("benchmark", base_dir=base, **options)


@dataclass
class _Source(Source):
    base: str
    shape: Shape

    def open(self) -> None:
        full = module("mmbus").BusFullError
        publish_bytes, dumps = _bus(self.base, self.shape).topic(_TOPIC).publish, pickle.dumps

        def publish(message: Any) -> None:
            payload = dumps(message, PROTOCOL)
            while True:
                try:
                    publish_bytes(payload)
                    return
                except full:
                    os.sched_yield()

        self.publish = publish


@dataclass
class _Endpoint(Endpoint):
    base: str
    shape: Shape

    def open(self) -> Iterator[Any]:
        receive, loads = _bus(self.base, self.shape).subscribe(_TOPIC).recv_batch, pickle.loads
        most = 256 if self.shape.size < 1 << 20 else 1
        return (loads(payload) for payloads in iter(lambda: receive(most), None) for payload in payloads)


class Mmbus(Peer):
    name = "mmbus"
    setting = "2 to 4,096 slots, no log on disk, TopicPublisher.publish(), again while the ring is full; recv_batch()"
    waits = False
    limits = "one publisher for a topic; a full ring is an error, not a wait; a subscriber that is killed fills it for good"
    modules = ("mmbus",)
    packages = ("mmbus",)
    kinds = frozenset({"small", "bytes", "latency", "start"})
    most_publishers = 1

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._shape = shape
        self._folder = folder(in_memory=True)

    def source(self, index: int) -> Source:
        return _Source(self._folder.name, self._shape)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._folder.name, self._shape)

    def close(self) -> None:
        self._folder.cleanup()
