"""Bad input: each wrong argument is refused at once, by the right error, and nothing has happened; so is each bad address."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import pickle
import signal
import socket
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

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
from tests.support.helpers import DEADLINE, Children, answer, wait_until
from tests.support.victims import alive

Bus = Broadcaster[Any]
Bad = list[tuple[Any, type[Exception]]]


def wrong_types(*values: Any) -> Bad:
    """Return values each of which is a ``TypeError``."""
    return [(value, TypeError) for value in values]


NAMES: Bad = [(name, ValueError) for name in ("a\0b", "x" * 1025, "\u00e9" * 513, "\ud800")]
TOPICS: Bad = [*wrong_types(5, None, b"room", object()), *NAMES]
TIMES: Bad = [
    *wrong_types("1", True, b"1", [1], 1j),
    *((number, ValueError) for number in (-1, -0.001, math.nan, -math.inf)),
]
COUNTS: Bad = [*wrong_types("1", 1.0, True), (-1, ValueError)]
FLAGS = wrong_types("yes", 1, None)
OBJECTS = wrong_types(5, "x", None, object())
SOME_OBJECT = wrong_types(5, "x", object())
FUNCTIONS = wrong_types(5, None)
KEYS: Bad = [*wrong_types(5, "key"), (b"", ValueError)]
ADDRESSES = wrong_types(5, b"/tmp/x")
LISTS = wrong_types(["a"], ("a", "b"), {"a"})


class Row(NamedTuple):
    """A method, the good arguments, the keyword of the bad one (empty: by position), and what an error's text has."""

    method: str
    good: tuple[Any, ...]
    keyword: str
    bad: Bad
    names: str = ""
    behind: tuple[Any, ...] = ()


ROWS = [
    Row("bus.publish", ("x",), "topic", TOPICS),
    Row("bus.publish", ("x",), "timeout", TIMES),
    Row("bus.publish", ("x",), "exclude", SOME_OBJECT),
    Row("bus.publish", ("x",), "", wrong_types("topic")),
    Row("bus.publish", ("x",), "room", wrong_types("y")),
    Row("bus.publish", (), "topic", wrong_types("room"), "message"),
    Row("bus.publish_many", (["x"],), "topic", TOPICS),
    Row("bus.publish_many", (["x"],), "timeout", TIMES),
    Row("bus.publish_many", (["x"],), "exclude", SOME_OBJECT),
    Row("bus.publish_many", (), "", wrong_types(5, None, len)),
    Row("bus.subscribe", (), "", TOPICS, "topic"),
    Row("bus.subscribe", (), "", LISTS, r"\*topics"),
    Row("bus.subscribe", ("good",), "", TOPICS, "topic"),
    Row("bus.subscribe", (), "overflow", [*wrong_types(5, None), ("drop", ValueError)]),
    Row("bus.subscribe", (), "capacity", [*COUNTS, (0, ValueError)]),
    Row("bus.subscribe", (), "replay", COUNTS),
    Row("bus.subscribe", (), "replay", [(1, ValueError)], "history"),
    Row("bus.subscribe", (), "with_topic", FLAGS),
    Row("bus.unsubscribe", (), "", OBJECTS),
    Row("bus.unsubscribe", (), "", wrong_types("a"), r"channel\.unsubscribe"),
    Row("bus.flush", (), "timeout", TIMES),
    Row("bus.flush", (), "delivered", FLAGS),
    Row("bus.wait_for_subscribers", (), "", COUNTS, "whole number|at least"),
    Row("bus.wait_for_subscribers", (0,), "timeout", TIMES),
    Row("bus.wait_for_subscribers", (0,), "topic", [*wrong_types(5, b"room"), *NAMES]),
    Row("bus.close", (), "timeout", TIMES),
    Row("channel.recv", (), "timeout", TIMES),
    Row("channel.recv_many", (None,), "timeout", TIMES),
    Row("channel.recv_many", (), "limit", COUNTS),
    Row("channel.poll", (), "timeout", TIMES),
    Row("channel.subscribe", (), "", TOPICS, "topic"),
    Row("channel.subscribe", (), "", LISTS, r"\*topics"),
    Row("channel.unsubscribe", (), "", TOPICS, "topic"),
    Row("channel.unsubscribe", (), "", LISTS, r"\*topics"),
    Row("selector.select", (), "", OBJECTS),
    Row("selector.select", (0,), "handler", SOME_OBJECT),
    Row("selector.map", (), "", FUNCTIONS),
    Row("selector.merge", (), "", OBJECTS),
    Row("selector.receive", (), "timeout", TIMES),
    Row("mpbroadcast.subscribe", (), "", OBJECTS, "Broadcaster"),
    Row("mpbroadcast.publish", (), "", OBJECTS, "Broadcaster", ("x",)),
    Row("mpbroadcast.unsubscribe", (), "", OBJECTS, "Broadcaster", (None,)),
    Row("mpbroadcast.channel_to_selector", (), "", OBJECTS),
    Row("mpbroadcast.connect", (), "", [*ADDRESSES, (None, TypeError)], "address"),
    Row("mpbroadcast.connect", ("/tmp/x",), "authkey", KEYS),
    Row("mpbroadcast.start_broadcaster", (), "context", SOME_OBJECT),
    Row("mpbroadcast.start_broadcaster", (), "address", ADDRESSES),
    Row("mpbroadcast.start_broadcaster", (), "authkey", KEYS),
    Row("mpbroadcast.start_broadcaster", (), "start_timeout", TIMES),
    Row("mpbroadcast.start_broadcaster", (), "history", COUNTS),
    Row("mpbroadcast.start_broadcaster", (), "stall_timeout", TIMES),
    Row("mpbroadcast.start_broadcaster", (), "log_config", wrong_types(5, "a string")),
    Row("mpbroadcast.start_broadcaster", (), "restart", wrong_types(1, None)),
]


def test_a_wrong_argument_is_refused_and_nothing_happens(bus: Bus) -> None:
    """Publish, receive, subscribe, close and start nothing; the error's text names the argument."""
    with bus.subscribe("kept") as channel:
        bus.publish("kept", topic="kept")
        before = bus.stats()
        owners = {"bus": bus, "channel": channel, "selector": Selector[Any](), "mpbroadcast": mpbroadcast}
        for row in ROWS:
            owner, _, method = row.method.partition(".")
            for value, error in row.bad:
                arguments, keywords = (row.good, {row.keyword: value}) if row.keyword else ((*row.good, value, *row.behind), {})
                with pytest.raises(error, match=row.names or row.keyword or "."):
                    getattr(owners[owner], method)(*arguments, **keywords)
        after = bus.stats()
        assert after.published == before.published
        assert [row.id for row in after.subscribers] == [row.id for row in before.subscribers]
        bus.publish("again", topic="kept")
        assert [channel.recv(DEADLINE), channel.recv(DEADLINE)] == ["kept", "again"]


def test_topics_at_the_limit(bus: Bus) -> None:
    """A topic of exactly 1,024 bytes works, whatever they are; so does an empty one."""
    for topic in ("x" * 1024, "\u00e9" * 512, "\U0001f600" * 256, "", " ", "\n"):
        with bus.subscribe(topic, with_topic=True) as channel:
            bus.publish("here", topic=topic)
            assert channel.recv(DEADLINE) == (topic, "here")


def test_timeouts_that_are_good(bus: Bus) -> None:
    """Zero, whole numbers, infinity, numbers beyond what a system call takes, and ``None`` are timeouts."""
    with bus.subscribe() as channel:
        for timeout in (0, 0.0, 1, 1e-9, 1e12, 1e300, math.inf, None):
            bus.flush(timeout if timeout and timeout >= 1 else None)
            bus.publish("x", timeout=timeout)
            assert channel.recv(timeout if timeout is None or timeout >= 1 else DEADLINE) == "x"


# ------------------------------------------------------------------------------------------------------ closed, foreign


def test_a_closed_channel_raises_in_every_method(bus: Bus) -> None:
    with bus.subscribe("room") as channel:
        bus.publish_many(range(10), topic="room")
        assert channel.recv(DEADLINE) == 0
        assert not channel.closed
    channel.close()
    assert channel.closed
    assert bus.stats().subscribers == ()
    for call, arguments in (
        *((call, ()) for call in (channel.recv, channel.recv_many, channel.poll, channel.fileno, channel.__next__)),
        *((call, ("room",)) for call in (channel.subscribe, channel.unsubscribe)),
        *((call, (channel,)) for call in (channel_to_selector, pickle.dumps)),
    ):
        with pytest.raises(ClosedError, match="closed") as caught:
            call(*arguments)
        assert caught.value.channel is channel
    bus.unsubscribe(channel)


@pytest.mark.parametrize("attached", [False, True], ids=["starter", "attached"])
def test_a_closed_broadcaster_raises_in_every_method(attached: bool, bus: Bus) -> None:
    channel = bus.subscribe()
    handle = connect(bus.address) if attached else bus
    handle.close()
    handle.close()
    for name, *arguments in (
        *(("publish", "x"), ("publish_many", ["x"]), ("unsubscribe", channel), ("wait_for_subscribers", 0)),
        *(("subscribe",), ("flush",), ("stats",)),
    ):
        with pytest.raises(ClosedError, match="closed"):
            getattr(handle, name)(*arguments)
    channel.close()


def test_a_channel_of_another_broker_is_refused_and_not_harmed(bus: Bus) -> None:
    with start_broadcaster() as other, other.subscribe() as foreign:
        for name, arguments, keywords in (
            ("unsubscribe", (foreign,), {}),
            ("publish", ("x",), {"exclude": foreign}),
            ("publish_many", (["x"],), {"exclude": foreign}),
        ):
            with pytest.raises(ValueError, match=r"broker|broadcaster"):
                getattr(bus, name)(*arguments, **keywords)
        other.publish("for the foreign")
        assert foreign.recv(DEADLINE) == "for the foreign"
    assert bus.stats().published == 0


# ----------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["", "a\0b", "/tmp/" + "x" * 200, "/no/such/folder/socket"])
def test_an_impossible_address(address: str) -> None:
    """Raise from ``connect`` what is an ``OSError`` and a ``ValueError``, and from ``start_broadcaster`` with the cause."""
    with pytest.raises(AddressError, match=r"address|path|folder") as caught:
        connect(address)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(StartError) as failed:
        start_broadcaster(address=address)
    assert isinstance(failed.value.__cause__, OSError)


def test_connect_where_no_broker_is(temporary_folder: Path) -> None:
    """Raise at once, and name the address: where nothing is, the socket of a program that has ended, and a file."""
    path = temporary_folder / "nobody"
    with socket.socket(socket.AF_UNIX) as ended:
        for _ in range(2):
            with pytest.raises(BrokerLost, match="nobody"):
                connect(path)
            if not path.exists():
                ended.bind(str(path))
    path.unlink()
    path.write_text("a file")
    with pytest.raises((BrokerLost, AddressError), match="nobody"):
        connect(path)
    assert path.read_text() == "a file"
    path.unlink()


def test_start_at_the_address_of_a_broker_does_not_disturb_it(bus: Bus) -> None:
    with bus.subscribe() as channel:
        with pytest.raises(StartError, match=bus.address) as caught:
            start_broadcaster(address=bus.address)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno in (errno.EADDRINUSE, errno.EEXIST)
        bus.publish("undisturbed")
        assert channel.recv(DEADLINE) == "undisturbed"
        connect(bus.address).close()


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
    unfinished = temporary_folder / ".mpbroadcast-abc~"
    address = temporary_folder / "chosen"
    monkeypatch.setattr(os, "getpid", lambda: 0xABC)
    unfinished.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        Listening(str(address), "")
    assert unfinished.read_text() == "precious"
    unfinished.unlink()
    with socket.socket(socket.AF_UNIX) as half:
        before = os.umask(0o777)
        half.bind(str(unfinished))
        os.umask(before)
    Listening(str(address), "").remove()
    assert not unfinished.exists()
    assert not address.exists()


def _start_and_wait(address: Path, report: Connection) -> None:
    bus = start_broadcaster(address=address)
    report.send(bus.stats().pid)
    signal.pause()


def test_the_socket_file_of_a_dead_broker_is_taken_over(
    temporary_folder: Path, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection]
) -> None:
    """Also at a chosen address, where starter and broker were killed at once."""
    address = temporary_folder / "chosen"
    starter = children(fork, _start_and_wait, address, pipe[1])
    broker = answer(pipe[0])
    os.kill(broker, signal.SIGSTOP)
    starter.kill()
    os.kill(broker, signal.SIGKILL)
    wait_until(lambda: not alive(broker) and not starter.is_alive())
    assert address.is_socket()
    with start_broadcaster(address=address) as bus, connect(address) as other, bus.subscribe() as channel:
        other.publish("taken over")
        assert channel.recv(DEADLINE) == "taken over"
    assert not address.exists()


def test_a_start_that_takes_too_long_leaves_nothing() -> None:
    with pytest.raises(StartError, match="start_timeout"):
        start_broadcaster(context=multiprocessing.get_context("spawn"), start_timeout=0.001)
