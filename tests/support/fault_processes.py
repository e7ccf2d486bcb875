"""What the processes of the fault table do: they publish, subscribe and start brokers, and meet their moment on the way."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, BrokerRestarted, Channel, start_broadcaster
from tests.support.helpers import DEADLINE, answer
from tests.support.traps import IN_RING, INTERRUPTED, Bait, Trap, blocked, set_trap, spring_at

SMALL: Final = 100_000  # bytes of a backlog that is soon full, its pipe included
SHORT: Final = 1_900  # bytes of a message that goes through the pipe
LONG: Final = 600_000  # bytes of a message that no pipe takes at once
IN_MEMORY: Final = 3_000_000
MANY: Final = 400  # short messages: more than a small backlog and the pipes before it take
GAP: Final = ("gap", 0)  # stands among the messages that were received where a channel raised BrokerRestarted
EARLY: Final = ("connecting", "handshake", "pipe in flight")  # it comes by itself in the first use of a handle

Entry = tuple[str, int]
"""Whose message it is, and its number; or the gap."""


def message(who: str, number: int, size: int) -> tuple[str, int, bytes]:
    """A message that shows whether all of it has come."""
    return Bait(who), number, bytes([number % 251]) * size


def whole(received: Any) -> tuple[str, int]:
    """Whose and which message it is; all of its bytes must have come."""
    who, number, data = received
    assert data == bytes([number % 251]) * len(data), f"the bytes of message {number} of {who} are not those that it had"
    return who, number


def read(channel: Channel[Any]) -> Entry:
    """Return what a channel gives next: a message, or the gap that a broker which has died leaves."""
    try:
        return whole(channel.recv(DEADLINE))
    except BrokerRestarted:
        return GAP


def until_the_end(channel: Channel[Any]) -> list[Any]:
    """Return all that a channel gives, and the name of what ends it."""
    entries: list[Any] = []
    try:
        while True:
            entries.append(read(channel))
    except (EOFError, BroadcastError) as error:
        return [*entries, type(error).__name__]


def read_to_the_end(channel: Channel[Any], end: str) -> list[Entry]:
    """Return all that a channel gives up to the error of this name."""
    *entries, ended = until_the_end(channel)
    assert ended == end
    return entries


def witness(bus: Broadcaster[Any], orders: Connection, is_patient: bool) -> None:
    """Receive everything, and report all of it at the end; a patient one does not read before an order comes."""
    channel = bus.subscribe()
    channel.poll(0)
    orders.send("open")
    if is_patient:
        answer(orders)
    orders.send(until_the_end(channel))


def publishing_victim(bus: Broadcaster[Any], trap: Trap, orders: Connection) -> None:
    """Publishes, and meets its moment on the way."""
    set_trap(trap)
    try:
        publish_into_trap(bus, trap, orders)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def publish_into_trap(bus: Broadcaster[Any], trap: Trap, orders: Connection) -> None:
    """Some messages, the one in which the trap springs, and two more."""
    numbers = itertools.count()

    def publish(size: int = 10, topic: str = "") -> None:
        bus.publish(message("victim", next(numbers), size), topic=topic)
        trap.count_one()

    if trap.moment in EARLY:
        trap.arm()
    for _ in range(3):
        publish()
    match trap.moment:
        case "mid-frame":
            trap.arm()
            publish(LONG)
        case "mid-ring":
            trap.arm()
            while not trap.sprung:  # the first few come before there is a ring
                publish(IN_RING)
                bus.flush(DEADLINE)
        case "mid-memory" | "memory in flight":
            trap.arm()
            publish(IN_MEMORY)
        case "blocked":
            spring_at("waiting for room", trap, lambda fd: blocked(fd, bus))
            trap.arm()
            while not trap.sprung:
                publish(SHORT, "full")
        case "idle":
            bus.flush(DEADLINE)
            trap.arm()
            trap.spring()
            answer(orders)
        case "draining" if trap.victim != "starter":
            bus.flush(DEADLINE)
            orders.send("published")
            answer(orders)  # close() has begun
            trap.arm()
            trap.spring()
            answer(orders)
            with contextlib.suppress(BrokerLost):
                bus.publish("too late")
                raise AssertionError("a broker that is being closed has taken a message")
            return
        case "draining":
            for _ in range(MANY):
                publish(SHORT)
            return
    for _ in range(2):
        publish()
    bus.flush(DEADLINE)


def subscribing_victim(bus: Broadcaster[Any], trap: Trap, orders: Connection) -> None:
    """Subscribes and receives, and meets its moment on the way; reports all that it has received."""
    set_trap(trap)
    try:
        if trap.moment in EARLY:
            trap.arm()
        channel = bus.subscribe(capacity=SMALL if trap.moment == "blocked" else None)
        channel.poll(0)
        if trap.moment not in EARLY:
            trap.arm()
        orders.send("open")
        if trap.moment in ("blocked", "draining"):
            trap.spring()
            answer(orders)
        orders.send(until_the_end(channel))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def starting_victim(method: str, trap: Trap, orders: Connection) -> None:
    """Starts a broadcaster, in a session of its own, publishes through it, and closes it."""
    set_trap(trap)
    try:
        if trap.moment in ("connecting", "handshake"):
            trap.arm()
        bus = start_broadcaster(context=multiprocessing.get_context(method))
        orders.send(bus.address)
        answer(orders)  # the witnesses are there
        publish_into_trap(bus, trap, orders)
        if trap.moment == "draining":
            trap.arm()
        else:
            orders.send("published")
            answer(orders)
        bus.close()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


TARGETS: Final[dict[str, Callable[..., None]]] = {
    "publisher": publishing_victim,
    "bystander": publishing_victim,
    "subscriber": subscribing_victim,
    "starter": starting_victim,
}
