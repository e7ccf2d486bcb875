"""Sessions of bridges with real brokers: messages copied from one bus to another, in this process, without an engine."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pickle import dumps, loads
from random import Random
from typing import Any

import pytest

from mpbroadcast import (
    Broadcaster,
    BrokerLost,
    BrokerRestarted,
    ClosedError,
    Lagged,
    TimedOut,
    connect,
    start_broadcaster,
    trap_points,
)
from mpbroadcast.client.bridging import bridge_flushed, bridge_session, forget_bridge
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.protocol.frames import HEAD, Arrival, bridge_frame, frame_head
from mpbroadcast.validation import Policy
from tests.support.bridging import (
    STREAM,
    RudeSession,
    acknowledge_all,
    at_work,
    copied,
    hold,
    soon,
    use_session,
)
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    Pipe,
    answer,
    finish,
    kill_broker,
    pattern,
    stopped,
    take,
    wait_until,
)
from tests.support.large_workers import SIZES, Size, number_of
from tests.support.rude import Lent

Bus = Broadcaster[Any]
ORIGIN = b"origin 1"


@pytest.fixture
def other(leaves_nothing: None) -> Iterator[Bus]:
    """Another bus, as of another machine."""
    broadcaster: Bus = start_broadcaster()
    yield broadcaster
    broadcaster.close(timeout=2.0)


def test_messages_go_from_bus_to_bus(bus: Bus, other: Bus, transport: Size) -> None:
    """What is published to the topics arrives once, in order, however often it is handed on, and goes back over no bridge."""
    channel, local = other.subscribe("a*", with_topic=True), bus.subscribe()

    async def bridge() -> None:
        async with at_work(bus, topics=["a*", "b"]) as (here, state), at_work(other, topics=["a*"]) as (there, _):
            for number in range(6):
                bus.publish(transport.message(number), topic=("a1", "a2", "other")[number % 3])
            bus.flush(DEADLINE)
            assert await soon(here.target()) == 4
            end = 0
            while end <= 4:
                first, messages, end = await soon(here.take())
                for _ in range(2):
                    await soon(there.route(state.origin, state.incarnation, first, messages))
                here.acknowledge(end - 1)
            wait_until(lambda: bridge_flushed(bus, STREAM) == (4, 4))
            assert bus.stats().bridges[STREAM].sent == 4
            wait_until(lambda: other.stats().bridges[STREAM].duplicates == 4)
            assert other.stats().bridges[STREAM].received == 4
            assert bridge_flushed(other, STREAM) == (0, 0)

    asyncio.run(bridge())
    assert [(topic, number_of(message)) for topic, message in take(channel, 4)] == [("a1", 0), ("a2", 1), ("a1", 3), ("a2", 4)]
    assert not channel.poll()
    assert [number_of(message) for message in take(local, 6)] == [*range(6)]
    assert bus.stats().bridges == other.stats().bridges == {}


def test_a_killed_session_loses_nothing(
    bus: Bus, other: Bus, children: Children, fork: Any, pipe: Pipe, transport: Size
) -> None:
    """The next one, which stands by, is given all that the killed one has taken and not acknowledged."""
    channel = other.subscribe()
    process = children(fork, hold, bus, pipe[1], 1, {})
    assert answer(pipe[0])[0] == "turn"

    async def bridge() -> None:
        session = bridge_session(bus, STREAM)
        turn = asyncio.ensure_future(session.turn())
        for number in range(5):
            bus.publish(transport.message(number))
        assert (await asyncio.to_thread(answer, pipe[0]))[:2] == ("took", 1)
        assert not turn.done()
        assert bus.stats().bridges[STREAM].pid == process.pid
        process.kill()
        state = await soon(turn)
        async with at_work(other) as (there, _):
            await copied(session, state, there, 5)
            wait_until(lambda: bus.stats().bridges[STREAM].sent == 5)
            await session.end(forget=False)
            assert bus.stats().bridges[STREAM].state == "down"

    asyncio.run(bridge())
    assert [number_of(message) for message in take(channel, 5)] == [*range(5)]
    assert not channel.poll()
    assert forget_bridge(bus, STREAM)
    assert not forget_bridge(bus, STREAM)


def test_one_session_is_at_work(bus: Bus) -> None:
    """Others stand by, and take turns. Other topics, overflow or capacity are an error, and so is what makes no sense."""

    async def bridge() -> None:
        async with at_work(bus, topics=["a"]) as (first, _):
            others = [bridge_session(bus, STREAM, topics=["a"]) for _ in range(3)]
            turns = [asyncio.ensure_future(one.turn()) for one in others]
            for options in ({}, {"topics": ["a"], "capacity": 5}, {"topics": ["a"], "overflow": "block"}):
                with pytest.raises(ValueError, match="is there with other"):
                    bridge_session(bus, STREAM, **options)
            with pytest.raises(ValueError, match="at work"):
                forget_bridge(bus, STREAM)
            assert (await soon(first.turn())).acknowledged == 0  # a second time, at once
            turns[1].cancel()  # stands by no more
            await asyncio.wait(turns[1:2])
            bus.publish("x", topic="a")
            assert (await soon(first.take())).end == 2
            first.acknowledge(1)
            await first.end(forget=True)  # which forgets nothing, as others stand by
            with pytest.raises(ClosedError):
                await first.take()
            assert (await soon(turns[0])).acknowledged == 1
            await others[0].end(forget=False)
            assert (await soon(turns[2])).acknowledged == 1
            await others[2].end(forget=True)
            assert bus.stats().bridges == {}

    asyncio.run(bridge())
    for wrong in ({"overflow": "latest"}, {"capacity": 0}, {"topics": ["a" * 1025]}):
        with pytest.raises(ValueError, match=r"must be|may have"):
            bridge_session(bus, STREAM, **wrong)
    for name in ("", "a b", "x" * 257):
        with pytest.raises(ValueError, match="stream"):
            bridge_session(bus, name)
    with pytest.raises(TypeError):
        bridge_session(bus, STREAM, topics="a")


def test_outboxes_are_no_subscribers(bus: Bus) -> None:
    """They are in no count of subscriptions, and nothing that waits for channels waits for them."""
    bridge_session(bus, STREAM)
    bridge_session(bus, "other", topics=["a"])
    assert bus.subscriber_count("a") == 0
    with pytest.raises(TimeoutError):
        bus.wait_for_subscribers(1, timeout=0)
    bus.publish("x", topic="a")
    bus.flush(DEADLINE, delivered=True)
    with bus.subscribe("a") as channel:
        bus.wait_for_subscribers(1, topic="a", timeout=0)
        assert [row.id for row in bus.stats().subscribers] == [channel.id]
    bridges = bus.stats().bridges
    assert [bridges[name].waiting for name in (STREAM, "other")] == [1, 0]  # one of them, the first, has it
    assert bridges[STREAM].pid is None
    assert (bridges["other"].topics, bridges["other"].state) == (("a",), "down")
    assert forget_bridge(bus, STREAM)
    bus.publish("x", topic="a")
    bus.flush(DEADLINE)
    assert bus.stats().bridges["other"].waiting == 1


@pytest.mark.parametrize(
    ("overflow", "first", "dropped"), [("drop_oldest", (91, 100), (1, 90)), ("drop_newest", (1, 10), (11, 100))]
)
def test_what_a_full_outbox_drops(bus: Bus, overflow: str, first: tuple[int, int], dropped: tuple[int, int]) -> None:
    """Nothing makes the publisher wait, and the positions of what was dropped are known."""
    bridge_session(bus, STREAM, overflow=overflow, capacity=10 * (len(dumps(bytes(1000), 5)) + 256))
    bus.publish_many([bytes(1000)] * 100, timeout=DEADLINE)
    assert bridge_flushed(bus, STREAM) == (100, 90 if overflow == "drop_oldest" else 0)
    row = bus.stats().bridges[STREAM]
    assert (row.waiting, row.dropped, row.overflow) == (10, 90, overflow)
    assert row.waiting_bytes <= row.capacity
    seen: list[int] = []

    async def bridge() -> None:
        options: dict[str, Any] = {"overflow": overflow, "capacity": row.capacity}
        async with at_work(bus, **options) as (session, _):
            end = 0
            while end <= 100:
                batch = await soon(session.take())
                seen.extend(range(batch.first, batch.first + len(batch.messages)))
                end = batch.end
                session.acknowledge(end - 1)
            wait_until(lambda: bridge_flushed(bus, STREAM) == (100, 100))
            assert bus.stats().bridges[STREAM].sent == 10

    asyncio.run(bridge())
    assert seen == [*range(first[0], first[1] + 1)]
    assert len(seen) + dropped[1] - dropped[0] + 1 == 100


def test_a_full_outbox_that_blocks_makes_its_publishers_wait(bus: Bus) -> None:
    """Also while no session is at work; and no publishers of other topics."""
    channel = bus.subscribe("free")
    bridge_session(bus, STREAM, topics=["full"], overflow="block", capacity=50_000)
    published = fill_outbox(bus)
    assert 30 < len(published) < 600
    with connect(bus.address) as elsewhere:
        elsewhere.publish("x", topic="free", timeout=DEADLINE)
        assert channel.recv(DEADLINE) == "x"

    async def bridge() -> None:
        async with at_work(bus, topics=["full"], overflow="block", capacity=50_000) as (session, _):
            end, count = 0, 0
            while count < len(published):
                _, messages, end = await soon(session.take())
                count += len(messages)
                session.acknowledge(end - 1)
            assert end == count + 1

    asyncio.run(bridge())


def fill_outbox(bus: Bus) -> list[int]:
    """Publish until a publish waits for the full outbox; return the numbers that were published."""
    published = 0
    while True:
        try:
            bus.publish(bytes(1000), topic="full", timeout=0.3)
            published += 1
        except TimedOut:
            if any(row.waits_for == STREAM for row in bus.stats().publisher_rows):
                return [*range(published)]


def test_a_gap_is_one_lagged_on_each_channel_that_may_miss_something(bus: Bus) -> None:
    """With an unknown number, under every policy but ``latest``, and in its position among the messages."""
    policies: list[Policy] = ["block", "drop_oldest", "drop_newest", "disconnect"]
    channels = [bus.subscribe("a*", overflow=policy) for policy in policies]
    channels.append(bus.subscribe("b*", "a1", group="g"))
    latest, elsewhere = bus.subscribe(overflow="latest"), bus.subscribe("b*")
    for channel in (*channels, latest, elsewhere):
        channel.fileno()

    async def bridge() -> None:
        async with at_work(bus, topics=["a*"]) as (session, _):
            await soon(session.route(ORIGIN, 1, 1, [("a1", dumps(1))]))
            await soon(session.route(ORIGIN, 1, 5, [("a1", dumps(5)), ("b1", dumps("not ours"))]))
            await soon(session.note_gap())
            await soon(session.route(ORIGIN, 1, 20, []))
            await soon(session.route(ORIGIN, 1, 20, [("a1", dumps(20))]))
            wait_until(lambda: bus.stats().bridges[STREAM].received == 3)
            assert bus.stats().bridges[STREAM].missed == 3 + 13

    asyncio.run(bridge())
    for channel in channels:
        assert events(channel, 3) == [1, "gap", 5, "gap", 20]
    while latest.recv(DEADLINE) != 20:
        assert latest.missed <= 2
    assert not elsewhere.poll()


def events(channel: Any, count: int) -> list[Any]:
    """Return so many messages, and where one is missing "gap"."""
    found: list[Any] = []
    while len(found) - found.count("gap") < count:
        try:
            found.append(channel.recv(DEADLINE))
        except Lagged as error:
            found.append("gap" if error.missed is None else error.missed)
    return found


def test_a_full_channel_stops_what_comes_in_and_nothing_else(bus: Bus) -> None:
    """Local publishing and what goes out go on; when the session has ended, what it had handed on comes again, once."""
    full = bus.subscribe("in", capacity=20_000)
    full.fileno()
    local = bus.subscribe("local")
    messages = [("in", dumps((number, bytes(1000)))) for number in range(600)]

    async def bridge() -> None:
        async with at_work(bus, forget=False) as (session, _):
            route = asyncio.ensure_future(session.route(ORIGIN, 1, 1, messages))
            await asyncio.to_thread(wait_until, lambda: any(row.waits_for == full.id for row in bus.stats().publisher_rows))
            bus.publish("x", topic="local", timeout=DEADLINE)
            assert local.recv(DEADLINE) == "x"
            assert (await soon(session.take())).messages == [("local", dumps("x", 5))]
            session.acknowledge(1)
            assert not route.done()
            session.report(url="redis://host", state="up", error="none", refused=3, lag=7)
            await asyncio.to_thread(wait_until, lambda: bus.stats().bridges[STREAM].state == "up")
            route.cancel()
            await asyncio.wait([route])
        row = bus.stats().bridges[STREAM]
        assert (row.state, row.url, row.error, row.refused, row.lag, row.pid) == ("down", "redis://host", "none", 3, None, None)
        assert not any(row.waits_for for row in bus.stats().publisher_rows)  # what was parked is dropped
        reader = Background(take, full, 600)
        async with at_work(bus) as (session, _):
            await soon(session.route(ORIGIN, 1, 1, messages))
            await soon(session.set_cursor("end"))
            assert [number for number, _ in await asyncio.to_thread(reader.result)] == [*range(600)]
            await asyncio.to_thread(wait_until, lambda: bus.stats().bridges[STREAM].received == 600)

    asyncio.run(bridge())
    assert not full.poll()


@pytest.mark.parametrize("transport", [SIZES["100"], SIZES["3 MiB"]])
def test_a_stopped_session_makes_no_publisher_wait(
    bus: Bus, children: Children, fork: Any, pipe: Pipe, transport: Size
) -> None:
    """Its pipe is full and it reads nothing: the outbox drops. Then it is killed, and the next one is given what is left."""
    capacity = 4 * transport.length + 20_000
    process = children(fork, hold, bus, pipe[1], 1, {"capacity": capacity})
    assert answer(pipe[0])[0] == "turn"
    channel = bus.subscribe(overflow="drop_oldest")
    with stopped(process.pid or 0):
        count = 400 if transport.length < 1000 else 40
        for number in range(count):
            bus.publish(transport.message(number), timeout=DEADLINE)
        bus.flush(DEADLINE)
        row = bus.stats().bridges[STREAM]
        assert row.pid == process.pid
        assert row.waiting + row.dropped == row.sent + count
        assert row.dropped > 0
        process.kill()
    numbers: list[int] = []

    async def bridge() -> None:
        async with at_work(bus, capacity=capacity) as (session, _):
            end = 0
            while end <= count:
                first, messages, end = await soon(session.take())
                numbers.extend(number_of(loads(payload)) for _, payload in messages)
                assert numbers[len(numbers) - len(messages) :] == [*range(first - 1, first - 1 + len(messages))]
                session.acknowledge(end - 1)

    asyncio.run(bridge())
    assert len(numbers) == row.waiting
    assert numbers[-1] == count - 1
    channel.close()


def test_what_is_unacknowledged_keeps_no_ring(bus: Bus) -> None:
    """A publisher goes on through its ring while an outbox has more than that unacknowledged, and each message is right."""

    async def bridge() -> None:
        async with at_work(bus, overflow="block") as (session, _):
            for number in range(300):
                bus.publish((number, pattern(number, 100_000)), timeout=DEADLINE)
            end = 0
            while end <= 300:
                first, messages, end = await soon(session.take())
                for position, (_, payload) in enumerate(messages, first):
                    number, data = loads(payload)
                    assert (number, data == pattern(number, 100_000)) == (position - 1, True)
                session.acknowledge(end - 1)

    asyncio.run(bridge())


@pytest.fixture
def kept(leaves_nothing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    """A broadcaster whose broker is replaced when it dies; it kills itself before it routes once, if there is a file "kill"."""

    def reach(name: str, subject: object = None) -> None:
        if name == "noted positions" and (tmp_path / "kill").exists():
            (tmp_path / "kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(trap_points, "reach", reach)
    broadcaster: Bus = start_broadcaster(restart=True)
    yield broadcaster
    broadcaster.close(timeout=2.0)


def restarted(channel: Any, count: int) -> list[Any]:
    """Return so many messages behind the error of a broker that has been replaced."""
    with pytest.raises(BrokerRestarted):
        channel.recv(DEADLINE)
    return take(channel, count)


def test_a_broker_that_takes_over_routes_nothing_twice(kept: Bus, tmp_path: Path) -> None:
    """It has the origin, with a larger incarnation, the positions and the cursor; what was to be routed when the one before
    it died may be lost, and comes once at the most."""
    channel = kept.subscribe()
    channel.fileno()
    messages = [("in", dumps(number)) for number in range(1, 11)]

    async def bridge() -> None:
        session = bridge_session(kept, STREAM)
        first = await soon(session.turn())
        ends = asyncio.ensure_future(session.closed())
        await soon(session.route(ORIGIN, 7, 1, messages[:5]))
        await soon(session.set_cursor("five"))
        await soon(session.route(b"another1", 1, 1, [("in", dumps("another"))]))
        assert [*await asyncio.to_thread(take, channel, 6)] == [1, 2, 3, 4, 5, "another"]
        kept.publish("unsent", topic="out")
        assert channel.recv(DEADLINE) == "unsent"
        (tmp_path / "kill").touch()
        await soon(session.route(ORIGIN, 7, 6, messages[5:8]))
        await soon(ends)
        assert session.lost
        assert (await soon(session.take())).messages == [("out", dumps("unsent", 5))]
        with pytest.raises(BrokerLost):
            await soon(session.take())
        await session.end(forget=False)
        kept.publish("sent", topic="out")
        async with at_work(kept) as (session, state):
            assert (state.origin, state.incarnation, state.cursor) == (first.origin, first.incarnation + 1, "five")
            assert (await soon(session.take())).messages == [("out", dumps("sent", 5))]
            await soon(session.route(ORIGIN, 7, 1, messages))
            await soon(session.route(b"another1", 1, 1, [("in", dumps("another"))]))
            assert await asyncio.to_thread(restarted, channel, 3) == ["sent", 9, 10]
            await asyncio.to_thread(wait_until, lambda: kept.stats().bridges[STREAM].duplicates == 9)
            assert not channel.poll()

    asyncio.run(bridge())


def test_a_session_that_stands_by_goes_over_to_the_next_broker(kept: Bus) -> None:
    """So does the order of an outbox that blocks; the end of the broker ends it."""

    async def bridge() -> None:
        async with at_work(kept) as (_, state):
            standing = bridge_session(kept, STREAM)
            turn = asyncio.ensure_future(standing.turn())
            await asyncio.sleep(0.05)
            await asyncio.to_thread(kill_broker, kept)
            assert (await soon(turn)).incarnation == state.incarnation + 1
            last = bridge_session(kept, STREAM)
            turn = asyncio.ensure_future(last.turn())
            await asyncio.sleep(0.05)
            await asyncio.to_thread(kept.close, DEADLINE)
            with pytest.raises(BrokerLost):
                await soon(turn)
            assert not last.lost
            await soon(standing.closed())
            assert not standing.lost
            with pytest.raises(EOFError):
                await soon(standing.take())
            await standing.end(forget=False)
            await last.end(forget=False)

    asyncio.run(bridge())


def test_the_end_of_the_broker_waits_for_the_session_at_work(
    leaves_nothing: None, children: Children, fork: Any, pipe: Pipe
) -> None:
    """It gives out all that waits, and ends when that is acknowledged."""
    bus: Bus = start_broadcaster()
    process = children(fork, acknowledge_all, bus, pipe[1])
    assert answer(pipe[0]) == "turn"
    bus.publish_many(range(5000))
    bus.close(DEADLINE)
    assert answer(pipe[0]) == (5000, False, False)
    finish(process)


@pytest.mark.parametrize("wrong", ["no origin", "no origins", "no frame", "too many", "torn"])
def test_wrong_bytes_end_their_own_session(bus: Bus, wrong: str) -> None:
    """The next one is at work then, and nothing of it was routed."""
    channel = bus.subscribe()
    frame = frame_head(1, b"in") + b"x"
    written = {
        "no origin": frame,
        "no origins": frame + frame_head(1, b"on") + b"x",
        "no frame": HEAD.pack(30, 5 << 24) + bytes(22),
        "too many": bridge_frame(Arrival(ORIGIN, 1, 1, 1)) + frame + frame,
        "torn": b"\xff" * 64,
    }[wrong]

    async def bridge() -> None:
        rude = RudeSession(BrokerClient(bus.address), STREAM)
        session = bridge_session(bus, STREAM)
        turn = asyncio.ensure_future(session.turn())
        rude.write(written)
        await soon(turn)
        await soon(session.route(b"another1", 1, 1, [("in", dumps("good"))]))
        assert await asyncio.to_thread(channel.recv, DEADLINE) == "good"
        rude.close()
        await session.end(forget=True)

    asyncio.run(bridge())


def test_a_publisher_without_a_session_announces_nothing(bus: Bus) -> None:
    lent = Lent(BrokerClient(bus.address), fd_socket=False)
    lent.write(bridge_frame(Arrival(ORIGIN, 1, 1, 1)))
    wait_until(lambda: not any(row.id == lent.number for row in bus.stats().publisher_rows))
    lent.close()


def test_a_session_is_of_one_process(bus: Bus, children: Children, fork: Any, pipe: Pipe) -> None:
    """In a process that is forked meanwhile it is closed, and here it goes on."""

    async def bridge() -> None:
        async with at_work(bus) as (session, _):
            process = children(fork, use_session, session, pipe[1])
            assert await asyncio.to_thread(answer, pipe[0]) == ["ClosedError"] * 3
            await asyncio.to_thread(finish, process)
            bus.publish("x")
            assert (await soon(session.take())).messages == [("", dumps("x", 5))]

    asyncio.run(bridge())


def test_cancelled_at_any_step_nothing_is_lost(bus: Bus, other: Bus) -> None:
    """What was cancelled is done again: each message arrives once, and in order."""
    channel, choose = other.subscribe(capacity=100_000), Random(1)

    async def often(call: Callable[[], Any]) -> Any:
        """Cancel some tries after some steps, then return what the call returns."""
        for _ in range(choose.randrange(4)):
            task = asyncio.ensure_future(call())
            for _ in range(choose.randrange(6)):
                await asyncio.sleep(0)
            if task.done():
                return task.result()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                return await task
        return await soon(call())

    async def bridge() -> None:
        source, target = bridge_session(bus, STREAM), bridge_session(other, STREAM)
        state = await often(source.turn)
        await often(target.turn)
        bus.publish_many(((number, bytes(choose.choice([10, 3000, 50_000]))) for number in range(300)), timeout=DEADLINE)
        end = 0
        while end <= 300:
            batch = await often(lambda: source.take(20_000))
            await often(partial(target.route, state.origin, state.incarnation, batch.first, batch.messages))
            end = batch.end
            await often(partial(target.set_cursor, str(end)))
            source.acknowledge(end - 1)
        await asyncio.to_thread(wait_until, lambda: other.stats().bridges[STREAM].received == 300)
        for session in (source, target):
            await session.end(forget=True)

    reader = Background(take, channel, 300)
    asyncio.run(bridge())
    assert [number for number, _ in reader.result()] == [*range(300)]
    assert not channel.poll()


def test_tasks_hand_on_one_behind_the_other(bus: Bus) -> None:
    """While the pipe is full, nothing of another task comes between an origin and its messages."""
    channel = bus.subscribe(capacity=20_000)
    reader = Background(take, channel, 1200)

    async def bridge() -> None:
        async with at_work(bus) as (session, _):
            origins = [b"origin %d" % number for number in range(3)]
            batches = [[("in", dumps((origin, number, bytes(1000)))) for number in range(400)] for origin in origins]
            calls = [session.route(origin, 1, 1, batch) for origin, batch in zip(origins, batches, strict=True)]
            await asyncio.gather(*calls)
            await asyncio.to_thread(wait_until, lambda: bus.stats().bridges[STREAM].received == 1200)

    asyncio.run(bridge())
    found = reader.result()
    assert [number for _, number, _ in found] == 3 * [*range(400)]
