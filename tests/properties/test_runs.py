"""Runs, which the broker writes to channels, and what a channel takes out of them, however they are cut."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable
from io import BytesIO
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpbroadcast.client.pipe_reader import END_OF_MESSAGES, Stream, decode
from mpbroadcast.errors import Lagged, Overflowed
from mpbroadcast.protocol.frames import (
    FRAME_OVERHEAD,
    IMAGE,
    OVERHEAD,
    PIPE_BUF,
    MemfdMessage,
    References,
    Splitter,
    frame_head,
    memory_frame,
    reference_frame,
    references_in,
    topic_of,
)
from mpbroadcast.protocol.pickling import Failure, load_each, load_run, loads
from mpbroadcast.protocol.runs import (
    END,
    GAP,
    IN_MEMORY,
    MESSAGES,
    MOST_AT_ONCE,
    OVERFLOWED,
    REFERENCES,
    RING_GONE,
    RING_OFFERED,
    RUN,
    SKIPPED,
    Account,
    Run,
    RunView,
    SharedRun,
    memory_run,
    note,
    note_run,
    read_memory,
    read_references,
    read_run,
    references_run,
    run_of,
)
from tests.support.frames_made import EXCLUDED, SHARED_SIZES, STEADY, TOPICS, WAYS, Unloadable, batch_of, chunks
from tests.support.helpers import pattern

VALUES = st.lists(st.integers() | st.text("ab", max_size=20) | st.binary(max_size=100) | st.none(), min_size=1, max_size=20)


def view_of(data: bytes) -> RunView:
    """The head of a run that is all of ``data``."""
    view = read_run(b"before" + data + b"behind", 6)
    assert view is not None
    assert view.size == len(data)
    return view._replace(first=view.first - 6)


# --------------------------------------------------------------------------------------------------------------- runs


@STEADY
@given(values=VALUES, topic=TOPICS, exclude=EXCLUDED, data=st.data())
def test_a_run_and_each_part_of_it_carries_its_messages(
    values: list[Any], topic: bytes, exclude: int, data: st.DataObject
) -> None:
    """What was published comes out of a run, of any slice of it, and of a slice of that; it counts what a batch does."""
    batch = batch_of(values, topic, exclude)
    run = run_of(batch)
    assert run.charges() == [size + OVERHEAD for size in batch.sizes]
    for _ in range(3):
        view = view_of(bytes(run.data))
        assert load_run(bytes(run.data), view) == (values, True)
        assert (view.kind, view.messages) == (MESSAGES, len(values))
        assert topic_of(bytes(run.data[view.first : view.first + view.skip])) == topic.decode()
        assert (run.count, run.charge, run.missed) == (len(values), sum(run.charges()), 0)
        assert run.part(0, run.count) is run
        start = data.draw(st.integers(0, run.count - 1))
        stop = data.draw(st.integers(start + 1, run.count))
        part = run.part(start, stop)
        assert part.charges() == run.charges()[start:stop]
        run, values = part, values[start:stop]


def test_a_run_is_read_as_far_as_it_is_there() -> None:
    """Of a run that is cut anywhere, nothing is said before its head is whole, and then its right size."""
    for run in (run_of(batch_of([1])), run_of(batch_of(range(5), b"t")), note_run(GAP, 7), note_run(END)):
        for length in range(len(run.data)):
            view = read_run(bytes(run.data[:length]), 0)
            assert (view is None) == (length < RUN.size)
            assert view is None or view.size == len(run.data)
            assert view is None or (view.sizes is not None) == (run.count > 1 and length >= RUN.size + 4 * run.count)
            assert view is None or run.count or view.messages == (run.missed if length >= len(run.data) - 1 else 0)
            assert read_run(bytes(run.data), len(bytes(run.data)) - length) is None or length >= RUN.size


@pytest.mark.parametrize("kind", [END, GAP, SKIPPED, OVERFLOWED, RING_OFFERED, RING_GONE])
def test_a_note_says_its_kind_and_number(kind: int) -> None:
    """A note is a run without messages, which counts nothing against a capacity."""
    for missed in (0, 1, 2**64 - 1):
        run = note_run(kind, missed)
        assert view_of(bytes(run.data)) == (len(bytes(run.data)), kind, missed, False, 0, None, RUN.size)
        assert run.data == note(kind, missed) == struct.pack("<QIBBHQ", len(run.data), 0, kind, 0, 0, missed) + b"\n"
        assert (run.count, run.charge, run.missed) == (0, 0, missed)


# --------------------------------------------------------------------------------------------- messages in shared memory


@STEADY
@given(
    way=WAYS,
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20),
    ring=st.integers(0, 2**32 - 1),
)
def test_references_are_written_read_and_copied(way: tuple[bytes, int, bool], lengths: list[int], ring: int) -> None:
    """In a run, they are what the channel reads; copied, they are ordinary messages; so is each part, and counts once."""
    topic, exclude, image = way
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
        data = references_run(item, ring)
        assert len(data) <= PIPE_BUF
        view = view_of(data)
        assert (view.kind, view.messages, view.image, view.skip) == (REFERENCES, len(item.sizes), image, item.skip)
        assert read_references(data, view) == (ring, item.frames)
        assert topic_of(data[view.first : view.first + view.skip]) == topic.decode()
        batch = item.copied(memoryview(memory))
        assert (batch.sizes, batch.charge, batch.image, batch.exclude) == (item.sizes, item.charge, image, exclude)
        copies = [head + memory[start : start + size] for head, (start, size) in zip(head[own], positions[own], strict=True)]
        assert batch.frames == b"".join(copies)
        check_shared_run(item, ring, memory)
    assert done == len(lengths)


def check_shared_run(item: References, ring: int, memory: bytes) -> None:
    """Each part of it is a run of its own, and its copy counts once, however often it is asked for."""
    account, copies = Account(), Account()
    hold = SimpleNamespace(
        data=lambda item: references_run(item, ring), copied=lambda item: item.copied(memoryview(memory)), copies=copies
    )
    run = SharedRun(item._replace(hold=hold), account)
    plain = run_of(item.copied(memoryview(memory)))
    positions = [*item.positions()]
    assert (run.count, run.charge, run.missed, account.held) == (len(positions), item.charge, 0, item.charge)
    assert run.charges() == [size + FRAME_OVERHEAD - 8 for size in item.sizes]
    for start in range(run.count):
        for stop in {start + 1, run.count}:
            part = run.part(start, stop)
            assert isinstance(part, SharedRun)
            assert isinstance(part.item, References)
            assert [*part.item.positions()] == positions[start:stop]
            assert (part is run) == (part.count == run.count)
            assert part is run or account.held == item.charge + part.charge
            assert part.copied().data == plain.part(start, stop).data
    del part
    assert run.copied() is run.copied()
    assert (copies.held, account.held) == (plain.charge, item.charge)


@STEADY
@given(way=WAYS, length=SHARED_SIZES, ids=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_a_message_in_memory_is_written_read_and_copied(
    way: tuple[bytes, int, bool], length: int, ids: tuple[int, int]
) -> None:
    """A message in memory of its own keeps its topic, exclusion, kind and charge; its run says where it is."""
    topic, exclude, image = way
    (message,) = Splitter().split(memory_frame(ids[0], length, topic, exclude, image))
    assert isinstance(message, MemfdMessage)
    assert (message.id, message.length, message.topic, message.exclude, message.image) == (ids[0], length, *way)
    data = memory_run(message, ids[1])
    view = view_of(data)
    assert (view.kind, view.messages, view.image) == (IN_MEMORY, 1, image)
    assert read_memory(data, view) == (ids[1], length)
    if length < 10_000:
        payload = pattern(1, length)
        batch = message.copied(payload)
        assert (batch.charge, batch.image) == (message.charge, image)
        assert batch.frames == frame_head(length, topic, exclude, IMAGE if image else 0) + payload


# --------------------------------------------------------------------------------------- one that cannot be unpickled


@pytest.mark.parametrize("error", [ValueError, StopIteration, EOFError])
def test_one_that_cannot_be_unpickled_stands_in_its_place(error: type[Exception]) -> None:
    """Those before it and behind it are there, wherever it stands, and whatever it raises."""
    for count, place in [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)]:
        values: list[Any] = list(range(count))
        values[place] = Unloadable(error)
        run = run_of(batch_of(values))
        messages, whole = load_run(bytes(run.data), view_of(bytes(run.data)))
        assert not whole
        assert isinstance(messages[place], Failure)
        found = messages[place].error
        if error is not ValueError:  # iteration would take it for its own
            assert isinstance(found, RuntimeError)
            found = found.__cause__
        assert isinstance(found, error)
        del messages[place], values[place]
        assert messages == values


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_interrupt_that_is_an_exception_is_no_bad_message(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler's exception that comes before a message is even read goes through, and then all can be loaded again."""

    class Interrupted(BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            Interrupted.reads += 1
            if Interrupted.reads == place + 1:
                raise ValueError("of a signal's handler")
            return super().read(size)

    monkeypatch.setattr("mpbroadcast.protocol.pickling.BytesIO", Interrupted)
    run = run_of(batch_of([10, 11, 12, 13]))
    with pytest.raises(ValueError, match="handler"):
        load_run(bytes(run.data), view_of(bytes(run.data)))
    assert load_run(bytes(run.data), view_of(bytes(run.data))) == ([10, 11, 12, 13], True)


# ------------------------------------------------------------------------------------------------- what a channel does


def received(parts: Iterable[tuple[bytes, bool]], *, with_topic: bool = False) -> tuple[list[Any], int]:
    """What a channel hands out of chunks, each with whether a byte more is in the pipe; and how many were skipped."""
    stream = Stream()
    items: list[Any] = []
    skipped = 0
    for part, held in parts:
        if part:
            stream.chunks.append(part)
        after = decode(stream, held, with_topic)
        if after is None and held:
            continue  # a channel would take in that byte, too
        while after is not None:
            assert after.ready
            skipped += after.skipped
            items += after.ready
            assert after.plain == (not any(isinstance(item, Failure) or item is END_OF_MESSAGES for item in after.ready))
            assert not after.plain or after.split(None)[0] == [*after.ready]
            after.ready.clear()
            stream = after
            after = decode(stream, held, with_topic) if stream.decodable(held) else None
    return items, skipped


def comparable(items: Iterable[Any]) -> list[Any]:
    """Items in a form that can be compared."""
    result: list[Any] = []
    for item in items:
        if isinstance(item, Failure):
            missed = item.error.missed if isinstance(item.error, Lagged) else 0
            result.append((type(item.error).__name__, missed))
        else:
            result.append("end" if item is END_OF_MESSAGES else item)
    return result


def test_long_runs_are_decoded_in_parts() -> None:
    """A few messages at a time, with bad ones in their places, and without copying the rest each time."""
    values: list[Any] = list(range(1000))
    values[130] = Unloadable(ValueError)
    first = [run_of(batch_of(values[start : start + 125], b"t")).data for start in range(0, 1000, 125)]
    data = b"".join((*first, note_run(SKIPPED, 3).data, *(run_of(batch_of(values[:10])).data for _ in range(27))))
    stream, items, skipped = Stream(chunks=[data]), list[Any](), 0
    while (after := decode(stream, False, False)) is not None:
        assert len(after.ready) < MOST_AT_ONCE + 125
        assert not after.decodable(False) or after.chunks[0] is data
        items += after.ready
        skipped += after.skipped
        after.ready.clear()
        stream = after
    assert skipped == 3
    values[130] = ("ValueError", 0)
    assert comparable(items) == [*values, *values[:10] * 27]


RUNS: list[tuple[Run, list[Any]]] = [
    (run_of(batch_of([0])), [0]),
    (run_of(batch_of([1, 2, 3])), [1, 2, 3]),
    (note_run(GAP, 4), [("Lagged", 4)]),
    (note_run(SKIPPED, 5), []),
    (run_of(batch_of([4])), [4]),
    (note_run(OVERFLOWED, 1), [("Overflowed", 0)]),
    (note_run(END), ["end"]),
]
STREAM = b"".join(run.data for run, _ in RUNS)
ITEMS = [item for _, items in RUNS for item in items]


@pytest.mark.parametrize("held", [False, True])
def test_any_two_cuts_give_each_message_once(held: bool) -> None:
    """Cut into three chunks anywhere, with or without a byte left in the pipe, each comes once and in order."""
    for first in range(len(STREAM)):
        for second in range(first, len(STREAM), 3):
            parts = [(STREAM[:first], held), (STREAM[first:second], held), (STREAM[second:], False)]
            items, skipped = received(parts)
            assert (comparable(items), skipped) == (ITEMS, 5)
    assert isinstance(items[-2].error, Overflowed)


@pytest.mark.parametrize("held", [False, True])
def test_nothing_is_given_before_it_is_whole(held: bool) -> None:
    """From a beginning come the runs that are whole in it, a byte in the pipe counted in, and no others."""
    ends = [sum(len(run.data) for run, _ in RUNS[: index + 1]) for index in range(len(RUNS))]
    for length in range(len(STREAM) + (not held)):
        whole = [items for (_, items), end in zip(RUNS, ends, strict=True) if end <= length + held]
        assert comparable(received([(STREAM[:length], held)])[0]) == [item for own in whole for item in own]


@STEADY
@given(
    lists=st.lists(st.tuples(TOPICS, VALUES), min_size=1, max_size=5),
    lengths=st.lists(st.tuples(st.integers(0, 60) | st.integers(0, 3000), st.booleans()), max_size=20),
    with_topic=st.booleans(),
)
def test_any_cutting_gives_each_message_once(
    lists: list[tuple[bytes, list[Any]]], lengths: list[tuple[int, bool]], with_topic: bool
) -> None:
    """However a stream of runs is cut, each message comes once and in order, with its topic where that is wanted."""
    data = b"".join(run_of(batch_of(values, topic)).data for topic, values in lists)
    position = 0
    fed: list[tuple[bytes, bool]] = []
    for part, held in zip(
        chunks(data, [length for length, _ in lengths]), [*(held for _, held in lengths), False], strict=True
    ):
        position += len(part)
        fed.append((part, held and position < len(data)))
    expected = [(topic.decode(), value) if with_topic else value for topic, values in lists for value in values]
    assert received(fed, with_topic=with_topic) == (expected, 0)


def test_streams_of_many_chunks_cut_at_random() -> None:
    """A long stream, cut at random into many chunks, some of them of one byte, comes out whole."""
    choose = Random(5)
    runs = [run_of(batch_of([number] * choose.choice([1, 1, 2, 30]))) for number in range(300)]
    data = b"".join(run.data for run in runs)
    parts = []
    while data:
        length = choose.choice([1, 1, 2, 16, 17, 100, 5000])
        parts.append((data[:length], length < len(data) and choose.random() < 0.5))
        data = data[length:]
    assert received(parts)[0] == [number for number, run in enumerate(runs) for _ in range(run.count)]


def test_bytes_are_not_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run of known length is not whole, more bytes of it are taken in without being put together."""
    run = run_of(batch_of([bytes(100_000)]))
    stream = Stream()
    looks = 0

    def counted(data: bytes, start: int) -> RunView | None:
        nonlocal looks
        looks += 1
        return read_run(data, start)

    monkeypatch.setattr("mpbroadcast.client.pipe_reader.read_run", counted)
    for start in range(0, len(run.data) - 1000, 1000):
        stream.chunks.append(bytes(run.data[start : start + 1000]))
        assert decode(stream, True, False) is None
    assert looks == 1
    assert stream.need == len(run.data)
    assert len(stream.chunks) > 90
    stream.chunks.append(bytes(run.data[sum(map(len, stream.chunks)) :]))
    after = decode(stream, False, False)
    assert after is not None
    assert list(after.ready) == [bytes(100_000)]
    assert not after.chunks


# ----------------------------------------------------------------------------------- what a channel does beside its pipe


class Beside:
    """What a channel has beside its pipe: one piece of memory, for a ring and for single messages."""

    def __init__(self, memory: bytes = b"", size: int = 0) -> None:
        self.memory = memory
        self.size = size  # what each run says that its messages have
        self.noted: list[tuple[int, int]] = []
        self.ends = 0

    def load_run(self, data: bytes, run: RunView) -> tuple[list[Any], bool, int]:
        positions = [read_memory(data, run)] if run.kind == IN_MEMORY else []
        if run.kind == REFERENCES:
            positions = [(offset, length) for _, offset, length in references_in(read_references(data, run)[1], run.skip)]
        return *load_each([memoryview(self.memory)[start : start + size] for start, size in positions], loads), self.size

    def note(self, kind: int, ring: int) -> None:
        self.noted.append((kind, ring))

    def acknowledge_all(self) -> None:
        self.ends += 1


def shared_run(kind: int, offset: int, length: int, count: int) -> bytes:
    """A run of ``count`` times the same message in shared memory."""
    if kind == IN_MEMORY:
        (item,) = Splitter().split(memory_frame(1, length, b"t"))
        assert isinstance(item, MemfdMessage)
        return memory_run(item, offset)
    (item,) = Splitter().split(reference_frame(1, offset, length, b"t") * count)
    assert isinstance(item, References)
    return references_run(item, 1)


@STEADY
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([MESSAGES, MESSAGES, REFERENCES, REFERENCES, IN_MEMORY, RING_OFFERED, RING_GONE, SKIPPED, GAP]),
            st.integers(1, 3),
            st.sampled_from([False, False, True]),
        ),
        max_size=8,
    ),
    last=st.sampled_from([END, OVERFLOWED]),
    with_topic=st.booleans(),
    before=st.integers(0, 9),
)
def test_messages_in_shared_memory_are_decoded_in_their_places(
    steps: list[tuple[int, int, bool]], last: int, with_topic: bool, before: int
) -> None:
    """They are counted, what is said of rings is passed on in its order, and an end is; also without any shared memory."""
    for shares in (True, False):
        data = memory = b""
        expected: list[Any] = []
        noted: list[tuple[int, int]] = []
        read = skipped = 0
        for number, (kind, count, bad) in enumerate(steps):
            value: Any = Unloadable(ValueError) if bad else number
            pickled = pickle.dumps(value)
            if kind in (RING_OFFERED, RING_GONE):
                data += note(kind, number)
                noted += [(kind, number)]
            elif kind in (SKIPPED, GAP):
                data += note_run(kind, count).data
                skipped += count * (kind == SKIPPED)
                expected += [("Lagged", count)] * (kind == GAP)
            else:
                times = 1 if kind == IN_MEMORY else count
                if kind == MESSAGES or not shares:
                    data += run_of(batch_of([value] * times, b"t")).data
                else:
                    data += shared_run(kind, len(memory), len(pickled), times)
                    memory += pickled
                    read += times
                expected += [("ValueError", 0) if bad else ("t", number) if with_topic else number] * times
        fd_socket: Any = Beside(memory) if shares else None
        after = decode(Stream(chunks=[data + note_run(last).data], read=before), False, with_topic, fd_socket)
        assert after is not None
        assert comparable(after.ready) == [*expected, "end" if last == END else ("Overflowed", 0)]
        assert (after.read, after.skipped, after.plain) == (before + read, skipped, False)
        assert fd_socket is None or (fd_socket.noted, fd_socket.ends) == (noted, last == END)
        after = decode(Stream(chunks=[data], read=before), False, with_topic, fd_socket)
        assert (after is None) == (not expected)
        assert after is None or after.plain == (not any(isinstance(item, Failure) for item in after.ready))


def test_as_much_is_decoded_at_once_as_is_soon_handed_out() -> None:
    """Until 512 KiB in shared memory, or so many messages, are there: another run is left for later."""
    runs = shared_run(REFERENCES, 0, 4, 1) * 10
    for size, count in ((1 << 18, 2), ((1 << 19) - 1, 2), (1 << 19, 1), ((1 << 19) // 3, 4)):
        shared: Any = Beside(pickle.dumps(None), size)
        after = decode(Stream(chunks=[runs]), False, False, shared)
        assert after is not None
        assert len(after.ready) == count
    runs = bytes(run_of(batch_of([0] * (MOST_AT_ONCE // 2))).data) * 5
    after = decode(Stream(chunks=[runs]), False, False)
    assert after is not None
    assert len(after.ready) == MOST_AT_ONCE
    with pytest.raises(RuntimeError, match="shared memory"):
        decode(Stream(chunks=[shared_run(IN_MEMORY, 0, 4, 1)]), False, False)
