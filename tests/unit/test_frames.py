"""What travels in pipes, frames from publishers and runs to channels: whole, cut anywhere, and damaged."""

from __future__ import annotations

import pickle
import struct
from array import array
from collections.abc import Iterable
from io import BytesIO
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpbroadcast.client.pipe_reader import END_OF_MESSAGES, Stream, decode
from mpbroadcast.errors import Lagged, Overflowed
from mpbroadcast.protocol.frames import (
    FRAME_OVERHEAD,
    MOST_TOGETHER,
    OVERHEAD,
    PIPE_BUF,
    Batch,
    FrameError,
    Item,
    MemfdMessage,
    References,
    Splitter,
    abort,
    frame_head,
    memory_frame,
    pieces,
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
    OVERFLOWED,
    REFERENCES,
    RING_GONE,
    RING_OFFERED,
    RUN,
    SKIPPED,
    Run,
    RunView,
    memory_run,
    note,
    note_run,
    read_memory,
    read_references,
    read_run,
    references_run,
    run_of,
)

STEADY = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Message(NamedTuple):
    """What is published: where, to whom not, and what."""

    topic: bytes
    exclude: int
    payload: bytes

    @property
    def frame(self) -> bytes:
        return frame_head(len(self.payload), self.topic, self.exclude) + self.payload


def unpacked(batches: Iterable[Item]) -> list[Message]:
    """The messages of batches, each of which must be what it says of itself."""
    found: list[Message] = []
    for batch in batches:
        assert isinstance(batch, Batch)
        assert sum(batch.sizes) == len(batch.frames)
        assert batch.charge == sum(size + OVERHEAD for size in batch.sizes)
        start = 0
        for size in batch.sizes:
            payload = batch.frames[start + batch.skip : start + size]
            found.append(Message(batch.topic, batch.exclude, payload))
            assert found[-1].frame == batch.frames[start : start + size]
            start += size
    return found


def chunks(data: bytes, lengths: Iterable[int]) -> list[bytes]:
    """``data``, cut into parts of these lengths, and the rest."""
    parts = []
    start = 0
    for length in lengths:
        parts.append(data[start : start + length])
        start += length
    return [*parts, data[start:]]


def split(parts: Iterable[bytes]) -> list[Item]:
    """What a new splitter finds in these chunks."""
    splitter = Splitter()
    return [batch for part in parts for batch in splitter.split(part)]


# ---------------------------------------------------------------------------------------------------------- splitting

TOPICS = st.sampled_from([b"", b"a", b"b", b"room:1", b"room:2", "tür".encode(), b"x" * 1024])
EXCLUDED = st.sampled_from([0, 0, 0, 1, 2**63])
SIZES = st.integers(0, 40) | st.sampled_from([1000, PIPE_BUF - 8, PIPE_BUF - 7, PIPE_BUF, 3 * PIPE_BUF, 20_000])
MESSAGES_OF_ALL_KINDS = st.builds(
    lambda topic, exclude, size, fill: Message(topic, exclude, bytes([fill]) * size),
    TOPICS,
    EXCLUDED,
    SIZES,
    st.integers(0, 255),
)


class Written(NamedTuple):
    """What several threads of one publisher have written."""

    writes: list[bytes]
    messages: list[Message]  # in the order in which they are complete


@st.composite
def written(draw: st.DrawFn) -> Written:
    """Writes of three threads, mixed; some long messages are given up in their middle."""
    threads: list[list[tuple[bytes, Message | None]]] = [[], [], []]
    for number, message in enumerate(draw(st.lists(MESSAGES_OF_ALL_KINDS, max_size=12)), 1):
        own = threads[draw(st.integers(0, 2))]
        if len(message.frame) <= PIPE_BUF:
            own.append((message.frame, message))
            continue
        parts = list(pieces(message.frame, number))
        kept = draw(st.integers(1, len(parts) - 1)) if draw(st.integers(0, 3)) == 3 else len(parts)
        for index, part in enumerate(parts[:kept]):
            own.append((part, message if index == len(parts) - 1 else None))
        if kept < len(parts):
            own.append((abort(number), None))
    result = Written([], [])
    while any(threads):
        busy = [thread for thread in threads if thread]
        write, message_done = busy[draw(st.integers(0, len(busy) - 1))].pop(0)
        result.writes.append(write)
        if message_done is not None:
            result.messages.append(message_done)
    return result


@STEADY
@given(stream=written(), lengths=st.lists(st.integers(0, 300) | st.integers(0, 10_000), max_size=20))
def test_messages_come_out_as_they_were_written(stream: Written, lengths: list[int]) -> None:
    """However the bytes are cut, each message comes out once and whole, in the order in which they were completed."""
    data = b"".join(stream.writes)
    assert all(len(write) <= PIPE_BUF for write in stream.writes)
    splitter = Splitter()
    batches = [batch for part in chunks(data, lengths) for batch in splitter.split(part)]
    assert unpacked(batches) == stream.messages
    assert splitter.unfinished == 0


@settings(STEADY, max_examples=30)
@given(stream=written())
def test_byte_by_byte(stream: Written) -> None:
    """A splitter that gets one byte at a time finds the same."""
    data = b"".join(stream.writes)
    assert unpacked(split(data[index : index + 1] for index in range(len(data)))) == stream.messages


@STEADY
@given(messages=st.lists(MESSAGES_OF_ALL_KINDS.filter(lambda message: len(message.frame) <= PIPE_BUF), max_size=30))
def test_neighbours_of_one_way_are_together(messages: list[Message]) -> None:
    """Frames with one topic and one exclusion that follow each other in a chunk are one batch, and no others are."""
    batches = split([b"".join(message.frame for message in messages)])
    ways = [(batch.topic, batch.exclude) for batch in batches]
    assert all(one != other for one, other in pairwise(ways))
    assert unpacked(batches) == messages


def test_a_long_message_is_held_until_it_is_whole() -> None:
    """Its pieces are counted, and it comes when the last one has."""
    message = Message(b"room:1", 7, b"x" * (3 * PIPE_BUF))
    first, *others = pieces(message.frame, 1)
    splitter = Splitter()
    assert splitter.split(first) == []
    assert PIPE_BUF / 2 < splitter.unfinished < 2 * PIPE_BUF
    (batch,) = splitter.split(b"".join(others))
    assert isinstance(batch, Batch)
    assert batch.charge == len(message.frame) - 8 + FRAME_OVERHEAD
    assert unpacked([batch]) == [message]
    assert splitter.unfinished == 0


def test_an_aborted_message_leaves_nothing() -> None:
    """What had come of it is let go of, and its number may be used again."""
    lost, kept = (Message(b"", 0, fill * (2 * PIPE_BUF)) for fill in (b"x", b"y"))
    splitter = Splitter()
    splitter.split(next(pieces(lost.frame, 1)))
    assert splitter.unfinished
    assert not splitter.split(abort(1))
    assert not splitter.split(abort(99))
    assert splitter.unfinished == 0
    assert unpacked(splitter.split(b"".join(pieces(kept.frame, 1)))) == [kept]


ODD_ONES = {
    "longer": Message(b"room:1", 0, b"x" * 13),
    "shorter": Message(b"room:1", 0, b"x" * 11),
    "empty": Message(b"room:1", 0, b""),
    "longest": Message(b"room:1", 0, b"x" * (PIPE_BUF - 14)),
    "first byte of the topic": Message(b"Room:1", 0, b"x" * 12),
    "last byte of the topic": Message(b"room:2", 0, b"x" * 12),
    "shorter topic, same size": Message(b"room:", 0, b"x" * 13),
    "longer topic, same size": Message(b"room:1x", 0, b"x" * 11),
    "no topic, same size": Message(b"", 0, b"room:1" + b"x" * 12),
    "an exclusion, same size": Message(b"room:1", 3, b"x" * 4),
}
USUAL = Message(b"room:1", 0, b"x" * 12)
ODD_ONES["like two, in one"] = Message(b"room:1", 0, b"x" * 12 + USUAL.frame)


@pytest.mark.parametrize("odd", ODD_ONES.values(), ids=ODD_ONES.keys())
def test_one_that_differs_is_found_at_any_place(odd: Message) -> None:
    """In a long row of frames of one size and way, one that differs in anything is itself, wherever it stands."""
    count = MOST_TOGETHER - 1
    frame, other = USUAL.frame, odd.frame
    same_way = (odd.topic, odd.exclude) == (USUAL.topic, USUAL.exclude)
    for place in range(count):
        data = frame * place + other + frame * (count - place)
        sizes = [len(frame)] * place + [len(other)] + [len(frame)] * (count - place)
        batches = split([data])
        found = [batch for batch in batches if isinstance(batch, Batch)]
        assert b"".join(batch.frames for batch in found) == data
        assert [size for batch in found for size in batch.sizes] == sizes
        ways = [(batch.topic, batch.exclude, len(batch.sizes)) for batch in found]
        expected = [(b"room:1", 0, place), (odd.topic, odd.exclude, 1), (b"room:1", 0, count - place)]
        assert ways == ([(b"room:1", 0, count + 1)] if same_way else [way for way in expected if way[2]])


@pytest.mark.parametrize("between", [abort(5), b"".join(pieces(Message(b"", 0, b"y" * PIPE_BUF).frame, 5))])
def test_a_piece_is_found_at_any_place(between: bytes) -> None:
    """A piece or an abort in the middle of a long row of frames is not taken for one of them."""
    frame = USUAL.frame
    for place in range(120):
        found = unpacked(split([frame * place + between + frame * (120 - place)]))
        assert len([message for message in found if message == USUAL]) == 120
        assert len(found) == 120 + (len(between) > PIPE_BUF)


@pytest.mark.parametrize("topic", [b"", b"t"])
def test_a_row_of_any_length_is_full_batches(topic: bytes) -> None:
    """All whole frames of a row are in batches of so many, and what is left of the last comes with the next chunk."""
    for payload in (0, 1, 12, 300):
        message = Message(topic, 0, b"\0" * payload)
        frame = message.frame
        for count in [*range(1, 80), 1000, 3000]:
            splitter = Splitter()
            cut = len(frame) // 2 if payload else 0
            batches = splitter.split(frame * count + frame[:cut])
            assert {len(batch.sizes) for batch in batches[:-1]} <= {MOST_TOGETHER}
            assert len(batches[-1].sizes) == (count - 1) % MOST_TOGETHER + 1
            assert unpacked(batches) == [message] * count
            assert unpacked(splitter.split(frame[cut:])) == [message]


def test_a_batch_can_be_cut_anywhere() -> None:
    """Its first messages and the others are all of it, with the same way; how many fit is what their charges say."""
    messages = [Message(b"t", 3, b"x" * size) for size in (0, 5, 300, 7, 7)]
    (batch,) = split([b"".join(message.frame for message in messages)])
    assert isinstance(batch, Batch)
    for count in range(len(messages) + 1):
        first, others = batch.cut(count)
        assert unpacked([first]) == messages[:count]
        assert unpacked([others]) == messages[count:]
        assert first.charge + others.charge == batch.charge
        assert batch.fitting(first.charge) == count
        assert count == 0 or batch.fitting(first.charge - 1) == count - 1


# ---------------------------------------------------------------------------------------------------------- bad bytes


def feed(data: bytes, lengths: Iterable[int]) -> None:
    """Give a splitter these chunks until it refuses one; only a frame error may come, and nothing may grow."""
    splitter = Splitter()
    fed = out = 0
    try:
        for part in chunks(data, lengths):
            fed += len(part)
            out += sum(len(batch.frames) for batch in splitter.split(part) if isinstance(batch, Batch))
            assert splitter.unfinished >= 0
            assert splitter.unfinished + out <= fed + 512 * (fed // 18)  # for keeping each that has begun
    except FrameError:
        pass


Change = tuple[int, int, int]
"""Where, what stands there then, and how many bytes there are more of it, or fewer."""

LENGTHS = st.lists(st.integers(0, 200), max_size=10)


@settings(STEADY, max_examples=300)
@given(data=st.binary(max_size=600), lengths=LENGTHS)
def test_random_bytes_are_refused_or_passed(data: bytes, lengths: list[int]) -> None:
    """Bytes that nobody of this package has written raise FrameError or nothing."""
    feed(data, lengths)


@settings(STEADY, max_examples=300)
@given(
    heads=st.lists(
        st.tuples(
            st.sampled_from([0, 7, 8, 16, 17, 18, 25, 30, PIPE_BUF, PIPE_BUF + 1, 2**32 - 1]),
            st.sampled_from([0, 1, 1024, 0xFFFF, 1 << 16, 0x10003, 1 << 17, 1 << 24, 0x1000001, 2 << 24, 3 << 24]),
            st.binary(max_size=40),
        ),
        max_size=20,
    ),
    lengths=LENGTHS,
)
def test_bad_heads_are_refused_or_passed(heads: list[tuple[int, int, bytes]], lengths: list[int]) -> None:
    """Heads with sizes and tags at and beyond their limits raise FrameError or nothing."""
    feed(b"".join(struct.pack("<II", size, tag) + more for size, tag, more in heads), lengths)


@settings(STEADY, max_examples=200)
@given(
    stream=written(),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255), st.integers(-3, 3)), min_size=1, max_size=5),
    lengths=LENGTHS,
)
def test_changed_bytes_are_refused_or_passed(stream: Written, changes: list[Change], lengths: list[int]) -> None:
    """A stream in which some bytes were changed, lost or doubled raises FrameError or nothing."""
    data = bytearray(b"".join(stream.writes))
    for where, value, shift in changes:
        if data:
            place = where % len(data)
            data[place : place + max(1, 1 - shift)] = bytes([value]) * max(1, 1 + shift)
    feed(bytes(data), lengths)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(struct.pack("<II", 7, 0), id="shorter than its head"),
        pytest.param(struct.pack("<II", PIPE_BUF + 1, 0), id="longer than one write"),
        pytest.param(struct.pack("<II", PIPE_BUF + 1, 6) + b"room:1" + bytes(PIPE_BUF - 13), id="longer than one write, whole"),
        pytest.param(struct.pack("<II", 13, 6) + b"room:1", id="shorter than its topic, which is whole"),
        pytest.param(struct.pack("<II", 10, 5) + b"xx", id="shorter than its topic"),
        pytest.param(struct.pack("<II", 12, 1 << 16) + b"xxxx", id="shorter than its exclusion"),
        pytest.param(struct.pack("<II", 8, 1 << 18), id="unknown flag"),
        pytest.param(struct.pack("<II", 8, 3 << 24), id="unknown kind"),
        pytest.param(struct.pack("<II", 7, 1 << 24), id="piece shorter than its head"),
        pytest.param(struct.pack("<II", PIPE_BUF + 1, 1 << 24), id="piece longer than one write"),
        pytest.param(struct.pack("<IIQB", 17, 1 << 24, 1, 0), id="piece without content"),
        pytest.param(struct.pack("<IIQB", 20, 1 << 24, 1, 1) + b"xxx", id="message without a head"),
        pytest.param(struct.pack("<IIQBII", 25, 1 << 24, 1, 1, 9, 0), id="message shorter than it says"),
        pytest.param(struct.pack("<IIQBII", 25, 1 << 24, 1, 1, 8, 5), id="message shorter than its topic"),
        pytest.param(struct.pack("<IIQBII", 25, 1 << 24, 1, 1, 8, 1 << 18), id="message with an unknown flag"),
        pytest.param(struct.pack("<IIQB", 18, 1 + (1 << 24), 1, 0) + b"x", id="piece of an unknown kind"),
        pytest.param(struct.pack("<IIQ", 16, 1 << 24, 1), id="piece as long as an abort"),
        pytest.param(reference_frame(1, 0, 5, b"x" * (PIPE_BUF - 60)), id="reference with too long a topic"),
        pytest.param(struct.pack("<IIQB", 17, 2 << 24, 1, 0), id="abort that is too long"),
        pytest.param(struct.pack("<II", 8, 2 << 24), id="abort without a number"),
    ],
)
def test_what_nobody_writes_is_refused(data: bytes) -> None:
    """Each way in which a head can be wrong is told, also behind frames that are right."""
    for before in (b"", USUAL.frame, USUAL.frame * 100):
        with pytest.raises(FrameError):
            Splitter().split(before + data)


# --------------------------------------------------------------------------------------------------------------- runs


def batch_of(values: Iterable[Any], topic: bytes = b"", exclude: int = 0) -> Batch:
    """A batch with these values, pickled."""
    frames = [Message(topic, exclude, pickle.dumps(value)).frame for value in values]
    skip = len(frame_head(0, topic, exclude))
    return Batch(b"".join(frames), array("I", map(len, frames)), topic, exclude, skip)


def loaded(data: bytes) -> list[Any]:
    """The messages of a run that is all of ``data``."""
    run = read_run(data, 0)
    assert run is not None
    assert run.size == len(data)
    values, whole = load_run(data, run)
    assert whole
    return values


VALUE = st.integers() | st.text("ab", max_size=20) | st.binary(max_size=100) | st.none()
VALUES = st.lists(VALUE, min_size=1, max_size=20)


@STEADY
@given(values=VALUES, topic=TOPICS, exclude=EXCLUDED)
def test_a_run_carries_a_batch(values: list[Any], topic: bytes, exclude: int) -> None:
    """What was published comes out of a run, with its topic, and the run counts what the batch does."""
    batch = batch_of(values, topic, exclude)
    run = run_of(batch)
    view = read_run(b"before" + run.data, 6)
    assert loaded(run.data) == values
    assert view is not None
    assert (view.size, view.kind, view.messages) == (len(run.data), MESSAGES, len(values))
    assert topic_of(run.data[view.first - 6 : view.first - 6 + view.skip]) == topic.decode()
    assert (run.count, run.charge) == (len(values), batch.charge)
    assert run.charges() == [size + OVERHEAD for size in batch.sizes]


@STEADY
@given(values=VALUES, topic=TOPICS, exclude=EXCLUDED, data=st.data())
def test_a_part_of_a_run_is_a_run(values: list[Any], topic: bytes, exclude: int, data: st.DataObject) -> None:
    """Any slice of its messages, and a slice of that, carries just these, and counts just them."""
    run = run_of(batch_of(values, topic, exclude))
    for _ in range(2):
        start = data.draw(st.integers(0, run.count - 1))
        stop = data.draw(st.integers(start + 1, run.count))
        part = run.part(start, stop)
        assert loaded(part.data) == values[start:stop]
        assert part.charges() == run.charges()[start:stop]
        assert (part.count, part.charge) == (stop - start, sum(part.charges()))
        assert part.missed == 0
        view = read_run(part.data, 0)
        assert view is not None
        assert topic_of(part.data[view.first : view.first + view.skip]) == topic.decode()
        run, values = part, values[start:stop]
    assert run.part(0, run.count) is run


def test_a_run_is_read_as_far_as_it_is_there() -> None:
    """Of a run that is cut anywhere, nothing is said before its head is whole, and then its right size."""
    for run in (run_of(batch_of([1])), run_of(batch_of(range(5), b"t")), note_run(GAP, 7), note_run(END)):
        for length in range(len(run.data)):
            view = read_run(run.data[:length], 0)
            assert (view is None) == (length < RUN.size)
            assert view is None or view.size == len(run.data)
            assert view is None or (view.sizes is not None) == (run.count > 1 and length >= RUN.size + 4 * run.count)
            assert view is None or run.count or view.messages == (run.missed if length >= len(run.data) - 1 else 0)
            assert read_run(run.data, len(run.data) - length) is None or length >= RUN.size


@pytest.mark.parametrize("kind", [END, GAP, SKIPPED, OVERFLOWED])
def test_a_note_says_its_kind_and_number(kind: int) -> None:
    """A note is a run without messages, which counts nothing against a capacity."""
    for missed in (0, 1, 2**64 - 1):
        run = note_run(kind, missed)
        view = read_run(run.data, 0)
        assert view is not None
        assert view == (len(run.data), kind, missed, False, 0, None, RUN.size)
        assert run.data == struct.pack("<QIBBHQ", len(run.data), 0, kind, 0, 0, missed) + b"\n"
        assert (run.count, run.charge, run.missed) == (0, 0, missed)


class Unloadable:
    """Raises what it was made with when it is unpickled."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _fail, (self.error,)


def _fail(error: type[Exception]) -> None:
    raise error("on purpose")


@pytest.mark.parametrize("error", [ValueError, StopIteration, EOFError])
def test_one_that_cannot_be_unpickled_stands_in_its_place(error: type[Exception]) -> None:
    """Those before it and behind it are there, wherever it stands, and whatever it raises."""
    for count, place in [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)]:
        values: list[Any] = list(range(count))
        values[place] = Unloadable(error)
        run = run_of(batch_of(values))
        view = read_run(run.data, 0)
        assert view is not None
        messages, whole = load_run(run.data, view)
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
            if Interrupted.reads == place:
                Interrupted.reads += 1
                raise ValueError("of a signal's handler")
            Interrupted.reads += 1
            return super().read(size)

    monkeypatch.setattr("mpbroadcast.protocol.pickling.BytesIO", Interrupted)
    run = run_of(batch_of([10, 11, 12, 13]))
    view = read_run(run.data, 0)
    assert view is not None
    with pytest.raises(ValueError, match="handler"):
        load_run(run.data, view)
    assert load_run(run.data, view) == ([10, 11, 12, 13], True)


# ------------------------------------------------------------------------------------------------- what a channel does


def received(parts: list[tuple[bytes, bool]], *, with_topic: bool = False) -> tuple[list[Any], int]:
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
            assert not after.plain or after.sound(None) == len(after.ready)
            stream = after.without(len(after.ready))
            after = decode(stream, held, with_topic) if stream.decodable(held) else None
    return items, skipped


def test_long_runs_are_decoded_in_parts() -> None:
    """A few messages at a time, with bad ones in their places, and without copying the rest each time."""
    values: list[Any] = list(range(1000))
    values[130] = Unloadable(ValueError)
    first = [run_of(batch_of(values[start : start + 125], b"t")).data for start in range(0, 1000, 125)]
    data = b"".join((*first, note_run(SKIPPED, 3).data, *(run_of(batch_of(values[:10])).data for _ in range(27))))
    stream, items, skipped = Stream(), list[Any](), 0
    stream.chunks.append(data)
    while (after := decode(stream, False, False)) is not None:
        assert len(after.ready) < MOST_TOGETHER + 125
        assert not after.decodable(False) or after.chunks[0] is data
        items += after.ready
        skipped += after.skipped
        stream = after.without(len(after.ready))
    assert skipped == 3
    assert [place for place, item in enumerate(items) if isinstance(item, Failure)] == [130]
    assert [item for item in items if not isinstance(item, Failure)] == [
        n for n in [*range(1000), *[*range(10)] * 27] if n != 130
    ]


def said(items: list[Any]) -> list[Any]:
    """Items in a form that can be compared."""
    result: list[Any] = []
    for item in items:
        if isinstance(item, Failure):
            missed = item.error.missed if isinstance(item.error, Lagged) else 0
            result.append((type(item.error).__name__, missed))
        else:
            result.append("end" if item is END_OF_MESSAGES else item)
    return result


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
SAID = [item for _, items in RUNS for item in items]


def test_all_at_once_gives_all() -> None:
    """Messages, gaps and the end come in their order, whether the last tail byte is there or still in the pipe."""
    for parts in ([(STREAM, False)], [(STREAM[:-1], True)]):
        items, skipped = received(parts)
        assert said(items) == SAID
        assert skipped == 5
        assert isinstance(items[-2], Failure)
        assert isinstance(items[-2].error, Overflowed)
    assert said(received([(STREAM[:-1], False)])[0]) == SAID[:-1]


@pytest.mark.parametrize("held", [False, True])
def test_any_two_cuts_give_each_message_once(held: bool) -> None:
    """Cut into three chunks anywhere, with or without a byte left in the pipe, each comes once and in order."""
    for first in range(len(STREAM)):
        for second in range(first, len(STREAM), 3):
            parts = [(STREAM[:first], held), (STREAM[first:second], held), (STREAM[second:], False)]
            items, skipped = received(parts)
            assert said(items) == SAID
            assert skipped == 5


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
    parts = chunks(data, [length for length, _ in lengths])
    position = 0
    fed: list[tuple[bytes, bool]] = []
    for part, held in zip(parts, [*(held for _, held in lengths), False], strict=True):
        position += len(part)
        fed.append((part, held and position < len(data)))
    expected = [(topic.decode(), value) if with_topic else value for topic, values in lists for value in values]
    assert received(fed, with_topic=with_topic) == (expected, 0)


@pytest.mark.parametrize("held", [False, True])
def test_nothing_is_given_before_it_is_whole(held: bool) -> None:
    """From a beginning come the runs that are whole in it, a byte in the pipe counted in, and no others."""
    ends: list[int] = []
    for run, _ in RUNS:
        ends.append((ends[-1] if ends else 0) + len(run.data))
    for length in range(len(STREAM)):
        items, _ = received([(STREAM[:length], held)])
        whole = [items for (_, items), end in zip(RUNS, ends, strict=True) if end <= length + held]
        assert said(items) == [item for own in whole for item in own]


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
        stream.chunks.append(run.data[start : start + 1000])
        assert decode(stream, True, False) is None
    assert looks == 1
    assert stream.need == len(run.data)
    assert len(stream.chunks) > 90
    stream.chunks.append(run.data[sum(map(len, stream.chunks)) :])
    after = decode(stream, False, False)
    assert after is not None
    assert list(after.ready) == [bytes(100_000)]
    assert not after.chunks


class Beside:
    """What a channel has beside its pipe: one piece of memory, for a ring and for single messages."""

    def __init__(self, memory: bytes = b"", size: int = 0) -> None:
        self.memory = memory
        self.size = size  # what each run says that its messages have
        self.noted: list[tuple[int, int]] = []
        self.ends = 0

    def load_run(self, data: bytes, run: RunView) -> tuple[list[Any], bool, int]:
        places = [read_memory(data, run)] if run.kind == IN_MEMORY else []
        if run.kind == REFERENCES:
            places = [(offset, length) for _, offset, length in references_in(read_references(data, run)[1], run.skip)]
        return *load_each([memoryview(self.memory)[start : start + size] for start, size in places], loads), self.size

    def note(self, kind: int, ring: int) -> None:
        self.noted.append((kind, ring))

    def ended(self) -> None:
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
        assert said([*after.ready]) == [*expected, "end" if last == END else ("Overflowed", 0)]
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
    runs = run_of(batch_of([0] * (MOST_TOGETHER // 2))).data * 5
    after = decode(Stream(chunks=[runs]), False, False)
    assert after is not None
    assert len(after.ready) == MOST_TOGETHER
    with pytest.raises(RuntimeError, match="shared memory"):
        decode(Stream(chunks=[shared_run(IN_MEMORY, 0, 4, 1)]), False, False)


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
