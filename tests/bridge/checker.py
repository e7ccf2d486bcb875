"""Find what bridges did wrong, from what was published and what each channel was given. Pure: no process, no clock.

A message is known by its source (a machine, one of its publishers, a kind of topic) and its number there, 0, 1, 2, ... An
origin is a stream and a machine: its messages have one order, which the channels of that machine show. What is missing on
another machine is a gap, and has a mark (``Lagged``, or ``BrokerRestarted`` on a machine whose broker died) between its
neighbours in that order.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final, NamedTuple, Protocol

MESSAGE, SPOILED, FOREIGN, LAGGED, COUNTED, RESTARTED, ERROR = range(7)
"""Events of a channel: a message; one with a wrong payload or topic; an object that no source has published; ``Lagged(None)``;
``Lagged`` with a number; ``BrokerRestarted``; any other error. A record is 8 bits of event, 8 of source, and 48 of number."""

_NUMBER: Final = (1 << 48) - 1


class Source(NamedTuple):
    """What publishes to one kind of topic, in order."""

    machine: str
    publisher: int
    kind: str


class Log:
    """What one channel was given, in 8 bytes for each event."""

    def __init__(self, records: Iterable[int] = ()) -> None:
        self.records = array("Q", records)

    def add(self, event: int, source: int = 0, number: int = 0) -> None:
        self.records.append(event << 56 | source << 48 | number)

    def message(self, source: int, number: int) -> None:
        self.records.append(source << 48 | number)


@dataclass(frozen=True)
class Layout:
    """Which kinds of topics each machine's bridge of each stream has: stream -> machine -> kinds.

    The order of streams is that in which each machine's bridges were made, and so the order in which its broker looks for one
    that has a message's topic.
    """

    streams: Mapping[str, Mapping[str, frozenset[str]]]

    def stream_of(self, machine: str, kind: str) -> str | None:
        """Return the stream that messages of this kind go out over; ``None`` if they stay on their machine."""
        for name, kinds in self.streams.items():
            if kind in kinds.get(machine, ()):
                return name
        return None

    def reaches(self, source: Source, machine: str) -> bool:
        """Return whether the messages of a source reach a machine."""
        stream = self.stream_of(source.machine, source.kind)
        return source.machine == machine or (stream is not None and source.kind in self.streams[stream].get(machine, ()))


@dataclass(frozen=True)
class Channel:
    """A channel, the kinds of topics that it has, and what it was given."""

    name: str
    machine: str
    kinds: frozenset[str]
    log: Log


@dataclass(frozen=True)
class Reasons:
    """What happened that may cost messages. Without it, nothing is missing, and nothing is announced."""

    kills: Mapping[str, int] = field(default_factory=dict)  # machine -> brokers of it that were killed
    drops: frozenset[tuple[str, str]] = frozenset()  # the origins whose outbox may have dropped
    losses: int = 0  # how often a log was trimmed, or lost what it had acknowledged


class Finding(NamedTuple):
    """One kind of thing that is wrong, how often it occurs, and its first occurrence."""

    occurrences: int
    example: str


class _Gap(NamedTuple):
    """Between two indices of a channel's log messages of one origin are missing, or may be."""

    begin: int
    end: int
    most: int  # marks that it explains


class _Inspection:
    """The check of one channel: :meth:`inspect` adds to the findings."""

    def __init__(self, channel: Channel, sources: Sequence[Source], layout: Layout, reasons: Reasons) -> None:
        self.channel = channel
        self.sources = sources
        self.layout = layout
        self.reasons = reasons
        self.places: list[array[int]] = []  # source -> number -> index in the log, -1 if missing
        self.marks: list[int] = []  # indices of all marks
        self.lagged: list[int] = []
        self.restarted: list[int] = []
        self.missing: list[int] = []  # source -> how many
        self.due = [source.kind in channel.kinds and layout.reaches(source, channel.machine) for source in sources]
        self.findings: dict[str, Finding] = {}

    def found(self, what: str, example: str) -> None:
        before = self.findings.get(what)
        self.findings[what] = (
            Finding(before.occurrences + 1, before.example) if before else Finding(1, f"{self.channel.name}: {example}")
        )

    def read(self, published: Sequence[int]) -> None:
        """Note where each message stands, and find what is wrong with single ones."""
        self.places = [array("q", [-1]) * count for count in published]
        places, due = self.places, self.due  # what the loop uses for each of millions of messages
        last = [-1] * len(published)
        for index, record in enumerate(self.channel.log.records):
            source = record >> 48
            number = record & _NUMBER
            if source > 255:
                self.note(index, record >> 56, number)
            elif source >= len(published) or number >= published[source]:
                self.found("forged", f"[{index}] source {source}, number {number}")
            elif due[source] and places[source][number] < 0 and number > last[source]:
                places[source][number] = index
                last[source] = number
            else:
                self.found(
                    self.fault(source, number), f"[{index}] {self.sources[source]}, number {number} behind {last[source]}"
                )
                if due[source] and places[source][number] < 0:
                    places[source][number] = index
        self.missing = [places.count(-1) if due else 0 for places, due in zip(self.places, self.due, strict=True)]

    def fault(self, index: int, number: int) -> str:
        """Return what is wrong with a message that has come."""
        source = self.sources[index]
        if self.due[index] and self.places[index][number] < 0:
            return "reordered"
        if self.due[index]:
            return "echoed" if source.machine == self.channel.machine else "doubled"
        if source.kind not in self.channel.kinds:
            return "wrong topic"
        others = {machine for kinds in self.layout.streams.values() for machine in kinds} - {source.machine}
        return "transit" if any(self.layout.reaches(source, machine) for machine in others) else "not bridged"

    def note(self, index: int, event: int, number: int) -> None:
        if event in (LAGGED, COUNTED):
            self.marks.append(index)
            self.lagged.append(index)
            if event == COUNTED:
                self.found("gap with a number", f"[{index}] {number}")
        elif event == RESTARTED:
            self.marks.append(index)
            self.restarted.append(index)
        else:
            self.found({SPOILED: "spoiled", FOREIGN: "forged"}.get(event, "error"), f"[{index}]")

    def may_miss(self, source: Source) -> bool:
        """Return whether messages of a source can be missing on this machine."""
        kills, machine = self.reasons.kills, self.channel.machine
        if source.machine == machine:
            return bool(kills.get(machine))
        origin = (self.layout.stream_of(source.machine, source.kind) or "", source.machine)
        return bool(kills.get(machine) or kills.get(source.machine) or origin in self.reasons.drops or self.reasons.losses)

    def check_sources(self) -> Iterator[_Gap]:
        """Find what each source misses without a mark. Yield the gaps of other machines whose broker died.

        Their own channels may miss the same messages, and so do not show in which order these were.
        """
        for index, missing in enumerate(self.missing):
            if not missing:
                continue
            source, places = self.sources[index], self.places[index]
            is_own = source.machine == self.channel.machine
            marks = self.restarted if is_own else self.marks
            if not self.may_miss(source):
                self.found("lost", f"{source}, number {places.index(-1)}")
                continue
            before, gaps = -1, 0
            for number, place in enumerate(places):
                if place < 0:
                    gaps += 1
                    continue
                if gaps and before < place:
                    if not _between(marks, before, place):
                        self.found("gap not announced", f"[{place}] {source}, before number {number}")
                    if self.reasons.kills.get(source.machine) and not is_own:
                        yield _Gap(before, place, 1)
                before, gaps = max(before, place), 0
            if gaps:  # the last message of each source is published when all is well again
                self.found("lost at the end", f"{source}, the last {gaps}")

    def check_origin(self, order: Sequence[int]) -> Iterator[_Gap]:
        """Compare with the order of another machine's broker, restricted to one stream. Yield the gaps.

        That includes those that no message shows, as what is missing is of topics that this channel does not have.
        """
        before, missing, silent, first = -1, 0, 0, ""
        for record in order:
            source = record >> 48
            if not self.due[source]:
                silent += 1
                continue
            place = self.places[source][record & _NUMBER]
            if place < 0:
                first = first or f"{self.sources[source]}, number {record & _NUMBER}"
                missing += 1
                continue
            if place < before:
                self.found("not in the order of the origin", f"[{place}] {self.sources[source]}, number {record & _NUMBER}")
                continue
            if missing and self.may_miss(self.sources[source]) and not _between(self.marks, before, place):
                self.found("gap not announced", f"[{place}] {missing} from {first}")
            if missing or silent:
                yield _Gap(before, place, bool(missing) + silent)
                missing, silent, first = 0, 0, ""
            before = place
        if silent:
            yield _Gap(before, len(self.channel.log.records), silent)

    def check_marks(self, gaps: Iterable[_Gap]) -> None:
        """Find marks that no gap explains. Each takeover of another machine, and each loss of a log, is announced once for each
        stream, whether or not messages are missing."""
        machine, kills = self.channel.machine, self.reasons.kills
        streams = [kinds for kinds in self.layout.streams.values() if kinds.get(machine, frozenset()) & self.channel.kinds]
        takeovers = sum(kills.get(other, 0) for kinds in streams for other in kinds if other != machine)
        allowed = takeovers + self.reasons.losses * len(streams)
        waiting = sorted(gaps, reverse=True)
        current: list[tuple[int, int, int]] = []  # end, begin, most
        furthest = -1  # the end of what has explained a mark
        for mark in self.lagged:
            while waiting and waiting[-1].begin < mark:
                gap = waiting.pop()
                heappush(current, (gap.end, gap.begin, gap.most))
            while current and current[0][0] <= mark:
                heappop(current)
            if current:
                end, begin, most = heappop(current)
                furthest = max(furthest, end)
                if most > 1:
                    heappush(current, (end, begin, most - 1))
            elif allowed:
                allowed -= 1
            else:
                self.found("gap announced twice" if mark < furthest else "gap announced without reason", f"[{mark}]")
        if takeovers and not self.marks:
            self.found("takeover not announced", f"{takeovers} of other machines")
        died = kills.get(machine, 0)
        if len(self.restarted) > died:
            self.found("restart announced without reason", f"{len(self.restarted)} times, after {died}")
        if died and not self.restarted:
            self.found("restart not announced", f"{died}")


def check(
    published: Mapping[Source, int], channels: Sequence[Channel], layout: Layout, reasons: Reasons | None = None
) -> dict[str, Finding]:
    """Return what is wrong, by its kind; empty if nothing is.

    ``published`` has how many messages each source has published; the index of a source in it is its number in the logs. The
    first channel of each machine has all topics: it shows the order of the machine's broker.
    """
    reasons = reasons or Reasons()
    sources = [*published]
    findings: dict[str, Finding] = {}
    orders: dict[tuple[str, str], array[int]] = {}
    for channel in channels:
        if not any(machine == channel.machine for _, machine in orders):
            orders.update(_orders(channel, published, layout))
    for channel in channels:
        inspection = _Inspection(channel, sources, layout, reasons)
        inspection.read([*published.values()])
        gaps = [*inspection.check_sources()]
        for (stream, machine), order in orders.items():
            kinds = layout.streams[stream].get(channel.machine, frozenset()) & channel.kinds if stream else frozenset()
            if machine != channel.machine and kinds:
                gaps += inspection.check_origin(order)
        inspection.check_marks(gaps)
        for what, found in inspection.findings.items():
            before = findings.get(what)
            findings[what] = Finding(before.occurrences + found.occurrences, before.example) if before else found
    return findings


class Row(Protocol):
    """What ``stats().bridges`` has for a stream."""

    @property
    def sent(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def received(self) -> int: ...
    @property
    def missed(self) -> int: ...


def check_figures(
    published: Mapping[Source, int], rows: Mapping[str, Mapping[str, Row]], layout: Layout, reasons: Reasons | None = None
) -> dict[str, Finding]:
    """Return what is wrong with the figures of ``stats().bridges``, stream -> machine -> row, once all has arrived.

    Brokers count from their own beginning, and so nothing is known of those that take over.
    """
    reasons = reasons or Reasons()
    findings: dict[str, Finding] = {}
    if any(reasons.kills.values()) or reasons.losses:
        return findings
    for stream, row_of in rows.items():
        dropped = sum(row.dropped for row in row_of.values())
        for machine, row in row_of.items():
            own = came = 0
            for source, count in published.items():
                if layout.stream_of(source.machine, source.kind) == stream:
                    is_due = source.machine != machine and layout.reaches(source, machine)
                    own += count if source.machine == machine else 0
                    came += count if is_due else 0
            expected = [("sent or dropped", own, row.sent + row.dropped), ("waiting", 0, row.waiting)]
            expected.append(("missed", dropped - row.dropped, row.missed))
            if not dropped:
                expected.append(("received", came, row.received))
            for name, right, figure in expected:
                if figure != right:
                    findings[f"stats: {name}"] = Finding(1, f"{stream} on {machine}: {figure}, not {right}")
    return findings


def _orders(channel: Channel, published: Mapping[Source, int], layout: Layout) -> dict[tuple[str, str], array[int]]:
    """Return the messages of each origin of a machine, in the order in which its broker has routed them."""
    machine = channel.machine
    streams = [layout.stream_of(machine, source.kind) if source.machine == machine else None for source in published]
    orders = {(stream, machine): array("Q") for stream in streams if stream is not None} or {("", machine): array("Q")}
    appends = [orders[stream, machine].append if stream is not None else None for stream in streams]
    ends = [source << 48 | count for source, count in enumerate(published.values())]
    latest = [-1] * len(appends)
    for record in channel.log.records:
        source = record >> 48
        if source >= len(appends) or record <= latest[source] or record >= ends[source]:
            # A mark, or a message that comes once more, or a forged one.
            continue
        latest[source] = record
        append = appends[source]
        if append is not None:
            append(record)
    return orders


def _between(marks: Sequence[int], begin: int, end: int) -> bool:
    """Return whether one of the sorted indices is between two others."""
    index = bisect_right(marks, begin)
    return index < len(marks) and marks[index] < end
