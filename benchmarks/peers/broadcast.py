"""This library: ``bus.publish(message)`` one by one, one channel a subscriber."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from multiprocessing.context import BaseContext
from typing import ClassVar

from benchmarks.peers.base import Endpoint, Message, Peer
from mpbroadcast import Broadcaster, Channel, start_broadcaster


@dataclass
class _Endpoint:
    channel: Channel[Message]
    many: bool

    def open(self) -> Iterable[Message]:
        self.channel.poll(0)  # the first use opens it
        if self.many:
            return chain.from_iterable(iter(self.channel.recv_many, None))
        return iter(self.channel.recv, None)


class Broadcast(Peer):
    """The subscribers call ``recv_many()``."""

    name = "mpbroadcast, recv_many()"
    overflow: ClassVar[str] = "block"
    capacity: ClassVar[int | None] = None
    _many: ClassVar[bool] = True

    def __init__(self, context: BaseContext, subscribers: int) -> None:
        self._bus: Broadcaster[Message] = start_broadcaster(context=context)
        self._channels = [self._bus.subscribe(overflow=self.overflow, capacity=self.capacity) for _ in range(subscribers)]
        self.publish = self._bus.publish

    def endpoints(self) -> list[Endpoint]:
        return [_Endpoint(channel, self._many) for channel in self._channels]

    def close(self) -> None:
        self._bus.close()


class BroadcastSingly(Broadcast):
    """The subscribers call ``recv()`` for each message."""

    name = "mpbroadcast, recv()"
    _many = False
