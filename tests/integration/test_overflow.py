"""A slow subscriber under each overflow policy: exact counts, gaps where they belong, bounded memory. Real processes."""

import array
import asyncio
import contextlib
import fcntl
import termios
import time
from collections.abc import AsyncIterable, Callable
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerStats, Channel, Lagged, Overflowed, TimedOut
from mpbroadcast.validation import POLICIES, Policy
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    calls_that_receive,
    fill,
    only_subscriber,
    positions_of,
    readable,
    record,
    take,
    wait_until,
)
from tests.support.large_workers import ReaderProcess, Size

Bus = Broadcaster[Any]
Events = list[tuple[str, int]]
MEBIBYTE = 1 << 20
DROPPING = ["drop_oldest", "drop_newest"]
USUAL = Size(500)


def check(before: BrokerStats | None, now: BrokerStats) -> None:
    """Check what holds for every subscription at every moment, and since the moment before."""
    earlier = {row.id: row for row in before.subscribers} if before else {}
    for row in now.subscribers:
        assert row.delivered + row.missed + row.waiting == row.published
        # One that is larger than the capacity waits alone; a state may be half in the pipe when the next one comes.
        assert row.waiting_bytes <= row.capacity or row.waiting <= (2 if row.overflow == "latest" else 1)
        assert (row.waiting == 0) == (row.waiting_bytes == 0)
        assert row.missed == 0 or row.overflow in (*DROPPING, "latest")
        assert not row.stalls or row.overflow == "block"
        if row.id in earlier:
            for name in ("published", "delivered", "missed"):
                assert getattr(row, name) >= getattr(earlier[row.id], name), name


def watch(bus: Bus, until: Callable[[BrokerStats], Any]) -> None:
    """Take snapshots without pause and check each, until one is as it should be."""
    before: BrokerStats | None = None
    deadline = time.monotonic() + DEADLINE
    while True:
        now = bus.stats()
        check(before, now)
        before = now
        if until(now):
            return
        assert time.monotonic() < deadline, now


def publish(bus: Bus, numbers: range, size: Size = USUAL, **options: Any) -> None:
    """Publish messages of these numbers, and wait until they are routed."""
    bus.publish_many(map(size.message, numbers), timeout=DEADLINE, **options)
    bus.flush(timeout=DEADLINE)


def unread(channel: Channel[Any]) -> int:
    """Return the bytes in the channel's pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(channel.fileno(), termios.FIONREAD, count)
    return count[0]


def record_and_missed(channel: Channel[Any]) -> tuple[Events, int]:
    """Return all that a channel gives up to its clean end, and its ``missed``."""
    return record(channel), channel.missed


def end(bus: Bus, channel: Channel[Any]) -> Events:
    """End the subscription behind what was published, and return all that the channel was given."""
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    return record(channel)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("reader", "transport"),
    [
        ("stopped", "pipe"),
        ("unread", "pipe"),
        ("unopened", "pipe"),
        ("stopped", "ring"),
        ("unread", "memory"),
        ("unopened", "buffers"),
    ],
    indirect=["transport"],
)
def test_all_is_accounted_for_at_every_moment(
    policy: Policy, reader: str, transport: Size, bus: Bus, children: Children, fork: BaseContext
) -> None:
    """Delivered + missed + waiting = published in each snapshot under traffic; the reader counts the same, gaps are where they
    belong, and the capacity counts the messages' real bytes, wherever these are."""
    capacity = max(40_000, 7 * transport.charge // 2, 4 * MEBIBYTE if transport.length > 1000 else 0)
    fitting, most = capacity // transport.charge, capacity // transport.length + 1
    count = 2 * fitting + (1200 if transport.length < 1000 else 8)
    channel = bus.subscribe(overflow=policy, capacity=capacity)
    slow = ReaderProcess(channel, children, fork, record_and_missed) if reader == "stopped" else None
    if slow is not None:
        slow.stop()
    elif reader == "unread":
        channel.fileno()
    publishing = Background(publish, bus, range(count), transport)
    watch(bus, lambda stats: not publishing.is_alive() or any(row.stalls for row in stats.subscribers))
    assert publishing.is_alive() == (policy == "block")
    rows = bus.stats().subscribers
    assert len(rows) == (policy != "disconnect")
    for row in rows:
        kept = row.delivered + row.waiting
        assert kept <= 2 if policy == "latest" else fitting // 2 <= kept <= most
    # What is dropped is freed, in chunks of a ring that are not quite full.
    assert policy == "block" or bus.stats().memory <= capacity + 3 * MEBIBYTE // 2
    if slow is not None:
        slow.go()
    else:
        reading = Background(record_and_missed, channel)
    watch(bus, lambda stats: not publishing.is_alive())
    publishing.result()
    publishing = Background(publish, bus, range(count, 2 * count), transport)
    watch(bus, lambda stats: not publishing.is_alive())
    publishing.result()
    last = bus.stats()
    bus.unsubscribe(channel)
    events, missed = (reading if slow is None else slow).result()
    numbers = [number for kind, number in events if kind == "message"]
    assert last.published == 2 * count
    if policy == "disconnect":
        assert fitting // 2 <= len(numbers) <= most
        assert events == [*(("message", number) for number in range(len(numbers))), ("overflowed", 0)]
    else:
        assert last.subscribers[0].published == 2 * count
        assert len(numbers) + missed == 2 * count
        assert (missed == 0) == (policy == "block")
        if policy == "latest":
            assert numbers == sorted(set(numbers))
            assert numbers[-1] == 2 * count - 1
        else:
            assert positions_of(events) == (numbers, 2 * count)
    wait_until(lambda: bus.stats().memory == 0)


def test_a_gap_at_the_end_is_readable_and_then_there_is_room_again(bus: Bus) -> None:
    """While ``recv`` would raise ``Lagged``, ``poll`` is true and the descriptor readable; what comes then is received. Neither
    other topics count nor what the channel was excluded from."""
    channel = bus.subscribe("a", overflow="drop_newest", capacity=20_000)
    for number in range(200):
        bus.publish(USUAL.message(number), topic="a")
        bus.publish("not for it", topic="b")
        bus.publish("not for it", topic="a", exclude=channel)
    bus.flush(timeout=DEADLINE)
    check(None, bus.stats())
    assert only_subscriber(bus).published == 200
    missed = only_subscriber(bus).missed
    assert 100 < missed < 190
    assert [number for number, _ in take(channel, 200 - missed)] == list(range(200 - missed))
    wait_until(lambda: readable(channel))
    for _ in range(2):
        assert channel.poll(0)
        assert readable(channel)
    with pytest.raises(Lagged) as caught:
        channel.recv(timeout=0)
    assert (caught.value.missed, caught.value.channel) == (missed, channel)
    assert not readable(channel)
    assert not channel.poll(0)
    publish(bus, range(200, 210), topic="a")
    assert end(bus, channel) == [("message", number) for number in range(200, 210)]
    assert channel.missed == missed


@pytest.mark.parametrize("transport", ["ring", "memory"], indirect=True)
def test_the_newest_are_kept_behind_references_that_are_unread(transport: Size, bus: Bus) -> None:
    """Pause again and again: what the pipe refers to leaves room for the newest messages, and the gaps are few."""
    channel = bus.subscribe(overflow="drop_oldest", capacity=max(4 * MEBIBYTE, 7 * transport.charge // 2))
    channel.fileno()
    for _ in range(3):
        publish(bus, range(150), transport)
        events: list[tuple[str, int]] = []
        while events[-1:] != [("message", 149)]:
            try:
                events.append(("message", channel.recv(DEADLINE)[0]))
            except Lagged as error:
                events.append(("lagged", error.missed or 0))
        assert positions_of(events)[1] == 150
        # A packet of the reader that comes late makes room in between, and so a second gap.
        assert 1 <= [kind for kind, _ in events].count("lagged") <= 3


@pytest.mark.parametrize("call", ["recv_many", "for", "async for", "selector"])
def test_each_call_that_receives_goes_on_after_a_gap(bus: Bus, call: str) -> None:
    """What came before a gap is given first, then ``Lagged`` is raised where it is; begun again, it goes on behind it."""
    channel = bus.subscribe("room:*", overflow="drop_oldest", capacity=20_000, with_topic=True)
    receive = calls_that_receive(channel)[call]
    channel.fileno()
    publish(bus, range(500), topic="room:1")
    bus.unsubscribe(channel)
    received: list[tuple[str, Any]] = []
    with contextlib.suppress(EOFError, StopIteration, StopAsyncIteration):
        while True:
            try:
                received += receive()
            except Lagged as error:
                received.append(("lagged", error.missed or 0))
    assert {kind for kind, _ in received} == {"room:1", "lagged"}
    events = [("lagged", value) if kind == "lagged" else ("message", value[0]) for kind, value in received]
    numbers, following = positions_of(events)
    assert (following, numbers[-1]) == (500, 499)
    assert channel.missed == 500 - len(numbers) > 0


async def collected(messages: AsyncIterable[Any]) -> list[Any]:
    return [item async for item in messages]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_loop_lives_through_gaps(bus: Bus, is_async: bool) -> None:
    """A gap is skipped, given as a value, or handed to a callable; all else is as it is in any loop."""
    met: list[Any] = []
    for on_gap in ("skip", "yield", met.append):
        channel = bus.subscribe(overflow="drop_oldest", capacity=1)
        bus.publish_many([None, 1, 2])
        assert isinstance(next(iter(channel.messages("yield"))), Lagged)
        assert next(channel) == 2
        bus.publish_many([3, 4])
        channel.poll(DEADLINE)
        bus.publish_many([None, 5, 6, 7])
        bus.flush(DEADLINE)
        bus.unsubscribe(channel)
        messages: Any = channel.messages(on_gap=on_gap)
        found = asyncio.run(collected(messages)) if is_async else [*messages]
        numbers = [one for one in found if not isinstance(one, Lagged)]
        gaps = met if callable(on_gap) else [one for one in found if isinstance(one, Lagged)]
        assert numbers[-1] == 7
        assert len(numbers) + channel.missed - 2 == 6
        assert sum(one.missed or 0 for one in gaps) == (channel.missed - 2 if on_gap != "skip" else 0)
        assert all(one.channel is channel for one in gaps)


def test_what_is_no_gap_leaves_the_loop(bus: Bus) -> None:
    """An error of a message, or of the callable; the next loop goes on behind it."""
    channel = bus.subscribe(overflow="drop_newest", capacity=1)
    bus.publish_many([workers.CannotBeUnpickled(), "dropped"])
    bus.flush(DEADLINE)
    messages = channel.messages(on_gap=lambda gap: 1 // 0)
    for error in (workers.Boom, ZeroDivisionError):
        with pytest.raises(error):
            next(messages)
    bus.publish("next")
    assert next(iter(messages)) == "next"
    for wrong, kind in (("drop", ValueError), (None, TypeError)):
        with pytest.raises(kind, match="on_gap"):
            channel.messages(on_gap=wrong)  # type: ignore[call-overload]


def test_latest_after_each_of_many_pauses(bus: Bus) -> None:
    """What was newest when the last was taken comes, then the newest, then nothing; the descriptor is readable until then."""
    channel = bus.subscribe(overflow="latest")
    bus.publish("first")
    assert channel.recv(timeout=DEADLINE) == "first"
    received = 1
    for turn in range(20):
        bus.publish_many((turn, number) for number in range(50))
        bus.flush(timeout=DEADLINE)
        assert only_subscriber(bus).delivered <= received + 1
        states: list[Any] = []
        while not states or states[-1] != (turn, 49):
            wait_until(lambda: readable(channel))
            states.append(channel.recv(timeout=0))
        assert len(states) <= 2
        assert all(state[0] == turn for state in states)
        received += len(states)
        assert not readable(channel)
        with pytest.raises(TimedOut):
            channel.recv(timeout=0)
        assert received + channel.missed == only_subscriber(bus).published == 1 + 50 * (turn + 1)


def test_overflowed_is_no_lag(bus: Bus) -> None:
    """``Overflowed`` names its channel, is readable in time, comes once, and is no ``Lagged``; ``EOFError`` stays. From then on
    the channel counts as no subscriber, and one that keeps up does."""
    assert not issubclass(Overflowed, Lagged)
    channel = bus.subscribe(overflow="disconnect", capacity=1000, with_topic=True)
    channel.fileno()
    quick = bus.subscribe(overflow="disconnect")
    publish(bus, range(2), Size(2000), topic="t")  # the first one passes, as it is alone
    bus.wait_for_subscribers(1, timeout=0)
    with pytest.raises(TimeoutError):
        bus.wait_for_subscribers(2, timeout=0)
    assert channel.recv(timeout=DEADLINE) == ("t", Size(2000).message(0))
    wait_until(lambda: readable(channel))
    assert channel.poll(0)
    assert channel.missed == 0
    with pytest.raises(Overflowed, match="disconnect") as caught:
        channel.recv(timeout=DEADLINE)
    assert caught.value.channel is channel
    assert channel.missed == 1
    for _ in range(2):
        with pytest.raises(EOFError):
            channel.recv(timeout=DEADLINE)
    assert list(channel) == []
    assert end(bus, quick) == [("message", 0), ("message", 1)]


@pytest.mark.parametrize("size", [0, 5_000])
@pytest.mark.parametrize("overflow", ["block", *DROPPING])
def test_what_is_unread_in_the_pipe_counts_as_backlog(bus: Bus, overflow: Policy, size: int) -> None:
    """What waits in the broker, with 256 bytes for each message, and what is unread in the pipe are one capacity."""
    capacity = 60_000
    channel = bus.subscribe(overflow=overflow, capacity=capacity)

    def backlog() -> int:
        return only_subscriber(bus).waiting_bytes + unread(channel)

    def fill_up() -> bool:
        publish(bus, range(1000), Size(size))
        return backlog() > capacity // 2

    channel.fileno()
    if overflow == "block":
        fill(bus, size=size, timeout=0.2)
    else:
        # What waits is written into the pipe until that is full, and counts for less there: then there is room again.
        wait_until(fill_up)
    row = only_subscriber(bus)
    assert row.waiting > 0
    assert row.waiting_bytes + unread(channel) >= row.waiting * (256 + size)
    # A run that is partly in the pipe, of one page here, counts as waiting until all of it is; and so does the record of a gap.
    assert capacity // 2 < backlog() <= capacity + 4096 + 64
    channel.close()
