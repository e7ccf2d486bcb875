"""Runs, which the broker writes to channels, and what a channel takes out of them, however they are cut."""

import pickle
import struct
from array import array
from collections.abc import Iterable
from io import BytesIO
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpbroadcast.client.pipe_reader import ENDED, Stream, decode
from mpbroadcast.client.received import PLAIN, WITH_ID, WITH_TOPIC, Received
from mpbroadcast.errors import Lagged
from mpbroadcast.protocol import runs
from mpbroadcast.protocol.frames import (
    FRAME_OVERHEAD,
    IMAGE,
    OVERHEAD,
    PIPE_BUF,
    MemfdMessage,
    References,
    Singles,
    frame_head,
    memory_frame,
    reference_frame,
    references_in,
    topic_of,
)
from mpbroadcast.protocol.pickling import ALL_KINDS, Failure, Loaders, load_each, load_run, loads
from mpbroadcast.protocol.splitter import Splitter
from tests.support.frames_made import EXCLUDED, ROUTES, SHARED_SIZES, STEADY, TOPICS, batch_of, chunks
from tests.support.helpers import pattern
from tests.support.workers import Raises

VALUES = st.lists(st.integers() | st.text("ab", max_size=20) | st.binary(max_size=100) | st.none(), min_size=1, max_size=20)


def data_of(run: runs.Run) -> bytes:
    return bytes(run.data)


def view_of(data: bytes) -> runs.RunView:
    view = runs.read_run(b"before" + data + b"behind", 6)
    assert view is not None
    assert view.size == len(data)
    return view._replace(first=view.first - 6)


@STEADY
@given(values=VALUES, topic=TOPICS, exclude=EXCLUDED, data=st.data())
def test_a_run_and_each_part_of_it_carries_its_messages(
    values: list[Any], topic: bytes, exclude: int, data: st.DataObject
) -> None:
    """What was published comes out of a run, of any slice of it, and of a slice of that; it counts what a batch does."""
    batch = batch_of(values, topic, exclude)
    run = runs.run_of(batch, 1000)
    position = 1000
    assert run.charges() == [size + OVERHEAD for size in batch.sizes]
    for _ in range(3):
        view = view_of(data_of(run))
        assert load_run(data_of(run), view) == (values, True)
        assert (view.kind, view.messages, view.position) == (runs.MESSAGES, len(values), position)
        assert topic_of(data_of(run)[view.first : view.first + view.skip]) == topic.decode()
        assert (run.count, run.charge, run.missed) == (len(values), sum(run.charges()), 0)
        assert run.part(0, run.count) is run
        start = data.draw(st.integers(0, run.count - 1))
        stop = data.draw(st.integers(start + 1, run.count))
        part = run.part(start, stop)
        assert part.charges() == run.charges()[start:stop]
        run, values, position = part, values[start:stop], position + start


def loaded(run: runs.Run) -> list[Any]:
    """The messages of a run that may be several, one behind the other, each of what a channel unpickles at once.

    They are numbers: each is published at the position of its number.
    """
    values: list[Any] = []
    data = data_of(run)
    while data:
        view = runs.read_run(data, 0)
        assert view is not None
        assert view.messages <= runs.MOST_AT_ONCE
        messages, whole = load_run(data[: view.size], view)
        assert whole
        assert messages[0] == view.position
        values += messages
        data = data[view.size :]
    assert len(values) == run.count
    return values


def test_a_long_run_is_cut_and_divided_anywhere() -> None:
    """Each part has its messages and charges; what is unpickled at once is never divided."""
    values, account = [*range(257)], runs.Account()  # the last one is alone
    run = runs.run_of(batch_of(values, b"t"), 0, account)
    assert loaded(run) == values
    assert run.divided(0) is run.divided(run.first - 1) is run.divided(run.size) is None
    for start, stop in ((0, 128), (1, 129), (100, 257), (127, 256), (256, 257)):
        part = run.part(start, stop)
        assert (loaded(part), part.charges()) == (values[start:stop], run.charges()[start:stop])
        assert data_of(part) == data_of(runs.run_of(batch_of(values[start:stop], b"t"), start))
    del part
    second = runs.RUN.unpack_from(run.data, run.first)[0]
    for offset, count in ((run.first, 128), (run.first + second - 1, 128), (run.first + second, 256), (run.size - 1, 256)):
        halves = run.divided(offset)
        assert halves is not None
        assert (loaded(halves[0]), loaded(halves[1])) == (values[:count], values[count:])
        assert halves[0].charges() + halves[1].charges() == run.charges()
        assert halves[0].charge + halves[1].charge == run.charge
        assert loaded(halves[0].part(5, count)) == values[5:count]
    charge = run.charge
    del run
    assert account.held == charge, "the halves still have its data"
    del halves
    assert account.held == 0
    assert runs.run_of(batch_of(range(128)), 0).divided(1 << 20) is None


def test_a_run_is_read_as_far_as_it_is_there() -> None:
    """Of a run that is cut anywhere, nothing is known before its head is whole, and then its right size."""
    for run in (
        runs.run_of(batch_of([1]), 3),
        runs.run_of(batch_of(range(5), b"t"), 3),
        runs.note_run(runs.GAP, 7),
        runs.note_run(runs.END),
    ):
        for length in range(len(data_of(run))):
            view = runs.read_run(data_of(run)[:length], 0)
            assert (view is None) == (length < runs.RUN.size)
            assert view is None or view.size == len(data_of(run))
            assert view is None or (view.sizes is not None) == (run.count > 1 and length >= runs.RUN.size + 4 * run.count)
            assert view is None or view.position == (3 if run.count else run.missed)
            assert runs.read_run(data_of(run), len(data_of(run)) - length) is None or length >= runs.RUN.size


@pytest.mark.parametrize("kind", [runs.END, runs.GAP, runs.SKIPPED, runs.OVERFLOWED, runs.RING_OFFERED, runs.RING_GONE])
def test_a_note_has_its_kind_and_number(kind: int) -> None:
    """A note is a run without messages, which counts nothing against a capacity."""
    for missed in (0, 1, 2**64 - 1):
        run = runs.note_run(kind, missed)
        assert view_of(data_of(run)) == (len(data_of(run)), kind, 0, False, 0, missed, None, runs.RUN.size)
        assert (
            data_of(run) == runs.note(kind, missed) == struct.pack("<QIBBHQ", len(data_of(run)), 0, kind, 0, 0, missed) + b"\n"
        )
        assert (run.count, run.charge, run.missed) == (0, 0, missed)
        assert (run.charges(), run.part(0, 1)) == ([0], run)


@STEADY
@given(route=ROUTES, lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20), ring=st.integers(0, 2**32 - 1))
def test_references_are_written_read_and_copied(route: tuple[bytes, int, bool], lengths: list[int], ring: int) -> None:
    """In a run, they are what the channel reads; copied, they are ordinary messages; so is each part, and counts once."""
    topic, exclude, image = route
    offsets = [sum(lengths[:index]) for index in range(len(lengths))]
    positions = [*zip(offsets, lengths, strict=True)]
    memory = pattern(1, sum(lengths))
    head = [frame_head(length, topic, exclude, IMAGE if image else 0) for length in lengths]
    frames = b"".join(reference_frame(7, offset, length, topic, exclude, image) for offset, length in positions)
    items = Splitter().split(frames)
    done = 0
    for item in items:
        assert isinstance(item, References)
        own = slice(done, done + len(item.sizes))
        done = own.stop
        data = runs.references_run(item, 9, ring)
        assert len(data) <= PIPE_BUF
        view = view_of(data)
        assert (view.kind, view.messages, view.image, view.skip) == (runs.REFERENCES, len(item.sizes), image, item.skip)
        assert view.position == 9
        assert runs.read_references(data, view) == (ring, item.frames)
        assert topic_of(data[view.first : view.first + view.skip]) == topic.decode()
        batch = item.copied(memoryview(memory))
        assert (batch.sizes, batch.charge, batch.image, batch.exclude) == (item.sizes, item.charge, image, exclude)
        copies = [head + memory[start : start + size] for head, (start, size) in zip(head[own], positions[own], strict=True)]
        assert batch.frames == b"".join(copies)
        check_shared_run(item, ring, memory)
    assert done == len(lengths)


def check_shared_run(item: References, ring: int, memory: bytes) -> None:
    """Each part of it is a run of its own, and its copy counts once, however often it is asked for."""
    account, copies = runs.Account(), runs.Account()
    hold = SimpleNamespace(
        data=lambda item, position: runs.references_run(item, position, ring),
        copied=lambda item: item.copied(memoryview(memory)),
        copies=copies,
    )
    run = runs.SharedRun(item._replace(hold=hold), 5, account)
    plain = runs.run_of(item.copied(memoryview(memory)), 5)
    positions = [*item.positions()]
    assert (run.count, run.charge, run.missed, account.held) == (len(positions), item.charge, 0, item.charge)
    assert run.charges() == [size + FRAME_OVERHEAD - 8 for size in item.sizes]
    for start in range(run.count):
        for stop in {start + 1, run.count}:
            part = run.part(start, stop)
            assert isinstance(part, runs.SharedRun)
            assert isinstance(part.item, References)
            assert [*part.item.positions()] == positions[start:stop]
            assert view_of(data_of(part)).position == 5 + start
            assert (part is run) == (part.count == run.count)
            assert part is run or account.held == item.charge + part.charge
            assert part.copied().data == plain.part(start, stop).data
    del part
    assert run.copied() is run.copied()
    assert (copies.held, account.held) == (plain.charge, item.charge)


@STEADY
@given(route=ROUTES, length=SHARED_SIZES, ids=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_a_message_in_memory_is_written_read_and_copied(
    route: tuple[bytes, int, bool], length: int, ids: tuple[int, int]
) -> None:
    """A message in memory of its own keeps its topic, exclusion, kind and charge; its run has its position."""
    topic, exclude, image = route
    (message,) = Splitter().split(memory_frame(ids[0], length, topic, exclude, image))
    assert isinstance(message, MemfdMessage)
    assert (message.id, message.length, message.topic, message.exclude, message.image) == (ids[0], length, *route)
    data = runs.memory_run(message, 9, ids[1])
    view = view_of(data)
    assert (view.kind, view.messages, view.image, view.position) == (runs.IN_MEMORY, 1, image, 9)
    assert runs.read_memory(data, view) == (ids[1], length)
    if length < 10_000:
        payload = pattern(1, length)
        batch = message.copied(payload)
        assert (batch.charge, batch.image) == (message.charge, image)
        assert batch.frames == frame_head(length, topic, exclude, IMAGE if image else 0) + payload


@pytest.mark.parametrize("most", [runs.PART, 100_003])
def test_a_long_message_in_memory_is_copied_part_by_part(most: int) -> None:
    """For a pipe that gets the message, it is read as the pipe takes it; it is the same run as one that is copied at once."""
    length = 2 * runs.PART + 5
    memory = pattern(1, length)
    (item,) = Splitter().split(memory_frame(1, length, b"t", 7, True))
    assert isinstance(item, MemfdMessage)
    copies = runs.Account()
    hold = SimpleNamespace(
        data=lambda item, position: runs.memory_run(item, position, 1),
        copies=copies,
        read=lambda offset, size: memory[offset : offset + size],
    )
    run = runs.SharedRun(item._replace(hold=hold), 6).copied()
    written = b""
    while len(written) < run.size:
        part = run.rest(len(written))
        assert 0 < len(part) <= runs.PART
        written += part[:most]
    assert written == data_of(runs.run_of(item.copied(memory), 6))
    assert (run.count, run.charge, copies.held) == (1, item.charge, item.charge)


@pytest.mark.parametrize("error", [ValueError, StopIteration, EOFError])
def test_one_that_cannot_be_unpickled_is_at_its_position(error: type[Exception]) -> None:
    """Those before it and behind it are there, wherever it stands, and whatever it raises."""
    for count, position in [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)]:
        values: list[Any] = list(range(count))
        values[position] = Raises(error())
        run = runs.run_of(batch_of(values), 0)
        messages, whole = load_run(data_of(run), view_of(data_of(run)))
        assert not whole
        assert isinstance(messages[position], Failure)
        found = messages[position].error
        if error is not ValueError:  # iteration would take it for its own
            assert isinstance(found, RuntimeError)
            found = found.__cause__
        assert isinstance(found, error)
        del messages[position], values[position]
        assert messages == values


@pytest.mark.parametrize("before", [0, 1, 3])
def test_an_interrupt_that_is_an_exception_is_no_bad_message(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler's exception that comes before a message is even read goes through, and then all can be loaded again."""

    class Interrupted(BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            Interrupted.reads += 1
            if Interrupted.reads == before + 1:
                raise ValueError("of a signal's handler")
            return super().read(size)

    monkeypatch.setattr("mpbroadcast.protocol.pickling.BytesIO", Interrupted)
    run = runs.run_of(batch_of([10, 11, 12, 13]), 10)
    with pytest.raises(ValueError, match="handler"):
        load_run(data_of(run), view_of(data_of(run)))
    assert load_run(data_of(run), view_of(data_of(run))) == ([10, 11, 12, 13], True)


def single(number: int, value: Any = None, size: int = 0) -> bytes:
    """A run of one message with a topic of its own, whose frame has ``size`` bytes if that is given."""
    topic = b"t%d" % number
    batch = batch_of([number if value is None else value], topic)
    if size:
        payload = bytes(size - batch.skip)
        batch = batch._replace(frames=frame_head(len(payload), topic) + payload, sizes=array("I", (size,)))
    return data_of(runs.run_of(batch, 1000 + number))


def changing(count: int, account: runs.Account) -> runs.SinglesRun:
    """A run of so many messages, each with a topic of its own."""
    batches = [batch_of([number], b"t%d" % number) for number in range(count)]
    singles = Singles([batch.topic for batch in batches], [batch.frames for batch in batches])
    assert singles.batches() == batches
    made = runs.single_runs(singles, 1000)
    assert made == [data_of(runs.run_of(batch, id)) for id, batch in enumerate(batches, 1000)]
    run = runs.SinglesRun(made, account)
    assert (run.count, run.charge, run.size) == (count, singles.charge, len(data_of(run)))
    assert (run.missed, run.is_gap, run.hold) == (0, False, None)
    return run


def numbers_of(run: runs.Run) -> list[int]:
    """The messages of a run of :func:`changing`, which agrees with its counts, and with the run of each message alone."""
    items = received([(data_of(run), False)], WITH_ID)[0]
    numbers = [item.message for item in items]
    assert items == [Received(1000 + number, f"t{number}", number) for number in numbers]
    alone = [runs.run_of(batch_of([number], b"t%d" % number), 1000 + number) for number in numbers]
    assert run.charges() == [own.charge for own in alone]
    assert (run.count, run.charge, run.size) == (len(alone), sum(run.charges()), sum(own.size for own in alone))
    assert [data_of(own) for own in run.singles()] == [data_of(own) for own in alone]
    return numbers


def test_a_run_of_changing_topics_is_cut_and_divided_anywhere() -> None:
    """Between any two of its messages. A part counts by itself, and halves count as the whole until both are gone."""
    account = runs.Account()
    run = changing(300, account)
    whole = run.charge
    assert numbers_of(run) == [*range(300)]
    assert run.first == sum(own.size for own in run.singles()[: runs.MOST_AT_ONCE])
    assert bytes(run.rest(77)) == data_of(run)[77:]
    assert run.part(0, 300) is run
    for start, stop in ((0, 1), (299, 300), (100, 229)):
        part = run.part(start, stop)
        assert numbers_of(part) == [*range(start, stop)]
        assert account.held == whole + part.charge
        del part
    ends = [*accumulate(own.size for own in run.singles())]
    for offset, count in ((ends[0], 1), (ends[1] - 1, 1), (ends[200], 201), (ends[299] - 1, 299)):
        halves = run.divided(offset)
        assert halves is not None
        assert [*map(numbers_of, halves)] == [[*range(count)], [*range(count, 300)]]
        del halves
    assert run.divided(0) is run.divided(ends[0] - 1) is run.divided(ends[299]) is None
    halves = run.divided(ends[99])
    assert halves is not None
    del run
    quarters = halves[1].divided(ends[149] - ends[99])
    assert quarters is not None
    assert account.held == whole
    assert numbers_of(quarters[1].part(10, 20)) == [*range(160, 170)]
    del halves
    assert account.held == whole
    del quarters
    assert account.held == 0


IMAGE_RUN: Final = runs.run_of(batch_of([3], b"t")._replace(image=True), 1003)


@pytest.mark.parametrize(
    ("behind", "count"),
    [
        (single(3, size=PIPE_BUF), 5),
        (single(3, size=PIPE_BUF + 1), 3),
        (data_of(runs.run_of(batch_of([3, 4], b"t"), 1003)), 3),
        (data_of(IMAGE_RUN), 3),
        (runs.note(runs.GAP, 1), 3),
        (runs.references_run(Splitter().split(reference_frame(1, 0, 4, b"t"))[0], 1003, 1), 3),
        (runs.memory_run(Splitter().split(memory_frame(1, 4, b"t"))[0], 1003, 1), 3),
    ],
)
def test_runs_of_one_message_are_read_up_to_one_that_is_another(behind: bytes, count: int) -> None:
    """However they are cut: those that are whole, a byte in the pipe counted in, and no more than are wanted."""
    parts = [*map(single, range(3)), behind, single(4)]
    long = bytes(PIPE_BUF - len(frame_head(0, b"t3")))
    payloads = [*map(pickle.dumps, range(3)), long, pickle.dumps(4)][:count]
    starts = [0, *accumulate(map(len, parts))]
    data = b"".join(parts[: count + 1])
    for length in range(len(data) + 1):
        for has_tail in (False, True):
            whole = sum(end <= length + has_tail for end in starts[1 : count + 1])
            found = runs.read_singles(data[:length], 0, length + has_tail, 100)
            assert found == (payloads[:whole], starts[:whole], starts[whole])
    for most in range(count + 1):
        assert runs.read_singles(b"before" + data, 6, 6 + len(data), most)[0] == payloads[:most]


@pytest.mark.parametrize("form", [PLAIN, WITH_TOPIC, WITH_ID])
def test_messages_of_changing_topics_are_decoded_together(form: int) -> None:
    """Each with its own topic and id, whatever cannot be unpickled among them, and not more at once than of one topic."""
    values: list[Any] = [*range(300)]
    for bad in (0, 5, 6, 127, 128, 299):
        values[bad] = Raises(ValueError())
    table = runs.run_of(batch_of(range(100), b"t"), 0)
    stream: Stream | None = Stream(chunks=[data_of(table) + b"".join(map(single, range(300), values))], decoded=7)
    items: list[Any] = []
    decoded = 7
    for count in (128, 128, 128, 16):
        assert stream is not None
        stream.ready.clear()
        stream = decode(stream, form)
        assert stream is not None
        decoded += count
        assert (len(stream.ready), stream.decoded) == (count, decoded)
        assert stream.plain == (not any(isinstance(item, Failure) for item in stream.ready))
        items += stream.ready
    assert stream is not None
    assert not stream.chunks
    for number, (value, item) in enumerate(zip(values, items[100:], strict=True)):
        topic = f"t{number}"
        if isinstance(value, int):
            assert item == (number, (topic, number), Received(1000 + number, topic, number))[form]
        else:
            assert comparable(item) == ("ValueError", 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_an_interrupt_among_messages_of_changing_topics_loses_none(error: type[BaseException], before: int) -> None:
    """It is raised, and then all are decoded of the same bytes."""
    interrupts: list[BaseException] = [error("of a signal's handler")]

    def load(payload: Any) -> Any:
        message = loads(payload)
        if message == before and interrupts:
            raise interrupts.pop()
        return message

    stream = Stream(chunks=[b"".join(map(single, range(5)))])
    loaders = ALL_KINDS._replace(pickle=load)
    with pytest.raises(error, match="handler"):
        decode(stream, PLAIN, None, loaders)
    after = decode(stream, PLAIN, None, loaders)
    assert after is not None
    assert [*after.ready] == [*range(5)]


class Beside:
    """What a channel has beside its pipe: one piece of memory, for a ring and for single messages."""

    def __init__(self, memory: bytes = b"", size: int = 0) -> None:
        self.memory = memory
        self.size = size  # what each run's messages are reported to have
        self.noted: dict[tuple[int, int], None] = {}  # as a decoding may be repeated
        self.ends = 0

    def load_run(self, data: bytes, run: runs.RunView, loaders: Loaders) -> tuple[list[Any], bool, int]:
        positions = [runs.read_memory(data, run)] if run.kind == runs.IN_MEMORY else []
        if run.kind == runs.REFERENCES:
            positions = [(offset, length) for _, offset, length in references_in(runs.read_references(data, run)[1], run.skip)]
        return *load_each([memoryview(self.memory)[start : start + size] for start, size in positions], loads), self.size

    def note(self, kind: int, ring: int) -> None:
        self.noted[kind, ring] = None

    def acknowledge_all(self) -> None:
        self.ends += 1


def shared_run(kind: int, offset: int, length: int, count: int, position: int = 0) -> bytes:
    """A run of ``count`` times the same message in shared memory."""
    if kind == runs.IN_MEMORY:
        (item,) = Splitter().split(memory_frame(1, length, b"t"))
        assert isinstance(item, MemfdMessage)
        return runs.memory_run(item, position, offset)
    (item,) = Splitter().split(reference_frame(1, offset, length, b"t") * count)
    assert isinstance(item, References)
    return runs.references_run(item, position, 1)


def comparable(item: Any) -> Any:
    if isinstance(item, Failure):
        return type(item.error).__name__, item.error.missed if isinstance(item.error, Lagged) else 0
    return "end" if item is ENDED else item


def received(parts: Iterable[tuple[bytes, bool]], form: int = PLAIN, beside: Any = None) -> tuple[list[Any], int, int]:
    """What a channel hands out of chunks, each with whether a byte more is in the pipe. Return this, how many messages were
    skipped, and how many were in shared memory."""
    stream = Stream()
    items: list[Any] = []
    skipped = 0
    for part, has_tail in parts:
        if part:
            stream.chunks.append(part)
        stream.has_tail = has_tail
        after = decode(stream, form, beside)
        while after is not None:
            assert after.ready
            skipped += after.skipped
            items += after.ready
            assert after.plain == (not any(isinstance(item, Failure) or item is ENDED for item in after.ready))
            assert not after.plain or after.split(None)[0] == [*after.ready]
            after.ready.clear()
            stream = after
            after = decode(stream, form, beside) if stream.is_decodable else None
    return [*map(comparable, items)], skipped, stream.read


NOTES: Final = [runs.RING_OFFERED, runs.RING_GONE, runs.SKIPPED, runs.GAP]
KINDS: Final = 2 * [runs.MESSAGES, runs.REFERENCES] + [runs.IN_MEMORY, *NOTES]


@settings(STEADY, max_examples=150)
@given(
    steps=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 3), st.sampled_from([False, False, True])), max_size=8),
    last=st.sampled_from([runs.END, runs.OVERFLOWED]),
    lengths=st.lists(st.tuples(st.integers(0, 60) | st.integers(0, 300), st.booleans()), max_size=20),
    form=st.sampled_from([PLAIN, WITH_TOPIC, WITH_ID]),
    shares=st.booleans(),
)
def test_any_cutting_gives_each_message_once(
    steps: list[tuple[int, int, bool]], last: int, lengths: list[tuple[int, bool]], form: int, shares: bool
) -> None:
    """However a stream of runs and notes is cut, each message comes once and in order, from the pipe or from shared memory."""
    data = memory = b""
    expected: list[Any] = []
    noted: list[tuple[int, int]] = []
    read = skipped = 0
    position = 1000
    for number, (kind, count, bad) in enumerate(steps):
        value: Any = Raises(ValueError()) if bad else number
        pickled = pickle.dumps(value)
        if kind in (runs.RING_OFFERED, runs.RING_GONE):
            data += runs.note(kind, number)
            noted += [(kind, number)]
        elif kind in (runs.SKIPPED, runs.GAP):
            data += data_of(runs.note_run(kind, count))
            skipped += count * (kind == runs.SKIPPED)
            expected += [("Lagged", count)] * (kind == runs.GAP)
        else:
            times = 1 if kind == runs.IN_MEMORY else count
            if kind == runs.MESSAGES or not shares:
                data += data_of(runs.run_of(batch_of([value] * times, b"t"), position))
            else:
                data += shared_run(kind, len(memory), len(pickled), times, position)
                memory += pickled
                read += times
            for id in range(position, position + times):
                expected.append(("ValueError", 0) if bad else [number, ("t", number), Received(id, "t", number)][form])
            position += times
    data += data_of(runs.note_run(last))
    expected.append("end" if last == runs.END else ("Overflowed", 0))
    parts = chunks(data, [length for length, _ in lengths])
    left = len(data)
    fed: list[tuple[bytes, bool]] = []
    for part, has_tail in zip(parts, [*(has_tail for _, has_tail in lengths), False], strict=True):
        left -= len(part)
        fed.append((part, has_tail and left > 0))
    beside = Beside(memory) if shares else None
    assert received(fed, form, beside) == (expected, skipped, read)
    assert beside is None or ([*beside.noted], beside.ends) == (noted, last == runs.END)


RUNS: list[tuple[runs.Run, list[Any]]] = [
    (runs.run_of(batch_of([0]), 0), [0]),
    (runs.run_of(batch_of([1, 2, 3]), 1), [1, 2, 3]),
    (runs.note_run(runs.GAP, 4), [("Lagged", 4)]),
    (runs.note_run(runs.SKIPPED, 5), []),
    (runs.run_of(batch_of([4]), 8), [4]),
    (runs.note_run(runs.OVERFLOWED, 1), [("Overflowed", 0)]),
    (runs.note_run(runs.END), ["end"]),
]
STREAM = b"".join(data_of(run) for run, _ in RUNS)


@pytest.mark.parametrize("has_tail", [False, True])
def test_nothing_is_given_before_it_is_whole(has_tail: bool) -> None:
    """From a beginning come the runs that are whole in it, a byte in the pipe counted in; then come the others."""
    ends = [sum(len(data_of(run)) for run, _ in RUNS[: index + 1]) for index in range(len(RUNS))]
    for length in range(len(STREAM) + (not has_tail)):
        whole = [items for (_, items), end in zip(RUNS, ends, strict=True) if end <= length + has_tail]
        first = (STREAM[:length], has_tail)
        assert received([first])[0] == [item for own in whole for item in own]
        assert received([first, (STREAM[length:], False)])[:2] == ([item for _, own in RUNS for item in own], 5)


def test_bytes_are_not_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run of known length is not whole, more bytes of it are taken in without being put together."""
    run = runs.run_of(batch_of([bytes(100_000)]), 0)
    stream = Stream(has_tail=True)
    counted = Mock(wraps=runs.read_run)
    monkeypatch.setattr("mpbroadcast.client.pipe_reader.read_run", counted)
    for start in range(0, len(data_of(run)) - 1000, 1000):
        stream.chunks.append(data_of(run)[start : start + 1000])
        assert decode(stream, False) is None
    assert counted.call_count == 1
    assert stream.need == len(data_of(run))
    assert len(stream.chunks) > 90
    stream.chunks.append(data_of(run)[sum(map(len, stream.chunks)) :])
    stream.has_tail = False
    after = decode(stream, False)
    assert after is not None
    assert list(after.ready) == [bytes(100_000)]
    assert not after.chunks


def test_as_much_is_decoded_at_once_as_is_soon_handed_out() -> None:
    """Until 512 KiB in shared memory, or so many messages, are there; the rest is left as it is, without a copy."""
    shared = shared_run(runs.REFERENCES, 0, 4, 1) * 10
    small = data_of(runs.run_of(batch_of([0] * (runs.MOST_AT_ONCE // 2)), 0)) * 5
    for data, size, count in (
        *((shared, size, count) for size, count in ((1 << 18, 2), ((1 << 19) - 1, 2), (1 << 19, 1), ((1 << 19) // 3, 4))),
        (small, 0, runs.MOST_AT_ONCE),
    ):
        beside: Any = Beside(pickle.dumps(None), size)
        after = decode(Stream(chunks=[data]), False, beside)
        assert after is not None
        assert len(after.ready) == count
        assert after.chunks[0] is data
    with pytest.raises(RuntimeError, match="shared memory"):
        decode(Stream(chunks=[shared_run(runs.IN_MEMORY, 0, 4, 1)]), False)
