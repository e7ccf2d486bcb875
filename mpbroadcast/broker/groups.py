"""The groups that there are: which subscription joins one, and what becomes of the group when a member goes.

A group begins with its first member, and ends with its last one, at an overflow, or with the broker. One that has ended is not
found by its name any more; what waits then still goes to its members, which end behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from mpbroadcast.broker.core.backlog import Backlog
from mpbroadcast.broker.core.policies import new_backlog, with_policy
from mpbroadcast.broker.core.states import SubscriptionState
from mpbroadcast.broker.host.journal import Entry
from mpbroadcast.broker.members import Group, Session, Subscription
from mpbroadcast.broker.traffic import Traffic


class Groups:
    """All groups that accept messages, by name."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._groups: dict[str, Group] = {}
        self._ids = itertools.count(-1, -1)  # which no subscription has

    def __iter__(self) -> Iterator[Group]:
        return iter([group for group in self._groups.values() if group.is_live])

    def find(self, name: str, topics: list[str], capacity: int, policy: str) -> Group | None:
        """Return the group of this name, if there is one.

        :raises ValueError: it has other topics, another capacity or another policy.
        """
        group = self._groups.get(name)
        if group is None or not group.is_live:  # at an overflow in this round
            return None
        there = {"topics": group.topics, "overflow": group.policy, "capacity": group.backlog.capacity}
        wanted = {"topics": frozenset(topics), "overflow": policy, "capacity": capacity}
        if others := [key for key in there if there[key] != wanted[key]]:
            text = f"group {name!r} is there with other {' and '.join(others)}"
            raise ValueError(f"{text}: its members agree on topics, overflow and capacity, or name another group")
        return group

    def add(self, name: str, session: Session, topics: list[str], capacity: int, policy: str) -> Group:
        """Make a group, which its first member joins next."""
        group = Group(next(self._ids), name, session, new_backlog(capacity, policy), topics)
        self._groups[name] = group
        return group

    def join(self, group: Group, member: Subscription, prefetch: int) -> None:
        member.group = group
        group.shares.join(member, prefetch)
        self._traffic.routing.groups[member.id] = group.id

    def rejoin(self, member: Subscription, entry: Entry, backlog: Backlog) -> bool:
        """Let a member join its group again, which the broker before this one had; ``backlog`` is the group's if it is new.

        Return False if the group had just ended, and another one with this name has other topics, capacity or policy.
        """
        agreed = entry["topics"], entry["capacity"], entry["policy"]
        try:
            group = self.find(entry["group"], *agreed)
        except ValueError:
            return False
        if group is None:
            group = self.add(entry["group"], member.session, *agreed)
        if backlog.policy != group.policy and not group.restored:  # a member had its channel open, which may never be again
            group.backlog, group.restored = backlog, True
        self.join(group, member, entry["prefetch"])
        return True

    def open(self, member: Subscription) -> None:
        """Let a member whose channel is open take messages."""
        group = member.group
        if group is not None:
            if group.restored:
                group.backlog, group.restored = with_policy(group.policy, group.backlog), False
            group.shares.open(member, member.pipe.most_reports)
            self._traffic.mark(group)

    def unsubscribe(self, member: Subscription) -> list[Subscription]:
        """End a member behind what it has been given; the last one behind all that waits. Return those that have ended."""
        group = member.group
        if group is None or group.shares.members == (member,):
            return [] if group is None else self.end(group)
        group.shares.retire(member)
        member.backlog.end()
        member.state = member.state.to(SubscriptionState.ENDED)
        self._traffic.mark(member)
        return [member]

    def end(self, group: Group) -> list[Subscription]:
        """Route nothing more to a group. Return its members, which end behind what waits."""
        if self._groups.get(group.name) is group:
            del self._groups[group.name]
        group.backlog.end()
        self._traffic.routing.end(group)
        ended = [member for member in group.shares if member.is_live]
        for member in ended:
            member.state = member.state.to(SubscriptionState.ENDED)
        return ended

    def leave(self, member: Subscription) -> None:
        """Remove a member; with the last one, what waits is dropped."""
        group = member.group
        if group is None or member not in group.shares:
            return
        member.receive_reports()
        group.shares.leave(member)
        self._traffic.routing.groups.pop(member.id, None)
        if group.shares.members:
            group.session = group.shares.members[0].session
            self._traffic.mark(group)
        else:
            self.end(group)
            self._traffic.drop(group)
            group.backlog.discard()

    def retire(self, member: Subscription) -> None:
        """Give nothing more to a member, which is removed later."""
        if member.group is not None and member in member.group.shares:
            member.group.shares.retire(member)
