# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportUnusedFunction=false
"""Right and wrong uses of the interface, for type checkers: each line that must be an error has an ``ignore``, no other has.
Nothing here is run. A checker that reports unused ``ignore`` comments, as strict mypy does, finds both kinds of mistakes."""

import asyncio
from multiprocessing import Pipe, Process
from typing import Any, assert_type

import mpbroadcast
from mpbroadcast import (
    Broadcaster,
    BrokerRestarted,
    BrokerStats,
    Channel,
    GroupStats,
    Lagged,
    Received,
    Selector,
    aconnect,
    aconnect_or_start,
    channel_to_selector,
    connect,
    connect_or_start,
    start_broadcaster,
)
from mpbroadcast.testing import drain, handled, settle


def right(bus: Broadcaster[int], with_topic: bool, process: Process) -> None:
    """What must be accepted, and as what."""
    assert_type(start_broadcaster(), Broadcaster[Any])
    assert_type(connect("address"), Broadcaster[Any])
    assert_type(connect(), Broadcaster[Any])
    assert_type(drain(bus, bus.subscribe(with_topic=True)), list[tuple[str, int]])
    settle(bus, timeout=None)
    handled(bus, 1)
    assert_type(connect_or_start("name", linger=None, history=3, restart=True, log_config={}), Broadcaster[Any])
    strings: Broadcaster[str] = start_broadcaster(history=3)
    strings.publish("text", topic="t")

    channel = bus.subscribe("room", overflow="latest")
    pairs = bus.subscribe("room:*", with_topic=True)
    assert_type(channel, Channel[int])
    assert_type(bus.subscribe(with_topic=False), Channel[int])
    assert_type(pairs, Channel[tuple[str, int]])
    assert_type(bus.subscribe(with_topic=with_topic), Channel[int] | Channel[tuple[str, int]])
    assert_type(mpbroadcast.subscribe(bus, "room", overflow="disconnect", capacity=9, replay=1), Channel[int])
    assert_type(mpbroadcast.subscribe(bus, with_topic=True), Channel[tuple[str, int]])

    assert_type(bus.subscribe("jobs", group="workers", prefetch=3, with_topic=True), Channel[tuple[str, int]])
    assert_type(mpbroadcast.subscribe(bus, "jobs", group=None), Channel[int])
    assert_type(bus.subscribe(mpbroadcast.escape("a*"), name="thumbnails"), Channel[int])
    assert_type(bus.subscriber_count(), int)
    assert_type(bus.stats().subscribers[0].name, str | None)
    assert_type(bus.stats().groups["workers"], GroupStats)
    with_id = bus.subscribe("room:*", with_id=True, overflow="drop_oldest")
    assert_type(with_id, Channel[Received[int]])
    assert_type(bus.subscribe(with_topic=with_topic, with_id=True), Channel[Received[int]])
    assert_type(bus.subscribe(with_topic=True, with_id=False), Channel[tuple[str, int]])
    assert_type(bus.subscribe(with_id=with_topic), Channel[int] | Channel[tuple[str, int]] | Channel[Received[int]])
    assert_type(mpbroadcast.subscribe(bus, with_id=True), Channel[Received[int]])
    payloads = bus.subscribe("room", raw=True, overflow="latest")
    assert_type(payloads, Channel[bytes])
    assert_type(bus.subscribe(raw=False, with_topic=True), Channel[tuple[str, int]])
    assert_type(mpbroadcast.subscribe(bus, raw=True, with_topic=True), Channel[tuple[str, bytes]])
    assert_type(bus.subscribe(raw=True, with_id=True), Channel[Received[bytes]])
    assert_type(bus.subscribe(raw=with_topic), Channel[Any])
    bus.publish_payload(payloads.recv(), topic="room", exclude=payloads, timeout=1.5)
    for received in with_id:
        assert_type(received, Received[int])
        assert_type((received.id, received.topic, received.message), tuple[int, str, int])

    for number in channel.messages("skip"):
        assert_type(number, int)
    assert_type(next(channel.messages(on_gap="yield")), int | Lagged | BrokerRestarted)
    assert_type(next(pairs.messages(on_gap=lambda gap: print(gap.channel))), tuple[str, int])
    assert_type(bus.history("room:*", limit=3, after=with_id.recv().id), list[Received[int]])
    assert_type(bus.subscriber_count("room"), int)
    assert_type(channel.recv(), int)
    assert_type(pairs.recv(timeout=1), tuple[str, int])
    assert_type(channel.recv_many(limit=3), list[int])
    for topic, number in pairs:
        assert_type((topic, number), tuple[str, int])

    bus.publish(3, topic="room", exclude=pairs, timeout=1.5)
    mpbroadcast.publish(bus, 3, topic="room", exclude=channel, timeout=None)
    assert_type(bus.publish_many([1, 2], exclude=pairs), int)
    bus.unsubscribe(pairs)
    mpbroadcast.unsubscribe(bus, channel)

    assert_type(channel_to_selector(channel), Selector[int])
    assert_type(channel_to_selector(pairs).receive(), tuple[str, int])
    selector = Selector()
    selector.select(channel).select(process, lambda ended: ended.exitcode).select(Pipe()[0])
    assert_type(selector.receive(), Any)
    assert_type(channel_to_selector(channel).map(str).receive(timeout=0), str)
    numbers = Selector[int]().select(channel)
    assert_type(numbers.receive(), int)


async def right_in_tasks(bus: Broadcaster[int], with_topic: bool) -> None:
    """The same for tasks."""
    channel = await bus.asubscribe("room", overflow="latest", capacity=9, replay=1, group="g", prefetch=2)
    pairs = await bus.asubscribe("room:*", with_topic=True)
    assert_type(channel, Channel[int])
    assert_type(pairs, Channel[tuple[str, int]])
    assert_type(await bus.asubscribe(with_id=True), Channel[Received[int]])
    assert_type(await bus.asubscribe(with_topic=with_topic), Channel[int] | Channel[tuple[str, int]])
    assert_type(await bus.apublish_many([1, 2], exclude=pairs, topic="room", timeout=1.5), int)
    await bus.apublish(3, topic="room", exclude=pairs, timeout=None)
    await bus.apublish_payload(memoryview(b"N."), topic="room", exclude=pairs, timeout=None)
    assert_type(await bus.asubscribe(raw=True), Channel[bytes])
    assert_type(await channel.arecv(), int)
    assert_type(await pairs.arecv_many(limit=3, timeout=1), list[tuple[str, int]])
    assert_type(await bus.astats(), BrokerStats)
    await bus.aflush(timeout=3, delivered=True)
    await bus.await_for_subscribers(3, topic="room", timeout=1)
    await bus.aunsubscribe(channel)
    async with bus as same_bus, channel as same_channel:
        assert_type(same_bus, Broadcaster[int])
        assert_type(same_channel, Channel[int])
    async for topic, number in pairs:
        assert_type((topic, number), tuple[str, int])
    async for item in channel_to_selector(channel).map(str):
        assert_type(item, str)
    for other in channel_to_selector(pairs):
        assert_type(other, tuple[str, int])
    async with bus.asubscribe("room") as entered, bus.asubscribe(with_topic=True) as entered_pairs:
        assert_type(entered, Channel[int])
        assert_type(entered_pairs, Channel[tuple[str, int]])
    async with aconnect("name", authkey=b"key") as handle, await bus.asubscribe(with_id=True) as with_ids:
        assert_type(handle, Broadcaster[Any])
        assert_type(with_ids, Channel[Received[int]])
    assert_type(await aconnect(), Broadcaster[Any])
    async with aconnect_or_start("name", linger=None, history=10) as started:
        assert_type(started, Broadcaster[Any])
    assert_type(await asyncio.create_task(bus.asubscribe("room")), Channel[int])
    assert_type(await asyncio.wait_for(bus.asubscribe(raw=True), 3), Channel[bytes])
    await channel.asubscribe("a", "b")
    await channel.aunsubscribe("a")
    assert_type(await channel_to_selector(pairs).areceive(timeout=1), tuple[str, int])
    await channel.aclose()
    await bus.aclose(timeout=1)


async def wrong_in_tasks(bus: Broadcaster[int], channel: Channel[int]) -> None:
    """What must not be accepted."""
    await bus.apublish("text")  # type: ignore[arg-type]
    await bus.apublish_many(["text"])  # type: ignore[list-item]
    await bus.asubscribe(overflow="drop")  # type: ignore[call-overload]
    await bus.asubscribe(3)  # type: ignore[call-overload]
    await bus.aunsubscribe("room")  # type: ignore[arg-type]
    await channel.arecv(timeout="1")  # type: ignore[arg-type]
    _: str = await channel.arecv()  # type: ignore[assignment]


def wrong(bus: Broadcaster[int], channel: Channel[int]) -> None:
    """What must not be accepted."""
    bus.publish("text")  # type: ignore[arg-type]
    bus.publish(1, "room")  # type: ignore[call-arg]
    bus.publish_payload("text")  # type: ignore[arg-type]
    bus.subscribe(3)  # type: ignore[call-overload]
    bus.subscribe("jobs", group=3)  # type: ignore[call-overload]
    bus.subscribe(["room"])  # type: ignore[call-overload]
    bus.subscribe(overflow="drop")  # type: ignore[call-overload]
    bus.subscribe(with_id=1)  # type: ignore[call-overload]
    bus.subscribe(overflow="drop", with_id=True)  # type: ignore[call-overload]
    bus.subscribe(capacity="1 MB")  # type: ignore[call-overload]
    channel.messages("drop")  # type: ignore[call-overload]
    bus.history(limit="3")  # type: ignore[arg-type]
    bus.history(["room"])  # type: ignore[arg-type]
    bus.unsubscribe("room")  # type: ignore[arg-type]
    mpbroadcast.publish(bus, "text")  # type: ignore[misc]
    mpbroadcast.publish(bus, 1, to="room")  # type: ignore[call-arg]
    mpbroadcast.subscribe(bus, overflow="drop")  # type: ignore[call-overload]
    mpbroadcast.subscribe(bus, with_topics=True)  # type: ignore[call-overload]
    mpbroadcast.unsubscribe(bus, "room")  # type: ignore[arg-type]
    start_broadcaster(context="spawn")  # type: ignore[arg-type]
    connect_or_start("name", history="1")  # type: ignore[arg-type]
    connect_or_start("name", context=None)  # type: ignore[call-arg]
    drain(channel, bus)  # type: ignore[arg-type]
    settle(channel)  # type: ignore[arg-type]
    channel_to_selector(bus)  # type: ignore[arg-type]
    channel.recv(timeout="1")  # type: ignore[arg-type]
    _: str = channel.recv()  # type: ignore[assignment]
