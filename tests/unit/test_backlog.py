"""A subscription's backlog: each policy against a plain list of messages. The pipe is only a number of bytes."""

from __future__ import annotations

import pickle
import sys
from array import array
from collections.abc import Iterable, Iterator
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.policies import new_backlog, under
from mpbroadcast.protocol.frames import FRAME_OVERHEAD, MOST_TOGETHER, PIPE_BUF, Batch, MemfdMessage, frame_head
from mpbroadcast.protocol.pickling import load_run
from mpbroadcast.protocol.runs import (
    END,
    GAP,
    MESSAGES,
    MOST_AT_ONCE,
    OVERFLOWED,
    RUN,
    SKIPPED,
    Account,
    Run,
    RunView,
    SharedRun,
    memory_run,
    note_run,
    read_run,
    run_of,
)
from mpbroadcast.validation import POLICIES

NOTES = {END: "end", GAP: "gap", SKIPPED: "skipped", OVERFLOWED: "overflowed"}
NOTE_SIZE = len(note_run(GAP, 1).data)

Event = tuple[str, int]
"""What a pipe says: a message with its number, or a note with what it counts."""


def batch_of(first: int, sizes: Iterable[int]) -> Batch:
    """Neighbouring messages, numbered from ``first`` on, with payloads of about these sizes."""
    payloads = [pickle.dumps((number, bytes(size))) for number, size in enumerate(sizes, first)]
    frames = [frame_head(len(payload), b"") + payload for payload in payloads]
    return Batch(b"".join(frames), array("I", map(len, frames)), b"", 0, len(frame_head(0, b"")))


def messages(first: int, count: int, size: int = 100, account: Account | None = None) -> Run:
    """A run of ``count`` messages, numbered from ``first`` on."""
    return run_of(batch_of(first, [size] * count), account)


def charge_of(first: int, size: int) -> int:
    """What the documentation says that a message counts: its pickled bytes, its topic's, and a fixed overhead."""
    return len(pickle.dumps((first, bytes(size)))) + FRAME_OVERHEAD


def views(data: bytes) -> Iterator[RunView]:
    """The heads of the runs in ``data``, one behind the other."""
    start = 0
    while (run := read_run(data, start)) is not None:
        yield run
        start += run.size


def events(data: bytes, run: RunView) -> list[Event]:
    """What a whole run says."""
    if run.kind != MESSAGES:
        return [(NOTES[run.kind], run.messages)]
    loaded, whole = load_run(data, run)
    assert whole
    assert len(loaded) == run.messages
    return [("message", number) for number, _ in loaded]


def merged(story: Iterable[Event]) -> list[Event]:
    """Notes of one kind that follow each other say together what a single one would."""
    result: list[Event] = []
    for kind, number in story:
        if result and kind in ("gap", "skipped") and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + number)
        else:
            result.append((kind, number))
    return result


def emptied(backlog: Backlog) -> list[Event]:
    """All that comes out of a backlog whose reader reads at once."""
    written = bytearray()
    for _ in range(10_000):
        backlog.pipe = 0
        if backlog.is_empty:
            break
        data = backlog.to_write()
        assert data
        written += data
        backlog.wrote(len(data))
    assert backlog.is_empty
    data = bytes(written)
    return [event for run in views(data) for event in events(data, run)]


def numbers(first: int, stop: int) -> list[Event]:
    """The messages from ``first`` to before ``stop``."""
    return [("message", number) for number in range(first, stop)]


# --------------------------------------------------------------------------------------------------- the plain model

WAITING, DELIVERED, MISSED = "waiting", "delivered", "missed"


class Plain:
    """What a backlog should do, in the simplest way: one entry for each message that was published to it."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.fates: list[str] = []
        self.waiting: list[int] = []  # the numbers of those that wait
        self.charges: list[int] = []
        self.begun = 0  # how many of those that wait are in a run that is partly in the pipe
        self.pipe = 0
        self.overflowed = False

    @property
    def waiting_charge(self) -> int:
        return sum(self.charges[number] for number in self.waiting)

    @property
    def charge(self) -> int:
        """What counts against the capacity: all that waits, also if partly in the pipe, and what is unread there."""
        return self.waiting_charge + self.pipe

    @property
    def too_much(self) -> bool:
        """Whether there is more than the capacity, and not just a single message."""
        return self.charge > self.capacity and not (len(self.waiting) == 1 and self.pipe <= 1)

    def publish(self, charge: int) -> None:
        self.waiting.append(len(self.fates))
        self.fates.append(WAITING)
        self.charges.append(charge)

    def leave(self, place: int, fate: str) -> None:
        """Let the message at this place of those that wait be gone."""
        self.fates[self.waiting.pop(place)] = fate

    def put(self, charges: list[int]) -> None:
        """Publish all, one by one."""
        if self.policy == "drop_oldest":
            for charge in charges:
                self.publish(charge)
            while len(self.waiting) > self.begun and self.too_much:
                self.leave(self.begun, MISSED)
        elif self.policy == "latest":
            for charge in charges:
                while len(self.waiting) > self.begun:
                    self.leave(self.begun, MISSED)
                self.publish(charge)
        else:
            full = False
            for charge in charges:
                self.publish(charge)
                full = full or self.too_much  # what comes behind one that is dropped is dropped with it
                if full:
                    assert self.policy != "block"
                    self.leave(-1, MISSED)
                if full and self.policy == "disconnect":
                    self.overflowed = True
                    return

    def fitting(self, charges: list[int]) -> int:
        """How many of the first could be put without having too much."""
        other = Plain("block", self.capacity)
        other.fates, other.charges, other.waiting = self.fates[:], self.charges[:], self.waiting[:]
        other.pipe = self.pipe
        for count, charge in enumerate(charges):
            other.publish(charge)
            if other.too_much:
                return count
        return len(charges)

    def story(self) -> list[Event]:
        """What the reader has to be told of all before the first message that waits."""
        kind = "skipped" if self.policy == "latest" else "gap"
        told: list[Event] = []
        for number, fate in enumerate(self.fates):
            if fate == WAITING:
                break
            if fate == DELIVERED:
                told.append(("message", number))
            elif self.policy == "disconnect":
                told += [("overflowed", 1), ("end", 0)]
            else:
                told.append((kind, 1))
        return merged(told)


class Machine(RuleBasedStateMachine):
    """Publishes to a backlog, moves it into a pipe as the kernel would, and reads from that."""

    policy = ""

    @initialize(capacity=st.sampled_from([1, 3000, 10_000, 30_000, 100_000, 300_000]), pages=st.sampled_from([1, 2, 16, 16]))
    def begin(self, capacity: int, pages: int) -> None:
        self.account = Account()
        self.backlog = new_backlog(capacity, self.policy)
        self.backlog.pipe_size = self.pipe_size = pages * PIPE_BUF
        self.plain = Plain(self.policy, capacity)
        self.unread = 0
        self.written = 0
        self.parsed = 0  # up to where the runs in the pipe have been looked at
        self.tail = b""  # what was written behind that
        self.told: list[Event] = []
        self.in_pipe: list[int] = []  # where the runs of messages end that are in the pipe
        self.promised: list[tuple[int, int]] = []  # once so many have left, nothing of the first so many waits
        self.puts = 0

    @precondition(lambda self: not self.backlog.ended)
    @rule(count=st.just(1) | st.integers(1, 40), sizes=st.lists(st.integers(0, 6000), min_size=1, max_size=4))
    def put(self, count: int, sizes: list[int]) -> None:
        backlog, plain = self.backlog, self.plain
        batch = batch_of(len(plain.fates), [sizes[index % len(sizes)] for index in range(count)])
        charges = [size - 8 + FRAME_OVERHEAD for size in batch.sizes]
        assert batch.charge == sum(charges)
        fits = backlog.fitting(run_of(batch))
        assert fits == plain.fitting(charges)
        if self.policy == "block":
            batch, charges = batch.cut(fits)[0], charges[:fits]
            if not charges:
                return
        before = backlog.charge
        left, first = backlog.left, len(plain.fates)
        entered = backlog.put(run_of(batch, self.account))
        plain.put(charges)
        assert entered == (backlog.entered if plain.waiting and plain.waiting[-1] >= first else 0)
        self.puts += 1
        self.promised.append((backlog.entered, len(plain.fates)))
        assert backlog.left >= left
        assert backlog.overflowed == plain.overflowed
        assert backlog.ended == plain.overflowed
        if self.policy == "latest":
            assert backlog.waiting == plain.begun + 1
        else:
            assert backlog.charge <= max(backlog.capacity, before) or (backlog.waiting == 1 and backlog.pipe <= 1)

    @rule(optimism=st.integers(0, 100))
    def write(self, optimism: int) -> None:
        """Let the pipe take what it has room for, the less of it the worse its pages are used."""
        backlog, plain = self.backlog, self.plain
        if backlog.is_empty:
            assert not backlog.to_write()
            return
        if backlog.drops:
            self.refresh()
            waits = self.unread > 0 and bool(plain.waiting) and not self.tail
            assert backlog.must_wait == (waits and self.policy == "latest")
            if backlog.must_wait:
                return
        data = bytes(backlog.to_write())
        assert data
        most = self.pipe_size - self.unread
        least = max(0, self.pipe_size - 2 * self.unread - 2 * PIPE_BUF) if backlog.drops else 0
        room = max(least, most * optimism // 100)
        if self.unread == 0:
            room = max(room, PIPE_BUF)
        taken = len(data) if len(data) <= room else room if len(data) > PIPE_BUF else 0
        before = backlog.charge
        if taken:
            backlog.wrote(taken)
        plain.pipe += taken
        self.unread += taken
        self.written += taken
        noted = self.follow(data, taken)
        assert backlog.charge <= before + noted * NOTE_SIZE + len(self.tail)  # what is partly there counts as both
        self.check_story()

    def follow(self, data: bytes, taken: int) -> int:
        """Look at what was offered to the pipe, and at how much it took; how many notes were in that."""
        plain = self.plain
        offered = self.tail + data
        whole = len(self.tail) + taken
        position = noted = plain.begun = 0
        for run in views(offered):
            end = position + run.size
            if position >= whole:
                break
            noted += run.kind != MESSAGES
            if run.kind == MESSAGES and end > len(self.tail) and position >= len(self.tail):
                self.in_pipe.append(self.parsed + end)
            if end > whole:
                plain.begun = run.messages if run.kind == MESSAGES else 0
                assert plain.begun <= 1 or not self.backlog.drops
                break
            said = events(offered[:end], run)
            if run.kind == MESSAGES:
                assert said == [("message", number) for number in plain.waiting[: run.messages]]
                for _ in said:
                    plain.leave(0, DELIVERED)
            self.told += said
            position = end
        self.tail = offered[position:whole]
        self.parsed += position
        return noted

    @rule(share=st.integers(0, 100), keeps_one=st.booleans())
    def read(self, share: int, keeps_one: bool) -> None:
        """Read some of what is in the pipe, or all but the last byte."""
        self.unread -= min(-(-self.unread * share // 100), max(0, self.unread - keeps_one))

    @rule()
    def refresh(self) -> None:
        """Tell the backlog how much of the pipe is unread."""
        self.backlog.pipe = self.plain.pipe = self.unread

    @rule(seed=st.integers(0, 2**16 - 1))
    def many(self, seed: int) -> None:
        """Many steps of all kinds, long messages among them: what single draws seldom come to."""
        choose = Random(seed)
        for _ in range(20):
            kind = choose.choice(["put", "put", "put", "write", "write", "write", "read", "read", "refresh"])
            if kind == "put" and not self.backlog.ended:
                sizes = choose.choices([0, 1, 50, 300, 1000, 3000, 4000, 5000, 6000], k=choose.randint(1, 4))
                self.put(choose.choice([1, 1, 2, 5, 40]), sizes)
            elif kind == "write":
                self.write(choose.randint(0, 100))
            elif kind == "read":
                self.read(choose.choice([10, 50, 100, 100]), choose.random() < 0.3)
            else:
                self.refresh()
            self.check()

    @precondition(lambda self: self.puts > 15)
    @rule()
    def end(self) -> None:
        self.backlog.end()
        assert self.backlog.ended

    @invariant()
    def check(self) -> None:
        self.counts()
        self.positions()
        self.one_state()

    def counts(self) -> None:
        """Each message is at one place, and the sums are right."""
        backlog, plain = self.backlog, self.plain
        assert backlog.published == len(plain.fates)
        assert backlog.delivered == plain.fates.count(DELIVERED)
        assert backlog.missed == plain.fates.count(MISSED)
        assert backlog.waiting == len(plain.waiting) == plain.fates.count(WAITING)
        assert backlog.delivered + backlog.missed + backlog.waiting == backlog.published
        assert backlog.waiting_charge == plain.waiting_charge == self.account.held
        assert backlog.pipe == plain.pipe
        assert backlog.charge == plain.charge
        if self.policy != "latest":
            assert backlog.waiting_charge <= backlog.capacity or backlog.waiting == 1

    def positions(self) -> None:
        """Who waits until as many have left as were there hears of it when nothing of that waits, and not before."""
        left, fates = self.backlog.left, self.plain.fates
        for position, published in self.promised:
            assert (left >= position) == (WAITING not in fates[:published])
        self.promised = [(position, published) for position, published in self.promised if left < position]

    def one_state(self) -> None:
        """Under ``latest``, one message is in the pipe at the most."""
        self.in_pipe = [end for end in self.in_pipe if end > self.written - self.unread]
        assert self.policy != "latest" or len(self.in_pipe) <= 1

    def check_story(self, *, whole: bool = False) -> None:
        """What was said is what happened, in that order; of what was dropped last, perhaps not all was said yet."""
        told, story = merged(self.told), self.plain.story()
        if not whole:
            while told and told[-1][0] != "message":
                kind, number = told.pop()
                if kind in ("gap", "skipped"):
                    behind = story[len(told)] if len(told) < len(story) else ("nothing", 0)
                    assert behind[0] == kind
                    assert 0 < number <= behind[1]
            while story and story[-1][0] != "message":
                story.pop()
        assert told == story

    def teardown(self) -> None:
        if sys.exc_info()[0] is not None or not hasattr(self, "backlog"):
            return
        ended = self.backlog.ended
        self.drain()
        self.check_story(whole=not ended or self.plain.overflowed)
        self.backlog.end()
        self.backlog.end()
        self.drain()
        assert self.told.count(("end", 0)) == 1
        assert self.told[-1] == ("end", 0)

    def drain(self) -> None:
        for _ in range(10_000):
            if self.backlog.is_empty:
                break
            self.unread = 0
            self.write(100)
            self.check()
        assert self.backlog.is_empty
        self.unread = 0
        self.refresh()
        assert (self.backlog.waiting, self.backlog.charge, self.account.held) == (0, 0, 0)


@pytest.mark.timeout(300)  # that is for the search for the shortest way to a failure
@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_does_what_a_plain_list_does(policy: str) -> None:
    """Whatever is put, written and read, in any order, a backlog counts, keeps, drops and says what the list does."""
    machine = type(f"Machine_{policy}", (Machine,), {"policy": policy})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            derandomize=True,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


# --------------------------------------------------------------------------------------------------------- examples


def test_another_policy_takes_over() -> None:
    """The gap that has not been said is said by the same policy only."""
    for policy, said in (("drop_oldest", [("gap", 2)]), ("drop_newest", []), ("latest", [])):
        backlog = new_backlog(charge_of(0, 100), "drop_oldest")
        backlog.put(messages(0, 3))
        backlog = under(policy, backlog)
        assert (backlog.policy, emptied(backlog)) == (policy, [*said, ("message", 2)])


def test_a_run_counts_once_for_as_long_as_it_is_there() -> None:
    """Its bytes count once, until it has left the last backlog that it is in, by whichever way, whole or in parts."""
    account = Account()
    keeps, drops = new_backlog(100_000), new_backlog(10 * charge_of(0, 100), "drop_oldest")
    for first, count in ((0, 10), (10, 3)):
        run = messages(first, count, account=account)
        assert account.held == (first + count) * charge_of(0, 100)
        keeps.put(run)
        drops.put(run)
        del run
    assert drops.waiting_charge == 10 * charge_of(0, 100)
    assert keeps.waiting_charge == 13 * charge_of(0, 100)
    assert account.held == 20 * charge_of(0, 100)  # all of the first run, what is left of it, and the second
    assert emptied(drops) == [("gap", 3), *numbers(3, 13)]
    assert account.held == keeps.waiting_charge
    keeps.discard()
    assert account.held == 0


def test_dropping_one_by_one_does_not_go_through_everything_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of ten thousand drops from long runs grows hardly faster than their number."""
    looked_at = 0
    charges, part = Run.charges, Run.part

    def counted_charges(run: Run) -> list[int]:
        nonlocal looked_at
        looked_at += run.count
        return charges(run)

    def counted_part(run: Run, start: int, stop: int) -> Run:
        nonlocal looked_at
        looked_at += run.count
        return part(run, start, stop)

    monkeypatch.setattr(Run, "charges", counted_charges)
    monkeypatch.setattr(Run, "part", counted_part)
    count = 10 * MOST_TOGETHER
    one = charge_of(0, 0)
    backlog = new_backlog(count * one, "drop_oldest")
    single = batch_of(0, [0])
    together = single._replace(frames=single.frames * MOST_TOGETHER, sizes=single.sizes * MOST_TOGETHER)
    for _ in range(count // MOST_TOGETHER):
        backlog.put(run_of(together))
    for _ in range(count):
        backlog.put(run_of(single))
    assert (backlog.missed, backlog.waiting) == (count, count)
    assert looked_at < 1.2 * MOST_AT_ONCE * count


def a_run(count: int = 1, size: int = 100) -> Run:
    """A run of messages that are all the same."""
    frame = frame_head(size, b"") + bytes(size)
    return run_of(Batch(frame * count, array("I", [len(frame)] * count), b"", 0, 8))


def test_a_capacity_can_be_used_to_its_last_byte() -> None:
    """What fits exactly is taken; what the pipe refers to in shared memory counts as what is in it does."""
    run = a_run()
    backlog = new_backlog(run.charge)
    assert backlog.takes(run.charge)
    assert not backlog.takes(run.charge + 1)
    backlog.pipe = 1
    assert not backlog.takes(run.charge)
    backlog.pipe, backlog.referred = 0, 1
    assert (backlog.takes(run.charge), backlog.charge) == (False, 1)
    for unread, is_clear in ((1, True), (2, False)):
        backlog = new_backlog(1)
        backlog.pipe = unread
        assert backlog.is_clear == is_clear
    for more, missed in ((0, 0), (1, 1)):
        backlog = new_backlog(2 * run.charge - more, "drop_oldest")
        backlog.put(run)
        backlog.put(run)
        assert backlog.missed == missed
        backlog = new_backlog(2 * run.charge - more, "drop_oldest")
        backlog.put(a_run(2))
        assert backlog.missed == missed


def test_many_tiny_messages_are_cut_to_what_the_pipe_takes_for_certain() -> None:
    """Their heads and the table of their lengths count, too. What is never dropped need not be cut."""
    each = 8 + 1 + 4
    run = a_run(20_000, 1)
    for more in range(each):
        for policy, capacity in (("drop_oldest", 1 << 24), ("drop_oldest", run.charge), ("block", 1 << 24)):
            backlog = new_backlog(capacity, policy)
            backlog.pipe_size = (1 << 16) + more
            backlog.put(run)
            backlog.put(run)  # over the first one, or not
            if policy == "block":
                assert backlog.to_write() == run.data
            else:
                assert 0 <= backlog.pipe_size - 2 * PIPE_BUF - len(backlog.to_write()) < MOST_AT_ONCE * each


@pytest.mark.parametrize("count", [1, MOST_AT_ONCE, MOST_AT_ONCE + 1, 3 * MOST_AT_ONCE])
def test_a_run_is_divided_between_what_is_unpickled_at_once(count: int) -> None:
    """No copy is made, both parts together are the run, and the account has the whole until neither is left."""
    account = Account()
    frames = b"".join(frame_head(3, b"t") + b"%03d" % index for index in range(count))
    run = run_of(Batch(frames, array("I", [12] * count), b"t", 0, 9), account)
    held = account.held
    bounds = {0}
    while (start := max(bounds)) < run.size:
        bounds.add(start + RUN.unpack_from(run.data, start)[0])
    assert len(bounds) - 1 == -(-count // MOST_AT_ONCE)
    assert run.first == sorted(bounds)[1]
    data, charges = bytes(run.data), run.charges()
    for offset in range(run.size + 1):
        parts = run.divided(offset)
        before = max(bound for bound in bounds if bound <= offset)
        if before in (0, run.size):
            assert parts is None
            continue
        assert parts is not None
        first, rest = parts
        assert (first.size, b"".join((first.data, rest.data))) == (before, data)
        assert (first.charges() + rest.charges(), first.charge + rest.charge) == (charges, run.charge)
        assert rest.part(0, 1).charge == rest.charges()[0]
        del first, rest
    parts = run.divided(run.size - 1)
    assert account.held == held
    del run
    assert account.held == (held if parts else 0)
    parts = None
    assert account.held == 0


@pytest.mark.parametrize("policy", ["block", "drop_oldest"])
def test_what_a_pipe_has_taken_of_a_long_run_waits_no_more(policy: str) -> None:
    """What is unpickled at once counts as delivered when all of it is written; what is behind it can still be dropped."""
    run = a_run(4 * MOST_AT_ONCE, 1)
    backlog = new_backlog(run.charge + (1 << 16), policy)
    backlog.pipe_size = 1 << 20
    backlog.put(run)
    backlog.to_write()
    backlog.wrote(run.first + 1)
    assert (backlog.delivered, backlog.waiting, backlog.left) == (MOST_AT_ONCE, 3 * MOST_AT_ONCE, MOST_AT_ONCE)
    assert backlog.waiting_charge == 3 * run.charge // 4
    if policy == "drop_oldest":
        backlog.pipe = 1 << 16
        backlog.put(a_run(2 * MOST_AT_ONCE, 1))
        assert (backlog.missed, backlog.waiting) == (MOST_AT_ONCE, 4 * MOST_AT_ONCE)
    written = bytearray(run.data[: run.first + 1])
    while not backlog.is_empty:
        data = backlog.to_write()
        backlog.wrote(min(len(data), 1000))
        written += data[:1000]
    kinds = []
    start = 0
    while (view := read_run(bytes(written), start)) is not None:
        kinds.append((view.kind, view.messages))
        start += view.size
    each = (MESSAGES, MOST_AT_ONCE)
    assert kinds == ([each] * 4 if policy == "block" else [each, each, (GAP, MOST_AT_ONCE), each, each, each])
    assert backlog.left == backlog.delivered + backlog.missed == backlog.published


def test_a_gap_that_is_partly_written_stays_as_it_is() -> None:
    """What is dropped while the note of a gap is half in the pipe gets one note of its own."""
    run = a_run()
    backlog = new_backlog(run.charge, "drop_newest")
    backlog.put(run)
    written = bytes(backlog.to_write())
    backlog.wrote(len(written))
    backlog.pipe = backlog.capacity
    backlog.put(a_run(1))
    backlog.put(a_run(1))
    written += bytes(backlog.to_write())[:5]
    backlog.wrote(5)
    backlog.put(a_run(3))
    backlog.put(a_run(4))
    while not backlog.is_empty:
        data = bytes(backlog.to_write())
        backlog.wrote(len(data))
        written += data
    said = []
    start = 0
    while (view := read_run(written, start)) is not None:
        said.append((view.kind, view.messages))
        start += view.size
    assert said == [(MESSAGES, 1), (GAP, 2), (GAP, 7)]
    assert start == len(written)


def in_memory(ring: int) -> SharedRun:
    """The run of a message in shared memory, which may belong to a ring."""
    copy = bytes(a_run().data[RUN.size : -1])
    copied = Batch(copy, array("I", [len(copy)]), b"", 0, 8)
    hold = SimpleNamespace(data=lambda item: memory_run(item, 1), copied=lambda _: copied, copies=None, ring=ring)
    return SharedRun(MemfdMessage(7, 100, b"", 0, frame_head(100, b""), False, hold))


def test_a_message_in_memory_is_not_written_with_what_comes_before() -> None:
    """Its descriptor has to be sent before its run: so that is never joined to another one."""
    backlog = new_backlog(1 << 20)
    before, own, behind = a_run(), in_memory(1), a_run()
    for run in (before, own, behind):
        backlog.put(run)
    assert (backlog.to_write(), backlog.runs[0].hold) == (before.data, None)
    backlog.wrote(len(before.data))
    assert (backlog.to_write(), backlog.runs[0].hold) == (own.data, own.hold)
    backlog.wrote(len(own.data))
    assert (backlog.to_write(), backlog.runs[0].hold) == (behind.data, None)


def test_what_is_copied_out_is_written_as_it_would_have_been() -> None:
    """All that waits in one ring, or what comes next; nothing else."""
    backlog, plain = new_backlog(1 << 20), a_run()
    for run in (plain, in_memory(1), in_memory(1), in_memory(2)):
        backlog.put(run)
    assert [backlog.refers_to(ring) for ring in (1, 2, 3)] == [True, True, False]
    assert [backlog.copy_out(ring) for ring in (1, 3)] == [2 * plain.charge, 0]
    assert [backlog.refers_to(ring) for ring in (1, 2, 3)] == [False, True, False]
    backlog.copy_first()
    assert (backlog.to_write(), backlog.is_between_runs) == (bytes(plain.data) * 3, True)
    backlog.wrote(len(plain.data) * 3 - 1)
    assert not backlog.is_between_runs
    backlog.wrote(1)
    assert backlog.to_write() != plain.data
    backlog.copy_first()
    assert backlog.to_write() == plain.data
