"""Which member of a group gets the next message, and what is lost with one that goes. Pure: no descriptor, no clock.

A message is **given** to a member when it goes into that member's pipe, and **finished** when the member reports that it has
asked for the next one. What is given and not finished is never more than the member's ``prefetch``; it is lost when the member
goes. So each message that was given is finished, unfinished or lost, and belongs to one member.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

M = TypeVar("M")


class Share:
    """The part of its group's messages that one member has."""

    __slots__ = ("finished", "given", "has_room", "is_taking", "prefetch")

    def __init__(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self.given = 0
        self.finished = 0
        self.is_taking = False  # its channel is open, and it was not unsubscribed
        self.has_room = True  # independent of that: its pipe has taken all that was given to it

    @property
    def unfinished(self) -> int:
        return self.given - self.finished


class Shares(Generic[M]):
    """The members of a group, those that were unsubscribed and have something unfinished included."""

    def __init__(self) -> None:
        self.lost = 0  # messages, with all members that have gone
        self._shares: dict[M, Share] = {}  # the one that has waited longest for a message is first
        self._subscribed: dict[M, None] = {}  # in the order in which they have joined

    @property
    def members(self) -> tuple[M, ...]:
        """Those that are subscribed, open or not, the oldest first."""
        return tuple(self._subscribed)

    def __iter__(self) -> Iterator[M]:
        """All that have joined and not left."""
        return iter(tuple(self._shares))

    def __len__(self) -> int:
        """How many are subscribed."""
        return len(self._subscribed)

    def __contains__(self, member: object) -> bool:
        """True if it has joined and not left, subscribed or not."""
        return member in self._shares

    def join(self, member: M, prefetch: int) -> None:
        """Add a member, which takes nothing before it is opened."""
        self._shares[member] = Share(prefetch)
        self._subscribed[member] = None

    def open(self, member: M, most: int) -> None:
        """Let a member take messages, at most ``most`` at once, however large its ``prefetch`` is."""
        share = self._shares[member]
        share.prefetch = min(share.prefetch, most)
        share.is_taking = member in self._subscribed

    def next(self) -> M | None:
        """Return the member that gets the next message: the one with the fewest unfinished; ``None`` if none can take one.

        Of several, it is the one that has waited longest.
        """
        found, fewest = None, 0
        for member, share in self._shares.items():
            unfinished = share.given - share.finished
            if share.is_taking and share.has_room and unfinished < share.prefetch and (found is None or unfinished < fewest):
                if not unfinished:
                    return member
                found, fewest = member, unfinished
        return found

    def gave(self, member: M, *, has_room: bool) -> None:
        """Note that a member was given a message. Without ``has_room``, it takes no other one before :meth:`make_room`."""
        share = self._shares.pop(member)
        self._shares[member] = share  # the last of those that wait
        share.given += 1
        share.has_room = has_room

    def make_room(self, member: M) -> None:
        """Note that a member's pipe has taken all that was given to it."""
        self._shares[member].has_room = True

    def finish(self, member: M, count: int) -> None:
        """Note that a member has finished ``count`` of all messages that were ever given to it."""
        share = self._shares[member]
        share.finished = max(share.finished, min(count, share.given))  # whatever a process reports

    def prefetch(self, member: M) -> int:
        """Return how many messages a member takes at once; 0 if it has left."""
        return self._shares[member].prefetch if member in self._shares else 0

    def has_unfinished(self, member: M) -> bool:
        return member in self._shares and self._shares[member].unfinished > 0

    def retire(self, member: M) -> None:
        """Give nothing more to a member, which stays until it leaves."""
        self._shares[member].is_taking = False
        self._subscribed.pop(member, None)

    def leave(self, member: M) -> None:
        """Remove a member. What it has not finished is lost."""
        self._subscribed.pop(member, None)
        self.lost += self._shares.pop(member).unfinished
