"""Rude clients, wrong keys, and who may reach the socket at all."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

import mpbroadcast
from mpbroadcast import AuthenticationFailed, Broadcaster, BrokerLost, TimedOut, connect, start_broadcaster, trap_points
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.deadline import Deadline
from tests.support.helpers import DEADLINE, Background, Children, answer, finish, keyed_connection, wait_until
from tests.support.victims import Program, descriptors

PACKAGE = Path(mpbroadcast.__file__).parent
GROWTH = 8 << 20  # bytes that a broker's memory may differ by between two quiet moments
HELD_UP = 2.0  # seconds in which a round of everybody else's business is done, on a busy machine


def raw(bus: Broadcaster[Any]) -> socket.socket:
    """A bare connection to the broker's socket."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE)

    def connected() -> bool:
        try:
            client.connect(bus.address)
        except BlockingIOError:  # the queue is full for the moment
            return False
        return True

    try:
        wait_until(connected)
    except BaseException:
        client.close()
        raise
    return client


def keyed(bus: Broadcaster[Any]) -> Any:
    """A connection that has proved that it has the key."""
    return keyed_connection(bus.address)


def send(client: Any, data: bytes) -> None:
    """Send what the broker takes of it: it may hang up at any byte."""
    with contextlib.suppress(OSError):
        client.sendall(data)


def goes_on(bus: Broadcaster[Any]) -> None:
    """Everybody else's business is done, and quickly: old and new handles, subscribing, publishing, statistics."""
    start = time.monotonic()
    with bus.subscribe("check") as channel:
        bus.publish("through the old handle", topic="check", timeout=DEADLINE)
        assert channel.recv(DEADLINE) == "through the old handle"
        with connect(bus.address) as other:
            other.publish("through a new one", topic="check", timeout=DEADLINE)
            assert channel.recv(DEADLINE) == "through a new one"
            assert other.stats().pid == bus.stats().pid
    assert time.monotonic() - start < HELD_UP


@contextlib.contextmanager
def undisturbed(bus: Broadcaster[Any]) -> Iterator[None]:
    """What happens within changes nothing for others; afterwards no descriptor and no memory of it is left."""
    goes_on(bus)
    broker = psutil.Process(bus.stats().pid)
    before, memory = descriptors(broker.pid), broker.memory_info().rss
    yield
    goes_on(bus)
    wait_until(lambda: descriptors(broker.pid) <= before)
    assert broker.memory_info().rss - memory < GROWTH
    assert bus.stats().pid == broker.pid


LENGTH = struct.Struct("!i")
NOISE = random.Random(20).randbytes(100_000)
RUDE: dict[str, list[bytes]] = {
    "no bytes": [],
    "one byte": [b"\0"],
    "random bytes": [NOISE],
    "text": [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    "a huge length": [LENGTH.pack(0x7FFF_FFFF), b"x" * 1_000_000],
    "a negative length": [LENGTH.pack(-2), b"x" * 100],
    "a long length": [LENGTH.pack(-1) + struct.pack("!Q", 1 << 62), b"x" * 1_000_000],
    "an empty answer": [LENGTH.pack(0)],
    "half an answer": [LENGTH.pack(40), b"{sha256}" + b"x" * 10],
    "a wrong answer": [LENGTH.pack(40) + b"{sha256}" + b"x" * 32],
    "a wrong short answer": [LENGTH.pack(16) + b"x" * 16],
    "a welcome instead of an answer": [LENGTH.pack(9) + b"#WELCOME#"],
    "a request instead of an answer": [LENGTH.pack(14) + b'{"do":"stats"}'],
    "a pickle": [LENGTH.pack(len(pickle.dumps(["a pickle"]))) + pickle.dumps(["a pickle"])],
}


@pytest.mark.parametrize("what", RUDE)
def test_a_rude_client_holds_up_nobody(what: str, bus: Broadcaster[Any]) -> None:
    """What a client sends instead of proving that it has the key disturbs nobody, while it stays and when it goes."""
    with undisturbed(bus), raw(bus) as client:
        for part in RUDE[what]:
            send(client, part)
        goes_on(bus)


@pytest.mark.parametrize("what", ["no bytes", "random bytes", "half an answer"])
def test_a_client_that_goes_at_once(what: str, bus: Broadcaster[Any]) -> None:
    """Clients that hang up in the middle, hundreds of them one after the other, leave nothing."""
    with undisturbed(bus):
        for _ in range(200):
            with raw(bus) as client:
                for part in RUDE[what]:
                    send(client, part[:50])


def test_two_hundred_silent_clients(bus: Broadcaster[Any]) -> None:
    """Many clients that send nothing, all at once, hold up nobody, and cost nothing when they have gone."""
    with undisturbed(bus), contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(raw(bus))
        goes_on(bus)


def crowd(address: str, orders: Connection) -> None:
    """For each order, connect 200 times and send nothing; report when the broker has thrown out the first of these."""
    while orders.recv():
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(200)]
            for stranger in strangers:
                stranger.connect(address)
            for stranger in strangers[:60]:
                with contextlib.suppress(ConnectionResetError):
                    while stranger.recv(100):
                        pass
            orders.send("thrown out")


def test_strangers_do_not_take_the_place_of_who_has_the_key(
    bus: Broadcaster[Any], fork: BaseContext, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is about to answer stays, though more strangers have come since than the broker keeps."""
    ours, theirs = fork.Pipe()
    with ours, theirs:
        process = children(fork, crowd, bus.address, theirs)
        thrown_out = []

        def reach(name: str, subject: object = None) -> None:
            if name == "answering":
                ours.send(True)
                thrown_out.append(answer(ours))

        monkeypatch.setattr(trap_points, "reach", reach)
        with connect(bus.address):
            assert len(thrown_out) == 3  # the challenge is answered once, and nothing was tried again
        monkeypatch.undo()
        ours.send(False)
        finish(process)


def test_a_connection_that_was_reset_is_tried_again(temporary_folder: Path) -> None:
    """A client that was thrown out before it could answer tries again, and again, and then raises that nothing answers."""
    address = str(temporary_folder / "resets")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        server.settimeout(DEADLINE)
        connecting = Background(connect, address)
        for _ in range(7):
            server.accept()[0].close()
    with pytest.raises(BrokerLost):
        raise connecting.error() or AssertionError
    os.unlink(address)


def test_a_connection_that_was_reset_when_the_time_is_over(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a broker all the same, so it is not taken for lost."""
    address = str(temporary_folder / "resets")
    deadline = Deadline(0.1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()

        def reach(name: str, subject: object = None) -> None:
            if name == "connected":
                server.accept()[0].close()
                wait_until(lambda: deadline.remaining() == 0)

        monkeypatch.setattr(trap_points, "reach", reach)
        with pytest.raises(TimedOut):
            BrokerClient(address).session(deadline)
    os.unlink(address)


def endless(client: Any) -> int:
    """Send without end, until the broker hangs up, takes no more, or has had far more than it may: how much it took."""
    block = b"x" * (1 << 20)
    taken = 0
    with contextlib.suppress(OSError):
        while taken < 256 << 20:
            taken += client.send(block)
    return taken


def test_a_client_that_sends_without_end(bus: Broadcaster[Any]) -> None:
    """One announces a message of two GiB before it has proved its key, and sends it: the broker does not take it in."""
    with undisturbed(bus), raw(bus) as client:
        client.settimeout(0.5)
        send(client, LENGTH.pack(0x7FFF_0000))
        assert endless(client) < GROWTH
        goes_on(bus)


# ------------------------------------------------------------------------------------------ with the key, and then rude


class Planted:
    """A pickle that would leave a trace where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path(self.path).write_text, ("unpickled",)


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


KEYED: dict[str, Callable[[], list[bytes]]] = {
    "nothing": list,
    "random bytes": lambda: [NOISE[:2000]],
    "much": lambda: [NOISE] * 30,
    "an empty message": lambda: [b""],
    "no JSON": lambda: [b'{"do": '],
    "deep JSON": lambda: [b"[" * 100_000],
    "deep objects": lambda: [b'{"do":' * 50_000],
    "no object": lambda: [json_bytes([1, 2, 3]), json_bytes("text"), json_bytes(None), json_bytes(7)],
    "an empty object": lambda: [b"{}"],
    "an unknown request": lambda: [json_bytes({"do": "explode"}), json_bytes({"do": "explode", "session": 1})],
    "wrong types": lambda: [json_bytes({"do": ["stats"], "session": {}, "topics": 5, "capacity": "x", "pid": -1})],
    "huge numbers": lambda: [b'{"do":"subscribe","session":' + b"9" * 5000 + b"}", b'{"do":1e999,"session":NaN}'],
    "no text": lambda: [b'{"do":"\xff\xfe"}', b'{"do":"\\ud800"}'],
}


@pytest.mark.parametrize("what", KEYED)
def test_a_client_with_the_key_that_talks_nonsense(what: str, bus: Broadcaster[Any]) -> None:
    """Nonsense behind the right key ends that client's connection at most; the others notice nothing."""
    with undisturbed(bus):
        client = keyed(bus)
        with client:
            for body in KEYED[what]():
                with contextlib.suppress(OSError):
                    client.send_bytes(body)
            goes_on(bus)


def test_a_pickle_behind_the_key_is_never_unpickled(bus: Broadcaster[Any], tmp_path: Path) -> None:
    """A control message is never unpickled, whoever sends it."""
    trace = tmp_path / "trace"
    with undisturbed(bus):
        client = keyed(bus)
        with client, contextlib.suppress(OSError):
            client.send(Planted(str(trace)))
            client.send({"do": Planted(str(trace))})
            goes_on(bus)
    assert not trace.exists()


def test_a_message_is_unpickled_in_its_subscriber_only(bus: Broadcaster[Any], tmp_path: Path) -> None:
    """The broker forwards a message without looking into it: only ``recv`` unpickles."""
    trace = tmp_path / "trace"
    with bus.subscribe() as channel:
        bus.publish(Planted(str(trace)))
        bus.flush(DEADLINE)
        wait_until(lambda: bus.stats().subscribers[0].waiting + bus.stats().subscribers[0].delivered == 1)
        assert not trace.exists()
        channel.recv(DEADLINE)
        assert trace.exists()


def test_a_flood_of_control_bytes_behind_the_key(bus: Broadcaster[Any]) -> None:
    """One request of hundreds of MiB is refused before it is taken in."""
    with undisturbed(bus):
        client = keyed(bus)
        with client, socket.socket(fileno=os.dup(client.fileno())) as bare:
            bare.settimeout(0.5)
            send(bare, LENGTH.pack(0x7FFF_0000))
            assert endless(bare) < GROWTH
            goes_on(bus)


def test_a_client_that_reads_no_answer(bus: Broadcaster[Any]) -> None:
    """A client with the key that asks and never reads holds up nobody, and its answers do not pile up."""
    with undisturbed(bus):
        client = keyed(bus)
        with client, socket.socket(fileno=os.dup(client.fileno())) as bare:
            bare.settimeout(0.5)
            request = json_bytes({"do": "stats"})
            requests = (LENGTH.pack(len(request)) + request) * 1000
            taken = 0
            with contextlib.suppress(OSError):
                while taken < 256 << 20:
                    taken += bare.send(requests[taken % len(requests) :])
            assert taken < GROWTH
            goes_on(bus)


# ----------------------------------------------------------------------------------------------------------------- keys


def test_only_this_user_reaches_the_socket(bus: Broadcaster[Any]) -> None:
    """The socket file has mode 0600, in a folder with mode 0700, whatever the umask."""
    assert stat.S_IMODE(os.stat(bus.address).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(bus.address)).st_mode) == 0o700
    assert stat.S_ISSOCK(os.stat(bus.address).st_mode)
    before = os.umask(0)
    try:
        with start_broadcaster() as other:
            assert stat.S_IMODE(os.stat(other.address).st_mode) == 0o600
            assert stat.S_IMODE(os.stat(os.path.dirname(other.address)).st_mode) == 0o700
    finally:
        os.umask(before)


def test_a_socket_at_a_chosen_address_is_private_too(temporary_folder: Path) -> None:
    """A socket at an address of the user's has mode 0600, though its folder is anybody's."""
    before = os.umask(0)
    try:
        with start_broadcaster(address=str(temporary_folder / "chosen")) as bus:
            assert bus.address == str(temporary_folder / "chosen")
            assert stat.S_IMODE(os.stat(bus.address).st_mode) == 0o600
    finally:
        os.umask(before)
    assert not (temporary_folder / "chosen").exists()


def test_a_wrong_key_is_refused(bus: Broadcaster[Any]) -> None:
    """A wrong key raises an error that multiprocessing's own handlers catch, too, and that names what to do."""
    with undisturbed(bus):
        with pytest.raises(AuthenticationFailed) as caught:
            connect(bus.address, authkey=b"wrong")
        assert isinstance(caught.value, AuthenticationError)
        assert "key" in str(caught.value)


CONNECT = """
import sys
import mpbroadcast
from mpbroadcast import AuthenticationFailed, connect
address, key = sys.argv[1:]
try:
    connect(address)
except AuthenticationFailed:
    print("refused")
with connect(address, authkey=bytes.fromhex(key)) as bus:
    bus.publish("from a stranger")
    print("published")
"""


def test_a_process_that_is_no_child_connects_with_the_key() -> None:
    """A process that is no child of the starter gets in with the starter's key, and not with its own."""
    key = os.urandom(32)
    with start_broadcaster(authkey=key) as bus, bus.subscribe() as channel:
        with Program("-W", "error", "-c", CONNECT, bus.address, key.hex()) as program:
            assert program.end() == (0, "refused\npublished\n", "")
        assert channel.recv(DEADLINE) == "from a stranger"
        with connect(bus.address, authkey=key) as other:
            assert other.stats().pid == bus.stats().pid


def test_a_server_that_does_not_have_the_key_is_not_trusted(temporary_folder: Path) -> None:
    """Who listens at an address without having the key is found out, and gets no answer that helps it."""
    from multiprocessing.connection import Listener
    from threading import Thread

    address = str(temporary_folder / "stranger")
    with Listener(address, "AF_UNIX", authkey=b"the stranger's key") as listener:

        def serve() -> None:
            with contextlib.suppress(AuthenticationError, OSError, EOFError):
                listener.accept().close()

        thread = Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(AuthenticationFailed):
            connect(address)
        thread.join(DEADLINE)
