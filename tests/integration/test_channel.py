"""What a subscriber holds: receiving, ending, and being an honest waitable."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import pickle
import selectors
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import (
    Broadcaster,
    BrokerLost,
    BrokerRestarted,
    Channel,
    ChannelInUse,
    ClosedError,
    Lagged,
    Overflowed,
    TimedOut,
    channel_to_selector,
    connect,
    start_broadcaster,
)
from mpbroadcast.client import broker_client
from mpbroadcast.client.broker_client import BrokerClient
from tests.support import workers
from tests.support.helpers import (
    DEADLINE,
    Background,
    Children,
    answer,
    everything,
    fill,
    finish,
    only_subscriber,
    pattern,
    readable,
    stopped,
    take,
    until_tasks_wait,
    wait_delivered,
    wait_for,
    wait_until,
)

Bus = Broadcaster[Any]


# --- recv and poll ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.0, 0.05])
def test_recv_without_a_message_runs_out_of_time(bus: Bus, timeout: float) -> None:
    """``recv`` raises a ``TimeoutError`` that names the channel, and what comes later is received."""
    channel = bus.subscribe()
    for _ in range(3):
        with pytest.raises(TimedOut) as caught:
            channel.recv(timeout=timeout)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.channel is channel
    bus.publish("later")
    assert channel.recv(timeout=DEADLINE) == "later"


@pytest.mark.parametrize("wait", ["recv", "recv_many", "poll", "receive"])
def test_without_a_timeout_a_receiver_sleeps_until_a_message_comes(bus: Bus, wait: str) -> None:
    """For one message and no longer: for no second one that might come."""
    channel = bus.subscribe()
    receiver = channel if wait != "receive" else channel_to_selector(channel)
    waiting = Background(getattr(receiver, wait), *((None,) if wait == "poll" else ()))
    waiting.wait_until_blocked(wait)
    bus.publish("message")
    assert waiting.result() == {"recv_many": ["message"], "poll": True}.get(wait, "message")


def test_poll_tells_and_takes_nothing(bus: Bus) -> None:
    """``poll`` returns whether ``recv`` would return, waits no longer than its timeout, and takes no message."""
    channel = bus.subscribe()
    assert channel.poll() is False
    assert channel.poll(0.05) is False
    bus.publish(1)
    bus.publish(2)
    for expected in (1, 2):
        assert channel.poll(DEADLINE) is True
        assert channel.poll() is True
        assert channel.recv(timeout=0) == expected
    assert channel.poll(0) is False


# --- recv_many --------------------------------------------------------------------------------------------------------


def test_recv_many_takes_what_is_there(bus: Bus) -> None:
    """``recv_many`` returns everything that has arrived, at least one message, and at most its limit."""
    channel = bus.subscribe()
    channel.fileno()
    bus.publish_many(range(100))
    wait_delivered(bus, 100)
    assert channel.recv_many(1) == [0]
    assert channel.recv_many(limit=9, timeout=0) == list(range(1, 10))
    assert channel.recv(timeout=0) == 10
    got: list[int] = []
    while len(got) < 89:
        part = channel.recv_many(timeout=0)
        assert part
        got += part
    assert got == list(range(11, 100))
    with pytest.raises(TimedOut):
        channel.recv_many(timeout=0)


def test_recv_many_returns_what_precedes_a_bad_message(bus: Bus) -> None:
    """What came before a message that fails to unpickle is returned first; then the error; then what came behind."""
    channel = bus.subscribe()
    channel.fileno()
    bad = workers.CannotBeUnpickled()
    bus.publish_many([1, 2, bad, 3, bad, bad, 4])
    wait_delivered(bus, 7)
    assert channel.recv_many(timeout=0) == [1, 2]
    with pytest.raises(workers.Boom):
        channel.recv_many(timeout=0)
    assert channel.recv_many(timeout=0) == [3]
    for _ in range(2):
        with pytest.raises(workers.Boom):
            channel.recv_many(timeout=0)
    assert channel.recv_many(timeout=0) == [4]


# --- messages that fail to unpickle -----------------------------------------------------------------------------------


CHANNEL_ERRORS: list[Exception] = [
    *(EOFError(), StopIteration(), StopAsyncIteration(), Lagged(7), Overflowed()),
    *(BrokerLost(), BrokerRestarted(), TimedOut(), ClosedError(), ChannelInUse("?", 7)),
]


@pytest.mark.parametrize("padding", [0, 3000, 300_000])
def test_no_error_of_a_message_is_taken_for_the_channels_own(padding: int, bus: Bus) -> None:
    """Each comes as the cause of a ``RuntimeError``, in every call that receives, and nothing ends or is counted."""

    async def first(channel: Channel[Any]) -> Any:
        return await anext(channel)

    with bus.subscribe() as channel:
        selector = channel_to_selector(channel)
        calls = [lambda: channel.recv(DEADLINE), lambda: channel.recv_many(1, DEADLINE), lambda: next(channel)]
        calls += [lambda: asyncio.run(first(channel)), lambda: selector.receive(DEADLINE)]
        for error, call in itertools.product(CHANNEL_ERRORS, calls):
            bus.publish([bytes(padding), workers.Raises(error)])
            bus.publish("next")
            with pytest.raises(RuntimeError) as raised:
                call()
            assert type(raised.value) is RuntimeError
            assert type(raised.value.__cause__) is type(error)
            assert call() in ("next", ["next"])
        assert channel.missed == 0


# --- iteration --------------------------------------------------------------------------------------------------------


def test_iteration_goes_on_where_it_was_left(bus: Bus) -> None:
    """Leaving a loop loses nothing: the next loop, or ``recv``, goes on behind it."""
    channel = bus.subscribe()
    bus.publish_many(range(10))
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    for message in channel:
        if message == 3:
            break
    assert channel.recv(timeout=DEADLINE) == 4
    assert list(channel) == [5, 6, 7, 8, 9]


async def take_async(channel: Channel[Any], count: int) -> list[Any]:
    """The next ``count`` messages, by ``async for``."""
    messages: list[Any] = []
    async for message in channel:
        messages.append(message)
        if len(messages) == count:
            break
    return messages


def test_async_iteration_waits_without_blocking_the_loop(bus: Bus) -> None:
    """While ``async for`` waits for a message, other tasks run: one of them publishes it."""
    channel = bus.subscribe()

    async def main() -> list[Any]:
        received: list[Any] = []
        for number in range(20):
            receiving = asyncio.create_task(take_async(channel, 1))
            await until_tasks_wait()
            assert not receiving.done()
            bus.publish(number)
            received += await asyncio.wait_for(receiving, DEADLINE)
        return received

    assert asyncio.run(main()) == list(range(20))


def test_two_tasks_share_a_channel(bus: Bus) -> None:
    """Two tasks that iterate one channel get each message once between them, and both see the end."""
    channel = bus.subscribe()

    async def receive() -> list[int]:
        return [message async for message in channel]

    async def main() -> list[list[int]]:
        tasks = [asyncio.create_task(receive()) for _ in range(2)]
        await until_tasks_wait()
        bus.publish_many(range(1000))
        bus.flush(timeout=DEADLINE)
        bus.unsubscribe(channel)
        return list(await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE))

    first, second = asyncio.run(main())
    assert sorted(first + second) == list(range(1000))


def test_second_task_goes_on_when_the_first_is_cancelled(bus: Bus) -> None:
    """Of two tasks that wait for one channel, cancelling one leaves the other to get what comes."""
    channel = bus.subscribe()

    async def main() -> list[Any]:
        first, second = (asyncio.create_task(take_async(channel, 3)) for _ in range(2))
        await until_tasks_wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        bus.publish_many(range(3))
        return await asyncio.wait_for(second, DEADLINE)

    assert asyncio.run(main()) == [0, 1, 2]


def test_cancelled_tasks_lose_no_message(bus: Bus) -> None:
    """However often waiting is cancelled, each message is received once, in order."""
    channel = bus.subscribe()

    async def main() -> list[int]:
        publishing = Background(bus.publish_many, range(300))
        received: list[int] = []
        delay = 0
        while len(received) < 300:
            delay = (delay + 37) % 400
            task = asyncio.create_task(take_async(channel, 1))
            await asyncio.sleep(delay / 1_000_000)
            task.cancel()
            try:
                received += await task
            except asyncio.CancelledError:
                continue
        publishing.result()
        return received

    assert asyncio.run(main()) == list(range(300))
    bus.publish("and then")
    assert everything(bus, channel) == ["and then"]


def test_async_iteration_raises_for_a_bad_message(bus: Bus) -> None:
    """A message that fails to unpickle raises in ``async for``, and the next iteration goes on behind it."""
    channel = bus.subscribe()
    bus.publish_many([workers.CannotBeUnpickled(), "good"])
    with pytest.raises(workers.Boom):
        asyncio.run(asyncio.wait_for(take_async(channel, 1), DEADLINE))
    assert asyncio.run(asyncio.wait_for(take_async(channel, 1), DEADLINE)) == ["good"]


# --- more topics, fewer topics ----------------------------------------------------------------------------------------


def test_topics_are_added_and_removed_on_the_same_channel(bus: Bus) -> None:
    """``channel.subscribe`` and ``channel.unsubscribe`` take effect at once, for what is published from then on."""
    channel = bus.subscribe("a")
    bus.publish(1, topic="b")
    channel.subscribe("b", "c*")
    assert sorted(only_subscriber(bus).topics) == ["a", "b", "c*"]
    for topic in ("a", "b", "cc"):
        bus.publish(topic, topic=topic)
    bus.flush(timeout=DEADLINE)
    channel.unsubscribe("a", "c*")
    assert list(only_subscriber(bus).topics) == ["b"]
    for number, topic in enumerate(["a", "b", "cc"]):
        bus.publish(number, topic=topic)
    assert everything(bus, channel) == ["a", "b", "cc", 1]


def test_added_topic_starts_behind_what_its_handle_has_published(bus: Bus) -> None:
    """A topic that is taken up brings nothing that the same handle has published before."""
    channel = bus.subscribe("a")
    for number in range(30):
        topic = f"topic {number}"
        bus.publish_many(["before"] * 20, topic=topic)
        channel.subscribe(topic)
        bus.publish(number, topic=topic)
        assert channel.recv(timeout=DEADLINE) == number


def test_channel_without_its_last_topic_hears_nothing(bus: Bus) -> None:
    """Giving up the last topic does not mean to receive everything, and topics can be taken up again."""
    channel = bus.subscribe("a")
    channel.unsubscribe("a")
    bus.publish(1, topic="a")
    bus.publish(2)
    channel.subscribe("a")
    bus.publish(3, topic="a")
    assert everything(bus, channel) == [3]


def test_topics_change_while_another_thread_receives(bus: Bus) -> None:
    """A ``recv`` that waits is no obstacle, and gets what the new topic brings."""
    channel = bus.subscribe("a")
    receiving = Background(channel.recv)
    receiving.wait_until_blocked("recv")
    channel.subscribe("b")
    bus.publish("message", topic="b")
    assert receiving.result() == "message"


# --- ends -------------------------------------------------------------------------------------------------------------


def test_unsubscribe_gives_the_rest_and_then_the_end(bus: Bus) -> None:
    """What had been routed before ``unsubscribe`` is received, then ``EOFError`` comes, again and again."""
    channel = bus.subscribe()
    channel.fileno()
    bus.publish_many([1, 2, 3])
    bus.flush(timeout=DEADLINE)
    for _ in range(3):
        bus.unsubscribe(channel)
    bus.publish("too late")
    assert take(channel, 3) == [1, 2, 3]
    for _ in range(3):
        assert channel.poll(DEADLINE)
        with pytest.raises(EOFError):
            channel.recv(timeout=DEADLINE)
    assert channel.closed is False
    bus.unsubscribe(channel)
    channel.close()
    bus.unsubscribe(channel)


def test_unsubscribe_keeps_a_large_rest(bus: Bus) -> None:
    """What waits in the backlog at ``unsubscribe`` comes too, however much it is, opened before or not."""
    opened, unopened = bus.subscribe(), bus.subscribe()
    opened.fileno()
    for number in range(300):
        bus.publish(pattern(number, 20_000))
    expected = [pattern(number, 20_000) for number in range(300)]
    assert everything(bus, opened) == expected
    assert everything(bus, unopened) == expected


def _publish_what_comes(bus: Bus, orders: Connection) -> None:
    """Publish each message that comes through the pipe, and report that it was; the end is ``None``."""
    while (message := answer(orders)) is not None:
        bus.publish(message)
        orders.send("published")


@pytest.mark.parametrize("what", ["channel", "topic"])
def test_unsubscribe_ends_behind_what_was_published_before(
    what: str, bus: Bus, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """By anybody, also when the broker has not noticed yet that the backlog that held it back has been read empty."""
    child = children(fork, _publish_what_comes, bus, pipe[1])
    for number in range(20):
        with bus.subscribe(capacity=100_000) as slow, bus.subscribe() as channel:
            slow.fileno()
            bus.publish_many(range(5))
            bus.flush(timeout=DEADLINE, delivered=False)
            last = bytes(200_000)  # more than `slow` takes while something is there
            if number % 2:
                bus.publish(last)
            else:
                pipe[0].send(last)
                assert answer(pipe[0]) == "published"
            wait_until(lambda: any(row.stalls for row in bus.stats().subscribers))
            assert take(slow, 5) == list(range(5))  # of which the broker gets no event
            if what == "channel":
                bus.unsubscribe(channel)
            else:
                channel.unsubscribe("*")
            assert take(channel, 6) == [0, 1, 2, 3, 4, last]
            assert slow.recv(timeout=DEADLINE) == last
    pipe[0].send(None)
    finish(child)


@pytest.mark.parametrize("wait", ["recv", "recv_many", "poll"])
@pytest.mark.parametrize("end", ["unsubscribe", "close"])
def test_the_end_of_a_channel_ends_a_waiting_thread(bus: Bus, wait: str, end: str) -> None:
    """After ``unsubscribe`` it gets the clean end, and after ``close`` a ``ClosedError``, at once."""
    channel = bus.subscribe()
    waiting = Background(getattr(channel, wait), timeout=None)
    waiting.wait_until_blocked(wait)
    if end == "unsubscribe":
        bus.unsubscribe(channel)
        assert waiting.result() is True if wait == "poll" else isinstance(waiting.error(), EOFError)
    else:
        channel.close()
        assert isinstance(waiting.error(), ClosedError)


def test_close_ends_waiting_async_iteration(bus: Bus) -> None:
    """A task that waits in ``async for`` gets ``ClosedError`` when another task closes the channel."""
    channel = bus.subscribe()

    async def main() -> None:
        receiving = asyncio.create_task(take_async(channel, 1))
        await until_tasks_wait()
        channel.close()
        with pytest.raises(ClosedError):
            await asyncio.wait_for(receiving, DEADLINE)

    asyncio.run(main())


def test_with_closes(bus: Bus) -> None:
    """A ``with`` block closes the channel at its end."""
    with bus.subscribe() as channel:
        bus.publish(1)
        assert channel.recv(timeout=DEADLINE) == 1
    assert channel.closed
    assert bus.stats().subscribers == ()


def test_forgotten_channel_is_unsubscribed(bus: Bus) -> None:
    """A channel that nobody holds any more ends its subscription."""
    opened, unopened = bus.subscribe(), bus.subscribe()
    opened.poll(0)
    del opened, unopened
    wait_until(lambda: bus.stats().subscribers == ())


@pytest.mark.parametrize("restart", [False, True])
def test_channels_that_are_dropped_while_the_broker_takes_nothing(restart: bool) -> None:
    """None of them stays, however many there are: the next request finds none."""
    with start_broadcaster(restart=restart) as bus:
        channels = [bus.subscribe() for _ in range(1000)]
        with stopped(bus.stats().pid):
            channels.clear()
            gc.collect()
        assert not bus.stats().subscribers


def test_a_channel_that_is_closed_while_the_broker_takes_nothing(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker did not answer in time, and did not even get the request: it goes ahead of the next one."""
    monkeypatch.setattr(broker_client, "CONNECT_TIMEOUT", 0.2)
    channel = bus.subscribe()
    with stopped(bus.stats().pid):
        asking = Background(bus.stats)  # which has the one connection that there is
        asking.wait_until_blocked("wait")
        channel.close()
    asking.result()
    wait_until(lambda: not bus.stats().subscribers)


def test_a_publish_that_waits_for_dropped_channels_goes_on(bus: Bus) -> None:
    """Nothing is asked meanwhile, and more were dropped than there is room for on a socket."""
    channels = [bus.subscribe(capacity=1000) for _ in range(1000)]
    fill(bus, size=10_000)
    waiting = Background(bus.publish, bytes(10_000))
    waiting.wait_until_blocked("wait")
    with stopped(bus.stats().pid):
        channels.clear()
        gc.collect()
    waiting.result()


def test_a_handle_that_is_dropped_while_the_broker_takes_nothing(bus: Bus) -> None:
    """Its channels are dropped, too, but for those that it has handed on."""
    other: Bus = connect(bus.address)
    channels = [other.subscribe() for _ in range(1000)]
    handed_on: Channel[Any] = pickle.loads(pickle.dumps(channels[0]))
    with stopped(bus.stats().pid):
        channels.clear()
        other.close()
        del other
        gc.collect()
    wait_until(lambda: len(bus.stats().subscribers) <= 1)
    bus.publish(1)
    assert handed_on.recv(timeout=DEADLINE) == 1


def _drop_all(address: str, pid: int, report: Connection) -> None:
    bus = connect(address)
    channels = [bus.subscribe() for _ in range(1000)]
    with stopped(pid):
        channels.clear()
        del bus
        gc.collect()
    report.send("done")
    report.recv()


def test_who_lets_go_of_all_and_lives_on(bus: Bus, fork: BaseContext, children: Children) -> None:
    """Nothing of this package is used there any more; and no channel stays."""
    ours, theirs = fork.Pipe()
    with ours, theirs:
        child = children(fork, _drop_all, bus.address, bus.stats().pid, theirs)
        assert answer(ours) == "done"
        wait_until(lambda: not bus.stats().subscribers)
        ours.send("end")
        finish(child)


def test_a_subscription_is_made_once_and_not_behind_its_drop(bus: Bus) -> None:
    """A request that is repeated changes nothing, and one that comes behind its drop is refused."""
    link = BrokerClient(bus.address)
    request: dict[str, Any] = {"topics": ["*"], "overflow": "block", "capacity": 1000, "replay": 0, "publisher": None}
    for _ in range(2):
        link.request("subscribe", subscription=5, **request)
    assert link.drop(6)
    with pytest.raises(ClosedError, match="dropped"):
        link.request("subscribe", subscription=6, **request)
    assert [row.id for row in bus.stats().subscribers] == [5]
    assert link.drop(5)
    wait_until(lambda: not bus.stats().subscribers)


# --- an honest waitable -----------------------------------------------------------------------------------------------


@contextmanager
def by_wait(channel: Channel[Any]) -> Iterator[Callable[[], bool]]:
    """Wait as multiprocessing does (poll)."""
    channel.fileno()
    yield lambda: wait_for([channel]) == [channel]


@contextmanager
def by_selectors(channel: Channel[Any]) -> Iterator[Callable[[], bool]]:
    """Wait by a selector (epoll) in which the channel stays registered."""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        yield lambda: bool(selector.select(0))


Waiter = Callable[[Channel[Any]], Any]
each_waiter = pytest.mark.parametrize("waiter", [by_wait, by_selectors])


@each_waiter
@pytest.mark.parametrize("many", [False, True], ids=["recv", "recv_many"])
def test_readable_exactly_while_there_is_something_to_receive(bus: Bus, waiter: Waiter, many: bool) -> None:
    """Before each receive that has something to return or to raise the descriptor is readable, and after the last it is not.

    Messages go through the pipe at once and in pieces, and one fails to unpickle; ``poll`` between them changes nothing.
    """
    channel = bus.subscribe()
    bad = workers.CannotBeUnpickled()
    total = 0

    def receive() -> Any:
        return channel.recv_many(1, timeout=0)[0] if many else channel.recv(timeout=0)

    with waiter(channel) as ready:
        assert not ready()
        for sizes in ([1], [0, 4090, 3, 9000, 4096, 20_000, 1, 2, 3], range(300)):
            messages = [bad, *(pattern(size, size) for size in sizes), bad]
            bus.publish_many(messages)
            total += len(messages)
            wait_delivered(bus, total)
            for message in messages:
                assert ready()
                assert channel.poll(0)
                assert ready()
                if message is bad:
                    with pytest.raises(workers.Boom):
                        receive()
                else:
                    assert receive() == message
            assert not ready()
            assert not channel.poll(0)


@each_waiter
def test_readable_while_the_end_is_there(bus: Bus, waiter: Waiter) -> None:
    """The end keeps the descriptor readable, behind the last message and after it was raised."""
    channel = bus.subscribe()
    with waiter(channel) as ready:
        bus.publish(1)
        wait_delivered(bus, 1)
        bus.unsubscribe(channel)
        assert ready()
        assert channel.recv(timeout=0) == 1
        wait_until(ready)
        for _ in range(2):
            with pytest.raises(EOFError):
                channel.recv(timeout=0)
            assert ready()


@each_waiter
def test_half_arrived_message_does_not_spin(bus: Bus, waiter: Waiter, inline: None) -> None:
    """While a large message is half there, ``poll(0)`` takes in what came and is false; then the descriptor is quiet."""
    channel = bus.subscribe()
    broker = bus.stats().pid
    size = 8 * 1_048_576
    with waiter(channel) as ready:
        bus.publish("small")
        publishing = Background(bus.publish, pattern(1, size))
        wait_until(ready)
        assert channel.recv(timeout=DEADLINE) == "small"
        wait_until(ready)
        os.kill(broker, signal.SIGSTOP)
        try:
            for _ in range(1000):
                assert not channel.poll(0)
                with pytest.raises(TimeoutError):
                    channel.recv(timeout=0)
                if not ready():
                    break
            assert not ready()
            assert not channel.poll(0.05)
        finally:
            os.kill(broker, signal.SIGCONT)
        wait_until(ready)
        assert channel.recv(timeout=DEADLINE) == pattern(1, size)
        publishing.result()
        bus.publish("behind")
        assert channel.recv(timeout=DEADLINE) == "behind"
        assert not ready()


def test_wait_on_many_channels_names_the_right_ones(bus: Bus) -> None:
    """``multiprocessing.connection.wait`` with several channels returns just those with something to receive."""
    channels = [bus.subscribe(str(number)) for number in range(5)]
    assert wait_for(channels) == []
    for number in (1, 3):
        bus.publish("message", topic=str(number))
    wait_until(lambda: len(wait_for(channels)) == 2)
    assert wait_for(channels) == [channels[1], channels[3]]
    for number in (1, 3):
        channels[number].recv(timeout=0)
    assert wait_for(channels) == []


def test_readable_while_a_backlog_is_drained(bus: Bus) -> None:
    """While a full backlog is read, waiting before each ``recv`` neither hangs nor finds nothing."""
    channel = bus.subscribe(capacity=200_000)
    published = fill(bus, size=3000)
    received: list[int] = []
    while len(received) < len(published):
        assert wait_for([channel], DEADLINE) == [channel]
        try:
            received.append(channel.recv(timeout=0)[0])
        except TimeoutError:
            continue  # the part of a message: taken in
    assert received == published
    assert not readable(channel)
