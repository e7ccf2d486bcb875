"""Errors: their kinds; their texts, each of which names what is wrong, and what to do; and how they reach other processes."""

import gc
import itertools
import os
import pickle
import re
import signal
import weakref
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

import mpbroadcast
from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, TimedOut, connect, start_broadcaster
from tests.support.helpers import DEADLINE, stopped, take, wait_until
from tests.support.victims import alive
from tests.support.workers import PACKAGE_ERRORS, CannotBePickled, Raises

Bus = Broadcaster[Any]
KINDS: dict[str, type[BaseException]] = {
    "StartError": RuntimeError,
    "AddressError": OSError,
    "BrokerLost": ConnectionError,
    "VersionMismatch": ConnectionError,
    "ClosedError": OSError,
    "ChannelBusy": RuntimeError,
    "ChannelInUse": RuntimeError,
    "TimedOut": TimeoutError,
}


def test_every_error_has_one_base_and_the_built_in_kind_of_its_meaning() -> None:
    assert len(PACKAGE_ERRORS) == 14
    assert not [error for error in PACKAGE_ERRORS if not isinstance(error, KINDS.get(type(error).__name__, BroadcastError))]
    public = [kind for kind in vars(mpbroadcast).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {*public} == {type(error) for error in PACKAGE_ERRORS}


def text_of(kind: type[Exception], name: str, owner: Any, *arguments: Any, **options: Any) -> str:
    """Return the text of a call's error, with its notes."""
    with pytest.raises(kind) as caught:
        getattr(owner, name)(*arguments, **options)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert len(text.split()) >= 6, text
    return text


def test_a_text_names_what_happened_to_which_object(bus: Bus, temporary_folder: Path) -> None:
    nobody = str(temporary_folder / "nobody")
    with bus.subscribe() as closed:
        assert "0" in text_of(TimedOut, "recv", closed, 0)
    assert "closed" in text_of(BroadcastError, "recv", closed)
    assert nobody in text_of(BrokerLost, "connect", mpbroadcast, nobody)
    assert "authkey" in text_of(BroadcastError, "connect", mpbroadcast, bus.address, authkey=b"wrong")
    assert bus.address in text_of(BroadcastError, "start_broadcaster", mpbroadcast, address=bus.address)


def test_a_publish_that_does_not_wait_names_the_broker_as_a_reason(bus: Bus) -> None:
    bus.publish(0)
    with stopped(bus.stats().pid):
        text = text_of(TimedOut, "publish_many", bus, itertools.repeat(bytes(4000)), timeout=0)
    assert "or the broker has not read yet what was published before" in text


ENDED = "the broker at '/.*' has ended: start another one, or connect\\(\\) to the one that is there now, and subscribe again"


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_broker_that_has_ended_has_one_text(end: str) -> None:
    """From a channel, a publish, a request, a handle that has never been used, and a channel that is opened too late."""
    bus = start_broadcaster()
    opened = bus.subscribe("nothing")
    too_late = pickle.loads(pickle.dumps(opened))
    opened.fileno()
    other: Bus = connect(bus.address)
    channel = other.subscribe()
    channel.fileno()
    other.publish(0)
    assert take(channel, 1) == [0]
    texts = []
    if end == "kill":
        pid = bus.stats().pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        texts = [text_of(BrokerLost, name, bus, *more) for name, *more in (("publish", 1), ("subscribe",), ("stats",))]
        texts.append(text_of(BrokerLost, "recv", channel, timeout=DEADLINE))
    bus.close()
    with pytest.raises(BrokerLost, match="it has ended, or this is not its `address`"):
        connect(bus.address)
    texts += [text_of(BrokerLost, name, other) for name in ("stats", "subscribe", "flush")]
    texts.append(text_of(BrokerLost, "recv", too_late, timeout=DEADLINE))
    assert len({*texts}) == 1
    assert re.fullmatch(ENDED, texts[0])


def test_an_old_handle_at_a_new_broker_raises_to_connect_again(tmp_path: Path) -> None:
    """Whether it had been used before or not."""
    first = start_broadcaster(address=tmp_path / "socket")
    used: Bus = connect(first.address)
    used.publish(1)
    unused = pickle.dumps(used)
    first.close()
    with start_broadcaster(address=first.address):
        assert "connect()" in text_of(BrokerLost, "stats", used)
        assert "connect()" in text_of(BrokerLost, "stats", pickle.loads(unused))


def test_a_message_that_cannot_be_pickled_is_named(bus: Bus) -> None:
    """Raise the error of its pickling as it was, with a note: that it is a message, of which type, and its topic."""

    def function() -> None:
        raise AssertionError

    for name, argument, options, kind in (
        ("publish", function, {}, "function"),
        ("publish", function, {"timeout": 1}, "function"),
        ("publish", [bytes(1 << 22), function], {}, "list"),
        ("publish_many", [function], {}, "function"),
    ):
        text = text_of(Exception, name, bus, argument, topic="room", **options)
        assert "function" in text.splitlines()[0]
        assert text.endswith(f"publish() could not pickle this message, a {kind}, for topic 'room': nothing was sent of it")
        assert text.count("publish()") == 1
    assert bus.stats().published == 0


def test_wait_for_subscribers_counts_those_that_there_are(bus: Bus) -> None:
    """Of the topic, if one was given; a broker that is stopped does not reply."""
    wait = "wait_for_subscribers"
    with bus.subscribe("a"), bus.subscribe("b"):
        for timeout in (0, 0.05):
            assert text_of(TimedOut, wait, bus, 3, timeout=timeout).endswith("Now there are 2")
            assert text_of(TimedOut, wait, bus, 3, topic="a", timeout=timeout).endswith("Now there are 1")
        with stopped(bus.stats().pid):
            assert "Now the broker does not reply" in text_of(TimedOut, wait, bus, 3, timeout=0.05)


def test_an_error_is_in_no_reference_cycle(bus: Bus) -> None:
    """It goes with the last reference to it, and all that its traceback holds goes with it."""
    with bus.subscribe() as channel:
        bus.publish(Raises(Foreign("text", 7)))
        calls = [partial(channel.recv, DEADLINE), partial(channel.recv, 0), partial(channel.recv_many, timeout=0)]
        calls += [partial(bus.wait_for_subscribers, 9, timeout=0), partial(bus.publish, CannotBePickled())]
        errors = []
        gc.disable()
        try:
            for call in calls:
                try:
                    call()
                except Exception as error:
                    errors.append(weakref.ref(error))
            assert [one() for one in errors] == [None] * len(calls)
        finally:
            gc.enable()


class Foreign(Exception):
    """An error that a message raises when it is unpickled."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text, number)
        self.more = [text]


def raise_with_channel(bus: Bus, number: int) -> None:
    """Raise an error of this package, with an open channel and something else, in a pool's worker."""
    error = PACKAGE_ERRORS[number]
    with bus.subscribe() as channel:
        channel.fileno()
        error.channel = channel
        error.sent = 17
        raise error


def receive(bus: Bus, kind: type[Exception]) -> None:
    """Raise what a channel raises, in a pool's worker."""
    with bus.subscribe() as channel:
        channel.fileno()
        if kind is EOFError:
            bus.unsubscribe(channel)
        elif kind is Foreign:
            bus.publish(Raises(Foreign("text", 7)))
        channel.recv(timeout=0 if kind is TimedOut else DEADLINE)


def run(workers: Any, function: Any, *arguments: Any) -> None:
    """Call a function in a pool of either kind."""
    if isinstance(workers, ProcessPoolExecutor):
        workers.submit(function, *arguments).result()
    else:
        workers.apply(function, arguments)


@pytest.mark.parametrize("pool", ["executor", "pool"])
def test_an_error_of_the_package_leaves_a_pool_worker(bus: Bus, fork: BaseContext, pool: str) -> None:
    """As itself, with what it carries; a note names its channel, and the pool goes on. So do errors that a channel raises."""
    with ProcessPoolExecutor(1, fork) if pool == "executor" else fork.Pool(1) as workers:

        def raised(kind: type[Exception], function: Any, *arguments: Any) -> Any:
            with pytest.raises(kind) as caught:
                run(workers, function, *arguments)
            assert type(caught.value) is kind
            (note,) = caught.value.__notes__
            assert re.search(r"<mpbroadcast.Channel.* at '/", note)
            assert f"process {os.getpid()}," not in note
            return caught.value

        for number, error in enumerate(PACKAGE_ERRORS):
            arrived = raised(type(error), raise_with_channel, bus, number)
            assert (str(arrived), arrived.args, arrived.sent, arrived.channel) == (str(error), error.args, 17, None)
            for name in ("missed", "pid"):
                assert getattr(arrived, name, None) == getattr(error, name, None)
        for kind in (EOFError, TimedOut, Foreign):
            arrived = raised(kind, receive, bus, kind)
        assert (arrived.args, arrived.more) == (("text", 7), ["text"])
