"""Channels and broadcasters that go from one process to another, under every start method."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import os
import pickle
import time
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerLost, ChannelInUse, connect, start_broadcaster
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    everything,
    finish,
    only_subscriber,
    take,
    wait_until,
)

Bus = Broadcaster[Any]


# --- a channel for a child --------------------------------------------------------------------------------------------


def test_child_misses_nothing(bus: Bus, children: Children, every_context: BaseContext) -> None:
    """A channel handed to a process gives it what was published before it started, while it starts, and after."""
    channel = bus.subscribe()
    results, theirs = every_context.Pipe()
    bus.publish_many(range(100))
    child = children(every_context, workers.receive, channel, theirs, 300)
    bus.publish_many(range(100, 200))
    wait_until(lambda: only_subscriber(bus).pid == child.pid)
    bus.publish_many(range(200, 300))
    assert answer(results) == list(range(300))
    finish(child)


@pytest.mark.parametrize("farewell", ["close", "collect", "with"])
def test_parent_may_drop_what_it_handed_on(bus: Bus, children: Children, context: BaseContext, farewell: str) -> None:
    """When the parent closes, drops, or leaves the ``with`` of a handed-on channel, the child still gets everything."""
    orders, theirs = context.Pipe()
    channel = bus.subscribe()
    bus.publish("before")
    if farewell == "with":
        with channel:
            child = children(context, workers.receive_on_order, channel, theirs)
    else:
        child = children(context, workers.receive_on_order, channel, theirs)
        if farewell == "close":
            channel.close()
        del channel
    gc.collect()
    assert answer(orders) == "started"
    bus.publish("after")
    bus.flush(timeout=DEADLINE)
    assert only_subscriber(bus).waiting == 2
    orders.send("receive")
    wait_until(lambda: only_subscriber(bus).delivered == 2)
    bus.close(timeout=DEADLINE)
    assert answer(orders) == ["before", "after"]
    finish(child)


def test_parent_may_unsubscribe_what_it_handed_on(bus: Bus, children: Children, context: BaseContext) -> None:
    """``bus.unsubscribe(channel)`` in the parent ends the child's channel: the rest, then a clean end."""
    channel = bus.subscribe()
    results, theirs = context.Pipe()
    children(context, workers.receive_until_end, channel, theirs)
    bus.publish_many(range(10))
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    bus.publish("too late")
    assert answer(results) == list(range(10))
    assert bus.stats().subscribers == ()


def test_child_becomes_the_owner(bus: Bus, children: Children, context: BaseContext) -> None:
    """The process that opens a channel owns it: the statistics show it, and its death ends the subscription."""
    channel = bus.subscribe()
    assert only_subscriber(bus).pid == os.getpid()
    orders, theirs = context.Pipe()
    child = children(context, workers.open_and_hold, channel, theirs)
    assert answer(orders) == child.pid == only_subscriber(bus).pid
    child.kill()
    wait_until(lambda: bus.stats().subscribers == ())


def test_channel_goes_through_a_pipe_to_a_running_process(bus: Bus, children: Children, context: BaseContext) -> None:
    """A channel can be sent, unopened, to a process that runs already."""
    orders, theirs = context.Pipe()
    child = children(context, workers.receive_from_pipe, theirs, 3)
    channel = bus.subscribe()
    bus.publish(1)
    orders.send(channel)
    bus.publish(2)
    del channel
    gc.collect()
    bus.publish(3)
    assert answer(orders) == [1, 2, 3]
    finish(child)


def test_first_opener_wins(bus: Bus, children: Children, context: BaseContext) -> None:
    """Every process but the first that opens gets ``ChannelInUse`` with the owner's PID, and harms nothing."""
    channel = bus.subscribe()
    orders, theirs = context.Pipe()
    bus.publish("for the owner")
    # both get it before anyone opens it
    late_orders, late_theirs = context.Pipe()
    late = children(context, workers.receive_on_order, channel, late_theirs)
    assert answer(late_orders) == "started"
    owner = children(context, workers.open_and_hold, channel, theirs)
    assert answer(orders) == owner.pid
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


def test_open_channel_cannot_be_pickled(bus: Bus) -> None:
    """Pickling a channel that is open raises ``ChannelInUse``, and the channel goes on."""
    channel = bus.subscribe()
    channel.poll(0)
    with pytest.raises(ChannelInUse) as caught:
        pickle.dumps(channel)
    assert caught.value.pid == os.getpid()
    bus.publish("message")
    assert everything(bus, channel) == ["message"]


def test_forked_child_cannot_use_an_open_channel(bus: Bus, children: Children, fork: BaseContext) -> None:
    """A child that inherits an open channel gets ``ChannelInUse``, and the parent's stream is untouched."""
    channel = bus.subscribe()
    bus.publish_many(range(5))
    assert channel.recv(timeout=DEADLINE) == 0
    results, theirs = fork.Pipe()
    child = children(fork, workers.try_to_receive, channel, theirs)
    assert answer(results) == ("ChannelInUse", os.getpid())
    finish(child)
    bus.publish(5)
    assert everything(bus, channel) == [1, 2, 3, 4, 5]


def test_forked_childs_end_does_not_end_the_parents_channels(bus: Bus, children: Children, fork: BaseContext) -> None:
    """What a forked child does with inherited handles at its end leaves the parent's subscriptions alone."""
    opened, unopened = bus.subscribe("a"), bus.subscribe("b")
    opened.poll(0)
    finish(children(fork, workers.publish_one, bus, "from the child"))
    assert len(bus.stats().subscribers) == 2
    for channel, topic in ((opened, "a"), (unopened, "b")):
        bus.publish(topic, topic=topic)
        assert everything(bus, channel) == [topic]


# --- the end of the broadcaster ---------------------------------------------------------------------------------------


def test_close_waits_for_handed_on_channels(bus: Bus, children: Children, fork: BaseContext) -> None:
    """The starter's ``close`` waits until a handed-on channel is opened and drained; its end is clean."""
    orders, theirs = fork.Pipe()
    bus.publish("nobody")
    channel = bus.subscribe()
    child = children(fork, workers.receive_on_order, channel, theirs)
    bus.publish_many(range(100))
    assert answer(orders) == "started"
    closing = Background(bus.close, timeout=DEADLINE)
    closing.wait_until_blocked("close")
    assert closing.is_alive()
    orders.send("receive")
    assert answer(orders) == list(range(100))
    closing.result()
    finish(child)


def test_channel_that_could_not_be_drained_gets_no_clean_end(bus: Bus, children: Children, fork: BaseContext) -> None:
    """A handed-on channel that is not opened before ``close`` runs out of time gets ``BrokerLost``, not the end."""
    orders, theirs = fork.Pipe()
    channel = bus.subscribe()
    child = children(fork, workers.receive_on_order, channel, theirs)
    bus.publish("lost")
    assert answer(orders) == "started"
    bus.close(timeout=0.2)
    orders.send("receive")
    assert answer(orders) == ("BrokerLost", None)
    finish(child)


def test_close_does_not_wait_for_the_closers_own_channels(bus: Bus) -> None:
    """A channel that the closing process itself has open holds up nothing; what was left out is no clean end."""
    channel = bus.subscribe()
    channel.fileno()
    count = bus.publish_many((number, bytes(10_000)) for number in range(1000))
    bus.flush(timeout=DEADLINE)
    bus.close(timeout=3 * DEADLINE)
    received: list[int] = []
    receiving = Background(lambda: received.extend(number for number, _ in iter(lambda: channel.recv(DEADLINE), None)))
    assert isinstance(receiving.error(), BrokerLost)
    assert received == list(range(len(received)))
    assert len(received) < count


def _hold(orders: Connection) -> None:
    answer(orders)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["close", "drop"])
def test_what_no_forked_process_can_open_any_more_is_dropped(
    how: str, when: str, bus: Bus, children: Children, fork: BaseContext, pipe: tuple[Connection, Connection]
) -> None:
    """A process that was forked while the channel was not open could open it until it ended: then its backlog goes."""
    channel = bus.subscribe()
    child = children(fork, _hold, pipe[1])
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
    ends: str, bus: Bus, children: Children, fork: BaseContext, pipe: tuple[Connection, Connection]
) -> None:
    """The last handle does it when it is closed, if the forked process has ended; else the next one of this process does."""
    process = children(fork, _leave_to_a_child, bus.address, pipe[1], ends)
    assert answer(pipe[0]) == 1
    wait_until(lambda: not bus.stats().subscribers)
    pipe[0].send("end")
    finish(process)


def test_many_forks_leave_little(bus: Bus, children: Children, fork: BaseContext, pipe: tuple[Connection, Connection]) -> None:
    """Of the processes that have ended nothing is kept, and one that lives is noticed among them."""
    channel = bus.subscribe()
    bus.publish(bytes(1000))
    before = len(os.listdir("/dev/fd"))
    child = children(fork, _hold, pipe[1])
    for _ in range(50):
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
    assert len(os.listdir("/dev/fd")) < before + 10
    channel.close()
    assert bus.stats().memory > 1000
    pipe[0].send("end")
    finish(child)
    wait_until(lambda: not bus.stats().memory)


@pytest.mark.parametrize("why", ["nothing waits", "its processes have ended"])
def test_close_does_not_wait_for_what_nobody_will_open(why: str, children: Children, fork: BaseContext) -> None:
    """It would wait for as long as its timeout; so it would when an exception leaves the block."""
    orders, theirs = fork.Pipe()
    begun = []

    def fail() -> None:
        with start_broadcaster() as bus:
            channel = bus.subscribe("a")
            child = children(fork, _hold, theirs)
            if why == "nothing waits":
                pickle.dumps(channel)
            else:
                bus.publish("message", topic="a")
                orders.send("end")
                finish(child)
            begun.append(time.monotonic())
            raise workers.Boom

    with pytest.raises(workers.Boom):
        fail()
    assert time.monotonic() - begun[0] < 4.0
    orders.send("end")


# --- a broadcaster for a child ----------------------------------------------------------------------------------------


def test_broadcaster_goes_to_a_running_pool(bus: Bus, every_context: BaseContext) -> None:
    """Tasks of a running ``Pool``, whose workers are daemonic, publish through a broadcaster among their arguments."""
    channel = bus.subscribe()
    with every_context.Pool(2) as pool:
        pids = pool.starmap(workers.publish_one, [(bus, number) for number in range(20)], chunksize=1)
        pool.close()
        pool.join()
    assert os.getpid() not in pids
    assert sorted(take(channel, 20)) == list(range(20))


def test_broadcaster_goes_to_a_process_pool_executor(bus: Bus, context: BaseContext) -> None:
    """Tasks of a ``ProcessPoolExecutor`` publish through a broadcaster among their arguments."""
    channel = bus.subscribe()
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        pids = list(executor.map(workers.publish_one, [bus] * 20, range(20)))
    assert os.getpid() not in pids
    assert sorted(take(channel, 20)) == list(range(20))


def test_pickled_broadcaster_carries_no_key() -> None:
    """The pickle of a broadcaster does not hold the authkey."""
    key = b"a key that can be searched for"
    with start_broadcaster(authkey=key) as bus:
        assert key not in pickle.dumps(bus)
        assert bytes(multiprocessing.current_process().authkey) not in pickle.dumps(bus)


def test_broadcaster_comes_back_from_its_pickle(bus: Bus) -> None:
    """A pickled and unpickled broadcaster is another handle on the same broker."""
    channel = bus.subscribe()
    copy = pickle.loads(pickle.dumps(bus))
    assert copy.address == bus.address
    copy.publish("through the copy")
    copy.close()
    assert channel.recv(timeout=DEADLINE) == "through the copy"
    bus.publish("through the original")
    assert everything(bus, channel) == ["through the original"]


def test_handle_survives_a_fork_while_another_thread_publishes(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Forked at any moment of the parent's publishing, a child publishes at once, and neither harms the other."""
    channel = bus.subscribe(capacity=1 << 32)
    stop = False

    def publish_on() -> int:
        number = 0
        while not stop:
            bus.publish(("parent", number, bytes(number * 37 % 9000)))
            number += 1
        return number

    publishing = Background(publish_on)
    try:
        for _ in range(5):
            for child in [children(fork, workers.publish_numbers, bus, f"child {turn}", 10) for turn in range(3)]:
                finish(child)
    finally:
        stop = True
    count = publishing.result()
    messages = take(channel, count + 5 * 3 * 10)
    assert everything(bus, channel) == []
    ours = [message for message in messages if message[0] == "parent"]
    assert [message[1] for message in ours] == list(range(count))
    assert [len(message[2]) for message in ours] == [number * 37 % 9000 for number in range(count)]
    for turn in range(3):
        theirs = [number for name, number, *_ in messages if name == f"child {turn}"]
        assert sorted(theirs) == sorted([*range(10)] * 5)


# --- a process that is no child ---------------------------------------------------------------------------------------


def test_both_keys_open(fork: BaseContext, children: Children) -> None:
    """The broker takes its own key, and the starter's process key, which children inherit."""
    with start_broadcaster(authkey=b"a key of its own") as bus:
        channel = bus.subscribe()
        with connect(bus.address) as inherited, connect(bus.address, authkey=b"a key of its own") as explicit:
            inherited.publish(1)
            inherited.flush(timeout=DEADLINE)
            explicit.publish(2)
        finish(children(fork, workers.publish_one, bus, 3))
        assert sorted(take(channel, 3)) == [1, 2, 3]


def test_closing_another_handle_only_detaches(bus: Bus) -> None:
    """``close`` of a handle that did not start the broker detaches it; its channels and the broker live on."""
    other = connect(bus.address)
    opened, unopened = other.subscribe(), other.subscribe()
    opened.poll(0)
    other.publish(1)
    other.close()
    other.close()
    bus.publish(2)
    assert sorted(take(opened, 2)) == [1, 2]
    assert sorted(take(unopened, 2)) == [1, 2]


def test_detaching_keeps_a_channel_that_was_sent_away(bus: Bus, children: Children, context: BaseContext) -> None:
    """A process that subscribes for another one and closes its handle leaves that channel, and the broker, alone."""
    orders, theirs = context.Pipe()
    child = children(context, workers.subscribe_and_send_away, bus, theirs)
    channel = answer(orders)
    assert answer(orders) == "detached"
    bus.publish("message")
    assert channel.recv(timeout=DEADLINE) == "message"
    orders.send("end")
    finish(child)
    bus.publish("another")
    assert everything(bus, channel) == ["another"]
