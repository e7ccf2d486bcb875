"""A ring's room, its holds, and the packets beside pipes: nothing that may be read is written again."""

import contextlib
import mmap
import os
from collections import Counter, deque
from collections.abc import Sequence
from itertools import product
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from mpbroadcast.broker.core.ring_holds import LOOKS, Holds, Misplaced, Unread, is_copied_for
from mpbroadcast.client.ring import Ring
from mpbroadcast.protocol import ring_allocator
from mpbroadcast.protocol.fd_packets import FREE, NONE, READ, RING, PacketError, pack, unpack
from mpbroadcast.protocol.frames import PIPE_BUF
from mpbroadcast.protocol.pickling import Payload
from mpbroadcast.protocol.ring_allocator import RingAllocator, span
from tests.support.frames_made import STEADY
from tests.support.helpers import pattern
from tests.support.interrupting import before_line, interrupting

CHUNKS, CHUNK = 6, 256  # a small ring


@pytest.mark.parametrize(
    ("blocks", "looks", "moved", "expected"),
    [
        (False, 1, 1 << 30, True),  # a policy that drops: at once, however quick the reader is
        (True, 1, 0, False),  # it may be waiting for a CPU
        (True, LOOKS - 1, 0, False),
        (True, LOOKS, 0, True),  # it has stopped
        (True, LOOKS, 1 << 20, True),  # it is slow
        (True, LOOKS, 10 << 20, False),
    ],
)
def test_which_readers_are_waited_for(blocks: bool, looks: int, moved: int, expected: bool) -> None:
    """One under ``block`` has ten times as long, and longer if it is quick."""
    assert is_copied_for(blocks=blocks, looks=looks, moved=moved) == expected


def chunks_of(bits: int) -> list[int]:
    return [chunk for chunk in range(bits.bit_length()) if bits >> chunk & 1]


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
            taken -= {byte for byte in taken if byte // CHUNK in free}
            room.free |= sum(1 << chunk for chunk in free)
            continue
        before, behind = room.free, room.next + length <= room.end
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
        assert chunks_of(before & ~room.free) == fresh
        assert not room.free & sum(1 << chunk for chunk in chunks)
        assert behind == (not fresh)
        if step == "undo":
            for _ in range(2):  # the second time, there is nothing more to give back
                room.undo()
                assert room.free == before
            assert room.take(length) == start
            room.undo()
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
        mine -= {byte for byte in mine if byte // CHUNK in free}
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
    assert room.take(CHUNK - 63) is None
    assert room.take(CHUNK - 64) == CHUNK + 64
    room.free |= 0b110000
    assert room.take(2 * CHUNK) == 4 * CHUNK  # in just as many as are free
    assert [*span(CHUNK, CHUNK, CHUNK), *span(CHUNK - 1, 2, CHUNK)] == [1, 0, 1]


class Kept:
    """A hold on chunks, as the broker has it: it is released when nothing refers to it any more."""

    def __init__(self, ring: Any, chunks: Sequence[int], position: int) -> None:
        self.ring = ring
        self.chunks = chunks
        self.position = position
        if isinstance(ring, Shared):
            ring.counts.update(chunks)

    def __del__(self) -> None:
        if isinstance(self.ring, Shared):
            self.ring.counts.subtract(self.chunks)
            self.ring.freed(self.ring.holds.release(self.chunks))


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
        self.arrived_in = -1  # the current chunk, as far as the broker knows
        self.unfreed: set[int] = set()  # chunks in which messages have arrived
        self.counts: Counter[int] = Counter()  # the holds of each
        self.announced: deque[list[tuple[int, int, int]]] = deque()  # written to the broker, in batches
        self.parked: deque[tuple[list[tuple[int, int, int]], Kept]] = deque()  # with the hold on their chunks
        self.to_free: deque[int] = deque()  # sent by the broker, and not received yet
        self.pipes: list[deque[tuple[int, int, int]]] = [deque() for _ in range(self.READERS)]
        self.unread: list[Unread[Kept]] = [Unread() for _ in range(self.READERS)]
        self.read = [0] * self.READERS

    def freed(self, bits: int) -> None:
        if bits:
            self.unfreed -= {*chunks_of(bits)}
            self.to_free.append(bits)

    def in_use(self) -> list[tuple[int, int, int]]:
        """All messages that may still be read."""
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
        self.unfreed |= {*chunks}
        self.arrived_in = (batch[-1][1] + batch[-1][2] - 1) // CHUNK
        self.freed(freed)
        self.parked.append((batch, Kept(self, chunks, batch[0][0])))

    @precondition(lambda self: self.parked)
    @rule(readers=st.sets(st.integers(0, READERS - 1)), again=st.booleans())
    def route(self, readers: set[int], again: bool) -> None:
        batch, kept = self.parked.popleft()
        for reader in readers:
            if again:
                self.holds.hold(kept.chunks)
                kept = Kept(self, kept.chunks, kept.position)
            self.unread[reader].wrote(len(batch), sum(length for _, _, length in batch), kept)
            self.pipes[reader].extend(batch)

    @rule(reader=st.integers(0, READERS - 1), count=st.integers(1, 5), acknowledges=st.booleans())
    def receive(self, reader: int, count: int, acknowledges: bool) -> None:
        pipe = self.pipes[reader]
        for _ in range(min(count, len(pipe))):
            number, start, length = pipe.popleft()
            self.read[reader] += 1
            assert self.memory[start : start + length] == pattern(number, length)
        if acknowledges:
            self.unread[reader].read(self.read[reader])

    @rule(reader=st.integers(0, READERS - 1))
    def die(self, reader: int) -> None:
        self.pipes[reader].clear()
        self.unread[reader].read(self.unread[reader].count)
        assert not self.unread[reader].bytes
        self.unread[reader], self.read[reader] = Unread(), 0

    @precondition(lambda self: self.to_free)
    @rule()
    def free(self) -> None:
        freed = self.to_free.popleft()
        assert not freed & self.room.free, "freed twice"
        assert not freed >> self.current & 1, "freed while it is written"
        self.room.free |= freed

    @invariant()
    def a_chunk_is_free_once_it_is_neither_held_nor_current(self) -> None:
        held = {chunk for chunk, count in self.counts.items() if count}
        assert self.unfreed == held | ({self.arrived_in} - {-1})
        assert self.holds.held == len(held)
        assert held or not any(self.pipes)


def test_nothing_that_is_referred_to_is_written_again() -> None:
    """However late readers read, acknowledge or die: each message is whole when it is read, and its chunk is freed once."""
    run_state_machine_as_test(Shared, settings=settings(STEADY, max_examples=50, stateful_step_count=40))


@STEADY
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 5), st.integers(0, 3), st.integers(1, 999)), max_size=40))
def test_what_is_unread_is_what_was_written_and_not_read(steps: list[tuple[bool, int, int, int]]) -> None:
    """Entries leave in order, each once all of it has been read; what is counted are those that are left."""
    unread: Unread[Kept] = Unread()
    model: list[tuple[int, Kept | None, int]] = []
    total = read = 0
    for index, (writes, count, which, size) in enumerate(steps):
        if writes:
            total += count
            kept = Kept("abc"[which], (which,), index) if which < 3 else None
            unread.wrote(count, size, kept)
            model.append((total, kept, size))
        else:
            read = min(total, read + count)
            model = [entry for entry in model if entry[0] > read]
            unread.read(read)
        assert unread.count == total
        assert unread.bytes == sum(size for _, _, size in model)
        holds = [kept for _, kept, _ in model if kept is not None]
        assert [*unread.holds()] == holds
        assert unread.memories == len(model) - len(holds)
        for ring in "abc":
            assert unread.oldest(ring) == next((kept.position for kept in holds if kept.ring == ring), None)


@pytest.mark.parametrize(
    "lies",
    [
        *([(0, 10), inside] for inside in ((9, 5), (5, 1))),
        *([(20, 10), (0, 5)], [(CHUNK, 5), (CHUNK - 5, 10)], [(0, 3 * CHUNK), (CHUNK, 1)]),
        *([(0, 10), outside] for outside in ((0, 0), (CHUNKS * CHUNK, 1), (5 * CHUNK, CHUNK + 1), (2**32 - 1, 2**32 - 1))),
    ],
)
def test_a_ring_is_written_forward_only(lies: list[tuple[int, int]]) -> None:
    """A message before the end of an earlier one is refused, until its chunk has been free again; one outside, always."""
    holds = Holds(CHUNKS, CHUNK)
    first, second = lies
    chunks, _ = holds.arrived([first])
    for positions in ([second], [(first[0] + first[1], 5), second]):
        with pytest.raises(Misplaced):
            holds.arrived(positions)
    last = (CHUNKS - 1) * CHUNK
    holds.arrived([(last, CHUNK)])
    assert holds.release(chunks)
    if (second[0] + second[1] - 1) // CHUNK in chunks:
        holds.arrived([second])


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


def test_a_message_goes_on_into_chunks_that_were_written_before() -> None:
    """The ring takes the first free chunk if its pages are there, and leaves one that the message does not get to the next."""
    size = ring_allocator.CHUNK
    memory = mmap.mmap(-1, size * ring_allocator.CHUNKS)
    ring = Ring(1, memory)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    assert ring.put((b"first",), 5, b"", writer, False) is None, "no page is there"
    written = Payload((bytes(2 * size),), 2 * size, False)
    start = ring.allocator.take(written.size)
    assert start == 0
    assert ring.copy(start, written)
    assert ring.put((b"third",), 5, b"", writer, False) is None
    assert ring.put((b"long",), ring_allocator.LONGEST + 1, b"", writer, False) is None
    assert (ring.allocator.next, ring.allocator.end) == (2 * size, 2 * size)
    ring.allocator.free |= 0b11
    assert ring.put((b"again",), 5, b"", writer, False)
    assert (ring.allocator.next, ring.allocator.end, memory[:5]) == (64, size, b"again")
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(PIPE_BUF))
    assert ring.put((bytes(size),), size, b"", writer, False) is False
    assert (ring.allocator.next, ring.allocator.end) == (64, 2 * size)
    ring.close()
    os.close(reader)
    os.close(writer)


def test_a_full_pipe_costs_no_room() -> None:
    """What could not be announced has taken nothing."""
    memory = mmap.mmap(-1, ring_allocator.CHUNK * ring_allocator.CHUNKS)
    ring = Ring(1, memory)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ring.allocator.take(100)
    assert ring.put((b"fi", b"ts"), 4, b"", writer, False)
    start = ring.allocator.next
    assert (start, memory[128:132]) == (192, b"fits")
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(PIPE_BUF))
    assert ring.put((b"full",), 4, b"", writer, False) is False
    assert ring.allocator.next == start
    left = ring.allocator.end - start
    os.read(reader, 4 * PIPE_BUF)
    assert ring.put((bytes(left + 1),), left + 1, b"", writer, False) is None
    assert ring.allocator.next == start
    ring.close()
    os.close(reader)
    os.close(writer)
