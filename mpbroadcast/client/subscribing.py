"""Subscribing through one handle, and its other requests."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Final, Literal, TypedDict, TypeVar, Unpack, overload
from weakref import WeakValueDictionary

from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.channel import Channel
from mpbroadcast.client.opening import Opening
from mpbroadcast.client.pipe_ownership import PipeOwnership
from mpbroadcast.client.publishing import Publishing, closed_error
from mpbroadcast.client.received import WITH_ID, Received
from mpbroadcast.client.tasks import drive
from mpbroadcast.errors import BrokerRestarted
from mpbroadcast.posix.waiting import Steps, run
from mpbroadcast.validation import (
    Policy,
    check_bool,
    check_count,
    check_group,
    check_name,
    check_overflow,
    check_prefetch,
    check_topics,
    encode_topic,
)

M = TypeVar("M")
T = TypeVar("T")

DEFAULT_CAPACITY: Final = 64 << 20  # bytes


class Options(TypedDict, total=False):
    """Arguments of :meth:`Broadcaster.subscribe`, for its overloads."""

    overflow: Policy
    capacity: int | None
    replay: int
    after: int | None
    group: str | None
    prefetch: int | None
    name: str | None


class Subscribing(Publishing[M]):
    """The part of a broadcaster that subscribes."""

    def __init__(self, client: BrokerClient) -> None:
        super().__init__(client)
        self._subscribed: WeakValueDictionary[int, PipeOwnership] = WeakValueDictionary()

    @overload
    def subscribe(
        self,
        *topics: str,
        with_topic: Literal[False] = False,
        with_id: Literal[False] = False,
        raw: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Channel[M]: ...
    @overload
    def subscribe(
        self,
        *topics: str,
        with_topic: Literal[True],
        with_id: Literal[False] = False,
        raw: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Channel[tuple[str, M]]: ...
    @overload
    def subscribe(
        self,
        *topics: str,
        with_topic: bool = False,
        with_id: Literal[True],
        raw: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Channel[Received[M]]: ...
    @overload
    def subscribe(
        self,
        *topics: str,
        with_topic: bool,
        with_id: Literal[False] = False,
        raw: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Channel[M] | Channel[tuple[str, M]]: ...
    @overload
    def subscribe(
        self, *topics: str, with_topic: bool = False, with_id: bool, raw: Literal[False] = False, **options: Unpack[Options]
    ) -> Channel[M] | Channel[tuple[str, M]] | Channel[Received[M]]: ...
    @overload
    def subscribe(
        self,
        *topics: str,
        with_topic: Literal[False] = False,
        with_id: Literal[False] = False,
        raw: Literal[True],
        **options: Unpack[Options],
    ) -> Channel[bytes]: ...
    @overload
    def subscribe(
        self,
        *topics: str,
        with_topic: Literal[True],
        with_id: Literal[False] = False,
        raw: Literal[True],
        **options: Unpack[Options],
    ) -> Channel[tuple[str, bytes]]: ...
    @overload
    def subscribe(
        self, *topics: str, with_topic: bool = False, with_id: Literal[True], raw: Literal[True], **options: Unpack[Options]
    ) -> Channel[Received[bytes]]: ...
    @overload
    def subscribe(
        self, *topics: str, with_topic: bool = False, with_id: bool = False, raw: bool, **options: Unpack[Options]
    ) -> Channel[Any]: ...
    def subscribe(
        self,
        *topics: str,
        overflow: Policy = "block",
        capacity: int | None = None,
        replay: int = 0,
        after: int | None = None,
        with_topic: bool = False,
        with_id: bool = False,
        raw: bool = False,
        group: str | None = None,
        prefetch: int | None = None,
        name: str | None = None,
    ) -> Channel[Any]:
        """Return a new channel, subscribed to ``topics``; to all topics, if none is named. Block until the broker replies.

        A topic with ``*``, ``?`` or ``[`` is a pattern (``fnmatch.fnmatchcase``; ``[*]`` is a literal star), so
        ``subscribe("sensor[3]")`` does not match the topic ``sensor[3]``. Pass a topic that comes from outside through
        :func:`escape`: otherwise a sender of ``*`` reads everything.

        After this has returned, every publish, by any process, reaches the channel; nothing that this handle has published
        before does. Each channel gets its own copy, once, however many of its topics match.

        ``capacity`` bounds the backlog, in bytes (64 MiB if not given). A message counts with its pickled length, its
        topic's, and 256 bytes while it waits in the broker, and with its unread bytes in the channel's pipe. A message that is
        larger than the capacity passes when the backlog is empty. ``overflow`` is what happens when the backlog is full:

        - ``"block"``: ``publish`` blocks in the handles whose messages the channel would get; nothing is lost.
        - ``"drop_oldest"``: the oldest messages are dropped, and ``recv`` raises ``Lagged`` at their position.
        - ``"drop_newest"``: the new message is dropped, and ``recv`` raises ``Lagged`` at its position.
        - ``"latest"``: full or not, the channel gets the newest message only. A receive that may wait returns the newest
          message that the broker had routed when it was called, or a later one. With ``timeout=0`` it returns what is in the
          pipe, which may be older; so it does if the broker does not reply within 0.1 seconds.
        - ``"disconnect"``: the channel is unsubscribed; ``recv`` returns what was kept, then raises ``Overflowed``, then
          ``EOFError``.

        With ``replay=k`` the channel starts with the last ``k`` messages that match, in the order of all, as far as the broker
        has kept them (``start_broadcaster(history=...)``) and they fit into the capacity; new messages follow without a gap.

        With ``after=id`` it starts behind the message with that id, with what the history still has; new messages follow. If
        something that the channel would have got is gone, one ``Lagged`` comes first, with the number where the broker knows it
        (always, without topics), else with ``None``. What exceeds the capacity is gone, too, the oldest first, and is in that
        number. An id that this broker has not given out is unknown to it: one ``Lagged`` with ``None``, then all that the
        history has. 0 stands for the beginning, and is known.

        With ``with_topic`` each message that is received is ``(topic, message)``; with ``with_id``, whatever ``with_topic`` is,
        a :class:`Received` of its id, its topic, and the message. With ``raw`` the message is its payload: the ``bytes`` that
        ``pickle.loads`` makes it of wherever mpbroadcast is installed, and that :meth:`publish_payload` takes.

        Of all channels with the same ``group``, each message goes to one: to that with the fewest messages that it has been
        given and has not finished, of which it has at most ``prefetch``. The last message is finished when the channel is asked
        for another, by any call that receives or waits; ``recv_many`` gives at most ``prefetch``. What waits for a member that
        is free is in one backlog. Members agree on topics, ``overflow`` and ``capacity``; the first one's ``replay`` and
        ``after`` count. ``prefetch`` is 1 if not given, and needs a ``group``.

        ``name`` is for people: at most 64 printable characters, shown by ``stats()``, ``top``, the broker's log and the errors
        of this channel.

        :raises ValueError: an argument is out of range; ``prefetch`` without ``group``; ``replay`` or ``after`` without a
            history, or both; this process has too many subscriptions; the group already exists with other topics,
            ``overflow`` or ``capacity``.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        return run(
            self._subscribing(topics, overflow, capacity, replay, after, with_topic, with_id, raw, group, prefetch, name)
        )

    @overload
    def asubscribe(
        self,
        *topics: str,
        with_topic: Literal[False] = False,
        with_id: Literal[False] = False,
        raw: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Opening[Channel[M]]: ...
    @overload
    def asubscribe(
        self,
        *topics: str,
        with_topic: Literal[True],
        with_id: Literal[False] = False,
        raw: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Opening[Channel[tuple[str, M]]]: ...
    @overload
    def asubscribe(
        self,
        *topics: str,
        with_topic: bool = False,
        with_id: Literal[True],
        raw: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Opening[Channel[Received[M]]]: ...
    @overload
    def asubscribe(
        self,
        *topics: str,
        with_topic: bool,
        with_id: Literal[False] = False,
        raw: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Opening[Channel[M] | Channel[tuple[str, M]]]: ...
    @overload
    def asubscribe(
        self, *topics: str, with_topic: bool = False, with_id: bool, raw: Literal[False] = False, **options: Unpack[Options]
    ) -> Opening[Channel[M] | Channel[tuple[str, M]] | Channel[Received[M]]]: ...
    @overload
    def asubscribe(
        self,
        *topics: str,
        with_topic: Literal[False] = False,
        with_id: Literal[False] = False,
        raw: Literal[True],
        **options: Unpack[Options],
    ) -> Opening[Channel[bytes]]: ...
    @overload
    def asubscribe(
        self,
        *topics: str,
        with_topic: Literal[True],
        with_id: Literal[False] = False,
        raw: Literal[True],
        **options: Unpack[Options],
    ) -> Opening[Channel[tuple[str, bytes]]]: ...
    @overload
    def asubscribe(
        self, *topics: str, with_topic: bool = False, with_id: Literal[True], raw: Literal[True], **options: Unpack[Options]
    ) -> Opening[Channel[Received[bytes]]]: ...
    @overload
    def asubscribe(
        self, *topics: str, with_topic: bool = False, with_id: bool = False, raw: bool, **options: Unpack[Options]
    ) -> Opening[Channel[Any]]: ...
    def asubscribe(
        self,
        *topics: str,
        overflow: Policy = "block",
        capacity: int | None = None,
        replay: int = 0,
        after: int | None = None,
        with_topic: bool = False,
        with_id: bool = False,
        raw: bool = False,
        group: str | None = None,
        prefetch: int | None = None,
        name: str | None = None,
    ) -> Opening[Channel[Any]]:
        """Do as :meth:`subscribe`, in a task. Cancelled, it leaves no subscription.

        Await the result for the channel, or enter it: ``async with bus.asubscribe("room") as channel`` closes it at the end.
        """
        steps = self._subscribing(topics, overflow, capacity, replay, after, with_topic, with_id, raw, group, prefetch, name)
        return Opening(self._ask(steps), "Broadcaster.asubscribe")

    def _subscribing(
        self,
        topics: tuple[str, ...],
        overflow: Policy,
        capacity: int | None,
        replay: int,
        after: int | None,
        with_topic: bool,
        with_id: bool,
        raw: bool,
        group: str | None,
        prefetch: int | None,
        name: str | None,
    ) -> Steps[Channel[Any]]:
        check_topics(topics)
        check_overflow(overflow)
        check_bool(with_topic, "with_topic")
        check_bool(with_id, "with_id")
        check_bool(raw, "raw")
        capacity = DEFAULT_CAPACITY if capacity is None else check_count(capacity, "capacity", 1)
        check_count(replay, "replay", 0)
        if after is not None:
            check_count(after, "after", 0)
            if replay:
                raise ValueError("replay and after are two beginnings: give one of them")
        check_group(group)
        members = check_prefetch(prefetch, group)
        check_name(name)
        self._check_open()
        options = {"overflow": overflow, "capacity": capacity, "replay": replay, "group": group, "prefetch": members}
        form = WITH_ID if with_id else with_topic
        return (yield from self._making("subscribe", form, topics, after, raw, name, **options))

    def _making(
        self,
        do: str,
        form: int,
        topics: tuple[str, ...],
        after: int | None,
        raw: bool = False,
        name: str | None = None,
        **options: Any,
    ) -> Steps[Channel[Any]]:
        """Return a channel of this form, of the subscription that a request makes."""
        subscription = int.from_bytes(os.urandom(6)) or 1
        # The channel exists before the subscription does: if an interrupt comes, its finaliser drops the subscription.
        channel: Channel[Any] = Channel(self._client, subscription, form, raw, name, subscriber=True)
        try:
            topics = topics or ("*",)
            publisher = self._publisher
            if name is not None:
                options["name"] = name
            yield from self._requesting(
                do, subscription=subscription, topics=topics, after=after, publisher=publisher, **options
            )
            self._subscribed[subscription] = channel._ownership
        except BaseException:
            self._client.dropped.add(subscription)  # if a second interrupt stops the finaliser, the next request does it
            del channel
            raise
        return channel

    @property
    def _publisher(self) -> int | None:
        """The id of what this handle publishes by: what is requested comes behind that. A broker that takes over ignores it."""
        writer = self._writer
        return None if writer is None else writer.id

    def unsubscribe(self, channel: Channel[Any]) -> None:
        """End the subscription of ``channel``, whichever process has opened it. Block until the broker replies.

        What was published before can still be received, but for what a backlog that is full at that moment blocks or drops;
        then ``EOFError``. Nothing happens if it was unsubscribed or closed before.

        :raises ValueError: the channel is another broker's.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        run(self._requesting("unsubscribe", subscription=self._own_channel(channel, "channel").id))

    async def aunsubscribe(self, channel: Channel[Any]) -> None:
        """Do as :meth:`unsubscribe`, in a task."""
        await self._ask(self._requesting("unsubscribe", subscription=self._own_channel(channel, "channel").id))

    def history(self, *topics: str, limit: int | None = None, after: int | None = None) -> list[Received[M]]:
        """Return what the broker has kept of ``topics``, or of all, in order: behind all that this handle has published.

        The last ``limit`` messages, all if that is not given; with ``after``, the first ``limit`` behind the message with that
        id. So one can page: the id of the last message is the next ``after``, and 0 the first. An id that this broker does not
        know stands before all that is kept. Block until all of it has come.

        :raises ValueError: an argument is out of range; the broker keeps no history; this process has too many subscriptions.
        :raises BrokerLost, ClosedError: as :meth:`publish`.
        :raises Exception: whatever unpickling one of these messages raises, as :meth:`Channel.recv`.
        """
        return run(self._reading_history(topics, limit, after))

    async def ahistory(self, *topics: str, limit: int | None = None, after: int | None = None) -> list[Received[M]]:
        """Do as :meth:`history`, in a task."""
        return await self._ask(self._reading_history(topics, limit, after))

    def _reading_history(self, topics: tuple[str, ...], limit: int | None, after: int | None) -> Steps[list[Received[M]]]:
        check_topics(topics)
        if limit is not None:
            check_count(limit, "limit", 0)
        if after is not None:
            check_count(after, "after", 0)
        while True:
            channel: Channel[Received[M]] = yield from self._making("history", WITH_ID, topics, after, limit=limit)
            with contextlib.suppress(BrokerRestarted):  # then that of the broker which has taken over is read
                return (yield from channel._arriving_until_end())

    def subscriber_count(self, topic: str | None = None) -> int:
        """Return the number of channels that would get what is published to ``topic``; ``None``: of all channels.

        Each member of a group counts. Block until the broker replies, after it has routed all that this handle has published.

        :raises BrokerLost, ClosedError: as :meth:`publish`.
        """
        return run(self._counting(topic))

    async def asubscriber_count(self, topic: str | None = None) -> int:
        """Do as :meth:`subscriber_count`, in a task."""
        return await self._ask(self._counting(topic))

    def _counting(self, topic: str | None) -> Steps[int]:
        if topic is not None:
            encode_topic(topic)
        reply = yield from self._requesting("wait", now=True, count=0, topic=topic, publisher=self._publisher)
        there: int = reply.body["there"]
        return there

    async def _ask(self, steps: Steps[T]) -> T:
        """Drive a core that sends requests."""
        return await drive(steps, self._tasks, closed_error)
