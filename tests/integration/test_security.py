"""Rude clients, wrong keys, and which process may reach the socket at all."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpbroadcast import AuthenticationFailed, Broadcaster, BrokerLost, connect, start_broadcaster, trap_points
from tests.support.helpers import DEADLINE, Background, Children, answer, finish, wait_until
from tests.support.rude import Rude
from tests.support.victims import descriptors

Bus = Broadcaster[Any]
GROWTH = 8 << 20  # bytes that a broker's memory may differ by between two quiet moments
HELD_UP = 2.0  # seconds in which a round of all others' business is done, on a busy machine


def raw(bus: Bus) -> socket.socket:
    """Return a bare connection to the broker's socket; wait for room in its queue."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(bus.address)
    client.settimeout(DEADLINE)
    return client


def goes_on(bus: Bus) -> None:
    """Do all others' business, quickly: old and new handles, subscribing, publishing, statistics."""
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
def undisturbed(bus: Bus) -> Iterator[None]:
    """Expect that what happens within changes nothing for others, and leaves no descriptor and no memory."""
    goes_on(bus)
    broker = psutil.Process(bus.stats().pid)
    before, memory = descriptors(broker.pid), broker.memory_info().rss
    yield
    goes_on(bus)
    wait_until(lambda: descriptors(broker.pid) <= before)
    assert broker.memory_info().rss - memory < GROWTH
    assert bus.stats().pid == broker.pid


LENGTH = struct.Struct("!i")
STATS = LENGTH.pack(14) + b'{"do":"stats"}'


def silent_clients(bus: Bus, stack: contextlib.ExitStack) -> None:
    """Connect 200 times, and send nothing."""
    for _ in range(200):
        stack.enter_context(raw(bus))


def send_without_end(client: socket.socket, block: bytes) -> None:
    """Send this again and again, of which the broker must take little."""
    client.settimeout(0.5)
    taken = 0
    with contextlib.suppress(OSError):
        while taken < 256 << 20:
            taken += client.send(block[taken % len(block) :])
    assert taken < GROWTH


def endless_handshake(bus: Bus, stack: contextlib.ExitStack) -> None:
    """Announce 2 GiB before the key is proved."""
    client = stack.enter_context(raw(bus))
    client.sendall(LENGTH.pack(0x7FFF_0000))
    send_without_end(client, b"x" * (1 << 20))


def endless_request(bus: Bus, stack: contextlib.ExitStack) -> None:
    """Announce 2 GiB behind the key."""
    client = stack.enter_context(contextlib.closing(Rude(bus.address)))
    client.send(LENGTH.pack(0x7FFF_0000))
    send_without_end(client.socket, b"x" * (1 << 20))


def unread_replies(bus: Bus, stack: contextlib.ExitStack) -> None:
    """Ask without end, and read no reply."""
    send_without_end(stack.enter_context(contextlib.closing(Rude(bus.address))).socket, STATS * 10_000)


@pytest.mark.parametrize("attack", [silent_clients, endless_handshake, endless_request, unread_replies])
def test_a_rude_client_holds_up_nobody(attack: Callable[[Bus, contextlib.ExitStack], None], bus: Bus) -> None:
    """Disturb nothing, while the client stays and when it goes."""
    with undisturbed(bus), contextlib.ExitStack() as stack:
        attack(bus, stack)
        goes_on(bus)


class Planted:
    """A pickle that would leave a trace where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.path.write_text, ("unpickled",)


def test_a_pickle_behind_the_key_is_never_unpickled(bus: Bus, tmp_path: Path) -> None:
    """Neither as a request, nor as a message, which its subscriber unpickles in ``recv``."""
    trace = tmp_path / "trace"
    with undisturbed(bus):
        body = pickle.dumps(Planted(trace))
        with contextlib.closing(Rude(bus.address)) as client:
            client.send(LENGTH.pack(len(body)) + body)
            goes_on(bus)
        with bus.subscribe() as channel:
            bus.publish(Planted(trace))
            bus.flush(DEADLINE)
            assert not trace.exists()
            channel.recv(DEADLINE)
            assert trace.exists()


def crowd(address: str, orders: Connection) -> None:
    """For each order, connect 200 times and send nothing; report when the broker has closed the first of these."""
    while orders.recv():
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(200)]
            for stranger in strangers:
                stranger.connect(address)
            for stranger in strangers[:60]:
                with contextlib.suppress(ConnectionResetError):
                    while stranger.recv(100):
                        pass
            orders.send("closed")


def test_strangers_do_not_take_the_place_of_who_has_the_key(
    bus: Bus, fork: BaseContext, children: Children, pipe: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep a client that is about to answer, though more strangers have come since than the broker keeps."""
    process = children(fork, crowd, bus.address, pipe[1])
    crowds = []

    def reach(name: str, subject: object = None) -> None:
        if name == "answering":
            pipe[0].send(True)
            crowds.append(answer(pipe[0]))

    monkeypatch.setattr(trap_points, "reach", reach)
    with connect(bus.address):
        assert len(crowds) == 3  # the challenge is answered once, and nothing was tried again
    monkeypatch.undo()
    pipe[0].send(False)
    finish(process)


def test_a_connection_that_was_reset_is_tried_again(temporary_folder: Path) -> None:
    """And again; then raise that no broker answers."""
    address = temporary_folder / "resets"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        server.settimeout(DEADLINE)
        connecting = Background(connect, address)
        for _ in range(7):
            server.accept()[0].close()
    assert isinstance(connecting.error(), BrokerLost)
    address.unlink()


@pytest.mark.parametrize("chosen", [False, True])
def test_only_this_user_reaches_the_socket(chosen: bool, temporary_folder: Path) -> None:
    """Give the socket file mode 0600, in a folder with mode 0700 unless it is a chosen one, whatever the umask."""
    for umask in (0o022, 0):
        before = os.umask(umask)
        try:
            with start_broadcaster(address=temporary_folder / "chosen" if chosen else None) as bus:
                assert os.stat(bus.address).st_mode == stat.S_IFSOCK | 0o600
                if not chosen:
                    assert stat.S_IMODE(os.stat(os.path.dirname(bus.address)).st_mode) == 0o700
        finally:
            os.umask(before)
        assert not os.path.exists(bus.address)


def test_a_wrong_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise what handlers of multiprocessing's error catch, too; a process that is no child needs the broker's own key."""
    key = os.urandom(32)
    with start_broadcaster(authkey=key) as bus, undisturbed(bus):
        with pytest.raises(AuthenticationFailed, match="key") as caught:
            connect(bus.address, authkey=b"wrong")
        assert isinstance(caught.value, AuthenticationError)
        with monkeypatch.context() as patch:
            patch.setattr(multiprocessing.current_process(), "authkey", os.urandom(32))
            with pytest.raises(AuthenticationFailed):
                connect(bus.address)
            with connect(bus.address, authkey=key) as other, other.subscribe() as channel:
                other.publish("from a stranger")
                assert channel.recv(DEADLINE) == "from a stranger"


# Before Python 3.12 the other side has HMAC-MD5 only.
@pytest.mark.parametrize(("key", "text"), [(b"the stranger's key", "different keys|is no broker"), (None, "is no broker")])
def test_a_server_that_does_not_have_the_key_is_not_trusted(key: bytes | None, text: str, temporary_folder: Path) -> None:
    """Find out what listens at the address, and give it no answer that helps it."""
    address = str(temporary_folder / "stranger")
    with Listener(address, "AF_UNIX", authkey=key) as listener:
        accepting = Background(lambda: listener.accept().send_bytes(b"a greeting"))
        with pytest.raises(AuthenticationFailed, match=text):
            connect(address)
        assert (accepting.error() is None) == (key is None)
