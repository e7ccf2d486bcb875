"""What a message costs in the broker: Python calls, from its publisher's pipe to a channel's."""

import contextlib
import math
import os
import re
import sys
import time
from array import array
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import pytest

from mpbroadcast.broker.core import pace
from mpbroadcast.broker.core.history import History
from mpbroadcast.broker.core.states import PublisherState
from mpbroadcast.broker.members import Subscription
from mpbroadcast.broker.server import Broker
from mpbroadcast.client.pipe_reader import Stream, decode
from mpbroadcast.client.received import WITH_ID, Received
from mpbroadcast.posix.fd_socket import DescriptorSocket
from mpbroadcast.posix.pipes import unread
from mpbroadcast.posix.shared_memory import available, message_memory
from mpbroadcast.protocol.fd_packets import MEMORY, pack
from mpbroadcast.protocol.frames import Batch, frame_head, memory_frame
from mpbroadcast.protocol.runs import read_run, run_of
from tests.support.own_broker import asking, own_broker, subscribed

__all__ = ["own_broker"]

MOST = 30
MOST_ALONE = 15
MOST_CHANGING = 40
SIZE = 100_000  # bytes of a long message


class Pipes(NamedTuple):
    """A broker in this process, and the outer ends of a publisher's pipe and a channel's."""

    broker: Broker
    subscription: Subscription
    write_end: int
    read_end: int

    def publish(self, payload: bytes, count: int = 1) -> None:
        os.write(self.write_end, count * (frame_head(len(payload), b"topic") + payload))


@pytest.fixture(params=["block"])
def pipes(request: pytest.FixtureRequest, own_broker: Broker) -> Iterator[Pipes]:
    """One publisher and one channel, of a policy."""
    own_broker.traffic.routing.history = None
    with asking(own_broker) as (_, _, number):
        session = own_broker.registry.sessions[number]
        _, write_end = own_broker.traffic.intake.add(own_broker.registry.new_id(), session)
        subscription = subscribed(own_broker, own_broker.registry.new_id(), session, ["*"], request.param)
        read_end = subscription.pipe.begin_opening(subscription.backlog)
        os.set_blocking(read_end, False)
        subscription.pipe.open()
        own_broker.traffic.watch(subscription)
        own_broker.traffic.run_until_idle()
        yield Pipes(own_broker, subscription, write_end, read_end)
        os.close(write_end)
        os.close(read_end)


@pytest.mark.parametrize(("count", "most"), [(1, MOST_ALONE), (2, MOST)])
def test_small_messages_take_few_calls(pipes: Pipes, count: int, most: int) -> None:
    """From one pipe into the other, one that comes alone takes at most :data:`MOST_ALONE` Python calls, two :data:`MOST`."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    for number in (1, 2):  # the first fills the router's cache
        pipes.publish(b"payload %d" % number, count)
        sys.setprofile(note if number == 2 else None)
        pipes.broker.round()
        sys.setprofile(None)
        assert os.read(pipes.read_end, 1 << 16).count(b"payload %d" % number) == count
    print(len(calls), *calls, sep="\n")
    assert 5 < len(calls) <= most


def test_messages_of_changing_topics_take_few_calls(pipes: Pipes) -> None:
    """Those that are read together take no more Python calls than two of one topic, however many they are."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    data = b"".join(frame_head(1, b"t%d" % number) + b"x" for number in range(200))
    for is_first in (True, False):
        os.write(pipes.write_end, data)
        sys.setprofile(None if is_first else note)
        pipes.broker.round()
        sys.setprofile(None)
        # With its topic: the bytes of an id may be any others.
        assert re.findall(rb"t(\d+)x\n", os.read(pipes.read_end, 1 << 16)) == [b"%d" % number for number in range(200)]
    print(len(calls), *calls, sep="\n")
    assert 5 < len(calls) <= MOST_CHANGING


class Reader:
    """A channel of a broker in this process."""

    def __init__(self, pipes: Pipes, *topics: str) -> None:
        broker, subscription = pipes.broker, pipes.subscription
        self.own = subscribed(broker, broker.registry.new_id(), subscription.session, [*topics], subscription.policy)
        self.fd = self.own.pipe.begin_opening(self.own.backlog)
        os.set_blocking(self.fd, False)
        self.own.pipe.open()
        broker.traffic.watch(self.own)
        self.stream = Stream()

    def received(self, first: int) -> list[tuple[Any, ...]]:
        """What has come: topic and position of each message, and what is missing."""
        items: list[Any] = []
        with contextlib.suppress(BlockingIOError):
            self.stream.chunks.append(os.read(self.fd, 1 << 20))
            while (after := decode(self.stream, WITH_ID)) is not None:
                items += after.ready
                after.ready.clear()
                self.stream = after
        return [
            (one.topic, one.id - first) if isinstance(one, Received) else (repr(getattr(one, "error", one)),) for one in items
        ]


def of_changing_topics(pipes: Pipes, count: int, others: dict[int, bytes]) -> list[list[Any]]:
    """Publish so many messages at once, three times, with other frames among them. Return what two channels get each time."""
    traffic = pipes.broker.traffic
    traffic.drop(pipes.subscription)
    readers = [Reader(pipes, "*"), Reader(pipes, "a*", "t1?")]
    publishers = traffic.publishers.values()
    found = []
    for _ in range(3):
        first = traffic.routing.next_id
        frames = [others.get(index, frame_head(2, b"at"[index % 2 :][:1] + b"%d" % index) + b"N.") for index in range(count)]
        for start in range(0, count, 50):
            os.write(pipes.write_end, b"".join(frames[start : start + 50]))
        got: list[list[Any]] = [[], []]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            pipes.broker.round(at_once=True)
            for own, reader in zip(got, readers, strict=True):
                assert reader.own.backlog.charge <= reader.own.backlog.capacity
                own.extend(reader.received(first))
            waits = any(publisher.parked for publisher in publishers) or any(reader.own.backlog.runs for reader in readers)
            if not waits and not traffic.is_behind and not any(unread(reader.fd) for reader in readers):
                break
        found += got
    for reader in readers:
        traffic.drop(reader.own)
        os.close(reader.fd)
    return found


@pytest.mark.parametrize("pipes", ["block", "drop_oldest", "drop_newest", "disconnect", "latest"], indirect=True)
@pytest.mark.parametrize("count", [100, 900])
def test_messages_of_changing_topics_differ_in_nothing_from_others(pipes: Pipes, count: int) -> None:
    """Also where not all fit: each channel gets the same, of each policy, as with a history, where they go one by one."""
    others = {3: frame_head(2, b"a\xff") + b"N.", 50: frame_head(2, b"a1", 1 << 40) + b"N.", 60: frame_head(0, b"a1")}
    routing = pipes.broker.traffic.routing
    together = of_changing_topics(pipes, count, others)
    routing.history = History(1)
    assert of_changing_topics(pipes, count, others) == together
    assert len(together[0]) > (0 if pipes.subscription.policy == "latest" else 90)


@pytest.mark.parametrize(("name", "value"), [("routing.TURN", 5), ("core.router.PART", 0)])
def test_messages_of_changing_topics_come_in_order_in_any_number_of_turns(
    pipes: Pipes, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a round has time for few, or for no part of looking a topic up."""
    together = of_changing_topics(pipes, 300, {})
    pipes.broker.router.found.clear()
    monkeypatch.setattr(f"mpbroadcast.broker.{name}", value)
    assert of_changing_topics(pipes, 300, {}) == together
    assert [position for _, position in together[0]] == [*range(300)]


def test_messages_of_changing_topics_take_a_turn_at_a_time(pipes: Pipes) -> None:
    """Also where each has other targets, of which there are many: sorting them takes its time, too."""
    broker, session = pipes.broker, pipes.subscription.session
    count, targets = 1500, 400
    own = [subscribed(broker, broker.registry.new_id(), session, ["*"], "drop_newest") for _ in range(targets)]
    for number in range(count):
        broker.router.found[b"%d" % number] = (*own[: number % targets], *own[number % targets + 1 :])
    frames = [frame_head(1, b"%d" % number) + b"x" for number in range(count)]
    for start in range(0, count, 200):
        os.write(pipes.write_end, b"".join(frames[start : start + 200]))
    broker.round(at_once=True)
    routed = broker.traffic.routing.routed
    while broker.traffic.is_behind:
        broker.round(at_once=True)
    assert 0 < routed < count / 2
    assert broker.traffic.routing.routed == count
    assert all(one.backlog.published == count - len(range(index, count, targets)) for index, one in enumerate(own))
    for one in own:
        broker.traffic.drop(one)


def test_messages_of_changing_topics_pass_none_that_waits(pipes: Pipes) -> None:
    """A channel that begins behind them gets only those that it had before, and a publisher that waits is first."""
    publisher = [*pipes.broker.traffic.publishers.values()][-1]
    own = pipes.subscription
    frames = b"".join(frame_head(1, b"t%d" % number) + b"x" for number in range(5))
    publisher.not_yet.append((own, frozenset({"t3"}), ()))
    os.write(pipes.write_end, frames)
    pipes.broker.round()
    assert re.findall(rb"t\d", os.read(pipes.read_end, 1 << 16)) == [b"t3"]
    publisher.not_yet.clear()
    own.waiters.append(publisher)
    routed = pipes.broker.traffic.routing.routed
    os.write(pipes.write_end, frames)
    pipes.broker.traffic.intake.wait(at_once=True)
    assert not pipes.broker.traffic.routing.route(publisher)
    assert (publisher.blocked, pipes.broker.traffic.routing.routed) == (own, routed)
    own.waiters.popleft()
    pipes.broker.traffic.routing.unblock(own)
    pipes.broker.round(at_once=True)
    assert re.findall(rb"t\d", os.read(pipes.read_end, 1 << 16)) == [b"t0", b"t1", b"t2", b"t3", b"t4"]


@pytest.mark.parametrize("pipes", ["block", "drop_newest", "disconnect"], indirect=True)
def test_messages_that_come_alone_wait_as_others_do(pipes: Pipes) -> None:
    """What the pipe does not take waits in the backlog, what comes then waits behind it, and all of it is in the history."""
    broker, backlog = pipes.broker, pipes.subscription.backlog
    broker.traffic.routing.history = History(10)
    backlog.capacity = 1 << 30
    received = b""
    for number in range(6000):
        pipes.publish(b"%06d" % number + bytes(100))
        broker.round()
        if number % 3000 == 2999:
            assert backlog.waiting > 100
            with contextlib.suppress(BlockingIOError):
                while True:
                    received += os.read(pipes.read_end, 1 << 16)
                    broker.round(at_once=True)
    assert [int(found) for found in re.findall(rb"topic(\d{6})", received)] == [*range(6000)]
    assert (backlog.published, backlog.delivered, backlog.missed, backlog.waiting) == (6000, 6000, 0, 0)
    routing = broker.traffic.routing
    assert routing.routed == 6000
    positions: list[int] = []
    while run := read_run(received, 0):
        positions += range(run.position, run.position + run.messages)
        received = received[run.size :]
    assert positions == [*range(routing.first_id, routing.next_id)]
    kept = [*broker.traffic.routing.history.last([b"topic"], 5)]
    assert [position - routing.first_id for position, _ in kept] == [5999, 5998, 5997, 5996, 5995]
    assert [int(batch.frames[13:19]) for _, batch in kept if isinstance(batch, Batch)] == [5999, 5998, 5997, 5996, 5995]


def test_a_message_that_comes_alone_passes_none_that_waits(pipes: Pipes) -> None:
    """One that waits for something else than room, as its reader's packet, is before it."""
    payload, head = b"payload 1", frame_head(9, b"topic")
    for number in (1, 2):  # the first fills the router's cache
        pipes.publish(payload)
        pipes.broker.round()
        if number == 1:
            waiting = Batch(head + b"waiting 1", array("I", (len(head) + 9,)), b"topic", 0, len(head))
            pipes.subscription.backlog.put(run_of(waiting, 0))
    assert re.findall(rb"topic(\w+ 1)", os.read(pipes.read_end, 1 << 16)) == [payload, b"waiting 1", payload]


def test_a_round_passes_on_no_more_than_it_has_time_for(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the messages of many publishers it writes so many at once, and routes so many others; the next round has the rest."""
    for limit in ("intake.MOST_WRITES", "fast_path.MOST_WRITES", "routing.TURN"):
        monkeypatch.setattr(f"mpbroadcast.broker.{limit}", 5)
    broker, traffic = pipes.broker, pipes.broker.traffic
    pipes.publish(b"")  # which fills the router's cache
    broker.round()
    for _ in range(30):
        write_end = traffic.intake.add(broker.registry.new_id(), pipes.subscription.session)[1]
        pipes._replace(write_end=write_end).publish(b"")
        os.close(write_end)
    broker.round()
    assert traffic.routing.routed <= 1 + 2 * 5
    while traffic.routing.routed < 31:
        broker.round(at_once=True)


@pytest.mark.parametrize("count", [1, 2])
def test_a_message_that_cannot_be_routed_costs_its_publisher(
    pipes: Pipes, count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not the broker, whether it comes alone or in company."""
    traffic = pipes.broker.traffic
    publisher = [*traffic.publishers.values()][-1]
    pipes.publish(b"routed")  # which fills the router's cache
    traffic.round()
    traffic.routing.history = history = History(10)
    monkeypatch.setattr(history, "add", None)
    assert not publisher.is_closed
    pipes.publish(b"payload", count)
    traffic.round()
    assert publisher.is_closed
    caplog.clear()  # what is logged has the message in its traceback


def test_a_subscription_that_is_removed_while_its_own_message_is_routed(pipes: Pipes) -> None:
    """A reader that is gone is found while its message is written: it is on the round's list, and nothing else is touched."""
    traffic = pipes.broker.traffic
    pipes.publish(b"one")
    with open(os.devnull) as null:
        os.dup2(null.fileno(), pipes.read_end)  # which closes it
    traffic.round()
    assert list(traffic.departed.items()) == [(pipes.subscription, True)]
    assert pipes.broker.router.targets(b"topic") == ()
    pipes.publish(b"two")
    traffic.round()
    assert (traffic.routing.routed, pipes.subscription.backlog.published) == (2, 1)


@pytest.mark.parametrize("pipes", ["disconnect"], indirect=True)
def test_a_subscription_that_ends_itself_while_its_own_message_is_routed(pipes: Pipes) -> None:
    """A backlog that overflows under ``disconnect`` is routed nothing more, not even of the same round."""
    pipes.subscription.backlog.capacity = 100
    for _ in range(3):
        pipes.publish(bytes(80))
    pipes.publish(b"behind")
    pipes.broker.traffic.round()
    assert pipes.broker.traffic.overflowed == [pipes.subscription]
    assert not pipes.subscription.is_live
    assert pipes.broker.router.targets(b"topic") == ()
    assert b"behind" not in os.read(pipes.read_end, 1 << 16)


@pytest.mark.skipif(not available(), reason="there is no memory to share here")
def test_a_long_message_that_comes_alone_begins_no_nap(pipes: Pipes) -> None:
    """Two at once are a stream, whose pipe is read after naps."""
    traffic = pipes.broker.traffic
    publisher = [*traffic.publishers.values()][-1]
    traffic.drop(pipes.subscription)  # what its backlog takes does not matter here
    with contextlib.closing(DescriptorSocket(traffic.memory.add(publisher))) as fd_socket:
        for ids, state in (((1,), PublisherState.READING), ((2, 3), PublisherState.NAPPING)):
            for id in ids:
                memory = message_memory([bytes(SIZE)])
                fd_socket.send_packet(pack(MEMORY, 0, id), memory.fd)
                memory.close()
            os.write(pipes.write_end, b"".join(memory_frame(id, SIZE, b"topic") for id in ids))
            pipes.broker.round()
            assert publisher.state is state


def test_messages_that_come_one_by_one_and_fast_begin_a_nap(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty pipe does not end it: the publisher may be waiting for a CPU."""
    monkeypatch.setattr(pace, "SPAN", math.inf)
    monkeypatch.setattr(pace, "HOLD", math.inf)
    publisher = [*pipes.broker.traffic.publishers.values()][-1]
    for _ in range(pace.MANY):
        assert publisher.state is PublisherState.READING
        pipes.publish(b"payload")
        pipes.broker.round()
    for _ in range(3):
        assert publisher.state is PublisherState.NAPPING
        pipes.broker.round()
    publisher.pace = pace.Pace()  # as after the hold
    pipes.broker.round()
    assert publisher.state is PublisherState.READING
