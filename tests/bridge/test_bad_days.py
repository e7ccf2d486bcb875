"""Bad days of an engine: what is delivered exactly once all the same, and where channels raise ``Lagged``."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import nats
import pytest

from mpbroadcast import Broadcaster, Channel, Lagged, StartError, start_broadcaster
from tests.bridge.machines import STREAM, kill_bridge, linked, machine, machines, pid_at_work, row, until_up
from tests.bridge.servers import ENGINES, RedisServer, nats_server, redis_server
from tests.support.helpers import DEADLINE, Background, take, wait_until


@pytest.fixture(params=ENGINES)
def server(request: pytest.FixtureRequest, leaves_nothing: None) -> Iterator[Any]:
    """A server of each engine, which keeps what it has acknowledged."""
    with ENGINES[request.param]() as started:
        yield started


def publish_until(bus: Broadcaster[Any], stop: list[bool]) -> int:
    """Publish numbers until ``stop`` is not empty. Return how many."""
    number = 0
    while not stop:
        for _ in range(10):
            bus.publish((number, bytes(700_000 if number % 200 == 0 else 20)), topic="room")
            number += 1
        time.sleep(0.005)
    return number


@contextlib.contextmanager
def under_load(server: Any) -> Iterator[None]:
    """Two machines publish meanwhile. Then each has all of the other's messages, exactly once and in order."""
    with machines(server.url, capacity=1 << 30) as buses:
        channels = [bus.subscribe(capacity=1 << 30) for bus in buses]
        stop: list[bool] = []
        publishers = [Background(publish_until, bus, stop) for bus in buses]
        try:
            yield
            for bus in buses:
                until_up(bus)
        finally:
            stop.append(True)
        counts = [publisher.result() for publisher in publishers]
        for channel in channels:
            numbers = [number for number, _ in take(channel, sum(counts))]
            assert sorted(numbers) == sorted([*range(counts[0]), *range(counts[1])])
        assert not [channel for channel in channels if channel.poll(0.2)]


def test_killed_and_restarted(server: Any) -> None:
    """With what it has acknowledged: exactly once."""
    with under_load(server):
        for _ in range(3):
            time.sleep(0.5)
            server.restart()


def test_away_for_some_time(server: Any) -> None:
    """What is published meanwhile waits in the brokers."""
    with under_load(server):
        time.sleep(0.3)
        server.kill()
        time.sleep(1.5)
        server.restart()


def test_stopped_for_some_time(server: Any) -> None:
    """It answers no more, and then goes on."""
    with under_load(server):
        time.sleep(0.3)
        with server.stopped():
            time.sleep(7.0)


def gaps_of(channel: Channel[Any], last: Any) -> list[Any]:
    """Receive until the message ``last``; return all, with "gap" for each ``Lagged``."""
    found: list[Any] = []
    while not found or found[-1] != last:
        try:
            found.append(channel.recv(DEADLINE))
        except Lagged:
            found.append("gap")
    return found


def test_restarted_empty(server: Any) -> None:
    """It has lost what it had acknowledged. What was read goes on; a gap is shown; nothing comes twice."""
    with machines(server.url) as (left, right):
        channel = right.subscribe()
        left.publish(1)
        assert take(channel, 1) == [1]
        server.restart(empty=True)
        until_up(left)
        until_up(right)
        left.publish(2)
        found = gaps_of(channel, 2)
        assert found in ([2], ["gap", 2])  # nothing is missing here, but the bridge cannot know
        left.publish(3)
        assert take(channel, 1) == [3]


def empty(server: Any) -> None:
    """Remove all entries, and leave the stream."""
    if isinstance(server, RedisServer):
        with server.client() as client:
            client.xtrim(STREAM, maxlen=0, approximate=False)
        return

    async def purge() -> None:
        connection = await nats.connect(server.url)
        await connection.jetstream().purge_stream(STREAM)
        await connection.close()

    asyncio.run(purge())


def test_emptied_behind_a_bridge_that_was_away(server: Any) -> None:
    """One ``Lagged`` on that machine, then what is left, and what comes."""
    with machine(server.url) as (left, sender), machine(server.url) as (right, link):
        channel, other = right.subscribe(), right.subscribe("local", overflow="latest")
        left.publish(1)
        assert take(channel, 1) == [1]
        link.close(forget=False)
        for number in (2, 3):
            left.publish(number)
        sender.flush(DEADLINE)
        empty(server)
        left.publish(4)
        sender.flush(DEADLINE)
        with linked(right, server.url):
            left.publish(5)
            assert gaps_of(channel, 5) == ["gap", 4, 5]
            left.publish(6)
            assert take(channel, 1) == [6]
            assert not other.poll(0)


def test_a_log_that_went_back_in_time(server: Any) -> None:
    """It has lost its newest entries, and gives their places to others: a gap, and nothing twice."""
    with machines(server.url) as (left, right):
        channel = right.subscribe()
        left.publish(1)
        assert take(channel, 1) == [1]
        copy = server.save()
        until_up(left)
        until_up(right)
        left.publish(2)
        assert gaps_of(channel, 2)[-1] == 2
        server.go_back(copy)
        until_up(left)
        until_up(right)
        left.publish(3)
        found = gaps_of(channel, 3)
        assert found in ([3], ["gap", 3])


def test_without_memory(leaves_nothing: None) -> None:
    """Redis refuses entries: they wait, ``error`` has why, and they come once there is room."""
    with redis_server() as server, machines(server.url) as (left, right), server.client() as client:
        channel = right.subscribe()
        client.config_set("maxmemory", "1mb")
        for number in range(100):
            left.publish((number, bytes(1000)))
        wait_until(lambda: "OOM" in (row(left).error or "") or "memory" in (row(left).error or ""), DEADLINE)
        client.config_set("maxmemory", "0")
        assert [number for number, _ in take(channel, 100)] == [*range(100)]
        until_up(left)


def test_without_room_for_the_stream(leaves_nothing: None) -> None:
    """NATS has less room than the stream may take."""
    with (
        nats_server(max_store=1 << 20) as server,
        start_broadcaster() as bus,
        pytest.raises(StartError, match=r"127\.0\.0\.1"),
    ):
        linked(bus, server.url, start_timeout=5.0)


def test_another_password_later(leaves_nothing: None) -> None:
    """No error is final: it tries again until it is taken."""
    with redis_server(password="one") as server, machines(server.url) as (left, right):
        channel = right.subscribe()
        server.password = "two"
        server.options[server.options.index("--requirepass") + 1] = "two"
        server.restart()
        left.publish(1)
        wait_until(lambda: row(left).state == "connecting" and row(left).error, DEADLINE)
        kill_bridge(left)
        wait_until(lambda: row(left).state == "connecting" and row(left).error, DEADLINE)
        server.options[server.options.index("--requirepass") + 1] = "one"
        server.restart()
        assert take(channel, 1) == [1]


def test_something_else_under_the_name_later(leaves_nothing: None) -> None:
    with redis_server() as server, machines(server.url) as (left, right), server.client() as client:
        channel = right.subscribe()
        client.delete(STREAM)
        client.set(STREAM, "a value")
        left.publish(1)
        wait_until(lambda: row(left).state == "connecting" and row(left).error, DEADLINE)
        client.delete(STREAM)
        assert gaps_of(channel, 1)[-1] == 1


def test_failed_over_to_a_replica_that_lags(leaves_nothing: None) -> None:
    """What the replica had not got is lost, and a gap shows that, or the origin's bus has it still; nothing comes twice."""
    with redis_server() as master, redis_server(replica_of=master) as replica, machines(master.url) as (left, right):
        channel = right.subscribe()
        for number in range(50):
            left.publish(number)
        assert take(channel, 50) == [*range(50)]
        with replica.stopped():
            for number in range(50, 100):
                left.publish(number)
            assert take(channel, 50) == [*range(50, 100)]
        replica.take_over(master)
        left.publish("last")
        found = gaps_of(channel, "last")
        assert not [one for one in found if isinstance(one, int)]
        assert found.count("gap") <= 1


def test_garbage_and_forgeries(leaves_nothing: None) -> None:
    """No entry ends or stalls a bridge, whatever is in it: it is counted, and skipped."""
    with redis_server() as server, machines(server.url) as (left, right), server.client() as client:
        channel = right.subscribe()
        left.publish(1)
        assert take(channel, 1) == [1]
        [(_, fields)] = client.xrevrange(STREAM, count=1)
        name, good = next(iter(fields.items()))
        forged = [b"", b"x", bytes(100), good[:-1], good[1:], good[:40] + bytes([good[40] ^ 1]) + good[41:], bytes(1 << 20)]
        before = row(right).refused
        for data in forged:
            client.xadd(STREAM, {name: data})
        client.xadd(STREAM, {b"another": good, b"field": b"x"})
        client.xadd(STREAM, {name: good})  # a copy
        left.publish(2)
        assert take(channel, 1) == [2]
        wait_until(lambda: row(right).refused - before >= len(forged), DEADLINE)
        assert (row(right).state, row(right).received) == ("up", 2)
        assert pid_at_work(right)


def test_connections_are_cut(leaves_nothing: None) -> None:
    """At any moment, also with an entry on its way: exactly once."""
    with redis_server() as server, under_load(server), server.client() as client:
        for _ in range(20):
            client.client_kill_filter(_type="normal", skipme=True)
            time.sleep(0.1)


def test_evicted(leaves_nothing: None) -> None:
    """A Redis that may remove any key removes the stream, without an error to any client: a gap, and bridges go on."""
    with redis_server(maxmemory="8mb", policy="allkeys-lru") as server, machines(server.url) as (left, right):
        channel = right.subscribe()
        left.publish(1)
        assert take(channel, 1) == [1]
        with server.client() as client:
            number = 0
            while client.exists(STREAM):
                client.set(f"other:{number}", bytes(100_000))
                number += 1
            client.flushall()
        left.publish(2)
        assert gaps_of(channel, 2) in (["gap", 2], [2, "gap"], [2])  # nothing is missing here; the bridge cannot know
        left.publish(3)
        assert gaps_of(channel, 3)[-1] == 3


def sizes_of(server: Any) -> list[int]:
    """Return the lengths of the entries in the log."""
    if isinstance(server, RedisServer):
        with server.client() as client:
            return [len(data) for _, fields in client.xrange(STREAM) for data in fields.values()]

    async def look() -> list[int]:
        async with await nats.connect(server.url) as connection:
            state = (await connection.jetstream().stream_info(STREAM)).state
            return [state.bytes] if state.messages else []

    return asyncio.run(look())


def test_the_log_is_trimmed(server: Any) -> None:
    """At most twice ``max_bytes`` are kept. A machine that was away for longer has one ``Lagged``, then what is left."""
    options: dict[str, Any] = {"max_bytes": 1 << 20, "capacity": 1 << 30}
    with (
        machine(server.url, **options) as (left, _),
        machines(server.url, 1, **options) as (right,),
        start_broadcaster() as away,
    ):
        channel, late = right.subscribe(capacity=1 << 30), away.subscribe(capacity=1 << 30)
        with linked(away, server.url, **options) as link:
            left.publish((-1, b""))
            assert take(late, 1) == [(-1, b"")]
            link.close(forget=False)
        for number in range(60):
            left.publish((number, bytes(100_000)))
        assert [number for number, _ in take(channel, 61)] == [*range(-1, 60)]
        left.publish("last")  # now, as what is appended later may cut what is read below: that would be another gap
        assert take(channel, 1) == ["last"]
        wait_until(lambda: sum(sizes_of(server)) <= (2 << 20), DEADLINE)
        assert sum(sizes_of(server)) >= 1 << 19
        with linked(away, server.url, **options):
            gap, *found, last = gaps_of(late, "last")
            assert (gap, last) == ("gap", "last")
            assert [number for number, _ in found] == [*range(found[0][0], 60)]
            assert 5 <= len(found) < 30


def test_old_entries_go(server: Any) -> None:
    """None is kept for much longer than ``max_age``, and a machine that has read all never notices."""
    with machines(server.url, max_age=1.0) as (left, right):
        channel = right.subscribe()
        left.publish(bytes(50_000))
        take(channel, 1)
        wait_until(lambda: sum(sizes_of(server)) < 50_000, DEADLINE)
        for number in range(3):
            left.publish(number)
            time.sleep(1.2)
        assert take(channel, 3) == [0, 1, 2]
        assert (row(right).missed, row(right).state) == (0, "up")


def test_a_clock_that_jumps(leaves_nothing: None) -> None:
    """Redis' clock is ahead by years, and then right again: IDs stand still, nothing is too old, nothing is missing."""
    with redis_server() as server, machines(server.url, max_age=1.0) as (left, right), server.client() as client:
        channel = right.subscribe()
        left.publish(1)
        assert take(channel, 1) == [1]
        client.xadd(STREAM, {"e": b"of that time"}, id="9999999999999-0")
        for number in (2, 3, 4):
            left.publish(number)
            time.sleep(0.7)
        assert take(channel, 3) == [2, 3, 4]
        kill_bridge(right)
        left.publish(5)
        assert take(channel, 1) == [5]
        assert client.xlen(STREAM) > 0
