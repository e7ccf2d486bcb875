"""Message ids: the same in every channel, growing, also over a restart of the broker; and resuming behind one."""

import contextlib
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple, get_args

import pytest

from mpbroadcast import Broadcaster, BrokerRestarted, Channel, Lagged, Overflowed, Received, connect, start_broadcaster
from mpbroadcast.testing import drain
from mpbroadcast.validation import Policy
from tests.support.helpers import DEADLINE, Background, fill, kill_broker, receive_all, rest, take
from tests.support.large_workers import TRANSPORTS, Size, numbers

Bus = Broadcaster[Any]


def publish_numbers(bus: Bus, size: Size, first: int) -> None:
    """Publish 12 messages, to three topics in turn."""
    for number in range(first, first + 12):
        bus.publish(size.message(number), topic=f"topic:{number % 3}")
    bus.flush(DEADLINE)


def test_an_id_is_the_same_in_each_channel_and_grows(transport: Size) -> None:
    """Of two publishers, each channel gets ids in the one order, whatever its topics, its form and its policy."""
    with start_broadcaster() as bus, connect(bus.address) as other:
        everyone = bus.subscribe(with_id=True, capacity=1 << 30)
        others = {
            bus.subscribe("topic:0", with_id=True, capacity=1 << 30): {"topic:0"},
            bus.subscribe("*:1", "topic:2", with_id=True, with_topic=True, overflow="drop_oldest", capacity=1 << 30): {
                "topic:1",
                "topic:2",
            },
            bus.subscribe("topic:*", with_id=True, overflow="drop_newest", capacity=1 << 30): {"topic:0", "topic:1", "topic:2"},
        }
        publishing = [Background(publish_numbers, handle, transport, 1000 * index) for index, handle in enumerate((bus, other))]
        for one in publishing:
            one.result()
        received = drain(bus, everyone)
        assert sorted(numbers(one.message for one in received)) == [*range(12), *range(1000, 1012)]
        ids = [one.id for one in received]
        assert ids == sorted({*ids})
        assert 0 < ids[0] < ids[-1] < 2**53
        for channel, topics in others.items():
            assert drain(bus, channel) == [one for one in received if one.topic in topics]


def test_ids_grow_from_a_broker_to_the_one_that_takes_over() -> None:
    """Each of several brokers that follow each other begins above all that those before it have given out."""
    with start_broadcaster(restart=True) as bus:
        channel = bus.subscribe("t", with_id=True)
        ids: list[int] = []
        for count in (1, 200, 3, 2):
            bus.publish_many(range(count), topic="t")
            ids += [channel.recv(DEADLINE).id for _ in range(count)]
            kill_broker(bus)
            with pytest.raises(BrokerRestarted):
                channel.recv(DEADLINE)
        assert ids == sorted({*ids})
        assert ids[-1] < 2**53


class Gap(NamedTuple):
    """What ``Lagged`` has reported: how many messages are missing, or ``None``."""

    missed: int | None


def received(bus: Bus, channel: Channel[Received[Any]]) -> list[Any]:
    """Return all that a channel gives for what was published until now: messages and gaps."""
    bus.flush(DEADLINE)
    bus.unsubscribe(channel)
    found: list[Any] = []
    while True:
        try:
            found.append(channel.recv(DEADLINE).message)
        except Lagged as error:
            found.append(Gap(error.missed))
        except EOFError:
            return found


BEGINNING, FOREIGN, TO_COME = -1, -2, 12
KEPT = [3, 4, 5, *range(6, 12)]


@pytest.fixture
def kept(leaves_nothing: None) -> Iterator[tuple[Bus, list[int]]]:
    """Yield a broadcaster whose history has KEPT of 12 numbers, and ids: of these, one to come, a foreign one, and 0."""
    with start_broadcaster(history=3) as bus, bus.subscribe(with_id=True) as channel:
        bus.publish_many(range(6), topic="a")
        for number in range(6, 12):
            bus.publish(number, topic="b" if number % 2 else "c")
        ids = [channel.recv(DEADLINE).id for _ in range(12)]
        yield bus, [*ids, ids[-1] + 1, ids[0] - 1, 0]


@pytest.mark.parametrize(
    ("after", "topics", "expected"),
    [
        (4, (), [5, *range(6, 12)]),
        (2, (), KEPT),
        (1, (), [Gap(1), *KEPT]),
        (1, ("none", "*"), [Gap(1), *KEPT]),
        (BEGINNING, (), [Gap(3), *KEPT]),
        (11, (), []),
        (1, ("a",), [Gap(1), 3, 4, 5]),
        (1, ("b",), [7, 9, 11]),
        (0, ("a", "c"), [Gap(2), 3, 4, 5, 6, 8, 10]),
        (5, ("[ab]",), [7, 9, 11]),
        (BEGINNING, ("b", "c"), KEPT[3:]),
        (0, ("none",), []),
        (TO_COME, (), [Gap(None), *KEPT]),
        (FOREIGN, ("b",), [Gap(None), 7, 9, 11]),
        (FOREIGN, ("none",), [Gap(None)]),
    ],
)
def test_a_channel_resumes_behind_an_id(
    kept: tuple[Bus, list[int]], after: int, topics: tuple[str, ...], expected: list[Any]
) -> None:
    """It gets what the history has behind the id, then what is live; a gap first if something of its topics is gone."""
    bus, ids = kept
    channel = bus.subscribe(*topics, with_id=True, after=ids[after])
    (row,) = [one for one in bus.stats().subscribers if one.id == channel.id]
    missed = sum(one.missed or 0 for one in expected if isinstance(one, Gap))
    resumed = [one for one in expected if not isinstance(one, Gap)]
    assert (row.published, row.missed, row.waiting) == (missed + len(resumed), missed, len(resumed))
    bus.publish("live", topic="none" if "none" in topics else "b")
    assert received(bus, channel) == [*expected, *(["live"] if "a" not in topics else [])]
    assert channel.missed == missed


@pytest.mark.parametrize(
    ("overflow", "size"),
    [*((policy, "pipe") for policy in get_args(Policy)), ("block", "ring"), ("drop_oldest", "memory"), ("latest", "buffers")],
)
def test_what_is_resumed_is_cut_at_the_capacity(overflow: Policy, size: str) -> None:
    """The oldest are cut, and counted: in the gap that comes first, or, under ``latest``, in ``missed`` alone."""
    transport = TRANSPORTS[size]
    with start_broadcaster(history=100) as bus, bus.subscribe(with_id=True, capacity=1 << 30) as witness:
        bus.publish_many(map(transport.message, range(8)))
        id = witness.recv(DEADLINE).id
        channel = bus.subscribe(overflow=overflow, capacity=4 * transport.charge, after=id, with_id=True)
        row = bus.stats().subscribers[-1]
        cut = row.missed
        assert cut == 6 if overflow == "latest" else 1 <= cut <= 3
        assert (row.published, row.waiting) == (7, 7 - cut)
        bus.flush(DEADLINE)
        bus.unsubscribe(channel)
        if overflow != "latest":
            with pytest.raises(Lagged) as caught:
                channel.recv(DEADLINE)
            assert caught.value.missed == cut
        messages = rest(channel)
        assert numbers(one.message for one in messages) == [*range(1 + cut, 8)]
        assert [one.id for one in messages] == [*range(id + 1 + cut, id + 8)]
        assert channel.missed == cut


def test_under_latest_what_is_gone_is_no_gap_where_the_newest_is_there(kept: tuple[Bus, list[int]]) -> None:
    """It would not have got more; an unknown id is a gap there, too."""
    bus, ids = kept
    for after, expected, missed in ((BEGINNING, [11], 11), (3, [11], 7), (11, [], 0), (FOREIGN, [Gap(None), 11], 8)):
        channel = bus.subscribe(after=ids[after], overflow="latest", with_id=True)
        assert received(bus, channel) == expected
        assert channel.missed == missed


@pytest.mark.parametrize("overflow", ["block", "drop_oldest", "drop_newest", "disconnect"])
def test_a_group_starts_behind_an_id(kept: tuple[Bus, list[int]], overflow: Policy) -> None:
    """That of its first member; the gap goes to the member that gets the next message."""
    bus, ids = kept
    for after, expected in ((BEGINNING, [Gap(3), *KEPT]), (3, KEPT[1:]), (FOREIGN, [Gap(None), *KEPT])):
        first = bus.subscribe(group=f"group {after}", after=ids[after], overflow=overflow, with_id=True)
        second = bus.subscribe(group=f"group {after}", after=0, overflow=overflow, with_id=True)
        second.close()
        assert received(bus, first) == expected


def test_very_many_messages_are_resumed_at_random_places() -> None:
    """While others come: each once, in order, and live ones behind them."""
    count, choose = 40_000, Random(5)
    with start_broadcaster(history=2 * count) as bus, connect(bus.address) as other:
        witness = bus.subscribe(with_id=True)
        bus.publish_many(range(count))
        first = witness.recv(DEADLINE).id
        witness.close()
        publishing = Background(other.publish_many, range(count, count + 10_000))
        for _ in range(8):
            number = choose.randrange(count)
            with bus.subscribe(with_id=True, after=first + number) as channel:
                found: list[Received[int]] = []
                while not found or found[-1].message < count + 9_999:
                    found += channel.recv_many(timeout=DEADLINE)
                assert [one.message for one in found] == [*range(number + 1, count + 10_000)]
                assert [one.id for one in found] == [*range(first + number + 1, first + count + 10_000)]
        assert publishing.result() == 10_000


def test_an_id_of_a_broker_that_was_replaced_is_unknown() -> None:
    """The one that took over begins with a gap of unknown size, and with what it has itself."""
    with start_broadcaster(history=10, restart=True) as bus:
        bus.publish_many("abc")
        old = bus.subscribe(after=0, with_id=True)
        ids = [old.recv(DEADLINE).id for _ in range(3)]
        kill_broker(bus)
        with pytest.raises(BrokerRestarted):
            old.recv(DEADLINE)
        bus.publish("d")
        with contextlib.suppress(BrokerRestarted):
            bus.flush(DEADLINE)
        assert [one.message for one in bus.history()] == ["d"]
        assert received(bus, bus.subscribe(after=ids[1], with_id=True)) == [Gap(None), "d"]
        assert received(bus, bus.subscribe(after=0, with_id=True)) == ["d"]
        assert old.recv(DEADLINE).id > ids[2]


READ: list[tuple[tuple[str, ...], int | None, int | None, list[int]]] = [
    ((), None, None, KEPT),
    (("*",), 4, None, [8, 9, 10, 11]),
    ((), 0, None, []),
    (("a", "b"), 4, None, [5, 7, 9, 11]),
    (("[bc]",), None, 8, [9, 10, 11]),
    ((), 3, BEGINNING, [3, 4, 5]),
    ((), 3, 4, [5, 6, 7]),
    (("a", "c"), 3, 3, [4, 5, 6]),
    ((), 3, 11, []),
    (("none",), None, 0, []),
    ((), None, FOREIGN, KEPT),
    ((), 2, TO_COME, [3, 4]),
]


def test_the_history_can_be_read(kept: tuple[Bus, list[int]]) -> None:
    """The last messages, or the first behind an id; all of them behind an unknown one. It leaves no subscription."""
    bus, ids = kept
    for topics, limit, after, expected in READ:
        found = bus.history(*topics, limit=limit, after=None if after is None else ids[after])
        assert [(one.message, one.id) for one in found] == [(number, ids[number]) for number in expected]
        assert {one.topic for one in found} == {"a" if number < 6 else "b" if number % 2 else "c" for number in expected}
        assert len(bus.stats().subscribers) == 1


def test_a_history_is_read_page_by_page(transport: Size) -> None:
    """Messages of all sizes: each once, with the limit of a page and the last id of the one before."""
    with start_broadcaster(history=20) as bus:
        for number in range(9):
            bus.publish(transport.message(number), topic=f"{number % 4}")
        found = bus.history(limit=4, after=0)
        while page := bus.history(limit=4, after=found[-1].id):
            found += page
        assert numbers(one.message for one in found) == [*range(9)]
        assert found == bus.history() == [one for one in found if one in bus.history("*")]


def test_very_many_messages_are_read_at_once() -> None:
    """More than a pipe takes, and than is put in one round; they come behind all that the handle has published."""
    with start_broadcaster(history=100_000) as bus:
        for start in range(0, 30_000, 10_000):
            bus.publish_many(range(start, start + 10_000))
            bus.publish("last")
            found = bus.history()
            assert [one.message for one in found if one.message != "last"] == [*range(start + 10_000)]
            assert found[-1].message == "last"
        assert found[20_000:25_000] == bus.history(after=found[19_999].id, limit=5_000)


def test_what_comes_behind_a_publish_waits_for_it() -> None:
    """``history`` and ``subscriber_count`` come behind what this handle has published, also if a full channel holds it back."""
    with start_broadcaster(history=1000) as bus, connect(bus.address) as other:
        full = bus.subscribe("t", capacity=30_000)
        published = fill(bus, topic="t", timeout=0.2)
        calls = [Background(bus.history, "t"), Background(bus.subscriber_count, "t")]
        assert other.subscriber_count("t") == 1
        assert not [one for one in calls if not one.is_alive()]
        take(full, len(published))
        assert [one.message[0] for one in calls[0].result()] == published
        assert calls[1].result() == 1


def test_subscribers_are_counted() -> None:
    """Those that would get what is published to a topic, now."""
    with start_broadcaster() as bus:
        channels = [bus.subscribe(*topics) for topics in ((), ("a",), ("a*",), ("b", "a"))]
        assert [bus.subscriber_count(""), bus.subscriber_count("a"), bus.subscriber_count("ab")] == [1, 4, 2]
        bus.unsubscribe(channels[1])
        channels[2].close()
        assert bus.subscriber_count(topic="a") == 2
        ends = bus.subscribe("c", overflow="disconnect", capacity=1)
        bus.publish_many([b"", b""], topic="c")
        assert bus.subscriber_count("c") == 1
        assert isinstance(receive_all(ends)[1], Overflowed)


def test_resuming_needs_a_history(bus: Bus) -> None:
    """And is another beginning than a replay."""
    with pytest.raises(ValueError, match="after needs a broker that keeps a history"):
        bus.subscribe(after=0)
    with pytest.raises(ValueError, match=r"history\(\) needs a broker that keeps a history"):
        bus.history()
    with pytest.raises(ValueError, match="one of them"):
        bus.subscribe(after=0, replay=1)
