"""Waiting until everything that was published has reached its channels, or has been handled: for ``mpbroadcast.testing``.

All of it is polling: ``settle`` makes the broker route what was published by now, ``stats`` has the counters of each
channel, and ``probe`` writes a control record without effect into an empty pipe. Once that has been read, its reader has called
again. One call may read once after it has taken the last message and before it returns, so two probes in succession are needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

from mpbroadcast.client.broadcaster import Broadcaster
from mpbroadcast.client.broker_client import LEAST_TIME
from mpbroadcast.client.channel import Channel
from mpbroadcast.client.subscribing import Subscribing
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, TimedOut
from mpbroadcast.posix.waiting import run
from mpbroadcast.protocol.runs import AROUND
from mpbroadcast.stats import BrokerStats, GroupStats, SubscriberStats, snapshot
from mpbroadcast.validation import check_timeout

_PAUSE: Final = 0.002  # seconds between two looks
_PROBES: Final = 2


def described(row: SubscriberStats) -> str:
    """Return a text that names the channel of a row, and the process that has it."""
    name = "" if row.name is None else f" {row.name!r}"
    topics = ", ".join(map(repr, row.topics)) or "no topic"
    mine = " (this process)" if row.pid == os.getpid() else ""
    return f"channel {row.id}{name} on {topics} of process {row.pid}{mine}"


class _Settling:
    """The state of one call: how far each channel must get, or has been probed."""

    def __init__(self, bus: Broadcaster[Any], timeout: float | None, call: str) -> None:
        self.bus = bus
        self.timeout = check_timeout(timeout)
        self.call = call
        self.deadline = Deadline(self.timeout)
        self.is_routed = False
        self.stats: BrokerStats | None = None  # the last one
        self._needed: dict[int | str, SubscriberStats | GroupStats] = {}  # the rows when all was routed
        self._probed: dict[int, tuple[int, int]] = {}  # how many probes, and what had been published to the channel
        self._calm_at = -1  # what had been published when every reader had asked for more

    def request(self, do: str, **fields: Any) -> dict[str, Any]:
        try:
            return run(self.bus._requesting(do, self.deadline.at_least(LEAST_TIME), **fields)).body
        except TimedOut:
            raise self.failure(f"the broker did not reply to {do!r}") from None

    def look(self) -> BrokerStats:
        """Route what was published by now, unless that is done, and return a snapshot of the broker."""
        stats = self._look()
        if self.stats is not None and stats.pid != self.stats.pid:  # another broker has taken over, and counts anew
            self.is_routed, self._calm_at = False, -1
            self._needed.clear()
            self._probed.clear()
            stats = self._look()
        self.stats = stats
        return stats

    def _look(self) -> BrokerStats:
        is_routed = self.is_routed or bool(self.request("settle")["done"])
        stats = snapshot(self.request("stats"))
        if is_routed and not self.is_routed:
            self.is_routed = True
            self._needed.update({row.id: row for row in stats.subscribers}, **stats.groups)
        return stats

    def late(self, stats: BrokerStats) -> list[SubscriberStats]:
        """Return the open channels of which a message that was published before is not in the pipe yet."""
        return [row for row in stats.subscribers if row.is_open and self._is_late(row, stats)]

    def _is_late(self, row: SubscriberStats, stats: BrokerStats) -> bool:
        if row.group is None:
            needed = self._needed.get(row.id)
            return isinstance(needed, SubscriberStats) and _lacks(row, needed, row.delivered)
        now, needed = stats.groups.get(row.group), self._needed.get(row.group)
        if now is None or not isinstance(needed, GroupStats):
            return False
        left = needed.waiting if row.overflow == "drop_newest" else needed.waiting + needed.dropped - now.dropped
        return bool(now.waiting) and now.delivered - needed.delivered < left

    def unasked(self, stats: BrokerStats) -> list[SubscriberStats]:
        """Probe the readers of open channels. Return the channels whose readers have not been seen to ask for more."""
        rows = [row for row in stats.subscribers if row.is_open and not self._has_asked(row)]
        if rows:
            self._calm_at = -1
        elif self._calm_at != stats.published:  # a handler may have published: what it did is routed before the next snapshot
            self._calm_at, self.is_routed = stats.published, False
            return [row for row in stats.subscribers if row.is_open]
        return rows

    def _has_asked(self, row: SubscriberStats) -> bool:
        count, published = self._probed.get(row.id, (0, -1))
        if row.published != published:
            count = 0
        if row.unread or row.waiting:
            return False
        if count < _PROBES:
            reply = self.request("probe", subscription=row.id)
            if reply["written"]:
                is_same = count and reply["published"] == published
                self._probed[row.id] = (count + 1 if is_same else 1, reply["published"])
            return False
        return True

    def pause(self, problem: Callable[[], str]) -> None:
        if self.deadline.remaining() == 0:
            raise self.failure(problem())
        time.sleep(_PAUSE)

    def failure(self, problem: str) -> AssertionError:
        return AssertionError(f"{self.call}() timed out after {self.timeout} s: {problem}")

    def not_settled(self, late: list[SubscriberStats]) -> str:
        """Return which channels, or publishers, keep it from being settled."""
        stats = self.stats
        if stats is None:
            return "the broker did not reply"
        problems = [f"{described(row)} has {_waiting(row, stats)} message(s) that its pipe has no room for" for row in late]
        rows = {row.id: row for row in stats.subscribers}
        for row in stats.publisher_rows:
            if row.waits_for is not None:
                full = rows.get(row.waits_for) if isinstance(row.waits_for, int) else None
                what = described(full) if full is not None else f"group or bridge {row.waits_for!r}"
                problems.append(f"process {row.pid} publishes, and its messages wait for {what}, whose backlog is full")
        return "; ".join(problems) or "messages are still on their way"


def _lacks(row: SubscriberStats, needed: SubscriberStats, delivered: int) -> bool:
    if row.overflow == "drop_newest":  # those that are dropped are behind those that must be in the pipe
        return delivered < needed.delivered + needed.waiting
    return delivered + row.missed < needed.published


def _waiting(row: SubscriberStats, stats: BrokerStats) -> int:
    return row.waiting if row.group is None else stats.groups[row.group].waiting


def settle(bus: Broadcaster[Any], timeout: float | None) -> None:
    state = _Settling(_checked(bus), timeout, "settle")
    while True:
        stats = state.look()
        late = state.late(stats)
        if state.is_routed and not late:
            return
        state.pause(lambda rows=late: state.not_settled(rows))  # type: ignore[misc]


def handled(bus: Broadcaster[Any], timeout: float | None) -> None:
    state = _Settling(_checked(bus), timeout, "handled")
    while True:
        stats = state.look()
        late = state.late(stats)
        rows: list[SubscriberStats] = []
        if state.is_routed and not late:
            rows = state.unasked(stats)
            if not rows and state.is_routed:
                return

        def problem(late: list[SubscriberStats] = late, rows: list[SubscriberStats] = rows) -> str:
            if late or not rows:
                return state.not_settled(late)
            return "; ".join(f"the reader of {described(row)} {_unread(row)}" for row in rows)

        state.pause(problem)


def _unread(row: SubscriberStats) -> str:
    return f"has {row.unread} bytes to read" if row.unread > AROUND else "has not asked for another message"


def drain(bus: Broadcaster[Any], channel: Channel[Any], timeout: float | None) -> list[Any]:
    state = _Settling(_checked(bus), timeout, "drain")
    own: Channel[Any] = bus._own_channel(channel, "channel")
    own.poll(0)  # which opens it
    got: list[Any] = []
    while True:
        stats = state.look()
        rows = [row for row in stats.subscribers if row.id == own.id]
        late = [row for row in state.late(stats) if row.id == own.id]
        is_settled = bool(rows) and state.is_routed and not late  # without a row it has ended, and its end is to come
        if is_settled or state.is_routed or not (rows and rows[0].overflow == "latest"):
            is_open = _receive(own, got, state.deadline)
            if is_settled or not is_open:
                return got
        state.pause(lambda rows=late: state.not_settled(rows))  # type: ignore[misc]


def _receive(channel: Channel[Any], got: list[Any], deadline: Deadline) -> bool:
    """Append what is in the pipe, until that is empty or the time is over. Return False at the end of the channel."""
    try:
        while channel.poll(0):
            got += channel.recv_many(timeout=None if channel._ownership.keeps_newest else 0)
            if deadline.remaining() == 0:
                break
    except TimedOut:
        pass  # another thread was faster
    except EOFError:
        return False
    except BroadcastError as error:
        if got:
            error.add_note(f"{len(got)} message(s) were received before this: {got!r:.500}")
        raise
    return True


def _checked(bus: Broadcaster[Any]) -> Broadcaster[Any]:
    if not isinstance(bus, Subscribing):
        raise TypeError(f"bus must be a Broadcaster, not {type(bus).__name__}")
    return bus
