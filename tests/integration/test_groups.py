"""Groups: each message goes to one member, which has at most ``prefetch`` that are not finished. Real brokers and pipes."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import (
    Broadcaster,
    BrokerLost,
    Channel,
    GroupStats,
    Lagged,
    Overflowed,
    Selector,
    TimedOut,
    start_broadcaster,
)
from mpbroadcast.validation import POLICIES, Policy
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    Pipe,
    answer,
    calls_that_receive,
    fill,
    finish,
    readable,
    receive_all,
    rest,
    take,
    wait_until,
)
from tests.support.large_workers import Size
from tests.support.workers import CannotBeUnpickled

Bus = Broadcaster[Any]
CALLS = ["recv", "recv_many", "next", "for", "async for", "selector", "arecv", "arecv_many"]


def opened(bus: Bus, count: int = 1, prefetch: int = 1, **options: Any) -> list[Channel[Any]]:
    """Return members of the group "g" for all topics, with their channels open."""
    members = [bus.subscribe(group="g", prefetch=prefetch, **options) for _ in range(count)]
    for member in members:
        member.fileno()
    return members


def publish(bus: Bus, messages: Any) -> None:
    """Publish these, and wait until all are routed."""
    bus.publish_many(messages, timeout=DEADLINE)
    bus.flush(DEADLINE)


def group(bus: Bus) -> GroupStats:
    """Return the figures of the group "g", whose sum is what was published to it."""
    found = bus.stats()
    figures = found.groups["g"]
    if len(found.subscribers) == figures.members:  # else others get messages, too
        assert figures.delivered + figures.waiting + figures.dropped == found.published
    assert all(row.waiting == 0 and row.delivered == row.published for row in found.subscribers if row.overflow == "block")
    return figures


def delivered(bus: Bus) -> list[int]:
    """Return how many messages each member has been given so far, in the order in which they have joined."""
    return [row.delivered for row in bus.stats().subscribers]


def test_each_message_goes_to_one_and_to_all_outside(bus: Bus) -> None:
    """Each message goes to one member, in order for each, and to every other channel; another group gets each once, too."""
    members, outside = opened(bus, 3, prefetch=20), bus.subscribe()
    other = bus.subscribe(group="h", prefetch=100)
    other.fileno()
    publish(bus, range(50))
    wait_until(lambda: bus.stats().groups["g"].waiting == 0)
    got = [member.recv_many() for member in members]
    assert sorted(chain(*got)) == [*range(50)]
    assert got == [sorted(one) for one in got]
    assert {len(one) for one in got} <= {16, 17}
    assert take(outside, 50) == take(other, 50) == [*range(50)]
    assert bus.stats().groups == {"g": GroupStats(3, 0, 50, 0, 0), "h": GroupStats(1, 0, 50, 0, 0)}


@pytest.mark.parametrize("call", CALLS)
def test_a_message_is_finished_when_the_next_is_asked_for(bus: Bus, call: str) -> None:
    """A member has one message at a time until it asks for the next one, by whichever call receives."""
    (member,) = opened(bus)
    publish(bus, range(3))
    in_tasks: dict[str, Callable[[], list[Any]]] = {
        "arecv": lambda: [asyncio.run(member.arecv(DEADLINE))],
        "arecv_many": lambda: asyncio.run(member.arecv_many(2, DEADLINE)),
    }
    receive = (calls_that_receive(member) | in_tasks)[call]
    for number in range(3):
        assert receive() == [number]
        for _ in range(3):  # the broker has had its turn, and gives nothing more
            assert group(bus) == GroupStats(1, 2 - number, 1 + number, 0, 0)
    with pytest.raises(TimedOut):
        member.recv(0)


@pytest.mark.parametrize("ask", ["poll", "fileno"])
def test_to_wait_is_to_ask(bus: Bus, ask: str) -> None:
    """``poll`` and ``fileno`` finish the message that was handed out, as a call that receives does."""
    (member,) = opened(bus)
    publish(bus, range(2))
    assert member.recv(DEADLINE) == 0
    calls: dict[str, Callable[[], Any]] = {"poll": lambda: member.poll(DEADLINE), "fileno": member.fileno}
    assert calls[ask]()
    wait_until(lambda: delivered(bus) == [2])
    assert member.recv(DEADLINE) == 1


def test_a_selector_asks_for_all_its_channels(bus: Bus) -> None:
    """The next call of ``receive`` finishes a member's message, also if it then gives what another source has."""
    member, other = bus.subscribe("jobs", group="g"), bus.subscribe("other")
    selector: Selector[Any] = Selector().select(member).select(other)
    for message in ("job", "next job"):
        bus.publish(message, topic="jobs")
        bus.publish(f"with the {message}", topic="other")
    bus.flush(DEADLINE, delivered=False)
    wait_until(lambda: readable(member) and readable(other))
    assert selector.receive(DEADLINE) == "job"
    assert bus.stats().groups["g"].waiting == 1
    assert selector.receive(DEADLINE) == "with the job"
    wait_until(lambda: bus.stats().groups["g"].waiting == 0)
    assert {selector.receive(DEADLINE), selector.receive(DEADLINE)} == {"next job", "with the next job"}


def test_recv_many_gives_at_most_prefetch(bus: Bus) -> None:
    """All that ``recv_many`` gives counts until the next call, also what cannot be unpickled."""
    (member,) = opened(bus, prefetch=4)
    publish(bus, [0, 1, CannotBeUnpickled(), 3, 4, 5, 6, 7])
    wait_until(lambda: delivered(bus) == [4])
    assert member.recv_many() == [0, 1]
    assert group(bus).delivered == 4
    with pytest.raises(Exception, match="cannot be unpickled"):
        member.recv(DEADLINE)
    wait_until(lambda: delivered(bus) == [6])
    assert take(member, 5) == [3, 4, 5, 6, 7]


def test_what_is_given_does_not_count_against_the_capacity(bus: Bus) -> None:
    (member,) = opened(bus, prefetch=32, capacity=3000, overflow="drop_newest")
    for _ in range(32):
        publish(bus, [bytes(1000)])  # one at a time: what the broker reads at once is in the backlog first
    assert bus.stats().groups["g"] == GroupStats(members=1, waiting=0, delivered=32, lost=0, dropped=0)
    assert take(member, 32) == [bytes(1000)] * 32


def test_nothing_waits_behind_a_member_at_work(bus: Bus) -> None:
    """With ``prefetch=1``, all goes to those that ask; with more, to the one that has the least."""
    busy, *idle = opened(bus, 3)
    publish(bus, range(3))
    assert take(busy, 1) == [0]
    got = [idle[0].recv(DEADLINE), idle[1].recv(DEADLINE)]
    for number in range(3, 40):
        bus.publish(number)
        got.append(idle[number % 2].recv(DEADLINE))
    assert sorted(got) == [*range(1, 40)]
    assert delivered(bus)[0] == 1
    (eager,) = opened(bus, prefetch=30)
    publish(bus, range(10))
    wait_until(lambda: delivered(bus)[3] == 10)  # each of the others has one that is not finished
    assert take(eager, 10) == [*range(10)]


def test_close_is_no_question(bus: Bus) -> None:
    """A member that is closed with a message in work gets no other one. What it was not handed is lost, and nothing else."""
    one, other = opened(bus, 2, prefetch=3)
    publish(bus, range(9))
    wait_until(lambda: delivered(bus) == [3, 3])
    assert one.recv(DEADLINE) == 0
    one.close()
    assert group(bus) == GroupStats(1, 3, 6, 2, 0)
    assert take(other, 6) == [1, 3, 5, 6, 7, 8]
    other.close()
    assert bus.stats().groups == {}


def test_an_unsubscribed_member_keeps_what_it_has(bus: Bus) -> None:
    """It receives what is in its pipe, the last one also what waits; then each has its end."""
    one, other = opened(bus, 2, prefetch=2)
    publish(bus, range(8))
    wait_until(lambda: delivered(bus) == [2, 2])
    bus.unsubscribe(one)
    assert group(bus) == GroupStats(1, 4, 4, 0, 0)
    assert rest(one) == [0, 2]
    bus.unsubscribe(other)
    assert bus.stats().groups == {}
    bus.publish(8)  # which nothing gets
    assert rest(other) == [1, 3, 4, 5, 6, 7]


def test_the_end_of_an_unopened_last_member(bus: Bus) -> None:
    """What waits is for the process that opens it. A group without members keeps nothing."""
    member = bus.subscribe(group="g")
    publish(bus, range(3))
    assert group(bus) == GroupStats(1, 3, 0, 0, 0)
    bus.unsubscribe(member)
    assert rest(member) == [0, 1, 2]
    publish(bus, range(3))
    (member,) = opened(bus)
    assert group_published(bus) == 0
    member.close()
    assert bus.stats().groups == {}


def group_published(bus: Bus) -> int:
    figures = bus.stats().groups["g"]
    return figures.delivered + figures.waiting + figures.dropped


def test_the_last_member_drops_what_waits(bus: Bus) -> None:
    """When the last member is closed, what waits is dropped, and a publish that waits goes on."""
    (member,) = opened(bus, capacity=2000)
    blocked = Background(bus.publish_many, [bytes(100)] * 20, timeout=DEADLINE)
    wait_until(lambda: any(row.stalls for row in bus.stats().subscribers))
    member.close()
    assert blocked.result() == 20
    (member,) = opened(bus)
    bus.publish("new")
    assert member.recv(DEADLINE) == "new"


def test_a_member_that_is_not_open_takes_nothing(bus: Bus, children: Children, context: BaseContext, pipe: Pipe) -> None:
    """What comes waits for the members that are open; handed on, it takes its part in the process that opens it."""
    ours, theirs = pipe
    handed, (member,) = bus.subscribe(group="g"), opened(bus)
    bus.wait_for_subscribers(2, timeout=DEADLINE)
    bus.wait_for_subscribers(2, topic="any", timeout=DEADLINE)
    publish(bus, range(3))
    assert take(member, 3) == [0, 1, 2]
    worker = children(context, receive_one_by_one, handed, theirs)
    publish(bus, [3])
    assert answer(ours) == 3
    ours.send(None)
    finish(worker)
    wait_until(lambda: group(bus).lost == 0 and group(bus).members == 1)


def receive_one_by_one(channel: Channel[Any], orders: Connection) -> None:
    """Send home each message, and ask for the next one on an order; close at ``None``."""
    while True:
        orders.send(channel.recv(DEADLINE))
        if answer(orders, 3 * DEADLINE) is None:
            channel.close()
            return


@pytest.mark.parametrize("options", [{"topics": ("a", "c")}, {"overflow": "latest"}, {"capacity": 5}])
def test_members_agree(bus: Bus, options: dict[str, Any]) -> None:
    """A member with other topics, another policy or another capacity is refused, and so are changes of a member's topics."""
    wanted: dict[str, Any] = {"overflow": "block", "capacity": 1000}
    channel = bus.subscribe("a", "b", group="g", **wanted)
    other: dict[str, Any] = {"topics": ("b", "a")} | wanted | options
    with pytest.raises(ValueError, match=f"with other {next(iter(options))}"):
        bus.subscribe(*other.pop("topics"), group="g", **other)
    bus.subscribe("b", "a", group="g", prefetch=5, **wanted).close()
    for call in (channel.subscribe, channel.unsubscribe):
        with pytest.raises(ValueError, match="a member of the group 'g'"):
            call("a")
    assert group(bus).members == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_a_prefetch_is_a_number(bus: Bus, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="prefetch"):
        bus.subscribe(group="g", prefetch=value)


@pytest.mark.parametrize("value", ["", 5, b"g", "\0", "x" * 1025])
def test_a_group_is_a_name(bus: Bus, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        bus.subscribe(group=value)


def lagged(channel: Channel[Any]) -> int:
    with pytest.raises(Lagged) as caught:
        channel.recv(DEADLINE)
    assert caught.value.missed is not None
    return caught.value.missed


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_what_is_dropped_is_reported_once(bus: Bus, policy: Policy) -> None:
    """The member that gets the next message gets ``Lagged`` in front of it, and no other one does."""
    one, other = opened(bus, 2, capacity=2000, overflow=policy)
    publish(bus, range(2))
    publish(bus, range(2, 102))
    figures = group(bus)
    assert figures.dropped == 100 - figures.waiting
    assert take(one, 1) == [0]
    if policy == "drop_oldest":
        assert lagged(one) == figures.dropped == one.missed
        assert take(one, 1) == [102 - figures.waiting]
    else:
        assert take(one, figures.waiting) == [*range(2, 2 + figures.waiting)]
        bus.publish(102)
        assert lagged(one) == figures.dropped
        assert take(one, 1) == [102]
    assert take(other, 1) == [1]
    assert other.missed == 0
    assert group(bus).lost == 0


def test_the_latest_goes_to_the_next_that_asks(bus: Bus) -> None:
    """Under ``latest`` only the newest message waits, and what was skipped counts for the member that gets it."""
    one, other = opened(bus, 2, overflow="latest")
    publish(bus, [0])
    publish(bus, [1])
    publish(bus, range(2, 50))
    assert take(one, 2) == [0, 49]
    assert (one.missed, other.missed) == (47, 0)
    assert take(other, 1) == [1]
    assert group(bus) == GroupStats(2, 0, 3, 0, 47)


def test_an_overflow_ends_the_group(bus: Bus) -> None:
    """Under ``disconnect`` members receive what was kept; then each gets ``Overflowed`` and its end. A new group can begin."""
    members = opened(bus, 2, capacity=2000, overflow="disconnect")
    unopened = bus.subscribe(group="g", capacity=2000, overflow="disconnect")
    publish(bus, range(2))
    publish(bus, range(2, 102))
    assert bus.stats().groups == {}
    (new,) = opened(bus)
    got, errors = [], []
    for member in (*members, unopened):
        kept, error = receive_all(member)
        got += kept
        errors.append(type(error))
        assert isinstance(error, Overflowed)
        with pytest.raises(EOFError):
            member.recv(DEADLINE)
    assert sorted(got) == [*range(len(got))]
    assert 5 < len(got) < 20
    bus.publish("new")
    assert new.recv(DEADLINE) == "new"


def test_a_full_group_blocks_its_publishers(bus: Bus) -> None:
    """Publishers wait for the group's backlog; what a member has been given does not count in it."""
    (member,) = opened(bus, capacity=2000)
    sent = fill(bus)
    assert [number for number, _ in take(member, len(sent))] == sent
    bus.publish("done", timeout=DEADLINE)
    assert member.recv(DEADLINE) == "done"
    assert group(bus).dropped == 0


def test_flush_waits_for_the_backlog_of_a_group(bus: Bus) -> None:
    """With ``delivered`` it waits until all is in members' pipes; a group of which no member is open delays it."""
    (member,) = opened(bus)
    publish(bus, range(2))
    with pytest.raises(TimedOut):
        bus.flush(0, delivered=True)
    waiting = Background(bus.flush, DEADLINE, delivered=True)
    assert take(member, 1) == [0]
    assert waiting.is_alive()
    assert take(member, 1) == [1]
    waiting.result()
    assert group(bus).waiting == 0


def test_to_exclude_a_member_is_to_exclude_its_group(bus: Bus) -> None:
    one, other = opened(bus, 2)
    outside = bus.subscribe()
    bus.publish("not for the group", exclude=other)
    bus.publish("for all", exclude=outside)
    bus.flush(DEADLINE)
    assert bus.stats().groups["g"].delivered == 1
    assert one.recv(DEADLINE) == "for all"
    assert outside.recv(DEADLINE) == "not for the group"


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_is_that_of_the_first_member(policy: Policy) -> None:
    """A group starts with the last messages that its first member asks for; a later member's replay has no effect."""
    with start_broadcaster(history=10) as bus:
        publish(bus, range(8))
        one = bus.subscribe(group="g", replay=5, overflow=policy)
        other = bus.subscribe(group="g", replay=8, overflow=policy)
        publish(bus, [8, 9])
        got: list[int] = []

        def receive() -> bool:
            for member in (one, other):
                with contextlib.suppress(TimedOut, Lagged):
                    got.extend(member.recv_many(timeout=0))
            return 9 in got

        wait_until(receive)
        assert sorted(got) == [*range(9 if policy == "latest" else 3, 10)]


def test_large_messages_of_a_group(bus: Bus, transport: Size) -> None:
    """Messages in a ring, and those in memory of their own, go to one member each, whole, and are freed."""
    members = opened(bus, 3, prefetch=2, with_id=True)
    sent = [transport.message(number) for number in range(12)]
    bus.publish_many(sent, timeout=DEADLINE)
    bus.unsubscribe(members[0])
    got = [*rest(members[0])]
    bus.flush(DEADLINE)
    for member in members[1:]:
        bus.unsubscribe(member)
        got += rest(member)
    got.sort()
    assert [received.message for received in got] == sent
    assert len({received.id for received in got}) == 12
    wait_until(lambda: bus.stats().memory < 100_000)


def test_close_delivers_what_waits(children: Children, fork: BaseContext, pipe: Pipe) -> None:
    """``close`` of the broadcaster waits until the members have taken all, one by one, and then each has its end."""
    ours, theirs = pipe
    with start_broadcaster() as bus:
        workers = [children(fork, work_to_the_end, bus, theirs) for _ in range(3)]
        bus.wait_for_subscribers(3, timeout=DEADLINE)
        unopened = bus.subscribe("jobs", group="g")
        bus.publish_many(range(30), topic="jobs")
        begin = time.monotonic()
        bus.unsubscribe(unopened)
    assert time.monotonic() - begin < DEADLINE
    got = [answer(ours) for _ in workers]
    for worker in workers:
        finish(worker)
    assert sorted(chain(*got)) == [*range(30)]
    assert all(got)


def work_to_the_end(bus: Bus, orders: Connection) -> None:
    channel: Channel[Any] = bus.subscribe("jobs", group="g")
    got = []
    for message in channel:
        got.append(message)
        time.sleep(0.002)
    orders.send(got)


def test_what_is_not_taken_in_time_has_no_clean_end() -> None:
    """A member of the closing process that does not ask holds nothing up, and gets no clean end while something waits."""
    bus = start_broadcaster()
    (member,) = opened(bus)
    publish(bus, range(3))
    bus.close(timeout=DEADLINE)
    got, error = receive_all(member)
    assert got == [0]
    assert isinstance(error, BrokerLost)
    member.close()


def test_a_hundred_members(bus: Bus) -> None:
    """A hundred members get each message once, and as many as each other when they take as many."""
    members = opened(bus, 100)
    got: Counter[int] = Counter()
    for first in range(0, 300, 100):
        publish(bus, range(first, first + 100))
        got.update(member.recv(DEADLINE) for member in members)
    assert got == Counter(range(300))
    assert {*delivered(bus)} == {3}
