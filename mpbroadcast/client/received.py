"""The item that a channel gives for a message: the message, with its topic, or with its id and topic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from mpbroadcast.protocol.pickling import Failure

M = TypeVar("M")

# Forms: the values of False and True, as most channels need no other.
PLAIN: Final = 0
WITH_TOPIC: Final = 1
WITH_ID: Final = 2


class Received(NamedTuple, Generic[M]):
    """A message, its topic and its id: what a channel with ``with_id`` gives, and :meth:`Broadcaster.history`.

    ``id`` is the position in the broker's one order: it grows, and is the same in every channel; also from a broker to the one
    that takes over from it. Ids are below 2**53, and need not be consecutive.
    """

    id: int
    topic: str
    message: M


def formed(messages: Iterable[Any], form: int, topics: Iterable[str], ids: Iterable[int]) -> list[Any]:
    """Return what a channel of this form gives for messages with these topics and ids, of which there may be more."""
    whole = map(Received, ids, topics, messages) if form == WITH_ID else zip(topics, messages, strict=False)
    return [one[-1] if type(one[-1]) is Failure else one for one in whole]
