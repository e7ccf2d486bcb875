"""Runs: what the broker writes to a channel. Sans-IO: bytes in, bytes out.

A run is at most ``MOST_AT_ONCE`` neighbouring frames, unchanged, behind a table of their lengths::

    size u64 | count u32 | kind u8 | image u8 | skip u16 | first u64 | lengths | frames | tail byte

or, for messages in a ring, the broker's id of the ring, and the frames that refer to them::

    size u64 | count u32 | REFERENCES u8 | image u8 | skip u16 | first u64 | ring u32 | frames | tail byte

or, for a message in memory of its own, whose descriptor is sent on the socket beside the pipe::

    size u64 | 1 u32 | IN_MEMORY u8 | image u8 | skip u16 | first u64 | id u64 | length u64 | its head | tail byte

or a **note** at the position of messages, with a count or the id of a ring::

    size u64 | 0 u32 | kind u8 | inexact u8 | 0 u16 | value u64 | tail byte

``first`` is the id of the first message, which is its position in the broker's one order; the ids of the others follow it.
``lengths`` are ``count`` u32, none for a single frame. ``skip`` is the length of what precedes each payload. The channel reads
``length`` bytes from behind the first frame's head on: each read is one payload and the next frame's head, which unpickling
ignores. The tail byte stays in the pipe until the last message of the run is handed out: so the descriptor stays readable while
there is something to receive, and an empty pipe shows that all references in it have been read.

A :class:`Run` of the broker has as many of these as its batch needs, one behind the other: a backlog has the cost of one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from itertools import accumulate, pairwise
from struct import Struct
from typing import Any, Final, NamedTuple

from mpbroadcast.protocol.frames import HEAD, OVERHEAD, PIPE_BUF, REFERENCE_SIZE, Batch, MemfdMessage, References, Singles

RUN: Final = Struct("<QIBBHQ")
TAIL: Final = b"\n"
AROUND: Final = RUN.size + len(TAIL)  # bytes around the table and the frames
# Messages that a channel unpickles at once. More is no faster: they exceed a processor's cache, and Python's garbage collector
# begins to visit all of them, and so, in a forked process, to copy all of their memory. A reader shows its progress, too, by
# what it unpickles next: with more, ``close`` would not wait for one that takes long for a message.
MOST_AT_ONCE: Final = 128
PART: Final = 1 << 18  # bytes of a long message to read at once: the size of a pipe
MESSAGES: Final = 0
END: Final = 1
GAP: Final = 2
SKIPPED: Final = 3
OVERFLOWED: Final = 4
RING_OFFERED: Final = 5  # the descriptor of a ring has been sent
RING_GONE: Final = 6  # no later run refers to the ring
REFERENCES: Final = 7
IN_MEMORY: Final = 8
RESTARTED: Final = 9  # another broker has taken over: an unknown number of messages is missing here

_SINGLE: Final = Struct("<QIHH")  # a run's head up to ``skip``, with kind and image in one
_LONGEST_SINGLE: Final = PIPE_BUF + AROUND  # bytes: of a message that was one write, so it costs little to copy
_RING: Final = Struct("<I")
_MEMORY: Final = Struct("<QQ")


class Account:
    """The bytes of all runs that exist, each once, however many backlogs it is in."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0


class Run:
    """Messages for channels: ``data`` is what a pipe gets, shared by all backlogs that the run is in."""

    __slots__ = ("account", "charge", "count", "data", "missed", "size", "sizes")

    hold: Any = None  # keeps the messages if they are in shared memory, for which a reader must be prepared
    is_exact = True  # the count of a note: no more messages are missing

    def __init__(
        self,
        data: bytes | memoryview,
        count: int,
        charge: int,
        *,
        missed: int = 0,
        sizes: array[int] | None = None,
        account: Account | None = None,
    ) -> None:
        self.data = data
        self.size = len(data)  # bytes that a pipe gets
        self.count = count
        self.charge = charge  # bytes that it counts in a backlog
        self.missed = missed  # the count of a note
        self.sizes = sizes  # of the frames; None for a note, and for what is not copied whole
        self.account = account
        if account is not None:
            account.held += charge

    def __del__(self) -> None:
        if self.account is not None:
            self.account.held -= self.charge

    @property
    def is_gap(self) -> bool:
        """True for the note of missing messages."""
        return self.missed > 0 or not self.is_exact

    def rest(self, offset: int) -> bytes | memoryview:
        """Return bytes that a pipe gets from ``offset`` on, at least one."""
        return memoryview(self.data)[offset:]

    def charges(self) -> list[int]:
        """Return the bytes that each of its messages counts in a backlog."""
        return [self.charge] if self.sizes is None else [size + OVERHEAD for size in self.sizes]

    def copied(self) -> Run:
        """Return a run with the same messages that needs no shared memory."""
        return self

    def part(self, start: int, stop: int) -> Run:
        """Return its messages from ``start`` to before ``stop``, as a run."""
        if self.sizes is None or stop - start == self.count:
            return self
        _, _, _, image, skip, position = RUN.unpack_from(self.data)
        first = sum(self.sizes[:start])
        sizes = self.sizes[start:stop]
        return _pack(self._frames()[first : first + sum(sizes)], sizes, skip, image, position + start, self.account)

    def singles(self) -> list[Run]:
        """Return its messages, each as a run."""
        if self.sizes is None or self.count == 1:
            return [self]
        _, _, _, image, skip, position = RUN.unpack_from(self.data)
        frames, parts = self._frames(), pairwise(accumulate(self.sizes, initial=0))
        return [
            _pack(frames[start:end], array("I", (end - start,)), skip, image, id, self.account)
            for id, (start, end) in enumerate(parts, position)
        ]

    def _frames(self) -> bytes:
        frames: list[bytes | memoryview] = []
        start = 0
        while start < self.size:
            size, count, *_ = RUN.unpack_from(self.data, start)
            frames.append(self.data[start + RUN.size + (4 * count if count > 1 else 0) : start + size - len(TAIL)])
            start += size
        return b"".join(frames)

    def divided(self, offset: int) -> tuple[Run, Run] | None:
        """Return it as two runs without a copy, the first with the messages that end within the first ``offset`` bytes.

        ``None`` if that would leave one of the two empty: what a channel unpickles at once is not divided.
        """
        if self.count <= MOST_AT_ONCE or self.sizes is None:
            return None
        count, middle = 0, 0
        while middle < self.size:
            size, messages, *_ = RUN.unpack_from(self.data, middle)
            if middle + size > offset:
                break
            middle += size
            count += messages
        if not 0 < count < self.count:
            return None
        data = memoryview(self.data)
        return _View(self, data[:middle], self.sizes[:count]), _View(self, data[middle:], self.sizes[count:])

    @property
    def first(self) -> int:
        """How many bytes the messages take that a channel unpickles first."""
        size: int = RUN.unpack_from(self.data)[0]
        return size


class _View(Run):
    """A part of another run's data, all of which stays in the account as long as it is in a backlog."""

    __slots__ = ("_whole",)

    def __init__(self, whole: Run, data: memoryview, sizes: array[int]) -> None:
        super().__init__(data, len(sizes), sum(sizes) + len(sizes) * OVERHEAD, sizes=sizes)
        self.account = whole.account
        self._whole = whole

    def __del__(self) -> None:
        pass  # the whole run leaves the account


class SinglesRun(Run):
    """Messages of changing topics, each as a run of one message, which several of these share.

    With ``counted``, other runs have all of them, too, and stay in the account for as long as this one is in a backlog.
    """

    __slots__ = ("_counted", "_singles")
    account: Account

    def __init__(self, singles: list[bytes], account: Account, counted: tuple[Run, ...] = ()) -> None:
        self._singles = singles
        self._counted = counted
        self.count = len(singles)
        self.size = sum(map(len, singles))
        self.charge = self.size + self.count * (OVERHEAD - AROUND)
        self.missed = 0
        self.account = account
        if not counted:
            account.held += self.charge

    def __del__(self) -> None:
        if not self._counted:
            super().__del__()

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return b"".join(self._singles)

    @property
    def sizes(self) -> array[int]:  # type: ignore[override]
        return array("I", [len(one) - AROUND for one in self._singles])

    def part(self, start: int, stop: int) -> Run:
        return self if stop - start == self.count else SinglesRun(self._singles[start:stop], self.account)

    def singles(self) -> list[Run]:
        return [self.part(index, index + 1) for index in range(self.count)]

    def divided(self, offset: int) -> tuple[Run, Run] | None:
        count = bisect_right([*accumulate(map(len, self._singles))], offset)
        if not 0 < count < self.count:
            return None
        first, rest = self._singles[:count], self._singles[count:]
        return SinglesRun(first, self.account, (self,)), SinglesRun(rest, self.account, (self,))

    @property
    def first(self) -> int:
        return sum(map(len, self._singles[:MOST_AT_ONCE]))


def single_runs(singles: Singles, position: int) -> list[bytes]:
    """Return each message as a run, as a pipe gets it; ``position`` is the id of the first one."""
    pack, before = RUN.pack, HEAD.size
    messages = zip(singles.topics, singles.frames, strict=True)
    return [
        pack(AROUND + len(frame), 1, MESSAGES, False, before + len(topic), id) + frame + TAIL
        for id, (topic, frame) in enumerate(messages, position)
    ]


def run_of(batch: Batch, position: int, account: Account | None = None) -> Run:
    """Return the run of a batch; ``position`` is the id of its first message."""
    frames, sizes, _, _, skip, image, _ = batch
    if len(sizes) > 1:
        return _pack(frames, sizes, skip, image, position, account)
    size = len(frames)  # a single message needs no table: most runs, where topics change with each message
    data = RUN.pack(AROUND + size, 1, MESSAGES, image, skip, position) + frames + TAIL
    return Run(data, 1, size + OVERHEAD, sizes=sizes, account=account)


def _pack(frames: bytes, sizes: array[int], skip: int, image: bool, position: int, account: Account | None) -> Run:
    count = len(sizes)
    charge = len(frames) + count * OVERHEAD
    if count <= MOST_AT_ONCE:
        table = sizes.tobytes() if count > 1 else b""
        head = RUN.pack(RUN.size + len(table) + len(frames) + len(TAIL), count, MESSAGES, image, skip, position)
        return Run(b"".join((head, table, frames, TAIL)), count, charge, sizes=sizes, account=account)
    parts: list[Any] = []
    view = memoryview(frames)
    end = 0
    for first in range(0, count, MOST_AT_ONCE):
        some = sizes[first : first + MOST_AT_ONCE]
        start, end = end, end + sum(some)
        table = some.tobytes() if len(some) > 1 else b""
        size = RUN.size + len(table) + end - start + len(TAIL)
        parts += (RUN.pack(size, len(some), MESSAGES, image, skip, position + first), table, view[start:end], TAIL)
    return Run(b"".join(parts), count, charge, sizes=sizes, account=account)


class SharedRun(Run):
    """Messages in a ring, or one in memory of its own; ``hold`` keeps them there. Its data is one whole write."""

    __slots__ = ("_copy", "hold", "item", "position")

    def __init__(self, item: References | MemfdMessage, position: int, account: Account | None = None) -> None:
        self.item = item
        self.position = position  # the id of the first message
        self.hold = item.hold
        self._copy: Run | None = None
        super().__init__(self.hold.data(item, position), len(item.sizes), item.charge, sizes=item.sizes, account=account)

    def part(self, start: int, stop: int) -> Run:
        if start == 0 and stop == self.count:
            return self
        return SharedRun(self.item.cut(stop)[0].cut(start)[1], self.position + start, self.account)

    def copied(self) -> Run:
        """Return the messages copied out of shared memory: the same run each time."""
        if self._copy is None:
            if isinstance(self.item, MemfdMessage) and self.item.length > PART:
                self._copy = LongRun(self.item, self.position, self.hold)
            else:
                self._copy = run_of(self.hold.copied(self.item), self.position, self.hold.copies)
        return self._copy


class LongRun(Run):
    """A long message in memory of its own, for a pipe that gets the message: read part by part, as the pipe takes it.

    Copied at once, it would delay all others, and take its size once more in the broker.
    """

    __slots__ = ("_item", "_memory")

    def __init__(self, item: MemfdMessage, position: int, memory: Any) -> None:
        self._item = item
        self._memory = memory
        size = RUN.size + len(item.head) + item.length + len(TAIL)
        head = RUN.pack(size, 1, MESSAGES, item.image, len(item.head), position) + item.head
        super().__init__(head, 1, item.charge, account=memory.copies)
        self.size = size

    def rest(self, offset: int) -> bytes | memoryview:
        if offset < len(self.data):
            return super().rest(offset)
        offset -= len(self.data)
        return self._memory.read(offset, min(PART, self._item.length - offset)) or TAIL


def references_run(references: References, position: int, ring: int) -> bytes:
    """Return what a pipe gets for messages in the broker's ring of this id, the first at ``position``: one whole write."""
    size = RUN.size + _RING.size + len(references.frames) + len(TAIL)
    head = RUN.pack(size, len(references.sizes), REFERENCES, references.image, references.skip, position)
    return b"".join((head, _RING.pack(ring), references.frames, TAIL))


def memory_run(memfd_message: MemfdMessage, position: int, memory: int) -> bytes:
    """Return what a pipe gets for a message in memory of its own, which is sent beside the pipe with the id ``memory``."""
    size = RUN.size + _MEMORY.size + len(memfd_message.head) + len(TAIL)
    head = RUN.pack(size, 1, IN_MEMORY, memfd_message.image, len(memfd_message.head), position)
    return b"".join((head, _MEMORY.pack(memory, memfd_message.length), memfd_message.head, TAIL))


class _InexactGap(Run):
    """A gap of which more may be missing than its count."""

    __slots__ = ()

    is_exact = False


def note_run(kind: int, missed: int = 0, *, is_exact: bool = True) -> Run:
    """Return a note: ``END`` (a clean end), ``GAP`` (``missed`` messages are missing here, or more if that is not exact),
    ``SKIPPED`` (the same under ``latest``, which is counted and not raised), ``OVERFLOWED`` (the next message did not fit)."""
    return (Run if is_exact else _InexactGap)(note(kind, missed, is_exact=is_exact), 0, 0, missed=missed)


def note(kind: int, value: int, *, is_exact: bool = True) -> bytes:
    """Return a note as a pipe gets it. The value is a count, or the id of a ring."""
    return RUN.pack(AROUND, 0, kind, not is_exact, 0, value) + TAIL


class RunView(NamedTuple):
    """The head of a run. ``messages`` is how many it has, from ``position`` on; in a note, the position is the value."""

    size: int
    kind: int
    messages: int
    image: bool
    skip: int
    position: int
    sizes: array[int] | None  # of the frames; None for a single one
    first: int  # where the first frame starts


def read_run(data: bytes, start: int) -> RunView | None:
    """Return the run at ``start``, or ``None`` while its head is not whole. The frames may not be there yet."""
    if len(data) - start < RUN.size:
        return None
    size, count, kind, image, skip, position = RUN.unpack_from(data, start)
    first = start + RUN.size
    if kind == MESSAGES and count > 1 and len(data) - first >= 4 * count:
        sizes = array("I", data[first : first + 4 * count])
        return RunView(size, kind, count, bool(image), skip, position, sizes, first + 4 * count)
    if kind == REFERENCES:
        first += _RING.size
    elif kind == IN_MEMORY:
        first += _MEMORY.size
    return RunView(size, kind, count, bool(image), skip, position, None, first)


def read_singles(data: bytes, start: int, end: int, most: int) -> tuple[list[bytes], list[int], int]:
    """Return the payloads of the runs from ``start`` on that have a single message each, where these runs start, and the end.

    Where topics change with each message, all runs are such. They are read up to the first one that has a table, an image, or
    its message elsewhere, is a note, is longer than what a publisher writes at once, or is not whole before ``end``; at most
    ``most`` of them. The last tail byte may not be there yet. Payloads are copies, as views would count as objects for
    Python's garbage collector.
    """
    payloads: list[bytes] = []
    starts: list[int] = []
    unpack, head = _SINGLE.unpack_from, RUN.size
    last = len(data) - head
    for _ in range(most):
        if start > last:
            break
        size, count, kind, skip = unpack(data, start)
        stop = start + size
        if count != 1 or kind != MESSAGES or size > _LONGEST_SINGLE or stop > end:
            break
        payloads.append(data[start + head + skip : stop - 1])
        starts.append(start)
        start = stop
    return payloads, starts, start


def read_references(data: bytes, run: RunView) -> tuple[int, bytes]:
    """Return the ring, and the frames that refer to it, of a run that is all in ``data``."""
    (ring,) = _RING.unpack_from(data, run.first - _RING.size)
    each = run.skip + REFERENCE_SIZE
    return ring, data[run.first : run.first + run.messages * each]


def read_memory(data: bytes, run: RunView) -> tuple[int, int]:
    """Return id and length of the message in memory of its own, of a run that is all in ``data``."""
    message_id, length = _MEMORY.unpack_from(data, run.first - _MEMORY.size)
    return message_id, length
