"""What a peer has to offer to be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from multiprocessing.context import BaseContext
from typing import Any, ClassVar, Protocol

Message = dict[str, Any]


class Endpoint(Protocol):
    """What one subscriber process gets as its argument."""

    def open(self) -> Iterable[Message]:
        """Connect, in the subscriber; what it returns gives the messages, unpickled, one after the other."""


class Peer(ABC):
    """One way to tell several processes the same thing. Made in the publisher, before the subscribers are started."""

    name: ClassVar[str]
    publish: Callable[[Message], None]
    """Give this message to every subscriber: the call whose rate is measured."""

    @abstractmethod
    def __init__(self, context: BaseContext, subscribers: int) -> None: ...

    @classmethod
    def missing(cls) -> str | None:
        """Why this peer cannot be measured here, or None."""
        return None

    @abstractmethod
    def endpoints(self) -> list[Endpoint]:
        """One for each subscriber."""

    def join(self) -> None:  # noqa: B027 (most have nothing to wait for)
        """Called when every subscriber has opened its endpoint: return when nothing that is published can miss one."""

    @abstractmethod
    def close(self) -> None:
        """Called when every subscriber has ended."""
