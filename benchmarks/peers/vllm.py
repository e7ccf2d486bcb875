"""The design of vLLM's ``MessageQueue``, whose package is too heavy to install: a ring of chunks in shared memory.

Each chunk has a byte that is set once it is written, and one for each reader, set once that one has read it. The writer waits
until all have, a reader until the chunk is written, and both poll. (Messages over 10 MiB go through ZeroMQ there; not here.)
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from benchmarks.peers.base import PROTOCOL, Endpoint, Peer, Shape, Source

_CHUNKS = 10  # its default, as is the next
_CHUNK = 10 << 20  # bytes


@dataclass
class _Source(Source):
    memory: SharedMemory
    readers: int

    def open(self) -> None:
        buffer: Any = self.memory.buf
        flags, dumps = 1 + self.readers, pickle.dumps
        unread, all_read = bytes(self.readers), b"\1" * self.readers
        index = 0

        def publish(message: Any) -> None:
            nonlocal index
            payload = dumps(message, PROTOCOL)
            chunk, written = index * _CHUNK, _CHUNKS * _CHUNK + index * flags
            while buffer[written] and buffer[written + 1 : written + flags] != all_read:
                os.sched_yield()
            buffer[written] = 0
            buffer[chunk : chunk + len(payload)] = payload
            buffer[written + 1 : written + flags] = unread
            buffer[written] = 1
            index = (index + 1) % _CHUNKS

        self.publish = publish


@dataclass
class _Endpoint(Endpoint):
    memory: SharedMemory
    readers: int
    reader: int

    def open(self) -> Iterator[Any]:
        return self._messages()

    def _messages(self) -> Iterator[Any]:
        buffer: Any = self.memory.buf
        flags, loads = 1 + self.readers, pickle.loads
        index = 0
        while True:
            written = _CHUNKS * _CHUNK + index * flags
            read = written + 1 + self.reader
            while not buffer[written] or buffer[read]:
                os.sched_yield()
            message = loads(buffer[index * _CHUNK : (index + 1) * _CHUNK])
            buffer[read] = 1
            index = (index + 1) % _CHUNKS
            yield message


class MessageQueue(Peer):
    name = "vLLM's MessageQueue, by its design"
    setting = "its ring of 10 chunks in shared memory, written anew here in Python; a message each call, both sides poll"
    waits = False
    limits = "one publisher; all subscribers are known before the first message; polls: each takes a core; a dead one blocks it"
    most_publishers = 1
    largest = _CHUNK // 2

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._readers = shape.subscribers
        self._memory = SharedMemory(create=True, size=_CHUNKS * (_CHUNK + 1 + self._readers))

    @classmethod
    def version(cls) -> str:
        return "of this checkout"

    def source(self, index: int) -> Source:
        return _Source(self._memory, self._readers)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._memory, self._readers, index)

    def close(self) -> None:
        self._memory.close()
        self._memory.unlink()
