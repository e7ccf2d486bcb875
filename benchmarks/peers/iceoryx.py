"""iceoryx2: pickles as slices of bytes in shared memory, and an event for each, so that subscribers sleep while nothing comes.

Without safe overflow and with ``RetryUntilDelivered``, a publisher waits when a subscriber's buffer is full: nothing is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any

from benchmarks.peers.base import PROTOCOL, Endpoint, Peer, Shape, Source, folder, module

_NODES = 64


def _services(folder_name: str, shape: Shape) -> tuple[Any, Any, Any]:
    iox2 = module("iceoryx2")
    iox2.set_log_level(iox2.LogLevel.Fatal)
    config = iox2.config.default()
    config.global_cfg.root_path = iox2.Path.new(folder_name)
    config.global_cfg.prefix = iox2.FileName.new(pathlib.Path(folder_name).name + "_")
    node = (
        iox2.NodeBuilder.new()
        .config(config)
        .signal_handling_mode(iox2.SignalHandlingMode.Disabled)
        .create(iox2.ServiceType.Ipc)
    )
    name = iox2.ServiceName.new("benchmark")
    messages = (
        node.service_builder(name)
        .publish_subscribe(iox2.Slice[ctypes.c_uint8])
        .max_publishers(shape.publishers)
        .max_subscribers(shape.subscribers)
        .max_nodes(_NODES)
        .history_size(0)
        .subscriber_max_buffer_size(max(2, min(256, (32 << 20) // shape.size)))
        .subscriber_max_borrowed_samples(2)
        .enable_safe_overflow(False)
        .open_or_create()
    )
    events = (
        node.service_builder(name)
        .event()
        .max_notifiers(shape.publishers)
        .max_listeners(shape.subscribers)
        .max_nodes(_NODES)
        .open_or_create()
    )
    return node, messages, events


@dataclass
class _Source(Source):
    folder: str
    shape: Shape
    kept: list[Any] = field(default_factory=list, init=False)

    def open(self) -> None:
        iox2 = module("iceoryx2")
        node, messages, events = _services(self.folder, self.shape)
        publisher = (
            messages.publisher_builder()
            .initial_max_slice_len(self.shape.size + 1024)
            .allocation_strategy(iox2.AllocationStrategy.PowerOfTwo)
            .backpressure_strategy(iox2.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        notifier = events.notifier_builder().create()
        self.kept = [publisher, notifier, messages, events, node]
        loan, notify, dumps, move = publisher.loan_slice_uninit, notifier.notify, pickle.dumps, ctypes.memmove

        def publish(message: Any) -> None:
            payload = dumps(message, PROTOCOL)
            sample = loan(len(payload))
            move(sample.payload_ptr, payload, len(payload))
            sample.assume_init().send()
            notify()

        self.publish = publish

    def close(self) -> None:
        for port in self.kept[:2]:
            port.delete()
        self.kept.clear()


@dataclass
class _Endpoint(Endpoint):
    folder: str
    shape: Shape
    kept: list[Any] = field(default_factory=list, init=False)

    def open(self) -> Iterator[Any]:
        node, messages, events = _services(self.folder, self.shape)
        subscriber = messages.subscriber_builder().create()
        listener = events.listener_builder().create()
        self.kept = [subscriber, listener, messages, events, node]
        return self._messages(subscriber, listener, module("iceoryx2").Duration.from_millis(100))

    def _messages(self, subscriber: Any, listener: Any, turn: Any) -> Iterator[Any]:
        receive, wait, loads = subscriber.receive, listener.timed_wait, pickle.loads
        while True:
            sample = receive()
            if sample is None:
                wait(turn)
                continue
            message = loads(sample.payload().as_memory_view())
            sample.delete()
            yield message

    def close(self) -> None:
        for port in self.kept[:2]:
            port.delete()
        self.kept.clear()


class Iceoryx(Peer):
    name = "iceoryx2"
    setting = "slices of bytes, buffers of 2 to 256 messages, no safe overflow, RetryUntilDelivered; an event for each message"
    limits = "no one order of several publishers; a subscriber that stops reading blocks them; the most of each are fixed"
    modules = ("iceoryx2",)
    packages = ("iceoryx2",)

    def __init__(self, context: BaseContext, shape: Shape) -> None:
        self._folder = folder()
        self._shape = shape

    def source(self, index: int) -> Source:
        return _Source(self._folder.name, self._shape)

    def endpoint(self, index: int) -> Endpoint:
        return _Endpoint(self._folder.name, self._shape)

    def close(self) -> None:
        for left in pathlib.Path("/dev/shm").glob(f"{pathlib.Path(self._folder.name).name}_*"):
            with contextlib.suppress(OSError):
                left.unlink()
        self._folder.cleanup()
