"""Errors in other processes: each arrives as itself, its attributes kept, without the channel that it carried."""

from __future__ import annotations

import gc
import os
import pickle
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

import pytest

import mpbroadcast
from mpbroadcast import Broadcaster, BroadcastError, Channel, ChannelInUse, Lagged, TimedOut

Bus = Broadcaster[Any]


class Foreign(Exception):
    """An error that a message raises when it is unpickled."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text, number)
        self.more = [text]


def fail(*arguments: Any) -> None:
    """What a message is unpickled by."""
    raise Foreign(*arguments)


class Failing:
    """A message that cannot be unpickled."""

    def __reduce__(self) -> Any:
        return fail, ("text", 7)


ERRORS = [
    getattr(mpbroadcast, name)(*{"Lagged": (3,), "ChannelInUse": ("text", 5)}.get(name, ("text",)))
    for name in sorted(mpbroadcast.__all__)
    if isinstance(getattr(mpbroadcast, name), type) and issubclass(getattr(mpbroadcast, name), BroadcastError)
]


def raise_with_channel(bus: Bus, number: int) -> None:
    """Raise an error of this package, with an open channel and something else, in a pool's worker."""
    error = ERRORS[number]
    with bus.subscribe() as channel:
        channel.fileno()
        error.channel = channel
        error.sent = 17
        raise error


def receive(bus: Bus, kind: str) -> None:
    """Raise what a channel raises, in a pool's worker."""
    with bus.subscribe() as channel:
        channel.fileno()
        if kind == "EOFError":
            bus.unsubscribe(channel)
        elif kind == "Foreign":
            bus.publish(Failing())
        channel.recv(timeout=0 if kind == "TimedOut" else 20)


def in_worker(workers: Any, function: Any, *arguments: Any) -> None:
    """Call the function in a pool's worker, and wait for its end."""
    if isinstance(workers, ProcessPoolExecutor):
        workers.submit(function, *arguments).result()
    else:
        workers.apply(function, arguments)


def is_note_of_worker(error: BaseException) -> bool:
    """Whether its last note names a channel of another process."""
    (note,) = error.__notes__
    return "<mpbroadcast.Channel" in note and " at '/" in note and f"process {os.getpid()}," not in note


@pytest.mark.parametrize("pool", ["executor", "pool"])
def test_an_error_of_the_package_leaves_a_pool_worker(bus: Bus, fork: BaseContext, pool: str) -> None:
    """Each one, in both kinds of pools, with what it carries; a note names its channel, and the pool goes on."""
    assert len(ERRORS) > 10
    with ProcessPoolExecutor(1, fork) if pool == "executor" else fork.Pool(1) as workers:
        for number, error in enumerate(ERRORS):
            with pytest.raises(type(error)) as caught:
                in_worker(workers, raise_with_channel, bus, number)
            arrived: Any = caught.value
            assert type(arrived) is type(error)
            assert (str(arrived), arrived.args, arrived.sent, arrived.channel) == (str(error), error.args, 17, None)
            assert is_note_of_worker(arrived)
            if isinstance(error, Lagged | ChannelInUse):
                assert getattr(arrived, "missed", arrived.__dict__.get("pid")) in (3, 5)


@pytest.mark.parametrize(("kind", "expected"), [("EOFError", EOFError), ("Foreign", Foreign), ("TimedOut", TimedOut)])
def test_what_a_channel_raises_leaves_a_pool_worker(bus: Bus, fork: BaseContext, kind: str, expected: type[Exception]) -> None:
    """So do the end of messages, the error of a message, and a timeout."""
    with ProcessPoolExecutor(1, fork) as workers, pytest.raises(expected) as caught:
        workers.submit(receive, bus, kind).result()
    assert type(caught.value) is expected
    assert is_note_of_worker(caught.value)
    if isinstance(caught.value, Foreign):
        assert (caught.value.args, caught.value.more) == (("text", 7), ["text"])


def test_an_error_with_a_channel_is_in_no_cycle(bus: Bus) -> None:
    """The channel that it carries goes when the error does, without a collection, and pickling changes neither."""
    gc.disable()
    try:
        channel = bus.subscribe()
        bus.publish(Failing())
        bus.flush()
        bus.unsubscribe(channel)
        for kind in (Foreign, EOFError):
            error = error_of(channel)
            assert type(pickle.loads(pickle.dumps(error))) is kind
            assert error.channel is channel
            assert not hasattr(error, "__notes__")
        gone = weakref.ref(channel)
        del error, channel
        assert gone() is None
    finally:
        gc.enable()


def error_of(channel: Channel[Any]) -> Any:
    """What it raises."""
    try:
        return channel.recv(timeout=20)
    except Exception as error:
        return error
