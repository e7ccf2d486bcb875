"""This library with each overflow policy, and a backlog that the measurement does not fill: what a policy costs unused."""

from __future__ import annotations

from benchmarks.peers.broadcast import Broadcast

__all__ = ["POLICIES", "Block", "Latest"]


class Block(Broadcast):
    """The default, which the others are compared with."""

    name = overflow = "block"
    capacity = 1 << 34


class DropOldest(Block):
    name = overflow = "drop_oldest"


class DropNewest(Block):
    name = overflow = "drop_newest"


class Latest(Block):
    """Skips whatever the subscriber does not take at once: that is not lost, and only publishing can be compared."""

    name = overflow = "latest"


class Disconnect(Block):
    name = overflow = "disconnect"


POLICIES: tuple[type[Block], ...] = (Block, DropOldest, DropNewest, Latest, Disconnect)
