"""Bad input: each wrong argument is refused at once, by the right error, and nothing has happened; so is each bad address."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mpbroadcast
from mpbroadcast import (
    AddressError,
    Broadcaster,
    BrokerLost,
    ClosedError,
    Selector,
    StartError,
    channel_to_selector,
    connect,
    start_broadcaster,
    trap_points,
)
from mpbroadcast.broker.host.socket_file import Listening
from mpbroadcast.testing import drain
from tests.support.helpers import DEADLINE

Bus = Broadcaster[Any]
WRONG: dict[str, Any] = {
    **dict.fromkeys(("topic", "overflow", "exclude", "handler", "log_config", "address", "authkey"), 5),
    **dict.fromkeys(
        ("timeout", "start_timeout", "stall_timeout", "limit", "history", "linger", "capacity", "replay", "after", "context"),
        "1",
    ),
    **dict.fromkeys(("delivered", "with_topic", "with_id", "raw", "restart"), 1),
}
"""One of each keyword: that it is checked. What each check refuses, test_validation has."""
KEYWORDS: list[tuple[str, tuple[Any, ...], str]] = [
    ("bus.publish", ("x",), "topic timeout exclude"),
    ("bus.publish_many", (["x"],), "topic timeout exclude"),
    ("bus.publish_payload", (b"N.",), "topic timeout exclude"),
    ("bus.subscribe", (), "overflow capacity replay after with_topic with_id raw"),
    ("bus.history", (), "limit after"),
    ("bus.subscriber_count", (), "topic"),
    ("bus.flush", (), "timeout delivered"),
    ("bus.wait_for_subscribers", (0,), "timeout topic"),
    ("bus.close", (), "timeout"),
    ("channel.recv", (), "timeout"),
    ("channel.recv_many", (), "limit timeout"),
    ("channel.poll", (), "timeout"),
    ("selector.select", (0,), "handler"),
    ("selector.receive", (), "timeout"),
    ("mpbroadcast.connect", ("/tmp/x",), "authkey"),
    ("mpbroadcast.connect_or_start", ("/tmp/x",), "linger authkey start_timeout history stall_timeout log_config restart"),
    ("mpbroadcast.start_broadcaster", (), "context address authkey start_timeout history stall_timeout log_config restart"),
]
POSITIONS: list[tuple[str, tuple[Any, ...], str]] = [
    *((f"{owner}.subscribe", ("good", 5), "topic") for owner in ("bus", "channel")),
    *((name, (["a"],), r"\*topics") for name in ("bus.subscribe", "channel.subscribe", "channel.unsubscribe")),
    ("bus.unsubscribe", ("a",), r"channel\.unsubscribe"),
    ("bus.wait_for_subscribers", ("1",), "whole number"),
    ("bus.publish", ("x", "topic"), "positional"),
    ("bus.publish", (), "message"),
    ("bus.publish_many", (5,), "iterable"),
    ("bus.publish_payload", ("x",), r"contiguous bytes-like object.* not str: publish\(\) takes"),
    ("bus.publish_payload", (memoryview(b"abcd")[::2],), "contiguous"),
    ("selector.select", (5,), "source"),
    ("selector.map", (5,), "callable"),
    ("selector.merge", (5,), "Selector"),
    ("mpbroadcast.subscribe", (5,), "Broadcaster"),
    ("mpbroadcast.publish", (5, "x"), "Broadcaster"),
    ("mpbroadcast.unsubscribe", (5, 5), "Broadcaster"),
    ("mpbroadcast.channel_to_selector", (5,), "Channel"),
    ("mpbroadcast.connect", (5,), "address"),
]


def wrong_calls() -> Iterator[tuple[type[Exception], str, str, tuple[Any, ...], dict[str, Any]]]:
    """Yield the error of each call, what its text names, the call's name and arguments."""
    yield ValueError, "history", "bus.subscribe", (), {"replay": 1}
    yield ValueError, "topics and patterns", "bus.subscribe", tuple(map(str, range(40_000))), {}
    for name, arguments, names in POSITIONS:
        yield TypeError, names, name, arguments, {}
    for name, good, keywords in KEYWORDS:
        for keyword in keywords.split():
            yield TypeError, keyword, name, good, {keyword: WRONG[keyword]}


def test_a_wrong_argument_is_refused_and_nothing_happens(bus: Bus) -> None:
    """Publish, receive, subscribe, close and start nothing; the error's text names the argument."""
    with bus.subscribe("kept") as channel:
        bus.publish("kept", topic="kept")
        before = bus.stats()
        owners = {"bus": bus, "channel": channel, "selector": Selector[Any](), "mpbroadcast": mpbroadcast}
        for error, names, name, arguments, keywords in wrong_calls():
            owner, _, method = name.partition(".")
            print(name, arguments[:2], keywords)
            with pytest.raises(error, match=names):
                getattr(owners[owner], method)(*arguments, **keywords)
        after = bus.stats()
        assert after.published == before.published
        assert [row.id for row in after.subscribers] == [row.id for row in before.subscribers]
        bus.publish("again", topic="kept")
        assert [channel.recv(DEADLINE), channel.recv(DEADLINE)] == ["kept", "again"]


def test_what_is_closed_raises_in_every_method(bus: Bus) -> None:
    """A channel, which has ended its subscription, a handle that has only detached, and that of the starter."""
    channel, other = bus.subscribe("room"), connect(bus.address)
    bus.publish_many(range(10), topic="room")
    assert channel.recv(DEADLINE) == 0
    assert not channel.closed
    channel.close()
    assert channel.closed
    assert bus.stats().subscribers == ()
    bus.unsubscribe(channel)
    calls: list[tuple[Callable[..., Any], Any]] = [(call, channel) for call in (channel_to_selector, pickle.dumps)]
    calls += [(getattr(channel, name), "room") for name in ("subscribe", "unsubscribe")]
    calls += [(getattr(channel, name), None) for name in ("recv", "recv_many", "poll", "fileno", "__next__")]
    for call, argument in calls:
        with pytest.raises(ClosedError, match="closed") as caught:
            call(*(() if argument is None else (argument,)))
        assert caught.value.channel is channel
    for handle in (other, bus):
        handle.close()
        handle.close()
        for name, *arguments in (
            *(
                ("publish", "x"),
                ("publish_many", ["x"]),
                ("publish_payload", b"N."),
                ("unsubscribe", channel),
                ("wait_for_subscribers", 0),
            ),
            *(("subscribe",), ("flush",), ("stats",)),
        ):
            with pytest.raises(ClosedError, match="closed"):
                getattr(handle, name)(*arguments)


def test_a_channel_of_another_broker_is_refused_and_neither_is_harmed(bus: Bus) -> None:
    """Broadcasters live side by side: none gets another's messages."""
    channel = bus.subscribe()
    with start_broadcaster() as other, other.subscribe() as foreign:
        for name, argument, keywords in (("unsubscribe", foreign, {}), ("publish", "x", {"exclude": foreign})):
            with pytest.raises(ValueError, match=r"broker|broadcaster"):
                getattr(bus, name)(argument, **keywords)
        other.publish("for the foreign")
        bus.publish("here")
        assert drain(other, foreign) == ["for the foreign"]
    assert drain(bus, channel) == ["here"]


@pytest.mark.parametrize("address", ["", "a\0b", "/tmp/" + "x" * 200])
def test_an_impossible_address(address: str) -> None:
    """Raise from ``connect`` what is an ``OSError`` and a ``ValueError``, and from ``start_broadcaster`` with the cause."""
    with pytest.raises(AddressError, match=r"address|path|folder") as caught:
        connect(address)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(StartError) as failed:
        start_broadcaster(address=address)
    assert isinstance(failed.value.__cause__, OSError)


@pytest.mark.parametrize("path", ["/no/such/folder/socket", "/etc/passwd/socket", "/tmp/no-such-socket"])
def test_an_address_without_a_broker(path: str) -> None:
    """One error, whether its folder is there or not, and a text that has what to do. No broker starts without a folder."""
    with pytest.raises(BrokerLost, match=f"no broker answers at '{path}'.*: start one, or connect to"):
        connect(path)
    if not Path(path).parent.is_dir():
        with pytest.raises(StartError) as failed:
            start_broadcaster(address=path)
        assert isinstance(failed.value.__cause__, OSError)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "socket", "listening socket"])
def test_start_where_something_else_is(kind: str, temporary_folder: Path) -> None:
    """Remove nothing of another program, also a socket that refuses as that of a dead broker does, and listens later."""
    path, target = temporary_folder / "precious", temporary_folder / "target"
    target.write_text("precious")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        if kind == "file":
            path.write_text("precious")
        elif kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(target)
        else:
            server.bind(str(path))
            path.chmod(0o600)
            if kind == "listening socket":
                server.listen()
        with pytest.raises(StartError, match="no broker.*precious|precious.*no broker" if kind == "socket" else "precious"):
            start_broadcaster(address=path)
        if kind != "listening socket":
            with pytest.raises(BrokerLost, match="precious"):
                connect(path)
        if kind == "folder":
            path.rmdir()
        elif kind in ("file", "link"):
            assert path.read_text() == "precious"
        else:
            server.listen()
            client.connect(str(path))
    path.unlink(missing_ok=True)
    target.unlink()


def test_what_appears_at_the_address_during_the_start_stays(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = temporary_folder / "late"

    def reach(name: str, subject: object = None) -> None:
        if name == "naming the socket":
            address.write_text("precious")

    monkeypatch.setattr(trap_points, "reach", reach)
    with pytest.raises(StartError, match="late"):
        start_broadcaster(context=multiprocessing.get_context("fork"), address=address)
    assert address.read_text() == "precious"
    address.unlink()
    assert not [path for path in temporary_folder.iterdir() if "~" in path.name]


def test_what_is_beside_the_address(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the names that a socket has until it listens, remove what a killed broker has left, and nothing else."""
    unfinished, address = temporary_folder / ".mpbroadcast-abc~", temporary_folder / "chosen"
    monkeypatch.setattr(os, "getpid", lambda: 0xABC)
    unfinished.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        Listening(str(address), "")
    assert unfinished.read_text() == "precious"
    unfinished.unlink()
    with socket.socket(socket.AF_UNIX) as half:
        half.bind(str(unfinished))
        unfinished.chmod(0)
    Listening(str(address), "").remove()
    assert not unfinished.exists()
    assert not address.exists()


def test_a_start_that_takes_too_long_leaves_nothing() -> None:
    with pytest.raises(StartError, match="start_timeout"):
        start_broadcaster(context=multiprocessing.get_context("spawn"), start_timeout=0.001)
