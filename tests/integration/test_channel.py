"""What a subscriber holds: receiving, ending, and being an honest waitable."""

import asyncio
import gc
import itertools
import random
import selectors
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, ClosedError, TimedOut, channel_to_selector, connect, start_broadcaster
from mpbroadcast.testing import drain, settle
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    calls_that_receive,
    fill,
    finish,
    only_subscriber,
    pattern,
    readable,
    stopped,
    take,
    wait_for,
    wait_until,
)

Bus = Broadcaster[Any]
MANY = 400
"""More requests than a socket has room for."""


def test_recv_without_a_message_runs_out_of_time(bus: Bus) -> None:
    channel = bus.subscribe()
    for timeout in (0, 0.0, 0.05):
        assert not channel.poll(timeout)
        with pytest.raises(TimedOut) as caught:
            channel.recv(timeout=timeout)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.channel is channel
    bus.publish("later")
    assert channel.recv(timeout=DEADLINE) == "later"


@pytest.mark.parametrize("wait", ["recv", "recv_many", "poll", "receive"])
def test_a_thread_that_waits_wakes_up_for_a_message_and_for_the_end(bus: Bus, wait: str) -> None:
    """Return one message, and wait for no second one; raise the clean end, or that the channel was closed."""
    for event in ("message", "unsubscribe", "close"):
        channel = bus.subscribe()
        receiver = channel if wait != "receive" else channel_to_selector(channel)
        waiting = Background(getattr(receiver, wait), timeout=None)
        waiting.wait_until_blocked(wait)
        if event == "message":
            bus.publish("message")
            assert waiting.result() == {"recv_many": ["message"], "poll": True}.get(wait, "message")
        elif event == "unsubscribe":
            bus.unsubscribe(channel)
            assert waiting.result() is True if wait == "poll" else isinstance(waiting.error(), EOFError)
        else:
            channel.close()
            assert isinstance(waiting.error(), EOFError if wait == "receive" else ClosedError)


class Counted(Exception):
    """Counts how often one is made."""

    made = 0

    def __init__(self) -> None:
        Counted.made += 1


@pytest.mark.parametrize("with_topic", [False, True])
def test_a_message_that_comes_alone_is_received_as_others_are(with_topic: bool, bus: Bus) -> None:
    """An error of it, too: it is unpickled twice, to see whether the error comes again, and that does not show."""
    Counted.made = 0
    with bus.subscribe(with_topic=with_topic) as channel:
        for message in (1, workers.Raises(Counted()), bytes(100_000), workers.Raises(EOFError()), 2):
            waiting = Background(channel.recv, DEADLINE)
            waiting.wait_until_blocked("recv")
            bus.publish(message, topic="t")
            if isinstance(message, workers.Raises):
                error = waiting.error()
                assert error is not None
                assert type(error.__cause__ or error) is type(message.error)
                assert (error.__cause__ or error).__context__ is None
            else:
                assert waiting.result() == (("t", message) if with_topic else message)
            assert not readable(channel)
    assert Counted.made == 3


def test_recv_many_takes_what_is_there(bus: Bus) -> None:
    """Return all that has arrived, at least one message, at most the limit, and none from a bad message on."""
    channel = bus.subscribe()
    channel.fileno()
    bad = workers.CannotBeUnpickled()
    bus.publish_many([*range(20), bad, 20, bad, bad, 21])
    settle(bus, DEADLINE)
    assert channel.recv_many(1) == [0]
    assert channel.recv_many(limit=9, timeout=0) == list(range(1, 10))
    assert channel.recv(timeout=0) == 10
    for expected in ([*range(11, 20)], None, [20], None, None, [21]):
        if expected:
            assert channel.recv_many(timeout=0) == expected
        else:
            with pytest.raises(workers.Boom):
                channel.recv_many(timeout=0)
    with pytest.raises(TimedOut):
        channel.recv_many(timeout=0)


@pytest.mark.parametrize("padding", [0, 3000, 300_000])
def test_no_error_of_a_message_is_taken_for_the_channels_own(padding: int, bus: Bus) -> None:
    """Raise each as the cause of a ``RuntimeError``, from every call that receives; nothing ends, and nothing is counted."""
    with bus.subscribe() as channel:
        errors = [EOFError(), StopIteration(), StopAsyncIteration(), *workers.PACKAGE_ERRORS]
        errors += [SystemExit(3), GeneratorExit(), asyncio.CancelledError()]
        for error, call in itertools.product(errors, calls_that_receive(channel).values()):
            bus.publish([bytes(padding), workers.Raises(error)])
            bus.publish("next")
            with pytest.raises(RuntimeError) as raised:
                call()
            assert type(raised.value) is RuntimeError
            assert type(raised.value.__cause__) is type(error)
            assert call() == ["next"]
        assert channel.missed == 0


@pytest.mark.parametrize("padding", [0, 3000, 300_000])
def test_a_ctrl_c_of_a_message(padding: int, bus: Bus) -> None:
    """The main thread cannot know it from the user's, and raises it until another one, which gets no signals, passes it."""
    with bus.subscribe() as channel:
        bus.publish([bytes(padding), workers.Raises(KeyboardInterrupt())])
        bus.publish("next")
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                channel.recv(timeout=DEADLINE)
        error = Background(channel.recv, DEADLINE).error()
        assert isinstance(error, RuntimeError)
        assert isinstance(error.__cause__, KeyboardInterrupt)
        assert channel.recv(timeout=DEADLINE) == "next"


@pytest.mark.parametrize("seed", range(4))
def test_all_calls_that_receive_share_one_order(bus: Bus, seed: int) -> None:
    """Give each message once, in order, whichever mix of calls and iterators takes it; be readable while one is left."""
    chance = random.Random(seed)
    channel = bus.subscribe()
    first, second = iter(channel), iter(channel)
    received: list[int] = []
    calls: list[Callable[[int], list[int]]] = [
        lambda most: channel.recv_many(most, 0),
        lambda most: channel.recv_many(timeout=0),
        lambda most: list(itertools.islice(first, most)),
        lambda most: list(itertools.islice(second, most)),
        *(lambda _, call=call: call() for call in calls_that_receive(channel).values()),
    ]
    with watched(channel) as ready:
        for count in (1, 2, 1000, 300, 128):
            total = len(received) + count
            bus.publish_many(range(len(received), total))
            settle(bus, DEADLINE)
            while len(received) < total:
                assert ready() == READY
                received += chance.choice(calls)(chance.randint(1, min(100, total - len(received))))
            assert ready() == QUIET
    assert received == list(range(total))


def test_an_iterator_goes_on_behind_an_error_and_ends_with_its_channel(bus: Bus) -> None:
    """Raise what is at the position of a message; hand out nothing that was decoded before the channel was closed."""
    channel = bus.subscribe()
    bad = workers.CannotBeUnpickled()
    bus.publish_many([0, 1, bad, 3, 4, 5, 6])
    iterator = iter(channel)
    assert list(itertools.islice(iterator, 2)) == [0, 1]
    with pytest.raises(workers.Boom):
        next(iterator)
    assert list(itertools.islice(iterator, 2)) == [3, 4]
    bus.publish_many(range(7, 17))
    assert list(itertools.islice(iterator, 4)) == [5, 6, 7, 8]
    channel.close()
    for _ in range(2):
        with pytest.raises(ClosedError):
            next(iterator)


def test_an_iterator_keeps_no_message_that_another_call_has_taken(bus: Bus) -> None:
    """What it would have handed out next is not in memory any more when the caller of ``recv_many`` has dropped it."""
    channel = bus.subscribe()
    iterator = iter(channel)
    channel.poll(0)
    bus.publish_many([{number} for number in range(9)])
    settle(bus, DEADLINE)
    assert list(itertools.islice(iterator, 2)) == [{0}, {1}]
    taken = [weakref.ref(message) for message in channel.recv_many()]
    assert [one() for one in taken] == [None] * 7
    channel.close()


def test_cancelled_tasks_lose_no_message(bus: Bus) -> None:
    channel = bus.subscribe()

    async def main() -> list[int]:
        publishing = Background(bus.publish_many, range(300))
        received: list[int] = []
        delay = 0
        while len(received) < 300:
            delay = (delay + 37) % 400
            task = asyncio.ensure_future(anext(channel))
            await asyncio.sleep(delay / 1_000_000)
            task.cancel()
            try:
                received.append(await task)
            except asyncio.CancelledError:
                continue
        publishing.result()
        return received

    assert asyncio.run(main()) == list(range(300))
    bus.publish("and then")
    assert drain(bus, channel) == ["and then"]


def test_topics_are_added_and_removed_on_the_same_channel(bus: Bus) -> None:
    """Take effect at once for a thread that waits; without its last topic the channel receives nothing, and not everything."""
    channel = bus.subscribe("a")
    receiving = Background(channel.recv)
    receiving.wait_until_blocked("recv")
    bus.publish(1, topic="b")
    channel.subscribe("b", "c*")
    assert sorted(only_subscriber(bus).topics) == ["a", "b", "c*"]
    for topic in ("b", "a", "cc"):
        bus.publish(topic, topic=topic)
    assert receiving.result() == "b"
    bus.flush(timeout=DEADLINE)
    channel.unsubscribe("a", "c*")
    assert list(only_subscriber(bus).topics) == ["b"]
    for number, topic in enumerate(["a", "b", "cc"]):
        bus.publish(number, topic=topic)
    channel.unsubscribe("b")
    bus.publish(3, topic="b")
    bus.publish(4)
    channel.subscribe("a")
    bus.publish(5, topic="a")
    assert drain(bus, channel) == ["a", "cc", 1, 5]


def test_unsubscribe_gives_the_rest_and_then_the_end(bus: Bus) -> None:
    """Give what was routed before, also when it is large and the channel not open yet; then ``EOFError``, again and again."""
    opened, unopened = bus.subscribe(), bus.subscribe()
    opened.fileno()
    expected = [1, 2, 3, *(pattern(number, 20_000) for number in range(300))]
    bus.publish_many(expected)
    bus.flush(timeout=DEADLINE)
    for channel in (opened, unopened):
        for _ in range(3):
            bus.unsubscribe(channel)
    bus.publish("too late")
    for channel in (opened, unopened):
        assert take(channel, len(expected)) == expected
        for _ in range(3):
            assert channel.poll(DEADLINE)
            with pytest.raises(EOFError):
                channel.recv(timeout=DEADLINE)
        assert channel.closed is False
        bus.unsubscribe(channel)
        channel.close()
        bus.unsubscribe(channel)


@pytest.mark.parametrize("what", ["channel", "topic"])
def test_unsubscribe_ends_behind_what_was_published_before(
    what: str, bus: Bus, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """By any process, also when the broker has not noticed yet that the backlog that held it back has been read empty."""
    child = children(fork, workers.publish_on_order, bus, pipe[1])
    assert answer(pipe[0]) == "started"
    for number in range(20):
        with bus.subscribe(capacity=100_000) as slow, bus.subscribe() as channel:
            slow.fileno()
            bus.publish_many(range(5))
            bus.flush(timeout=DEADLINE, delivered=False)
            last = bytes(200_000)  # more than `slow` takes while something is there
            if number % 2:
                bus.publish(last)
            else:
                pipe[0].send(last)
                assert answer(pipe[0]) == "published"
            wait_until(lambda: any(row.stalls for row in bus.stats().subscribers))
            assert take(slow, 5) == list(range(5))  # of which the broker gets no event
            if what == "channel":
                bus.unsubscribe(channel)
            else:
                channel.unsubscribe("*")
            assert take(channel, 6) == [0, 1, 2, 3, 4, last]
            assert slow.recv(timeout=DEADLINE) == last
    pipe[0].send(None)
    finish(child)


@pytest.mark.parametrize(("restart", "waits"), [(False, False), (True, False), (False, True)])
def test_channels_that_are_dropped_while_the_broker_takes_nothing(restart: bool, waits: bool) -> None:
    """End all their subscriptions, opened or not, by the next request, or where a publish waits for them without one."""
    with start_broadcaster(restart=restart) as bus:
        channels = [bus.subscribe(capacity=1000) for _ in range(MANY)]
        channels[0].poll(0)
        if waits:
            fill(bus, size=10_000)
            waiting = Background(bus.publish, bytes(10_000))
            waiting.wait_until_blocked("publish")
        with stopped(bus.stats().pid):
            channels.clear()
            gc.collect()
        if waits:
            waiting.result()
        assert not bus.stats().subscribers


def _drop_all(address: str, pid: int, report: Connection, closes: bool) -> None:
    other: Bus = connect(address)
    channels = [other.subscribe() for _ in range(MANY)]
    report.send(channels[0])
    with stopped(pid):
        channels.clear()
        if closes:
            other.close()
        del other
        gc.collect()
    report.send("done")
    report.recv()


@pytest.mark.parametrize("closes", [False, True])
def test_a_process_that_drops_its_handle_while_the_broker_takes_nothing(
    closes: bool, bus: Bus, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """End all its subscriptions but for the one that was handed on, though the package is not used there any more."""
    child = children(fork, _drop_all, bus.address, bus.stats().pid, pipe[1], closes)
    handed_on = answer(pipe[0])
    assert answer(pipe[0]) == "done"
    wait_until(lambda: len(bus.stats().subscribers) == 1)
    bus.publish(1)
    assert handed_on.recv(timeout=DEADLINE) == 1
    pipe[0].send("end")
    finish(child)


READY, QUIET = {True}, {False}


@contextmanager
def watched(channel: Channel[Any]) -> Iterator[Callable[[], set[bool]]]:
    """Yield what shows whether a channel is readable: for poll, and for an epoll in which it stays registered."""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        yield lambda: {readable(channel), bool(selector.select(0))}


def test_readable_where_a_call_would_raise(bus: Bus) -> None:
    """Be readable before a message that cannot be unpickled, and at the end for ever; ``poll`` changes nothing. Messages go
    through the pipe at once and in pieces."""
    channel = bus.subscribe()
    bad = workers.CannotBeUnpickled()
    messages = [bad, *(pattern(size, size) for size in (0, 4090, 3, 9000, 4096, 20_000, 1, 2, 3)), bad]
    with watched(channel) as ready:
        assert ready() == QUIET
        bus.publish_many(messages)
        settle(bus, DEADLINE)
        for message in messages:
            assert ready() == READY
            assert channel.poll(0)
            assert ready() == READY
            if message is bad:
                with pytest.raises(workers.Boom):
                    channel.recv(0)
            else:
                assert channel.recv(0) == message
        assert ready() == QUIET
        bus.unsubscribe(channel)
        wait_until(lambda: ready() == READY)
        for _ in range(2):
            with pytest.raises(EOFError):
                channel.recv(0)
            assert ready() == READY


def test_half_arrived_message_does_not_spin(bus: Bus, inline: None) -> None:
    """Take in what has come of a large message, and be quiet then."""
    channel = bus.subscribe()
    broker = bus.stats().pid
    message = pattern(1, 8 << 20)
    with watched(channel) as ready:
        bus.publish("small")
        publishing = Background(bus.publish, message)
        assert channel.recv(timeout=DEADLINE) == "small"
        wait_until(lambda: ready() == READY)
        with stopped(broker):
            for _ in range(1000):
                assert not channel.poll(0)
                with pytest.raises(TimeoutError):
                    channel.recv(timeout=0)
                if ready() == QUIET:
                    break
            assert ready() == QUIET
            assert not channel.poll(0.05)
        wait_until(lambda: ready() == READY)
        assert channel.recv(timeout=DEADLINE) == message
        publishing.result()
        bus.publish("behind")
        assert channel.recv(timeout=DEADLINE) == "behind"
        assert ready() == QUIET


def test_readable_while_a_backlog_is_drained(bus: Bus) -> None:
    channel = bus.subscribe(capacity=200_000)
    published = fill(bus, size=3000)
    received: list[int] = []
    while len(received) < len(published):
        assert wait_for([channel], DEADLINE) == [channel]
        try:
            received.append(channel.recv(timeout=0)[0])
        except TimeoutError:
            continue  # the part of a message: taken in
    assert received == published
    assert not readable(channel)
