"""A subscription's backlog: each policy against a plain list of messages. The pipe is only a number of bytes."""

import pickle
from array import array
from collections.abc import Iterable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.policies import new_backlog, with_policy
from mpbroadcast.protocol.frames import FRAME_OVERHEAD, MOST_TOGETHER, PIPE_BUF, Batch, MemfdMessage, frame_head
from mpbroadcast.protocol.pickling import load_run
from mpbroadcast.protocol.runs import (
    END,
    GAP,
    MESSAGES,
    MOST_AT_ONCE,
    OVERFLOWED,
    PART,
    RUN,
    SKIPPED,
    Account,
    LongRun,
    Run,
    RunView,
    SharedRun,
    memory_run,
    read_run,
    run_of,
)
from mpbroadcast.validation import POLICIES
from tests.support.frames_made import batch_of

NOTES = {END: "end", GAP: "gap", SKIPPED: "skipped", OVERFLOWED: "overflowed"}

Event = tuple[str, int]
"""What a pipe has: a message with its number, or a note with its count."""


def messages(first: int, sizes: Iterable[int], account: Account | None = None) -> Run:
    """Return a run of messages, numbered from ``first`` on, of about these sizes."""
    return run_of(batch_of((number, bytes(size)) for number, size in enumerate(sizes, first)), first, account)


def charge_of(first: int, size: int) -> int:
    """Return what a message counts by the documentation: its pickled bytes, its topic's, and a fixed overhead."""
    return len(pickle.dumps((first, bytes(size)))) + FRAME_OVERHEAD


def views(data: bytes) -> Iterator[RunView]:
    """Yield the heads of the runs in ``data``, one behind the other."""
    start = 0
    while (run := read_run(data, start)) is not None:
        yield run
        start += run.size


def events(data: bytes, run: RunView) -> list[Event]:
    """Return what a whole run has."""
    if run.kind != MESSAGES:
        return [(NOTES[run.kind], run.position)]
    loaded, whole = load_run(data, run)
    assert whole
    assert len(loaded) == run.messages
    assert [number for number, _ in loaded] == [*range(run.position, run.position + run.messages)], "each has its position"
    return [("message", number) for number, _ in loaded]


def merged(story: Iterable[Event]) -> list[Event]:
    """Join the notes of one kind that follow each other, as a single one means the same."""
    result: list[Event] = []
    for kind, number in story:
        if result and kind in ("gap", "skipped") and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + number)
        else:
            result.append((kind, number))
    return result


def emptied(backlog: Backlog) -> list[Event]:
    """Return all that comes out of a backlog whose reader reads at once."""
    data = b""
    while not backlog.is_empty:
        backlog.pipe = 0
        data += (part := backlog.to_write())
        backlog.wrote(len(part))
    return [event for run in views(data) for event in events(data, run)]


WAITING, DELIVERED, MISSED = "waiting", "delivered", "missed"


class Plain:
    """What a backlog should do, in the simplest manner: one entry for each message that was published to it."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.fates: list[str] = []
        self.charges: list[int] = []
        self.waiting: list[int] = []  # the numbers of those that wait
        self.begun = 0  # how many of those that wait are in a run that is partly in the pipe
        self.pipe = 0
        self.overflowed = False

    @property
    def waiting_charge(self) -> int:
        return sum(self.charges[number] for number in self.waiting)

    def publish(self, charge: int) -> None:
        self.waiting.append(len(self.fates))
        self.fates.append(WAITING)
        self.charges.append(charge)

    def leave(self, index: int, fate: str) -> None:
        self.fates[self.waiting.pop(index)] = fate

    def fitting(self, charges: list[int]) -> int:
        """Return how many of the first fit. A single message may be larger than the capacity."""
        total = self.waiting_charge + self.pipe
        for count, charge in enumerate(charges):
            total += charge
            if total > self.capacity and (self.waiting or count or self.pipe > 1):
                return count
        return len(charges)

    def put(self, charges: list[int]) -> None:
        fits = self.fitting(charges)
        for index, charge in enumerate(charges):
            if self.policy == "latest":
                while len(self.waiting) > self.begun:
                    self.leave(self.begun, MISSED)
            if self.overflowed:
                return
            self.publish(charge)
            if self.policy in ("drop_newest", "disconnect") and index >= fits:
                self.leave(-1, MISSED)
                self.overflowed = self.policy == "disconnect"
        while self.policy == "drop_oldest" and len(self.waiting) > self.begun:
            if self.waiting_charge + self.pipe <= self.capacity or (len(self.waiting) == 1 and self.pipe <= 1):
                return
            self.leave(self.begun, MISSED)

    def story(self) -> list[Event]:
        """Return what the reader gets up to a clean end, once nothing waits."""
        found: list[Event] = []
        for number, fate in enumerate(self.fates):
            if fate == DELIVERED:
                found.append(("message", number))
            elif self.policy == "disconnect":
                found.append(("overflowed", 1))
            else:
                found.append(("skipped" if self.policy == "latest" else "gap", 1))
        return [*merged(found), ("end", 0)]


class Trial:
    """Publishes to a backlog, moves it into a pipe as the kernel would, and reads from that."""

    def __init__(self, policy: str, choose: Random) -> None:
        self.policy = policy
        self.account = Account()
        self.backlog = new_backlog(choose.choice([1, 3000, 10_000, 30_000, 100_000, 300_000]), policy)
        self.backlog.pipe_size = self.pipe_size = choose.choice([1, 2, 16, 16]) * PIPE_BUF
        self.plain = Plain(policy, self.backlog.capacity)
        self.unread = 0
        self.written = 0
        self.parsed = 0  # up to where the runs in the pipe have been looked at
        self.tail = b""  # what was written behind that
        self.is_divided = False  # a run that was divided counts whole in the account
        self.received: list[Event] = []
        self.in_pipe: list[int] = []  # where the runs of messages end that are in the pipe
        self.promised: list[tuple[int, int]] = []  # once so many have left, nothing of the first so many waits

    def put(self, sizes: list[int]) -> None:
        backlog, plain = self.backlog, self.plain
        first = len(plain.fates)
        charges = [charge_of(number, size) for number, size in enumerate(sizes, first)]
        fits = backlog.fitting(messages(first, sizes))
        assert fits == plain.fitting(charges)
        if self.policy == "block":
            sizes, charges = sizes[:fits], charges[:fits]
            if not fits:
                return
        self.is_divided |= len(sizes) > MOST_AT_ONCE
        before, left = backlog.charge, backlog.departed
        entered = backlog.put(messages(first, sizes, self.account))
        plain.put(charges)
        assert entered == (backlog.entered if plain.waiting and plain.waiting[-1] >= first else 0)
        self.promised.append((backlog.entered, len(plain.fates)))
        assert backlog.departed >= left
        assert backlog.overflowed == backlog.ended == plain.overflowed
        if self.policy != "latest":
            assert backlog.charge <= max(backlog.capacity, before) or (backlog.waiting == 1 and backlog.pipe <= 1)

    def write(self, optimism: int) -> None:
        """Move into the pipe what it has room for, the less of it the worse its pages are used."""
        backlog, plain = self.backlog, self.plain
        if backlog.drops:
            self.refresh()
            waits = self.unread > 0 and bool(plain.waiting) and not self.tail
            assert backlog.needs_empty_pipe == (waits and self.policy == "latest")
            if backlog.needs_empty_pipe:
                return
        is_empty = backlog.is_empty
        data = bytes(backlog.to_write())
        assert is_empty == (not data)
        least = max(0, self.pipe_size - 2 * self.unread - 2 * PIPE_BUF) if backlog.drops else 0
        room = max(least, (self.pipe_size - self.unread) * optimism // 100, 0 if self.unread else PIPE_BUF)
        taken = len(data) if len(data) <= room else room if len(data) > PIPE_BUF else 0
        if taken:
            backlog.wrote(taken)
        plain.pipe += taken
        self.unread += taken
        self.written += taken
        self.follow(data, taken)

    def follow(self, data: bytes, taken: int) -> None:
        """Look at what was offered to the pipe, and at how much it took."""
        plain = self.plain
        offered, whole = self.tail + data, len(self.tail) + taken
        position = plain.begun = 0
        for run in views(offered):
            end = position + run.size
            if position >= whole:
                break
            if run.kind == MESSAGES and position >= len(self.tail):
                self.in_pipe.append(self.parsed + end)
            if end > whole:
                plain.begun = run.messages if run.kind == MESSAGES else 0
                assert plain.begun <= 1 or not self.backlog.drops
                break
            found = events(offered[:end], run)
            if run.kind == MESSAGES:
                assert found == [("message", number) for number in plain.waiting[: run.messages]]
                for _ in found:
                    plain.leave(0, DELIVERED)
            self.received += found
            position = end
        self.tail = offered[position:whole]
        self.parsed += position

    def read(self, share: int, keeps_one: bool) -> None:
        """Read some of what is in the pipe, or all but the last byte."""
        self.unread -= min(-(-self.unread * share // 100), max(0, self.unread - keeps_one))

    def refresh(self) -> None:
        """Report to the backlog how much of the pipe is unread."""
        self.backlog.pipe = self.plain.pipe = self.unread

    def check(self) -> None:
        """Check that each message is at one position, the sums are right, and at most one run of ``latest`` is in the pipe."""
        backlog, plain = self.backlog, self.plain
        assert backlog.published == len(plain.fates)
        assert backlog.delivered == plain.fates.count(DELIVERED)
        assert backlog.missed == plain.fates.count(MISSED)
        assert backlog.departed == backlog.delivered or self.policy != "block"
        assert backlog.waiting == len(plain.waiting)
        assert backlog.waiting_charge == plain.waiting_charge <= self.account.held
        assert self.is_divided or self.account.held == plain.waiting_charge
        assert backlog.pipe == plain.pipe
        assert backlog.charge == plain.waiting_charge + plain.pipe
        for left, published in self.promised:
            assert (backlog.departed >= left) == (WAITING not in plain.fates[:published])
        self.promised = [one for one in self.promised if backlog.departed < one[0]]
        self.in_pipe = [end for end in self.in_pipe if end > self.written - self.unread]
        assert self.policy != "latest" or len(self.in_pipe) <= 1

    def finish(self) -> None:
        self.backlog.end()
        self.backlog.end()
        while not self.backlog.is_empty:
            self.unread = 0
            self.write(100)
            self.check()
        assert (self.backlog.waiting, self.account.held) == (0, 0)
        assert merged(self.received) == self.plain.story()


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_does_what_a_plain_list_does(policy: str) -> None:
    """Whatever is put, written and read, in any order, a backlog counts, keeps, drops and reports what the list does."""
    for seed in range(120):
        choose = Random(seed)
        trial = Trial(policy, choose)
        for _ in range(choose.randint(1, 60)):
            kind = choose.choice(["put", "put", "put", "write", "write", "write", "read", "read", "refresh"])
            if kind == "put" and not trial.backlog.ended:
                sizes = choose.choices([0, 1, 50, 300, 1000, 3000, 4000, 5000, 6000], k=choose.randint(1, 4))
                count = choose.choice([1, 1, 1, 2, 2, 5, 5, 40, 40, 3 * MOST_AT_ONCE])
                trial.put(choose.choices(sizes if count < MOST_AT_ONCE else [0, 1, 50], k=count))
            elif kind == "write":
                trial.write(choose.randint(0, 100))
            elif kind == "read":
                trial.read(choose.choice([10, 50, 100, 100]), choose.random() < 0.3)
            else:
                trial.refresh()
            trial.check()
        trial.finish()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_comes_before_what_is_published_meanwhile(policy: str) -> None:
    """It is put newest first, and cut when the backlog is full, or what would follow was dropped: so nothing is missing between
    the two, and what is published afterwards counts as if there were no replay."""
    for seed in range(200):
        choose = Random(seed)
        first, last, entered, is_cut = 100, 100, 0, False
        backlog = new_backlog(choose.choice((1, 10 * charge_of(100, 100))), policy)
        for _ in range(choose.randint(1, 12)):
            sizes, before = choose.choices(choose.choice(([100], [0, 100])), k=choose.randint(1, 4)), backlog.published
            if choose.random() < 0.6 and not is_cut:
                charges = [charge_of(100, size) for size in sizes]
                room, least = backlog.capacity - backlog.charge, 0 if backlog.waiting else 1
                fits = max(count for count in range(len(sizes) + 1) if count <= least or sum(charges[-count:]) <= room)
                fits = 0 if backlog.drops and backlog.missed else fits
                is_cut = backlog.put_first(messages(first - len(sizes), sizes)) < len(sizes)
                first -= backlog.published - before
                assert (backlog.published - before, is_cut) == (fits, fits < len(sizes))
            elif not backlog.ended and (policy != "block" or backlog.fitting(messages(last, sizes)) == len(sizes)):
                entered = backlog.put(messages(last, sizes)) or entered
                last += backlog.published - before
        has_left, position = backlog.departed >= entered, first
        assert backlog.published == last - first == backlog.waiting + backlog.missed
        for kind, number in emptied(backlog):
            assert number == position or kind != "message"
            assert position < 100 or not has_left
            position += 1 if kind == "message" else number
        assert position == last


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_missing_at_the_beginning_is_reported_once(policy: str, is_exact: bool) -> None:
    """In front of all that waits, with what is dropped there before it is written; under ``latest``, a number is not raised."""
    for seed in range(200):
        choose = Random(seed)
        backlog, last, gap = new_backlog(10 * charge_of(100, 100), policy), 100, choose.randint(is_exact, 5)
        kept = backlog.put_first(messages(100 - (count := choose.randint(1, 4)), [100] * (1 if policy == "latest" else count)))
        at = choose.randrange(12)
        for step in range(12):
            sizes = [100] * choose.randint(1, 4)
            if step == at:
                backlog.put_gap_first(gap, is_exact=is_exact)
            elif not backlog.ended and (policy != "block" or backlog.fitting(messages(last, sizes)) == len(sizes)):
                before = backlog.published
                backlog.put(messages(last, sizes))
                last += backlog.published - before
        assert backlog.published == gap + kept + last - 100 == backlog.missed + backlog.waiting
        data = b""
        while not backlog.is_empty:
            backlog.pipe = 0
            data += (part := backlog.to_write())
            backlog.wrote(len(part))
        found = [(NOTES.get(run.kind), run.image, run.position) for run in views(data)]
        assert found[0][:2] == ("skipped" if policy == "latest" and is_exact else "gap", not is_exact)
        assert not [one for one in found[1:] if one[0] and policy in ("block", "drop_oldest", "latest")]
        assert not [one for one in found[1:] if one[1]]
        numbers = [number for run in views(data) for kind, number in events(data, run) if kind == "message"]
        assert len(numbers) == backlog.delivered
        assert sum(number for kind, _, number in found if kind) == backlog.missed
        if policy in ("drop_oldest", "latest"):
            assert numbers == [*range(last - len(numbers), last)]


def test_another_policy_takes_over() -> None:
    """A gap that is not reported is reported by the same policy only."""
    for policy, reported in (("drop_oldest", [("gap", 2)]), ("drop_newest", []), ("latest", [])):
        backlog = new_backlog(charge_of(0, 100), "drop_oldest")
        backlog.put(messages(0, [100] * 3))
        backlog = with_policy(policy, backlog)
        assert (backlog.policy, emptied(backlog)) == (policy, [*reported, ("message", 2)])


def test_a_run_counts_once_for_as_long_as_it_is_there() -> None:
    """Its bytes count once, until it has left the last backlog that it is in, whole or in parts."""
    account = Account()
    keeps, drops = new_backlog(100_000), new_backlog(10 * charge_of(0, 100), "drop_oldest")
    for first, count in ((0, 10), (10, 3)):
        run = messages(first, [100] * count, account)
        assert account.held == (first + count) * charge_of(0, 100)
        keeps.put(run)
        drops.put(run)
        del run
    assert drops.waiting_charge == 10 * charge_of(0, 100)
    assert keeps.waiting_charge == 13 * charge_of(0, 100)
    assert account.held == 20 * charge_of(0, 100)  # all of the first run, what is left of it, and the second
    assert emptied(drops) == [("gap", 3), *(("message", number) for number in range(3, 13))]
    assert account.held == keeps.waiting_charge
    keeps.discard()
    assert account.held == 0


def test_dropping_one_by_one_does_not_go_through_everything_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of ten thousand drops from long runs grows hardly faster than their number."""
    looked_at: list[int] = []

    def counted(original: Any) -> Any:
        def count_and_call(run: Run, *args: Any) -> Any:
            looked_at.append(run.count)
            return original(run, *args)

        return count_and_call

    for name in ("charges", "part"):
        monkeypatch.setattr(Run, name, counted(getattr(Run, name)))
    count = 10 * MOST_TOGETHER
    backlog = new_backlog(count * charge_of(0, 0), "drop_oldest")
    for size in (MOST_TOGETHER, 1):
        run = run_of(batch_of([(0, b"")] * size), 1)
        for _ in range(count // size):
            backlog.put(run)
    assert (backlog.missed, backlog.waiting) == (count, count)
    assert sum(looked_at) < 1.2 * MOST_AT_ONCE * count


def plain_run(count: int = 1, size: int = 100) -> Run:
    """Return a run of messages of exactly so many bytes."""
    frame = frame_head(size, b"") + bytes(size)
    return run_of(Batch(frame * count, array("I", [len(frame)] * count), b"", 0, 8), 1)


def test_a_capacity_can_be_used_to_its_last_byte() -> None:
    """What fits exactly is taken; what the pipe refers to in shared memory counts as what is in it does."""
    run = plain_run()
    for pipe, referred, more, takes in ((0, 0, 0, True), (0, 0, 1, False), (1, 0, 0, False), (0, 1, 0, False)):
        backlog = new_backlog(run.charge)
        backlog.pipe, backlog.referred = pipe, referred
        assert (backlog.takes(run.charge + more), backlog.charge) == (takes, pipe + referred)
    assert [new_backlog(2 * run.charge - more).fitting(plain_run(3)) for more in (0, 1)] == [2, 1]
    for unread, is_clear in ((1, True), (2, False)):
        backlog = new_backlog(1)
        backlog.pipe = unread
        assert backlog.is_clear == is_clear
    for runs in ([run, run], [plain_run(2)]):
        for more in (0, 1):
            backlog = new_backlog(2 * run.charge - more, "drop_oldest")
            for each in runs:
                backlog.put(each)
            assert (backlog.missed, backlog.departed) == (more, more * (len(runs) - 1))  # the first one is dropped


def test_what_is_passed_on_counts_as_what_has_waited() -> None:
    put, passed, run = new_backlog(1 << 20), new_backlog(1 << 20), plain_run()
    for _ in range(2):
        put.put(run)
        put.wrote(run.size)
        passed.passed_on(run.size)
    assert vars(put) == vars(passed)


TINY = len(plain_run(MOST_AT_ONCE, 1).data)


@pytest.mark.parametrize(
    ("size", "limits", "wasted"),
    [
        (1, [50_000, 30 * TINY, 30 * TINY + 24], TINY),  # 24: less than the note of a gap
        (100, range(9000, 9112), 8 + 100 + 4),
    ],
)
def test_many_messages_are_cut_to_what_the_pipe_takes_for_certain(size: int, limits: Iterable[int], wasted: int) -> None:
    """Their heads and the table of their lengths count, too. What is never dropped need not be cut."""
    run = plain_run(20_000 // size, size)
    for limit in limits:
        for policy, capacity in (("drop_oldest", 1 << 24), ("drop_oldest", run.charge), ("block", 1 << 24)):
            backlog = new_backlog(capacity, policy)
            backlog.pipe_size = limit + 2 * PIPE_BUF
            backlog.put(run)
            backlog.put(run)  # over the first one, or not
            if policy == "block":
                assert bytes(backlog.to_write()).startswith(run.data)
            else:
                assert 0 <= limit - len(backlog.to_write()) < wasted


def test_what_is_behind_a_part_of_a_long_run_can_be_dropped() -> None:
    """Another policy has left the part: one that drops does not write so much that a pipe takes only a part of it."""
    run = plain_run(4 * MOST_AT_ONCE, 1)
    backlog = new_backlog(run.charge)
    backlog.put(run)
    backlog.wrote(run.first + 1)
    assert (backlog.delivered, backlog.waiting, backlog.departed) == (MOST_AT_ONCE, 3 * MOST_AT_ONCE, MOST_AT_ONCE)
    backlog = with_policy("drop_oldest", backlog)
    backlog.pipe = run.charge
    backlog.put(plain_run())
    assert (backlog.missed, backlog.waiting) == (2 * MOST_AT_ONCE + 1, MOST_AT_ONCE)


def test_a_gap_that_is_partly_written_stays_as_it_is() -> None:
    """What is dropped while the note of a gap is half in the pipe gets one note of its own."""
    backlog = new_backlog(plain_run().charge, "drop_newest")
    written = b""
    for dropped, size in (((0,), None), ((1, 1), 5), ((3, 4), None)):
        for count in dropped:
            backlog.put(plain_run(count or 1))
        written += (part := bytes(backlog.to_write())[:size])
        backlog.wrote(len(part))
        backlog.pipe = backlog.capacity
    while not backlog.is_empty:
        written += (part := bytes(backlog.to_write()))
        backlog.wrote(len(part))
    assert [(run.kind, run.position) for run in views(written)] == [(MESSAGES, 1), (GAP, 2), (GAP, 7)]


def in_memory(ring: int) -> SharedRun:
    """Return the run of a message in shared memory, which may belong to a ring."""
    copy = bytes(plain_run().data[RUN.size : -1])
    copied = Batch(copy, array("I", [len(copy)]), b"", 0, 8)
    hold = SimpleNamespace(
        data=lambda item, position: memory_run(item, position, 1), copied=lambda _: copied, copies=None, ring=ring
    )
    return SharedRun(MemfdMessage(7, 100, b"", 0, frame_head(100, b""), False, hold), 1)


def test_a_message_in_memory_is_not_written_with_what_comes_before() -> None:
    """Its descriptor has to be sent before its run: so that is never joined to another one."""
    backlog = new_backlog(1 << 20)
    runs = [plain_run(), in_memory(1), plain_run()]
    for run in runs:
        backlog.put(run)
    for run in runs:
        assert (backlog.to_write(), backlog.runs[0].hold) == (run.data, run.hold)
        backlog.wrote(len(run.data))


def test_what_is_copied_out_is_written_as_it_would_have_been() -> None:
    """All that waits in one ring, or what comes next; nothing else."""
    backlog, plain = new_backlog(1 << 20), plain_run()
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


def test_a_long_message_is_read_no_further_than_its_end() -> None:
    """Its memory may be longer, as it is written again for messages of other lengths."""
    memory = SimpleNamespace(read=lambda _, size: bytes(size), copies=None)
    run = LongRun(MemfdMessage(1, PART + 10, b"", 0, frame_head(PART + 10, b""), False), 1, memory)
    written, sizes = 0, []
    while written < run.size:
        sizes.append(len(run.rest(written)))
        written += sizes[-1]
    assert (sizes[1:], written) == ([PART, 10, 1], run.size)


def test_two_messages_at_the_end_of_a_long_run_have_a_table() -> None:
    batch = batch_of([0] * (MOST_AT_ONCE + 2))
    run = run_of(batch, 7)
    view = read_run(bytes(run.data), run.first)
    assert view is not None
    assert (view.position, view.messages, view.sizes) == (7 + MOST_AT_ONCE, 2, batch.sizes[:2])
