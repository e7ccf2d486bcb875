"""A broker that dies is replaced: handles and channels go on, with one error for the gap; and what the supervisor decides."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpbroadcast import (
    Broadcaster,
    BrokerLost,
    BrokerRestarted,
    Channel,
    ChannelInUse,
    ClosedError,
    Selector,
    connect,
    start_broadcaster,
    trap_points,
)
from mpbroadcast.broker.host.journal import Journal, replayed
from mpbroadcast.broker.host.supervisor import Patience
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    finish,
    rest,
    stopped,
    take,
    until_tasks_wait,
    wait_until,
)
from tests.support.large_workers import limited

Bus = Broadcaster[Any]


@pytest.fixture
def kept(leaves_nothing: None) -> Iterator[Bus]:
    """A broadcaster whose broker is replaced when it dies."""
    broadcaster: Bus = start_broadcaster(restart=True)
    yield broadcaster
    broadcaster.close(timeout=2.0)


def kill_broker(bus: Bus) -> int:
    """Kill the broker, and return its process ID when another one is there."""
    pid = bus.stats().pid
    os.kill(pid, signal.SIGKILL)
    wait_for_another(bus, pid)
    return pid


def wait_for_another(bus: Bus, pid: int) -> None:
    """Wait until the broker is not this process any more."""
    wait_until(lambda: bus.stats().pid != pid)


def gap(channel: Channel[Any]) -> None:
    """The next thing that the channel gives is that the broker is another one."""
    with pytest.raises(BrokerRestarted) as caught:
        channel.recv(timeout=DEADLINE)
    assert caught.value.channel is channel


def keeper_of(bus: Bus) -> psutil.Process:
    """The process above the broker."""
    keeper = psutil.Process(bus.stats().pid).parent()
    assert keeper is not None
    return keeper


@contextlib.contextmanager
def without_a_broker(bus: Bus) -> Iterator[psutil.Process]:
    """Meanwhile the broker is dead, and its keeper, which is given, stopped."""
    keeper, broker = keeper_of(bus), psutil.Process(bus.stats().pid)
    keeper.suspend()
    try:
        broker.kill()
        wait_until(lambda: broker.status() == psutil.STATUS_ZOMBIE)
        yield keeper
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            keeper.resume()


# --- what users see


def test_channels_and_handles_go_on(kept: Bus) -> None:
    """One error in the place of the gap, again and again, and nothing is missing or twice before and behind it."""
    channel = kept.subscribe()
    for turn in range(3):
        kept.publish_many(range(turn * 10, turn * 10 + 10))
        assert take(channel, 10) == list(range(turn * 10, turn * 10 + 10))
        kill_broker(kept)
        kept.publish_many([-1, -2])
        gap(channel)
        assert take(channel, 2) == [-1, -2]
        assert not channel.poll()


def test_under_each_start_method(every_context: BaseContext) -> None:
    """The keeper starts brokers whatever way it was started itself."""
    with start_broadcaster(context=every_context, restart=True) as bus:
        channel = bus.subscribe()
        assert not channel.poll()
        kill_broker(bus)
        bus.publish(1)
        gap(channel)
        assert channel.recv(timeout=DEADLINE) == 1


@pytest.mark.parametrize("size", [10_000, 3 << 20])
def test_large_messages_go_on(kept: Bus, size: int) -> None:
    """Rings and memory of their own are made anew."""
    channel = kept.subscribe()
    for number in range(3):
        kept.publish(bytes([number]) * size)
        if number:
            gap(channel)
        assert channel.recv(timeout=DEADLINE) == bytes([number]) * size
        kill_broker(kept)


def test_subscriptions_keep_their_topics_policy_and_number(kept: Bus) -> None:
    """Also those that were added and dropped later; and who is excluded stays so."""
    channel = kept.subscribe("a", "b*", overflow="drop_oldest", capacity=12_345, with_topic=True)
    channel.subscribe("c")
    channel.unsubscribe("a")
    channel.poll()
    before = kept.stats().subscribers
    kill_broker(kept)
    (row,) = kept.stats().subscribers
    assert (row.id, row.topics, row.capacity, row.pid) == (before[0].id, ("b*", "c"), 12_345, os.getpid())
    for topic in ("a", "b1", "c", "d"):
        kept.publish(topic, topic=topic)
    kept.publish("nobody", topic="c", exclude=channel)
    gap(channel)
    assert take(channel, 2) == [("b1", "b1"), ("c", "c")]
    assert kept.stats().subscribers[0].overflow == "drop_oldest"
    kept.unsubscribe(channel)
    assert rest(channel) == []


def test_recv_many_poll_iteration_and_async(kept: Bus) -> None:
    """All ways of receiving meet the gap once, and go on."""
    channel = kept.subscribe()
    channel.poll()
    kill_broker(kept)
    assert channel.poll(timeout=DEADLINE)
    with pytest.raises(BrokerRestarted):
        channel.recv_many(timeout=DEADLINE)
    kept.publish(1)
    assert channel.recv_many(timeout=DEADLINE) == [1]
    kill_broker(kept)
    kept.publish(2)
    with pytest.raises(BrokerRestarted):
        next(channel)
    assert next(channel) == 2

    async def receive() -> Any:
        with pytest.raises(BrokerRestarted):
            await asyncio.wait_for(anext(channel), DEADLINE)
        kept.publish(3)
        return await asyncio.wait_for(anext(channel), DEADLINE)

    async def both() -> Any:
        receiving = asyncio.create_task(receive())
        await until_tasks_wait()
        await asyncio.to_thread(kill_broker, kept)
        return await receiving

    assert asyncio.run(both()) == 3


def test_a_selector_goes_on(kept: Bus) -> None:
    """The channel stays selected, with its new descriptor."""
    channel, other = kept.subscribe("one"), kept.subscribe("two")
    selector = Selector[Any]().select(channel).select(other)
    kept.publish(1, topic="one")
    assert selector.receive(timeout=DEADLINE) == 1
    kill_broker(kept)
    for _ in range(2):
        with pytest.raises(BrokerRestarted):
            selector.receive(timeout=DEADLINE)
    kept.publish(2, topic="two")
    assert selector.receive(timeout=DEADLINE) == 2
    kept.publish(1, topic="one")
    assert selector.receive(timeout=DEADLINE) == 1


def test_flush_says_once_that_something_may_be_missing(kept: Bus) -> None:
    """Only to a handle that had published."""
    other: Bus = connect(kept.address)
    kept.publish(1)
    kept.flush(timeout=DEADLINE)
    kill_broker(kept)
    with pytest.raises(BrokerRestarted):
        kept.flush(timeout=DEADLINE)
    kept.flush(timeout=DEADLINE)
    other.flush(timeout=DEADLINE)
    other.close()


@pytest.mark.parametrize("opened", [False, True])
def test_a_channel_that_was_handed_on(kept: Bus, context: BaseContext, children: Children, opened: bool) -> None:
    """It goes on in its worker, whether it was open when the broker died or not; nobody else can open it then."""
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
            with pytest.raises(ChannelInUse):
                channel.recv(timeout=DEADLINE)
        kept.publish("end", topic="work")
        if not opened:
            ours.send("go")
        assert answer(ours) == ["gap", "end"]
        finish(worker)
    gap(mine)
    assert take(mine, 2) == ["end", "from the worker"]


def test_a_channel_that_is_not_read_again_holds_up_nobody(kept: Bus) -> None:
    """Until it is received from, its backlog keeps the newest; from then on, it is what it was subscribed as."""
    channel = kept.subscribe(capacity=50_000)
    assert not channel.poll()
    kill_broker(kept)
    for number in range(1000):
        kept.publish((number, bytes(1000)), timeout=DEADLINE)
    kept.flush(timeout=DEADLINE)
    gap(channel)
    numbers = [channel.recv(timeout=DEADLINE)[0]]
    while numbers[-1] != 999:
        numbers.append(channel.recv(timeout=DEADLINE)[0])
    assert numbers == list(range(numbers[0], 1000))
    assert kept.stats().subscribers[0].overflow == "block"


def pipes() -> list[str]:
    """The pipes that this process has open."""
    return [link for fd in os.listdir("/proc/self/fd") if (link := _link(fd)).startswith("pipe:")]


def _link(fd: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}")
    return ""


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="shows the descriptors of a process")
def test_a_channel_that_is_closed_before_it_has_gone_over_keeps_no_pipe(kept: Bus) -> None:
    """Neither that of the broker that has died, nor that of the next one."""
    channel = kept.subscribe()
    before = pipes()
    channel.poll(0)
    kill_broker(kept)
    with stopped(kept.stats().pid), pytest.raises(TimeoutError):
        channel.recv(timeout=0.2)
    channel.close()
    assert sorted(pipes()) == sorted(before)


def test_one_that_was_unsubscribed_still_ends(kept: Bus) -> None:
    """It raises for the gap, and then has a clean end."""
    channel = kept.subscribe()
    channel.poll()
    kept.unsubscribe(channel)
    wait_until(lambda: not kept.stats().subscribers)
    kill_broker(kept)
    seen = []
    for _ in range(2):
        try:
            channel.recv(timeout=DEADLINE)
        except (BrokerRestarted, EOFError) as error:
            seen.append(type(error))
    assert seen in ([BrokerRestarted, EOFError], [EOFError, EOFError])


def _subscribe_and_sleep(bus: Bus, report: Connection) -> None:
    channel = bus.subscribe("x")
    channel.poll()
    report.send("ready")
    signal.pause()


def test_who_died_with_the_broker_is_not_kept(kept: Bus, fork: BaseContext, children: Children) -> None:
    """A subscriber that was killed while there was no broker is gone, and one that is killed after that, too."""
    ours, theirs = fork.Pipe()
    with ours, theirs:
        first = children(fork, _subscribe_and_sleep, kept, theirs)
        second = children(fork, _subscribe_and_sleep, kept, theirs)
        assert [answer(ours), answer(ours)] == ["ready"] * 2
        pid = kept.stats().pid
        for process in (psutil.Process(pid), psutil.Process(first.pid)):
            process.kill()
        first.join(DEADLINE)
        wait_until(lambda: [row.pid for row in kept.stats().subscribers] == [second.pid])
        psutil.Process(second.pid).kill()
        wait_until(lambda: not kept.stats().subscribers)


def test_threads_that_publish_go_on(kept: Bus) -> None:
    """Through one handle, while brokers die: the reader sees each thread's messages in order, and the last ones."""
    channel = kept.subscribe()
    channel.poll()
    done = threading.Event()

    def publish(thread: int) -> int:
        for number in count():
            kept.publish((thread, number))
            if done.is_set():
                return number
        raise AssertionError

    threads = [Background(publish, thread) for thread in range(3)]
    received: list[list[int]] = [[], [], []]
    gaps = 0
    for turn in range(4):
        for _ in range(1500):
            try:
                thread, number = channel.recv(timeout=DEADLINE)
                received[thread].append(number)
            except BrokerRestarted:
                gaps += 1
        if turn < 3:
            kill_broker(kept)
    done.set()
    while any(thread.is_alive() for thread in threads) or channel.poll(timeout=0.2):
        try:
            thread, number = channel.recv(timeout=0.2)
            received[thread].append(number)
        except BrokerRestarted:
            gaps += 1
        except TimeoutError:
            pass
    assert [numbers[-1] for numbers in received] == [thread.result() for thread in threads]
    assert 0 < gaps <= 3
    assert all(numbers == sorted(set(numbers)) for numbers in received)


def test_a_handle_that_has_asked_nothing_yet_follows() -> None:
    """Its first request meets the next broker, which does not know it."""
    with start_broadcaster(restart=True) as bus:
        broker = psutil.Process(keeper_of_folder(bus)).children()[0]
        broker.kill()
        wait_until(lambda: not broker.is_running())
        channel = bus.subscribe()
        bus.publish(1)
        assert channel.recv(timeout=DEADLINE) == 1


def keeper_of_folder(bus: Bus) -> int:
    """The keeper's process, without asking the broker."""
    (keeper,) = (child for child in multiprocessing.active_children() if child.name == "mpbroadcast-broker")
    assert keeper.pid is not None
    return keeper.pid


def test_close_does_not_wait_for_a_broker_that_died_while_it_drained(kept: Bus) -> None:
    """A broker that was asked to end is not replaced."""
    channel = kept.subscribe()
    pickle.dumps(channel)  # handed on: it would be waited for
    kept.publish(1)
    broker = psutil.Process(kept.stats().pid)
    closing = Background(kept.close, None)
    wait_until(lambda: is_refused(lambda: connect(kept.address).subscribe()))
    broker.kill()
    closing.result()


def is_refused(call: Callable[[], Any]) -> bool:
    """Whether the broker refuses it, as it is being closed."""
    try:
        call()
    except BrokerLost:
        return True
    return False


@pytest.mark.parametrize("opened", [False, True])
def test_async_iteration_leaves_the_loop_free_while_the_next_broker_is_stopped(
    kept: Bus, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel is opened, or goes over to the next broker, without blocking the loop; it then goes on."""
    channel = kept.subscribe()
    if opened:
        channel.poll()
    kill_broker(kept)
    ticks = waits = 0

    def reach(name: str, subject: object = None) -> None:
        nonlocal waits
        if name in ("answering", "waiting for a reply"):  # in the call that blocks
            begin = ticks
            wait_until(lambda: ticks > begin + 10)
            waits += 1

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    async def receive() -> Any:
        ticking = asyncio.create_task(tick())
        with stopped(kept.stats().pid):
            monkeypatch.setattr(trap_points, "reach", reach)
            receiving = asyncio.ensure_future(anext(channel))
            while waits < 2 and not receiving.done():  # the first was in vain
                await asyncio.sleep(0.001)
            assert not receiving.done()
        with pytest.raises(BrokerRestarted):
            await asyncio.wait_for(receiving, DEADLINE)
        monkeypatch.undo()
        kept.publish("next")
        message = await asyncio.wait_for(anext(channel), DEADLINE)
        ticking.cancel()
        return message

    assert asyncio.run(receive()) == "next"


@pytest.mark.parametrize("opened", [False, True])
def test_a_channel_that_nobody_holds_any_more_is_not_kept(kept: Bus, opened: bool) -> None:
    """Whether it was dropped before or after another broker was there."""
    for late in (False, True):
        channel = kept.subscribe(capacity=1000)
        if opened:
            channel.poll()
        pid = kept.stats().pid
        os.kill(pid, signal.SIGKILL)
        if late:
            wait_for_another(kept, pid)
        del channel
        wait_until(lambda: not kept.stats().subscribers)


def test_two_tasks_go_on_with_one_channel(kept: Bus) -> None:
    """Both wait for the new descriptor when the old one is gone."""
    channel = kept.subscribe()
    channel.poll()

    async def one(got: list[Any]) -> None:
        while True:
            try:
                got.append(await asyncio.wait_for(anext(channel), DEADLINE))
                return
            except BrokerRestarted:
                got.append("gap")

    async def all_of_it() -> list[Any]:
        got: list[Any] = []
        tasks = [asyncio.create_task(one(got)) for _ in range(2)]
        await until_tasks_wait()
        await asyncio.to_thread(kill_broker, kept)
        while "gap" not in got:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(kept.publish_many, [1, 2])
        await asyncio.gather(*tasks)
        return got

    assert asyncio.run(all_of_it()) == ["gap", 1, 2]


def test_no_descriptor_for_a_moment_is_not_the_end(kept: Bus) -> None:
    """The next receive tries again to go on with the next broker."""
    channel = kept.subscribe()
    channel.poll()
    kill_broker(kept)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="descriptor"):
            channel.recv(timeout=DEADLINE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    kept.publish(1)
    gap(channel)
    assert channel.recv(timeout=DEADLINE) == 1


# --- the keeper


def test_a_broker_that_dies_again_and_again_is_given_up(kept: Bus) -> None:
    """Then each call raises that it is lost, at once, also one that waits for the next broker; and nothing is left."""
    channel = kept.subscribe()
    channel.poll()
    for _ in range(4):
        kill_broker(kept)
    gap(channel)
    with without_a_broker(kept) as keeper:
        waiting = Background(connect, kept.address), Background(channel.recv)
        waiting[0].wait_until_blocked("connect")
        waiting[1].wait_until_blocked("recv")
    for one in waiting:
        assert isinstance(one.error(timeout=5), BrokerLost)
    wait_until(lambda: not keeper.is_running() or keeper.status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(BrokerLost):
        kept.publish(1)
    with pytest.raises(BrokerLost):
        channel.recv(timeout=DEADLINE)
    assert not os.path.exists(kept.address)


def test_a_killed_keeper_changes_nothing(kept: Bus) -> None:
    """The broker goes on, ends with its starter, and is not replaced any more."""
    channel = kept.subscribe()
    channel.poll()
    keeper_of(kept).kill()
    kept.publish(1)
    assert channel.recv(timeout=DEADLINE) == 1
    os.kill(kept.stats().pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(BrokerLost):
        channel.recv(timeout=DEADLINE)
    with pytest.raises(BrokerLost):
        kept.publish(2)
    assert time.monotonic() - start < 5


def _close_where_nobody_reaps(report: Connection) -> None:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: an orphan is this process's, which does not ask for it
    starter = os.fork()
    if not starter:
        try:
            bus = start_broadcaster(restart=True)
            keeper_of(bus).kill()
            bus.close(timeout=None)
            report.send("closed")
        finally:
            os._exit(0)
    os.waitpid(starter, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets another process have the orphans")
def test_close_where_nobody_reaps_the_orphans(fork: BaseContext, children: Children) -> None:
    """As in a container without an init: the broker whose keeper was killed stays a zombie, for which close() does not wait."""
    ours, theirs = fork.Pipe()
    with ours, theirs:
        process = children(fork, _close_where_nobody_reaps, theirs)
        assert answer(ours) == "closed"
        finish(process)


at_each_address = pytest.mark.parametrize("chosen", [False, True])


@at_each_address
def test_connect_waits_for_the_next_broker(temporary_folder: Path, chosen: bool) -> None:
    """While there is none; and not when none will come."""
    with start_broadcaster(address=temporary_folder / "chosen" if chosen else None, restart=True) as bus:
        with without_a_broker(bus):
            waiting = Background(connect, bus.address)
            waiting.wait_until_blocked("connect")
        with waiting.result() as other:
            assert other.stats().pid == bus.stats().pid
        with without_a_broker(bus) as keeper:
            waiting = Background(connect, bus.address)
            waiting.wait_until_blocked("connect")
            keeper.kill()
            assert isinstance(waiting.error(timeout=5), BrokerLost)


@at_each_address
def test_the_last_broker_takes_its_address_along(temporary_folder: Path, chosen: bool) -> None:
    """Also when its keeper was killed before."""
    with start_broadcaster(address=temporary_folder / "chosen" if chosen else None, restart=True) as bus:
        keeper_of(bus).kill()
        os.kill(bus.stats().pid, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(bus.address if chosen else os.path.dirname(bus.address)))


def test_closed_is_closed(kept: Bus) -> None:
    """A handle that was closed does not come back with the next broker."""
    other: Bus = connect(kept.address)
    channel = other.subscribe()
    channel.close()
    other.close()
    kill_broker(kept)
    with pytest.raises(ClosedError):
        other.publish(1)
    with pytest.raises(ClosedError):
        channel.recv(timeout=0)
    assert not kept.stats().subscribers


# --- what is written down, and for how long it is tried


def test_patience() -> None:
    """Pauses grow with deaths that come one after the other, and it ends; old deaths are forgotten."""
    patience = Patience(deaths=3, seconds=10)
    assert [patience.pause(now) for now in range(3)] == [0.02, 0.04, None]
    patience = Patience(deaths=3, seconds=10)
    assert all(patience.pause(now) == 0.02 for now in range(0, 1000, 11))


@pytest.fixture
def journal() -> Iterator[Callable[[], Journal]]:
    """Makes a journal, and others that read what the first has written."""
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
    assert journal().entries == first.entries
    assert len(first.entries) >= 4
    assert sum(os.fstat(file).st_size for file in first.files) < 300_000


def test_a_journal_that_may_not_grow(journal: Callable[[], Journal]) -> None:
    """It raises nothing; what it gives back was so at a time, and all is there again when there is room for it."""
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


@pytest.mark.parametrize("size", [0, 10, 17, 20])
def test_a_journal_without_room(size: int) -> None:
    """Not even its first lines can be written: it is empty for the next broker."""
    with limited(resource.RLIMIT_FSIZE, size):
        first = Journal()
        first.put({"id": 1, "topics": []})
        assert first.entries == {1: {"id": 1, "topics": []}}
        assert Journal(first.files).entries == {}
    for file in first.files:
        os.close(file)


def test_a_limit_on_the_size_of_files(fork: BaseContext) -> None:
    """However many subscribe, all works; a broker that takes over knows those that could be written down."""
    with limited(resource.RLIMIT_FSIZE, 20_000):
        bus: Bus = start_broadcaster(context=fork, restart=True)
    with bus:
        channels = [bus.subscribe(f"{number}:" + "x" * 500) for number in range(100)]
        for number in range(100):
            bus.publish(number, topic=f"{number}:" + "x" * 500)
            assert channels[number].recv(timeout=DEADLINE) == number
        kill_broker(bus)
        with pytest.raises(BrokerRestarted):
            channels[0].recv(timeout=DEADLINE)
        with pytest.raises(BrokerLost):
            channels[99].recv(timeout=DEADLINE)
        bus.publish(5, topic="0:" + "x" * 500)
        assert channels[0].recv(timeout=DEADLINE) == 5
        for channel in channels:
            channel.close()


def test_a_journal_whose_last_line_was_cut(journal: Callable[[], Journal]) -> None:
    """The change that was not written whole is not there, and the next ones are."""
    first = journal()
    first.put({"id": 1, "topics": []})
    first.put({"id": 2, "topics": []})
    written = [file for file in first.files if os.fstat(file).st_size > 20]
    os.ftruncate(written[0], os.fstat(written[0]).st_size - 3)
    second = journal()
    assert second.entries == {1: {"id": 1, "topics": []}}
    second.put({"id": 3, "topics": []})
    assert set(journal().entries) == {1, 3}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers()))), st.integers(0, 20))
def test_cut_lines_are_the_state_before_them(changes: list[tuple[int, int | None]], cut: int) -> None:
    """Whatever was written, and wherever it stops."""
    lines = []
    for number, value in changes:
        lines.append(b'{"id": %d}\n' % number if value is None else b'{"id": %d, "v": %d}\n' % (number, value))
    whole = b"".join(lines)[: -cut or None]
    count = whole.count(b"\n")
    expected: dict[int, Any] = {}
    for number, value in changes[:count]:
        expected.pop(number, None)
        if value is not None:
            expected[number] = {"id": number, "v": value}
    assert replayed(whole) == expected
