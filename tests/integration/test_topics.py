"""Topics from outside, names of subscriptions, and counting subscribers."""

import fnmatch
import logging
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpbroadcast import Broadcaster, ChannelInUse, ClosedError, TimedOut, escape, start_broadcaster
from mpbroadcast.cli.figures import figures, report
from mpbroadcast.cli.prometheus import exposition
from tests.support.helpers import fill, kill_broker, take, wait_until

Bus = Broadcaster[Any]
TEXTS = st.text(st.sampled_from("ab*?[]!-"), max_size=8)


@given(topic=TEXTS, other=TEXTS)
def test_an_escaped_topic_matches_itself_only(topic: str, other: str) -> None:
    """Whatever is in it."""
    assert fnmatch.fnmatchcase(topic, escape(topic))
    assert fnmatch.fnmatchcase(other, escape(topic)) == (other == topic)


def test_only_a_text_can_be_escaped() -> None:
    assert escape("room:1") == "room:1"
    with pytest.raises(TypeError, match="str"):
        escape(b"room")  # type: ignore[arg-type]


def test_a_topic_from_outside(bus: Bus) -> None:
    """Escaped, it is that topic; unescaped, ``sensor[3]`` does not match itself, and ``*`` everything."""
    channels = {topic: bus.subscribe(topic) for topic in (escape("*"), escape("sensor[3]"), "sensor[3]")}
    for topic in ("*", "room", "sensor[3]", "sensor3"):
        bus.publish(topic, topic=topic)
    bus.flush()
    got = []
    for channel in channels.values():
        bus.unsubscribe(channel)
        got.append([*channel])
    assert got == [["*"], ["sensor[3]"], ["sensor3"]]


def test_how_many_subscriptions_there_are(bus: Bus) -> None:
    """Without a topic, all of them, each member of a group counted."""
    assert bus.subscriber_count() == 0
    channels = [bus.subscribe("a"), bus.subscribe("b"), *(bus.subscribe("c", group="g") for _ in range(2))]
    assert [bus.subscriber_count(), bus.subscriber_count("a"), bus.subscriber_count("")] == [4, 1, 0]
    bus.wait_for_subscribers(4, timeout=0)
    for channel in channels:
        channel.close()


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", 5, b"x"])
def test_a_name_that_is_none(name: Any, bus: Bus) -> None:
    """It is refused before anything is subscribed."""
    with pytest.raises((TypeError, ValueError), match="name"):
        bus.subscribe(name=name)
    assert bus.subscriber_count() == 0


def test_a_name_is_shown(bus: Bus) -> None:
    """In stats, in tables, to Prometheus, by the channel, and in its errors; also after it was pickled."""
    with bus.subscribe("t", name="thumb nails"), bus.subscribe("t") as other:
        (row,) = [row for row in bus.stats().subscribers if row.name is not None]
        assert row.name == "thumb nails"
        stats = bus.stats()
        assert any("thumb nails" in line for line in report(figures(stats, None, {}), bus.address, 200))
        assert 'name="thumb nails"' in exposition(stats)
        assert other.id in {row.id for row in stats.subscribers if row.name is None}
    channel = pickle.loads(pickle.dumps(bus.subscribe(name="n" * 64)))
    assert "n" * 64 in repr(channel)
    with pytest.raises(TimedOut, match="n" * 64):
        channel.recv(0)
    with pytest.raises(ChannelInUse, match="n" * 64):
        pickle.dumps(channel)
    channel.close()
    with pytest.raises(ClosedError, match="n" * 64):
        channel.recv(0)


def test_a_name_is_in_the_warning_of_a_stall(tmp_path: Any) -> None:
    """Whoever looks into the log finds the subscription."""
    log = tmp_path / "log"
    handler = {"class": "logging.FileHandler", "filename": str(log)}
    config = {"version": 1, "handlers": {"h": handler}, "root": {"handlers": ["h"], "level": logging.WARNING}}
    with start_broadcaster(stall_timeout=0.05, log_config=config) as bus, bus.subscribe(name="slow one", capacity=1):
        fill(bus)
        wait_until(lambda: "'slow one'" in log.read_text())


@pytest.mark.parametrize("group", [None, "g"])
def test_a_name_outlives_its_broker(group: str | None) -> None:
    """The broker that takes over shows it, too."""
    with start_broadcaster(restart=True) as bus, bus.subscribe(name="kept", group=group):
        kill_broker(bus)
        wait_until(lambda: [row.name for row in bus.stats().subscribers] == ["kept"])


@pytest.mark.parametrize("prefetch", [1, 2])
def test_prefetch_needs_a_group(prefetch: int, bus: Bus) -> None:
    """Without one it would be without effect."""
    with pytest.raises(ValueError, match="group"):
        bus.subscribe(prefetch=prefetch)


def test_to_drop_all_topics_is_to_close(bus: Bus) -> None:
    """The error names the calls that do it."""
    with bus.subscribe() as channel, pytest.raises(ValueError, match=r"channel\.close\(\).*bus\.unsubscribe\(channel\)"):
        channel.unsubscribe()


def test_what_is_unread(bus: Bus) -> None:
    """Of an open channel: all that is in its pipe, and nothing once the last message was handed out."""
    with bus.subscribe() as channel:
        bus.publish(1)
        bus.flush()
        assert [row.unread for row in bus.stats().subscribers] == [0]
        channel.poll(0)
        wait_until(lambda: bus.stats().subscribers[0].unread > 0)
        assert take(channel, 1) == [1]
        assert [row.unread for row in bus.stats().subscribers] == [0]
