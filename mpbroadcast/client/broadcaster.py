"""The handle that publishers and starters have: requests about all, closing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

from mpbroadcast.client.broker_client import LEAST_TIME, BrokerClient
from mpbroadcast.client.naming import named_throughout
from mpbroadcast.client.pipe_ownership import PipeOwnership, opening_unshared
from mpbroadcast.client.subscribing import Subscribing
from mpbroadcast.client.tasks import drive
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerRestarted, TimedOut
from mpbroadcast.posix import locks
from mpbroadcast.posix.descriptors import Descendants, descendants, on_fork
from mpbroadcast.posix.waiting import Steps, run
from mpbroadcast.stats import BrokerStats, snapshot
from mpbroadcast.validation import (
    check_bool,
    check_count,
    check_timeout,
    encode_topic,
)

M = TypeVar("M")
T = TypeVar("T")

CLOSE_TIMEOUT: Final = 5.0  # seconds
_MARGIN: Final = 0.5  # seconds that a broker's replies and end may take longer than the timeout of close()
_TOO_SHORT: Final = "{} s were not enough for {}: stats() shows how things are; wait longer"


class _Process(Protocol):
    """The broker's process, in its starter. (Its class is in ``broker/``, which nothing here imports.)"""

    def leave(self) -> bool: ...

    def ending(self, timeout: float | None, *, asked: int, time_left: Callable[[], Steps[float]]) -> Steps[None]: ...


@named_throughout
class Broadcaster(Subscribing[M]):
    """A handle on a broker. :func:`start_broadcaster` and :func:`connect` make it.

    A handle can be pickled into any child process of the starter, and used in any number of threads and signal handlers, and
    after a fork. The messages of each handle in each process keep their order (FIFO), and all channels get all messages in one
    order.

    Used with ``with``, it is closed at the end. If its starter drops it without closing it, that is a ``ResourceWarning``: the
    broker ends when no channel of this process and no other process needs it, at the latest with the program.
    """

    def __init__(self, client: BrokerClient, process: _Process | None = None) -> None:
        super().__init__(client)
        self._process = process  # the broker's, in its starter
        self._closing = locks.rlock()
        self._is_closing_done = False  # False after an interrupted close(), which can be called again
        self._is_pickled = False  # True if a process may have it that was not forked from this one
        self._heirs = descendants()  # processes forked from this one
        on_fork(self, Broadcaster._in_child)

    @property
    def closed(self) -> bool:
        """True if this handle was closed in this process."""
        return self._closed

    def flush(self, timeout: float | None = None, *, delivered: bool = False) -> None:
        """Block until the broker has routed all that this handle has published in this process, at most ``timeout`` seconds.

        Then each message is in every backlog that it belongs to, before all that is published from now on. With
        ``delivered``, block until each has left every backlog, too: it is in the pipe, was dropped by the policy, or its
        subscription has ended; a channel that no process has opened yet delays this. Neither means that it was received.

        :raises TimedOut: (a ``TimeoutError``) it took longer.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        :raises BrokerRestarted: something was published to a broker that has died since, and may not have been routed.
        """
        run(self._flushing(timeout, delivered))

    async def aflush(self, timeout: float | None = None, *, delivered: bool = False) -> None:
        """Do as :meth:`flush`, in a task."""
        await self._ask(self._flushing(timeout, delivered))

    def _flushing(self, timeout: float | None, delivered: bool) -> Steps[None]:
        limit = check_timeout(timeout)
        check_bool(delivered, "delivered")
        self._check_open()
        writer = self._writer
        if writer is not None:
            if not (yield from self._is_done(limit, "flush", publisher=writer.id, delivered=delivered)):
                what = "all to leave its backlog" if delivered else "the broker to route all"
                raise TimedOut(_TOO_SHORT.format(limit, what))
            if writer.session is not (yield from self._client.attaching()):
                self._drop_writer(writer)
        if self._has_gap:
            self._has_gap = False
            raise BrokerRestarted("the broker has died: what this handle had published before may be lost for some channels")

    def wait_for_subscribers(self, count: int, *, topic: str | None = None, timeout: float | None = None) -> None:
        """Block until there are ``count`` subscriptions, at most ``timeout`` seconds; with ``topic``, subscribed to it.

        :raises TimedOut: (a ``TimeoutError``) there were fewer.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        run(self._waiting_for_subscribers(count, topic, timeout))

    async def await_for_subscribers(self, count: int, *, topic: str | None = None, timeout: float | None = None) -> None:
        """Do as :meth:`wait_for_subscribers`, in a task."""
        await self._ask(self._waiting_for_subscribers(count, topic, timeout))

    def _waiting_for_subscribers(self, count: int, topic: str | None, timeout: float | None) -> Steps[None]:
        check_count(count, "count", 0)
        if topic is not None:
            encode_topic(topic)
        timeout = check_timeout(timeout)
        if not (yield from self._is_done(timeout, "wait", count=count, topic=topic)):
            what = f"{count} subscription(s)" + ("" if topic is None else f" to {topic!r}")
            now = "the broker does not reply"
            with contextlib.suppress(TimedOut):
                reply = yield from self._requesting("wait", Deadline(0.3), now=True, count=count, topic=topic)
                now = f"there are {reply.body['there']}"
            raise TimedOut(f"{_TOO_SHORT.format(timeout, what)}. Now {now}")

    def _is_done(self, timeout: float | None, do: str, **fields: Any) -> Steps[bool]:
        # A timeout of 0 does not wait for the condition, but for the reply.
        deadline = Deadline(LEAST_TIME if timeout == 0 else timeout)
        with contextlib.suppress(TimedOut):
            reply = yield from self._requesting(do, deadline, now=timeout == 0, **fields)
            return bool(reply.body["done"])
        return False

    def stats(self) -> BrokerStats:
        """Return a snapshot of the broker and its subscriptions. The difference of two gives rates.

        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        return snapshot(run(self._requesting("stats")).body)

    async def astats(self) -> BrokerStats:
        """Do as :meth:`stats`, in a task."""
        reply = await self._ask(self._requesting("stats"))
        return snapshot(reply.body)

    def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """End the broker, in the process that has started it. Elsewhere, close this handle only; its channels live on.

        The broker routes what was published, and moves all backlogs into the channels' pipes. This blocks until that is done,
        or no reader has made progress for ``timeout`` seconds (``None``: no limit). A channel that is not open yet delays it
        while there is a message for it and a process that could open it: one that it was pickled for, or that was forked since.
        Channels that this process has open do not. A channel that got all messages ends with ``EOFError``, another one with
        ``BrokerLost``, and the broker's log names it. A later ``publish`` raises ``BrokerLost``. ``close`` can be called again,
        and by several threads at once: each blocks until it is closed.
        """
        timeout = check_timeout(timeout)
        with self._closing:
            run(self._closing_all(timeout))

    async def aclose(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Do as :meth:`close`, in a task. Cancelled, it leaves a handle that :meth:`close` closes."""
        await drive(self._closing_all(check_timeout(timeout)))

    def _closing_all(self, timeout: float | None) -> Steps[None]:
        if self._is_closing_done:
            return
        process, client = self._process, self._client
        limit = Deadline(None if timeout is None else timeout + _MARGIN)  # also when the broker is stopped
        if process is not None:
            yield from opening_unshared(self._ownerships(), limit.at_most(CLOSE_TIMEOUT))
        self._closed = True
        writer = self._writer  # not before: a thread that makes one finds the handle closed, or is found here
        if writer is not None:
            writer.pipe.close()
        self._tasks.close()
        if process is not None:
            asked, _ = yield from self._stopping(timeout, limit.at_most(CLOSE_TIMEOUT))

            def time_left() -> Steps[float]:
                """Return the seconds that the broker goes on draining, unless a reader makes progress."""
                _, left = yield from self._stopping(timeout, Deadline(1.0))
                return left

            yield from process.ending(limit.remaining(), asked=asked, time_left=time_left)
            client.close()
            for ownership in self._ownerships():
                ownership.release_heirs()
        elif writer is not None:
            # A publish that waits in another thread is woken when the broker closes its end.
            with contextlib.suppress(BroadcastError, OSError):
                deadline = limit.at_most(CLOSE_TIMEOUT)
                yield from client.requesting("retire", session=writer.session, publisher=writer.id, deadline=deadline)
        self._writer = None
        self._client = BrokerClient(client.address, client.broker)  # the session ends with its last handle
        self._heirs = Descendants()  # closes their descriptors
        self._is_closing_done = True

    def _ownerships(self) -> list[PipeOwnership]:
        """Return those of the channels that live, also while other threads subscribe."""
        return [ownership for reference in self._subscribed.valuerefs() if (ownership := reference()) is not None]

    def _stopping(self, timeout: float | None, deadline: Deadline) -> Steps[tuple[int, float]]:
        """Request the end of the broker. Return its PID, and the seconds left for draining; 0 if it does not reply."""
        with contextlib.suppress(BroadcastError, OSError):
            reply = yield from self._client.requesting("stop", deadline=deadline, timeout=timeout)
            return int(reply.body["pid"]), float(reply.body["left"])
        return 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_open()
        self._is_pickled = True
        return Broadcaster, (self._client,)

    def __del__(self) -> None:
        process: _Process | None = getattr(self, "_process", None)
        if process is not None and not self._closed and process.leave():
            if not (self._is_pickled or self._heirs.live()):  # else there may be a process that will connect
                self._client.ends_broker = True
            # A recorded warning keeps its source, which must not keep the broker. The lock was allocated where this handle was.
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=2, source=self._closing)

    def __repr__(self) -> str:
        return f"<mpbroadcast.Broadcaster at {self.address!r}{', closed' if self._closed else ''}>"

    def _in_child(self) -> None:
        self._begin()
        self._writer = None
        self._has_gap = False
        self._process = None
        self._closing = locks.rlock()
