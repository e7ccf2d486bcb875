"""What is routed, and the runs that it becomes: a batch of messages, messages in a ring, or a message in memory of its own.

A run whose messages are in shared memory waits in backlogs as any other does. Before it goes into a pipe, the reader of that
must be prepared for it; one that cannot be gets a copy, which is made once for all.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, Final

from mpbroadcast.broker.shared import Ring, RingHold
from mpbroadcast.wire.frames import OVERHEAD, Batch, Parcel, References
from mpbroadcast.wire.runs import Account, Run, memory_run, references_run, run_of


class RingMessages:
    """Neighbouring messages in a ring that go the same way, and the hold that keeps them there."""

    __slots__ = ("charge", "hold", "references")

    def __init__(self, references: References, hold: RingHold) -> None:
        self.references = references
        self.hold = hold
        self.charge = references.charge

    @property
    def topic(self) -> bytes:
        return self.references.topic

    @property
    def exclude(self) -> int:
        return self.references.exclude

    @property
    def sizes(self) -> array[int]:
        return self.references.sizes

    @property
    def ring(self) -> Ring:
        return self.hold.ring

    def fitting(self, room: int) -> int:
        """How many of the first messages fit into ``room`` of charge."""
        return self.references.fitting(room)

    def cut(self, count: int) -> tuple[RingMessages, RingMessages]:
        """The first ``count`` messages, and the others. Both keep all chunks: a little longer than they need."""
        first, rest = self.references.cut(count)
        return RingMessages(first, self.hold), RingMessages(rest, self.hold)

    def copied(self) -> Batch:
        """The messages themselves."""
        return self.hold.ring.copied(self.references)


Item = Batch | RingMessages | Parcel


class ReferencesRun(Run):
    """The run of messages in a ring. Its data is one whole write."""

    __slots__ = ("_copy", "hold", "references", "ring")

    shared = True

    def __init__(self, item: RingMessages, account: Account | None = None) -> None:
        data = references_run(item.references, item.ring.number)
        super().__init__(data, len(item.sizes), item.charge, 0, account)
        self.references = item.references
        self.hold = item.hold
        self.ring = item.ring
        self._copy: Run | None = None
        self.ring.waits(self.charge)

    def __del__(self) -> None:
        super().__del__()
        self.ring.waits(-self.charge)

    def charges(self) -> list[int]:
        return [size + OVERHEAD for size in self.references.sizes]

    def part(self, start: int, stop: int) -> Run:
        if start == 0 and stop == self.count:
            return self
        return ReferencesRun(RingMessages(self.references.cut(stop)[0].cut(start)[1], self.hold), self.account)

    def copied(self) -> Run:
        if self._copy is None:
            self._copy = run_of(self.ring.copied(self.references), self.account)
        return self._copy


class MemoryRun(Run):
    """The run of a message in memory of its own."""

    __slots__ = ("memory", "parcel")

    shared = True

    def __init__(self, parcel: Parcel, account: Account | None = None) -> None:
        super().__init__(memory_run(parcel, parcel.memory.number), 1, parcel.charge, 0, account)
        self.parcel = parcel
        self.memory = parcel.memory

    def copied(self) -> Run:
        run: Run = self.memory.run(self.parcel, self.account)
        return run


_RUNS: Final[dict[type, Callable[[Any, Account | None], Run]]] = {
    Batch: run_of,
    RingMessages: ReferencesRun,
    Parcel: MemoryRun,
}


def run_of_item(item: Item, account: Account | None = None) -> Run:
    """The run that an item becomes."""
    return _RUNS[type(item)](item, account)
