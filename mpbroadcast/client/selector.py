"""Receiving from many sources with one call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar, cast

from mpbroadcast.client.channel import Channel
from mpbroadcast.client.tasks import TURN, drive, give_turn
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerLost, ClosedError, TimedOut, VersionMismatch
from mpbroadcast.posix.event_loops import running_loop, warn_of_blocking
from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.waiting import Descriptor, Steps, Wait
from mpbroadcast.validation import check_timeout

try:
    import typing_extensions  # which each type checker knows, whether it is installed or not

    M = typing_extensions.TypeVar("M", default=Any)  # typing has it from Python 3.13 on
except ImportError:
    M = TypeVar("M")  # type: ignore[misc]
N = TypeVar("N")

_FAIR: Final = 64  # messages taken from sources that are known to be readable, before the others are polled
_NOTHING: Final = object()
_NONE_LEFT: Final = "no source is left to receive from: all have ended, or none was selected"


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


Source = Connection | BaseProcess | _HasFileno
Handler = Callable[[Any], Any]


class Selector(Generic[M]):
    """Receives from many sources, fair to all of them.

    A source is a :class:`Channel`, a ``multiprocessing`` connection, a process, or any object with ``fileno()``. Its handler is
    called with the channel's or connection's message, with the process that has ended, or with the readable object, and
    :meth:`receive` returns what the handler returns; without a handler it returns the value.

    An iteration, ``for`` or ``async for``, gives what :meth:`receive` returns, until no source is left. An error leaves the
    loop, and the next loop goes on behind it.

    A selector has no descriptor of its own. One thread or task at a time may use it.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._handlers: dict[Source, Handler | None] = {}
        self._ready: deque[Source] = deque()
        self._since_wait = 0
        self._last: Channel[Any] | None = None  # the channel that has given the last message

    def select(self, source: Source, handler: Callable[[Any], M] | None = None) -> Self:
        """Add ``source``; selected again, it gets the new handler. Return this selector.

        This opens a channel: it can no longer be handed to another process.

        :raises TypeError: ``source`` is none of these kinds.
        :raises ClosedError, ChannelInUse, BrokerLost: as ``Channel.fileno``.
        """
        if handler is not None and not callable(handler):
            raise TypeError(f"handler must be callable, not {type(handler).__name__}")
        if isinstance(source, BaseProcess):
            _ = source.sentinel  # ValueError from multiprocessing: it was not started, or is closed
        elif callable(getattr(source, "fileno", None)):
            source.fileno()
        else:
            raise TypeError(
                f"a source must be a Channel, a Connection, a process, or have fileno(); {type(source).__name__} does not"
            )
        self._handlers[source] = handler
        return self

    def deselect(self, source: Source) -> Self:
        """Remove ``source``; nothing happens if it was not selected. Return this selector."""
        self._handlers.pop(source, None)
        return self

    def merge(self, other: Selector[M]) -> Self:
        """Add the sources that ``other`` has now, with its handlers. Return this selector."""
        if not isinstance(other, Selector):
            raise TypeError(f"only a Selector can be merged, not {type(other).__name__}")
        self._handlers.update(other._handlers)
        return self

    def map(self, function: Callable[[M], N]) -> Selector[N]:
        """Pass the values of the sources that are selected now through ``function``. Return this selector."""
        if not callable(function):
            raise TypeError(f"function must be callable, not {type(function).__name__}")
        for source, handler in self._handlers.items():
            self._handlers[source] = _composed(handler, function)
        return cast("Selector[N]", self)

    def receive(self, timeout: float | None = None) -> M:
        """Return what the next source gives. Block at most ``timeout`` seconds; ``None``: no limit, 0: do not block.

        A channel's or connection's end removes it. A process is reported once, joined, and removed.

        :raises EOFError: no source is left.
        :raises TimedOut: (a ``TimeoutError``) nothing came in time.
        :raises Exception: what receiving from a source raises, with the channel as ``.channel``, and what a handler raises. A
            channel whose broker is lost is removed.
        """
        deadline = Deadline(check_timeout(timeout))
        self._finish()
        while True:
            if not self._handlers:
                raise EOFError(_NONE_LEFT)
            if not self._ready or self._since_wait >= _FAIR:
                self._find_ready(deadline if not self._ready else Deadline(0))
                if not self._ready and self._handlers:
                    raise TimedOut(f"no source had anything within {timeout} s")
                continue
            source = self._ready.popleft()
            if source not in self._handlers:
                continue
            self._since_wait += 1
            handler = self._handlers[source]
            value = self._take(source, may_wait=timeout != 0)
            if value is not _NOTHING:
                return cast(M, value if handler is None else handler(value))

    async def areceive(self, timeout: float | None = None) -> M:
        """Return what the next source gives, as :meth:`receive`, in a task. Cancelled, it has received nothing.

        :raises ChannelBusy: another task receives from one of the channels.
        :raises Exception: as :meth:`receive`.
        """
        timeout = check_timeout(timeout)
        await self._take_turn()
        return await drive(self._receiving(timeout))

    async def _take_turn(self) -> None:
        self._turn = (self._turn + 1) % TURN
        if not self._turn:
            await give_turn()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> M:
        try:
            return self.receive()
        except EOFError:
            if self._handlers:
                raise  # it is a handler's
            raise StopIteration from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        await self._take_turn()
        try:
            return await drive(self._receiving(None))
        except EOFError:
            if self._handlers:
                raise
            raise StopAsyncIteration from None

    def _receiving(self, timeout: float | None) -> Steps[M]:
        """Return what the next source gives, as :meth:`receive`."""
        deadline = Deadline(timeout)
        self._finish()
        while True:
            if not self._handlers:
                raise EOFError(_NONE_LEFT)
            if not self._ready or self._since_wait >= _FAIR:
                yield from self._finding_ready(deadline if not self._ready else Deadline(None))
                if not self._ready and self._handlers and deadline.remaining() == 0:
                    raise TimedOut(f"no source had anything within {timeout} s")
                continue
            source = self._ready.popleft()
            if source not in self._handlers:
                continue
            self._since_wait += 1
            handler = self._handlers[source]
            value = (yield from self._taking(source, timeout != 0)) if isinstance(source, Channel) else self._take(source)
            if value is not _NOTHING:
                return cast(M, value if handler is None else handler(value))

    def _finish(self) -> None:
        """Let the member of a group that has given the last message ask for the next one, also if another source is first."""
        last, self._last = self._last, None
        if last is not None and last._ownership.reports is not None:
            last._finish()

    def close(self) -> None:
        """Deselect all. The sources stay open: their owners close them."""
        self._handlers.clear()
        self._ready.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _find_ready(self, deadline: Deadline) -> None:
        """Block until a source is readable, and append the readable ones to those that are known to be."""
        self._since_wait = 0
        waitables: dict[Any, Source] = {}
        for source in list(self._handlers):
            if isinstance(source, Channel):
                source._check_not_unpickling()
            try:
                waitables[source.sentinel if isinstance(source, BaseProcess) else source.fileno()] = source
            except (OSError, ValueError):
                del self._handlers[source]  # closed by its owner
        if not waitables:
            return
        known, seconds = set(self._ready), deadline.remaining()
        if seconds != 0 and (loop := running_loop()) is not None and not wait(list(waitables), 0):
            warn_of_blocking(loop)
        self._ready.extend(source for fd in wait(list(waitables), seconds) if (source := waitables[cast(int, fd)]) not in known)

    def _finding_ready(self, deadline: Deadline) -> Steps[None]:
        """Do as :meth:`_find_ready`, in a task, which is then the one that receives from all channels."""
        for source in list(self._handlers):
            if isinstance(source, Channel):  # while another broker takes over, fileno() would block
                try:
                    yield from source._opening(deadline)
                except TimedOut:
                    raise  # fileno() would block
                except BroadcastError:
                    pass  # which fileno() raises, too
        self._find_ready(Deadline(0))
        if self._ready or not self._handlers:
            return
        channels = [source for source in self._handlers if isinstance(source, Channel)]
        sources = [Descriptor(one.sentinel) if isinstance(one, BaseProcess) else one for one in self._handlers]
        claimed: list[Channel[Any]] = []
        try:
            for channel in channels:
                channel._claim()
                claimed.append(channel)
            is_ready = yield Wait(deadline, IN, *sources, wakers=tuple(channel._tasks for channel in channels))
        finally:
            for channel in claimed:
                channel._unclaim()
        if is_ready:
            self._find_ready(Deadline(0))

    def _taking(self, channel: Channel[Any], may_wait: bool) -> Steps[Any]:
        """Do as :meth:`_take`, without blocking."""
        self._ready.append(channel)
        self._last = channel
        channel._claim()
        try:
            if may_wait and channel._ownership.keeps_newest:
                return (yield from channel._arriving_newest(0.0, Deadline(None)))
            return (yield from channel._arriving(0.0))
        except TimedOut:
            self._ready.pop()
        except (EOFError, ClosedError):
            self.deselect(channel)
        except (BrokerLost, VersionMismatch):
            self.deselect(channel)
            raise
        finally:
            channel._unclaim()
        return _NOTHING

    def _take(self, source: Source, *, may_wait: bool = True) -> Any:
        """Return what ``source`` gives; ``_NOTHING`` if it has nothing after all, or has ended.

        It waits for nothing, but for the broker's reply whether a channel under ``latest`` has something newer.
        """
        if isinstance(source, Channel):
            # It may have more, and to try costs less than to wait. Behind an interrupt its descriptor may not be readable.
            self._ready.append(source)
            self._last = source
            try:
                if may_wait and source._ownership.keeps_newest:
                    source._check_no_receiver()
                    return source._receive_newest(0.0, Deadline(None))
                return source.recv(0)
            except TimedOut:
                self._ready.pop()
            except (EOFError, ClosedError):
                self.deselect(source)
            except (BrokerLost, VersionMismatch):
                self.deselect(source)
                raise
            return _NOTHING
        if isinstance(source, Connection):
            try:
                return source.recv()
            except (EOFError, ConnectionError):
                self.deselect(source)
                return _NOTHING
        if isinstance(source, BaseProcess):
            source.join()
            self.deselect(source)
        return source


def _composed(handler: Handler | None, function: Callable[[Any], Any]) -> Handler:
    return function if handler is None else lambda value: function(handler(value))


def channel_to_selector(channel: Channel[M]) -> Selector[M]:
    """Return a selector with this channel selected."""
    return Selector[M]().select(channel)
