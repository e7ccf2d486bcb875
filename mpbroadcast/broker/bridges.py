"""The streams that are bridged: what is kept of each, whichever session is at work, and which session that is.

A session belongs to a process. One at a time is at work: it is given what the outbox has, acknowledges positions in its pipe
back, and hands on what other buses have sent by a publisher of its own, whose inlet decides what is routed. When its process
dies, its pipe is closed or its publisher is refused, it is removed as any subscription, and entered in ``gone``. The server
then fences its publisher, before another session begins: what was read and is not routed comes again from the log.

For the broker that takes over (``restart=True``), the journal has each stream, and the position up to which each other origin
may have been routed, written down before it is. So a takeover may lose, and never doubles.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from mpbroadcast import trap_points
from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.bridging import Arrivals, Inbound, Topics
from mpbroadcast.broker.core.limits import Cost
from mpbroadcast.broker.core.policies import new_backlog
from mpbroadcast.broker.core.router import Router
from mpbroadcast.broker.host.journal import Journal
from mpbroadcast.broker.members import Peer, Publisher, Session, Subscription
from mpbroadcast.broker.outbox import BridgeReader, Outbox
from mpbroadcast.broker.registry import Registry
from mpbroadcast.broker.traffic import Traffic
from mpbroadcast.protocol.frames import Arrival, BridgeFrame, Item

log = logging.getLogger("mpbroadcast.broker")

_ORIGIN: Final = 8  # bytes
_DOWN: Final = {"state": "down", "lag": None}

Reported = dict[str, Any]


class Candidate(NamedTuple):
    """A session that stands by: its request is replied to when it is at work."""

    connection: ControlConnection
    session: Session
    shared: bool


class Bridge:
    """All that is kept of one stream. ``origin`` is this bus's, ``incarnation`` which of its brokers this is."""

    def __init__(self, outbox: Outbox, topics: list[str], cost: Cost, origin: bytes, incarnation: int = 1) -> None:
        self.stream = outbox.name
        self.outbox = outbox
        self.topics = topics
        self.cost = cost
        self.wanted = Topics(topics)
        self.origin = origin
        self.incarnation = incarnation
        self.cursor: str | None = None  # behind all in the log that was handed on
        self.inbound = Inbound()
        self.standing_by: deque[Candidate] = deque()
        self.reported: Reported = {"url": "", "error": None, "refused": 0, **_DOWN}
        self.refused_before = 0  # entries, by former sessions


class Bridges:
    """The bridges by their streams. The first one that has a topic gets its messages, and no other."""

    def __init__(self, registry: Registry, traffic: Traffic, router: Router[Subscription], journal: Journal | None) -> None:
        self.gone: list[BridgeReader] = []  # of sessions that have ended
        self.traffic = traffic
        self._registry = registry
        self._router = router
        self._notes = _Notes(journal)
        self._bridges: dict[str, Bridge] = {}
        self._owner = Session(0, Peer(0), registry.budget)  # of all outboxes, which have its budget together
        self._is_stopping = False

    def __iter__(self) -> Iterator[Bridge]:
        return iter([*self._bridges.values()])

    def find(self, stream: str) -> Bridge | None:
        return self._bridges.get(stream)

    def declare(self, stream: str, topics: list[str], cost: Cost, capacity: int, policy: str) -> Bridge:
        """Return the bridge of this stream; make it if there is none.

        :raises ValueError: it has other topics, another capacity or another policy.
        :raises OverBudget: there are too many.
        """
        bridge = self._bridges.get(stream)
        if bridge is None:
            self._owner.budget.check(cost)
            bridge = self._make(stream, topics, cost, capacity, policy, os.urandom(_ORIGIN))
            self._notes.write_stream(bridge)
            return bridge
        there = {"topics": {*bridge.topics}, "overflow": bridge.outbox.policy, "capacity": bridge.outbox.backlog.capacity}
        wanted = {"topics": {*topics}, "overflow": policy, "capacity": capacity}
        if others := [key for key in there if there[key] != wanted[key]]:
            text = f"bridge {stream!r} is there with other {' and '.join(others)}"
            raise ValueError(f"{text}: agree on them, or name another stream")
        return bridge

    def _make(
        self, stream: str, topics: list[str], cost: Cost, capacity: int, policy: str, origin: bytes, incarnation: int = 1
    ) -> Bridge:
        outbox = Outbox(-self._registry.new_id(), stream, self._owner, new_backlog(capacity, policy))
        self._owner.budget.spend(cost)
        self._router.alternatives[outbox] = None
        self._router.add(outbox, topics or ["*"])
        for publisher in self.traffic.publishers.values():
            if publisher.inlet is not None:
                publisher.not_yet.append(_never(outbox))
        bridge = self._bridges[stream] = Bridge(outbox, topics, cost, origin, incarnation)
        return bridge

    def forget(self, bridge: Bridge) -> None:
        """Drop all that is kept of a stream that no session is at work for."""
        if self._bridges.pop(bridge.stream, None) is None:
            return
        outbox = bridge.outbox
        self.traffic.drop(outbox)
        self._router.alternatives.pop(outbox, None)
        for publisher in self.traffic.publishers.values():
            if publisher.inlet is not None:
                publisher.not_yet.remove(_never(outbox))
        self._owner.budget.release(bridge.cost)
        if outbox.outbound.waiting:
            log.warning("%d message(s) of bridge %r were not sent: dropped", outbox.outbound.waiting, bridge.stream)
        outbox.backlog.discard()
        self._notes.forget(bridge)

    # --- sessions

    def stand_by(self, bridge: Bridge, candidate: Candidate) -> None:
        """Let a session be at work, now or when those before it have gone."""
        bridge.standing_by = deque(one for one in bridge.standing_by if not one.connection.is_closed)
        bridge.standing_by.append(candidate)
        self._advance(bridge)

    def _advance(self, bridge: Bridge) -> None:
        """Let the next session be at work, if none is."""
        while bridge.outbox.reader is None and bridge.standing_by:
            connection, session, shared = bridge.standing_by.popleft()
            if connection.is_closed or session.id not in self._registry.sessions:
                continue
            reader = BridgeReader(self._registry.new_id(), session, bridge.outbox, self.gone)
            self._registry.add(reader)
            try:
                ends = self._registry.begin_opening(reader, connection, shared=shared)
            except OSError as error:
                self._registry.remove(reader)
                text = "the broker has no descriptor left for another pipe"
                connection.reply({"error": "system", "text": text, "errno": error.errno})
                continue
            reader.begin()
            self._registry.confirm_open(reader, session, is_abandoned=False)
            bridge.reported |= {"state": "connecting", "error": None}
            state = {"origin": bridge.origin.hex(), "incarnation": bridge.incarnation, "cursor": bridge.cursor}
            state |= {"acknowledged": bridge.outbox.outbound.acknowledged, "reader": reader.id}
            connection.reply({**state, "fd_socket": reader.window is not None, "reports": True}, *ends)
            self.traffic.mark(bridge.outbox)

    def add_publisher(self, reader: BridgeReader, publisher: Publisher) -> None:
        """Let what this publisher writes be handed on by the session of ``reader``; what it had before is fenced."""
        self._fence(reader)
        bridge = self._bridges[reader.outbox.name]
        reader.publisher = publisher
        publisher.inlet = _Inlet(bridge, reader, self)
        publisher.not_yet.extend(map(_never, self._router.alternatives))

    def put_gap(self, bridge: Bridge) -> None:
        """Show each channel that may get messages of this stream that some are missing."""
        self.traffic.routing.put_gap(bridge.wanted)

    def note(self, bridge: Bridge, origin: bytes = b"", ahead: int = 0) -> None:
        """Write the stream down, or of one origin how far it may be routed."""
        if origin:
            self._notes.write_position(bridge, origin, ahead)
        else:
            self._notes.write_stream(bridge)

    def forget_origin(self, bridge: Bridge, origin: bytes) -> None:
        self._notes.drop(bridge.stream, origin.hex())

    def report(self, bridge: Bridge, reported: Reported) -> None:
        """Take into account what the session at work reports of itself, for the statistics."""
        bridge.reported |= reported
        bridge.reported["refused"] = bridge.refused_before + reported["refused"]

    def work_off(self) -> None:
        """Fence the publishers of the sessions that have ended, and let the next ones be at work."""
        while self.gone:
            reader = self.gone.pop()
            outbox = reader.outbox
            self._fence(reader)
            if outbox.reader is not reader:
                continue
            outbox.reader = None
            bridge = self._bridges.get(outbox.name)
            if bridge is None:
                continue
            bridge.reported |= _DOWN
            bridge.refused_before = bridge.reported["refused"]
            if self._is_stopping:
                self.forget(bridge)
            else:
                self._advance(bridge)

    def _fence(self, reader: BridgeReader) -> None:
        publisher, reader.publisher = reader.publisher, None  # so that nothing is in a cycle
        if publisher is not None and publisher.inlet is not None:
            publisher.inlet.fence()
            self.traffic.fence(publisher)

    def stop(self) -> None:
        """Begin the end of the broker: the sessions at work are given what waits, and no other one begins."""
        self._is_stopping = True
        for bridge in self:
            while bridge.standing_by:
                connection = bridge.standing_by.popleft().connection
                if not connection.is_closed:
                    connection.reply({"ended": True})
            if bridge.outbox.reader is None:
                self.forget(bridge)

    # --- the broker before this one

    def restore(self) -> None:
        """Take over what is written down."""
        for entry in self._notes.streams():
            cost = Cost(*entry["cost"])
            made = entry["stream"], entry["topics"], cost, entry["capacity"], entry["policy"]
            bridge = self._make(*made, bytes.fromhex(entry["own"]), entry["incarnation"] + 1)
            bridge.cursor = entry["cursor"]
            self._notes.write_stream(bridge)
        for entry in self._notes.positions():
            known = self._bridges.get(entry["stream"])
            if known is not None:
                known.inbound.restore(bytes.fromhex(entry["origin"]), entry["incarnation"], entry["position"])


class _Inlet:
    """Decides which messages of one session are routed."""

    def __init__(self, bridge: Bridge, reader: BridgeReader, bridges: Bridges) -> None:
        self._is_fenced = False
        self._bridge = bridge
        self._arrivals = Arrivals(bridge.inbound)
        self._reader = reader
        self._bridges = bridges

    def begin(self, frame: BridgeFrame) -> None:
        if self._is_fenced:
            return
        bridge, bridges = self._bridge, self._bridges
        if isinstance(frame, Arrival):
            begun = self._arrivals.begin(*frame)
            if begun.forgotten is not None:
                bridges.forget_origin(bridge, begun.forgotten)
            if begun.ahead:
                bridges.note(bridge, frame.origin, begun.ahead)
                trap_points.reach("noted positions")
            if begun.has_gap:
                bridges.put_gap(bridge)
        elif frame.position:
            bridge.cursor = frame.position
            bridges.note(bridge)
        else:
            bridge.inbound.note_gap()
            bridges.put_gap(bridge)

    def admit(self, item: Item) -> Item | None:
        if self._is_fenced:
            return None
        count = len(item.sizes)
        had = self._arrivals.drop_had(count)
        if had == count:
            return None
        if not self._bridge.wanted.wants(item.topic):
            self._arrivals.take(count - had)
            return None
        return item.cut(had)[1] if had else item

    def routed(self, count: int) -> None:
        self._arrivals.take(count)
        self._bridge.inbound.received += count

    def refuse(self) -> None:
        if self._reader.is_open:
            self._bridges.traffic.delivery.gone.append(self._reader)

    def fence(self) -> None:
        self._is_fenced = True


class _Notes:
    """The part of the bridges that is written down for the broker that takes over; without a journal, nothing."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._ids: dict[tuple[str, str], int] = {}  # of each entry: a stream, and an origin or ""
        for entry in journal.bridges if journal is not None else ():
            self._ids[entry["stream"], entry["origin"]] = entry["id"]

    def write_stream(self, bridge: Bridge) -> None:
        backlog = bridge.outbox.backlog
        kept = {"own": bridge.origin.hex(), "incarnation": bridge.incarnation, "cursor": bridge.cursor}
        options = {"topics": bridge.topics, "capacity": backlog.capacity, "policy": backlog.policy, "cost": list(bridge.cost)}
        self._put(bridge.stream, "", kept | options)

    def write_position(self, bridge: Bridge, origin: bytes, ahead: int) -> None:
        incarnation, _ = bridge.inbound.position(origin)
        self._put(bridge.stream, origin.hex(), {"incarnation": incarnation, "position": ahead})

    def _put(self, stream: str, origin: str, fields: dict[str, Any]) -> None:
        if self._journal is not None:
            id = self._ids.get((stream, origin))
            if id is None:
                id = self._ids[stream, origin] = self._journal.new_bridge_id()
            self._journal.put({"id": id, "stream": stream, "origin": origin, **fields})

    def drop(self, stream: str, origin: str) -> None:
        id = self._ids.pop((stream, origin), None)
        if self._journal is not None and id is not None:
            self._journal.drop(id)

    def forget(self, bridge: Bridge) -> None:
        """Write down that nothing of a stream is kept any more."""
        for stream, origin in [key for key in self._ids if key[0] == bridge.stream]:
            self.drop(stream, origin)

    def streams(self) -> list[dict[str, Any]]:
        return [entry for entry in self._entries() if not entry["origin"]]

    def positions(self) -> list[dict[str, Any]]:
        return [entry for entry in self._entries() if entry["origin"]]

    def _entries(self) -> list[dict[str, Any]]:
        return [*self._journal.bridges] if self._journal is not None else []


def _never(outbox: Subscription) -> tuple[Subscription, frozenset[str], tuple[Any, ...]]:
    """Return what keeps the messages of a publisher from an outbox: they came from a bridge, and leave over none."""
    return outbox, frozenset(), ()
