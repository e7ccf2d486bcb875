"""This library: ``bus.publish(message)`` one by one, one channel a subscriber."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.context import BaseContext
from typing import Any, ClassVar, cast

from benchmarks.peers.base import TO_ALL, Endpoint, Peer, Shape, Source
from mpbroadcast import Broadcaster, Channel, start_broadcaster


@dataclass
class _Source(Source):
    bus: Broadcaster[Any]
    topics: bool

    def open(self) -> None:
        publish = self.bus.publish
        self.publish = partial(publish, topic=TO_ALL) if self.topics else publish

    def publish_topics(self, messages: Iterable[tuple[str, Any]]) -> None:
        publish = self.bus.publish
        for topic, message in messages:
            publish(message, topic=topic)


@dataclass
class _Endpoint(Endpoint):
    bus: Broadcaster[Any]
    topics: tuple[str, ...]
    overflow: str
    capacity: int | None
    way: str  # of receiving

    def open(self) -> Iterator[Any]:
        channel: Channel[Any] = self.bus.subscribe(*self.topics, overflow=cast(Any, self.overflow), capacity=self.capacity)
        channel.poll(0)  # the first use opens it
        if self.way == "recv_many":
            return chain.from_iterable(iter(channel.recv_many, None))
        return iter(channel) if self.way == "for" else iter(channel.recv, None)


class Broadcast(Peer):
    """The subscribers call ``recv_many()``."""

    name = "mpbroadcast, recv_many()"
    setting = 'the defaults: overflow="block", 64 MiB for each subscription; subscribers call recv_many()'
    packages = ("mpbroadcast",)
    kinds = frozenset({"small", "bytes", "array", "publishers", "topics", "memory", "start"})
    has_topics = has_broker = True
    overflow: ClassVar[str] = "block"
    capacity: ClassVar[int | None] = None
    way: ClassVar[str] = "recv_many"

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._shape = shape
        self._bus: Broadcaster[Any] = start_broadcaster(context=context)

    @classmethod
    def version(cls) -> str:
        try:
            return super().version()
        except ModuleNotFoundError:  # a checkout that is not installed
            return "mpbroadcast of this checkout"

    def source(self, index: int) -> Source:
        return _Source(self._bus, self._shape.topics is not None)

    def endpoint(self, index: int) -> Endpoint:
        topics = self._shape.topics[index] if self._shape.topics else ()
        return _Endpoint(self._bus, topics, self.overflow, self.capacity, self.way)

    def broker_pids(self) -> list[int]:
        return [self._bus.stats().pid]

    def close(self) -> None:
        self._bus.close(timeout=1)


class BroadcastSingly(Broadcast):
    """The subscribers call ``recv()`` for each message."""

    name = "mpbroadcast, recv()"
    setting = "as above, but subscribers call recv() for each message"
    kinds = frozenset({"small", "latency"})
    way = "recv"


class BroadcastIterated(Broadcast):
    """The subscribers write ``for message in channel``."""

    name = "mpbroadcast, for"
    setting = "as above, but subscribers iterate over the channel"
    kinds = frozenset({"small"})
    way = "for"


class BroadcastInline(Broadcast):
    """Nothing goes through shared memory."""

    name = "mpbroadcast, inline"
    setting = "as mpbroadcast, recv_many(), with MPBROADCAST_INLINE=1 in the environment: no shared memory"
    kinds = frozenset({"bytes"})
    environment: ClassVar[dict[str, str]] = {"MPBROADCAST_INLINE": "1"}
