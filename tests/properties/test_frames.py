"""Frames, which publishers write to the broker: whole, cut anywhere, damaged, and made up."""

import struct
import tracemalloc
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, chain, groupby
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpbroadcast.protocol import frames, splitter
from mpbroadcast.protocol.splitter import Splitter
from mpbroadcast.validation import MAX_TOPIC
from tests.support.frames_made import STEADY, Message, Written, chunks, damaged, written

LENGTHS = st.lists(st.integers(0, 300) | st.integers(0, 10_000), max_size=20)


def split(*parts: bytes) -> list[Any]:
    splitter = Splitter()
    return [item for part in parts for item in splitter.split(part)]


def messages_in(item: frames.Item | frames.Singles) -> list[Message]:
    if isinstance(item, frames.Singles):
        assert 0 < len(item.frames) <= frames.MOST_TOGETHER
        batches = item.batches()
        assert item.charge == sum(batch.charge for batch in batches)
        assert not any(batch.image or batch.exclude for batch in batches)
        return found(batches)
    heads = [len(frames.frame_head(0, item.topic, item.exclude))] * len(item.sizes)
    assert item.charge == sum(size + frames.OVERHEAD for size in item.sizes)
    payloads: list[bytes | tuple[int | None, int, int]]
    if isinstance(item, frames.MemfdMessage):
        payloads = [(None, item.id, item.length)]
        assert item.cut(0) == (item, item)
        assert [*item.sizes] == [heads[0] + item.length]
    elif isinstance(item, frames.References):
        payloads = [(item.ring, *position) for position in item.positions()]
        assert payloads == [*frames.references_in(item.frames, item.skip)]
        assert [*item.sizes] == [heads[0] + length for _, length in item.positions()]
        assert len(item.frames) + 64 <= frames.PIPE_BUF
    else:
        starts = accumulate(item.sizes[:-1], initial=0)
        payloads = [item.frames[start + item.skip : start + size] for start, size in zip(starts, item.sizes, strict=True)]
        assert sum(item.sizes) == len(item.frames)
    return [Message(item.topic, item.exclude, payload, item.image) for payload in payloads]


def found(items: Iterable[frames.Item | frames.Singles]) -> list[Message]:
    return [message for item in items for message in messages_in(item)]


@STEADY
@given(stream=written(), lengths=LENGTHS)
def test_messages_come_out_as_they_were_written(stream: Written, lengths: list[int]) -> None:
    """However the bytes are cut, each message comes out once and whole, in the order in which they were completed."""
    assert all(len(write) <= frames.PIPE_BUF for write in stream.writes)
    data = b"".join(stream.writes)
    for parts in (chunks(data, lengths), [*chunks(data[:9000], [1] * 9000), data[9000:]]):
        splitter = Splitter()
        items = [item for part in parts for item in splitter.split(part)]
        assert found(items) == stream.messages
        assert (splitter.unfinished, splitter.aborted) == (0, stream.aborted)
        shared = any(not isinstance(message.payload, bytes) for message in stream.messages)
        assert splitter.has_shared == (shared or bool(stream.aborted))


def test_references_of_one_route_go_together_within_limits() -> None:
    """Neighbours in one ring with one route are one, until they refer to 1 MiB or would not fit into one write."""
    messages = [Message(b"t", 0, (1, 4096 * number, 4096)) for number in range(300)]
    splitter = Splitter()
    items = splitter.split(b"".join(message.frame for message in messages))
    assert splitter.has_shared
    assert len(items) < 6
    assert found(items) == messages
    large = b"".join(frames.reference_frame(1, number, 1 << 19, b"t") for number in range(5))
    assert [len(item.sizes) for item in split(large)] == [2, 2, 1]
    others = [Message(b"t", 0, (1, 0, 4096)), Message(b"t", 0, (2, 0, 4096)), Message(b"u", 0, (2, 0, 4096))]
    others += [Message(b"u", 5, (2, 0, 4096)), Message(b"u", 5, (2, 0, 4096), True)]
    assert [len(item.sizes) for item in split(b"".join(other.frame for other in others))] == [1, 1, 1, 1, 1]


def test_no_more_is_split_at_once_than_a_round_has_time_for() -> None:
    """The others are taken back, and come again."""
    messages = [Message(b"a"), Message(b"b")] * frames.MOST_ITEMS
    splitter = Splitter()
    assert not splitter.has_more
    items = splitter.split(b"".join(message.frame for message in messages))
    assert (len(found(items)), splitter.has_more) == (frames.MOST_ITEMS, True)
    rest = splitter.take_back()
    assert (splitter.has_more, splitter.rest) == (False, b"")
    assert found(items + splitter.split(rest)) == messages


def test_a_long_message_is_held_until_it_is_whole_or_aborted() -> None:
    """Its pieces are counted; what had come of an aborted one is dropped, and its number may be used again."""
    lost, kept = Message(b"room:1", 7, b"x" * (3 * frames.PIPE_BUF)), Message(b"", 0, b"y" * (3 * frames.PIPE_BUF))
    splitter = Splitter()
    splitter.split(next(frames.pieces(lost.frame, 1)))
    assert not splitter.split(frames.abort(1) + frames.abort(99))
    assert (splitter.unfinished, splitter.has_shared) == (0, True)
    first, *others = frames.pieces(kept.frame, 1)
    assert splitter.split(first) == []
    assert frames.PIPE_BUF / 2 < splitter.unfinished < 2 * frames.PIPE_BUF
    (batch,) = splitter.split(b"".join(others))
    assert batch.charge == len(kept.frame) - 8 + frames.FRAME_OVERHEAD
    assert found([batch]) == [kept]
    assert splitter.unfinished == 0


USUAL = Message(b"room:1", 0, b"x" * 12)
ODD_ONES = {
    "longer": Message(b"room:1", 0, b"x" * 13),
    "shorter": Message(b"room:1", 0, b"x" * 11),
    "empty": Message(b"room:1"),
    "longest": Message(b"room:1", 0, b"x" * (frames.PIPE_BUF - 14)),
    "first byte of the topic": Message(b"Room:1", 0, b"x" * 12),
    "last byte of the topic": Message(b"room:2", 0, b"x" * 12),
    "shorter topic, same size": Message(b"room:", 0, b"x" * 13),
    "longer topic, same size": Message(b"room:1x", 0, b"x" * 11),
    "no topic, same size": Message(b"", 0, b"room:1" + b"x" * 12),
    "an exclusion, same size": Message(b"room:1", 3, b"x" * 4),
    "an image, same size": Message(b"room:1", 0, b"x" * 12, True),
    "like two, in one": Message(b"room:1", 0, b"x" * 12 + USUAL.frame),
    "in pieces": Message(b"room:1", 0, b"x" * frames.PIPE_BUF),
    "aborted": None,
}


@pytest.mark.parametrize("odd", ODD_ONES.values(), ids=ODD_ONES.keys())
def test_one_that_differs_is_found_at_any_position(odd: Message | None) -> None:
    """In a long row of frames of one size and route, one that differs in anything is itself, wherever it is."""
    count = 127
    frame = b"" if odd is None else odd.frame
    between = frames.abort(5) if odd is None else frame if len(frame) <= frames.PIPE_BUF else b"".join(frames.pieces(frame, 5))
    for index in range(count):
        items = split(USUAL.frame * index + between + USUAL.frame * (count - index))
        expected = [USUAL] * index + [odd] * (odd is not None) + [USUAL] * (count - index)
        assert found(items) == expected
        if odd is not None and len(frame) <= frames.PIPE_BUF:  # and what has the same route is together
            assert len(items) <= len([*groupby(expected, lambda message: message and (*message[:2], message.image))])


SPECIAL: Final = {
    "!": Message(b"A", 7, b"x"),
    "#": Message(b"A", 0, b"x", True),
    "@": Message(b"A", 0, (1, 0, 4096)),
    "+": Message(b"A", 0, bytes(2 * frames.PIPE_BUF)),
}


@pytest.mark.parametrize(
    ("written", "split_to"),
    [
        ("A", "A"),
        ("AB", "s:AB"),
        ("ABA", "s:ABA"),
        ("AAB", "AA B"),
        ("AABC", "AA s:BC"),
        ("ABBCCC", "s:ABBCCC"),
        ("ABBBBB", "s:ABBBB B"),
        ("ABBBBBBBC", "s:ABBBB BBB C"),
        ("ABBBBBBBCD", "s:ABBBB BBB s:CD"),
        *((f"A{odd}", f"A {odd}") for odd in SPECIAL),
        *((f"AB{odd}C", f"s:AB {odd} C") for odd in SPECIAL),
        *((f"AB{odd}CD", f"s:AB {odd} s:CD") for odd in SPECIAL),
        ("AB" * 1500, f"s:{'AB' * 1024} A s:{'BA' * 475}B"),
    ],
)
def test_neighbours_with_changing_topics_are_together(written: str, split_to: str) -> None:
    """But for a longer row of one topic among them, and for what is no plain message."""
    messages = [SPECIAL.get(letter, Message(letter.encode(), 0, b"payload")) for letter in written]
    data = [message.frame for message in messages]
    items = split(b"".join(b"".join(frames.pieces(frame, 5)) if len(frame) > frames.PIPE_BUF else frame for frame in data))
    assert found(items) == messages
    names = {SPECIAL[name]: name for name in SPECIAL}
    parts = ["".join(names.get(message, message.topic.decode()) for message in messages_in(item)) for item in items]
    marks = ["s:" if isinstance(item, frames.Singles) else "" for item in items]
    assert " ".join(map("".join, zip(marks, parts, strict=True))) == split_to


@pytest.mark.parametrize("topic", [b"", b"t"])
def test_a_row_of_any_length_is_full_batches(topic: bytes) -> None:
    """All whole frames of a row are in batches of so many, and what is left of the last comes with the next chunk."""
    most = frames.MOST_TOGETHER
    for payload in (0, 1, 12, 300):
        message = Message(topic, 0, b"\0" * payload)
        frame = message.frame
        for count in [*range(1, 10), *range(most - 3, most + 4), most + most // 3]:
            splitter = Splitter()
            cut = len(frame) // 2 if payload else 0
            batches = splitter.split(frame * count + frame[:cut])
            assert [len(batch.sizes) for batch in batches] == [most] * ((count - 1) // most) + [(count - 1) % most + 1]
            assert found(batches) == [message] * count
            assert found(splitter.split(frame[cut:])) == [message]


def test_a_row_of_one_size_is_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third neighbour of one size on, all the others are found at once, whatever is in them."""
    counted = Mock(wraps=frames.HEAD.unpack_from)
    short = frames.frame_head(1, b"t") + b"x"
    row = [
        frames.frame_head(4, b"t") + struct.pack("<I", number % 256 * 0x01010101) for number in range(frames.MOST_TOGETHER - 2)
    ]
    monkeypatch.setattr(splitter, "HEAD", SimpleNamespace(size=8, unpack_from=counted))
    for before in ([], [short, short]):
        counted.reset_mock()
        (batch,) = split(b"".join([*before, *row]))
        assert len(batch.sizes) == len(before) + len(row)
        assert counted.call_count == len(before) + 3


@STEADY
@given(stream=written(), counts=st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_a_batch_can_be_cut_anywhere(stream: Written, counts: list[int]) -> None:
    """Its first messages and the others are all of it, with the same route, and so are their charges."""
    for item in split(b"".join(stream.writes)):
        if isinstance(item, frames.MemfdMessage):
            continue
        whole = messages_in(item)
        for count in counts:
            first, others = item.cut(count)
            parts = [one for one in (first, others) if one.frames]
            assert found(parts) == whole
            assert len(found(parts[: bool(first.frames)])) == min(count, len(whole))
            assert first.charge + others.charge == item.charge


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_a_message_that_fills_its_pieces_exactly(count: int, more: int) -> None:
    """The last piece is marked as such, also when it is as long as one can be."""
    room = len(next(frames.pieces(bytes(2 * frames.PIPE_BUF), 1))) - 17
    assert room == frames.PIPE_BUF - 17
    size = count * room + more
    frame = frames.frame_head(size - 8, b"", kind=frames.IMAGE) + bytes(size - 8)
    made = list(frames.pieces(frame, 1))
    assert len(made) == count + (more > 0)
    assert found(split(*made)) == [Message(b"", 0, bytes(size - 8), True)]


HEADS = st.builds(
    lambda size, tag, more: struct.pack("<II", size, tag) + more,
    st.sampled_from([0, 7, 8, 16, 17, 18, 25, 30, frames.PIPE_BUF, frames.PIPE_BUF + 1, 2**32 - 1]),
    st.sampled_from([0, 1, 1024, 0xFFFF, 1 << 16, 0x10003, 1 << 17, 1 << 24, 0x1000001, 2 << 24, 3 << 24, 4 << 24]),
    st.binary(max_size=40),
)
STREAMS = written().map(lambda stream: b"".join(stream.writes))
DAMAGED = st.builds(damaged, st.randoms(), STREAMS, st.just([USUAL.frame]))


@settings(STEADY, max_examples=250)
@given(data=DAMAGED | st.lists(HEADS, max_size=20).map(b"".join) | st.binary(max_size=600), lengths=LENGTHS)
def test_bytes_that_are_never_written_are_refused_or_passed(data: bytes, lengths: list[int]) -> None:
    """Damaged streams, heads at and beyond their limits, and any bytes at all: frames, or ``FrameError``; nothing may grow."""
    splitter = Splitter()
    fed = out = 0
    try:
        for part in chunks(data, lengths):
            fed += len(part)
            items = splitter.split(part)
            found(items)
            out += sum(len(item.frames) for item in items if isinstance(item, frames.Batch))
            out += sum(map(len, chain.from_iterable(item.frames for item in items if isinstance(item, frames.Singles))))
            assert splitter.unfinished >= 0
            assert splitter.unfinished + out <= fed + 512 * (fed // 18)  # for keeping each that has begun
    except frames.FrameError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(struct.pack("<II", 7, 0), id="shorter than its head"),
        pytest.param(struct.pack("<II", frames.PIPE_BUF + 1, 0), id="longer than one write"),
        pytest.param(
            struct.pack("<II", frames.PIPE_BUF + 1, 6) + b"room:1" + bytes(frames.PIPE_BUF - 13),
            id="longer than one write, whole",
        ),
        pytest.param(struct.pack("<II", 13, 6) + b"room:1", id="shorter than its topic, which is whole"),
        pytest.param(struct.pack("<II", 10, 5) + b"xx", id="shorter than its topic"),
        pytest.param(struct.pack("<II", 12, 1 << 16) + b"xxxx", id="shorter than its exclusion"),
        pytest.param(struct.pack("<II", 8, 1 << 18), id="unknown flag"),
        pytest.param(struct.pack("<II", 8, 3 << 24), id="unknown kind"),
        pytest.param(struct.pack("<II", 7, 1 << 24), id="piece shorter than its head"),
        pytest.param(struct.pack("<II", frames.PIPE_BUF + 1, 1 << 24), id="piece longer than one write"),
        pytest.param(struct.pack("<IIQB", 17, 1 << 24, 1, 0), id="piece without content"),
        pytest.param(struct.pack("<IIQB", 20, 1 << 24, 1, 1) + b"xxx", id="message without a head"),
        pytest.param(struct.pack("<IIQBII", 25, 1 << 24, 1, 1, 9, 0), id="message shorter than its head has it"),
        pytest.param(struct.pack("<IIQBII", 25, 1 << 24, 1, 1, 8, 5), id="message shorter than its topic"),
        pytest.param(struct.pack("<IIQBII", 25, 1 << 24, 1, 1, 8, 1 << 18), id="message with an unknown flag"),
        pytest.param(struct.pack("<IIQB", 18, 1 + (1 << 24), 1, 0) + b"x", id="piece of an unknown kind"),
        pytest.param(struct.pack("<IIQ", 16, 1 << 24, 1), id="piece as long as an abort"),
        pytest.param(frames.reference_frame(1, 0, 5, b"x" * (frames.PIPE_BUF - 60)), id="reference with too long a topic"),
        pytest.param(struct.pack("<IIQB", 17, 2 << 24, 1, 0), id="abort that is too long"),
        pytest.param(struct.pack("<II", 8, 2 << 24), id="abort without a number"),
    ],
)
def test_what_is_never_written_is_refused(data: bytes) -> None:
    """Whatever is wrong with a head is found, also behind frames that are right."""
    for before in (b"", USUAL.frame, USUAL.frame * 100):
        with pytest.raises(frames.FrameError):
            split(before + data)


KINDS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "plain": lambda topic: frames.frame_head(0, topic),
    "excluded": lambda topic: frames.frame_head(0, topic, 7),
    "pieces": lambda topic: b"".join(frames.pieces(frames.frame_head(5000, topic) + bytes(5000), 1)),
    "reference": lambda topic: frames.reference_frame(1, 0, 100, topic),
    "memory": lambda topic: frames.memory_frame(1, 100, topic),
}


@pytest.mark.parametrize("made", KINDS.values(), ids=KINDS.keys())
def test_no_frame_has_a_longer_topic_than_a_user_can_give(made: Callable[[bytes], bytes]) -> None:
    """1,024 bytes of topic pass in each kind of frame, and one more does not."""
    (item,) = split(made(b"x" * MAX_TOPIC))
    assert item.topic == b"x" * MAX_TOPIC
    with pytest.raises(frames.FrameError):
        split(made(b"x" * (MAX_TOPIC + 1)))


@pytest.mark.parametrize("length", [0xFFFF_FFFF, 0xFFFF_FFFF - 19])
def test_a_reference_beyond_the_longest_message_is_refused(length: int) -> None:
    """One whose message, with its head, would be longer than a message can be; the longest has room in the table of lengths."""
    for frame_of in (partial(frames.reference_frame, 1, 0), partial(frames.memory_frame, 1)):
        with pytest.raises(frames.FrameError):
            split(frame_of(length, b"x" * 20))
        (item,) = split(frame_of(0xFFFF_FFFF - 28, b"x" * 20))
        assert item.sizes == array("I", (0xFFFF_FFFF,))


def test_unfinished_messages_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher that begins message after message and finishes none is stopped."""
    begun = [struct.pack("<IIQB", 18, frames.PIECE, number, 0) + b"x" for number in range(4097)]
    splitter = Splitter()
    splitter.split(b"".join(begun[:4096]))
    with pytest.raises(frames.FrameError):
        splitter.split(begun[4096])
    monkeypatch.setattr("mpbroadcast.protocol.splitter.MAX_FRAME", 5 * (frames.PIPE_BUF - 17 + 512))
    splitter = Splitter()
    frame = frames.frame_head(3 * frames.PIPE_BUF, b"") + bytes(3 * frames.PIPE_BUF)
    splitter.split(b"".join(next(frames.pieces(frame, number)) for number in range(1, 6)))
    with pytest.raises(frames.FrameError):
        splitter.split(next(frames.pieces(frame, 6)))


SHORT = struct.pack("<IIQB", 19, frames.PIECE, 1, 0) + bytes(2)


@pytest.mark.parametrize(
    "stream",
    [[SHORT * 1000] * 50, [struct.pack("<IIQB", 25, frames.PIECE, number, 0) + bytes(8) for number in range(4096)]],
    ids=["one message in short pieces", "many that are never whole"],
)
def test_what_is_kept_is_what_is_counted(stream: Sequence[bytes]) -> None:
    """However messages come in pieces, they take what is counted for them, more or less."""
    splitter = Splitter()
    tracemalloc.start()
    try:
        for part in stream:
            splitter.split(part)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert splitter.unfinished > 100_000
    assert kept < 2 * splitter.unfinished + (1 << 20)
