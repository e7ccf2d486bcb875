"""``mpbroadcast.testing``: waiting without a sleep for what was published, was received, and was handled."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, Lagged, Overflowed, channel_to_selector, connect, start_broadcaster
from mpbroadcast.testing import drain, handled, settle
from tests.support.helpers import DEADLINE, Background, Children, Pipe, answer, finish, kill_broker, stopped, wait_until

SHORT = 0.1  # seconds until a call that cannot succeed gives up


def publish_many(bus: Broadcaster[Any], count: int) -> None:
    for number in range(count):
        bus.publish((number, bytes(1000)), topic="stream")
    bus.close()


def test_drain_returns_all_that_was_published(bus: Broadcaster[Any]) -> None:
    """By any handle, to a channel that was not opened before; then nothing, without a sleep."""
    channel = bus.subscribe("a")
    with connect(bus.address) as other:
        other.publish(1, topic="a")
        bus.publish(2, topic="b")
        other.publish(3, topic="a")
        assert drain(bus, channel) == [1, 3]
        assert drain(bus, channel) == []
        other.publish(4, topic="a")
        assert drain(bus, channel) == [4]


def test_drain_returns_more_than_a_pipe_holds(bus: Broadcaster[Any], fork: BaseContext, children: Children) -> None:
    """A publisher that blocks for the channel goes on while it is drained."""
    channel = bus.subscribe("stream", capacity=100_000)
    process = children(fork, publish_many, bus, 3000)
    got = []
    while process.is_alive():
        got += drain(bus, channel, DEADLINE)
    got += drain(bus, channel, DEADLINE)
    assert [number for number, _ in got] == [*range(3000)]


@pytest.mark.parametrize(("overflow", "error"), [("drop_oldest", Lagged), ("drop_newest", Lagged), ("disconnect", Overflowed)])
def test_drain_raises_what_the_channel_raises(bus: Broadcaster[Any], overflow: Any, error: type[Exception]) -> None:
    """A note has the messages that were received before, if any."""
    channel = bus.subscribe("a", overflow=overflow, capacity=2000)
    for number in range(50):
        bus.publish(number, topic="a")
    bus.flush()
    with pytest.raises(error) as caught:
        drain(bus, channel)
    assert overflow == "drop_oldest" or "were received before this: [0, 1, " in caught.value.__notes__[0]
    rest = drain(bus, channel)
    assert rest[-1:] == ([49] if overflow == "drop_oldest" else [])


def test_drain_of_latest_has_the_newest_only(bus: Broadcaster[Any]) -> None:
    channel = bus.subscribe("a", overflow="latest")
    channel.poll(0)
    for number in range(50):
        bus.publish(number, topic="a")
    assert drain(bus, channel)[-1] == 49


def test_drain_of_a_member_has_all_that_waits_for_its_group(bus: Broadcaster[Any]) -> None:
    channel = bus.subscribe("a", group="g")
    for number in range(50):
        bus.publish(number, topic="a")
    assert drain(bus, channel) == [*range(50)]


def test_drain_ends_with_the_channel(bus: Broadcaster[Any]) -> None:
    channel = bus.subscribe("a")
    bus.publish(1, topic="a")
    bus.unsubscribe(channel)
    assert drain(bus, channel) == [1]
    assert drain(bus, channel) == []


def test_settle_names_the_channel_and_its_process(bus: Broadcaster[Any]) -> None:
    """That of which the pipe is full; and the one that blocks a publisher, which need not be open."""
    bus.publish(0)
    settle(bus)
    unopened = bus.subscribe("a", capacity=3000)
    for _ in range(100):
        bus.publish(bytes(500), topic="a")
    with pytest.raises(AssertionError, match=rf"channel {unopened.id} on 'a' of process {os.getpid()}.* backlog is full"):
        settle(bus, SHORT)
    unopened.close()
    settle(bus)
    channel = bus.subscribe("b", name="thumbnails")
    channel.poll(0)
    for _ in range(1000):
        bus.publish(bytes(1000), topic="b")
    text = rf"channel {channel.id} 'thumbnails' on 'b' of process {os.getpid()} .* has \d+ message\(s\)"
    with pytest.raises(AssertionError, match=text):
        settle(bus, SHORT)
    channel.close()
    settle(bus)


def test_settle_returns_while_others_publish(bus: Broadcaster[Any]) -> None:
    """What is published later is not waited for."""
    channel = bus.subscribe("a")
    reader = Background(lambda: sum(1 for _ in channel))
    stop = threading.Event()

    def publish() -> None:
        while not stop.is_set():
            bus.publish(1, topic="a")

    publisher = Background(publish)
    for _ in range(20):
        settle(bus, DEADLINE)
    stop.set()
    publisher.result()
    bus.unsubscribe(channel)
    assert reader.result() > 0


def iterate(channel: Channel[Any]) -> Iterator[Any]:
    yield from channel


def receive_many(channel: Channel[Any]) -> Iterator[Any]:
    while True:
        try:
            yield from channel.recv_many()
        except EOFError:
            return


def select(channel: Channel[Any]) -> Iterator[Any]:
    yield from channel_to_selector(channel)


def echo(channel: Channel[Any], bus: Broadcaster[Any], receive: Callable[[Channel[Any]], Iterator[Any]], pipe: Any) -> None:
    """Answer each message to another topic, but only when the test has agreed to it."""
    channel.poll(0)
    pipe.send("open")
    for message in receive(channel):
        pipe.recv()
        bus.publish(message, topic="echo")


@pytest.mark.parametrize("receive", [iterate, receive_many, select])
@pytest.mark.parametrize("group", [None, "g"])
def test_handled_waits_for_the_reader_to_ask_for_more(
    bus: Broadcaster[Any],
    pipe: Pipe,
    children: Children,
    fork: BaseContext,
    receive: Callable[[Channel[Any]], Iterator[Any]],
    group: str | None,
) -> None:
    """The last message is taken out of the pipe, and not handled yet: then what handles it has published is there, too."""
    ours, theirs = pipe
    channel = bus.subscribe("a", group=group, name="worker")
    echoes = bus.subscribe("echo")
    process = children(fork, echo, channel, bus, receive, theirs)
    assert answer(ours) == "open"
    handled(bus)
    for number in range(3):
        bus.publish(number, topic="a")
    ours.send("first")
    ours.send("second")
    wait_until(lambda: bus.stats().subscribers[0].published >= 1)
    with pytest.raises(AssertionError, match=rf"channel {channel.id} 'worker' on 'a' of process {process.pid}"):
        handled(bus, SHORT)
    ours.send("third")
    handled(bus, DEADLINE)
    assert drain(bus, echoes) == [0, 1, 2]
    bus.unsubscribe(channel)
    finish(process)


def pass_on(channel: Channel[Any], bus: Broadcaster[Any], topic: str, pipe: Any) -> None:
    channel.poll(0)
    pipe.send("open")
    for message in channel:
        bus.publish(message + 1, topic=topic)


def test_handled_waits_for_a_chain(bus: Broadcaster[Any], children: Children, fork: BaseContext) -> None:
    """What a handler publishes is handled, too, be the next reader before or behind it."""
    channels = [bus.subscribe(str(number)) for number in range(4)]
    last = bus.subscribe("4")
    processes = []
    for number in (2, 0, 3, 1):
        ours, theirs = multiprocessing.Pipe()
        with ours, theirs:
            processes.append(children(fork, pass_on, channels[number], bus, str(number + 1), theirs))
            assert answer(ours) == "open"
    for number in range(10):
        bus.publish(number, topic="0")
        handled(bus, DEADLINE)
        assert drain(bus, last, DEADLINE) == [number + 4]
        last.close()
        last = bus.subscribe("4")
    for channel in channels:
        bus.unsubscribe(channel)
    for process in processes:
        finish(process)


def test_a_probed_channel_receives_as_before(bus: Broadcaster[Any]) -> None:
    """A reader that did not ask gets what comes behind the probe; it gets nothing before that, and has missed nothing."""
    for overflow in ("block", "latest"):
        channel = bus.subscribe("a", overflow=overflow)
        channel.poll(0)
        with pytest.raises(AssertionError, match="has not asked for another message"):
            handled(bus, SHORT)
        assert not channel.poll(0)
        bus.publish(1, topic="a")
        assert channel.recv(DEADLINE) == 1
        assert channel.missed == 0
        channel.close()


def test_a_stopped_broker_is_an_error(bus: Broadcaster[Any]) -> None:
    channel = bus.subscribe()
    with stopped(bus.stats().pid):
        for call in (lambda: settle(bus, 0.1), lambda: handled(bus, 0.1), lambda: drain(bus, channel, 0.1)):
            with pytest.raises(AssertionError, match="did not reply"):
                call()


def test_another_broker_counts_anew() -> None:
    with start_broadcaster(restart=True) as bus:
        channel = bus.subscribe("a")
        reader = Background(lambda: [*channel.messages()])
        wait_until(lambda: any(row.is_open for row in bus.stats().subscribers))
        for number in range(100):
            bus.publish(number, topic="a")
        settle(bus, DEADLINE)
        kill_broker(bus)
        bus.publish(100, topic="a")
        handled(bus, DEADLINE)
        bus.unsubscribe(channel)
        assert reader.result()[-1] == 100


def test_wrong_arguments(bus: Broadcaster[Any]) -> None:
    with pytest.raises(TypeError, match="bus must be a Broadcaster, not str"):
        settle("bus")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="channel must be a Channel"):
        drain(bus, "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout"):
        handled(bus, -1)
