"""A selector receives from channels, connections, processes, and anything else that has a descriptor."""

import gc
import socket
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Selector, TimedOut, channel_to_selector
from mpbroadcast.testing import drain
from tests.support.helpers import DEADLINE, Children, Pipe, answer

Bus = Broadcaster[Any]
Sockets = tuple[socket.socket, socket.socket]


def receive(selector: Selector[Any], count: int) -> list[Any]:
    """Return what the next ``count`` calls of ``receive`` return."""
    return [selector.receive(timeout=DEADLINE) for _ in range(count)]


def nothing_comes(selector: Selector[Any], timeout: float = 0.05) -> None:
    with pytest.raises(TimedOut):
        selector.receive(timeout=timeout)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a pair of sockets: a source, and its other end."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        yield mine, theirs


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


def test_each_kind_of_source(bus: Bus, pipe: Pipe, sockets: Sockets, children: Children, context: BaseContext) -> None:
    """Return a connection's messages, what has a descriptor as long as it is readable, a process once it has ended."""
    channel = bus.subscribe()
    orders, theirs = context.Pipe()
    process = children(context, answer, theirs)
    selector: Selector[Any] = Selector().select(channel).select(pipe[0]).select(sockets[0])
    selector.select(process, lambda ended: (ended, ended.exitcode))
    nothing_comes(selector)
    for number in range(10):
        pipe[1].send(number)
    assert receive(selector, 10) == list(range(10))
    bus.publish("published")
    assert selector.receive(timeout=DEADLINE) == "published"
    sockets[1].send(b"x")
    assert receive(selector, 2) == [sockets[0]] * 2
    selector.select(sockets[0], lambda ready: ready.recv(100))
    assert selector.receive(timeout=DEADLINE) == b"x"
    nothing_comes(selector, 0)
    orders.send("end")
    assert selector.receive(timeout=DEADLINE) == (process, 0)
    nothing_comes(selector)


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


def test_deselected_sources_are_left_alone(bus: Bus, pipe: Pipe) -> None:
    """Keep them open and subscribed; so does the end of the selector."""
    stays, goes = bus.subscribe(), bus.subscribe()
    selector = Selector[Any]().select(stays).select(goes).select(pipe[0])
    selector.deselect(goes)
    selector.deselect(pipe[0])
    pipe[1].send("message")
    bus.publish_many([1, 2])
    assert receive(selector, 2) == [1, 2]
    nothing_comes(selector)
    assert drain(bus, goes) == [1, 2]
    assert pipe[0].recv() == "message"
    selector.deselect(stays)
    with pytest.raises(EOFError):
        selector.receive(timeout=DEADLINE)
    selector.select(stays).select(pipe[0])
    bus.publish(3)
    assert selector.receive(timeout=DEADLINE) == 3
    del selector
    gc.collect()
    bus.publish(4)
    assert stays.recv(timeout=DEADLINE) == 4
    pipe[1].send("last")
    assert pipe[0].recv() == "last"


def test_busy_sources_starve_no_other_one(
    bus: Bus, pipe: Pipe, sockets: Sockets, children: Children, fork: BaseContext
) -> None:
    """An ended process and a socket come soon, though channels and a connection have always something; so does a late one."""
    channel, other = bus.subscribe(), bus.subscribe("other")
    bus.publish_many(["channel"] * 1000)
    bus.publish_many(["other"] * 101, topic="other")
    assert other.recv(timeout=DEADLINE) == "other"  # so that it has taken in the others already
    channel.fileno()
    bus.flush(timeout=DEADLINE, delivered=True)
    process = children(fork, answer, pipe[1])
    pipe[0].send("end")
    process.join(DEADLINE)
    selector = Selector[Any]().select(channel).select(other).select(pipe[0]).select(process, lambda _: "process")
    selector.select(sockets[0], lambda ready: ready.recv(100))
    for _ in range(100):
        pipe[1].send("connection")
    sockets[1].send(b"socket")
    first = Counter(receive(selector, 30))
    assert {*first} == {"channel", "other", "connection", "process", b"socket"}
    assert min(first["channel"], first["other"]) >= 5
    for _ in range(3):
        sockets[1].send(b"late")
        assert b"late" in receive(selector, 200)


def test_ends_remove_their_sources_until_nothing_is_left(bus: Bus, pipe: Pipe, children: Children, fork: BaseContext) -> None:
    """Remove a channel or a connection silently at its end; with none left ``receive`` raises ``EOFError``."""
    channel = bus.subscribe()
    process = children(fork, gc.collect)
    selector = Selector[Any]().select(channel).select(pipe[0]).select(process)
    bus.publish_many([1, 2])
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    pipe[1].send(3)
    pipe[1].close()
    results = receive(selector, 4)
    assert process in results
    assert sorted(result for result in results if result is not process) == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(EOFError):
            selector.receive(timeout=DEADLINE)
