"""A selector receives from channels, connections, processes, and anything else that has a descriptor."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, Selector, TimedOut, channel_to_selector
from tests.support import workers
from tests.support.helpers import DEADLINE, Children, answer, everything, only_subscriber, wait_delivered, wait_until

Bus = Broadcaster[Any]


def receive(selector: Selector[Any], count: int) -> list[Any]:
    """What the next ``count`` calls of ``receive`` return."""
    return [selector.receive(timeout=DEADLINE) for _ in range(count)]


def wait_all_delivered(bus: Bus, *channels: Channel[Any]) -> None:
    """Open the channels, and wait until all that was published is in their pipes."""
    for channel in channels:
        channel.fileno()
    bus.flush(timeout=DEADLINE)
    wait_until(lambda: all(one.delivered == one.published for one in bus.stats().subscribers))


# --- channels ---------------------------------------------------------------------------------------------------------


def test_selector_receives_from_several_channels(bus: Bus) -> None:
    """Whatever channel a message comes on, ``receive`` returns it, each channel's messages in order."""
    first, second = bus.subscribe("first"), bus.subscribe("second")
    selector = Selector[Any]().select(first).select(second)
    for number in range(50):
        bus.publish(("first", number), topic="first")
        bus.publish(("second", number), topic="second")
    messages = receive(selector, 100)
    for name in ("first", "second"):
        assert [number for source, number in messages if source == name] == list(range(50))


def test_with_topic_reaches_the_handler(bus: Bus) -> None:
    """A handler of a ``with_topic`` channel gets the pair."""
    channel = bus.subscribe("room:*", with_topic=True)
    selector = Selector[Any]().select(channel, lambda pair: pair)
    bus.publish("hello", topic="room:7")
    assert selector.receive(timeout=DEADLINE) == ("room:7", "hello")


def test_messages_before_the_selector_are_received(bus: Bus) -> None:
    """What a channel had taken in already, when it was selected, is not overlooked."""
    channel = bus.subscribe()
    channel.fileno()
    bus.publish_many(range(100))
    wait_delivered(bus, 100)
    assert channel.recv(timeout=0) == 0
    selector = Selector[Any]().select(channel)
    assert [selector.receive(timeout=0) for _ in range(99)] == list(range(1, 100))


def test_selector_opens_the_channel(bus: Bus, children: Children, fork: BaseContext) -> None:
    """``select`` is one of the ways to open a channel; another process is refused from then on."""
    channel = bus.subscribe()
    results, theirs = fork.Pipe()
    orders_child = children(fork, workers.receive_on_order, channel, theirs)
    assert results.poll(DEADLINE)
    assert results.recv() == "started"
    selector = Selector[Any]().select(channel)
    bus.publish("message")
    assert selector.receive(timeout=DEADLINE) == "message"
    results.send("receive")
    assert results.poll(DEADLINE)
    assert results.recv() == ("ChannelInUse", os.getpid())
    orders_child.join(DEADLINE)
    assert only_subscriber(bus).pid == os.getpid()
    channel.close()


# --- everything else --------------------------------------------------------------------------------------------------


def test_selector_receives_from_connections(bus: Bus) -> None:
    """A ``Connection`` gives its messages beside a channel's, through its handler or as they are."""
    channel = bus.subscribe()
    plain, plain_end = multiprocessing.Pipe()
    handled, handled_end = multiprocessing.Pipe()
    selector: Selector[Any] = Selector()
    selector.select(channel).select(plain).select(handled, lambda message: ("handled", message))
    with plain, plain_end, handled, handled_end:
        plain_end.send("plain")
        assert selector.receive(timeout=DEADLINE) == "plain"
        handled_end.send("message")
        assert selector.receive(timeout=DEADLINE) == ("handled", "message")
        bus.publish("published")
        assert selector.receive(timeout=DEADLINE) == "published"
        for number in range(10):
            plain_end.send(number)
        assert receive(selector, 10) == list(range(10))


def test_process_is_reported_once_it_has_ended_joined_and_removed(children: Children, context: BaseContext) -> None:
    """A process that runs is no event; its end is reported once, with its exit code there; then it is selected no more."""
    orders, theirs = context.Pipe()
    process = children(context, answer, theirs)
    selector = Selector[Any]().select(process, lambda ended: (ended, ended.exitcode))
    with pytest.raises(TimeoutError):
        selector.receive(timeout=0.05)
    orders.send("end")
    assert selector.receive(timeout=DEADLINE) == (process, 0)
    with pytest.raises(EOFError):
        selector.receive(timeout=DEADLINE)


def test_anything_with_a_descriptor_can_be_selected(bus: Bus) -> None:
    """An object with ``fileno()`` is handed to its handler, or returned, as long as it is readable."""
    channel = bus.subscribe()
    mine, theirs = socket.socketpair()
    plain, plain_end = socket.socketpair()
    with mine, theirs, plain, plain_end:
        selector = Selector[Any]().select(mine, lambda ready: ready.recv(100)).select(plain).select(channel)
        with pytest.raises(TimeoutError):
            selector.receive(timeout=0)
        theirs.send(b"bytes")
        assert selector.receive(timeout=DEADLINE) == b"bytes"
        with pytest.raises(TimeoutError):
            selector.receive(timeout=0)
        plain_end.send(b"x")
        assert receive(selector, 2) == [plain, plain]
        assert plain.recv(1) == b"x"
        bus.publish("message")
        assert selector.receive(timeout=DEADLINE) == "message"


# --- map, merge, deselect ---------------------------------------------------------------------------------------------


def test_maps_are_applied_in_turn(bus: Bus) -> None:
    """A second ``map`` gets what the first one made."""
    channel = bus.subscribe()
    selector = channel_to_selector(channel).map(lambda number: number + 1).map(lambda number: number * 10)
    bus.publish(1)
    assert selector.receive(timeout=DEADLINE) == 20


def test_merge_takes_over_sources_with_their_handlers(bus: Bus) -> None:
    """A merged selector brings its sources, and what was mapped in it stays mapped, and no more than that."""
    first, second = bus.subscribe("first"), bus.subscribe("second")
    mapped: Selector[Any] = channel_to_selector(first).map(lambda message: ("first", message))
    other: Selector[Any] = channel_to_selector(second).map(lambda message: ("second", message))
    selector = mapped.merge(other)
    bus.publish(1, topic="first")
    assert selector.receive(timeout=DEADLINE) == ("first", 1)
    bus.publish(2, topic="second")
    assert selector.receive(timeout=DEADLINE) == ("second", 2)


def test_deselected_sources_are_left_alone(bus: Bus) -> None:
    """``deselect`` takes a source out, whatever it is; the channel itself stays subscribed."""
    stays, goes = bus.subscribe(), bus.subscribe()
    connection, end = multiprocessing.Pipe()
    selector = Selector[Any]().select(stays).select(goes).select(connection)
    with connection, end:
        selector.deselect(goes)
        selector.deselect(connection)
        end.send("message")
        bus.publish_many([1, 2])
        assert receive(selector, 2) == [1, 2]
        with pytest.raises(TimeoutError):
            selector.receive(timeout=0.05)
        assert everything(bus, goes) == [1, 2]
        assert connection.recv() == "message"
        selector.deselect(stays)
        with pytest.raises(EOFError):
            selector.receive(timeout=DEADLINE)
        selector.select(stays)
        bus.publish(3)
        assert selector.receive(timeout=DEADLINE) == 3


# --- time, fairness, ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_receive_runs_out_of_time(bus: Bus, timeout: float) -> None:
    """Without a message in time ``receive`` raises a ``TimeoutError``, and goes on."""
    channel = bus.subscribe()
    selector = channel_to_selector(channel)
    with pytest.raises(TimedOut):
        selector.receive(timeout=timeout)
    bus.publish("later")
    assert selector.receive(timeout=DEADLINE) == "later"


def test_busy_channels_share_fairly(bus: Bus) -> None:
    """Of several channels that always have something, each gets its turn."""
    channels = [bus.subscribe(name) for name in "abc"]
    for name in "abc":
        bus.publish_many([name] * 100, topic=name)
    wait_all_delivered(bus, *channels)
    selector: Selector[Any] = Selector()
    for channel in channels:
        selector.select(channel)
    first = receive(selector, 30)
    assert [first.count(name) >= 5 for name in "abc"] == [True] * 3
    assert sorted(first + receive(selector, 270)) == sorted("abc" * 100)


def test_busy_channel_starves_nobody(bus: Bus, children: Children, fork: BaseContext) -> None:
    """A connection, an ended process, and a socket come soon, though a channel has always something."""
    channel = bus.subscribe()
    bus.publish_many(["busy"] * 300)
    wait_all_delivered(bus, channel)
    connection, end = fork.Pipe()
    mine, theirs = socket.socketpair()
    process = children(fork, workers.exit_with, 0)
    process.join(DEADLINE)
    selector = Selector[Any]().select(channel).select(connection).select(process, lambda _: "process")
    selector.select(mine, lambda ready: ready.recv(100))
    with mine, theirs, connection, end:
        end.send("connection")
        theirs.send(b"socket")
        first = receive(selector, 30)
        assert {"busy", "connection", "process", b"socket"} == set(first)
        bus.publish("last")
        assert receive(selector, 300 - first.count("busy"))[-1] == "busy"
        assert selector.receive(timeout=DEADLINE) == "last"


def test_late_source_is_noticed_while_a_channel_is_busy(bus: Bus) -> None:
    """What becomes ready while a channel has always something gets its turn long before that channel is empty."""
    channel = bus.subscribe()
    bus.publish_many(["busy"] * 1000)
    wait_all_delivered(bus, channel)
    connection, end = multiprocessing.Pipe()
    selector = Selector[Any]().select(channel).select(connection)
    with connection, end:
        for turn in range(3):
            assert receive(selector, 10) == ["busy"] * 10
            end.send(turn)
            assert turn in receive(selector, 200)


def test_busy_connection_does_not_starve_a_channel(bus: Bus) -> None:
    """A channel's message comes soon, though a connection has always something."""
    channel = bus.subscribe()
    connection, end = multiprocessing.Pipe()
    selector = Selector[Any]().select(connection).select(channel)
    with connection, end:
        for _ in range(100):
            end.send("busy")
        bus.publish("message")
        wait_delivered(bus, 1)
        assert "message" in receive(selector, 20)


def test_ends_remove_their_sources_until_nothing_is_left(bus: Bus, children: Children, fork: BaseContext) -> None:
    """The end of a channel or a connection takes it out, silently; with none left ``receive`` raises ``EOFError``."""
    channel = bus.subscribe()
    connection, end = fork.Pipe()
    process = children(fork, workers.exit_with, 0)
    selector = Selector[Any]().select(channel).select(connection).select(process)
    with connection:
        bus.publish_many([1, 2])
        bus.flush(timeout=DEADLINE)
        bus.unsubscribe(channel)
        end.send(3)
        end.close()
        results = receive(selector, 4)
        assert process in results
        assert sorted(result for result in results if result is not process) == [1, 2, 3]
        for _ in range(2):
            with pytest.raises(EOFError):
                selector.receive(timeout=DEADLINE)


def test_end_of_one_source_leaves_the_others(bus: Bus) -> None:
    """When one channel ends, ``receive`` waits for the others as before."""
    ends, stays = bus.subscribe(), bus.subscribe()
    selector = Selector[Any]().select(ends).select(stays)
    bus.unsubscribe(ends)
    with pytest.raises(TimeoutError):
        selector.receive(timeout=0.05)
    bus.publish("message")
    assert selector.receive(timeout=DEADLINE) == "message"


def test_selector_leaves_its_sources_open(bus: Bus) -> None:
    """The end of a selector closes none of its sources."""
    channel = bus.subscribe()
    connection, end = multiprocessing.Pipe()
    selector = Selector[Any]().select(channel).select(connection)
    with pytest.raises(TimeoutError):
        selector.receive(timeout=0)
    del selector
    gc.collect()
    bus.publish("message")
    assert channel.recv(timeout=DEADLINE) == "message"
    end.send("message")
    assert connection.recv() == "message"
    connection.close()
    end.close()
