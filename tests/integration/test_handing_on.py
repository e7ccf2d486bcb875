"""Channels and broadcasters that go from one process to another, by fork and pickled."""

import contextlib
import gc
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, ChannelInUse, connect, start_broadcaster
from mpbroadcast.testing import drain
from tests.conftest import descriptors
from tests.support import workers
from tests.support.helpers import DEADLINE, Background, Children, answer, finish, only_subscriber, take, wait_until

Bus = Broadcaster[Any]
Pipe = tuple[Connection, Connection]


@pytest.mark.parametrize("farewell", ["close", "collect", "with", "unsubscribe"])
def test_parent_may_drop_what_it_handed_on(bus: Bus, children: Children, context: BaseContext, farewell: str) -> None:
    """Give the child everything all the same; ``unsubscribe`` ends its channel behind what was published before."""
    orders, theirs = context.Pipe()
    channel = bus.subscribe()
    bus.publish("before")
    child = children(context, workers.receive_on_order, channel, theirs)
    if farewell == "with":
        with channel:
            pass
    elif farewell == "close":
        channel.close()
    elif farewell == "unsubscribe":
        bus.unsubscribe(channel)
        assert bus.stats().subscribers == ()
    del channel
    gc.collect()
    assert answer(orders) == "started"
    bus.publish("after")
    bus.flush(timeout=DEADLINE)
    orders.send("receive")
    if farewell == "unsubscribe":
        assert answer(orders) == ["before"]
    else:
        wait_until(lambda: only_subscriber(bus).delivered == 2)
        bus.close(timeout=DEADLINE)
        assert answer(orders) == ["before", "after"]
    finish(child)


def test_first_opener_wins(bus: Bus, children: Children, context: BaseContext) -> None:
    """Raise in every other process that the channel is in use, with the owner's PID; harm nothing."""
    channel = bus.subscribe()
    orders, theirs = context.Pipe()
    late_orders, late_theirs = context.Pipe()
    bus.publish("for the owner")
    late = children(context, workers.receive_on_order, channel, late_theirs)
    assert answer(late_orders) == "started"  # both have it before one of them opens it
    owner = children(context, workers.open_and_hold, channel, theirs)
    assert answer(orders) == owner.pid == only_subscriber(bus).pid
    late_orders.send("receive")
    assert answer(late_orders) == ("ChannelInUse", owner.pid)
    finish(late)
    for _ in range(2):
        with pytest.raises(ChannelInUse) as caught:
            channel.recv(timeout=0)
        assert caught.value.pid == owner.pid
        assert caught.value.channel is channel
    assert only_subscriber(bus).delivered == 1
    orders.send("end")
    finish(owner)


def _receive_next(iterator: Iterator[Any], results: Connection) -> None:
    try:
        results.send(next(iterator))
    except ChannelInUse as error:
        results.send(workers.describe(error))


def test_an_open_channel_cannot_be_handed_on(bus: Bus, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """Raise from its pickling, and in a child that inherits it or an iteration of it; the parent's messages are untouched."""
    channel = bus.subscribe()
    iterator = iter(channel)
    bus.publish_many(range(6))
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(ChannelInUse) as caught:
        pickle.dumps(channel)
    assert caught.value.pid == os.getpid()
    for inherited in (channel, iterator):
        child = children(fork, _receive_next, inherited, pipe[1])
        assert answer(pipe[0]) == ("ChannelInUse", os.getpid())
        finish(child)
    assert next(iterator) == 2
    bus.publish(6)
    assert drain(bus, channel) == [3, 4, 5, 6]


def _publish_and_close(bus: Bus, channel: Channel[Any]) -> None:
    bus.publish("from the child", topic="a")
    channel.close()


def test_what_a_forked_child_closes_and_its_end_leave_the_parents_alone(
    bus: Bus, children: Children, fork: BaseContext
) -> None:
    """Also the end of a child of a plain ``os.fork``, which runs its exit handlers, does not end the parent's broker."""
    opened, unopened = bus.subscribe("a"), bus.subscribe("b")
    opened.poll(0)
    finish(children(fork, _publish_and_close, bus, opened))
    pid = os.fork()
    if not pid:
        try:
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # what the end of the child's program does
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(bus.stats().subscribers) == 2
    for topic in "ab":
        bus.publish(topic, topic=topic)
    assert drain(bus, opened) == ["from the child", "a"]
    assert drain(bus, unopened) == ["b"]


@pytest.mark.parametrize("in_time", [True, False])
def test_close_waits_for_handed_on_channels(in_time: bool, bus: Bus, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """Until they are opened and drained, which is a clean end; a channel that is not in time has ``BrokerLost``."""
    bus.publish("to no channel")
    channel = bus.subscribe()
    child = children(fork, workers.receive_on_order, channel, pipe[1])
    bus.publish_many(range(100))
    assert answer(pipe[0]) == "started"
    closing = Background(bus.close, timeout=DEADLINE if in_time else 0.2)
    if in_time:
        closing.wait_until_blocked("close")
    else:
        closing.result()
    pipe[0].send("receive")
    assert answer(pipe[0]) == (list(range(100)) if in_time else ("BrokerLost", None))
    closing.result()
    finish(child)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["close", "drop"])
def test_what_no_forked_process_can_open_any_more_is_dropped(
    how: str, when: str, bus: Bus, children: Children, fork: BaseContext, pipe: Pipe
) -> None:
    """A process that was forked while the channel was not open could open it until it ended: then its backlog is dropped."""
    channel = bus.subscribe()
    child = children(fork, answer, pipe[1])
    bus.publish_many(bytes(1000) for _ in range(100))
    bus.unsubscribe(channel)
    if when == "before":
        pipe[0].send("end")
        finish(child)
    if how == "close":
        channel.close()
    del channel
    if when == "after":
        assert bus.stats().memory > 100_000
        pipe[0].send("end")
        finish(child)
    wait_until(lambda: not bus.stats().memory)


@pytest.mark.parametrize("why", ["nothing waits", "its processes have ended"])
def test_close_does_not_wait_for_what_nobody_will_open(why: str, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """It would wait for as long as its timeout; so it would when an exception leaves the block."""
    with contextlib.suppress(workers.Boom), start_broadcaster() as bus:
        channel = bus.subscribe("a")
        child = children(fork, answer, pipe[1])
        if why == "nothing waits":
            pickle.dumps(channel)
        else:
            bus.publish("message", topic="a")
            pipe[0].send("end")
            finish(child)
        begun = time.monotonic()
        raise workers.Boom
    assert time.monotonic() - begun < 4.0
    pipe[0].send("end")


def test_broadcaster_goes_to_a_running_pool(bus: Bus, context: BaseContext) -> None:
    """Publish from tasks, whose processes are daemonic, through a broadcaster among their arguments."""
    channel = bus.subscribe()
    with context.Pool(2) as pool:
        pids = pool.starmap(workers.publish_one, [(bus, number) for number in range(20)], chunksize=1)
        pool.close()
        pool.join()
    assert os.getpid() not in pids
    assert sorted(take(channel, 20)) == list(range(20))


def test_a_broadcaster_is_pickled_without_a_key_and_comes_back_as_another_handle() -> None:
    key = b"a key that can be searched for"
    with start_broadcaster(authkey=key) as bus, bus.subscribe() as channel:
        pickled = pickle.dumps(bus)
        assert key not in pickled
        assert bytes(multiprocessing.current_process().authkey) not in pickled
        copy = pickle.loads(pickled)
        assert copy.address == bus.address
        copy.publish("through the copy")
        copy.close()
        assert channel.recv(timeout=DEADLINE) == "through the copy"
        bus.publish("through the original")
        assert drain(bus, channel) == ["through the original"]


def test_closing_another_handle_only_detaches(bus: Bus) -> None:
    other = connect(bus.address)
    opened, unopened = other.subscribe(), other.subscribe()
    opened.poll(0)
    other.publish(1)
    other.close()
    other.close()
    bus.publish(2)
    for channel in (opened, unopened):
        assert sorted(take(channel, 2)) == [1, 2]


def _leave_to_a_child(address: str, report: Connection, ends: str) -> None:
    """Subscribe, fork, and close all. The child ends before the last handle is closed, or before the next one is made."""
    reader, writer = os.pipe()
    handle: Bus = connect(address)
    channel = handle.subscribe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    channel.close()
    report.send(len(handle.stats().subscribers))
    if ends == "after":
        handle.close()
        del channel, handle
    os.close(writer)
    os.waitpid(child, 0)
    if ends == "before":
        handle.close()
    else:
        with connect(address) as another:
            another.stats()
    answer(report)


@pytest.mark.parametrize("ends", ["before", "after"])
def test_what_no_forked_process_can_open_any_more_is_dropped_without_the_handle_that_made_it(
    ends: str, bus: Bus, children: Children, fork: BaseContext, pipe: Pipe
) -> None:
    """The last handle does it when it is closed, if the forked process has ended; else the next one of this process does."""
    process = children(fork, _leave_to_a_child, bus.address, pipe[1], ends)
    assert answer(pipe[0]) == 1
    wait_until(lambda: not bus.stats().subscribers)
    pipe[0].send("end")
    finish(process)


def test_a_channel_that_is_closed_after_its_broker_leaves_no_descriptor(
    bus: Bus, children: Children, fork: BaseContext, pipe: Pipe
) -> None:
    """Its subscription ended with the broker: no note about it is kept for when the forked process has ended."""
    with connect(bus.address) as handle:
        channel = handle.subscribe()
        children(fork, answer, pipe[1])
        bus.close()
        channel.close()
    pipe[0].send("end")


def test_a_process_that_is_forked_later_keeps_no_channel(bus: Bus, children: Children, fork: BaseContext) -> None:
    """A channel that was closed before the fork cannot be opened in it: those that were forked before are waited for only."""
    (earlier, to_earlier), (later, to_later) = fork.Pipe(), fork.Pipe()
    channel = bus.subscribe()
    child = children(fork, answer, to_earlier)
    channel.close()
    children(fork, answer, to_later)
    assert len(bus.stats().subscribers) == 1
    earlier.send("end")
    finish(child)
    wait_until(lambda: not bus.stats().subscribers)
    later.send("end")


def _close_when_asked(address: str, orders: Connection) -> None:
    """Subscribe, and fork; close all when asked, and report what is left while the forked process lives."""
    before = descriptors()
    reader, writer = os.pipe()
    handle: Bus = connect(address)
    channel = handle.subscribe()
    if not os.fork():
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    orders.send("subscribed")
    answer(orders)
    channel.close()
    handle.close()
    del channel, handle
    orders.send(len(descriptors() - before) - 1)
    os.close(writer)
    os.wait()


def test_nothing_is_kept_for_a_broker_that_was_killed(bus: Bus, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """No call has found that the broker has ended: the handle does when it is closed."""
    process = children(fork, _close_when_asked, bus.address, pipe[1])
    assert answer(pipe[0]) == "subscribed"
    os.kill(bus.stats().pid, signal.SIGKILL)
    bus.close()
    pipe[0].send("close")
    assert answer(pipe[0]) == 0
    finish(process)
