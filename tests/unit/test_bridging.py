"""Positions of messages that go out over a bridge, and of those that come in, against simple models. No pipe, no process."""

from array import array
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mpbroadcast.broker.core import bridging
from mpbroadcast.broker.core.bridging import Arrivals, Inbound, Misannounced, Outbound, Topics
from mpbroadcast.broker.core.policies import new_backlog
from mpbroadcast.broker.core.router import Router
from mpbroadcast.broker.routing import TURN
from mpbroadcast.broker.server import Broker
from mpbroadcast.protocol.frames import HEAD, OVERHEAD, Arrival, Batch, BridgeFrame, Cursor, FrameError, bridge_frame
from mpbroadcast.protocol.runs import END, Run, read_run, run_of
from mpbroadcast.protocol.splitter import Splitter
from tests.support.frames_made import batch_of
from tests.support.own_broker import asking, own_broker, subscribed

__all__ = ["own_broker"]

SIZE = 100  # bytes of a message, about
CHARGE = SIZE + OVERHEAD
CAPACITY = 10 * CHARGE
A, B = b"origin A", b"origin B"


def messages(first: int, count: int) -> Run:
    """Return a run of messages whose ids are their positions."""
    frame = HEAD.pack(SIZE, 0) + bytes(SIZE - HEAD.size)
    return run_of(Batch(frame * count, array("I", [SIZE] * count), b"", 0, HEAD.size), first)


def positions(run: Run) -> list[int]:
    """Return the positions of the messages in a run; none for a note."""
    found: list[int] = []
    start = 0
    while run.count and start < run.size:
        view = read_run(bytes(run.data), start)
        assert view is not None
        found += range(view.position, view.position + view.messages)
        start += view.size
    return found


class OutboxMachine(RuleBasedStateMachine):
    """Publish, give, acknowledge and begin another session in any order: each position is sent, dropped or waits."""

    @initialize(policy=st.sampled_from(["block", "drop_oldest", "drop_newest"]), capacity=st.sampled_from([1, 3, 10, 1000]))
    def begin(self, policy: str, capacity: int) -> None:
        self.backlog = new_backlog(capacity * CHARGE, policy)
        self.outbound = Outbound(self.backlog)
        self.seen: list[int] = []  # positions that the session at work was given
        self.next = 1  # the position that it expects
        self.dropped: set[int] = set()

    def receive(self, run: Run) -> None:
        found = positions(run)
        if run.is_gap:
            self.dropped.update(range(self.next, self.next + run.missed))
        else:
            assert found == [*range(self.next, self.next + run.count)]
            assert not self.dropped.intersection(found)
            self.seen += found
        self.next += run.count + run.missed

    @rule(count=st.integers(1, 15))
    def publish(self, count: int) -> None:
        run = messages(self.backlog.published + 1, count)
        if self.backlog.blocks:
            count = self.backlog.fitting(run)
            if not count:
                return
            run = run.part(0, count)
        self.backlog.put(run)

    @rule()
    def give(self) -> None:
        if (run := self.outbound.give()) is not None:
            self.receive(run)

    @rule(share=st.floats(0, 1.2))
    def acknowledge(self, share: float) -> None:
        position = self.outbound.acknowledged + int(share * (self.next - 1 - self.outbound.acknowledged))
        self.outbound.acknowledge(position)
        assert self.outbound.acknowledged == min(position, self.next - 1)

    @rule()
    def another_session(self) -> None:
        """The next session is given anew what is not acknowledged, and nothing else."""
        self.next = self.outbound.acknowledged + 1
        self.seen = [position for position in self.seen if position < self.next]
        for run in self.outbound.give_again():
            self.receive(run)
        assert self.next == self.outbound.given + 1

    @invariant()
    def counts_agree(self) -> None:
        outbound, backlog = self.outbound, self.backlog
        sent = [position for position in self.seen if position <= outbound.acknowledged]
        assert outbound.sent == len(sent)
        assert outbound.sent + outbound.waiting + backlog.missed == backlog.published == outbound.target
        unacknowledged = len(self.seen) - len(sent)
        assert outbound.waiting == backlog.waiting + unacknowledged
        assert backlog.referred >= unacknowledged * CHARGE
        assert outbound.acknowledged <= outbound.settled <= outbound.target
        if not outbound.waiting:
            assert outbound.waiting_charge == 0
        else:  # one more is taken when nothing else waits
            assert outbound.waiting_charge <= max(backlog.capacity, backlog.referred + CHARGE)

    def teardown(self) -> None:
        while (run := self.outbound.give()) is not None or self.outbound.has_unacknowledged:
            if run is not None:
                self.receive(run)
            self.outbound.acknowledge(self.next - 1)
        assert sorted({*self.seen} | self.dropped) == [*range(1, self.backlog.published + 1)]
        assert len(self.dropped) == self.backlog.missed
        assert (self.outbound.settled, self.backlog.referred) == (self.backlog.published, 0)


OutboxMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestOutbox = OutboxMachine.TestCase


@pytest.mark.parametrize(
    ("policy", "kept", "missed"),
    [("block", [*range(1, 11)], {}), ("drop_newest", [*range(1, 11)], {11: 10}), ("drop_oldest", [*range(11, 21)], {1: 10})],
)
def test_a_full_outbox_keeps_what_its_policy_does(policy: str, kept: list[int], missed: dict[int, int]) -> None:
    """Without a session, it has the capacity; what was dropped is reported where it is missing."""
    outbound = Outbound(new_backlog(CAPACITY, policy))
    for position in range(1, 21):
        run = messages(position, 1)
        if outbound.backlog.fitting(run) or not outbound.backlog.blocks:
            outbound.backlog.put(run)
    given: list[int] = []
    gaps: dict[int, int] = {}
    while (run_given := outbound.give()) is not None:
        if run_given.is_gap:
            gaps[outbound.given - run_given.missed + 1] = run_given.missed
        given += positions(run_given)
        outbound.acknowledge(outbound.given)
    assert (given, gaps) == (kept, missed)


def test_what_was_given_counts_and_is_not_dropped() -> None:
    """A session has half of the capacity at the most, so that the newest have room; what it has is never dropped."""
    outbound = Outbound(new_backlog(CAPACITY, "drop_oldest"))
    outbound.backlog.put(messages(1, 10))
    first = outbound.give()
    assert first is not None
    assert positions(first) == [1, 2, 3, 4, 5]
    assert outbound.give() is None
    outbound.backlog.put(messages(11, 20))
    outbound.acknowledge(3)
    assert [positions(run) for run in outbound.give_again()] == [[4, 5]]
    outbound.acknowledge(5)
    note, rest = outbound.give(), outbound.give()
    assert note is not None
    assert rest is not None
    assert (note.missed, positions(rest)) == (20, [26, 27, 28, 29, 30])
    assert [positions(run) for run in outbound.give_again()] == [[], [26, 27, 28, 29, 30]]


def test_the_end_comes_behind_all() -> None:
    outbound = Outbound(new_backlog(CAPACITY))
    outbound.backlog.put(messages(1, 1))
    outbound.backlog.end()
    given = [outbound.give(), outbound.give()]
    assert [run and read_run(bytes(run.data), 0) and run.count for run in given] == [1, 0]
    assert given[1] is not None
    assert (read_run(bytes(given[1].data), 0) or 0)[1] == END  # type: ignore[index]
    assert outbound.given == 1


def arrive(inbound: Inbound, origin: bytes, incarnation: int, first: int, count: int) -> tuple[list[int], bool, int]:
    """Take messages in. Return the positions that are routed, whether there is a gap before them, and how far is announced."""
    arrivals = Arrivals(inbound)
    gap, ahead, _ = arrivals.begin(origin, incarnation, first, count)
    had = arrivals.drop_had(count)
    arrivals.take(count - had)
    return [*range(first + had, first + count)], gap, ahead


@pytest.mark.parametrize(
    ("steps", "missed", "duplicates"),
    [
        ([(A, 1, 1, 3, [1, 2, 3], False), (A, 1, 4, 1, [4], False)], 0, 0),
        ([(A, 1, 100, 2, [100, 101], False)], 0, 0),  # a bus that is met in the middle
        ([(A, 1, 1, 3, [1, 2, 3], False), (A, 1, 1, 3, [], False), (A, 1, 2, 4, [4, 5], False)], 0, 5),
        ([(A, 1, 1, 1, [1], False), (A, 1, 5, 2, [5, 6], True), (A, 1, 7, 1, [7], False)], 3, 0),
        ([(A, 1, 1, 1, [1], False), (B, 1, 1, 1, [1], False), (A, 1, 2, 1, [2], False)], 0, 0),
        ([(A, 1, 1, 5, [1, 2, 3, 4, 5], False), (A, 2, 1, 2, [1, 2], True), (A, 1, 6, 2, [], False)], 0, 2),
        ([(A, 1, 1, 1, [1], False), (A, 1, 4, 0, [], True), (A, 1, 4, 1, [4], False)], 2, 0),  # only where it is by now
        ([(A, 1, 1, 0, [], False), (A, 1, 3, 1, [3], True)], 2, 0),
        ([(A, 1, 1, 1, [1], False), "gap", (A, 1, 9, 1, [9], False), (A, 1, 12, 1, [12], True)], 9, 0),
        ([(A, 1, 1, 2, [1, 2], False), "gap", (A, 1, 1, 2, [], False), (A, 1, 9, 1, [9], False)], 6, 2),
        ([(A, 1, 1, 1, [1], False), "gap", (A, 2, 1, 1, [1], False), (A, 2, 3, 1, [3], True)], 1, 0),
    ],
)
def test_what_comes_in_is_routed_once(steps: list[Any], missed: int, duplicates: int) -> None:
    inbound = Inbound()
    for step in steps:
        if step == "gap":
            inbound.note_gap()
            continue
        *call, routed, gap = step
        found = arrive(inbound, *call)
        assert found[:2] == (routed, gap)
        assert found[2] == (routed[-1] if routed else found[2])  # what is written down before it is routed
    assert (inbound.missed, inbound.duplicates) == (missed, duplicates)


def test_a_position_changes_with_each_message_that_is_routed() -> None:
    """When a session is killed in the middle of a batch, the next one goes on behind what was routed."""
    inbound = Inbound()
    arrivals = Arrivals(inbound)
    arrivals.begin(A, 1, 1, 10)
    arrivals.take(4)
    assert inbound.position(A) == (1, 4)
    assert arrive(inbound, A, 1, 1, 10)[0] == [5, 6, 7, 8, 9, 10]


def test_messages_without_positions_are_refused() -> None:
    arrivals = Arrivals(Inbound())
    with pytest.raises(Misannounced):
        arrivals.drop_had(1)
    arrivals.begin(A, 1, 1, 2)
    with pytest.raises(Misannounced):
        arrivals.drop_had(3)


def test_the_origins_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many origins the oldest is forgotten, whose messages begin anew then."""
    monkeypatch.setattr(bridging, "MOST_ORIGINS", 3)
    inbound = Inbound()
    origins = [b"origin %d" % number for number in range(4)]
    for origin in origins[:3]:
        arrive(inbound, origin, 1, 1, 5)
    arrive(inbound, origins[0], 1, 6, 1)
    assert inbound.begin(origins[3], 1, 1, 0).forgotten == origins[1]
    assert [inbound.position(origin)[1] for origin in origins] == [6, 0, 5, 0]


@pytest.mark.parametrize(
    ("ours", "theirs", "may"),
    [
        ([], ["x"], True),
        (["*"], ["x"], True),
        (["a"], ["*"], True),
        (["a"], ["a", "b"], True),
        (["a"], ["b"], False),
        (["a:*"], ["a:1"], True),
        (["a:*"], ["b:1"], False),
        (["a:1"], ["a:?"], True),
        (["a:12"], ["a:?"], False),
        (["a:*"], ["*:1"], True),
        (["a:*"], ["b:*"], False),
        (["a:*"], ["a:b:*"], True),
    ],
)
def test_channels_that_may_get_messages_of_a_stream(ours: list[str], theirs: list[str], may: bool) -> None:
    assert Topics(ours).may_reach(theirs) is may


def test_topics_of_a_stream() -> None:
    wanted = Topics(["a", "b:*", "[c]"])
    found = [topic for topic in (b"a", b"b:1", b"c", b"[c]", b"d", b"", b"\xff", b"a") if wanted.wants(topic)]
    assert found == [b"a", b"b:1", b"c", b"[c]", b"a"]
    assert Topics([]).wants(b"any")


@pytest.mark.parametrize("policy", ["block", "drop_oldest", "drop_newest", "disconnect"])
def test_a_gap_stands_where_it_is_and_once_in_a_row(policy: str) -> None:
    """Two without a message in between are one; behind a message, another one comes."""
    backlog = new_backlog(CAPACITY, policy)
    backlog.put_gap()
    backlog.put_gap()
    backlog.put(messages(1, 1))
    backlog.put_gap()
    assert [(run.count, run.is_exact) for run in backlog.runs] == [(0, False), (1, True), (0, False)]
    assert (backlog.published, backlog.missed, backlog.waiting) == (1, 0, 1)


def test_a_gap_is_kept_when_what_is_around_it_is_dropped() -> None:
    """Under ``drop_oldest`` it is one with the gap of what was dropped, whose number is no exact one then."""
    backlog = new_backlog(CAPACITY, "drop_oldest")
    for first in (1, 4, 7):
        backlog.put(messages(first, 3))
        backlog.put_gap()
    backlog.put(messages(10, 9))
    note = backlog.take_first(1 << 20, at_least_one=True)
    assert note is not None
    assert (note.missed, note.is_exact) == (8, False)
    assert [run.count for run in backlog.runs] == [1, 0, 9]
    backlog.put(messages(19, 10))
    assert [run.is_exact for run in backlog.runs] == [False, True]
    note = backlog.take_first(1 << 20, at_least_one=True)
    assert note is not None
    assert (note.missed, note.is_exact) == (10, False)


def test_a_gap_behind_dropped_messages_is_one_with_theirs() -> None:
    backlog = new_backlog(CAPACITY, "drop_newest")
    backlog.put(messages(1, 15))
    backlog.put_gap()
    backlog.put(messages(16, 5))
    assert [(run.count, run.missed, run.is_exact) for run in backlog.runs] == [(10, 0, True), (0, 10, False)]


def test_one_of_several_outboxes_gets_a_message() -> None:
    """The first that has the topic, and every channel as always."""
    router: Router[str] = Router()
    router.alternatives.update(dict.fromkeys(["one", "two"]))
    router.add("two", ["*"])
    router.add("one", ["a*"])
    router.add("channel", ["*"])
    assert {*(router.targets(b"a") or ())} == {"one", "channel"}
    assert {*(router.targets(b"b") or ())} == {"two", "channel"}


def test_many_gaps_take_many_turns(own_broker: Broker) -> None:
    """What a session writes between messages costs its publisher turns, as messages do."""
    routing = own_broker.traffic.routing
    with asking(own_broker) as (_, _, session):
        for id in range(5000, 5060):
            subscribed(own_broker, id, own_broker.registry.sessions[session], ["a"], "drop_oldest")
        routing.begin_turn()
        for _ in range(TURN // 60):
            assert not routing.turn_is_over
            routing.put_gap(Topics(["a"]))
        routing.put_gap(Topics(["a"]))
        assert routing.turn_is_over
        assert [len(one.backlog.runs) for one in own_broker.registry.subscriptions.values() if one.id >= 5000] == [1] * 60


def test_frames_between_messages() -> None:
    """What a session writes between messages is read as it was, and nothing else is."""
    frames: list[BridgeFrame] = [Arrival(A, 3, 7, 2), Cursor("1-0"), Cursor(""), Arrival(B, 1, 1, 0)]
    message = batch_of([(1, b"x")]).frames
    chunk = bridge_frame(frames[0]) + message + b"".join(map(bridge_frame, frames[1:]))
    splitter = Splitter()
    first, batch, *rest = splitter.split(chunk)
    assert [first, *rest] == frames
    assert batch.frames == message
    assert splitter.has_shared
    wrong: list[BridgeFrame] = [Arrival(A, 1, 0, 1), Arrival(A, 1 << 62, 1, 1), Arrival(A, 1, 1 << 62, 1), Cursor("x" * 257)]
    for bad in [*map(bridge_frame, wrong), HEAD.pack(9, 5 << 24) + b"x", HEAD.pack(9, (5 << 24) + 1) + b"\xff"]:
        with pytest.raises(FrameError):
            Splitter().split(bad)
