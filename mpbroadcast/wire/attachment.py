"""A handle's way to its broker, and to those that take over from it."""

from __future__ import annotations

from typing import Any

from mpbroadcast.arguments import Deadline
from mpbroadcast.errors import BrokerLost
from mpbroadcast.wire.link import Answer, Link


class Attachment:
    """To the broker of this identity at ``address``: through ``link``, or through one that is made when it is first needed.

    ``restarts`` says that another broker takes over when one dies; who is attached knows it from the broker.
    """

    __slots__ = ("address", "broker", "current", "restarts")

    def __init__(self, address: str, broker: str, link: Link | None = None, restarts: bool = False) -> None:
        self.address = address
        self.broker = broker
        self.current = link
        self.restarts = restarts if link is None else link.restarts

    def link(self) -> Link:
        """The way that works now. Wait for the broker that takes over, if one does.

        :raises BrokerLost: there is no broker any more.
        """
        link = self.current
        if link is None or link.inherited or (link.lost and self.restarts):
            try:
                link = Link.shared(self.address, self.broker)
            except BrokerLost as error:
                self.restarts = False  # nobody needs to wait for another one again
                if self.current is not None:
                    self.current.restarts = False
                    error.__cause__ = self.current.crash or error.__cause__
                raise
            if link.broker != self.broker:
                raise self.lost()
            self.current = link
            self.restarts = link.restarts
        return link

    def ask(self, do: str, deadline: Deadline | None = None, **fields: Any) -> tuple[Link, Answer]:
        """Ask the broker, or the one that takes over while it is asked; errors as of :meth:`Link.request`."""
        while True:
            link = self.link()
            try:
                return link, link.request(do, deadline=deadline, **fields)
            except BrokerLost:
                if not (link.lost and self.restarts):
                    raise

    def lost(self, cause: BaseException | None = None) -> BrokerLost:
        """The error of who has no broker any more; its cause is what the broker has said at its end, or else ``cause``."""
        error = BrokerLost(f"the broker at {self.address!r} has ended: start another one, and subscribe to it again")
        link = self.current
        error.__cause__ = (link and link.crash) or cause
        return error
