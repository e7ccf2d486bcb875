"""What one session can make the broker hold, and do: each lie is sent as it would be, and costs nobody but its sender."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tracemalloc
from array import array
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpbroadcast import Broadcaster
from mpbroadcast.arguments import MAX_TOPIC
from mpbroadcast.broker.broker import Broker
from mpbroadcast.broker.history import MOST_TOPICS, History
from mpbroadcast.broker.patterns import is_pattern, matcher
from mpbroadcast.wire.frames import Batch, FrameError, Splitter, frame_head, memory_frame, pieces, reference_frame
from mpbroadcast.wire.link import Link
from tests.helpers import DEADLINE, wait_until
from tests.test_fuzz import Lent, asking, own_broker

__all__ = ["own_broker"]


@pytest.mark.parametrize("kind", ["plain", "excluded", "pieces", "reference", "memory"])
def test_no_frame_has_a_longer_topic_than_a_user_can_give(kind: str) -> None:
    """1,024 bytes of topic pass in each kind of frame, and one more does not."""
    made = {
        "plain": lambda topic: frame_head(0, topic),
        "excluded": lambda topic: frame_head(0, topic, 7),
        "pieces": lambda topic: b"".join(pieces(frame_head(5000, topic) + bytes(5000), 1)),
        "reference": lambda topic: reference_frame(1, 0, 100, topic),
        "memory": lambda topic: memory_frame(1, 100, topic),
    }[kind]
    (item,) = Splitter().split(made(b"x" * MAX_TOPIC))
    assert item.topic == b"x" * MAX_TOPIC
    with pytest.raises(FrameError):
        Splitter().split(made(b"x" * (MAX_TOPIC + 1)))


def test_a_topic_that_no_run_can_carry(bus: Broadcaster[Any]) -> None:
    """A topic of 65,530 bytes, in pieces, ends its publisher; others go on."""
    with bus.subscribe() as channel:
        pid = bus.stats().pid
        link = Link(bus.address)
        lent = Lent(link, beside=False)
        for piece in pieces(frame_head(0, b"x" * 65530), 1):
            lent.write(piece)
        wait_until(lambda: bus.stats().publishers == 0)
        bus.publish("another's")
        assert channel.recv(DEADLINE) == "another's"
        assert bus.stats().pid == pid
        lent.close()
        link.close()


def test_an_item_that_cannot_be_routed_costs_its_publisher(own_broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever routing an item raises, its publisher is closed, and others' messages go on."""
    with asking(own_broker) as (_, _, number):
        session = own_broker.sessions[number]
        subscription = own_broker.add_subscription(1 << 40, session, ["topic"], 1 << 16, "drop_oldest")
        bad, bad_pipe = own_broker.traffic.add(own_broker.number(), session)
        _, good_pipe = own_broker.traffic.add(own_broker.number(), session)
        bad.parked.append(Batch(bytes(8), array("I", (8,)), b"topic", 0, 1 << 16))  # its head is longer than a run can tell
        for pipe in (bad_pipe, good_pipe):
            os.write(pipe, frame_head(0, b"topic"))
            os.close(pipe)
        own_broker.traffic.round()
        assert (bad.fd < 0, subscription.outbox.waiting) == (True, 2)
    caplog.clear()  # its traceback keeps the broker


def test_short_pieces_are_kept_together() -> None:
    """A long message that comes in pieces of two bytes takes what it is said to take."""
    splitter = Splitter()
    rest = frame_head(1 << 20, b"")
    piece = next(pieces(rest, 1))
    head = len(piece) - len(rest)
    short = (head + 2).to_bytes(4, "little") + piece[4 : head - 1] + b"\0" + bytes(2)
    tracemalloc.start()
    try:
        for _ in range(100):
            splitter.split(short * 1000)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert splitter.held > 200_000
    assert kept < 2 * splitter.held


# ----------------------------------------------------------------------------------------------------- held up by nobody


class TooManyCalls(Exception):
    """More work than there may be."""


@contextlib.contextmanager
def at_most(calls: int) -> Iterator[None]:
    """What happens within makes no more calls, so that it takes no longer when there is more of what it must not look at."""
    made = itertools.count(1)

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call") and next(made) > calls:
            sys.setprofile(None)
            raise TooManyCalls

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_a_replay_looks_names_up() -> None:
    """A replay of 10,000 names does not try each of them with each of 4,096 topics."""
    history = History(3)
    for number in range(MOST_TOPICS):
        history.add(number, Batch(bytes(8), array("I", (8,)), b"%d" % number, 0, 8))
    names = [str(number) for number in range(10_000)]
    with at_most(100_000):
        found = history.last(names, 2, 1 << 20)
    assert [batch.topic for batch in found] == [b"4094", b"4095"]


@given(
    st.text(alphabet="ab*?[]!-\n", max_size=9).filter(is_pattern),
    st.lists(st.text(alphabet="ab[]*\n", max_size=9), min_size=1, max_size=20),
)
def test_patterns_match_as_in_the_standard_library(pattern: str, topics: list[str]) -> None:
    """Each pattern matches what ``fnmatch.fnmatchcase`` says, also those that are matched without ``re``."""
    for topic in topics:
        assert bool(matcher(pattern).match(topic)) == fnmatchcase(topic, pattern)
