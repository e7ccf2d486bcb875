"""Bad input: every wrong argument is refused at once, by the right error, and nothing has happened."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import pickle
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import mpbroadcast
from mpbroadcast import (
    AddressError,
    Broadcaster,
    BroadcastError,
    BrokerLost,
    Channel,
    ClosedError,
    Selector,
    StartError,
    channel_to_selector,
    connect,
    publish,
    start_broadcaster,
    subscribe,
    trap_points,
    unsubscribe,
)
from mpbroadcast.broker.host.socket_file import Listening
from tests.support.helpers import DEADLINE, take, wait_until
from tests.support.victims import Explodes, Program, alive

NAN = math.nan
BAD_TOPICS: list[tuple[Any, type[Exception]]] = [
    (5, TypeError),
    (None, TypeError),
    (b"room", TypeError),
    (["room"], TypeError),
    ("a\0b", ValueError),
    ("x" * 1025, ValueError),
    ("\u00e9" * 513, ValueError),
    ("\ud800", ValueError),
]
BAD_TIMEOUTS: list[tuple[Any, type[Exception]]] = [
    ("1", TypeError),
    (True, TypeError),
    (b"1", TypeError),
    ([1], TypeError),
    (1j, TypeError),
    (-1, ValueError),
    (-0.001, ValueError),
    (NAN, ValueError),
    (-math.inf, ValueError),
]
BAD_COUNTS: list[tuple[Any, type[Exception]]] = [("1", TypeError), (1.0, TypeError), (True, TypeError), (-1, ValueError)]


def outcome(call: Callable[..., Any], value: Any) -> Any:
    """What ``call(value)`` raises or returns."""
    try:
        return call(value)
    except Exception as error:
        return error


def refused(call: Callable[..., Any], bad: Sequence[tuple[Any, type[Exception]]], *, names: str = "") -> None:
    """``call`` refuses each value with its error, whose text names what is wrong."""
    for value, error in bad:
        caught = outcome(call, value)
        assert isinstance(caught, error), f"{value!r} gave {caught!r} instead of {error.__name__}"
        assert names in str(caught), f"{value!r}: {caught!r} does not name {names!r}"
        assert str(caught), f"{value!r} raised an error without text"


@pytest.fixture
def channel(bus: Broadcaster[Any]) -> Iterator[Channel[Any]]:
    """A channel, unopened."""
    with bus.subscribe() as made:
        yield made


@pytest.fixture
def unharmed(bus: Broadcaster[Any]) -> Iterator[None]:
    """After all that was refused, the broadcaster works, and has published nothing of it."""
    before = bus.stats()
    yield
    after = bus.stats()
    assert after.published == before.published
    assert [subscriber.id for subscriber in after.subscribers] == [subscriber.id for subscriber in before.subscribers]
    with bus.subscribe("unharmed") as check:
        bus.publish("still works", topic="unharmed")
        assert check.recv(DEADLINE) == "still works"


# --------------------------------------------------------------------------------------------------------- Broadcaster


def test_publish_refuses(bus: Broadcaster[Any], channel: Channel[Any], unharmed: None) -> None:
    """``publish`` checks topic, timeout and exclude, and then has sent nothing."""
    refused(lambda value: bus.publish("x", topic=value), BAD_TOPICS, names="topic")
    refused(lambda value: bus.publish("x", timeout=value), BAD_TIMEOUTS, names="timeout")
    refused(
        lambda value: bus.publish("x", exclude=value),
        [(5, TypeError), ("x", TypeError), (bus, TypeError)],
        names="exclude",
    )
    publish_anyhow: Any = bus.publish
    for arguments, keywords in (((), {}), (("x", "topic"), {}), (("x",), {"room": "y"})):
        with pytest.raises(TypeError):
            publish_anyhow(*arguments, **keywords)
    assert not channel.poll(0)


def test_publish_many_refuses(bus: Broadcaster[Any], channel: Channel[Any], unharmed: None) -> None:
    """``publish_many`` checks the same, and that it was given something to go through."""
    refused(bus.publish_many, [(5, TypeError), (None, TypeError), (len, TypeError)])
    refused(lambda value: bus.publish_many(["x"], topic=value), BAD_TOPICS, names="topic")
    refused(lambda value: bus.publish_many(["x"], timeout=value), BAD_TIMEOUTS, names="timeout")
    refused(lambda value: bus.publish_many(["x"], exclude=value), [(5, TypeError), ("x", TypeError)], names="exclude")
    assert not channel.poll(0)


def test_subscribe_refuses(bus: Broadcaster[Any], unharmed: None) -> None:
    """``subscribe`` checks each topic and each option, and then has subscribed nothing."""
    refused(bus.subscribe, BAD_TOPICS, names="topic")
    refused(lambda value: bus.subscribe("good", value), BAD_TOPICS, names="topic")
    refused(
        lambda value: bus.subscribe(overflow=value),
        [(5, TypeError), (None, TypeError), ("drop", ValueError)],
        names="overflow",
    )
    refused(lambda value: bus.subscribe(capacity=value), [*BAD_COUNTS, (0, ValueError)], names="capacity")
    refused(lambda value: bus.subscribe(replay=value), BAD_COUNTS, names="replay")
    refused(lambda value: bus.subscribe(replay=value), [(1, ValueError)], names="history")
    refused(
        lambda value: bus.subscribe(with_topic=value),
        [("yes", TypeError), (1, TypeError), (None, TypeError)],
        names="with_topic",
    )


def test_the_other_methods_refuse(bus: Broadcaster[Any], unharmed: None) -> None:
    """``unsubscribe``, ``flush``, ``wait_for_subscribers`` and ``close`` check theirs; no refused ``close`` closes."""
    refused(bus.unsubscribe, [(5, TypeError), ("x", TypeError), (None, TypeError), (bus, TypeError)])
    refused(bus.flush, BAD_TIMEOUTS, names="timeout")
    refused(lambda value: bus.flush(delivered=value), [("yes", TypeError), (None, TypeError)], names="delivered")
    refused(bus.wait_for_subscribers, BAD_COUNTS)
    refused(lambda value: bus.wait_for_subscribers(0, timeout=value), BAD_TIMEOUTS, names="timeout")
    topics = [(value, error) for value, error in BAD_TOPICS if value is not None]
    refused(lambda value: bus.wait_for_subscribers(0, topic=value), topics, names="topic")
    refused(bus.close, BAD_TIMEOUTS, names="timeout")


def test_the_functions_refuse(bus: Broadcaster[Any], unharmed: None) -> None:
    """The functions need a broadcaster, a channel, as their methods do."""
    for value in (5, None, "x", object()):
        for call in (
            lambda value=value: subscribe(value),
            lambda value=value: publish(value, "x"),
            lambda value=value: unsubscribe(value, value),
            lambda value=value: unsubscribe(bus, value),
            lambda value=value: channel_to_selector(value),
        ):
            with pytest.raises(TypeError):
                call()


def test_topics_at_the_limit(bus: Broadcaster[Any]) -> None:
    """A topic of exactly 1,024 bytes works, whatever they are; so does an empty one."""
    for topic in ("x" * 1024, "\u00e9" * 512, "\U0001f600" * 256, "", " ", "\n"):
        with bus.subscribe(topic, with_topic=True) as channel:
            bus.publish("here", topic=topic)
            assert channel.recv(DEADLINE) == (topic, "here")


def test_timeouts_that_are_good(bus: Broadcaster[Any], channel: Channel[Any]) -> None:
    """Zero, whole numbers, infinity, numbers beyond what a system call takes, and ``None`` are timeouts."""
    for timeout in (0, 0.0, 1, 1e-9, 1e12, 1e300, math.inf, None):
        bus.flush(timeout if timeout and timeout >= 1 else None)
        bus.publish("x", timeout=timeout)
        assert channel.recv(timeout if timeout is None or timeout >= 1 else DEADLINE) == "x"


# ------------------------------------------------------------------------------------------------------------- Channel


def test_a_channel_refuses(bus: Broadcaster[Any], channel: Channel[Any]) -> None:
    """Each method of a channel checks its arguments, and then has taken no message."""
    with bus.subscribe("kept") as kept:
        bus.publish("kept", topic="kept")
        refused(kept.recv, BAD_TIMEOUTS, names="timeout")
        refused(lambda value: kept.recv_many(None, value), BAD_TIMEOUTS, names="timeout")
        refused(kept.recv_many, BAD_COUNTS, names="limit")
        refused(kept.poll, BAD_TIMEOUTS, names="timeout")
        refused(kept.subscribe, BAD_TOPICS, names="topic")
        refused(kept.unsubscribe, BAD_TOPICS, names="topic")
        assert kept.recv(DEADLINE) == "kept"
        bus.publish("again", topic="kept")
        assert kept.recv(DEADLINE) == "again"
    # the message "kept" and "again" went to the other channel too
    assert take(channel, 2) == ["kept", "again"]


def test_a_selector_refuses(channel: Channel[Any]) -> None:
    """A selector takes what can be waited for and callable handlers, and nothing else."""
    selector = Selector[Any]()
    refused(selector.select, [(5, TypeError), (None, TypeError), ("x", TypeError), (object(), TypeError)])
    refused(lambda value: selector.select(channel, value), [(5, TypeError), ("x", TypeError)])
    refused(selector.map, [(5, TypeError), (None, TypeError)])
    refused(selector.merge, [(5, TypeError), (None, TypeError), (channel, TypeError)])
    refused(selector.receive, BAD_TIMEOUTS, names="timeout")


# ------------------------------------------------------------------------------------------------------ closed, foreign


def test_a_closed_channel(bus: Broadcaster[Any]) -> None:
    """Every method of a closed channel raises ``ClosedError`` that carries it; closing it again is nothing."""
    channel = bus.subscribe("room")
    bus.publish_many(range(10), topic="room")
    assert channel.recv(DEADLINE) == 0
    assert channel.closed is False
    channel.close()
    channel.close()
    assert channel.closed is True
    assert bus.stats().subscribers == ()
    for call in (
        channel.recv,
        channel.recv_many,
        channel.poll,
        channel.fileno,
        lambda: channel.recv(timeout=0),
        lambda: channel.subscribe("other"),
        lambda: channel.unsubscribe("room"),
        lambda: next(iter(channel)),
        lambda: channel_to_selector(channel),
        lambda: pickle.dumps(channel),
    ):
        with pytest.raises(ClosedError) as caught:
            call()
        assert caught.value.channel is channel
        assert "closed" in str(caught.value)
    bus.unsubscribe(channel)


@pytest.mark.parametrize("attached", [False, True], ids=["starter", "attached"])
def test_a_closed_broadcaster(attached: bool, bus: Broadcaster[Any]) -> None:
    """Every method of a closed broadcaster raises ``ClosedError``; closing it again is nothing."""
    channel = bus.subscribe()
    handle = connect(bus.address) if attached else bus
    handle.close()
    handle.close()
    for call in (
        lambda: handle.publish("x"),
        lambda: handle.publish_many(["x"]),
        handle.subscribe,
        lambda: handle.unsubscribe(channel),
        handle.flush,
        lambda: handle.wait_for_subscribers(0),
        handle.stats,
    ):
        with pytest.raises(ClosedError) as caught:
            call()
        assert "closed" in str(caught.value)
    channel.close()


def test_a_foreign_channel(bus: Broadcaster[Any], channel: Channel[Any], unharmed: None) -> None:
    """A channel of another broker is refused, and neither channel is harmed."""
    with start_broadcaster() as other, other.subscribe() as foreign:
        for call in (
            lambda: bus.unsubscribe(foreign),
            lambda: bus.publish("x", exclude=foreign),
            lambda: bus.publish_many(["x"], exclude=foreign),
        ):
            with pytest.raises(ValueError, match=r"broker|broadcaster"):
                call()
        other.publish("for the foreign")
        assert foreign.recv(DEADLINE) == "for the foreign"
        assert not channel.poll(0)


# ------------------------------------------------------------------------------------------------------------ messages


def test_a_message_that_cannot_be_pickled(bus: Broadcaster[Any], channel: Channel[Any]) -> None:
    """``publish`` raises the pickling error, has sent nothing, and the next one works; whatever the size."""
    for message in (lambda: None, [b"x" * 1_000_000, lambda: None], (number for number in range(3)), socket.socket()):
        with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
            bus.publish(message)
        if isinstance(message, socket.socket):
            message.close()
    assert bus.stats().published == 0
    bus.publish("fine")
    assert channel.recv(DEADLINE) == "fine"


@pytest.mark.parametrize("size", [0, 1_000_000], ids=["small", "large"])
def test_a_message_that_cannot_be_unpickled(size: int, bus: Broadcaster[Any], channel: Channel[Any]) -> None:
    """``recv`` raises that message's own error in its place, and then goes on; other channels get the same."""
    with bus.subscribe() as other:
        for message in ("before", Explodes("first", bytes(size)), Explodes("second"), "after"):
            bus.publish(message)
        for each in (channel, other):
            assert each.recv(DEADLINE) == "before"
            for text in ("first", "second"):
                with pytest.raises(LookupError, match=text):
                    each.recv(DEADLINE)
            assert each.recv(DEADLINE) == "after"


# ----------------------------------------------------------------------------------------------------------- addresses


def test_start_broadcaster_refuses(temporary_folder: Path) -> None:
    """``start_broadcaster`` checks each argument before it starts anything."""
    wrong = [(5, TypeError), ("spawn", TypeError), (object(), TypeError)]
    refused(lambda value: start_broadcaster(context=value), wrong, names="context")
    refused(lambda value: start_broadcaster(address=value), [(5, TypeError), (b"/tmp/x", TypeError)], names="address")
    refused(
        lambda value: start_broadcaster(authkey=value),
        [(5, TypeError), ("key", TypeError), (b"", ValueError)],
        names="authkey",
    )
    refused(lambda value: start_broadcaster(start_timeout=value), BAD_TIMEOUTS, names="start_timeout")
    refused(lambda value: start_broadcaster(history=value), BAD_COUNTS, names="history")
    refused(lambda value: start_broadcaster(stall_timeout=value), BAD_TIMEOUTS, names="stall_timeout")
    refused(lambda value: start_broadcaster(restart=value), [(1, TypeError), (None, TypeError)], names="restart")
    assert not list(temporary_folder.glob("mpbroadcast-*"))


def test_connect_refuses(bus: Broadcaster[Any]) -> None:
    """``connect`` checks each argument."""
    refused(connect, [(5, TypeError), (None, TypeError), (b"/tmp/x", TypeError)], names="address")
    wrong = [(5, TypeError), ("key", TypeError), (b"", ValueError)]
    refused(lambda value: connect(bus.address, authkey=value), wrong, names="authkey")


@pytest.mark.parametrize("address", ["", "a\0b", "/tmp/" + "x" * 200, "/no/such/folder/socket"])
def test_connect_to_an_impossible_address(address: str) -> None:
    """An address that no socket can have is an ``AddressError``, which is an ``OSError`` and a ``ValueError``."""
    with pytest.raises(AddressError) as caught:
        connect(address)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)
    assert "address" in str(caught.value) or "path" in str(caught.value) or "folder" in str(caught.value)


def test_connect_to_nobody(temporary_folder: Path) -> None:
    """Where no broker is, or none any more, ``connect`` raises ``BrokerLost``, at once, and names the address."""
    address = str(temporary_folder / "nobody")
    with pytest.raises(BrokerLost, match="nobody"):
        connect(address)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address)
    with pytest.raises(BrokerLost, match="nobody"):
        connect(address)
    os.unlink(address)
    Path(address).write_text("a file")
    with pytest.raises((BrokerLost, AddressError), match="nobody"):
        connect(address)
    assert Path(address).read_text() == "a file"
    os.unlink(address)


@pytest.mark.parametrize("address", ["/tmp/" + "x" * 200, "/no/such/folder/socket", "a\0b"], ids=["long", "missing", "NUL"])
def test_start_at_an_impossible_address(address: str, temporary_folder: Path) -> None:
    """``start_broadcaster`` raises ``StartError`` with the cause, and leaves nothing."""
    with pytest.raises(StartError) as caught:
        start_broadcaster(address=address)
    assert isinstance(caught.value.__cause__, OSError)
    assert not list(temporary_folder.glob("mpbroadcast-*"))


def test_start_at_an_address_in_use(bus: Broadcaster[Any]) -> None:
    """An address at which a broker listens is refused by name, and that broker is not disturbed."""
    with bus.subscribe() as channel:
        with pytest.raises(StartError) as caught:
            start_broadcaster(address=bus.address)
        assert bus.address in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno in (errno.EADDRINUSE, errno.EEXIST)
        bus.publish("undisturbed")
        assert channel.recv(DEADLINE) == "undisturbed"
        connect(bus.address).close()


def test_start_where_something_else_listens(temporary_folder: Path) -> None:
    """A socket at which any other program listens is in use: it is not taken away."""
    address = str(temporary_folder / "other")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(address)
        server.listen()
        with pytest.raises(StartError, match="other"):
            start_broadcaster(address=address)
        client.connect(address)
    os.unlink(address)


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_start_where_something_else_lies(kind: str, temporary_folder: Path) -> None:
    """What lies at the address and is no socket is never deleted."""
    path, target = temporary_folder / "precious", temporary_folder / "target"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        target.write_text("precious")
        path.symlink_to(target)
    with pytest.raises(StartError, match="precious"):
        start_broadcaster(address=str(path))
    if kind == "folder":
        path.rmdir()
    else:
        assert path.read_text() == "precious"
        path.unlink()
        target.unlink(missing_ok=True)


def test_start_where_a_socket_does_not_listen_yet(temporary_folder: Path) -> None:
    """A socket of another program that is bound, and refuses as that of a dead broker does, is left alone."""
    address = str(temporary_folder / "other")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(address)
        os.chmod(address, 0o600)
        with pytest.raises(StartError, match="no broker") as caught:
            start_broadcaster(address=address)
        assert address in str(caught.value)
        server.listen()
        client.connect(address)
    os.unlink(address)


def test_what_appears_at_the_address_during_the_start_stays(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is put at the address when the broker has found it free is not replaced, and nothing else is left."""
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


def unfinished(path: Path) -> None:
    """Leave what a broker leaves that is killed before its socket listens."""
    with socket.socket(socket.AF_UNIX) as half:
        before = os.umask(0o777)
        half.bind(str(path))
        os.umask(before)


@pytest.mark.parametrize("ours", [True, False])
def test_what_lies_beside_the_address(ours: bool, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the names that a socket has until it listens, a start removes what a killed broker has left, and nothing else."""
    fd_socket = temporary_folder / ".mpbroadcast-abc~"
    address = temporary_folder / "chosen"
    unfinished(fd_socket) if ours else fd_socket.write_text("precious")
    monkeypatch.setattr(os, "getpid", lambda: 0xABC)
    if ours:
        Listening(str(address), "").remove()
        assert not fd_socket.exists()
    else:
        with pytest.raises(OSError, match="in use"):
            Listening(str(address), "")
        assert fd_socket.read_text() == "precious"
        fd_socket.unlink()
    assert not address.exists()


def test_the_socket_file_of_a_dead_broker_is_taken_over(temporary_folder: Path) -> None:
    """The socket file that a killed broker left at a chosen address does not stand in the way of the next."""
    address = str(temporary_folder / "chosen")
    text = f"""
import signal
from mpbroadcast import start_broadcaster
bus = start_broadcaster(address={address!r})
print(bus.stats().pid, flush=True)
signal.pause()
"""
    with Program("-c", text) as program:
        broker = int(program.line())
        os.kill(broker, signal.SIGSTOP)
        os.kill(program.pid, signal.SIGKILL)
        os.kill(broker, signal.SIGKILL)
        wait_until(lambda: not alive(broker) and not alive(program.pid))
    assert Path(address).is_socket()
    with start_broadcaster(address=address) as bus, connect(address) as other, bus.subscribe() as channel:
        other.publish("taken over")
        assert channel.recv(DEADLINE) == "taken over"
    assert not Path(address).exists()


def test_a_start_that_takes_too_long(temporary_folder: Path) -> None:
    """A broker that is not ready within ``start_timeout`` is a ``StartError``, and leaves no process and no file."""
    with pytest.raises(StartError, match="start_timeout"):
        start_broadcaster(context=multiprocessing.get_context("spawn"), start_timeout=0.001)
    assert not list(temporary_folder.glob("mpbroadcast-*"))


# -------------------------------------------------------------------------------------------------------------- errors


def test_every_error_has_one_base() -> None:
    """Each exception of the package is a ``BroadcastError``, and the built-in kind that its meaning has."""
    kinds: dict[str, type[BaseException]] = {
        "StartError": RuntimeError,
        "AddressError": OSError,
        "AuthenticationFailed": Exception,
        "BrokerCrashed": Exception,
        "BrokerLost": ConnectionError,
        "BrokerRestarted": Exception,
        "ClosedError": OSError,
        "ChannelInUse": RuntimeError,
        "Lagged": Exception,
        "Overflowed": Exception,
        "TimedOut": TimeoutError,
    }
    errors = {
        name: value
        for name, value in vars(mpbroadcast).items()
        if isinstance(value, type) and issubclass(value, BaseException) and value is not BroadcastError
    }
    assert set(errors) == set(kinds)
    for name, error in errors.items():
        assert issubclass(error, BroadcastError), name
        assert issubclass(error, kinds[name]), name
    assert not issubclass(errors["Overflowed"], errors["Lagged"])


def test_errors_say_what_to_do(bus: Broadcaster[Any], channel: Channel[Any], temporary_folder: Path) -> None:
    """An error's text names what happened, to which object, and what to do: it is a sentence or more."""
    nobody = str(temporary_folder / "nobody")
    closed = bus.subscribe()
    closed.close()
    for call, words in (
        (lambda: channel.recv(0), ["0"]),
        (lambda: bus.wait_for_subscribers(9, timeout=0), ["9"]),
        (lambda: connect(nobody), [nobody]),
        (lambda: connect(bus.address, authkey=b"wrong"), ["authkey"]),
        (lambda: start_broadcaster(address=bus.address), [bus.address]),
        (closed.recv, ["closed"]),
    ):
        with pytest.raises(BroadcastError) as caught:
            call()
        text = str(caught.value)
        assert len(text.split()) >= 6, text
        for word in words:
            assert word in text, text
