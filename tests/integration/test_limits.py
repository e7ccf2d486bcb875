"""What one session can make the broker hold, and do: each lie is sent as it would be, and costs its sender only."""

import contextlib
import fcntl
import os
import select
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import pytest

from mpbroadcast import Broadcaster
from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.history import MOST_TOPICS, History
from mpbroadcast.broker.core.limits import MOST_ASKED, MOST_CONNECTIONS, SESSION, Cost
from mpbroadcast.broker.core.router import MOST_LOOKED_UP
from mpbroadcast.broker.members import Publisher, Session, Subscription
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import Broker
from mpbroadcast.broker.statistics import memory
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.protocol.control import MAX_REQUEST, encode
from mpbroadcast.protocol.fd_packets import MEMORY, pack
from mpbroadcast.protocol.frames import IMAGE, Batch, frame_head, memory_frame
from tests.support.helpers import DEADLINE, Background, keyed_connection, wait_until
from tests.support.own_broker import Asker, ask, asking, complete, held, own_broker, subscribed, subscribing
from tests.support.rude import Lent, Rude, shares_memory

__all__ = ["own_broker"]


@contextlib.contextmanager
def at_most(calls: int) -> Iterator[None]:
    """Expect no more calls meanwhile: so it takes no longer when there is more of what must not be looked at. For 0 they are
    not counted: that takes several times as long."""
    made = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    sys.setprofile(count if calls else None)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert made <= calls


class Attacker(NamedTuple):
    """A session of two connections of this process with a broker that is only asked, and runs round by round."""

    broker: Broker
    one: Asker
    other: Asker
    number: int
    pipes: list[int]  # the ends that publishers write into

    @property
    def session(self) -> Session:
        return self.broker.registry.sessions[self.number]

    def new_session(self) -> int:
        return self.broker.registry.new_session(cast("ControlConnection", self.one)).id

    def subscribe(self, numbers: Iterable[int], *topics: str, policy: str = "drop_oldest") -> list[Subscription]:
        """Make a subscription of each number; without topics, the number is its topic."""
        return [subscribed(self.broker, number, self.session, [*topics] or [str(number)], policy) for number in numbers]

    def publisher(self) -> tuple[Publisher, int]:
        """Return a new publisher, and the end of its pipe to write into."""
        made, pipe = self.broker.traffic.intake.add(self.broker.registry.new_id(), self.session)
        self.pipes.append(pipe)
        return made, pipe

    def round(self, most: int = 0) -> None:
        """Let the broker run a round, which makes no more than ``most`` calls."""
        with at_most(most):
            self.broker.round(at_once=True)

    def ask(self, message: dict[str, Any], most: int = 0, asker: Asker | None = None) -> dict[str, Any]:
        """Return the reply to a request after as many rounds as it takes, none of which makes more than ``most`` calls."""
        asker = asker or self.one
        asker.replies.clear()
        with at_most(most):
            answer(self.broker, cast("ControlConnection", asker), message)
        while not asker.replies:
            self.round(most)
        (reply,) = asker.replies
        return reply


@pytest.fixture
def attacker(own_broker: Broker) -> Iterator[Attacker]:
    with asking(own_broker) as asked:
        made = Attacker(own_broker, *asked, [])
        yield made
        for pipe in made.pipes:
            os.close(pipe)


def batch(topic: str) -> Batch:
    """Return a batch of one empty message."""
    return Batch(bytes(8), array("I", (8,)), topic.encode(), 0, 8)


def test_an_item_that_cannot_be_routed_costs_its_publisher(attacker: Attacker, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever routing an item raises, its publisher is closed, and others' messages go on."""
    (subscription,) = attacker.subscribe([1 << 40], "topic")
    (bad, bad_pipe), (_, good_pipe) = attacker.publisher(), attacker.publisher()
    bad.parked.append(Batch(bytes(8), array("I", (8,)), b"topic", 0, 1 << 16))  # its head is longer than a run can hold
    for pipe in (bad_pipe, good_pipe):
        os.write(pipe, frame_head(0, b"topic"))
    attacker.broker.traffic.round()
    assert (bad.pipe.fd < 0, subscription.backlog.waiting) == (True, 2)
    caplog.clear()  # its traceback keeps the broker


@pytest.mark.parametrize("do", ["unsubscribe", "drop topics", "subscribe"])
def test_a_request_that_comes_behind_a_flood(do: str, attacker: Attacker) -> None:
    """What was published before a request is routed before it, in turns with all others."""
    first, *_ = attacker.subscribe(range(5000, 5032), "a", "b")
    _, fd = attacker.publisher()
    for _ in range(4):
        os.write(fd, 64 * (frame_head(0, b"a") + frame_head(0, b"b")))
    request = {**subscribing(attacker.number, 6000 if do == "subscribe" else 5000, "a"), "do": do, "replay": 1}
    assert attacker.ask(request, 180_000) == {}
    os.write(fd, frame_head(0, b"a"))
    attacker.broker.round(at_once=True)
    assert first.backlog.published == (513 if do == "subscribe" else 512)


def test_statistics_of_many_subscriptions_and_their_end_come_in_parts(attacker: Attacker) -> None:
    """Statistics of 5,000 subscriptions hold no other request up: between two parts the loop goes on. When their process has
    died they are not found any more, and are removed in many rounds."""
    registry = attacker.broker.registry
    attacker.subscribe(range(1000, 6000))
    rows = attacker.ask({"do": "stats"}, 8000)["subscribers"]
    assert {row["id"] for row in rows} > set(range(1000, 6000))
    assert attacker.ask({"do": "wait", "count": 5001, "now": True}, 100, attacker.other)["done"]
    attacker.broker.peers.dead.append(attacker.one.peer)
    attacker.round(50_000)
    assert not registry.subscriptions
    rounds = 0
    while registry.to_remove:
        rounds += 1
        attacker.round(8000)
    assert (rounds > 50, attacker.broker.router.count) == (True, 0)


def test_many_topics_of_one_subscription_come_and_go_in_parts(attacker: Attacker) -> None:
    """6,000 patterns are added, dropped, and removed with their subscription in many rounds, and none of them takes long."""
    registry, router = attacker.broker.registry, attacker.broker.router
    patterns = [f"room:{number}:*" for number in range(6000)]
    assert attacker.ask(subscribing(attacker.number, 1000, *patterns), 40_000) == {}
    assert router.topics(registry.subscriptions[1000]) == tuple(patterns)
    changes = {"session": attacker.number, "subscription": 1000, "topics": [f"more {pattern}" for pattern in patterns]}
    for do in ("add topics", "drop topics"):
        assert attacker.ask({"do": do, **changes}, 60_000, attacker.other) == {}
    assert router.topics(registry.subscriptions[1000]) == tuple(patterns)
    assert attacker.ask({"do": "close", "subscription": 1000}, 1000) == {}
    assert 1000 not in registry.subscriptions
    while registry.to_remove:
        attacker.round(30_000)
    assert router.count == 1


def test_many_waits_and_many_subscriptions(attacker: Attacker) -> None:
    """All waits for subscriptions are looked at once in a round, at no more cost when there are many subscriptions."""
    attacker.subscribe(range(1000, 1400), "*")
    for _ in range(400):
        ask(attacker.broker, Asker(attacker.one.peer), {"do": "wait", "count": 5000, "topic": None})
    with at_most(22_000):
        for number in range(2000, 2100):
            answer(attacker.broker, cast("ControlConnection", attacker.other), subscribing(attacker.number, number, "fuzz"))
        attacker.broker.round(at_once=True)


def slow_patterns(first: int) -> list[str]:
    """Return patterns that take as long to match as those of a session may."""
    return [f"*[ab]{'?' * 900}{number}" for number in range(first, first + 17)]


@pytest.fixture
def slow(attacker: Attacker) -> Attacker:
    """A session with a subscription whose patterns take as long to match as they may."""
    assert attacker.ask(subscribing(attacker.number, 5000, *slow_patterns(0))) == {}
    return attacker


def test_what_patterns_of_several_sessions_take(slow: Attacker) -> None:
    """A topic is looked up in the turns of its publisher, also before what is requested then. Others have theirs in between."""
    router = slow.broker.router
    everything, quick = slow.subscribe([6000], "*") + slow.subscribe([6001], "quick")
    for number in range(1, 4):
        assert slow.ask(subscribing(slow.new_session(), 5000 + number, *slow_patterns(number * 100))) == {}
    (_, long_pipe), (_, quick_pipe) = slow.publisher(), slow.publisher()
    os.write(quick_pipe, frame_head(0, b"quick"))
    slow.broker.round(at_once=True)
    for number in range(2):
        os.write(long_pipe, frame_head(0, b"a" * 1000 + b"%d" % number))
    steps, served = [], 0
    while everything.backlog.published < 3 + served:
        os.write(quick_pipe, frame_head(0, b"quick"))
        before = router.steps
        slow.broker.round(at_once=True)
        steps.append(router.steps - before)
        served = quick.backlog.published - 1
    assert max(steps) < SESSION.steps // 2
    assert sum(steps) > 6 * SESSION.steps
    assert served == len(steps)
    waits = [Asker(slow.one.peer) for _ in range(MOST_LOOKED_UP)]  # they come first
    for number, asker in enumerate(waits):
        ask(slow.broker, asker, wait(number, False))
    os.write(long_pipe, frame_head(0, b"a" * 1000))
    assert slow.ask({"do": "unsubscribe", "subscription": 6000, "session": slow.number}) == {}
    assert everything.backlog.published == 4 + served


def wait(number: int, now: bool) -> dict[str, Any]:
    """Return a request to wait for a subscription to a topic that takes long to match."""
    return {"do": "wait", "count": 1, "topic": "a" * 1000 + f"{number}.", "now": now}


def test_requests_that_take_long(slow: Attacker, tmp_path: Path) -> None:
    """Of those that come at once, a round handles one, or what it has time for."""
    broker = slow.broker
    connecting = Background(keyed_connection, str(tmp_path / "s"), b"key")
    while connecting.is_alive():
        broker.round(at_once=True)
    with connecting.result() as connection:
        broker.round(at_once=True)
        os.write(connection.fileno(), b"".join(encode(wait(number, True)) for number in range(20)))
        before = broker.router.steps
        broker.round(at_once=True)
        broker.round(at_once=True)
        assert 0 < broker.router.steps - before < 10 * SESSION.steps
    for _ in range(30):
        broker.round(at_once=True)


def test_waits_whose_topics_take_long_to_match(slow: Attacker) -> None:
    """When a subscription comes, only some of those that wait for one are looked at in a round; all in the end."""
    broker = slow.broker
    waits = [Asker(slow.one.peer) for _ in range(12)]
    for number, asker in enumerate(waits):
        ask(broker, asker, wait(number, False))
    before = broker.router.steps
    ask(broker, slow.one, subscribing(slow.number, 5001, "*."))
    broker.round(at_once=True)
    assert broker.router.steps - before < 10 * SESSION.steps
    while not all(asker.replies for asker in waits):
        broker.round(at_once=True)


def test_an_honest_session_has_room(attacker: Attacker) -> None:
    """A session can have 20,000 topics and 10,000 patterns, also of those that need ``re``."""
    names = [f"a quite ordinary name of a topic: {number}" for number in range(20_000)]
    patterns = [f"room:{number}:{'*:user:*' if number % 10 else '[ab]?'}" for number in range(10_000)]
    assert attacker.ask(subscribing(attacker.number, 20_000, *names)) == {}
    assert attacker.ask(subscribing(attacker.number, 20_001, *patterns)) == {}


def test_a_session_with_too_many_subscriptions(attacker: Attacker) -> None:
    """It can have 16,384; one more is refused, until another one is closed."""
    assert SESSION.subscriptions == 16_384
    attacker.subscribe(range(1000, 999 + SESSION.subscriptions), "*", policy="block")
    assert "subscriptions" in attacker.ask(subscribing(attacker.number, 1, "*"), 1000)["text"]
    attacker.ask({"do": "close", "subscription": 1000, "session": attacker.number}, 1000)
    assert attacker.ask(subscribing(attacker.number, 1, "*"), 1000) == {}


@pytest.mark.parametrize(
    ("topics", "what"),
    [
        ([f"{number}" for number in range(40_000)], "topics and patterns"),
        ([f"*[ab]{'?' * 900}{number}" for number in range(4000)], "steps"),
        ([f"*{'a' * 900}*{number}" for number in range(4000)], "steps"),
        ([f"*a{number}*" for number in range(16_000)], "steps"),
        ([f"{'é' * 500}{number}" for number in range(26_000)], "bytes"),
    ],
    ids=["topics", "patterns that need re", "patterns of stars", "many short ones", "bytes"],
)
def test_more_than_a_session_may_have(topics: list[str], what: str, attacker: Attacker) -> None:
    """What would be too much is refused at once, with an error that names it; the session goes on, all is given back."""
    budget = attacker.broker.registry.budget
    spent = budget.spent
    reply = attacker.ask(subscribing(attacker.number, 1000, *topics), 200_000)
    assert (reply["error"], what in reply["text"]) == ("value", True)
    assert budget.spent == spent
    assert attacker.ask(subscribing(attacker.number, 1000, "fuzz:*", "fuzz"), 1000) == {}
    changes = {"session": attacker.number, "subscription": 1000}
    assert what in attacker.ask({"do": "add topics", "topics": topics, **changes}, 300_000)["text"]
    attacker.ask({"do": "close", **changes}, 1000)
    assert budget.spent == spent


def test_sessions_are_bounded_together(attacker: Attacker) -> None:
    """Sessions that end, and leave unopened channels, do not make the broker grow: together they have a budget, too."""
    registry = attacker.broker.registry
    topics = [f"{'x' * 1000}{number}" for number in range(20_000)]
    for number in (1001, 1002, 1003, 1004):
        session = attacker.new_session()
        reply = attacker.ask(subscribing(session, number, *topics))
        assert ("together" in reply.get("text", "")) == (number == 1004)
        registry.end_session(registry.sessions[session], clean=True)
    assert held(attacker.broker) > 60_000_000


def test_a_process_with_too_many_connections(attacker: Attacker) -> None:
    """Each request of a process that has too many connections is answered with an error."""
    attacker.one.peer.connections += MOST_CONNECTIONS + 1
    assert "connections" in attacker.ask({"do": "stats"}, 1000)["text"]
    attacker.one.peer.connections -= MOST_CONNECTIONS + 1
    assert "error" not in attacker.ask({"do": "stats"}, 1000)


def test_a_replay_of_many_patterns(attacker: Attacker) -> None:
    """A replay whose patterns would be tried for seconds is refused; one whose patterns begin differently is not."""
    history = attacker.broker.traffic.routing.history
    assert history is not None
    for number in range(MOST_TOPICS):
        history.add(number, batch(f"room:{number}"))
    alike = subscribing(attacker.number, 1000, *(f"*m*{number}" for number in range(5000)))
    assert "begin" in attacker.ask({**alike, "replay": 1}, 400_000)["text"]
    different = subscribing(attacker.number, 1000, *(f"room:{number}*" for number in range(5000)))
    assert attacker.ask({**different, "replay": 1}) == {}
    assert attacker.broker.registry.subscriptions[1000].backlog.waiting == 1


@pytest.mark.parametrize("meanwhile", ["stats", "unsubscribe", "stop", "close", "cut off"])
def test_a_long_replay_comes_in_parts(meanwhile: str, attacker: Attacker) -> None:
    """No round takes long. What is published meanwhile comes behind it, also when all ends; nothing is left of one that is
    closed, or whose connection is."""
    broker, one, fd = attacker.broker, attacker.one, attacker.publisher()[1]
    history = broker.traffic.routing.history = History(20_000)
    for number in range(20_000):
        history.add(number, batch("a"))
    ask(broker, one, {**subscribing(attacker.number, 1000, "*"), "replay": 20_000, "capacity": 1 << 24})
    backlog = broker.registry.subscriptions[1000].backlog
    assert 0 < backlog.waiting < 2000
    if meanwhile == "stop":
        broker.stop(DEADLINE)
    elif meanwhile == "cut off":
        one.is_closed = True
    else:
        os.write(fd, frame_head(0, b"late"))
        ask(broker, attacker.other, {"do": meanwhile, "subscription": 1000, "session": attacker.number})
    while broker.parts:
        attacker.round(60_000)
    assert bool(one.replies) == (meanwhile != "cut off")
    if meanwhile in ("close", "cut off"):
        assert (len(backlog.runs), held(broker), 1000 in broker.registry.subscriptions) == (0, 0, False)
    else:
        late = meanwhile != "stop"
        assert (backlog.published, backlog.waiting) == (20_000 + late, 20_000 + late)
        assert (b"late" in bytes(backlog.runs[-1 - (meanwhile == "unsubscribe")].data)) == late
        assert backlog.ended == (meanwhile in ("unsubscribe", "stop"))


@shares_memory
def test_sparse_memory_through_a_pipe(bus: Broadcaster[Any]) -> None:
    """Memory of 1 GiB that was never written, for a reader that shares none, takes nothing of the broker, and no time."""
    rss = psutil.Process(bus.stats().pid).memory_info
    link = BrokerClient(bus.address)
    fields: dict[str, Any] = {"capacity": 1 << 32, "overflow": "block", "replay": 0, "publisher": None}
    link.request("subscribe", subscription=7, topics=["large"], **fields)
    reply = link.request("open", subscription=7, shared=False)
    link.request("opened", subscription=7, token=reply.body["token"])
    assert reply.pipe is not None
    memory = os.memfd_create("sparse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 1 << 30)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    with contextlib.closing(link), bus.subscribe("other") as channel:
        lent = Lent(link, fd_socket=True)
        before = rss().rss
        lent.send_packet(pack(MEMORY, 0, 2), memory)
        os.close(memory)
        lent.write(memory_frame(2, 1 << 30, b"large"))
        for number in range(50):
            assert select.select([reply.pipe.fd], [], [], DEADLINE)[0]
            assert os.read(reply.pipe.fd, 1 << 20)
            bus.publish(number, topic="other")
            assert channel.recv(DEADLINE) == number
            assert rss().rss - before < 64 << 20
        lent.close()
        reply.pipe.close()
        link.request("close", subscription=7)


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


@pytest.mark.parametrize("gone", [False, True], ids=["a living publisher", "a dead publisher"])
def test_publishers_have_turns(gone: bool, attacker: Attacker) -> None:
    """What one publisher has written for many subscriptions takes many rounds, and between them the others have their turn."""
    traffic = attacker.broker.traffic
    subscriptions = attacker.subscribe(range(1000, 1500), "turn*", policy="drop_newest")
    (one, one_pipe), (other, other_pipe) = attacker.publisher(), attacker.publisher()
    os.write(one_pipe, (frame_head(0, b"turn 1") + frame_head(0, b"turn 2")) * 100)
    if gone:
        complete(traffic.intake.finish(one))
    for _ in range(5):
        os.write(other_pipe, frame_head(0, b"turn 3"))
        for _ in range(3):
            with at_most(100_000):
                traffic.round()
        assert one.parked
        assert other.all_routed
    while one.parked:
        traffic.round()
    assert [one.backlog.published for one in subscriptions] == [205] * 500
    assert (one.id in traffic.publishers) != gone


@pytest.mark.parametrize("gone", [False, True], ids=["living publishers", "dead publishers"])
def test_many_publishers_of_very_short_messages(gone: bool, attacker: Attacker) -> None:
    """What many publishers have written at once, or left in their pipes, is read and routed in many rounds."""
    registry, traffic = attacker.broker.registry, attacker.broker.traffic
    traffic.routing.history = None
    other = registry.sessions[attacker.new_session()]
    subscription = subscribed(attacker.broker, 5000, other, ["a"], "drop_newest")
    pipes = [attacker.publisher()[1] for _ in range(12)]
    written = pipes * 6 if gone else [*pipes * 6, *pipes[:1] * 50]
    for pipe in written:
        os.write(pipe, (frame_head(0, b"a") + frame_head(0, b"b")) * 200)
    if gone:
        registry.end_session(attacker.session, clean=False)
    while registry.to_finish or not all(publisher.all_routed for publisher in traffic.publishers.values()):
        attacker.round(200_000)
    assert subscription.backlog.published == len(written) * 200


def test_a_long_batch_for_a_backlog_of_one_message(attacker: Attacker) -> None:
    """Each time that there is room for a message, some of them are packed, not all; and none is lost."""
    registry, routing = attacker.broker.registry, attacker.broker.traffic.routing
    routing.history = None
    subscription = registry.add_subscription(5000, attacker.session, 1, "block", Cost())
    registry.route(subscription, ["a"])
    backlog, publisher = subscription.backlog, attacker.publisher()[0]
    publisher.parked.append(Batch(frame_head(0, b"a") * 2000, array("I", [9] * 2000), b"a", 0, 9))
    with at_most(150_000):
        for number in range(2000):
            routing.begin_turn()
            assert routing.route(publisher) == (number == 1999)
            assert (backlog.waiting, backlog.published) == (1, number + 1)
            backlog.wrote(len(backlog.to_write()))
            backlog.pipe = 0
            routing.unblock(subscription)


@pytest.mark.parametrize("publisher_is", ["busy", "gone", "retired"])
def test_a_full_pipe_of_the_shortest_messages(publisher_is: str, attacker: Attacker) -> None:
    """It is read and routed in many rounds, whether its publisher goes on or not; nothing of it is lost."""
    registry, traffic = attacker.broker.registry, attacker.broker.traffic
    traffic.routing.history = None
    other = registry.sessions[attacker.new_session()]
    backlog = subscribed(attacker.broker, 5000, other, [""], "drop_newest").backlog
    publisher, pipe = attacker.publisher()
    os.set_blocking(pipe, False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += os.write(pipe, (frame_head(0, b"") + frame_head(0, b"", kind=IMAGE)) * 256) // 8
    routed: list[int] = []
    publisher.after_written(lambda: routed.append(backlog.published))
    if publisher_is == "busy":
        traffic.intake.nap(publisher)
    elif publisher_is == "gone":
        registry.end_session(attacker.session, clean=False)
    else:
        assert attacker.ask({"do": "retire", "publisher": publisher.id, "session": attacker.number}, 170_000) == {}
    while registry.to_finish or not publisher.all_routed:
        attacker.round(170_000)
    assert (backlog.published, routed, publisher.is_closed) == (written, [written], publisher_is != "busy")
    assert written > 20_000


def test_the_memory_of_blocked_publishers_is_counted_in_parts(attacker: Attacker) -> None:
    """Statistics hold nothing up, though publishers are blocked that have very many messages here."""
    blocked = [attacker.publisher()[0] for _ in range(8)]
    for publisher in blocked:
        publisher.parked.extend([batch("")] * 10_000)
    parts = memory(attacker.broker)
    for _ in range(2):
        with at_most(350_000):
            next(parts)
    assert complete(parts) >= 80_000 * batch("").charge
    for publisher in blocked:
        publisher.parked.clear()


def test_a_broker_that_ends_closes_many_channels_in_parts(attacker: Attacker) -> None:
    """When the time is over, no round closes thousands of channels that were not read."""
    attacker.subscribe(range(5000, 7000), "all")
    _, fd = attacker.publisher()
    os.write(fd, frame_head(0, b"all"))
    attacker.broker.round(at_once=True)
    os.close(fd)
    attacker.pipes.remove(fd)
    attacker.broker.stop(0)
    while not attacker.broker.is_finished:
        attacker.round(60_000)
