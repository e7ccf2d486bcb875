"""A broker that dies is replaced: handles and channels go on, with one error for the gap; and what the supervisor decides."""

import asyncio
import contextlib
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpbroadcast
from mpbroadcast import Broadcaster, BrokerLost, BrokerRestarted, Channel, connect, start_broadcaster, trap_points
from mpbroadcast.broker.host.journal import Journal, replayed
from mpbroadcast.broker.host.supervisor import pause_after
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    Pipe,
    answer,
    calls_that_receive,
    fill,
    finish,
    kill_broker,
    stopped,
    take,
    wait_until,
)
from tests.support.large_workers import Size, limited, number_of

Bus = Broadcaster[Any]


@pytest.fixture
def kept(leaves_nothing: None) -> Iterator[Bus]:
    """Yield a broadcaster whose broker is replaced when it dies."""
    broadcaster: Bus = start_broadcaster(restart=True)
    yield broadcaster
    broadcaster.close(timeout=2.0)


def expect_gap(channel: Channel[Any]) -> None:
    with pytest.raises(BrokerRestarted) as caught:
        channel.recv(timeout=DEADLINE)
    assert caught.value.channel is channel


def supervisor_of(bus: Bus) -> psutil.Process:
    supervisor = psutil.Process(bus.stats().pid).parent()
    assert supervisor is not None
    return supervisor


@contextlib.contextmanager
def without_a_broker(bus: Bus) -> Iterator[psutil.Process]:
    """Kill the broker and stop its supervisor, which is yielded, for the length of a block."""
    supervisor, broker = supervisor_of(bus), psutil.Process(bus.stats().pid)
    supervisor.suspend()
    try:
        broker.kill()
        wait_until(lambda: broker.status() == psutil.STATUS_ZOMBIE)
        yield supervisor
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor.resume()


def test_channels_and_handles_go_on(kept: Bus, transport: Size) -> None:
    """Raise one error at the gap, again and again; nothing is missing or twice before and behind it."""
    channel = kept.subscribe()
    for turn in range(3):
        for number in range(3):
            kept.publish(transport.message(10 * turn + number))
        assert [number_of(message) for message in take(channel, 3)] == [10 * turn, 10 * turn + 1, 10 * turn + 2]
        kill_broker(kept)
        kept.publish_many([-1, -2])
        expect_gap(channel)
        assert take(channel, 2) == [-1, -2]
        assert not channel.poll()


def test_a_system_without_sigtimedwait(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS, where this function does not exist, a dead broker is replaced all the same, also a second time."""
    monkeypatch.delattr(signal, "sigtimedwait", raising=False)
    with start_broadcaster(context=multiprocessing.get_context("fork"), restart=True) as bus:
        supervisor = supervisor_of(bus)
        channel = bus.subscribe()
        for turn in range(2):
            kill_broker(bus)
            bus.publish(turn)
            expect_gap(channel)
            assert channel.recv(DEADLINE) == turn
            assert supervisor_of(bus) == supervisor


def test_subscriptions_keep_their_topics_policy_and_number(kept: Bus) -> None:
    """Keep also topics that came and went later; a channel that is excluded stays so, and one that blocks does."""
    blocks = kept.subscribe("full", capacity=20_000)
    blocks.poll()
    channel = kept.subscribe("a", "b*", overflow="drop_oldest", capacity=12_345, with_topic=True)
    channel.subscribe("c")
    channel.unsubscribe("a")
    channel.poll()
    _, before = kept.stats().subscribers
    kill_broker(kept)
    _, row = kept.stats().subscribers
    assert (row.id, row.topics, row.capacity, row.pid) == (before.id, ("b*", "c"), 12_345, os.getpid())
    for topic in ("a", "b1", "c", "d"):
        kept.publish(topic, topic=topic)
    kept.publish("excluded", topic="c", exclude=channel)
    expect_gap(channel)
    assert take(channel, 2) == [("b1", "b1"), ("c", "c")]
    assert kept.stats().subscribers[1].overflow == "drop_oldest"
    expect_gap(blocks)
    published = fill(kept, topic="full")
    assert [number for number, _ in take(blocks, len(published))] == published
    kept.unsubscribe(channel)
    with pytest.raises(EOFError):
        channel.recv(timeout=DEADLINE)


def test_each_call_that_receives_meets_the_gap_once_and_goes_on(kept: Bus) -> None:
    channel = kept.subscribe()
    calls = calls_that_receive(channel)
    for call in (calls[name] for name in ("recv_many", "next", "selector")):
        kill_broker(kept)
        assert channel.poll(timeout=DEADLINE)
        with pytest.raises(BrokerRestarted):
            call()
        for number in range(2):
            kept.publish(number)
            assert call() == [number]


@pytest.mark.parametrize("opened", [False, True])
def test_a_channel_that_was_handed_on(kept: Bus, context: BaseContext, children: Children, opened: bool) -> None:
    """Go on in the worker, whether the channel was open when the broker died or not; no other process can open it then."""
    channel = kept.subscribe("work")
    mine = kept.subscribe()
    ours, theirs = context.Pipe()
    with ours, theirs:
        worker = children(context, workers.receive_over_a_gap, channel, kept, theirs)
        assert answer(ours) == "here"
        if opened:
            ours.send("go")
            wait_until(lambda: kept.stats().subscribers[0].pid == worker.pid)
        kill_broker(kept)
        if opened:
            with pytest.raises(mpbroadcast.ChannelInUse):
                channel.recv(timeout=DEADLINE)
        kept.publish("end", topic="work")
        if not opened:
            ours.send("go")
        assert answer(ours) == ["gap", "end"]
        finish(worker)
    expect_gap(mine)
    assert take(mine, 2) == ["end", "from the worker"]


def test_who_died_with_the_broker_is_not_kept(kept: Bus, fork: BaseContext, children: Children, pipe: Pipe) -> None:
    """Remove a subscriber that was killed while there was no broker, and one that is killed after that."""
    first, second = (children(fork, workers.open_and_hold, kept.subscribe(), pipe[1]) for _ in range(2))
    assert {answer(pipe[0]), answer(pipe[0])} == {first.pid, second.pid}
    broker = psutil.Process(kept.stats().pid)
    for process in (broker, first):
        process.kill()
    first.join(DEADLINE)
    wait_until(lambda: [row.pid for row in kept.stats().subscribers] == [second.pid])
    second.kill()
    wait_until(lambda: not kept.stats().subscribers)


def test_threads_that_publish_go_on(kept: Bus) -> None:
    """Give the reader each thread's messages in order, and the last ones, while brokers die."""
    channel = kept.subscribe()
    channel.poll()
    done = threading.Event()

    def publish(thread: int) -> int:
        number = 0
        while not done.is_set():
            kept.publish((thread, number))
            number += 1
        kept.publish((thread, number))
        return number

    def receive() -> Any:
        try:
            return channel.recv(DEADLINE)
        except BrokerRestarted:
            return "gap"

    threads = [Background(publish, thread) for thread in range(3)]
    seen: list[Any] = []
    for _ in range(3):
        seen += [receive() for _ in range(1000)]
        kill_broker(kept)
    done.set()
    last = [thread.result() for thread in threads]
    kept.publish("end")
    while seen[-1] != "end":
        seen.append(receive())
    for thread in range(3):
        numbers = [entry[1] for entry in seen if entry[0] == thread]
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == last[thread]
    assert 0 < seen.count("gap") <= 3


@pytest.mark.parametrize("opened", [False, True])
def test_async_iteration_leaves_the_loop_free_while_the_next_broker_is_stopped(
    kept: Bus, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel is opened, or goes over to the next broker, without blocking the loop; it then goes on, without a thread."""
    channel = kept.subscribe()
    if opened:
        channel.poll()
    kill_broker(kept)
    ticks = waits = 0

    def reach(name: str, subject: object = None) -> None:
        nonlocal waits
        waits += name in ("answering", "waiting for a reply")

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    async def receive() -> Any:
        ticking = asyncio.create_task(tick())
        threads = threading.active_count()
        with stopped(kept.stats().pid):
            monkeypatch.setattr(trap_points, "reach", reach)
            receiving = asyncio.ensure_future(anext(channel))
            while not waits and not receiving.done():
                await asyncio.sleep(0.001)
            begin = ticks
            while ticks < begin + 10:
                await asyncio.sleep(0.001)
            assert not receiving.done()
            assert threading.active_count() == threads
        with pytest.raises(BrokerRestarted):
            await asyncio.wait_for(receiving, DEADLINE)
        monkeypatch.undo()
        kept.publish("next")
        message = await asyncio.wait_for(anext(channel), DEADLINE)
        ticking.cancel()
        return message

    assert asyncio.run(receive()) == "next"


@pytest.mark.parametrize("opened", [False, True])
def test_a_channel_that_is_dropped_is_not_kept(kept: Bus, opened: bool) -> None:
    channel = kept.subscribe()
    if opened:
        channel.poll()
    os.kill(kept.stats().pid, signal.SIGKILL)
    del channel
    wait_until(lambda: not kept.stats().subscribers)


def test_a_broker_that_dies_again_and_again_is_given_up(kept: Bus) -> None:
    """Raise that it is lost from each call, at once, also from those that wait for the next broker; leave nothing."""
    channel = kept.subscribe()
    channel.poll()
    for _ in range(4):
        kill_broker(kept)
    expect_gap(channel)
    with without_a_broker(kept) as supervisor:
        waiting = Background(connect, kept.address), Background(channel.recv)
        waiting[0].wait_until_blocked("connect")
        waiting[1].wait_until_blocked("recv")
    for one in waiting:
        assert isinstance(one.error(timeout=5), BrokerLost)
    wait_until(lambda: not supervisor.is_running() or supervisor.status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(BrokerLost):
        kept.publish(1)
    with pytest.raises(BrokerLost):
        channel.recv(timeout=DEADLINE)
    assert not os.path.exists(kept.address)


def test_a_killed_supervisor_changes_nothing(kept: Bus) -> None:
    """The broker goes on, ends with its starter, and is not replaced any more."""
    channel = kept.subscribe()
    channel.poll()
    supervisor_of(kept).kill()
    kept.publish(1)
    assert channel.recv(timeout=DEADLINE) == 1
    os.kill(kept.stats().pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(BrokerLost):
        channel.recv(timeout=DEADLINE)
    with pytest.raises(BrokerLost):
        kept.publish(2)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("address", ["folder", "chosen"])
def test_connect_waits_for_the_next_broker(address: str, temporary_folder: Path) -> None:
    """While there is none; and not when none will come."""
    with start_broadcaster(address=temporary_folder / "chosen" if address == "chosen" else None, restart=True) as bus:
        with without_a_broker(bus):
            waiting = Background(connect, bus.address)
            waiting.wait_until_blocked("connect")
        with waiting.result() as other:
            assert other.stats().pid == bus.stats().pid
        with without_a_broker(bus) as supervisor:
            waiting = Background(connect, bus.address)
            waiting.wait_until_blocked("connect")
            supervisor.kill()
            assert isinstance(waiting.error(timeout=5), BrokerLost)


def test_patience() -> None:
    """Pause longer with deaths that come one after the other, and end; forget old deaths."""
    deaths: deque[float] = deque()
    assert [pause_after(deaths, now) for now in range(5)] == [0.02, 0.04, 0.08, 0.16, None]
    deaths.clear()
    assert all(pause_after(deaths, now) == 0.02 for now in range(0, 1000, 31))


@pytest.fixture
def journal() -> Iterator[Callable[[], Journal]]:
    """Yield what makes a journal, and then others that read what the first one has written."""
    made: list[Journal] = []

    def make() -> Journal:
        made.append(Journal(made[0].files if made else None))
        return made[-1]

    yield make
    for file in made[0].files:
        os.close(file)


def test_a_journal_gives_back_what_was_put(journal: Callable[[], Journal]) -> None:
    """After any number of changes, also so many that it is written anew."""
    first = journal()
    for number in range(3000):
        first.put({"id": number % 7, "topics": ["x" * 100], "turn": number})
        if number % 5 == 0:
            first.drop(number % 3)
    assert len(first.entries) >= 4
    assert sum(os.fstat(file).st_size for file in first.files) < 300_000
    assert journal().entries == first.entries


def test_a_journal_that_may_not_grow(journal: Callable[[], Journal]) -> None:
    """Raise nothing; give back what was so at a time, and all again when there is room for it."""
    first = journal()
    states: list[dict[int, Any]] = [{}]
    with limited(resource.RLIMIT_FSIZE, 2000):
        for number in range(100):
            first.put({"id": number, "topics": ["x" * 50]})
            states.append(dict(first.entries))
        assert 10 < len(journal().entries) < 30
        assert journal().entries in states
        for number in range(5, 100):
            first.drop(number)
        first.put({"id": 100, "topics": []})
        for number in range(300):
            first.put({"id": 101, "topics": [], "turn": number})
        assert set(journal().entries) == {*range(5), 100, 101}
    first.put({"id": 102, "topics": []})
    assert journal().entries == first.entries


def test_a_limit_on_the_size_of_files(fork: BaseContext) -> None:
    """However many subscribe, all works; a broker that takes over knows those that could be written down."""
    with limited(resource.RLIMIT_FSIZE, 20_000):
        bus: Bus = start_broadcaster(context=fork, restart=True)
    with bus:
        topics = [f"{number}:" + "x" * 500 for number in range(100)]
        channels = [bus.subscribe(topic) for topic in topics]
        for number, topic in enumerate(topics):
            bus.publish(number, topic=topic)
            assert channels[number].recv(timeout=DEADLINE) == number
        kill_broker(bus)
        expect_gap(channels[0])
        with pytest.raises(BrokerLost):
            channels[99].recv(timeout=DEADLINE)
        bus.publish(5, topic=topics[0])
        assert channels[0].recv(timeout=DEADLINE) == 5
        for channel in channels:
            channel.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers()))), st.integers(0, 20))
def test_cut_lines_are_the_state_before_them(changes: list[tuple[int, int | None]], cut: int) -> None:
    """Whatever was written, and wherever it stops."""
    lines = []
    for number, value in changes:
        lines.append(b'{"id": %d}\n' % number if value is None else b'{"id": %d, "v": %d}\n' % (number, value))
    whole = b"".join(lines)[: -cut or None]
    expected: dict[int, Any] = {}
    for number, value in changes[: whole.count(b"\n")]:
        expected.pop(number, None)
        if value is not None:
            expected[number] = {"id": number, "v": value}
    assert replayed(whole) == expected
