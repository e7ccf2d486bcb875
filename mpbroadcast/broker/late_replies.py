"""Requests that are replied to later: when there are enough subscriptions, or when messages have left their backlogs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.members import Publisher, Subscription

_TURN: Final = 0.01  # seconds in a round, for those that wait for subscriptions: patterns may take long to match


class LateReplies:
    """The connections that wait, each with what it waits for. The server looks at them at the end of a round."""

    def __init__(self) -> None:
        self._for_count: dict[ControlConnection, Callable[[], bool]] = {}
        self.to_check: dict[ControlConnection, None] = {}  # of those that wait for subscriptions
        self.for_delivery: dict[ControlConnection, dict[Subscription, int]] = {}

    def wait_for_count(self, connection: ControlConnection, is_enough: Callable[[], bool]) -> None:
        """Reply when there are enough subscriptions."""
        if is_enough():
            connection.reply({"done": True})
        else:
            self._for_count[connection] = is_enough

    def wait_for_delivery(self, connection: ControlConnection, publisher: Publisher, *, now: bool = False) -> None:
        """Reply when what the publisher has put into backlogs until now has left them; ``now``: reply whether it has."""
        if connection.is_closed:  # while the publisher was blocked
            return
        pending = {
            subscription: position
            for subscription, position in publisher.last_in.items()
            if subscription.backlog.left < position
        }
        if now or not pending:
            connection.reply({"done": not pending})
        else:
            self.for_delivery[connection] = pending

    def recheck_counts(self) -> None:
        """Look again at those that wait for subscriptions, as these or their topics have changed."""
        self.to_check.update(dict.fromkeys(self._for_count))

    def check_counts(self) -> None:
        """Look at some of those that wait for subscriptions."""
        end = time.monotonic() + _TURN
        while self.to_check and time.monotonic() < end:
            connection = next(iter(self.to_check))
            del self.to_check[connection]
            if self._for_count[connection]():
                del self._for_count[connection]
                connection.reply({"done": True})

    def check_deliveries(self, subscriptions: dict[int, Subscription]) -> None:
        """Look at those that wait for messages to leave their backlogs. ``subscriptions`` are those that are not removed."""
        for connection, pending in list(self.for_delivery.items()):
            while pending:  # one that waits on is enough: there may be thousands
                subscription, position = pending.popitem()
                if subscription.backlog.left < position and subscription.id in subscriptions:
                    pending[subscription] = position
                    break
            else:
                del self.for_delivery[connection]
                connection.reply({"done": True})

    def forget(self, connection: ControlConnection) -> None:
        """Forget one that is closed."""
        self._for_count.pop(connection, None)
        self.to_check.pop(connection, None)
        self.for_delivery.pop(connection, None)
