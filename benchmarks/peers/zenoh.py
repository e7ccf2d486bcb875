"""Zenoh: sessions in peer mode over Unix sockets, without scouting; large messages through its shared memory."""

from __future__ import annotations

import contextlib
import json
import pathlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any

import psutil

from benchmarks.peers.base import PROTOCOL, Endpoint, Peer, Shape, Source, folder, module

_KEY = "benchmark/all"
_SHARED = 16_384  # bytes: from here on, a message goes through shared memory
_SEGMENTS = pathlib.Path("/dev/shm")


def _open(listen: list[str], connect: list[str]) -> Any:
    zenoh = module("zenoh")
    config = zenoh.Config()
    settings = {
        "mode": "peer",
        "scouting/multicast/enabled": False,
        "scouting/gossip/enabled": False,
        "listen/endpoints": listen,
        "connect/endpoints": connect,
        "transport/shared_memory/enabled": True,
    }
    for name, value in settings.items():
        config.insert_json5(name, json.dumps(value))
    return zenoh.open(config)


@dataclass
class _Source(Source):
    address: str
    size: int
    session: Any = field(default=None, init=False)

    def open(self) -> None:
        zenoh = module("zenoh")
        self.session = _open([self.address], [])
        publisher = self.session.declare_publisher(
            _KEY, congestion_control=zenoh.CongestionControl.BLOCK, reliability=zenoh.Reliability.RELIABLE
        )
        put, dumps = publisher.put, pickle.dumps
        if self.size < _SHARED:
            self.publish = lambda message: put(dumps(message, PROTOCOL))
            return
        shm = module("zenoh.shm")
        provider = shm.ShmProvider.default_backend(max(64 << 20, 4 * self.size))
        policy = shm.BlockOn(shm.GarbageCollect())

        def publish(message: Any) -> None:
            payload = dumps(message, PROTOCOL)
            buffer = provider.alloc(len(payload), policy)
            buffer[:] = payload
            put(buffer)

        self.publish = publish

    def close(self) -> None:
        self.session.close()


@dataclass
class _Endpoint(Endpoint):
    addresses: list[str]
    session: Any = field(default=None, init=False)
    subscriber: Any = field(default=None, init=False)

    def open(self) -> Iterator[Any]:
        self.session = _open([], self.addresses)
        self.subscriber = self.session.declare_subscriber(_KEY, module("zenoh").handlers.FifoChannel(1024))
        return (pickle.loads(sample.payload.to_bytes()) for sample in self.subscriber)

    def close(self) -> None:
        self.session.close()


class Zenoh(Peer):
    name = "zenoh"
    setting = "peers over Unix sockets, no scouting, CongestionControl.BLOCK, FifoChannel(1024); shared memory from 16 KiB on"
    limits = "no one order of several publishers; for a slow subscriber, only to block or to lose"
    modules = ("zenoh",)
    packages = ("eclipse-zenoh",)

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._size = shape.size
        self._folder = folder()
        self._addresses = [f"unixsock-stream/{self._folder.name}/{index}" for index in range(shape.publishers)]
        self._before = set(_SEGMENTS.glob("*.zenoh"))

    def source(self, index: int) -> Source:
        return _Source(self._addresses[index], self._size)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._addresses)

    def close(self) -> None:
        if left := set(_SEGMENTS.glob("*.zenoh")) - self._before:
            for path in left - _mapped():
                path.unlink(missing_ok=True)
        self._folder.cleanup()


def _mapped() -> set[pathlib.Path]:
    """What is in use, by whomever."""
    used: set[pathlib.Path] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            used.update(pathlib.Path(part.path) for part in process.memory_maps())
            used.update(pathlib.Path(file.path) for file in process.open_files())
    return used
