"""Members of groups that are killed, stopped, or lose their broker, with each number of messages in hand."""

import os
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from random import Random
from struct import iter_unpack, pack
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerRestarted, Channel, GroupStats, start_broadcaster
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    Pipe,
    answer,
    fill,
    finish,
    kill_broker,
    rest,
    stopped,
    take,
    wait_until,
)
from tests.support.large_workers import Size, number_of, numbers

Bus = Broadcaster[Any]
SMALL = Size(100)


def hold(bus: Bus, prefetch: int, orders: Connection) -> None:
    """Join the group "g", then receive as many messages as each order has; at -1, fork a child that keeps all that is open."""
    channel: Channel[Any] = bus.subscribe(group="g", prefetch=prefetch)
    channel.fileno()
    orders.send("open")
    while True:
        count = orders.recv()
        if count >= 0:
            orders.send(numbers(take(channel, count)))
        elif heir := os.fork():
            orders.send(heir)
        else:
            signal.pause()


def worker(bus: Bus, children: Children, fork: BaseContext, pipe: Pipe, prefetch: int) -> BaseProcess:
    process = children(fork, hold, bus, prefetch, pipe[1])
    assert answer(pipe[0]) == "open"
    return process


def group(bus: Bus) -> GroupStats:
    return bus.stats().groups["g"]


def order(pipe: Pipe, count: int) -> Any:
    pipe[0].send(count)
    return answer(pipe[0])


@pytest.mark.parametrize("prefetch", [1, 7])
@pytest.mark.parametrize(("given", "handed"), [(0, 0), (1, 0), (1, 1), (9, 0), (9, 1), (9, 3)])
def test_what_a_killed_member_has_is_lost(
    bus: Bus, children: Children, fork: BaseContext, pipe: Pipe, prefetch: int, handed: int, given: int
) -> None:
    """Exactly what it was given and has not finished, in its pipe, decoded, or in work. All else goes to others, in order."""
    member = worker(bus, children, fork, pipe, prefetch)
    bus.publish_many(map(SMALL.message, range(given)))
    bus.flush(DEADLINE)
    assert order(pipe, handed) == [*range(handed)]
    finished = max(0, handed - 1)
    unfinished = min(given - finished, prefetch)
    wait_until(lambda: group(bus).delivered == finished + unfinished)
    other: Channel[Any] = bus.subscribe(group="g", prefetch=100)
    member.kill()
    wait_until(lambda: group(bus).members == 1)
    assert group(bus) == GroupStats(1, given - finished - unfinished, finished + unfinished, unfinished, 0)
    bus.publish(SMALL.message(given))
    assert numbers(take(other, given - finished - unfinished + 1)) == [*range(finished + unfinished, given + 1)]


def test_a_child_of_a_killed_member_keeps_nothing(bus: Bus, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """A process that was forked from it, and has copies of its descriptors, delays nothing, and gets nothing."""
    member = worker(bus, children, fork, pipe, 2)
    heir = order(pipe, -1)
    other: Channel[Any] = bus.subscribe(group="g")
    try:
        bus.publish_many(range(4))
        bus.flush(DEADLINE)
        member.kill()
        assert take(other, 2) == [2, 3]
        wait_until(lambda: group(bus).members == 1)
        assert group(bus) == GroupStats(1, 0, 4, 2, 0)
        bus.publish_many(range(4, 50))
        assert take(other, 46) == [*range(4, 50)]
    finally:
        os.kill(heir, signal.SIGKILL)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_stopped_member_holds_up_its_own_prefetch(
    bus: Bus, children: Children, fork: BaseContext, pipe: Pipe, prefetch: int, transport: Size
) -> None:
    """While it is stopped, the others get all else, whatever the size; then it has what it was given, in order."""
    member = worker(bus, children, fork, pipe, prefetch)
    assert member.pid is not None
    other: Channel[Any] = bus.subscribe(group="g")
    other.fileno()
    count = 12
    with stopped(member.pid):
        publishing = Background(bus.publish_many, [transport.message(number) for number in range(count)], timeout=DEADLINE)
        got = numbers(take(other, count - prefetch))
        publishing.result()
        bus.flush(DEADLINE)
        while group(bus).waiting:  # of long messages, the stopped one has no more than its pipe takes
            got += numbers(take(other, 1))
        assert group(bus) == GroupStats(2, 0, count, 0, 0)
        held = bus.stats().subscribers[0].delivered
        assert 0 < held <= prefetch
        got += numbers(take(other, count - held - len(got)))
    got += order(pipe, held)
    assert sorted(got) == [*range(count)]
    member.kill()


def test_memory_of_a_killed_member_is_freed(
    bus: Bus, children: Children, fork: BaseContext, pipe: Pipe, transport: Size
) -> None:
    """What it had unread, in rings and in memory of their own, is freed with it."""
    member = worker(bus, children, fork, pipe, 3)
    other: Channel[Any] = bus.subscribe(group="g")
    bus.publish_many([transport.message(number) for number in range(6)], timeout=DEADLINE)
    bus.flush(DEADLINE)
    wait_until(lambda: group(bus).delivered > 0)
    member.kill()
    wait_until(lambda: group(bus).members == 1)
    lost = group(bus).lost
    assert 0 < lost <= 3
    assert numbers(take(other, 6 - lost)) == [*range(lost, 6)]
    wait_until(lambda: bus.stats().memory < 100_000)


def test_each_message_comes_once_or_is_lost(bus: Bus, children: Children, fork: BaseContext) -> None:
    """Members that join, close, end and are killed at random moments get nothing twice, and what none has got is counted."""
    choose = Random(1)
    reader, writer = os.pipe()
    held: Channel[Any] = bus.subscribe(group="g")  # not open: it keeps the group, and takes nothing
    workers = [children(fork, note_each, bus, writer, seed) for seed in range(4)]
    published, kills = 0, 0
    for step in range(100):
        count = choose.randrange(15)
        bus.publish_many(Size(choose.choice([10, 10, 3000, 100_000])).message(published + index) for index in range(count))
        published += count
        if choose.random() < 0.1:
            workers[choose.randrange(4)].kill()
            kills += 1
        for index, process in enumerate(workers):
            if not process.is_alive():
                workers[index] = children(fork, note_each, bus, writer, step + index)
        time.sleep(0.002)
    bus.flush(DEADLINE, delivered=True)
    for process in workers:
        process.kill()
    wait_until(lambda: group(bus).members == 1)
    figures = group(bus)
    held.close()
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        got = [number for (number,) in iter_unpack("<I", file.read())]
    assert len({*got}) == len(got), "no message comes twice"
    assert {*got} <= {*range(published)}
    assert figures == GroupStats(1, 0, published, figures.lost, 0)
    assert figures.lost >= published - len(got), "what was not received is counted"
    assert kills > 5


def note_each(bus: Bus, descriptor: int, seed: int) -> None:
    """Write down the number of each message that comes; now and then close the channel, or end without that."""
    choose = Random(seed)
    channel: Channel[Any] = bus.subscribe(group="g", prefetch=choose.choice([1, 1, 3, 20]))
    while True:
        for message in channel.recv_many() if choose.random() < 0.3 else [channel.recv()]:
            os.write(descriptor, pack("<I", number_of(message)))
        if choose.random() < 0.005:
            channel.close()
            return
        if choose.random() < 0.005:
            os._exit(0)


def test_the_last_member_is_killed(bus: Bus, children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """The group ends with it, and a publisher that waits goes on."""
    member = children(fork, small_group, bus, pipe[1])
    answer(pipe[0])
    publishing = Background(bus.publish_many, [bytes(1000)] * 1000, timeout=DEADLINE)
    wait_until(lambda: any(row.stalls for row in bus.stats().subscribers))
    member.kill()
    assert publishing.result() == 1000
    assert bus.stats().groups == {}


def small_group(bus: Bus, orders: Connection) -> None:
    with bus.subscribe(group="g", capacity=2000) as channel:
        orders.send(channel.fileno())
        time.sleep(3 * DEADLINE)


def test_a_group_outlives_its_broker(children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """It comes back with its members, each with one ``BrokerRestarted``; then they share what is published."""
    with start_broadcaster(restart=True) as bus:
        process = children(fork, receive_over_a_restart, bus, pipe[1])
        assert answer(pipe[0]) == "first"
        unopened: Channel[Any] = bus.subscribe("jobs", group="g", capacity=1 << 20)
        own: Channel[Any] = bus.subscribe("jobs", group="g", capacity=1 << 20)
        own.fileno()
        before = bus.stats()
        kill_broker(bus)
        assert [row.id for row in bus.stats().subscribers] == [row.id for row in before.subscribers]
        assert bus.stats().groups == {"g": GroupStats(3, 0, 0, 0, 0)}
        with pytest.raises(BrokerRestarted):
            own.recv(DEADLINE)
        pipe[0].send("go on")
        assert answer(pipe[0]) == "gap"
        bus.publish_many(range(20), topic="jobs", timeout=DEADLINE)
        got = [own.recv(DEADLINE)]
        wait_until(lambda: group(bus).waiting == 0)
        bus.unsubscribe(unopened)
        bus.unsubscribe(own)
        pipe[0].send("end")
        got += rest(own) + answer(pipe[0])
        assert sorted(got) == [*range(20)]
        finish(process)


def test_a_group_that_is_restored_makes_nobody_wait() -> None:
    """Until a member receives again, the newest messages are kept; then the group goes by its own policy."""
    with start_broadcaster(restart=True) as bus:
        member: Channel[Any] = bus.subscribe(group="g", capacity=5000)
        member.fileno()
        kill_broker(bus)
        bus.publish_many(map(Size(1000).message, range(500)), timeout=DEADLINE)
        bus.flush(DEADLINE)
        with pytest.raises(BrokerRestarted):
            member.recv(DEADLINE)
        kept = numbers(take(member, group(bus).waiting + group(bus).delivered))
        assert kept == [*range(500 - len(kept), 500)]
        assert 0 < len(kept) < 5
        sent = fill(bus)
        assert [number for number, _ in take(member, len(sent))] == sent


def receive_over_a_restart(bus: Bus, orders: Connection) -> None:
    """Have a message in work while the broker dies; then receive up to the end, which an order is followed by."""
    channel: Channel[Any] = bus.subscribe("jobs", group="g", capacity=1 << 20)
    channel.fileno()
    bus.publish("first", topic="jobs")
    orders.send(channel.recv(DEADLINE))
    answer(orders)
    try:
        channel.recv(DEADLINE)
    except BrokerRestarted:
        orders.send("gap")
    got = []
    while not orders.poll(0):
        if channel.poll(0.01):
            got.append(channel.recv(0))
    orders.send(got)
    channel.close()
