"""``flush(delivered=True)``: until all that this handle has published has left every backlog."""

from __future__ import annotations

import os
import signal
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerLost, Channel, ClosedError, Overflowed, TimedOut, connect
from mpbroadcast.validation import Policy
from tests.support import workers
from tests.support.helpers import DEADLINE, Background, Children, answer, fill, only_subscriber, take, wait_until

Bus = Broadcaster[Any]


def flushing(bus: Bus) -> Background:
    """A thread that flushes and waits until all is delivered, and is seen to wait."""
    thread = Background(bus.flush, delivered=True)
    thread.wait_until_blocked("flush")
    with pytest.raises(TimedOut):
        bus.flush(timeout=0.1, delivered=True)
    assert thread.is_alive()
    return thread


def is_delivered(bus: Bus) -> bool:
    """Whether all is delivered now."""
    try:
        bus.flush(timeout=0, delivered=True)
    except TimedOut:
        return False
    return True


# --- what it waits for ------------------------------------------------------------------------------------------------


def test_with_nothing_published_it_returns(bus: Bus) -> None:
    """A handle that has published nothing waits for nothing, and so does one whose messages nobody gets."""
    channel = bus.subscribe("t")
    bus.flush(timeout=0, delivered=True)
    bus.publish("for nobody", topic="other")
    bus.flush(timeout=DEADLINE, delivered=True)
    assert is_delivered(bus)
    channel.close()


def test_it_waits_for_all_channels(bus: Bus) -> None:
    """Of several unopened channels it waits for each that got something, and for no other one."""
    first, second, other = bus.subscribe("a"), bus.subscribe("*"), bus.subscribe("b")
    bus.publish("message", topic="a")
    waiting = flushing(bus)
    first.fileno()
    assert not is_delivered(bus)
    assert waiting.is_alive()
    second.fileno()
    waiting.result()
    other.close()


def test_it_waits_for_a_reader_to_make_room(bus: Bus) -> None:
    """What does not fit into an open channel's pipe is waited for, until enough is read; not until all is."""
    channel = bus.subscribe()
    channel.fileno()
    for number in range(600):
        bus.publish((number, bytes(1000)), timeout=DEADLINE)
    waiting = flushing(bus)
    assert only_subscriber(bus).waiting > 0
    read = 0
    while not is_delivered(bus):
        read += len(channel.recv_many(limit=10, timeout=DEADLINE))
    waiting.result()
    assert read < 600
    assert only_subscriber(bus).waiting == 0
    assert [number for number, _ in take(channel, 600 - read)] == list(range(read, 600))


def test_a_channel_handed_to_a_child_is_delivered_when_it_opens(bus: Bus, children: Children, fork: BaseContext) -> None:
    """The opening in another process counts, under each start method."""
    channel = bus.subscribe()
    bus.publish("message")
    assert not is_delivered(bus)
    orders, theirs = fork.Pipe()
    child = children(fork, workers.open_and_hold, channel, theirs)
    bus.flush(timeout=DEADLINE, delivered=True)
    assert answer(orders) == child.pid
    assert only_subscriber(bus).delivered == 1
    orders.send("end")


# --- what else ends it ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("stopped", [False, True])
def test_it_returns_when_the_owner_is_killed(bus: Bus, children: Children, fork: BaseContext, stopped: bool) -> None:
    """A reader that does not read, running or stopped, holds it up until it is killed."""
    channel = bus.subscribe()
    orders, theirs = fork.Pipe()
    owner = children(fork, workers.open_and_hold, channel, theirs)
    assert answer(orders) == owner.pid
    for number in range(600):
        bus.publish((number, bytes(1000)), timeout=DEADLINE)
    if stopped:
        assert owner.pid
        os.kill(owner.pid, signal.SIGSTOP)
    waiting = flushing(bus)
    owner.kill()
    waiting.result()
    wait_until(lambda: bus.stats().subscribers == ())


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest"])
def test_it_returns_when_the_policy_drops_what_it_waits_for(bus: Bus, overflow: Policy) -> None:
    """What newer messages, of anybody, push out of a backlog has left it."""
    channel = bus.subscribe(overflow=overflow, capacity=20_000)
    bus.publish("message")
    waiting = flushing(bus)
    with connect(bus.address) as other:
        for _ in range(100):
            other.publish(bytes(1000), timeout=DEADLINE)
        other.flush(timeout=DEADLINE)
        waiting.result()
        assert is_delivered(bus)
        assert not is_delivered(other)
    channel.close()


def test_what_was_dropped_at_once_is_not_waited_for(bus: Bus) -> None:
    """What a full ``drop_newest`` channel never took holds up nobody; what it keeps, its own publisher."""
    channel = bus.subscribe(overflow="drop_newest", capacity=10_000)
    with connect(bus.address) as other:
        for _ in range(20):
            other.publish(bytes(1000), timeout=DEADLINE)
        other.flush(timeout=DEADLINE)
        bus.publish(bytes(1000))
        bus.flush(timeout=DEADLINE, delivered=True)
        assert not is_delivered(other)
        take(channel, only_subscriber(bus).waiting)
        other.flush(timeout=DEADLINE, delivered=True)
    channel.close()


def test_a_disconnected_channel_is_waited_for_until_it_has_all(bus: Bus) -> None:
    """What a disconnected channel keeps is in its backlog until it is opened."""
    channel = bus.subscribe(overflow="disconnect", capacity=3000)
    bus.publish_many([(number, bytes(500)) for number in range(3)])
    bus.publish((3, bytes(5000)))
    waiting = flushing(bus)
    channel.fileno()
    waiting.result()
    assert [number for number, _ in take(channel, 3)] == [0, 1, 2]
    with pytest.raises(Overflowed):
        channel.recv(timeout=DEADLINE)


# --- what does not hold it up -----------------------------------------------------------------------------------------


def test_a_backlog_with_nothing_of_this_handle_does_not_hold_it_up(bus: Bus) -> None:
    """Only what this handle has published is waited for: another's unread messages are another's."""
    unread, mine = bus.subscribe("other's"), bus.subscribe("mine")
    mine.fileno()
    with connect(bus.address) as other:
        other.publish_many(range(100), topic="other's")
        other.flush(timeout=DEADLINE)
        bus.publish("message", topic="mine")
        bus.flush(timeout=DEADLINE, delivered=True)
        assert is_delivered(bus)
        assert not is_delivered(other)
    unread.close()


def test_what_comes_behind_it_does_not_hold_it_up(bus: Bus) -> None:
    """What is published while it waits, by others or by this handle, is not waited for."""
    channel = bus.subscribe()
    channel.fileno()
    for number in range(600):
        bus.publish((number, bytes(1000)), timeout=DEADLINE)
    waiting = flushing(bus)
    for number in range(600, 1200):
        bus.publish((number, bytes(1000)), timeout=DEADLINE)
    assert [number for number, _ in take(channel, 600)] == list(range(600))
    waiting.result()
    assert only_subscriber(bus).waiting > 0
    assert not is_delivered(bus)
    channel.close()


def test_it_waits_for_what_waits_for_a_full_channel(bus: Bus) -> None:
    """What a full ``block`` channel holds back is not even routed: both kinds of flush wait for it."""
    channel = bus.subscribe(capacity=20_000)
    published = fill(bus, timeout=0.2)
    for delivered in (False, True):
        with pytest.raises(TimedOut):
            bus.flush(timeout=0.1, delivered=delivered)
        with pytest.raises(TimedOut):
            bus.flush(timeout=0, delivered=delivered)
    waiting = flushing(bus)
    taking = Background(take, channel, len(published))
    waiting.result()
    assert [number for number, _ in taking.result()] == published


# --- limits and errors ------------------------------------------------------------------------------------------------


def test_other_calls_work_while_it_waits(bus: Bus) -> None:
    """While one thread waits for the delivery, others publish, receive, and ask."""
    unopened, channel = bus.subscribe("a"), bus.subscribe("b")
    bus.publish("message", topic="a")
    waiting = flushing(bus)
    bus.publish("other", topic="b")
    assert channel.recv(timeout=DEADLINE) == "other"
    bus.flush(timeout=DEADLINE)
    assert len(bus.stats().subscribers) == 2
    assert waiting.is_alive()
    unopened.close()
    waiting.result()


def test_closing_ends_it(bus: Bus) -> None:
    """When the broker is closed while a thread waits, that call ends, too."""
    channel: Channel[Any] = bus.subscribe()
    bus.publish("message")
    waiting = flushing(bus)
    bus.close(timeout=0.5)
    assert isinstance(waiting.error(), (BrokerLost, ClosedError, type(None)))
    channel.close()
