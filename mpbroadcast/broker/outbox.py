"""The outbox of a bridge's stream, and the pipe to the session that is at work.

For the router, an outbox is one subscription. Its backlog has what waits, under its policy; that of its reader has what the
session's pipe has not taken yet of what it was given. It has no pipe of its own.
"""

from __future__ import annotations

from typing import ClassVar, Final

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.bridging import Outbound
from mpbroadcast.broker.core.policies import new_backlog
from mpbroadcast.broker.core.states import SubscriptionState
from mpbroadcast.broker.members import Publisher, Session, Subscription
from mpbroadcast.protocol.reports import last_report

_NO_LIMIT: Final = 1 << 62  # bytes: the outbox has one


class Outbox(Subscription):
    """The messages that are to go out in one stream, whichever session is at work."""

    def __init__(self, id: int, stream: str, session: Session, backlog: Backlog) -> None:
        super().__init__(id, session, backlog)
        self.name: str = stream
        self.outbound = Outbound(backlog)
        self.reader: BridgeReader | None = None  # of the session at work

    def give(self) -> bool:
        """Give its reader what it may have. Return True if that is something."""
        reader, has_given = self.reader, False
        while reader is not None and reader.is_open and (run := self.outbound.give()) is not None:
            has_given = True
            if run.count or run.is_gap:
                reader.backlog.put(run)
            else:
                reader.backlog.end()
        return has_given


class BridgeReader(Subscription):
    """The pipe to a session, and the pipe back, in which it acknowledges positions. Nothing is routed to it."""

    is_written_down: ClassVar[bool] = False

    def __init__(self, id: int, session: Session, outbox: Outbox, gone: list[BridgeReader]) -> None:
        """Be entered in ``gone`` when it is removed."""
        super().__init__(id, session, new_backlog(_NO_LIMIT, "block"))
        self.state = self.state.to(SubscriptionState.ENDED)
        self.outbox = outbox
        self.publisher: Publisher | None = None  # of what the session hands on
        self.gone = gone

    @property
    def target(self) -> Subscription:
        return self.outbox

    def begin(self) -> None:
        """Give it anew what the session before it has not acknowledged."""
        for run in self.outbox.outbound.give_again():
            self.backlog.put(run)
        self.outbox.reader = self

    def receive_reports(self) -> bool:
        """Take into account what it acknowledges. Return False when no report will come any more."""
        try:
            while reports := self.pipe.read_reports():
                position, _ = last_report(reports)
                if self.outbox.reader is self:
                    self.outbox.outbound.acknowledge(position)
        except BlockingIOError:
            return True
        return False

    @property
    def acknowledged(self) -> int:
        return self.outbox.outbound.acknowledged

    @property
    def is_unfinished(self) -> bool:
        """True if something was not acknowledged, and its process goes on."""
        return self.outbox.outbound.has_unacknowledged and not self.is_abandoned
