"""Bridges, sentence by sentence: what reaches which machine, and what happens when a part of it dies."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest

from mpbroadcast import Broadcaster, BrokerLost, ClosedError, Lagged, StartError, connect, start_broadcaster
from mpbroadcast.bridge import bridge
from tests.bridge.machines import (
    KEY,
    STREAM,
    kill_bridge,
    linked,
    machine,
    machines,
    pid_at_work,
    receive,
    row,
    until_gone,
    until_up,
)
from tests.bridge.servers import ENGINES, RedisServer, free_port, redis_server
from tests.support.helpers import DEADLINE, Background, take, wait_until


@pytest.fixture(params=ENGINES)
def server(request: pytest.FixtureRequest, leaves_nothing: None) -> Iterator[Any]:
    """A server of each engine."""
    with ENGINES[request.param]() as started:
        yield started


@pytest.fixture
def redis(leaves_nothing: None) -> Iterator[RedisServer]:
    """A redis-server, where the engine makes no difference."""
    with redis_server() as started:
        yield started


# What reaches which machine


def test_messages_reach_all_machines(server: Any) -> None:
    """Each once, in the order of each bus, the local ones too; any object, and none of what was published before."""
    with machines(server.url, 3) as buses:
        channels = [bus.subscribe() for bus in buses]
        for number in range(200):
            for name, bus in enumerate(buses):
                bus.publish((name, number, {"text": "x" * number}), topic="room")
        for channel in channels:
            found = take(channel, 600)
            for name in range(3):
                assert [one for one in found if one[0] == name] == [
                    (name, number, {"text": "x" * number}) for number in range(200)
                ]
            assert not channel.poll(0)


def test_topics_and_patterns(redis: RedisServer) -> None:
    """A message goes over the bridge if the topics on both sides have it; others stay where they are."""
    with (
        machine(redis.url, topics=["room:*", "news"]) as (left, _),
        machine(redis.url, topics=["room:[ab]", "more"]) as (right, _),
    ):
        on_left, on_right = left.subscribe(with_topic=True), right.subscribe(with_topic=True)
        for bus, name in ((left, "left"), (right, "right")):
            for topic in ("room:a", "room:c", "news", "more", ""):
                bus.publish(name, topic=topic)
        left.publish("last", topic="room:b")
        right.publish("last", topic="room:b")
        here, there = take(on_left, 8), take(on_right, 8)
        assert sorted(one for one in here if one[1] == "right") == [("room:a", "right")]
        assert sorted(one for one in there if one[1] == "left") == [("room:a", "left")]
        assert [one for one in here if one[1] != "right"][:5] == [
            (topic, "left") for topic in ("room:a", "room:c", "news", "more", "")
        ]


def test_no_echo_and_no_transit(redis: RedisServer) -> None:
    """What came over a bridge goes out over none, and two streams between the same machines double nothing."""
    with contextlib.ExitStack() as stack:
        buses = [stack.enter_context(start_broadcaster()) for _ in range(3)]
        for bus, streams in zip(buses, (["one"], ["one", "two"], ["two"]), strict=True):
            for stream in streams:
                stack.enter_context(linked(bus, redis.url, stream=stream))
        stack.enter_context(linked(buses[0], redis.url, stream="two"))
        left, middle, right = (bus.subscribe() for bus in buses)
        buses[0].publish("left")  # over "one", the first that has it: so not to the right
        buses[1].publish("middle")  # over "one"
        buses[2].publish("right")  # over "two"
        assert sorted(take(left, 3)) == sorted(take(middle, 3)) == ["left", "middle", "right"]
        assert take(right, 1) == ["right"]
        assert [channel.poll(0.3) for channel in (left, middle, right)] == [False] * 3


@pytest.mark.parametrize("size", [0, 100, 3000, 200_000, 600_000, 5_000_000])
def test_all_sizes(server: Any, size: int) -> None:
    """Large ones go in pieces, in order among small ones; arrays arrive as arrays."""
    with machines(server.url) as (left, right):
        channel = right.subscribe()
        array = numpy.arange(size // 8, dtype=numpy.float64)
        messages: list[Any] = [1, bytes(size), 2, array, 3, {"array": array, "text": "x" * (size // 4)}, 4]
        for message in messages:
            left.publish(message, topic="topic")
        found = take(channel, len(messages))
        assert found[::2] == [1, 2, 3, 4]
        assert found[1] == messages[1]
        assert numpy.array_equal(found[3], array)
        assert numpy.array_equal(found[5]["array"], array)
        found[3][:] = 0  # writable, as on the own machine


def test_many_messages_in_few_entries(redis: RedisServer) -> None:
    """What waits while an entry is on its way is the next entry."""
    with machines(redis.url) as (left, right):
        channel = right.subscribe(capacity=1 << 30)
        left.publish_many(range(20_000), topic="room")
        assert take(channel, 20_000) == [*range(20_000)]
        with redis.client() as client:
            assert client.xlen(STREAM) < 2000


# Exactly once, over what dies


def publish_for(bus: Broadcaster[Any], name: str, seconds: float) -> int:
    """Publish numbers, alone and in bursts, and now and then a large message. Return how many."""
    end, numbers = time.monotonic() + seconds, count()
    while time.monotonic() < end:
        for _ in range(20):
            number = next(numbers)
            bus.publish((name, number, bytes(1_500_000 if number % 400 == 0 else 10)), topic="room")
        time.sleep(0.01)
    return next(numbers)


def test_bridges_are_killed_under_load(server: Any) -> None:
    """Exactly once, and in order; another one is there at once."""
    with machines(server.url) as buses:
        channels = [bus.subscribe(capacity=1 << 30) for bus in buses]
        publishers = [Background(publish_for, bus, str(name), 4.0) for name, bus in enumerate(buses)]
        killed = 0
        while any(publisher.is_alive() for publisher in publishers):
            kill_bridge(buses[killed % 2])
            killed += 1
            time.sleep(0.3)
        published = {str(name): publisher.result() for name, publisher in enumerate(publishers)}
        assert killed > 3
        for channel in channels:
            found = [(name, number) for name, number, _ in take(channel, sum(published.values()))]
            for name, number in published.items():
                assert [one for one in found if one[0] == name] == [(name, index) for index in range(number)]
        assert [channel.poll(0.3) for channel in channels] == [False, False]


def test_a_broker_that_takes_over_is_bridged(server: Any) -> None:
    """A gap is shown on the other machine; what the others sent meanwhile comes behind the takeover."""
    with (
        machine(server.url, restart=True) as (left, link),
        machine(server.url) as (right, _),
    ):
        on_left, on_right = left.subscribe(), right.subscribe()
        left.publish("before")
        assert take(on_right, 1) == ["before"]
        assert take(on_left, 1) == ["before"]
        pid = left.stats().pid
        os.kill(pid, signal.SIGKILL)
        right.publish("meanwhile")
        wait_until(lambda: left.stats().pid != pid, DEADLINE)
        until_up(left)
        left.publish("behind")
        assert receive(on_right, 2) in (["meanwhile", "gap", "behind"], ["gap", "meanwhile", "behind"])
        found: list[Any] = []
        while len(found) < 3:
            try:
                found.append(on_left.recv(DEADLINE))
            except Exception as error:
                found.append(type(error).__name__)
        assert found[0] == "BrokerRestarted"
        assert sorted(found[1:]) == ["behind", "meanwhile"]
        assert link.alive


def test_a_broker_that_is_lost_ends_its_bridge(redis: RedisServer, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(start_broadcaster())
        link = stack.enter_context(linked(bus, redis.url))
        pid = pid_at_work(bus)
        assert link.alive
        os.kill(bus.stats().pid, signal.SIGKILL)
        wait_until(lambda: not link.alive, DEADLINE)
        until_gone(pid)
        with pytest.raises(BrokerLost):
            link.flush(1.0)


@pytest.mark.timeout(120)
def test_a_bridge_that_is_stopped_is_replaced(redis: RedisServer) -> None:
    """One that gives no sign of life for 30 s. It takes as long."""
    with machines(redis.url) as (left, right):
        channel, pid = right.subscribe(), pid_at_work(left)
        os.kill(pid, signal.SIGSTOP)
        left.publish("message")
        assert not channel.poll(20.0)
        assert channel.recv(DEADLINE) == "message"
        assert pid_at_work(left) != pid


def test_a_supervisor_that_is_killed_takes_its_bridge_along(redis: RedisServer) -> None:
    """The row stays, and what waits, for the next one."""
    with start_broadcaster() as bus:
        with linked(bus, redis.url) as link:
            pid = pid_at_work(bus)
            supervisor = psutil.Process(pid).parent()
            assert supervisor is not None
            supervisor.kill()
            wait_until(lambda: row(bus).state == "down", DEADLINE)
            until_gone(pid)
            assert not link.alive
            bus.publish("message")
            assert row(bus).waiting == 1
        assert STREAM not in bus.stats().bridges


# Flush, and the end


def test_flush_and_close_send_what_waits(server: Any) -> None:
    with machine(server.url) as (right, _), start_broadcaster() as left:
        channel = right.subscribe()
        with linked(left, server.url) as link:
            for number in range(100):
                left.publish(number)
            link.flush(DEADLINE)
            assert (row(left).sent, row(left).waiting) == (100, 0)
            for number in range(100):
                left.publish((number, bytes(10_000)))
        assert not link.alive
        assert STREAM not in left.stats().bridges
        assert take(channel, 200)[-1] == (99, bytes(10_000))
        link.close()  # again
        with pytest.raises(ClosedError):
            link.flush()


def test_the_end_of_the_broker_sends_what_waits(server: Any) -> None:
    with machine(server.url) as (right, _):
        channel = right.subscribe()
        with start_broadcaster() as left:
            link = linked(left, server.url)
            pid = pid_at_work(left)
            for number in range(100):
                left.publish((number, bytes(10_000)))
        assert [number for number, _ in take(channel, 100)] == [*range(100)]
        wait_until(lambda: not link.alive, DEADLINE)
        until_gone(pid)
        link.close()


def test_timeouts(server: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """``flush`` raises; ``close`` drops what is left, and the log has how many."""
    with start_broadcaster() as bus, linked(bus, server.url) as link, server.stopped():
        for number in range(7):
            bus.publish(number)
        with pytest.raises(TimeoutError, match=r"7 message"):
            link.flush(0.2)
        link.close(timeout=0.2)
        assert "7 message(s)" in capfd.readouterr().err
        assert STREAM not in bus.stats().bridges


def test_close_goes_on_while_there_is_progress(redis: RedisServer) -> None:
    """Its timeout counts from the last progress."""
    with machine(redis.url) as (right, _), start_broadcaster() as left:
        channel = right.subscribe(capacity=1 << 30)
        with linked(left, redis.url, capacity=1 << 30) as link:
            for number in range(60):
                left.publish((number, bytes(2_000_000)))
            link.close(timeout=2.0)
        assert [number for number, _ in take(channel, 60)] == [*range(60)]


# Which processes it belongs to


def test_others_stand_by(redis: RedisServer) -> None:
    """Each call returns at once; one takes over when the first one has gone; nothing is doubled or lost."""
    with machine(redis.url) as (right, _), start_broadcaster() as left, contextlib.ExitStack() as stack:
        channel = right.subscribe()
        links = [stack.enter_context(linked(left, redis.url)) for _ in range(3)]
        sent = count()
        while len(links) > 1:
            left.publish(next(sent))
            links.pop(0).close()
            left.publish(next(sent))
            pid_at_work(left)
        assert take(channel, 4) == [0, 1, 2, 3]
        assert not channel.poll(0.2)
        assert links[0].alive
        kill_bridge(left)
        left.publish("last")
        assert take(channel, 1) == ["last"]


def serve(bus: Broadcaster[Any], url: str, pipe: Any) -> None:
    """Call ``bridge()`` as a web worker does, and keep no reference to it."""
    linked(bus, url)
    pipe.send("linked")
    pipe.recv()


def test_ten_web_workers(redis: RedisServer, children: Any, fork: Any) -> None:
    """Killed one after the other, whichever is at work: another one's bridge takes over."""
    with machine(redis.url) as (right, _), start_broadcaster() as left, contextlib.ExitStack() as stack:
        channel = right.subscribe()
        pipes = [[stack.enter_context(end) for end in multiprocessing.Pipe()] for _ in range(10)]
        workers = [children(fork, serve, left, redis.url, theirs) for _, theirs in pipes]
        for ours, _ in pipes:
            assert ours.poll(DEADLINE)
            assert ours.recv() == "linked"
        for number, worker in enumerate(workers[:-1]):
            left.publish(number)
            worker.kill()
        left.publish("last")
        assert take(channel, 10) == [*range(9), "last"]
        assert not channel.poll(0.2)
        workers[-1].kill()
        wait_until(lambda: row(left).state == "down", DEADLINE)


def test_a_bridge_ends_with_its_caller(redis: RedisServer, children: Any, fork: Any, pipe: Any) -> None:
    """However that ends. What is kept of it in the broker stays, for the next one."""
    ours, theirs = pipe
    with machine(redis.url) as (right, _), start_broadcaster() as left:
        channel = right.subscribe()
        worker = children(fork, serve, left, redis.url, theirs)
        assert ours.recv() == "linked"
        pid = pid_at_work(left)
        worker.kill()
        until_gone(pid)
        wait_until(lambda: row(left).pid is None, DEADLINE)
        assert row(left).state == "down"
        left.publish("waiting")
        assert row(left).waiting == 1
        with linked(left, redis.url):
            assert take(channel, 1) == ["waiting"]


def fork_and_end(bus: Broadcaster[Any], url: str, pipe: Any) -> None:
    """Fork a process that outlives this one."""
    link = linked(bus, url)
    if not os.fork():
        link.close()  # closes only what the fork inherited
        pipe.send(os.getpid())
        time.sleep(3600)
    pipe.recv()


def test_a_fork_of_the_caller(redis: RedisServer, children: Any, fork: Any, pipe: Any) -> None:
    """It does not end the bridge by closing it, nor keep it by living on."""
    ours, theirs = pipe
    with start_broadcaster() as bus:
        worker = children(fork, fork_and_end, bus, redis.url, theirs)
        heir = ours.recv()
        try:
            pid = pid_at_work(bus)
            time.sleep(1.5)
            assert pid_at_work(bus) == pid
            worker.kill()
            until_gone(pid)
            wait_until(lambda: row(bus).state == "down", DEADLINE)
        finally:
            os.kill(heir, signal.SIGKILL)


def test_a_signal_to_the_group_does_not_reach_it(redis: RedisServer) -> None:
    """As Ctrl-C in a terminal, which goes to the caller."""
    with machine(redis.url) as (bus, _):
        process = psutil.Process(pid_at_work(bus))
        supervisor = process.parent()
        assert supervisor is not None
        assert os.getpgrp() not in (os.getpgid(process.pid), os.getpgid(supervisor.pid))
        assert os.getsid(process.pid) != os.getsid(0)


def test_other_options_are_refused(redis: RedisServer) -> None:
    """Of one stream, all callers agree on topics, overflow and capacity."""
    with machine(redis.url, topics=["a"]) as (bus, link):
        for options in ({"topics": ["b"]}, {"topics": ["a"], "overflow": "block"}, {"topics": ["a"], "capacity": 1000}):
            with pytest.raises(ValueError, match=r"topics|overflow|capacity"):
                linked(bus, redis.url, **options)
        assert link.alive


# Keys


def test_keys_are_changed_one_machine_after_the_other(redis: RedisServer) -> None:
    """The first signs, all are accepted."""
    old, new = "the key of yesterday", b"the key of tomorrow"
    with (
        machine(redis.url, key=old) as (one, link),
        machine(redis.url, key=[old, new]) as (two, _),
        machine(redis.url, key=[new, old]) as (three, _),
    ):
        channels = [bus.subscribe() for bus in (one, two, three)]
        for name, bus in enumerate((one, two, three)):
            bus.publish(name)
        assert sorted(take(channels[1], 3)) == sorted(take(channels[2], 3)) == [0, 1, 2]
        assert sorted(take(channels[0], 2)) == [0, 1]  # the third one is to sign by the new key when all have it
        link.close()
        with linked(one, redis.url, key=new):
            three.publish("by the new key")
            assert take(channels[0], 1) == ["by the new key"]


def test_what_is_wrong_is_refused(server: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Another key's entries: counted, and in the log; nothing of them is delivered, and nothing else is delayed."""
    with machines(server.url) as (left, right), machine(server.url, key="the key of others") as (stranger, _):
        channel, theirs = right.subscribe(), stranger.subscribe()
        for number in range(5):
            stranger.publish("forged")
            left.publish(number)
        assert take(channel, 5) == [*range(5)]
        wait_until(lambda: row(right).refused, DEADLINE)
        wait_until(lambda: row(stranger).refused, DEADLINE)
        assert not channel.poll(0.2)
        assert take(theirs, 5) == ["forged"] * 5
        assert not theirs.poll(0)
        assert (row(right).state, row(right).received) == ("up", 5)
    assert "refused" in capfd.readouterr().err


SECRET = "secret-word-of-the-user"


def test_no_secret_is_shown(capfd: pytest.CaptureFixture[str], leaves_nothing: None) -> None:
    """Neither key nor password is in an argument list, an environment, the log, an error, the statistics or a ``repr``."""
    key = "key-that-is-a-secret-too"
    with redis_server(password=SECRET) as server, start_broadcaster() as bus:
        with linked(bus, server.url, key=key) as link:
            shown = [repr(link), repr(bus.stats())]
            process = psutil.Process(pid_at_work(bus))
            supervisor = process.parent()
            assert supervisor is not None
            for one in (process, supervisor):
                shown += [*one.cmdline(), Path(f"/proc/{one.pid}/environ").read_text()]
            with server.client() as client:
                client.config_set("requirepass", "another")
            server.kill()
            wait_until(lambda: row(bus).error, DEADLINE)
            shown += [repr(bus.stats())]
        with pytest.raises(StartError) as caught:
            bridge(bus, server.url, key=key, start_timeout=0.5)
        shown += [str(caught.value), repr(caught.value), *capfd.readouterr()]
        assert not [text for text in shown if SECRET in text or key in text]


# The start


def test_an_engine_that_is_not_there(leaves_nothing: None) -> None:
    """``start_timeout``: an error, or beside the caller; nothing is left behind."""
    port = free_port()
    for scheme in ("redis", "nats"):
        with start_broadcaster() as bus:
            with pytest.raises(StartError, match=f"127.0.0.1:{port}"):
                bridge(bus, f"{scheme}://127.0.0.1:{port}", key=KEY, start_timeout=0.5)
            assert not bus.stats().bridges
            with bridge(bus, f"{scheme}://127.0.0.1:{port}", key=KEY, start_timeout=0) as link:
                wait_until(lambda: row(bus).error, DEADLINE)
                assert row(bus).state == "connecting"
                assert link.alive
                bus.publish("waits")
                assert row(bus).waiting == 1
                link.close(0)
            assert not bus.stats().bridges


def test_a_start_that_waits(redis: RedisServer) -> None:
    """Without a limit, until the engine is there."""
    redis.kill()
    with start_broadcaster() as bus:
        call = Background(bridge, bus, redis.url, key=KEY, start_timeout=None)
        wait_until(lambda: bus.stats().bridges and row(bus).error, DEADLINE)
        assert call.is_alive()
        redis.restart()
        with call.result() as link:
            assert link.alive
            assert row(bus).state == "up"


def test_an_engine_that_refuses(leaves_nothing: None) -> None:
    """A wrong password, and something else under the stream's name."""
    with redis_server(password="right") as redis, ENGINES["nats"](password="right") as nats, start_broadcaster() as bus:
        for server in (redis, nats):
            with pytest.raises(StartError):
                linked(bus, server.url.replace("right", "wrong"))
        with redis.client() as client:
            client.set(STREAM, "a value")
        with pytest.raises(StartError, match=STREAM):
            linked(bus, redis.url)
        assert not bus.stats().bridges


def test_it_is_exactly_once_from_the_start_on(server: Any) -> None:
    """What was published before is not sent to a machine that comes later; what is published afterwards is."""
    with machine(server.url) as (left, link):
        left.publish("before")
        link.flush(DEADLINE)
        with machine(server.url) as (right, _):
            channel = right.subscribe()
            left.publish("behind")
            assert take(channel, 1) == ["behind"]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"url": ""}, ValueError),
        ({"url": None}, ValueError),
        ({"url": 5}, TypeError),
        ({"url": "redis"}, ValueError),
        ({"url": "ftp://host"}, ValueError),
        ({"topics": "room"}, TypeError),
        ({"topics": [5]}, TypeError),
        ({"topics": ["x" * 2000]}, ValueError),
        ({"stream": ""}, ValueError),
        ({"stream": "a b"}, ValueError),
        ({"stream": "a.b"}, ValueError),
        ({"stream": 5}, TypeError),
        ({"key": None}, ValueError),
        ({"key": "short"}, ValueError),
        ({"key": []}, ValueError),
        ({"key": 5}, TypeError),
        ({"overflow": "latest"}, ValueError),
        ({"overflow": "disconnect"}, ValueError),
        ({"overflow": None}, TypeError),
        ({"capacity": 0}, ValueError),
        ({"capacity": 1.5}, TypeError),
        ({"max_bytes": 0}, ValueError),
        ({"max_bytes": None}, TypeError),
        ({"max_age": 0}, ValueError),
        ({"max_age": -1}, ValueError),
        ({"max_age": "1"}, TypeError),
        ({"start_timeout": -1}, ValueError),
        ({"start_timeout": "1"}, TypeError),
    ],
)
def test_what_makes_no_sense(wrong: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear error, and nothing is started."""
    for variable in ("MPBROADCAST_BRIDGE_URL", "MPBROADCAST_BRIDGE_KEY"):
        monkeypatch.delenv(variable, raising=False)
    arguments: dict[str, Any] = {"url": "redis://127.0.0.1:1", "key": KEY, **wrong}
    with start_broadcaster() as bus:
        with pytest.raises(error):
            bridge(bus, arguments.pop("url"), **arguments)
        assert not bus.stats().bridges


def test_url_and_key_of_the_environment(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPBROADCAST_BRIDGE_URL", redis.url)
    monkeypatch.setenv("MPBROADCAST_BRIDGE_KEY", f"{KEY}\nanother key of all machines\n")
    with start_broadcaster() as left, bridge(left), machine(redis.url) as (right, _):
        channel = right.subscribe()
        left.publish("message")
        assert take(channel, 1) == ["message"]


# Back-pressure, and statistics


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest"])
def test_a_full_outbox_drops(redis: RedisServer, overflow: str) -> None:
    """Local publishers do not wait; the others' channels show one gap where the messages are missing."""
    with machine(redis.url, overflow=overflow, capacity=100_000) as (left, _), machine(redis.url) as (right, _):
        channel, local = right.subscribe(), left.subscribe()
        with redis.stopped():
            for number in range(1000):
                left.publish((number, bytes(1000)), timeout=DEADLINE)
            assert len(take(local, 1000)) == 1000
            figures = row(left)
            assert figures.dropped + figures.waiting + figures.sent == 1000
            assert figures.dropped > 800
        left.publish((1000, b""))
        found = [one if one == "gap" else one[0] for one in receive(channel, 1001 - row(left).dropped)]
        numbers = [one for one in found if one != "gap"]
        assert numbers == sorted({*numbers})
        assert numbers[-1] == 1000
        assert 1 <= found.count("gap") <= 2
        assert (999 in numbers) == (overflow == "drop_oldest")
        assert row(right).missed == row(left).dropped


def test_a_full_outbox_blocks(redis: RedisServer) -> None:
    """The publishers of these topics, and no others."""
    options: dict[str, Any] = {"overflow": "block", "capacity": 200_000, "topics": ["room"]}
    with machine(redis.url, **options) as (left, _), machine(redis.url) as (right, _):
        channel, local = right.subscribe(), left.subscribe("local")
        with redis.stopped():

            def publish() -> None:
                for number in range(5000):
                    left.publish((number, bytes(1000)), topic="room")

            publisher = Background(publish)
            wait_until(lambda: row(left).waiting_bytes > 150_000, DEADLINE)
            with connect(left.address) as other:
                other.publish("local", topic="local", timeout=DEADLINE)
                assert take(local, 1) == ["local"]
            assert publisher.is_alive()
        publisher.result()
        assert [number for number, _ in take(channel, 5000)] == [*range(5000)]


def test_a_full_channel_stops_what_comes_in(redis: RedisServer) -> None:
    """With "block": not what goes out, nor what is local."""
    with machines(redis.url) as (left, right):
        full, there = right.subscribe("full", capacity=10_000), left.subscribe("out")
        for number in range(100):
            left.publish((number, bytes(1000)), topic="full")
        wait_until(lambda: row(left).waiting == 0, DEADLINE)
        right.publish("out", topic="out")
        assert take(there, 1) == ["out"]
        assert [number for number, _ in take(full, 100)] == [*range(100)]


def test_statistics(server: Any) -> None:
    with machine(server.url, topics=["room"], capacity=1000) as (left, link), machine(server.url) as (right, _):
        channel = right.subscribe()
        for number in range(3):
            left.publish(number, topic="room")
            left.publish(number, topic="local")
        take(channel, 3)
        link.flush(DEADLINE)
        one, other = row(left), row(right)
        assert (one.stream, one.topics, one.overflow, one.capacity) == (STREAM, ("room",), "drop_oldest", 1000)
        assert (one.state, one.error, one.refused) == ("up", None, 0)
        assert f"127.0.0.1:{server.port}" in one.url
        assert (one.sent, one.waiting, one.waiting_bytes, one.dropped) == (3, 0, 0, 0)
        assert (other.received, other.missed, other.duplicates) == (3, 0, 0)
        assert link.stream == STREAM
        wait_until(lambda: row(right).lag == 0, DEADLINE)
        assert psutil.pid_exists(one.pid or 0)
        server.kill()
        wait_until(lambda: row(left).state == "connecting" and row(left).error, DEADLINE)
        server.restart()
        wait_until(lambda: row(left).state == "up", DEADLINE)


def test_a_machine_that_comes_later_notices_a_takeover(redis: RedisServer) -> None:
    """Though nothing has come from there yet: those that are there answer a newcomer's announcement."""
    with machine(redis.url, restart=True) as (left, _), machine(redis.url) as (right, _), redis.client() as client:
        channel = right.subscribe()
        wait_until(lambda: client.xlen(STREAM) >= 4, DEADLINE)
        os.kill(left.stats().pid, signal.SIGKILL)
        with pytest.raises(Lagged):
            channel.recv(DEADLINE)


def test_a_group_on_each_machine(redis: RedisServer) -> None:
    """Groups are each bus's own: a job goes to one member on each machine."""
    with machines(redis.url, 3) as buses:
        members = [[bus.subscribe("jobs", group="workers") for _ in range(2)] for bus in buses]
        buses[0].publish("job", topic="jobs")

        def received() -> list[int]:
            return [sum(member.poll(0) for member in group) for group in members]

        wait_until(lambda: received() == [1, 1, 1], DEADLINE)
