"""What one session can make the broker hold, and do: each lie is sent as it would be, and costs nobody but its sender."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import select
import socket
import struct
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from mpbroadcast import Broadcaster
from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.history import MOST_TOPICS, History
from mpbroadcast.broker.core.limits import MOST_ASKED, MOST_CONNECTIONS, SESSION, Cost
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import Broker
from mpbroadcast.broker.statistics import memory
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.shared_memory import message_memory, ring_memory
from mpbroadcast.protocol.control import MAX_REQUEST, client_handshake, encode
from mpbroadcast.protocol.fd_packets import MEMORY, RING, pack
from mpbroadcast.protocol.frames import PIECE, Batch, frame_head, memory_frame, pieces, reference_frame
from mpbroadcast.protocol.runs import MESSAGES, RUN, TAIL
from tests.support.helpers import DEADLINE, pattern, wait_until
from tests.support.own_broker import Asker, ask, asking, complete, held, own_broker, subscribed, subscribing
from tests.support.rude import RING_SIZE, Lent, Rude, shares_memory

__all__ = ["own_broker"]


def test_a_topic_that_no_run_can_carry(bus: Broadcaster[Any]) -> None:
    """A topic of 65,530 bytes, in pieces, ends its publisher; others go on."""
    with bus.subscribe() as channel:
        pid = bus.stats().pid
        link = BrokerClient(bus.address)
        lent = Lent(link, fd_socket=False)
        for piece in pieces(frame_head(0, b"x" * 65530), 1):
            lent.write(piece)
        wait_until(lambda: bus.stats().publishers == 0)
        bus.publish("another's")
        assert channel.recv(DEADLINE) == "another's"
        assert bus.stats().pid == pid
        lent.close()
        link.close()


def test_an_item_that_cannot_be_routed_costs_its_publisher(own_broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever routing an item raises, its publisher is closed, and others' messages go on."""
    with asking(own_broker) as (_, _, number):
        session = own_broker.registry.sessions[number]
        subscription = subscribed(own_broker, 1 << 40, session, ["topic"], "drop_oldest")
        bad, bad_pipe = own_broker.traffic.intake.add(own_broker.registry.new_id(), session)
        _, good_pipe = own_broker.traffic.intake.add(own_broker.registry.new_id(), session)
        bad.parked.append(Batch(bytes(8), array("I", (8,)), b"topic", 0, 1 << 16))  # its head is longer than a run can hold
        for pipe in (bad_pipe, good_pipe):
            os.write(pipe, frame_head(0, b"topic"))
            os.close(pipe)
        own_broker.traffic.round()
        assert (bad.pipe.fd < 0, subscription.backlog.waiting) == (True, 2)
    caplog.clear()  # its traceback keeps the broker


# ----------------------------------------------------------------------------------------------------- held up by nobody


class TooManyCalls(BaseException):
    """More work than there may be."""


@contextlib.contextmanager
def at_most(calls: int) -> Iterator[None]:
    """What happens within makes no more calls, so that it takes no longer when there is more of what it must not look at."""
    made = itertools.count(1)

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call") and next(made) > calls:
            sys.setprofile(None)
            raise TooManyCalls

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_a_replay_looks_names_up() -> None:
    """A replay of 10,000 names does not try each of them with each of 4,096 topics."""
    history = History(3)
    for number in range(MOST_TOPICS):
        history.add(number, Batch(bytes(8), array("I", (8,)), b"%d" % number, 0, 8))
    names = [str(number) for number in range(10_000)]
    with at_most(100_000):
        found = history.last(complete(history.matching(names)), 2, 1 << 20)
    assert [batch.topic for batch in found] == [b"4094", b"4095"]


def test_a_replay_tries_patterns_in_parts() -> None:
    """Many patterns are not tried with 4,096 topics in one round; what is published meanwhile is found, too."""
    history = History(3)
    for number in range(MOST_TOPICS):
        history.add(number, Batch(bytes(8), array("I", (8,)), b"%d" % number, 0, 8))
    parts = history.matching([f"*{number}*7" for number in range(30)])
    next(parts)
    history.add(MOST_TOPICS, Batch(bytes(8), array("I", (8,)), b"4 and 7", 0, 8))
    found: set[bytes] = set()
    while not found:
        with at_most(60_000):
            try:
                next(parts)
            except StopIteration as done:
                found = done.value
    assert {b"4 and 7", b"1997"} < found


def in_rounds(broker: Broker, asker: Asker, message: dict[str, Any], most: int) -> dict[str, Any]:
    """The reply to a request, after as many rounds of the loop as it takes, none of which makes more than ``most`` calls."""
    asker.replies.clear()
    with at_most(most):
        answer(broker, cast("ControlConnection", asker), message)
    while not asker.replies:
        with at_most(most):
            broker.round(at_once=True)
    (reply,) = asker.replies
    return reply


@pytest.mark.parametrize("do", ["unsubscribe", "drop topics", "subscribe"])
def test_a_request_that_comes_behind_a_flood(do: str, own_broker: Broker) -> None:
    """What was published before a request is routed before it, in turns with all others."""
    with asking(own_broker) as (one, _, session):
        for number in range(5000, 5032):
            subscribed(own_broker, number, own_broker.registry.sessions[session], ["a", "b"], "drop_oldest")
        first = own_broker.registry.subscriptions[5000]
        _, fd = own_broker.traffic.intake.add(own_broker.registry.new_id(), own_broker.registry.sessions[session])
        for _ in range(16):
            os.write(fd, 64 * (frame_head(0, b"a") + frame_head(0, b"b")))
        request = {**subscribing(session, 6000 if do == "subscribe" else 5000, "a"), "do": do, "replay": 1}
        assert in_rounds(own_broker, one, request, 400_000) == {}
        os.write(fd, frame_head(0, b"a"))
        os.close(fd)
        own_broker.round(at_once=True)
        assert first.backlog.published == (2049 if do == "subscribe" else 2048)


def test_statistics_of_many_subscriptions_come_in_parts(own_broker: Broker) -> None:
    """Statistics of 5,000 subscriptions hold nobody up: between two parts the loop goes on."""
    with asking(own_broker) as (one, other, session):
        for number in range(1000, 6000):
            subscribed(own_broker, number, own_broker.registry.sessions[session], [str(number)], "drop_oldest")
        rows = in_rounds(own_broker, one, {"do": "stats"}, 8000)["subscribers"]
        assert {row["id"] for row in rows} > set(range(1000, 6000))
        assert in_rounds(own_broker, other, {"do": "wait", "count": 5001, "now": True}, 100)["done"]


def connect(broker: Broker, client: socket.socket, folder: Path) -> None:
    """Connect to a broker of this process, with its key."""
    client.connect(str(folder / "s"))
    handshake = client_handshake(b"key")
    next(handshake)
    broker.round(at_once=True)
    client.sendall(handshake.send(client.recv(1000)[4:]))
    broker.round(at_once=True)
    client.sendall(handshake.send(client.recv(1000)[4:]))
    broker.round(at_once=True)
    with pytest.raises(StopIteration) as done:
        handshake.send(client.recv(1000)[4:])
    client.sendall(done.value.value)
    broker.round(at_once=True)


def test_many_requests_at_once(own_broker: Broker, tmp_path: Path) -> None:
    """Thousands of notes of one connection, as when thousands of channels are dropped, are not handled in one round.

    All of them are handled, though the client closes the connection at once.
    """
    with asking(own_broker) as (_, _, session), socket.socket(socket.AF_UNIX) as client:
        for number in range(1000, 3000):
            subscribed(own_broker, number, own_broker.registry.sessions[session], [str(number)], "drop_oldest")
        connect(own_broker, client, tmp_path)
        client.sendall(b"".join(encode({"do": "drop", "subscription": number}) for number in range(1000, 3000)))
        client.close()
        for _ in range(400):
            with at_most(10_000):
                own_broker.round(at_once=True)
        assert own_broker.router.count == 1
        own_broker.poller.close_forgotten()


def test_what_a_dead_process_leaves_is_removed_in_parts(own_broker: Broker) -> None:
    """Thousands of subscriptions of one process are not found any more when it has died, and are removed in many rounds."""
    with asking(own_broker) as (one, _, session):
        for number in range(1000, 6000):
            subscribed(own_broker, number, own_broker.registry.sessions[session], [str(number)], "drop_oldest")
        own_broker.peers.dead.append(one.peer)
        with at_most(50_000):
            own_broker.round(at_once=True)
        assert not own_broker.registry.subscriptions
        rounds = 0
        while own_broker.registry.to_remove:
            rounds += 1
            with at_most(8000):
                own_broker.round(at_once=True)
        assert (rounds > 50, own_broker.router.count) == (True, 0)


def test_many_topics_of_one_subscription_come_and_go_in_parts(own_broker: Broker) -> None:
    """10,000 patterns are added, dropped, and removed with their subscription in many rounds, and none of them takes long."""
    patterns = [f"room:{number}:*" for number in range(10_000)]
    with asking(own_broker) as (one, other, session):
        assert in_rounds(own_broker, one, subscribing(session, 1000, *patterns), 40_000) == {}
        assert own_broker.router.topics(own_broker.registry.subscriptions[1000]) == tuple(patterns)
        changes = {"session": session, "subscription": 1000, "topics": [f"more {pattern}" for pattern in patterns]}
        for do in ("add topics", "drop topics"):
            assert in_rounds(own_broker, other, {"do": do, **changes}, 60_000) == {}
        assert own_broker.router.topics(own_broker.registry.subscriptions[1000]) == tuple(patterns)
        assert in_rounds(own_broker, one, {"do": "close", "subscription": 1000}, 1000) == {}
        assert 1000 not in own_broker.registry.subscriptions
        while own_broker.registry.to_remove:
            with at_most(30_000):
                own_broker.round(at_once=True)
        assert own_broker.router.count == 1


def test_a_subscription_whose_topics_are_half_there(own_broker: Broker) -> None:
    """A request that is sent again, as its connection has ended before the reply, adds the topics that are missing."""
    topics = [str(number) for number in range(3000)]
    with asking(own_broker) as (one, other, session):
        answer(own_broker, cast("ControlConnection", other), subscribing(session, 1000, *topics))
        while 1000 not in own_broker.registry.subscriptions:
            own_broker.round(at_once=True)
        other.is_closed = True
        own_broker.round(at_once=True)
        assert len(own_broker.router.topics(own_broker.registry.subscriptions[1000])) < 3000
        assert in_rounds(own_broker, one, subscribing(session, 1000, *topics), 40_000) == {}
        assert {*own_broker.router.topics(own_broker.registry.subscriptions[1000])} == {*topics}


def test_many_waits_and_many_subscriptions(own_broker: Broker) -> None:
    """All who wait for subscriptions are looked at once in a round, at no more cost when there are many subscriptions."""
    with asking(own_broker) as (one, other, session):
        for number in range(1000, 1400):
            waits = Asker(one.peer)
            answer(own_broker, cast("ControlConnection", waits), {"do": "wait", "count": 5000, "topic": None})
            subscribed(own_broker, number, own_broker.registry.sessions[session], ["*"], "drop_oldest")
        with at_most(20_000):
            for number in range(2000, 2100):
                answer(own_broker, cast("ControlConnection", other), subscribing(session, number, "fuzz"))
            own_broker.round(at_once=True)


def test_requests_that_take_long(own_broker: Broker, tmp_path: Path) -> None:
    """Of those that come at once, a round handles one, or what it has time for."""
    with asking(own_broker) as (one, _, session), socket.socket(socket.AF_UNIX) as client:
        connect(own_broker, client, tmp_path)
        slow = [f"*[ab]{'?' * 900}{number}" for number in range(35)]
        assert in_rounds(own_broker, one, subscribing(session, 5000, *slow), 100_000) == {}
        waits = [{"do": "wait", "count": 1, "topic": "a" * 1000 + str(number), "now": True} for number in range(20)]
        client.sendall(b"".join(map(encode, waits)))
        before = own_broker.router.steps
        own_broker.round(at_once=True)
        own_broker.round(at_once=True)
        assert 0 < own_broker.router.steps - before < 10 * SESSION.steps
        client.close()
        for _ in range(30):
            own_broker.round(at_once=True)


def test_waits_whose_topics_take_long_to_match(own_broker: Broker) -> None:
    """When a subscription comes, only some of those that wait for one are looked at in a round; all in the end."""
    with asking(own_broker) as (one, _, session):
        slow = [f"*[ab]{'?' * 900}{number}" for number in range(35)]
        assert in_rounds(own_broker, one, subscribing(session, 5000, *slow), 100_000) == {}
        waits = [Asker(one.peer) for _ in range(20)]
        for number, asker in enumerate(waits):
            message = {"do": "wait", "count": 1, "topic": "a" * 1000 + f"{number}.", "now": False}
            answer(own_broker, cast("ControlConnection", asker), message)
        before = own_broker.router.steps
        ask(own_broker, one, subscribing(session, 5001, "*."))
        own_broker.round(at_once=True)
        assert own_broker.router.steps - before < 10 * SESSION.steps
        while not all(asker.replies for asker in waits):
            own_broker.round(at_once=True)


def test_an_honest_session_has_room(own_broker: Broker) -> None:
    """A session can have 16,000 subscriptions, or 20,000 topics and 10,000 patterns, also of those that need ``re``."""
    with asking(own_broker) as (one, _, session):
        for number in range(1000, 17_000):
            subscribed(own_broker, number, own_broker.registry.sessions[session], ["*"], "block")
        other = own_broker.registry.new_session(cast("ControlConnection", one)).id
        names = [f"a quite ordinary name of a topic: {number}" for number in range(20_000)]
        patterns = [f"room:{number}:{'*:user:*' if number % 10 else '[ab]?'}" for number in range(10_000)]
        assert in_rounds(own_broker, one, subscribing(other, 20_000, *names), 400_000) == {}
        assert in_rounds(own_broker, one, subscribing(other, 20_001, *patterns), 400_000) == {}


@pytest.mark.parametrize(
    ("topics", "what"),
    [
        ([f"{number}" for number in range(40_000)], "topics and patterns"),
        ([f"*[ab]{'?' * 900}{number}" for number in range(4000)], "steps"),
        ([f"*{'a' * 900}*{number}" for number in range(4000)], "steps"),
        ([f"{'é' * 500}{number}" for number in range(26_000)], "bytes"),
    ],
    ids=["topics", "patterns that need re", "patterns of stars", "bytes"],
)
def test_more_than_a_session_may_have(topics: list[str], what: str, own_broker: Broker) -> None:
    """What would be too much is refused at once, with an error that names it; the session goes on, all is given back."""
    with asking(own_broker) as (one, other, session):
        spent = own_broker.registry.budget.spent
        reply = in_rounds(own_broker, one, subscribing(session, 1000, *topics), 200_000)
        assert (reply["error"], what in reply["text"]) == ("value", True)
        assert own_broker.registry.budget.spent == spent
        assert in_rounds(own_broker, one, subscribing(session, 1000, "fuzz:*", "fuzz"), 1000) == {}
        changes = {"session": session, "subscription": 1000}
        for do, names in (("add topics", ["more", "fuzz", "m?"]), ("drop topics", ["fuzz", "none"]), ("add topics", topics)):
            reply = in_rounds(own_broker, other, {"do": do, "topics": names, **changes}, 300_000)
        assert what in reply["text"]
        in_rounds(own_broker, one, {"do": "close", **changes}, 1000)
        assert own_broker.registry.budget.spent == spent
    assert own_broker.registry.budget.spent == Cost()


def test_a_session_with_too_many_subscriptions(own_broker: Broker) -> None:
    """One subscription more than there may be is refused, until another one is closed."""
    with asking(own_broker) as (one, _, session):
        for number in range(1000, 999 + SESSION.subscriptions):
            subscribed(own_broker, number, own_broker.registry.sessions[session], ["*"], "block")
        assert "subscriptions" in in_rounds(own_broker, one, subscribing(session, 1, "*"), 1000)["text"]
        in_rounds(own_broker, one, {"do": "close", "subscription": 1000, "session": session}, 1000)
        assert in_rounds(own_broker, one, subscribing(session, 1, "*"), 1000) == {}


def test_sessions_are_bounded_together(own_broker: Broker) -> None:
    """Sessions that end, and leave what nobody has opened, do not make the broker grow: together they have a budget, too."""
    with asking(own_broker) as (one, _, _):
        topics = [f"{'x' * 1000}{number}" for number in range(20_000)]
        replies = []
        for number in (1001, 1002, 1003, 1004):
            session = own_broker.registry.new_session(cast("ControlConnection", one)).id
            replies.append(in_rounds(own_broker, one, subscribing(session, number, *topics), 400_000))
            own_broker.registry.end_session(own_broker.registry.sessions[session], clean=True)
        assert ["together" in reply.get("text", "") for reply in replies] == [False, False, False, True]
        assert held(own_broker) > 60_000_000
        for number in (1001, 1002, 1003):
            own_broker.registry.remove(own_broker.registry.subscriptions[number])
        assert held(own_broker) == 0


def test_a_process_with_too_many_connections(own_broker: Broker) -> None:
    """What a process asks that has too many connections is answered with an error."""
    with asking(own_broker) as (one, _, _):
        one.peer.connections += MOST_CONNECTIONS + 1
        assert "connections" in in_rounds(own_broker, one, {"do": "stats"}, 1000)["text"]
        one.peer.connections -= MOST_CONNECTIONS + 1
        assert "error" not in in_rounds(own_broker, one, {"do": "stats"}, 1000)


def test_a_replay_of_many_patterns(own_broker: Broker) -> None:
    """A replay whose patterns would be tried for seconds is refused; one whose patterns begin differently is not."""
    history = own_broker.traffic.routing.history
    assert history is not None
    for number in range(MOST_TOPICS):
        history.add(number, Batch(bytes(8), array("I", (8,)), b"room:%d" % number, 0, 8))
    with asking(own_broker) as (one, _, session):
        alike = subscribing(session, 1000, *(f"*m*{number}" for number in range(5000))) | {"replay": 1}
        assert "begin" in in_rounds(own_broker, one, alike, 400_000)["text"]
        different = subscribing(session, 1000, *(f"room:{number}*" for number in range(5000))) | {"replay": 1}
        assert in_rounds(own_broker, one, different, 400_000) == {}
        assert own_broker.registry.subscriptions[1000].backlog.waiting == 1


def test_an_error_of_too_many_topics(bus: Broadcaster[Any]) -> None:
    """An honest program that names too many topics has an error in that call, and goes on; what it has counts as memory."""
    with pytest.raises(ValueError, match="topics and patterns"):
        bus.subscribe(*map(str, range(40_000)))
    with bus.subscribe(*map(str, range(5000))) as channel:
        bus.publish("one", topic="77")
        assert channel.recv(DEADLINE) == "one"
        assert bus.stats().memory > 2_000_000
    assert bus.stats().memory == 0


@contextlib.contextmanager
def through_its_pipe(link: BrokerClient) -> Iterator[int]:
    """A subscription whose reader shares no memory: its pipe."""
    fields: dict[str, Any] = {"capacity": 1 << 32, "overflow": "block", "replay": 0, "publisher": None}
    link.request("subscribe", subscription=7, topics=["large"], **fields)
    reply = link.request("open", subscription=7, shared=False)
    link.request("opened", subscription=7, token=reply.body["token"])
    assert reply.pipe is not None
    yield reply.pipe.fd
    reply.pipe.close()
    link.request("close", subscription=7)


def read_all(fd: int, size: int) -> Iterator[bytes]:
    """What comes in a pipe, until so many bytes have."""
    while size:
        assert select.select([fd], [], [], DEADLINE)[0]
        data = os.read(fd, size)
        assert data
        size -= len(data)
        yield data


@shares_memory
def test_a_long_message_through_a_pipe(bus: Broadcaster[Any]) -> None:
    """A message in memory of its own comes whole to a reader that shares none, also to one that is quick."""
    link = BrokerClient(bus.address)
    payload = pattern(1, 6 << 20)
    with through_its_pipe(link) as fd:
        lent = Lent(link, fd_socket=True)
        descriptor = message_memory([payload])
        lent.send_packet(pack(MEMORY, 0, 1), descriptor.fd)
        descriptor.close()
        lent.write(memory_frame(1, len(payload), b"large") + frame_head(2, b"large") + b"ok")
        lent.close()
        head = frame_head(len(payload), b"large")
        size = RUN.size + len(head) + len(payload) + len(TAIL)
        wanted = RUN.pack(size, 1, MESSAGES, 0, len(head)) + head + payload + TAIL
        assert b"".join(read_all(fd, size)) == wanted
        assert b"".join(read_all(fd, RUN.size + 13 + 2 + 1)).endswith(b"largeok" + TAIL)
    link.close()


@shares_memory
def test_sparse_memory_through_a_pipe(bus: Broadcaster[Any]) -> None:
    """Memory of 1 GiB that was never written, for a reader that shares none, takes nothing of the broker, and no time."""
    rss = psutil.Process(bus.stats().pid).memory_info
    link = BrokerClient(bus.address)
    with through_its_pipe(link) as fd, bus.subscribe("other") as channel:
        before = rss().rss
        lent = Lent(link, fd_socket=True)
        memory = os.memfd_create("sparse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, 1 << 30)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
        lent.send_packet(pack(MEMORY, 0, 1), memory)
        os.close(memory)
        lent.write(memory_frame(1, 1 << 30, b"large"))
        for data in itertools.islice(read_all(fd, 1 << 30), 50):
            assert data
            bus.publish(len(data), topic="other")
            assert channel.recv(DEADLINE) == len(data)
            assert rss().rss - before < 64 << 20
        lent.close()
    link.close()


def test_requests_that_are_never_whole(bus: Broadcaster[Any]) -> None:
    """Half requests are counted, and beyond what a process may have of them their connection is closed."""
    memory = psutil.Process(bus.stats().pid).memory_info
    before = memory().rss
    half = struct.pack("!i", MAX_REQUEST) + bytes(MAX_REQUEST - 1)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(MOST_ASKED // MAX_REQUEST + 8):
            clients.append(Rude(bus.address))
            stack.callback(clients[-1].close)
            clients[-1].send(half)
        wait_until(lambda: MOST_ASKED - 9 * MAX_REQUEST < bus.stats().memory <= MOST_ASKED)
        assert sum(client.reply(0) is None for client in clients) == len(clients)
        assert memory().rss - before < 1.5 * MOST_ASKED
    wait_until(lambda: bus.stats().memory == 0)


@shares_memory
def test_many_references_to_the_same_memory(own_broker: Broker) -> None:
    """A few kilobytes of references do not make the broker copy gigabytes: a second one to the same bytes is refused."""
    with asking(own_broker) as (_, _, number):
        publisher, pipe = own_broker.traffic.intake.add(own_broker.registry.new_id(), own_broker.registry.sessions[number])
        fd_socket = DescriptorSocket(own_broker.traffic.memory.add(publisher))
        descriptor, memory = ring_memory(RING_SIZE)
        fd_socket.send_packet(pack(RING, 1, 1 << 16), descriptor.fd)
        own_broker.round(at_once=True)
        os.write(pipe, reference_frame(1, 0, RING_SIZE, b"fuzz") * 150)
        own_broker.traffic.round()
        routed = own_broker.traffic.routing.routed
        os.close(pipe)
        fd_socket.close()
        descriptor.close()
        memory.close()
    assert routed == 1


@pytest.mark.parametrize("gone", [False, True], ids=["a living publisher", "a dead publisher"])
def test_publishers_have_turns(gone: bool, own_broker: Broker) -> None:
    """What one publisher has written for many subscriptions takes many rounds, and in each the others have their turn."""
    with asking(own_broker) as (_, _, number):
        session, traffic = own_broker.registry.sessions[number], own_broker.traffic
        subscriptions = [subscribed(own_broker, number, session, ["turn*"], "drop_newest") for number in range(1000, 1500)]
        one, one_pipe = traffic.intake.add(own_broker.registry.new_id(), session)
        other, other_pipe = traffic.intake.add(own_broker.registry.new_id(), session)
        os.write(one_pipe, (frame_head(0, b"turn 1") + frame_head(0, b"turn 2")) * 100)
        if gone:
            traffic.intake.finish(one)
        for _ in range(5):
            os.write(other_pipe, frame_head(0, b"turn 3"))
            with at_most(200_000):
                traffic.round()
            assert one.parked
            assert other.all_routed
        while one.parked:
            traffic.round()
        assert [one.backlog.published for one in subscriptions] == [205] * 500
        assert (one.id in traffic.publishers) != gone
        os.write(other_pipe, frame_head(0, b"turn 3"))
        traffic.round()
        assert traffic.routing.routed == 206
        for pipe in (one_pipe, other_pipe):
            os.close(pipe)


def test_what_waits_for_its_turn_comes_before_what_is_asked_next(own_broker: Broker) -> None:
    """Who unsubscribes gets all that was written before, also what was left for the next round."""
    with asking(own_broker) as (one, _, number):
        session, traffic = own_broker.registry.sessions[number], own_broker.traffic
        for subscription in range(1000, 1500):
            subscribed(own_broker, subscription, session, ["turn*"], "drop_newest")
        publisher, pipe = traffic.intake.add(own_broker.registry.new_id(), session)
        os.write(pipe, (frame_head(0, b"turn 1") + frame_head(0, b"turn 2")) * 50)
        traffic.intake.finish(publisher)
        assert publisher.parked
        in_rounds(own_broker, one, {"do": "unsubscribe", "session": number, "subscription": 1000}, 1_000_000)
        assert own_broker.registry.subscriptions[1000].backlog.waiting == 100
        os.close(pipe)


def test_what_is_taken_in_comes_in_parts(own_broker: Broker) -> None:
    """What publishers have written before a request is read in parts, also if it is a message whose last piece never comes."""
    with asking(own_broker) as (_, _, number):
        session, traffic = own_broker.registry.sessions[number], own_broker.traffic
        pipes = [traffic.intake.add(own_broker.registry.new_id(), session)[1] for _ in range(4)]
        parts = (struct.pack("<IIQB", 18, PIECE, 7, 0) + b"x") * 200
        for pipe in pipes * 60:
            os.write(pipe, parts)
        steps = traffic.take_in()
        more = True
        while more:
            with at_most(50_000):
                more = next(steps, True) is None
        assert all(publisher.all_routed for publisher in traffic.publishers.values())
        for pipe in pipes:
            os.close(pipe)


def test_publishers_of_a_dead_session_are_read_in_turn(own_broker: Broker) -> None:
    """What many blocked publishers have left in their pipes is not all read in the round in which their process has died."""
    with asking(own_broker) as (_, other, number):
        session, traffic = own_broker.registry.sessions[number], own_broker.traffic
        others = own_broker.registry.new_session(cast("ControlConnection", other))
        full = subscribed(own_broker, 5000, others, ["a"], "block")
        full.backlog.capacity = 1
        pipes = [traffic.intake.add(own_broker.registry.new_id(), session)[1] for _ in range(16)]
        for pipe in pipes:
            os.write(pipe, 2 * frame_head(0, b"a"))
        own_broker.round(at_once=True)
        assert len(full.waiters) == 16
        for pipe in pipes:
            for _ in range(30):
                os.write(pipe, (frame_head(0, b"") + frame_head(0, b"a")) * 120)
            os.close(pipe)
        own_broker.registry.end_session(session, clean=False)
        while own_broker.registry.to_finish:
            with at_most(400_000):
                own_broker.round(at_once=True)
        own_broker.registry.remove(full)
        while traffic.publishers:
            own_broker.round(at_once=True)


def test_the_memory_of_blocked_publishers_is_counted_in_parts(own_broker: Broker) -> None:
    """Statistics hold nothing up, though publishers are blocked that have very many messages here."""
    batch = Batch(bytes(8), array("I", (8,)), b"", 0, 8)
    with asking(own_broker) as (_, _, session):
        for _ in range(8):
            publisher, fd = own_broker.traffic.intake.add(own_broker.registry.new_id(), own_broker.registry.sessions[session])
            publisher.parked.extend([batch] * 10_000)
            os.close(fd)
        steps = memory(own_broker)
        total = None
        while total is None:
            with at_most(350_000):
                try:
                    next(steps)
                except StopIteration as done:
                    total = done.value
        assert total >= 80_000 * batch.charge
        for publisher in own_broker.traffic.publishers.values():
            publisher.parked.clear()


def test_a_broker_that_ends_closes_many_channels_in_parts(own_broker: Broker) -> None:
    """When the time is over, no round closes thousands of channels that were not read."""
    with asking(own_broker) as (_, _, session):
        for number in range(5000, 7000):
            subscribed(own_broker, number, own_broker.registry.sessions[session], ["all"], "drop_oldest")
        _, fd = own_broker.traffic.intake.add(own_broker.registry.new_id(), own_broker.registry.sessions[session])
        os.write(fd, frame_head(0, b"all"))
        own_broker.round(at_once=True)
        os.close(fd)
        own_broker.stop(0)
        while not own_broker.is_finished:
            with at_most(60_000):
                own_broker.round(at_once=True)
