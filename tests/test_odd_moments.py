"""Moments that are seldom met: plain forks, a restart at the same address, who waits behind whom."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import threading
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerLost, Channel, ClosedError, connect, start_broadcaster
from tests import workers
from tests.helpers import DEADLINE, Background, Children, answer, finish, take

Bus = Broadcaster[Any]


def test_a_plain_forks_child_that_ends_leaves_its_parents_broker_alone(bus: Bus) -> None:
    """A child of ``os.fork()`` that runs its exit handlers does not end the broker that its parent has started."""
    pid = os.fork()
    if not pid:
        try:
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # what the end of the child's program does
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with bus.subscribe() as channel:
        bus.publish("still there")
        assert channel.recv(timeout=DEADLINE) == "still there"


def test_an_empty_channel_that_was_handed_on_is_not_waited_for(pipe: tuple[Connection, Connection], children: Children) -> None:
    """``close()`` does not wait until a channel is opened that has no message: its holder is too late, and gets an error."""
    with start_broadcaster() as bus:
        children(multiprocessing.get_context("spawn"), workers.receive_until_end, bus.subscribe(), pipe[1])
    assert answer(pipe[0]) == ("BrokerLost", None)


def test_who_does_not_own_a_channel_cannot_close_it(bus: Bus, fork: BaseContext, children: Children) -> None:
    """``close()`` in a process that has not opened the channel lets go of that handle only."""
    channel = bus.subscribe()
    channel.poll(0)
    finish(children(fork, channel.close))
    bus.publish(1)
    assert channel.recv(timeout=DEADLINE) == 1
    channel.close()


def test_who_waits_is_not_overtaken(bus: Bus) -> None:
    """A large message that waits for room gets it, however many small ones others publish."""
    channel = bus.subscribe(capacity=60_000)
    channel.poll(0)
    ended = threading.Event()
    other, small = connect(bus.address), connect(bus.address)

    def publish_small() -> None:
        while not ended.is_set():
            small.publish(b"s" * 50)

    flood = Background(publish_small)
    large = Background(other.publish, b"L" * 59_000)
    while channel.recv(timeout=DEADLINE)[:1] != b"L":
        pass
    large.result()
    ended.set()
    bus.unsubscribe(channel)
    flood.result()
    for _ in channel:
        pass
    other.close()
    small.close()


def test_every_thread_that_receives_gets_the_clean_end(bus: Bus) -> None:
    """However many threads receive from a channel, each has the same clean end."""

    def drain(channel: Channel[Any]) -> str:
        try:
            while True:
                channel.recv(timeout=DEADLINE)
        except Exception as error:
            return type(error).__name__

    for _ in range(20):
        channel = bus.subscribe()
        channel.poll(0)
        threads = [Background(drain, channel) for _ in range(6)]
        bus.publish_many(range(20))
        bus.flush()
        bus.unsubscribe(channel)
        assert {thread.result() for thread in threads} == {"EOFError"}
        channel.close()


def test_a_small_backlog_goes_on_when_one_message_has_been_read(bus: Bus) -> None:
    """Who waits for a backlog of a few messages goes on when the reader has taken one, and not only when it has all."""
    channel = bus.subscribe(capacity=1000)
    channel.poll(0)
    for _ in range(4):
        bus.publish(b"x" * 33)
    assert channel.recv(timeout=DEADLINE) == b"x" * 33
    bus.flush(timeout=DEADLINE)
    assert len(take(channel, 3)) == 3
    channel.close()


def test_closing_without_waiting_still_ends_cleanly_what_is_done() -> None:
    """``close(timeout=0)`` gives a clean end to who has received all, or can from its pipe."""
    bus = start_broadcaster()
    with bus.subscribe() as channel:
        channel.poll(0)
        bus.publish("last")
        bus.flush()
        bus.close(timeout=0)
        assert channel.recv(timeout=DEADLINE) == "last"
        with pytest.raises(EOFError):
            channel.recv(timeout=DEADLINE)


def use_each(pipe: Connection) -> None:
    kept = []
    while (bus := pipe.recv()) is not None:
        kept.append(bus)
        try:
            bus.publish(1)
            pipe.send("published")
        except (BrokerLost, ClosedError) as error:
            pipe.send(repr(error))


def test_a_process_can_use_the_next_broker_at_the_same_address(
    temporary_folder: Path, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """A process that still holds a handle on a broker that has ended can use the one that took its address over."""
    children(fork, use_each, pipe[1])
    address = temporary_folder / "again"
    for _ in range(2):
        with start_broadcaster(address=address) as bus:
            pipe[0].send(bus)
            assert answer(pipe[0]) == "published"
    pipe[0].send(None)
