"""The handle that publishers and starters have: subscribing, requests about all, closing."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypedDict, TypeVar, Unpack, overload
from weakref import WeakValueDictionary

from mpbroadcast.client.broker_client import LEAST_TIME, BrokerClient
from mpbroadcast.client.channel import Channel
from mpbroadcast.client.pipe_ownership import PipeOwnership, open_own
from mpbroadcast.client.publishing import Publishing
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import BroadcastError, BrokerRestarted, TimedOut
from mpbroadcast.posix import locks
from mpbroadcast.posix.descriptors import Descendants, descendants, on_fork
from mpbroadcast.stats import BrokerStats, snapshot
from mpbroadcast.validation import Policy, check_count, check_overflow, check_timeout, check_topics, encode_topic

M = TypeVar("M")

DEFAULT_CAPACITY: Final = 64 << 20  # bytes
CLOSE_TIMEOUT: Final = 5.0  # seconds
_MARGIN: Final = 0.5  # seconds that a broker's replies and end may take longer than the timeout of close()
_TOO_SHORT: Final = "{} s were not enough for {}: stats() shows how things are; wait longer"


class Options(TypedDict, total=False):
    """Arguments of :meth:`Broadcaster.subscribe`, for its overloads."""

    overflow: Policy
    capacity: int | None
    replay: int


class _Process(Protocol):
    """The broker's process, in its starter. (Its class is in ``broker/``, which nothing here imports.)"""

    def leave(self) -> bool: ...

    def end(self, timeout: float | None, *, asked: int, time_left: Callable[[], float]) -> None: ...


class Broadcaster(Publishing[M]):
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
        self._subscribed: WeakValueDictionary[int, PipeOwnership] = WeakValueDictionary()
        self._is_pickled = False  # True if a process may have it that was not forked from this one
        self._heirs = descendants()  # processes forked from this one
        on_fork(self, Broadcaster._in_child)

    @property
    def closed(self) -> bool:
        """True if this handle was closed in this process."""
        return self._closed

    @overload
    def subscribe(self, *topics: str, with_topic: Literal[False] = False, **options: Unpack[Options]) -> Channel[M]: ...
    @overload
    def subscribe(self, *topics: str, with_topic: Literal[True], **options: Unpack[Options]) -> Channel[tuple[str, M]]: ...
    @overload
    def subscribe(self, *topics: str, with_topic: bool, **options: Unpack[Options]) -> Channel[M] | Channel[tuple[str, M]]: ...
    def subscribe(
        self, *topics: str, overflow: Policy = "block", capacity: int | None = None, replay: int = 0, with_topic: bool = False
    ) -> Channel[Any]:
        """Return a new channel, subscribed to ``topics``; to all topics, if none is named. Block until the broker replies.

        A topic with ``*``, ``?`` or ``[`` is a pattern (``fnmatch.fnmatchcase``; ``[*]`` is a literal star). After this has
        returned, every publish, by any process, reaches the channel; nothing that this handle has published before does. Each
        channel gets its own copy, once, however many of its topics match.

        ``capacity`` bounds the backlog, in bytes (64 MiB if not given). A message counts with its pickled length, its
        topic's, and 256 bytes while it waits in the broker, and with its unread bytes in the channel's pipe. A message that is
        larger than the capacity passes when the backlog is empty. ``overflow`` is what happens when the backlog is full:

        - ``"block"``: ``publish`` blocks in the handles whose messages the channel would get; nothing is lost.
        - ``"drop_oldest"``: the oldest messages are dropped, and ``recv`` raises ``Lagged`` at their position.
        - ``"drop_newest"``: the new message is dropped, and ``recv`` raises ``Lagged`` at its position.
        - ``"latest"``: full or not, the channel gets the newest message only, as soon as it has received the one before.
        - ``"disconnect"``: the channel is unsubscribed; ``recv`` returns what was kept, then raises ``Overflowed``, then
          ``EOFError``.

        With ``replay=k`` the channel starts with the last ``k`` messages that match, in the order of all, as far as the broker
        has kept them (``start_broadcaster(history=...)``) and they fit into the capacity; new messages follow without a gap.

        With ``with_topic`` each message that is received is ``(topic, message)``.

        :raises ValueError: an argument is out of range; ``replay`` without a history; this process has too many subscriptions.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        check_topics(topics)
        check_overflow(overflow)
        if not isinstance(with_topic, bool):
            raise TypeError(f"with_topic must be True or False, not {type(with_topic).__name__}")
        capacity = DEFAULT_CAPACITY if capacity is None else check_count(capacity, "capacity", 1)
        check_count(replay, "replay", 0)
        self._check_open()
        writer = self._writer
        subscription = int.from_bytes(os.urandom(6)) or 1
        # The channel exists before the subscription does: if an interrupt comes, its finaliser drops the subscription.
        channel: Channel[Any] = Channel(self._client, subscription, with_topic, subscriber=True)
        try:
            self._request(
                "subscribe",
                subscription=subscription,
                topics=topics or ("*",),
                overflow=overflow,
                capacity=capacity,
                replay=replay,
                publisher=None if writer is None else writer.id,  # a broker that takes over ignores it
            )
            self._subscribed[subscription] = channel.ownership
        except BaseException:
            self._client.dropped.add(subscription)  # if a second interrupt stops the finaliser, the next request does it
            del channel
            raise
        return channel

    def unsubscribe(self, channel: Channel[Any]) -> None:
        """End the subscription of ``channel``, whichever process has opened it. Block until the broker replies.

        What was published before can still be received, but for what a backlog that is full at that moment blocks or drops;
        then ``EOFError``. Nothing happens if it was unsubscribed or closed before.

        :raises ValueError: the channel is another broker's.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        self._request("unsubscribe", subscription=self._own_channel(channel, "channel").id)

    def flush(self, timeout: float | None = None, *, delivered: bool = False) -> None:
        """Block until the broker has routed all that this handle has published in this process, at most ``timeout`` seconds.

        Then each message is in every backlog that it belongs to, before all that is published from now on. With
        ``delivered``, block until each has left every backlog, too: it is in the pipe, was dropped by the policy, or its
        subscription has ended; a channel that no process has opened yet delays this. Neither means that it was received.

        :raises TimedOut: (a ``TimeoutError``) it took longer.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        :raises BrokerRestarted: something was published to a broker that has died since, and may not have been routed.
        """
        limit = check_timeout(timeout)
        if not isinstance(delivered, bool):
            raise TypeError(f"delivered must be True or False, not {type(delivered).__name__}")
        self._check_open()
        writer = self._writer
        if writer is not None:
            if not self._is_done(limit, "flush", publisher=writer.id, delivered=delivered):
                what = "all to leave its backlog" if delivered else "the broker to route all"
                raise TimedOut(_TOO_SHORT.format(limit, what))
            if writer.session is not self._client.session():
                self._drop_writer(writer)
        if self._has_gap:
            self._has_gap = False
            raise BrokerRestarted("the broker has died: what this handle had published before may be lost for some channels")

    def wait_for_subscribers(self, count: int, *, topic: str | None = None, timeout: float | None = None) -> None:
        """Block until there are ``count`` subscriptions, at most ``timeout`` seconds; with ``topic``, subscribed to it.

        :raises TimedOut: (a ``TimeoutError``) there were fewer.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        check_count(count, "count", 0)
        if topic is not None:
            encode_topic(topic)
        timeout = check_timeout(timeout)
        if not self._is_done(timeout, "wait", count=count, topic=topic):
            what = f"{count} subscription(s)" + ("" if topic is None else f" to {topic!r}")
            now = "the broker does not reply"
            with contextlib.suppress(TimedOut):
                reply = self._request("wait", Deadline(0.3), now=True, count=count, topic=topic)
                now = f"there are {reply.body['there']}"
            raise TimedOut(f"{_TOO_SHORT.format(timeout, what)}. Now {now}")

    def _is_done(self, timeout: float | None, do: str, **fields: Any) -> bool:
        # A timeout of 0 does not wait for the condition, but for the reply.
        deadline = Deadline(LEAST_TIME if timeout == 0 else timeout)
        with contextlib.suppress(TimedOut):
            return bool(self._request(do, deadline, now=timeout == 0, **fields).body["done"])
        return False

    def stats(self) -> BrokerStats:
        """Return a snapshot of the broker and its subscriptions. The difference of two gives rates.

        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        return snapshot(self._request("stats").body)

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
            self._close(timeout)

    def _close(self, timeout: float | None) -> None:
        if self._is_closing_done:
            return
        process, client = self._process, self._client
        limit = Deadline(None if timeout is None else timeout + _MARGIN)  # also when the broker is stopped
        if process is not None:
            open_own(self._ownerships(), limit.at_most(CLOSE_TIMEOUT))
        self._closed = True
        writer = self._writer  # not before: a thread that makes one finds the handle closed, or is found here
        if writer is not None:
            writer.pipe.close()
        if process is not None:
            asked = int(self._stop(timeout, limit.at_most(CLOSE_TIMEOUT))["pid"])
            # Seconds that the broker goes on draining, unless a reader makes progress.
            process.end(limit.remaining(), asked=asked, time_left=lambda: self._stop(timeout, Deadline(1.0))["left"])
            client.close()
            for ownership in self._ownerships():
                ownership.release_heirs()
        elif writer is not None:
            # A publish that waits in another thread is woken when the broker closes its end.
            with contextlib.suppress(BroadcastError, OSError):
                deadline = limit.at_most(CLOSE_TIMEOUT)
                client.request("retire", session=writer.session, publisher=writer.id, deadline=deadline)
        self._writer = None
        self._client = BrokerClient(client.address, client.broker)  # the session ends with its last handle
        self._heirs = Descendants()  # closes their descriptors
        self._is_closing_done = True

    def _ownerships(self) -> list[PipeOwnership]:
        """Return those of the channels that live, also while other threads subscribe."""
        return [ownership for reference in self._subscribed.valuerefs() if (ownership := reference()) is not None]

    def _stop(self, timeout: float | None, deadline: Deadline) -> dict[str, float]:
        """Request the end of the broker. Return its PID, and the seconds left for draining; 0 if it does not reply."""
        with contextlib.suppress(BroadcastError, OSError):
            return self._client.request("stop", deadline=deadline, timeout=timeout).body
        return {"pid": 0, "left": 0.0}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_open()
        self._is_pickled = True
        return Broadcaster, (self._client,)

    def __del__(self) -> None:
        process: _Process | None = getattr(self, "_process", None)
        if process is not None and not self._closed and process.leave():
            if not (self._is_pickled or self._heirs.live()):  # else there may be a process that will connect
                self._client.ends_broker = True
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        return f"<mpbroadcast.Broadcaster at {self.address!r}{', closed' if self._closed else ''}>"

    def _in_child(self) -> None:
        self._writer = None
        self._writer_lock = locks.rlock()
        self._has_gap = False
        self._process = None
        self._closing = locks.rlock()
