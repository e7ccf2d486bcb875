"""The parts of the ring that need no process: its room, who holds what, and what is said about it in pipes and sockets."""

from __future__ import annotations

import pickle
import struct
import sys
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from random import Random
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from mpbroadcast.broker.core.ring_holds import Holds, Overlap, Unread
from mpbroadcast.protocol.fd_packets import FREE, READ, RING, Packet, PacketError, pack, unpack
from mpbroadcast.protocol.frames import (
    FRAME_OVERHEAD,
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
)
from mpbroadcast.protocol.pickling import OUT_OF_BAND, LargeBuffer, dumps, gather, keep_in_band, load_image, loads
from mpbroadcast.protocol.ring_allocator import RingAllocator, span
from mpbroadcast.protocol.runs import (
    IN_MEMORY,
    REFERENCES,
    RING_GONE,
    RING_OFFERED,
    Account,
    SharedRun,
    memory_run,
    note,
    read_memory,
    read_references,
    read_run,
    references_run,
    run_of,
)
from tests.support.helpers import pattern

STEADY = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

CHUNKS, CHUNK = 6, 256  # a small ring


# ------------------------------------------------------------------------------------------------------------- room


def chunks_of(bits: int) -> list[int]:
    """The chunks whose bits are set."""
    return [chunk for chunk in range(bits.bit_length()) if bits >> chunk & 1]


def state(room: RingAllocator) -> tuple[int, int | None, int | None]:
    """All that can be seen of it: what is free, and where it would put a short and a long message."""
    before = room.free
    seen: list[int | None] = []
    for length in (1, 2 * CHUNK):
        seen.append(room.take(length))
        if seen[-1] is not None:
            room.undo()
        assert room.free == before
    return before, seen[0], seen[1]


@STEADY
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["take", "take", "undo", "free"]), st.integers(1, CHUNKS * CHUNK), st.randoms()), max_size=40
    )
)
def test_room_is_handed_out_once(steps: list[tuple[str, int, Random]]) -> None:
    """What is handed out overlaps nothing that is taken, lies in the ring, and comes back with undo, as it was."""
    room = RingAllocator(CHUNKS, CHUNK)
    taken: set[int] = set()  # bytes
    current = -1
    for step, length, random in steps:
        if step == "free":
            free = {chunk for chunk in range(CHUNKS) if chunk != current and random.random() < 0.5}
            taken -= {place for place in taken if place // CHUNK in free}
            room.free |= sum(1 << chunk for chunk in free)
            continue
        before, behind = room.free, room.fits_behind(length)
        start = room.take(length)
        if start is None:
            assert room.free == before
            assert not behind
            continue
        got = set(range(start, start + length))
        assert not got & taken
        assert start + length <= CHUNKS * CHUNK
        chunks = span(start, length, CHUNK)
        fresh = [chunk for chunk in chunks if before >> chunk & 1]
        assert fresh == [chunk for chunk in chunks if chunk != current]
        assert [*chunks_of(before & ~room.free)] == fresh
        assert not room.free & sum(1 << chunk for chunk in chunks)
        assert behind == (not fresh)
        if step == "undo":
            room.undo()
            assert room.free == before
            assert room.take(length) == start
            room.undo()
            after = state(room)
            room.undo()  # there is nothing more to give back
            assert state(room) == after
        else:
            taken |= got
            current = chunks[-1]


class Interrupt(BaseException):
    """What a signal handler raises."""


def interrupted(line: int, function: Callable[[], Any]) -> Any:
    """Call it, and raise before the line of this number that it comes to in the allocator's module; else, what it returns."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if not left:
                raise Interrupt
        return trace if frame.f_code.co_filename == RingAllocator.take.__code__.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return function()
    except Interrupt:
        return None
    finally:
        sys.settrace(before)


def test_an_interrupt_spoils_no_room() -> None:
    """Wherever one comes in ``take`` or ``undo``, what is handed out from then on overlaps nothing that is taken."""
    for free, length, undone, line in product(([1], [1, 2], [0, 3]), (100, CHUNK + 1), (False, True), range(1, 25)):
        room = RingAllocator(CHUNKS, CHUNK)
        mine: set[int] = set()
        for size in [CHUNK] * (CHUNKS - 1) + [200]:  # which is all
            start = room.take(size)
            assert start is not None
            mine |= set(range(start, start + size))
        room.free |= sum(1 << chunk for chunk in free)
        mine -= {place for place in mine if place // CHUNK in free}
        if undone and room.take(length) is not None:
            interrupted(line, room.undo)
        else:
            interrupted(line, lambda room=room, length=length: room.take(length))  # type: ignore[misc]
        for size in (200, 100, 64, 200, CHUNK, 100, 100, 200, 300, CHUNK):
            start = room.take(size)
            if start is not None:
                got = set(range(start, start + size))
                assert not got & mine, f"interrupted before line {line}"
                assert start + size <= CHUNKS * CHUNK
                mine |= got


def test_room_is_taken_where_it_was_used_last() -> None:
    """A message goes behind the one before, over the end of a chunk if the next is free, else to the first free chunks."""
    room = RingAllocator(CHUNKS, CHUNK)
    assert [room.take(100) for _ in range(2)] == [0, 128]
    assert room.take(200) == 256  # aligned, behind the second: at the beginning of the next chunk
    assert room.take(2 * CHUNK) == 512  # in all of the next two
    room.free |= 0b11
    assert room.take(CHUNK + 1) == 4 * CHUNK
    assert room.take(CHUNK) == 0  # of five chunks, this is the first that is free: the next one is not there
    assert room.take(1) == CHUNK  # behind it
    assert room.take(CHUNK) is None
    assert [room.fits_behind(CHUNK - 64), room.fits_behind(CHUNK - 63)] == [True, False]
    assert room.take(CHUNK - 64) == CHUNK + 64
    room.free |= 0b110000
    assert room.take(2 * CHUNK) == 4 * CHUNK  # in just as many as are free


# ------------------------------------------------------------------------------------------------------------ holds


class Kept:
    """A hold on chunks, as the broker has it: it is released when nothing refers to it any more."""

    def __init__(self, ring: Any, chunks: Sequence[int], place: int) -> None:
        self.ring = ring
        self.chunks = chunks
        self.place = place

    def __del__(self) -> None:
        if isinstance(self.ring, Shared):
            self.ring.told(self.ring.holds.release(self.chunks))


class Shared(RuleBasedStateMachine):
    """A publisher, the broker's books, and readers that read when they like, or go away: nothing is written over."""

    READERS = 3

    def __init__(self) -> None:
        super().__init__()
        self.room = RingAllocator(CHUNKS, CHUNK)
        self.holds = Holds(CHUNKS, CHUNK)
        self.memory = bytearray(CHUNKS * CHUNK)
        self.number = 0
        self.current = -1
        self.announced: deque[list[tuple[int, int, int]]] = deque()  # written to the broker, in batches
        self.parked: deque[tuple[list[tuple[int, int, int]], Kept]] = deque()  # with the hold on their chunks
        self.to_free: deque[int] = deque()  # said by the broker, and not heard yet
        self.pipes: list[deque[tuple[int, int, int]]] = [deque() for _ in range(self.READERS)]
        self.unread: list[Unread[Kept]] = [Unread() for _ in range(self.READERS)]
        self.read = [0] * self.READERS

    def told(self, freed: int) -> None:
        if freed:
            self.to_free.append(freed)

    def in_use(self) -> list[tuple[int, int, int]]:
        """All messages that somebody may still read."""
        used = [entry for batch in self.announced for entry in batch]
        used += [entry for batch, _ in self.parked for entry in batch]
        return used + [entry for pipe in self.pipes for entry in pipe]

    @rule(lengths=st.lists(st.integers(1, CHUNK) | st.integers(1, 3 * CHUNK), min_size=1, max_size=4), data=st.data())
    def publish(self, lengths: list[int], data: st.DataObject) -> None:
        batch: list[tuple[int, int, int]] = []
        for length in lengths:
            start = self.room.take(length)
            if start is None:
                continue
            used = self.in_use() + batch
            assert not any(start < other + size and other < start + length for _, other, size in used)
            self.number += 1
            self.memory[start : start + length] = pattern(self.number, length)
            if data.draw(st.integers(0, 3)) == 0:
                self.room.undo()  # the pipe was full
                continue
            batch.append((self.number, start, length))
            self.current = (start + length - 1) // CHUNK
        if batch:
            self.announced.append(batch)

    @precondition(lambda self: self.announced)
    @rule()
    def arrive(self) -> None:
        batch = self.announced.popleft()
        chunks, freed = self.holds.arrived([(start, length) for _, start, length in batch])
        assert {*chunks} == {chunk for _, start, length in batch for chunk in span(start, length, CHUNK)}
        self.told(freed)
        self.parked.append((batch, Kept(self, chunks, batch[0][0])))

    @precondition(lambda self: self.parked)
    @rule(who=st.sets(st.integers(0, READERS - 1)))
    def route(self, who: set[int]) -> None:
        batch, kept = self.parked.popleft()
        for reader in who:
            self.unread[reader].wrote(len(batch), sum(length for _, _, length in batch), kept)
            self.pipes[reader].extend(batch)

    @rule(reader=st.integers(0, READERS - 1), count=st.integers(1, 5), tells=st.booleans())
    def receive(self, reader: int, count: int, tells: bool) -> None:
        pipe = self.pipes[reader]
        for _ in range(min(count, len(pipe))):
            number, start, length = pipe.popleft()
            self.read[reader] += 1
            assert self.memory[start : start + length] == pattern(number, length)
        if tells:
            self.unread[reader].read(self.read[reader])

    @rule(reader=st.integers(0, READERS - 1))
    def go(self, reader: int) -> None:
        """It dies, and another comes in its place."""
        self.pipes[reader].clear()
        self.unread[reader].read(self.unread[reader].count)
        assert not self.unread[reader].bytes
        self.unread[reader], self.read[reader] = Unread(), 0

    @precondition(lambda self: self.to_free)
    @rule()
    def receive_packet_with_fd(self) -> None:
        freed = self.to_free.popleft()
        assert not freed & self.room.free, "freed twice"
        assert not freed >> self.current & 1, "freed while it is written"
        self.room.free |= freed

    @invariant()
    def all_is_free_in_the_end(self) -> None:
        """When nobody has anything to read, all chunks are free, or will be, but the current one."""
        if not self.in_use() and not any([*unread.holds()] for unread in self.unread):
            free = self.room.free
            for freed in self.to_free:
                free |= freed
            current = 1 << self.current if self.current >= 0 else 0
            assert free | current == (1 << CHUNKS) - 1
            assert self.holds.held == 0


def test_nothing_that_is_referred_to_is_written_again() -> None:
    """Whoever reads when, dies, or tells late: each message is whole when it is read, and in the end all is free."""
    run_state_machine_as_test(Shared, settings=settings(STEADY, max_examples=50, stateful_step_count=40))


@STEADY
@given(steps=st.lists(st.tuples(st.sampled_from("ahr"), st.integers(0, 5), st.integers(1, 3)), max_size=60))
def test_a_chunk_is_freed_once_and_never_the_current_one(steps: list[tuple[str, int, int]]) -> None:
    """A chunk is free exactly when the publisher has gone on and no hold is left, and that is said once for each use."""
    holds = Holds(CHUNKS, CHUNK)
    ends = [0] * CHUNKS
    counts = [0] * CHUNKS
    used: set[int] = set()
    current = -1
    for step, number, count in steps:
        held = [chunk for chunk in range(CHUNKS) if counts[chunk]]
        freed = 0
        if step == "a":  # a message arrives behind the last one, or in chunks that are not used
            fresh = [chunk for chunk in range(CHUNKS) if chunk not in used]
            first = [current] if current >= 0 and number % 2 else []
            chunks = (first + fresh[: count - len(first)]) or first
            if not chunks:
                continue
            places = []
            for chunk in chunks:
                start = ends[chunk] if chunk in used else chunk * CHUNK
                length = min(9, (chunk + 1) * CHUNK - start)
                if length:
                    places.append((start, length))
                    ends[chunk] = start + length
            chunks = [start // CHUNK for start, _ in places]
            if not chunks:
                continue
            for chunk in chunks:
                counts[chunk] += 1
            used |= {*chunks}
            current = chunks[-1]
            freed = holds.arrived(places)[1]
        elif held and step == "h":
            chunk = held[number % len(held)]
            counts[chunk] += 1
            holds.hold((chunk,))
        elif held:
            chunk = held[number % len(held)]
            counts[chunk] -= 1
            freed = holds.release((chunk,))
        free = {chunk for chunk in used if not counts[chunk] and chunk != current}
        assert {*chunks_of(freed)} == free
        used -= free
        assert holds.held == sum(map(bool, counts))


@STEADY
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 5), st.integers(0, 2), st.integers(1, 999)), max_size=40))
def test_what_is_unread_is_what_was_written_and_not_read(steps: list[tuple[bool, int, int, int]]) -> None:
    """Entries leave in order, each once all of it has been read; bytes, rings and oldest places are those that are left."""
    unread: Unread[Kept] = Unread()
    model: list[tuple[int, Kept, int]] = []
    total = read = 0
    for index, (writes, count, which, size) in enumerate(steps):
        if writes:
            total += count
            kept = Kept("abc"[which], (which,), index)
            unread.wrote(count, size, kept)
            model.append((total, kept, size))
        else:
            read = min(total, read + count)
            model = [entry for entry in model if entry[0] > read]
            unread.read(read)
        assert unread.count == total
        assert unread.bytes == sum(size for _, _, size in model)
        assert [*unread.holds()] == [kept for _, kept, _ in model]
        for ring in "abc":
            assert unread.oldest(ring) == next((kept.place for _, kept, _ in model if kept.ring == ring), None)


@pytest.mark.parametrize(
    "lies",
    [[(0, 10), (9, 5)], [(0, 10), (5, 1)], [(20, 10), (0, 5)], [(CHUNK, 5), (CHUNK - 5, 10)], [(0, 3 * CHUNK), (CHUNK, 1)]],
)
def test_a_ring_is_written_forward_only(lies: list[tuple[int, int]]) -> None:
    """A message before the end of an earlier one is refused, until its chunk has been free again."""
    holds = Holds(CHUNKS, CHUNK)
    first, second = lies
    chunks, _ = holds.arrived([first])
    for places in ([second], [(first[0] + first[1], 5), second]):
        with pytest.raises(Overlap):
            holds.arrived(places)
    last = (CHUNKS - 1) * CHUNK
    holds.arrived([(last, 1)])
    assert holds.release(chunks)
    if (second[0] + second[1] - 1) // CHUNK in chunks:
        holds.arrived([second])


# ---------------------------------------------------------------------------------------------------------- packets


@STEADY
@given(
    data=st.binary(max_size=40) | st.binary(min_size=16, max_size=16),
    kind=st.integers(0, 255),
    number=st.integers(0, 2**32 - 1),
)
def test_only_packets_are_packets(data: bytes, kind: int, number: int) -> None:
    """Any bytes are a packet, or raise ``PacketError``; what was packed comes out as it was."""
    for candidate in (data, bytes((kind,)) + data[1:]):
        try:
            packet = unpack(candidate)
        except PacketError:
            assert len(candidate) != len(pack(RING)) or not RING <= candidate[0] <= READ
        else:
            assert RING <= packet.kind <= READ
            assert unpack(pack(*packet)) == packet
    for known in (RING, FREE, READ):
        assert unpack(pack(known, number, 2**64 - 1)) == Packet(known, number, 2**64 - 1)


# ------------------------------------------------------------------------------------------- frames in shared memory

TOPICS = st.sampled_from([b"", b"a", b"room:1", "tür".encode(), b"x" * 1024])
WAYS = st.tuples(TOPICS, st.sampled_from([0, 0, 1, 2**63]), st.booleans())
LENGTHS = st.integers(1, 5000) | st.sampled_from([1 << 18, 1 << 21, 0xFFFF_0000])
Sent = tuple[Any, ...]
"""A message: its kind, where it is, its length, topic, exclusion, and whether it is an image."""


@st.composite
def sent(draw: st.DrawFn) -> Sent:
    topic, exclude, image = draw(WAYS)
    match draw(st.sampled_from(["ring", "ring", "ring", "memory", "short", "long", "abort"])):
        case "ring":
            place = (draw(st.integers(1, 3)), draw(st.integers(0, 2**32 - 1)))
            return "ring", place, draw(LENGTHS), topic, exclude, image
        case "memory":
            return "memory", draw(st.integers(0, 2**64 - 1)), draw(LENGTHS), topic, exclude, image
        case "abort":
            return "abort", draw(st.integers(1000, 2000)), 0, b"", 0, False
        case kind:
            return kind, 0, draw(st.integers(0, 9)) + (2 * PIPE_BUF if kind == "long" else 0), topic, exclude, False


def written(message: Sent, number: int) -> bytes:
    kind, place, length, topic, exclude, image = message
    if kind == "ring":
        ring, offset = place
        return reference_frame(ring, offset, length, topic, exclude, image)
    if kind == "memory":
        return memory_frame(place, length, topic, exclude, image)
    if kind == "abort":
        return abort(place)
    frame = frame_head(length, topic, exclude) + pattern(number, length)
    return frame if len(frame) <= PIPE_BUF else b"".join(pieces(frame, number))


def found(items: list[Item]) -> list[Sent]:
    """The messages that these say of themselves."""
    result: list[Sent] = []
    for item in items:
        if isinstance(item, References):
            heads = [len(frame_head(0, item.topic, item.exclude)) + length for _, length in item.positions()]
            assert [*item.sizes] == heads
            assert item.fitting(item.charge) == len(heads)
            assert item.fitting(item.charge - 1) == len(heads) - 1
            assert len(item.frames) + 64 <= PIPE_BUF
            for (offset, length), (ring, *same) in zip(item.positions(), references_in(item.frames, item.skip), strict=True):
                assert (ring, *same) == (item.ring, offset, length)
                result.append(("ring", (ring, offset), length, item.topic, item.exclude, item.image))
        elif isinstance(item, MemfdMessage):
            assert (item.fitting(item.charge), item.fitting(item.charge - 1)) == (1, 0)
            assert item.cut(0) == (item, item)
            result.append(("memory", item.id, item.length, item.topic, item.exclude, item.image))
        elif isinstance(item, Batch):
            for size in item.sizes:
                length = size - item.skip
                kind = "long" if length >= PIPE_BUF else "short"
                result.append((kind, 0, length, item.topic, item.exclude, item.image))
    return result


@STEADY
@given(messages=st.lists(sent(), max_size=25), cuts=st.lists(st.integers(0, 200) | st.integers(0, 9000), max_size=10))
def test_messages_in_shared_memory_keep_their_place(messages: list[Sent], cuts: list[int]) -> None:
    """Between messages that are in the pipe, however it is cut, with any topic, exclusion and image."""
    data = b"".join(written(message, number) for number, message in enumerate(messages))
    splitter = Splitter()
    items: list[Item] = []
    for cut in [*cuts, len(data)]:
        items += splitter.split(data[:cut])
        data = data[cut:]
    assert found(items) == [message for message in messages if message[0] != "abort"]
    assert splitter.aborted == [message[1] for message in messages if message[0] == "abort"]
    assert splitter.has_shared == any(message[0] in ("ring", "memory", "abort") for message in messages)
    assert splitter.unfinished == 0


def test_references_of_one_way_go_together_within_limits() -> None:
    """Neighbours in one ring that go the same way are one, until they refer to 1 MiB or would not fit into one write."""

    def split(frames: bytes) -> list[References]:
        items = Splitter().split(frames)
        return [item for item in items if isinstance(item, References)]

    offsets = [4096 * number for number in range(300)]
    items = split(b"".join(reference_frame(1, offset, 4096, b"t") for offset in offsets))
    assert len(items) < 6
    assert [offset for item in items for offset, _ in item.positions()] == offsets
    large = b"".join(reference_frame(1, number, 1 << 19, b"t") for number in range(5))
    assert [len(item.sizes) for item in split(large)] == [2, 2, 1]
    other = reference_frame(1, 0, 4096, b"t") + reference_frame(2, 0, 4096, b"t") + reference_frame(2, 0, 4096, b"u")
    other += reference_frame(2, 0, 4096, b"u", 5) + reference_frame(2, 0, 4096, b"u", 5, image=True)
    assert [len(item.sizes) for item in split(other)] == [1, 1, 1, 1, 1]


@settings(STEADY, max_examples=200)
@given(
    messages=st.lists(sent(), min_size=1, max_size=4),
    damage=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 200),
    tail=st.binary(max_size=60),
)
def test_anything_else_is_refused(messages: list[Sent], damage: list[tuple[int, int]], cut: int, tail: bytes) -> None:
    """Damaged frames, and any bytes at all, are frames or raise ``FrameError``: nothing else."""
    data = bytearray(b"".join(written(message, number) for number, message in enumerate(messages)) + tail)
    for place, value in damage:
        data[place % len(data)] = value
    for stream in (bytes(data), tail):
        splitter = Splitter()
        try:
            items = splitter.split(stream[:cut]) + splitter.split(stream[cut:])
        except FrameError:
            continue
        assert 0 <= splitter.unfinished <= len(stream) + 512 * (len(stream) // 18)  # for keeping each that has begun
        for item in items:
            assert item.charge > 0
        found(items)


@pytest.mark.parametrize("length", [0xFFFF_FFFF, 0xFFFF_FFFF - 19])
def test_a_reference_beyond_the_longest_message_is_refused(length: int) -> None:
    """One whose message, with its head, would be longer than a message can be raises ``FrameError``, as all nonsense does."""
    for frame_of in (partial(reference_frame, 1, 0), partial(memory_frame, 1)):
        with pytest.raises(FrameError):
            Splitter().split(frame_of(length, b"x" * 20))
        assert Splitter().split(frame_of(0xFFFF_FFFF - 28, b"x" * 20))


@STEADY
@given(
    way=WAYS,
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20),
    cut=st.integers(0, 20),
    number=st.integers(0, 2**32 - 1),
)
def test_references_are_cut_copied_and_written(way: tuple[bytes, int, bool], lengths: list[int], cut: int, number: int) -> None:
    """Both parts are what they were; copied, they are ordinary messages; in a run, they are what the channel reads."""
    topic, exclude, image = way
    offsets = [sum(lengths[:index]) for index in range(len(lengths))]
    memory = pattern(1, sum(lengths))
    frames = b"".join(
        reference_frame(7, offset, length, topic, exclude, image) for offset, length in zip(offsets, lengths, strict=True)
    )
    items: list[Any] = Splitter().split(frames)
    assert [place for item in items for place in item.positions()] == [*zip(offsets, lengths, strict=True)]
    for item in items:
        parts = item.cut(min(cut, len(item.sizes)))
        assert [place for part in parts for place in part.positions()] == [*item.positions()]
        assert parts[0].sizes + parts[1].sizes == item.sizes
        assert parts[0].charge + parts[1].charge == item.charge
        batch = item.copied(memoryview(memory))
        assert (batch.sizes, batch.charge, batch.image, batch.exclude) == (item.sizes, item.charge, image, exclude)
        assert run_of(batch).charge == item.charge
        heads = [frame_head(length, topic, exclude, 1 << 17 if image else 0) for _, length in item.positions()]
        pairs = zip(heads, item.positions(), strict=True)
        assert batch.frames == b"".join(head + memory[offset : offset + length] for head, (offset, length) in pairs)
        data = b"before" + references_run(item, number) + b"behind"
        assert len(data) - 12 <= PIPE_BUF
        run = read_run(data, 6)
        assert run is not None
        assert (run.size, run.kind, run.messages, run.image) == (len(data) - 12, REFERENCES, len(item.sizes), image)
        ring, body = read_references(data, run)
        assert (ring, body, run.skip) == (number, item.frames, item.skip)
        assert data[run.first : run.first + run.skip][-len(topic) :] == topic or not topic
        check_shared_run(item, number, memory)


def check_shared_run(item: References, ring: int, memory: bytes) -> None:
    """Each part of it is a run of its own, and its copy counts once, however often it is asked for."""
    account, copies = Account(), Account()
    hold = SimpleNamespace(
        data=lambda item: references_run(item, ring), copied=lambda item: item.copied(memoryview(memory)), copies=copies
    )
    run = SharedRun(item._replace(hold=hold), account)
    plain = run_of(item.copied(memoryview(memory)))
    places = [*item.positions()]
    assert (run.count, run.charge, run.missed, account.held) == (len(places), item.charge, 0, item.charge)
    assert run.charges() == [size + FRAME_OVERHEAD - 8 for size in item.sizes]
    for start in range(run.count):
        for stop in {start + 1, run.count}:
            part = run.part(start, stop)
            assert isinstance(part, SharedRun)
            assert isinstance(part.item, References)
            assert [*part.item.positions()] == places[start:stop]
            assert (part is run) == (part.count == run.count)
            assert part is run or account.held == item.charge + part.charge
            assert part.copied().data == plain.part(start, stop).data
    del part
    assert run.copied() is run.copied()
    assert (copies.held, account.held) == (plain.charge, item.charge)


@STEADY
@given(way=WAYS, length=LENGTHS, numbers=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_a_parcel_is_written_and_read(way: tuple[bytes, int, bool], length: int, numbers: tuple[int, int]) -> None:
    """A message in memory of its own keeps its topic, exclusion, kind and charge; its run says where it is."""
    topic, exclude, image = way
    (message,) = Splitter().split(memory_frame(numbers[0], length, topic, exclude, image))
    assert isinstance(message, MemfdMessage)
    assert (message.id, message.length, message.topic, message.exclude, message.image) == (
        numbers[0],
        length,
        *way,
    )
    data = memory_run(message, numbers[1])
    view = read_run(data, 0)
    assert view is not None
    assert (view.size, view.kind, view.messages, view.image) == (len(data), IN_MEMORY, 1, image)
    assert read_memory(data, view) == (numbers[1], length)
    if length < 10_000:
        payload = pattern(1, length)
        batch = message.copied(payload)
        assert batch.charge == message.charge
        assert batch.frames == frame_head(length, topic, exclude, 1 << 17 if image else 0) + payload
        assert batch.image == image


@pytest.mark.parametrize("kind", [RING_OFFERED, RING_GONE])
def test_notes_about_rings(kind: int) -> None:
    """They say which ring; a head that is not whole says nothing yet."""
    data = note(kind, 2**32 - 1)
    view = read_run(data, 0)
    assert view is not None
    assert (view.size, view.kind, view.messages) == (len(data), kind, 2**32 - 1)
    assert read_run(data[:15], 0) is None


# ----------------------------------------------------------------------------------------------------------- images


def image_of(message: object) -> bytes | None:
    """The image that a message becomes, or ``None`` when it is a plain pickle; it must say its size."""
    payload = gather(message)
    data = b"".join(payload.parts)
    assert len(data) == payload.size
    if payload.image:
        return data
    assert loads(data) == message
    return None


BUFFERS = st.lists(st.sampled_from([0, 1, 63, 64, 1000, OUT_OF_BAND - 1, OUT_OF_BAND, OUT_OF_BAND + 1, 200_001]), max_size=8)


@settings(STEADY, max_examples=40)
@given(sizes=BUFFERS, extra=st.sampled_from([b"", b"x" * 70_000, bytearray(70_000)]))
def test_buffers_come_back_as_they_were(sizes: list[int], extra: bytes | bytearray) -> None:
    """Large ones uncopied and aligned behind the pickle, small ones in it; each with its own bytes, and writable."""
    buffers = [bytearray(pattern(number, size)) for number, size in enumerate(sizes)]
    message = [extra, *map(pickle.PickleBuffer, buffers)]
    if max(sizes, default=0) < OUT_OF_BAND:
        assert not gather(message).image
        for data in (b"".join(gather(message).parts), dumps(message, 5, buffer_callback=keep_in_band)):
            assert loads(data) == [extra, *buffers]
        return
    with pytest.raises(LargeBuffer):
        dumps(message, 5, buffer_callback=keep_in_band)
    data = image_of(message) or b""
    whole = bytearray(data)
    first, *others = load_image(whole)
    assert first == extra
    assert [bytes(other) for other in others] == [bytes(buffer) for buffer in buffers]
    for other in others:
        if len(other) >= OUT_OF_BAND:
            assert isinstance(other, memoryview)
            assert whole.find(bytes(other)) % 64 == 0
            other[0] ^= 0xFF
    assert bytes(whole) != data  # they are in there, not copied


def test_arrays_of_every_layout() -> None:
    """C and Fortran order, pieces of others, read-only, empty and structured arrays come back the same, and many at once."""
    numpy = pytest.importorskip("numpy")
    large = numpy.arange(120_000, dtype="<u4").reshape(300, 400)
    constant = large.copy()
    constant.flags.writeable = False
    arrays = [
        large,
        numpy.asfortranarray(large),
        large[::2, ::3],
        large.T,
        large[:, :0],
        constant,
        numpy.zeros(9000, dtype=[("a", "u1"), ("b", "f8")]),
        *(large + number for number in range(30)),
    ]
    data = image_of(arrays)
    assert data is not None
    for one, other in zip(arrays, load_image(bytearray(data)), strict=True):
        assert (one.shape, one.dtype, one.flags.writeable) == (other.shape, other.dtype, other.flags.writeable)
        assert (one == other).all()
    assert image_of("no buffer at all") is None


@settings(STEADY, max_examples=150)
@given(
    places=st.lists(st.tuples(st.integers(0, 200_000) | st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=3),
    count=st.integers(0, 4) | st.integers(0, 2**32 - 1),
    cut=st.integers(0, 120),
    true=st.booleans(),
)
def test_an_image_that_lies_is_no_message(places: list[tuple[int, int]], count: int, cut: int, true: bool) -> None:
    """Parts that are not where it says, or too many, or none, raise a pickling error: nothing outside of it is read."""
    data = bytearray(image_of([pickle.PickleBuffer(bytearray(OUT_OF_BAND))]) or b"")
    if true:
        whole = data[: len(data) - 1 - cut]  # the last part is cut off
    else:
        table = b"".join(struct.pack("<QQ", *place) for place in places)
        whole = bytearray(struct.pack("<II", count, 0) + table + bytes(cut))
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        load_image(whole)


def test_sizes_fit_into_their_table() -> None:
    """The table of lengths has 32 bits for each: the longest message that a frame may say has room in it."""
    frame = memory_frame(1, 0xFFFF_FFFF - 8, b"")
    (message,) = Splitter().split(frame)
    assert isinstance(message, MemfdMessage)
    assert message.sizes == array("I", (0xFFFF_FFFF,))
