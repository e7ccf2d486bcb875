"""Iterating over a channel: in turns that are all C, and behind gaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat, starmap, takewhile
from operator import attrgetter
from typing import Any, Final, Generic, Literal, Protocol, Self, TypeVar

from mpbroadcast.errors import BrokerRestarted, Lagged

M = TypeVar("M")
R_co = TypeVar("R_co", covariant=True)

Gap = Lagged | BrokerRestarted
OnGap = Literal["skip", "yield"] | Callable[[Gap], object]

_FAST: Final = attrgetter("_stream.fast")
_HAS_MORE: Final = attrgetter("_stream.has_more")


class _Source(Protocol[R_co]):
    def __next__(self) -> R_co: ...

    async def __anext__(self) -> R_co: ...


def in_turns(channel: object, receive: Callable[[Any], M], source: object) -> Iterator[M]:
    """Yield what is decoded of a channel, then what ``receive(source)`` returns, in turns, until that raises StopIteration.

    All of this is C, and so an interrupt comes within ``receive`` only: it would end a generator, and with that the iteration.
    """
    fast = map(_FAST, takewhile(_HAS_MORE, repeat(channel)))
    one = starmap(map, repeat((receive, (source,))))
    return chain.from_iterable(chain.from_iterable(zip(fast, one, strict=False)))


def check_on_gap(on_gap: Any) -> None:
    """Raise unless ``on_gap`` is one of the words, or a callable."""
    if not callable(on_gap) and on_gap not in ("skip", "yield"):
        if not isinstance(on_gap, str):
            raise TypeError(f"on_gap must be 'skip', 'yield' or a callable, not {type(on_gap).__name__}")
        raise ValueError(f"on_gap must be 'skip', 'yield' or a callable, not {on_gap!r}")


class Messages(Generic[M]):
    """The items of a channel, in ``for`` and ``async for``, with gaps skipped, given, or handed to a callable.

    ``Channel.messages`` makes it. What was received by an iteration that is left is not received by the next one.
    """

    def __init__(self, channel: _Source[Any], on_gap: OnGap) -> None:
        check_on_gap(on_gap)
        self._channel = channel
        self._on_gap = on_gap

    def __iter__(self) -> Iterator[M]:
        return in_turns(self._channel, Messages.__next__, self)

    def __next__(self) -> M:
        message: M
        while True:
            try:
                message = self._channel.__next__()
                return message  # nothing is called between the two, so no interrupt comes in between
            except (Lagged, BrokerRestarted) as gap:
                message = self._met(gap)
                if message is not None:
                    return message

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        message: M
        while True:
            try:
                message = await self._channel.__anext__()
                return message
            except (Lagged, BrokerRestarted) as gap:
                message = self._met(gap)
                if message is not None:
                    return message

    def _met(self, gap: Gap) -> Any:
        """Return what is given at a gap; ``None`` if the iteration goes on behind it."""
        if callable(self._on_gap):
            self._on_gap(gap)
            return None
        # Without its traceback, which would keep the frames that it came through.
        return gap.with_traceback(None) if self._on_gap == "yield" else None
