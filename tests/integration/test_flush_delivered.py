"""``flush(delivered=True)``: until all that this handle has published has left every backlog."""

from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerLost, Channel, ClosedError, TimedOut, connect
from mpbroadcast.validation import Policy
from tests.support.helpers import DEADLINE, Background, Children, fill, only_subscriber, take, wait_until
from tests.support.large_workers import ReaderProcess, Size, hold, numbers

Bus = Broadcaster[Any]


def flushing(bus: Bus) -> Background:
    """Return a thread that waits until all is delivered, once it waits."""
    thread = Background(bus.flush, delivered=True)
    thread.wait_until_blocked("flush")
    with pytest.raises(TimedOut):
        bus.flush(timeout=0.1, delivered=True)
    assert thread.is_alive()
    return thread


def publish_more_than_a_pipe(bus: Bus, first: int = 0) -> None:
    """Publish 600 messages from this number on, so that some wait in the backlog of a channel that is open and not read."""
    for number in range(first, first + 600):
        bus.publish((number, bytes(1000)), timeout=DEADLINE)


def is_delivered(bus: Bus) -> bool:
    try:
        bus.flush(timeout=0, delivered=True)
    except TimedOut:
        return False
    return True


def test_it_waits_for_all_channels_that_got_something(bus: Bus) -> None:
    """Of several unopened channels it waits for each with a message of its own handle, and for no other one."""
    first, second, other = bus.subscribe("a"), bus.subscribe("[ac]"), bus.subscribe("b")
    bus.flush(timeout=0, delivered=True)
    bus.publish("for none", topic="none")
    bus.flush(timeout=DEADLINE, delivered=True)
    with connect(bus.address) as another:
        another.publish_many(range(100), topic="b")
        another.flush(timeout=DEADLINE)
        bus.publish("message", topic="a")
        waiting = flushing(bus)
        first.fileno()
        assert not is_delivered(bus)
        assert waiting.is_alive()
        second.fileno()
        waiting.result()
        assert is_delivered(bus)
        assert not is_delivered(another)
    other.close()


def test_it_waits_for_a_message_on_each_route(transport: Size, bus: Bus) -> None:
    """While one of any size is in a backlog, and not for longer."""
    channel = bus.subscribe()
    bus.publish_many(map(transport.message, range(3)))
    waiting = flushing(bus)
    assert numbers(take(channel, 3)) == [0, 1, 2]
    waiting.result()
    row = only_subscriber(bus)
    assert (row.published, row.delivered, row.missed, row.waiting, row.waiting_bytes) == (3, 3, 0, 0, 0)
    wait_until(lambda: bus.stats().memory == 0)
    channel.close()


def test_it_waits_for_a_reader_to_make_room(bus: Bus) -> None:
    """What does not fit into an open channel's pipe is waited for, until enough is read; what comes behind it is not."""
    channel = bus.subscribe()
    channel.fileno()
    publish_more_than_a_pipe(bus)
    waiting = flushing(bus)
    assert only_subscriber(bus).waiting > 0
    publish_more_than_a_pipe(bus, 600)
    read = 0
    while only_subscriber(bus).delivered < 600:
        read += len(channel.recv_many(limit=10, timeout=DEADLINE))
    waiting.result()
    assert read < 600
    assert not is_delivered(bus)
    assert [number for number, _ in take(channel, 1200 - read)] == list(range(read, 1200))
    bus.flush(timeout=DEADLINE, delivered=True)


def test_it_waits_for_what_waits_for_a_full_channel(bus: Bus) -> None:
    """What a full ``block`` channel holds back is not even routed: both kinds of flush wait for it."""
    channel = bus.subscribe(capacity=20_000)
    published = fill(bus, timeout=0.2)
    for delivered in (False, True):
        for timeout in (0, 0.1):
            with pytest.raises(TimedOut):
                bus.flush(timeout=timeout, delivered=delivered)
    waiting = flushing(bus)
    taking = Background(take, channel, len(published))
    waiting.result()
    assert [number for number, _ in taking.result()] == published


def test_an_unsubscribed_channel_is_waited_for_until_it_is_opened_or_closed(bus: Bus) -> None:
    """What was routed before ``unsubscribe`` can still be received: it has left the backlog when it is in the pipe."""
    opened, closed = bus.subscribe(), bus.subscribe()
    bus.publish("message")
    bus.flush(timeout=DEADLINE)
    for channel in (opened, closed):
        bus.unsubscribe(channel)
    waiting = flushing(bus)
    opened.fileno()
    assert not is_delivered(bus)
    closed.close()
    waiting.result()
    assert opened.recv(timeout=DEADLINE) == "message"


@pytest.mark.parametrize("is_stopped", [False, True])
def test_it_returns_when_the_owner_is_killed(bus: Bus, children: Children, fork: BaseContext, is_stopped: bool) -> None:
    """A process that has opened the channel, and does not read, running or stopped, holds it up until it is killed."""
    channel = bus.subscribe()
    bus.publish("message")
    assert not is_delivered(bus)
    owner = ReaderProcess(channel, children, fork, hold)
    bus.flush(timeout=DEADLINE, delivered=True)
    publish_more_than_a_pipe(bus)
    if is_stopped:
        owner.stop()
    waiting = flushing(bus)
    owner.kill()
    waiting.result()
    wait_until(lambda: bus.stats().subscribers == ())


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest"])
def test_it_returns_when_the_policy_drops_what_it_waits_for(bus: Bus, overflow: Policy) -> None:
    """Newer messages, of any publisher, push it out of a backlog."""
    channel = bus.subscribe(overflow=overflow, capacity=20_000)
    bus.publish("message")
    waiting = flushing(bus)
    with connect(bus.address) as other:
        other.publish_many([bytes(1000)] * 100, timeout=DEADLINE)
        other.flush(timeout=DEADLINE)
        waiting.result()
        assert is_delivered(bus)
        assert not is_delivered(other)
    channel.close()


def test_what_was_dropped_at_once_is_not_waited_for(bus: Bus) -> None:
    """What a full ``drop_newest`` channel never took holds up no handle; what it keeps, its own publisher."""
    channel = bus.subscribe(overflow="drop_newest", capacity=10_000)
    with connect(bus.address) as other:
        other.publish_many([bytes(1000)] * 20, timeout=DEADLINE)
        other.flush(timeout=DEADLINE)
        bus.publish(bytes(1000))
        bus.flush(timeout=DEADLINE, delivered=True)
        assert not is_delivered(other)
        take(channel, only_subscriber(bus).waiting)
        other.flush(timeout=DEADLINE, delivered=True)
    channel.close()


def test_closing_ends_it(bus: Bus) -> None:
    """When the broker is closed while a thread waits, that call ends, too."""
    channel: Channel[Any] = bus.subscribe()
    bus.publish("message")
    waiting = flushing(bus)
    bus.close(timeout=0.5)
    assert isinstance(waiting.error(), (BrokerLost, ClosedError, type(None)))
    channel.close()
