"""kickmsg: a channel in shared memory, with a ring for each subscriber, which the publisher overwrites when it is full."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, Endpoint, Peer, Shape, Source, folder, module

_TURN = 0.1  # seconds for one wait


@dataclass
class _Source(Source):
    name: str

    def open(self) -> None:
        kickmsg = module("kickmsg")
        send, dumps = kickmsg.Publisher(kickmsg.SharedRegion.open(self.name)).send, pickle.dumps

        def publish(message: Any) -> None:
            payload = dumps(message, PROTOCOL)
            while True:
                try:
                    send(payload)
                    return
                except BlockingIOError:  # no slot is free
                    os.sched_yield()

        self.publish = publish


@dataclass
class _Endpoint(Endpoint):
    name: str

    def open(self) -> Iterator[Any]:
        kickmsg = module("kickmsg")
        return self._messages(kickmsg.Subscriber(kickmsg.SharedRegion.open(self.name)))

    def _messages(self, subscriber: Any) -> Iterator[Any]:
        receive, loads = subscriber.receive, pickle.loads
        while True:
            if (payload := receive(_TURN)) is not None:
                yield loads(payload)


class Kickmsg(Peer):
    name = "kickmsg"
    setting = "slots for 2 to 4,096 messages in each subscriber's ring, twice as many in the pool; the last message is repeated"
    waits = False
    limits = "loses: it overwrites what a slow subscriber has not read; the longest message and most subscribers are fixed"
    modules = ("kickmsg",)
    packages = ("kickmsg",)
    kinds = frozenset({"small", "bytes", "latency", "publishers", "start"})
    lossy = True

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        kickmsg = module("kickmsg")
        self._folder = folder()  # for a name that no other one has
        self._name = f"/{os.path.basename(self._folder.name)}"
        config = kickmsg.Config()
        config.max_subscribers = shape.subscribers
        config.sub_ring_capacity = 1 << max(1, min(12, ((64 << 20) // shape.size).bit_length() - 1))
        config.pool_size = 2 * config.sub_ring_capacity
        config.max_payload_size = shape.size + 1024
        kind = kickmsg.ChannelType.PubSub if shape.publishers == 1 else kickmsg.ChannelType.Broadcast
        self._region: Any = kickmsg.SharedRegion.create(self._name, kind, config)

    def source(self, index: int) -> Source:
        return _Source(self._name)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._name)

    def close(self) -> None:
        self._region.unlink()
        self._folder.cleanup()
