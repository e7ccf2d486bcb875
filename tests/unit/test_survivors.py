"""Small faults that no other pure test would find: ``mutate.py`` puts them in one by one."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from array import array
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.ring_holds import Holds, Unread
from mpbroadcast.broker.core.router import Router
from mpbroadcast.client.ring import Ring
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import AddressError
from mpbroadcast.posix.processes import PeerProcess
from mpbroadcast.protocol import frames
from mpbroadcast.protocol.frames import MOST_TOGETHER, PIPE_BUF, Batch, FrameError, MemfdMessage, Splitter, frame_head, pieces
from mpbroadcast.protocol.ring_allocator import CHUNK, CHUNKS
from mpbroadcast.protocol.runs import GAP, MESSAGES, RUN, Run, SharedRun, memory_run, read_run, run_of
from mpbroadcast.validation import MAX_ADDRESS, check_address, check_authkey, check_timeout


def test_nothing_is_left_of_patterns_that_nobody_has() -> None:
    """Patterns that came and went leave nothing behind, however many there were."""
    router: Router[int] = Router()
    empty = {name: dict(value) for name, value in vars(router).items() if isinstance(value, dict)}
    router.add(0, ["a*", "a?", "ab*", "b"])
    router.drop(0, ["a*", "ab*"])
    router.remove(0)
    assert {name: dict(value) for name, value in vars(router).items() if isinstance(value, dict)} == empty


# -------------------------------------------------------------------------------------------------------------- backlogs


def a_run(count: int = 1, size: int = 100) -> Run:
    """A run of messages that are all the same."""
    frame = frame_head(size, b"") + bytes(size)
    return run_of(Batch(frame * count, array("I", [len(frame)] * count), b"", 0, 8))


def test_a_capacity_can_be_used_to_its_last_byte() -> None:
    """What fits exactly is taken; what the pipe refers to in shared memory counts as what is in it does."""
    run = a_run()
    backlog = Backlog(run.charge)
    assert backlog.takes(run.charge)
    assert not backlog.takes(run.charge + 1)
    backlog.pipe = 1
    assert not backlog.takes(run.charge)
    backlog.pipe, backlog.referred = 0, 1
    assert (backlog.takes(run.charge), backlog.charge) == (False, 1)


def test_many_tiny_messages_are_cut_to_what_the_pipe_takes_for_certain() -> None:
    """Their heads and the table of their lengths count, too. What is never dropped need not be cut."""
    run = a_run(20_000, 1)
    each = 8 + 1 + 4
    for more in range(each):
        for policy, capacity in (("drop_oldest", 1 << 24), ("drop_oldest", run.charge), ("block", 1 << 24)):
            backlog = Backlog(capacity, policy)
            backlog.pipe_size = (1 << 16) + more
            backlog.put(run)
            backlog.put(run)  # over the first one, or not
            if policy == "block":
                assert backlog.to_write() == run.data
            else:
                assert 0 <= backlog.pipe_size - 2 * PIPE_BUF - len(backlog.to_write()) < each


def test_a_gap_that_is_partly_written_stays_as_it_is() -> None:
    """What is dropped while the note of a gap is half in the pipe gets one note of its own."""
    run = a_run()
    backlog = Backlog(run.charge, "drop_newest")
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
    while not backlog.empty:
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
    copy = a_run().data[RUN.size : -1]
    copied = Batch(copy, array("I", [len(copy)]), b"", 0, 8)
    hold = SimpleNamespace(data=lambda item: memory_run(item, 1), copied=lambda _: copied, copies=None, ring=ring)
    return SharedRun(MemfdMessage(7, 100, b"", 0, frame_head(100, b""), False, hold))


def test_a_message_in_memory_is_not_written_with_what_comes_before() -> None:
    """Its descriptor has to be sent before its run: so that is never joined to another one."""
    backlog = Backlog(1 << 20)
    before, own, behind = a_run(), in_memory(1), a_run()
    for run in (before, own, behind):
        backlog.put(run)
    assert (backlog.to_write(), backlog.shared) == (before.data, None)
    backlog.wrote(len(before.data))
    assert (backlog.to_write(), backlog.shared) == (own.data, own)
    backlog.wrote(len(own.data))
    assert (backlog.to_write(), backlog.shared) == (behind.data, None)


def test_what_is_copied_out_is_written_as_it_would_have_been() -> None:
    """All that waits in one ring, or what comes next; nothing else."""
    backlog, plain = Backlog(1 << 20), a_run()
    for run in (plain, in_memory(1), in_memory(1), in_memory(2)):
        backlog.put(run)
    assert [backlog.refers_to(ring) for ring in (1, 2, 3)] == [True, True, False]
    assert [backlog.copy_out(ring) for ring in (1, 3)] == [2 * plain.charge, 0]
    assert [backlog.refers_to(ring) for ring in (1, 2, 3)] == [False, True, False]
    backlog.copy_first()
    assert (backlog.to_write(), backlog.between) == (plain.data * 3, True)
    backlog.wrote(len(plain.data) * 3 - 1)
    assert not backlog.between
    backlog.wrote(1)
    assert backlog.to_write() != plain.data
    backlog.copy_first()
    assert backlog.to_write() == plain.data


# ---------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_a_message_that_fills_its_pieces_exactly(count: int, more: int) -> None:
    """The last piece says so, also when it is as long as one can be."""
    room = len(next(pieces(bytes(2 * PIPE_BUF), 1))) - 17
    assert room == PIPE_BUF - 17
    size = count * room + more
    frame = frame_head(size - 8, b"", kind=frames.IMAGE) + bytes(size - 8)
    made = list(pieces(frame, 1))
    assert len(made) == count + (more > 0)
    splitter = Splitter()
    items = [item for piece in made for item in splitter.split(piece)]
    assert isinstance(items[-1], Batch)
    assert (items[-1].frames, items[-1].image) == (frame, True)
    assert splitter.unfinished == 0


def test_a_row_of_one_size_is_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third neighbour of one size on, all the others are found at once, whatever is in them."""
    looks = 0

    def counted(data: bytes, start: int = 0) -> tuple[int, int]:
        nonlocal looks
        looks += 1
        return struct.unpack_from("<II", data, start)

    short = frame_head(1, b"t") + b"x"
    row = [frame_head(4, b"t") + struct.pack("<I", number * 0x01010101) for number in range(MOST_TOGETHER - 2)]
    monkeypatch.setattr(frames, "HEAD", SimpleNamespace(size=8, unpack_from=counted))
    for before in ([], [short, short]):
        looks = 0
        (batch,) = Splitter().split(b"".join([*before, *row]))
        assert isinstance(batch, Batch)
        assert len(batch.sizes) == len(before) + len(row)
        assert looks == len(before) + 3


def test_unfinished_messages_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who begins message after message and finishes none is stopped."""
    begun = [struct.pack("<IIQB", 18, frames.PIECE, number, 0) + b"x" for number in range(4097)]
    splitter = Splitter()
    splitter.split(b"".join(begun[:4096]))
    with pytest.raises(FrameError):
        splitter.split(begun[4096])
    monkeypatch.setattr(frames, "MAX_FRAME", 5 * (PIPE_BUF - 17 + 512))
    splitter = Splitter()
    frame = frame_head(3 * PIPE_BUF, b"") + bytes(3 * PIPE_BUF)
    for number in (1, 2, 3, 4):
        splitter.split(next(pieces(frame, number)))
    splitter.split(next(pieces(frame, 5)))
    with pytest.raises(FrameError):
        splitter.split(next(pieces(frame, 6)))


# ------------------------------------------------------------------------------------------------------------- arguments


def test_arguments_at_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are rounded up, and never too long for a system call; an address is made absolute, and can use all of its room."""
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    assert [Deadline(left).milliseconds() for left in (None, 0, 0.0005, 1, 1e7)] == [None, 0, 1, 1001, 2**31 - 1]
    assert (check_timeout(1e300), check_timeout(0)) == (None, 0)
    assert check_address("here") == os.path.abspath("here")
    longest = "/" + "x" * (MAX_ADDRESS - 1)
    assert check_address(longest) == longest
    with pytest.raises(AddressError):
        check_address(longest + "x")
    with os.scandir(b"/") as entries, pytest.raises(TypeError, match="str path"):
        check_address(next(entries))
    assert check_authkey(bytearray(b"key")) == b"key"


# ----------------------------------------------------------------------------------------------------------- who is dead


@pytest.fixture
def ended() -> Iterator[int]:
    """A child that has ended and that nobody has asked for: a zombie."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield pid
    os.waitpid(pid, 0)


def test_nobody_asks_of_a_process_elsewhere() -> None:
    """Process 0 is one that this system has no number for: nothing is known of it, and it is no error."""
    peer = PeerProcess(0)
    assert (peer.pid, peer.fd, peer.must_be_asked, peer.is_dead()) == (0, -1, False, False)


def test_a_zombie_is_dead(ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no pidfds, one that has ended counts as dead before anybody has waited for it."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    peer, me = PeerProcess(ended), PeerProcess(os.getpid())
    assert (peer.must_be_asked, peer.is_dead()) == (True, True)
    assert (me.must_be_asked, me.is_dead()) == (True, False)


@pytest.mark.parametrize(("error", "dead"), [(psutil.NoSuchProcess(1), True), (psutil.AccessDenied(1), False)])
def test_an_answer_that_cannot_be_had(error: Exception, dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that goes while it is asked for is dead; one that may not be asked for is not."""

    def status(_: psutil.Process) -> str:
        raise error

    monkeypatch.delattr(os, "pidfd_open", raising=False)
    peer = PeerProcess(os.getpid())
    monkeypatch.setattr(psutil.Process, "status", status)
    assert peer.is_dead() is dead


# ----------------------------------------------------------------------------------------------------------------- rings


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
    memory = mmap.mmap(-1, CHUNK * CHUNKS)
    ring = Ring(1, memory)
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        ring.room.take(100)
        assert ring.put(b"fits", b"", writer)
        place = ring.room.next
        assert (place, memory[128:132]) == (192, b"fits")
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(PIPE_BUF))
        assert not ring.put(b"full", b"", writer)
        assert ring.room.next == place
        left = ring.room.end - place
        os.read(reader, 4 * PIPE_BUF)
        assert not ring.put(bytes(left + 1), b"", writer)
        assert ring.room.next == place
    finally:
        ring.close()
        os.close(reader)
        os.close(writer)
