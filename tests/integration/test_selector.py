"""A selector receives from channels, connections, processes, and anything else that has a descriptor."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import pytest

from mpbroadcast import Broadcaster, Selector, TimedOut, channel_to_selector
from tests.support import workers
from tests.support.helpers import DEADLINE, Children, answer, everything, finish, only_subscriber, wait_delivered

Bus = Broadcaster[Any]
Pipe = tuple[Connection, Connection]


def receive(selector: Selector[Any], count: int) -> list[Any]:
    """Return what the next ``count`` calls of ``receive`` return."""
    return [selector.receive(timeout=DEADLINE) for _ in range(count)]


def nothing_comes(selector: Selector[Any], timeout: float = 0.05) -> None:
    """Expect that no source has anything."""
    with pytest.raises(TimedOut):
        selector.receive(timeout=timeout)


class Sources(NamedTuple):
    """One of each kind of source, with what makes it ready."""

    connection: Connection
    sender: Connection
    socket: socket.socket
    peer: socket.socket


@pytest.fixture
def sources(pipe: Pipe) -> Iterator[Sources]:
    """Yield a connection and a socket, and their other ends."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        yield Sources(*pipe, mine, theirs)


# --- channels ---------------------------------------------------------------------------------------------------------


def test_selector_receives_from_several_channels(bus: Bus) -> None:
    """Return each channel's messages in order, from one with topics as pairs; when one ends, wait for the others."""
    first, second = bus.subscribe("first", with_topic=True), bus.subscribe("second")
    selector = Selector[Any]().select(first).select(second)
    for number in range(50):
        bus.publish(number, topic="first")
        bus.publish(("second", number), topic="second")
    messages = receive(selector, 100)
    for name in ("first", "second"):
        assert [number for source, number in messages if source == name] == list(range(50))
    bus.unsubscribe(first)
    nothing_comes(selector)
    bus.publish("more", topic="second")
    assert selector.receive(timeout=DEADLINE) == "more"


def test_messages_before_the_selector_are_received(bus: Bus) -> None:
    """Overlook nothing of what a channel had taken in already, when it was selected."""
    channel = bus.subscribe()
    channel.fileno()
    bus.publish_many(range(100))
    wait_delivered(bus, 100)
    assert channel.recv(timeout=0) == 0
    selector = Selector[Any]().select(channel)
    assert [selector.receive(timeout=0) for _ in range(99)] == list(range(1, 100))


def test_selector_opens_the_channel(bus: Bus, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """Another process is refused from then on."""
    channel = bus.subscribe()
    child = children(fork, workers.receive_on_order, channel, pipe[1])
    assert answer(pipe[0]) == "started"
    selector = Selector[Any]().select(channel)
    bus.publish("message")
    assert selector.receive(timeout=DEADLINE) == "message"
    pipe[0].send("receive")
    assert answer(pipe[0]) == ("ChannelInUse", os.getpid())
    finish(child)
    assert only_subscriber(bus).pid == os.getpid()


# --- everything else --------------------------------------------------------------------------------------------------


def test_each_kind_of_source(bus: Bus, sources: Sources, children: Children, context: BaseContext) -> None:
    """Return a connection's messages, what has a descriptor as long as it is readable, a process once it has ended."""
    channel = bus.subscribe()
    orders, theirs = context.Pipe()
    process = children(context, answer, theirs)
    selector: Selector[Any] = Selector().select(channel).select(sources.connection).select(sources.socket)
    selector.select(process, lambda ended: (ended, ended.exitcode))
    nothing_comes(selector)
    for number in range(10):
        sources.sender.send(number)
    assert receive(selector, 10) == list(range(10))
    bus.publish("published")
    assert selector.receive(timeout=DEADLINE) == "published"
    sources.peer.send(b"x")
    assert receive(selector, 2) == [sources.socket] * 2
    selector.select(sources.socket, lambda ready: ready.recv(100))
    assert selector.receive(timeout=DEADLINE) == b"x"
    nothing_comes(selector, 0)
    orders.send("end")
    assert selector.receive(timeout=DEADLINE) == (process, 0)
    nothing_comes(selector)


# --- map, merge, deselect ---------------------------------------------------------------------------------------------


def test_maps_are_applied_in_turn_and_merged_with_their_sources(bus: Bus) -> None:
    """What was mapped in a selector stays mapped in the one that it is merged into, and no more than that."""
    first, second = bus.subscribe("first"), bus.subscribe("second")
    mapped: Selector[Any] = channel_to_selector(first).map(lambda number: number + 1).map(lambda number: ("first", number * 10))
    other: Selector[Any] = channel_to_selector(second).map(lambda message: ("second", message))
    selector = mapped.merge(other)
    bus.publish(1, topic="first")
    assert selector.receive(timeout=DEADLINE) == ("first", 20)
    bus.publish(2, topic="second")
    assert selector.receive(timeout=DEADLINE) == ("second", 2)


def test_deselected_sources_are_left_alone(bus: Bus, sources: Sources) -> None:
    """Keep them open and subscribed; so does the end of the selector."""
    stays, goes = bus.subscribe(), bus.subscribe()
    selector = Selector[Any]().select(stays).select(goes).select(sources.connection)
    selector.deselect(goes)
    selector.deselect(sources.connection)
    sources.sender.send("message")
    bus.publish_many([1, 2])
    assert receive(selector, 2) == [1, 2]
    nothing_comes(selector)
    assert everything(bus, goes) == [1, 2]
    assert sources.connection.recv() == "message"
    selector.deselect(stays)
    with pytest.raises(EOFError):
        selector.receive(timeout=DEADLINE)
    selector.select(stays).select(sources.connection)
    bus.publish(3)
    assert selector.receive(timeout=DEADLINE) == 3
    del selector
    gc.collect()
    bus.publish(4)
    assert stays.recv(timeout=DEADLINE) == 4
    sources.sender.send("last")
    assert sources.connection.recv() == "last"


# --- time, fairness, ends ---------------------------------------------------------------------------------------------


def test_busy_channels_share_fairly(bus: Bus) -> None:
    channels = [bus.subscribe(name) for name in "abc"]
    for channel in channels:
        channel.fileno()
    for name in "abc":
        bus.publish_many([name] * 100, topic=name)
    bus.flush(timeout=DEADLINE, delivered=True)
    selector: Selector[Any] = Selector()
    for channel in channels:
        selector.select(channel)
    first = receive(selector, 30)
    assert [first.count(name) >= 5 for name in "abc"] == [True] * 3
    assert sorted(first + receive(selector, 270)) == sorted("abc" * 100)


def test_busy_channel_starves_no_other_source(bus: Bus, sources: Sources, children: Children, fork: BaseContext) -> None:
    """A connection, an ended process, and a socket come soon, though a channel has always something; so does a late one."""
    channel = bus.subscribe()
    channel.fileno()
    bus.publish_many(["busy"] * 1000)
    bus.flush(timeout=DEADLINE, delivered=True)
    process = children(fork, answer, sources.sender)
    sources.connection.send("end")
    process.join(DEADLINE)
    selector = Selector[Any]().select(channel).select(sources.connection).select(process, lambda _: "process")
    selector.select(sources.socket, lambda ready: ready.recv(100))
    sources.sender.send("connection")
    sources.peer.send(b"socket")
    first = receive(selector, 30)
    assert {"busy", "connection", "process", b"socket"} == set(first)
    for turn in range(3):
        assert receive(selector, 10) == ["busy"] * 10
        sources.sender.send(turn)
        assert turn in receive(selector, 200)


def test_busy_connection_does_not_starve_a_channel(bus: Bus, sources: Sources) -> None:
    channel = bus.subscribe()
    selector = Selector[Any]().select(sources.connection).select(channel)
    for _ in range(100):
        sources.sender.send("busy")
    bus.publish("message")
    wait_delivered(bus, 1)
    assert "message" in receive(selector, 20)


def test_ends_remove_their_sources_until_nothing_is_left(
    bus: Bus, sources: Sources, children: Children, fork: BaseContext
) -> None:
    """Remove a channel or a connection silently at its end; with none left ``receive`` raises ``EOFError``."""
    channel = bus.subscribe()
    process = children(fork, workers.exit_with, 0)
    selector = Selector[Any]().select(channel).select(sources.connection).select(process)
    bus.publish_many([1, 2])
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    sources.sender.send(3)
    sources.sender.close()
    results = receive(selector, 4)
    assert process in results
    assert sorted(result for result in results if result is not process) == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(EOFError):
            selector.receive(timeout=DEADLINE)
