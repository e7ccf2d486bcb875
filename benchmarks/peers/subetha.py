"""subetha-ipc: its ``BroadcastRing``, in shared memory, whose slots have 52 bytes: pickles are cut into pieces here.

It has no way to wait, for room or for a message: both sides poll, and give up the rest of their time slice in between.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, Endpoint, Peer, Shape, Source, folder, module

_SLOTS = 8192
_SLOT = 52  # bytes
_BATCH = 64  # messages that are published with one call where the next ones are known


@dataclass
class _Source(Source):
    path: str
    length: int
    push: Any = field(default=None, init=False)

    def open(self) -> None:
        self.push = module("subetha").BroadcastRing.open(self.path, _SLOTS).push_many
        self.publish = lambda message: self._push(self._pieces(message))

    def _pieces(self, message: Any) -> list[bytes]:
        """Cut into as many for each message, the last of which may be empty."""
        payload = pickle.dumps(message, PROTOCOL)
        return [payload[start : start + _SLOT] for start in range(0, self.length, _SLOT)]

    def _push(self, pieces: list[bytes]) -> None:
        while (taken := self.push(pieces)) < len(pieces):
            del pieces[:taken]
            os.sched_yield()

    def publish_all(self, messages: Iterable[Any]) -> None:
        pieces: list[bytes] = []
        for count, message in enumerate(messages, 1):
            pieces += self._pieces(message)
            if count % _BATCH == 0:
                self._push(pieces)
                pieces = []
        self._push(pieces)


@dataclass
class _Endpoint(Endpoint):
    path: str
    length: int

    def open(self) -> Iterator[Any]:
        ring = module("subetha").BroadcastRing.open(self.path, _SLOTS)
        return self._messages(ring.recv_many, ring.register_consumer())

    def _messages(self, receive: Any, consumer: int) -> Iterator[Any]:
        loads, join, each = pickle.loads, b"".join, self.length // _SLOT
        pieces: list[bytes] = []
        while True:
            pieces += receive(consumer, _SLOTS)
            whole = len(pieces) // each * each
            if not whole:
                os.sched_yield()
                continue
            for message in zip(*[iter(pieces)] * each, strict=False):
                yield loads(join(message))  # the rest of the last slot is behind the end of the pickle
            del pieces[:whole]


class SubEtha(Peer):
    name = "subetha-ipc"
    setting = f"BroadcastRing of {_SLOTS:,} slots of {_SLOT} bytes, push_many() of up to {_BATCH} messages, recv_many()"
    waits = False
    limits = "one publisher; at most 16 subscribers; polls: each takes a core; a subscriber that is killed blocks it for good"
    modules = ("subetha",)
    packages = ("subetha-ipc",)
    most_publishers = 1
    largest = 1024

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._folder = folder(in_memory=True)
        self._path = f"{self._folder.name}/ring"
        self._length = (shape.size + 40 + _SLOT - 1) // _SLOT * _SLOT
        module("subetha").BroadcastRing(self._path, _SLOTS)

    def source(self, index: int) -> Source:
        return _Source(self._path, self._length)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._path, self._length)

    def close(self) -> None:
        self._folder.cleanup()
