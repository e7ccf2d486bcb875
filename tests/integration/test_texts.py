"""The texts of errors and warnings: each names what is wrong, and what to do."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, BrokerLost, Channel, StartError, TimedOut, connect, start_broadcaster
from tests.support.helpers import DEADLINE, Children, stopped, wait_until
from tests.support.victims import alive

Bus = Broadcaster[Any]


def text_of(kind: type[Exception], function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the text of a call's error, with its notes."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def test_a_publish_that_does_not_wait_does_not_blame_a_subscriber_only(bus: Bus) -> None:
    """With a broker that is merely behind, the text names that as a reason."""
    bus.publish(0)
    with stopped(bus.stats().pid):
        text = ""
        while not text:
            try:
                bus.publish(bytes(1000), timeout=0)
            except TimedOut as error:
                text = str(error)
    assert "or the broker has not read yet what was published before" in text


@pytest.mark.parametrize("opened", [False, True])
def test_a_stall_warning_accuses_the_process_itself_only_of_an_open_channel(
    opened: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker that it was handed on to may still be starting."""
    with start_broadcaster(stall_timeout=0.05) as bus, bus.subscribe("mine", capacity=1000) as channel:
        if opened:
            channel.fileno()
        with contextlib.suppress(TimedOut):
            while True:
                bus.publish(bytes(4000), topic="mine", timeout=0.3)
        warned = wait_until(lambda: capfd.readouterr().err)
    assert ("must receive before it publishes" in warned) == opened
    assert ("never opened" in warned) != opened


def test_a_stall_warning_names_the_topics_of_an_unsubscribed_channel(capfd: pytest.CaptureFixture[str]) -> None:
    """Those that it had, also when what was held back waits for its reader."""
    with start_broadcaster(stall_timeout=0.3) as bus, bus.subscribe("mine", "yours", capacity=1000) as channel:
        channel.fileno()
        with contextlib.suppress(TimedOut):
            while True:
                bus.publish(bytes(4000), topic="mine", timeout=0.05)
        warned = wait_until(lambda: capfd.readouterr().err)
    assert "(mine, yours)" in warned


def open_it(channel: Channel[Any], connection: Connection) -> None:
    """Try to receive; send the error's text."""
    connection.recv()
    try:
        channel.recv(timeout=DEADLINE)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


ENDED = "the broker at '/.*' has ended: start another one, or connect\\(\\) to the one that is there now, and subscribe again"


def test_a_worker_that_opens_a_channel_behind_the_end_hears_that(
    fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """Not that no broker answers, as if the address were wrong."""
    bus = start_broadcaster()
    channel = bus.subscribe()
    children(fork, open_it, channel, pipe[1])
    channel.fileno()
    bus.close()
    pipe[0].send("go")
    assert re.fullmatch(f"BrokerLost: {ENDED}", pipe[0].recv())


def test_a_dead_broker_has_one_text() -> None:
    """From a channel, a publish, a request, and a handle that has never been used."""
    bus = start_broadcaster()
    other: Bus = connect(bus.address)
    channel = other.subscribe()
    channel.fileno()
    other.publish(0)
    bus.publish(1)
    assert [channel.recv(timeout=DEADLINE), channel.recv(timeout=DEADLINE)] in ([0, 1], [1, 0])
    pid = bus.stats().pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    texts = [text_of(BrokerLost, channel.recv, timeout=DEADLINE), text_of(BrokerLost, bus.publish, 1)]
    texts += [text_of(BrokerLost, call) for call in (other.stats, other.subscribe, other.flush, bus.subscribe)]
    bus.close()
    assert len({*texts}) == 1
    assert re.fullmatch(ENDED, texts[0])


def test_an_old_handle_at_a_new_broker_is_told_to_connect_again(tmp_path: Path) -> None:
    """Whether it had been used before or not."""
    address = str(tmp_path / "socket")
    first = start_broadcaster(address=address)
    used: Bus = connect(address)
    used.publish(1)
    unused = pickle.dumps(used)
    first.close()
    with start_broadcaster(address=address):
        assert "connect()" in text_of(BrokerLost, used.stats)
        assert "connect()" in text_of(BrokerLost, pickle.loads(unused).stats)


@pytest.mark.parametrize("topics", [["a"], ("a", "b"), {"a"}], ids=["list", "tuple", "set"])
def test_topics_in_a_list_are_told_to_be_arguments(topics: Any, bus: Bus) -> None:
    """For both ways to subscribe, and to drop topics."""
    with bus.subscribe("b") as channel:
        for function in (bus.subscribe, channel.subscribe, channel.unsubscribe):
            assert "*topics" in text_of(TypeError, function, topics)


def test_unsubscribe_with_a_topic_names_what_does_that(bus: Bus) -> None:
    """A topic is the channel's to drop."""
    assert "channel.unsubscribe" in text_of(TypeError, bus.unsubscribe, "a")


@pytest.mark.parametrize("way", ["publish", "timeout", "many", "large"])
def test_a_message_that_cannot_be_pickled_is_named(way: str, bus: Bus) -> None:
    """The error of its pickling is as it was, with a note: that it is a message, of which type, and its topic."""
    function = lambda: None  # noqa: E731
    message = [bytes(1 << 22), function] if way == "large" else function
    call = bus.publish_many if way == "many" else bus.publish
    options = {"timeout": 1} if way == "timeout" else {}
    text = text_of(Exception, call, [message] if way == "many" else message, topic="room", **options)
    kind = "list" if way == "large" else "function"
    assert "lambda" in text
    assert text.endswith(f"publish() could not pickle this message, a {kind}, for topic 'room': nothing was sent of it")
    assert text.count("publish()") == 1


def test_wait_for_subscribers_counts_those_that_there_are(bus: Bus) -> None:
    """Of the topic, if it was asked for one; a broker that is stopped cannot be asked."""
    with bus.subscribe("a"), bus.subscribe("b"):
        for timeout in (0, 0.05):
            assert text_of(TimedOut, bus.wait_for_subscribers, 3, timeout=timeout).endswith("Now there are 2")
            assert text_of(TimedOut, bus.wait_for_subscribers, 3, topic="a", timeout=timeout).endswith("Now there are 1")
        with stopped(bus.stats().pid):
            assert "Now the broker does not reply" in text_of(TimedOut, bus.wait_for_subscribers, 3, timeout=0.05)


def test_a_bad_log_config_has_its_cause_in_the_text() -> None:
    """``logging.config`` names only the handler, and keeps why as the cause."""
    config = {"version": 1, "handlers": {"mine": {"class": "no.such.Handler"}}}
    text = text_of(StartError, start_broadcaster, log_config=config)
    assert "Unable to configure handler 'mine'" in text
    assert "No module named 'no'" in text


def test_a_pattern_in_publish_is_one_topic(bus: Bus) -> None:
    """It is literal: it reaches who has subscribed to that name, or to a pattern that matches it, and nobody else."""
    with bus.subscribe("room:1") as one, bus.subscribe("room:[*]") as literal:
        bus.publish("hello", topic="room:*")
        assert literal.recv(timeout=DEADLINE) == "hello"
        assert not one.poll(0)
    assert "not a pattern" in (Broadcaster.publish.__doc__ or "")
