"""A group's shares and its backlog, under each policy, against a plain list of what has become of each message."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mpbroadcast.broker.core.groups import Shares
from mpbroadcast.broker.core.policies import new_backlog
from mpbroadcast.protocol.pickling import load_run
from mpbroadcast.protocol.reports import last_report, report
from mpbroadcast.protocol.runs import END, GAP, MESSAGES, OVERFLOWED, SKIPPED, Run, read_run, run_of
from mpbroadcast.validation import POLICIES
from tests.support.frames_made import STEADY, batch_of

FIRST_ID = 1000
WAITS, FINISHED, LOST, DROPPED = "waits", "finished", "lost", "dropped"


def contents(run: Run) -> tuple[int, list[int]]:
    """Return the kind of a run, and its messages, or the count of a note."""
    view = read_run(bytes(run.rest(0)), 0)
    assert view is not None
    if view.kind != MESSAGES:
        return view.kind, [run.missed]
    numbers = [number for number, _ in load_run(bytes(run.rest(0)), view)[0]]
    assert view.position == FIRST_ID + numbers[0], "a part of a run has the id of its first message"
    return view.kind, numbers


class Groups(RuleBasedStateMachine):
    """Publishes to one group, and gives what waits to its members as the broker's delivery does."""

    @initialize(policy=st.sampled_from(POLICIES), capacity=st.sampled_from([1, 2000, 10_000, 1 << 20]))
    def begin(self, policy: str, capacity: int) -> None:
        self.policy = policy
        self.backlog = new_backlog(capacity, policy)
        self.shares: Shares[int] = Shares()
        self.fates: list[str | int] = []  # of each message: what has become of it, or which member has it
        self.prefetch: dict[int, int] = {}
        self.given: dict[int, list[int]] = {}
        self.subscribed: list[int] = []
        self.order: list[int] = []  # the one that has waited longest for a message is first
        self.taking: set[int] = set()
        self.full: set[int] = set()
        self.reported = 0  # dropped messages of which a member has got a note
        self.count = 0
        for prefetch in (4, 2, 30):
            self.join(prefetch)
            self.begin_taking(self.count)

    def unfinished(self, member: int) -> int:
        return sum(self.fates[number] == member for number in self.given[member])

    @rule(count=st.sampled_from([1, 1, 2, 5, 30, 200]))
    def publish(self, count: int) -> None:
        first = len(self.fates)
        if self.backlog.ended:
            return
        run = run_of(batch_of((number, b"") for number in range(first, first + count)), FIRST_ID + first)
        if self.backlog.blocks and (fits := self.backlog.fitting(run)) < count:
            if not fits:
                return
            count, run = fits, run.part(0, fits)
        before = self.backlog.published
        self.backlog.put(run)
        self.fates += [WAITS] * (self.backlog.published - before)

    @rule(prefetch=st.sampled_from([1, 2, 3, 4, 40]))
    def join(self, prefetch: int) -> None:
        self.count += 1
        self.shares.join(self.count, prefetch)
        self.prefetch[self.count], self.given[self.count] = prefetch, []
        self.subscribed.append(self.count)
        self.order.append(self.count)

    def one_of(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.prefetch)))

    @precondition(lambda self: self.prefetch)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        self.begin_taking(self.one_of(data))

    def begin_taking(self, member: int) -> None:
        self.shares.open(member, 30)
        self.prefetch[member] = min(self.prefetch[member], 30)
        if member in self.shares.members:
            self.taking.add(member)

    @rule(data=st.data(), most=st.sampled_from([1, 2, 1000]))
    def give(self, data: st.DataObject, most: int) -> None:
        """Give what the members take, in order. Each goes to the one with the least to do, of these to the one that has waited
        longest, with what was dropped before it."""
        for _ in range(most):
            head = self.backlog.head()
            if not head or not head[-1].count:
                return
            takes = self.taking - self.full
            free = [one for one in self.order if one in takes and self.unfinished(one) < self.prefetch[one]]
            member = self.shares.next()
            assert member == min(free, key=self.unfinished, default=None)
            if member is None:
                return
            self.order.remove(member)
            self.order.append(member)
            *notes, (kind, numbers) = map(contents, head)
            (number,) = numbers
            assert kind == MESSAGES
            waiting = [index for index, fate in enumerate(self.fates) if fate == WAITS]
            missed = sum(count for _, (count,) in notes)
            assert {kind for kind, _ in notes} <= {SKIPPED if self.policy == "latest" else GAP}
            self.reported += missed
            self.fates[waiting[0] : number] = [DROPPED] * (number - waiting[0])
            assert self.fates.count(DROPPED) == self.reported
            assert not self.given[member] or number > self.given[member][-1]
            self.fates[number] = member
            self.given[member].append(number)
            self.backlog.take(head)
            has_room = data.draw(st.integers(0, 5)) > 0
            self.shares.gave(member, has_room=has_room)
            if not has_room:
                self.full.add(member)

    @precondition(lambda self: self.full)
    @rule()
    def make_room(self) -> None:
        self.shares.make_room(self.full.pop())

    @precondition(lambda self: self.prefetch)
    @rule(data=st.data(), wrong=st.sampled_from([0, 0, 0, 5]))
    def finish(self, data: st.DataObject, wrong: int) -> None:
        """Report some as finished, or more than were given, which a process can do."""
        member = self.one_of(data)
        done = len(self.given[member]) - self.unfinished(member)
        count = data.draw(st.integers(0, len(self.given[member]))) + wrong
        self.shares.finish(member, count)
        for number in self.given[member][done:count]:
            self.fates[number] = FINISHED

    @precondition(lambda self: self.prefetch)
    @rule(data=st.data(), steps=st.lists(st.sampled_from(["publish", "give", "finish"]), min_size=5, max_size=30))
    def work(self, data: st.DataObject, steps: list[str]) -> None:
        """Do what happens most, one by one: so members come to differ in what they have to do."""
        for step in steps:
            if step == "publish":
                self.publish(2)
            elif step == "give":
                self.give(data, 1)
            else:
                self.finish(data, 0)

    @precondition(lambda self: len(self.taking) > 2)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        member = self.one_of(data)
        self.shares.retire(member)
        self.taking.discard(member)
        self.subscribed = [one for one in self.subscribed if one != member]

    @precondition(lambda self: len(self.prefetch) > 3)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        member = self.one_of(data)
        self.shares.leave(member)
        del self.prefetch[member]
        self.order.remove(member)
        self.subscribed = [one for one in self.subscribed if one != member]
        self.taking.discard(member)
        self.full.discard(member)
        self.fates = [LOST if fate == member else fate for fate in self.fates]

    @precondition(lambda self: len(self.fates) > 100)
    @rule()
    def end(self) -> None:
        """End the group: behind all that waits comes the end, and in front of it what was dropped last, or the overflow."""
        self.backlog.end()
        head = self.backlog.head()
        if not head[-1].count:
            *notes, (kind, _) = map(contents, head)
            assert kind == END
            waiting = self.fates.count(WAITS)
            assert sum(count for _, (count,) in notes) == waiting, "what waits in the list was dropped"
            assert {kind for kind, _ in notes} <= {OVERFLOWED if self.backlog.overflowed else GAP, SKIPPED}

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "fates"):
            return
        backlog, shares = self.backlog, self.shares
        assert len(self.fates) == backlog.published == backlog.delivered + backlog.waiting + backlog.missed
        assert backlog.delivered == sum(map(len, self.given.values()))
        assert self.fates.count(LOST) == shares.lost
        assert shares.members == tuple(self.subscribed)
        assert ([*shares], len(shares)) == (self.order, len(self.subscribed))
        for member in range(1, self.count + 1):
            there = member in self.prefetch
            assert (member in shares, shares.prefetch(member)) == (there, self.prefetch.get(member, 0))
            assert shares.has_unfinished(member) == (there and self.unfinished(member) > 0)
            assert not there or self.unfinished(member) <= self.prefetch[member]


Groups.TestCase.settings = settings(STEADY, max_examples=40, stateful_step_count=25)
TestGroups = Groups.TestCase


def test_a_report_is_the_last_one() -> None:
    """Of several reports the last one counts, and of one that is cut, as only another program writes it, nothing does."""
    assert last_report(report(3) + report(5)) == (5, False)
    assert last_report(report(5) + report(7, leaves=True)) == (7, True)
    assert last_report(report(5) + b"\1\2") == (5, False)
    assert last_report(b"\1\2") == (0, False)
