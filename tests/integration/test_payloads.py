"""Payloads: messages as bytes, received with ``raw=True`` and published again, neither pickled nor unpickled."""

import asyncio
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel, Lagged, Overflowed, Received, Selector, start_broadcaster, subscribe
from mpbroadcast.testing import drain
from tests.support.helpers import DEADLINE, take
from tests.support.large_workers import SIZES, Size, numbers

Bus = Broadcaster[Any]


def events(bus: Bus, channel: Channel[Any]) -> list[Any]:
    """End the subscription, and return all that it was given: messages, and errors as their text."""
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    found: list[Any] = []
    while True:
        try:
            found.append(channel.recv(DEADLINE))
        except (Lagged, Overflowed) as error:
            found.append(str(error))
        except EOFError:
            return found


@pytest.fixture
def other() -> Iterator[Bus]:
    """The bus of another machine."""
    with start_broadcaster(history=10) as bus:
        yield bus


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_payload_is_a_pickle_and_arrives_elsewhere_as_its_message(size: Size, bus: Bus, other: Bus) -> None:
    """It has exactly the message's bytes, one by one and many at once; its buffers are out of band again on the other bus."""
    single, many, there, there_raw = (
        bus.subscribe(raw=True),
        bus.subscribe(raw=True),
        other.subscribe(),
        other.subscribe(raw=True),
    )
    payloads: list[bytes] = []
    for number in range(9):
        bus.publish(size.message(number), topic="" if number % 4 else "t")
        payloads.append(single.recv(DEADLINE))
    assert take(many, 9) == payloads
    assert {type(payload) for payload in payloads} == {bytes}
    assert numbers(map(pickle.loads, payloads)) == [*range(9)]
    if size.buffer:
        assert b"load_image" in payloads[0][:64]  # by which pickle finds the buffers
    else:
        assert payloads[0] == pickle.dumps(size.message(0), 5)
    for payload, kind in zip(payloads, [bytes, bytearray, memoryview] * 3, strict=True):
        other.publish_payload(kind(payload))
    messages = take(there, 9)
    assert numbers(messages) == [*range(9)]
    assert {type(message[1]) for message in messages} == {memoryview if size.buffer else bytes}
    assert take(there_raw, 9) == payloads


def test_raw_channels_are_channels(other: Bus) -> None:
    """With topics, ids, a replay, in a group, handed on, and through a selector."""
    ids = other.subscribe(raw=True, with_id=True)
    pairs = subscribe(other, "a", raw=True, with_topic=True)
    member = other.subscribe(group="g", raw=True, prefetch=3)
    handed_on = other.subscribe(raw=True)
    plain = other.subscribe()
    for topic in ("a", "b"):
        other.publish_payload(pickle.dumps(topic.upper(), 5), topic=topic, exclude=plain)
    a, b = (pickle.dumps(text, 5) for text in "AB")
    received = take(ids, 2)
    assert received == [Received(received[0].id, "a", a), Received(received[1].id, "b", b)]
    assert drain(other, pairs) == [("a", a)]
    assert drain(other, member) == [a, b]
    assert drain(other, plain) == []
    assert drain(other, other.subscribe(replay=1, raw=True)) == [b]
    assert drain(other, other.subscribe(after=received[0].id, raw=True, with_topic=True)) == [("b", b)]
    assert drain(other, pickle.loads(pickle.dumps(handed_on))) == [a, b]
    assert Selector[bytes]().select(other.subscribe(replay=1, raw=True)).map(pickle.loads).receive(DEADLINE) == "B"


def test_payloads_in_tasks(bus: Bus) -> None:
    """Of asyncio: published, received, and iterated over."""

    async def there_and_back() -> list[Any]:
        channel = await bus.asubscribe("t", raw=True, with_topic=True)
        await bus.apublish_payload(pickle.dumps("one", 5), topic="t")
        await bus.apublish_payload(memoryview(pickle.dumps("x" * 10_000, 5)), topic="t", timeout=DEADLINE)
        await bus.apublish("three", topic="t")
        found = [await channel.arecv(DEADLINE), *await channel.arecv_many(1, DEADLINE)]
        async for item in channel:
            return [*found, item]
        return []

    found = asyncio.run(there_and_back())
    assert [(topic, pickle.loads(payload)) for topic, payload in found] == [("t", "one"), ("t", "x" * 10_000), ("t", "three")]


def test_gaps_come_where_they_would(bus: Bus) -> None:
    """Under each policy: a raw channel receives the payloads of what another one receives, and the same errors."""
    pairs: list[tuple[Channel[Any], Channel[bytes]]] = []
    for overflow in ("drop_oldest", "drop_newest", "latest", "disconnect"):
        pairs.append(
            (bus.subscribe(overflow=overflow, capacity=3000), bus.subscribe(overflow=overflow, capacity=3000, raw=True))
        )
    pairs.append((bus.subscribe(), bus.subscribe(raw=True)))
    for number in range(20):
        bus.publish(Size(500).message(number))
    for plain, raw in pairs:
        expected = events(bus, plain)
        assert len(expected) > 1 or plain.missed == 19
        assert [pickle.loads(one) if isinstance(one, bytes) else one for one in events(bus, raw)] == expected
        assert raw.missed == plain.missed


def test_nothing_of_a_payload_is_looked_at(bus: Bus) -> None:
    """What cannot be pickled comes as it was sent, and is an error only for a channel that unpickles: that goes on."""
    raw, plain = bus.subscribe(raw=True), bus.subscribe()
    bad = [b"no pickle", b"cno_such_module\nx\n.", bytes(3000), bytes(100_000)]
    for payload in bad:
        bus.publish_payload(payload)
    bus.publish("good")
    assert take(raw, 5) == [*bad, pickle.dumps("good", 5)]
    for _ in bad:
        with pytest.raises((pickle.UnpicklingError, ModuleNotFoundError)):
            plain.recv(DEADLINE)
    assert plain.recv(DEADLINE) == "good"
