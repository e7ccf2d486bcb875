"""Requests that are replied to later: when there are enough subscriptions, or when messages have left their backlogs."""

from __future__ import annotations

from collections.abc import Callable

from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.members import Publisher, Subscription


class LateReplies:
    """The connections that wait, each with what it waits for. The server looks at them at the end of a round."""

    def __init__(self) -> None:
        self._for_count: dict[ControlConnection, Callable[[], bool]] = {}
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

    def check_counts(self) -> None:
        """Look at those that wait for subscriptions, as these or their topics have changed."""
        for connection, is_enough in list(self._for_count.items()):
            if is_enough():
                del self._for_count[connection]
                connection.reply({"done": True})

    def check_deliveries(self, subscriptions: dict[int, Subscription]) -> None:
        """Look at those that wait for messages to leave their backlogs. ``subscriptions`` are those that are not removed."""
        for connection, pending in list(self.for_delivery.items()):
            for subscription, position in list(pending.items()):
                if subscription.backlog.left >= position or subscription.id not in subscriptions:
                    del pending[subscription]
            if not pending:
                del self.for_delivery[connection]
                connection.reply({"done": True})

    def forget(self, connection: ControlConnection) -> None:
        """Forget one that is closed."""
        self._for_count.pop(connection, None)
        self.for_delivery.pop(connection, None)
