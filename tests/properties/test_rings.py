"""A ring's room, what holds which part of it, and the packets beside pipes: nothing that may be read is written again."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Sequence
from itertools import product
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from mpbroadcast.broker.core.ring_holds import Holds, Overlap, Unread
from mpbroadcast.client.ring import Ring
from mpbroadcast.protocol import ring_allocator
from mpbroadcast.protocol.fd_packets import FREE, NONE, READ, RING, PacketError, pack, unpack
from mpbroadcast.protocol.frames import PIPE_BUF
from mpbroadcast.protocol.ring_allocator import RingAllocator, span
from tests.support.frames_made import STEADY
from tests.support.helpers import pattern
from tests.support.interrupting import before_line, interrupting

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


def test_an_interrupt_spoils_no_room() -> None:
    """Wherever one comes in ``take`` or ``undo``, what is handed out from then on overlaps nothing that is taken."""
    for free, length, undone, line in product(([1], [1, 2], [0, 3]), (100, CHUNK + 1), (False, True), range(24)):
        room = RingAllocator(CHUNKS, CHUNK)
        mine: set[int] = set()
        for size in [CHUNK] * (CHUNKS - 1) + [200]:  # which is all
            start = room.take(size)
            assert start is not None
            mine |= set(range(start, start + size))
        room.free |= sum(1 << chunk for chunk in free)
        mine -= {place for place in mine if place // CHUNK in free}
        if undone and room.take(length) is not None:
            interrupting(before_line(line, ring_allocator.__file__), room.undo)
        else:
            interrupting(before_line(line, ring_allocator.__file__), room.take, length)
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

    def __init__(self, ring: Any, chunks: Sequence[int], position: int) -> None:
        self.ring = ring
        self.chunks = chunks
        self.position = position

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
            assert unread.oldest(ring) == next((kept.position for _, kept, _ in model if kept.ring == ring), None)


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
            assert len(candidate) != len(pack(RING)) or not RING <= candidate[0] <= NONE
        else:
            assert RING <= packet[0] <= NONE
            assert unpack(pack(*packet)) == packet
    for known in (RING, FREE, READ, NONE):
        assert unpack(pack(known, number, 2**64 - 1)) == (known, number, 2**64 - 1)


def test_a_chunk_that_is_free_is_not_freed_again() -> None:
    """Only what messages have come in can become free, and once for that."""
    holds = Holds(4, 100)
    holds.hold([0])
    assert holds.release([0]) == 0, "no message has come in it"
    assert holds.arrived([(0, 10)]) == ((0,), 0)
    assert holds.release([0]) == 0, "the publisher may be writing to it"
    assert holds.arrived([(100, 100)]) == ((1,), 1)
    holds.hold([0, 2])
    assert holds.release([0, 2]) == 0
    assert holds.held == 1


def test_unread_memories_are_counted() -> None:
    """Messages in memory of their own, until they are read."""
    unread: Unread[SimpleNamespace] = Unread()
    unread.wrote(1, 10, None)
    hold = SimpleNamespace(ring="ring", place=0)
    unread.wrote(2, 10, hold)
    unread.wrote(1, 10, None)
    assert (unread.memories, list(unread.holds())) == (2, [hold])
    unread.read(3)
    assert (unread.memories, unread.bytes) == (1, 10)
    unread.read(4)
    assert unread.memories == 0


def test_a_full_pipe_costs_no_room() -> None:
    """What could not be announced has taken nothing."""
    memory = mmap.mmap(-1, ring_allocator.CHUNK * ring_allocator.CHUNKS)
    ring = Ring(1, memory)
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        ring.allocator.take(100)
        assert ring.put(b"fits", b"", writer)
        place = ring.allocator.next
        assert (place, memory[128:132]) == (192, b"fits")
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(PIPE_BUF))
        assert not ring.put(b"full", b"", writer)
        assert ring.allocator.next == place
        left = ring.allocator.end - place
        os.read(reader, 4 * PIPE_BUF)
        assert not ring.put(bytes(left + 1), b"", writer)
        assert ring.allocator.next == place
    finally:
        ring.close()
        os.close(reader)
        os.close(writer)
