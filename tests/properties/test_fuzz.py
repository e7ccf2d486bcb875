"""Bytes and objects that nobody should send, at every place where a broker takes in what another process has sent.

What the parsers alone do with them is in the other modules of this folder.

All is decided by ``MPBROADCAST_SEED``, which is printed; ``MPBROADCAST_SOAK=<seconds>`` lets the attacks on a broker go on for
so long, all of them together.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import select
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import current_process
from multiprocessing.context import BaseContext
from pathlib import Path
from random import Random
from typing import Any, Final, cast

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpbroadcast import Broadcaster, BroadcastError, Channel, connect, start_broadcaster
from mpbroadcast.broker.control_clients import ControlConnection
from mpbroadcast.broker.core.history import MOST_TOPICS
from mpbroadcast.broker.members import Peer
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import Broker
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.posix.fd_socket import DescriptorSocket, receive, taken_apart
from mpbroadcast.posix.processes import PeerProcess
from mpbroadcast.posix.shared_memory import MemoryRefused, available, check_message, check_ring, message_memory, ring_memory
from mpbroadcast.protocol.control import (
    MAX_HANDSHAKE,
    ControlError,
    Inbox,
    client_handshake,
    decode,
    encode,
)
from mpbroadcast.protocol.fd_packets import ACCEPTED, MAPPED, MEMORY, READ, REFUSED, RING, WANTED, pack, unpack
from mpbroadcast.protocol.frames import (
    PIPE_BUF,
    abort,
    frame_head,
    memory_frame,
    pieces,
    reference_frame,
)
from tests.conftest import descriptors as open_files
from tests.support.helpers import DEADLINE, Background, Children, keyed_connection, stopped, wait_until
from tests.support.victims import Counter, descriptors

SEED: Final = int(os.environ.get("MPBROADCAST_SEED", "1"))
SOAK: Final = float(os.environ.get("MPBROADCAST_SOAK", "0"))
GROWTH: Final = 48 << 20  # bytes by which a broker's memory may differ before an attack and after it
PEAK: Final = 192 << 20  # and in the middle of it: what attackers do not read waits, up to their capacities
TOPIC: Final = "the others' " + os.urandom(8).hex()  # that no attacker finds by chance
STEADY: Final = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
shares_memory = pytest.mark.skipif(not available(), reason="there is no shared memory here, or it is forbidden")


@pytest.fixture(autouse=True)
def say_the_seed() -> None:
    """So that a failure can be had again."""
    print(f"MPBROADCAST_SEED={SEED}")


# ------------------------------------------------------------------------------------------------------------- damage

INTERESTING: Final = [0, 1, 7, 8, 16, 0x7F, 0x80, 0xFF, PIPE_BUF, PIPE_BUF + 1, 0xFFFF, 1 << 16, 1 << 17, 1 << 24, 2 << 24]
INTERESTING_LONG: Final = [3 << 24, 4 << 24, 5 << 24, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1]


def damaged(choose: Random, data: bytes, others: Sequence[bytes] = (), most: int = 4) -> bytes:
    """``data`` with some bytes flipped, cut out, put in, doubled, or replaced by a part of another stream."""
    result = bytearray(data)
    for _ in range(choose.randint(1, most)):
        place = choose.randrange(len(result) + 1)
        length = choose.choice([1, 1, 2, 4, 8, 20, 100])
        match choose.randrange(8):
            case 0 if place < len(result):
                result[place] ^= 1 << choose.randrange(8)
            case 1:
                del result[place : place + length]
            case 2:
                result[place:place] = choose.randbytes(length)
            case 3:
                result[place:place] = result[place : place + length]
            case 4:
                del result[place:]
            case 5 if others:
                other = choose.choice(others)
                start = choose.randrange(len(other) + 1)
                result[place:] = other[start:]
            case _:
                number = choose.choice(INTERESTING + INTERESTING_LONG)
                size = choose.choice([1, 2, 4, 4, 8])
                value = (number & ((1 << 8 * size) - 1)).to_bytes(size, choose.choice(["little", "big"]))
                result[place : place + size] = value
    return bytes(result)


def cut(choose: Random, data: bytes) -> list[bytes]:
    """``data`` in parts, as reads might bring it."""
    parts = []
    while data:
        length = choose.choice([1, 7, 100, 5000, len(data)])
        parts.append(data[:length])
        data = data[length:]
    return parts


# ------------------------------------------------------------------------------------------------------------- frames

RING_SIZE: Final = 1 << 20


def written(topic: bytes = b"fuzz") -> list[bytes]:
    """Streams that publishers write: small frames, pieces, mixed and aborted, and what refers to shared memory."""
    plain = [frame_head(size, topic, exclude) + bytes(size) for size in (0, 1, 30, 30, 30) for exclude in (0, 7)]
    many = b"".join([frame_head(40, topic) + b"x" * 40] * 100)
    frame = frame_head(10_000, topic) + bytes(10_000)
    first, second = list(pieces(frame, 1)), list(pieces(frame, 2))
    mixed = [piece for pair in zip(first, second, strict=True) for piece in pair]
    references = [reference_frame(1, offset << 10, 1 + offset * 50, topic, 0) for offset in range(40)]
    memfd_messages = [memory_frame(number, 3000, topic, 0, number % 2 == 0) for number in range(1, 5)]
    return [
        b"".join(plain),
        many,
        b"".join(first),
        b"".join(mixed),
        b"".join([*first[:2], abort(1), *plain]),
        b"".join(references),
        b"".join(memfd_messages),
        b"".join([plain[0], references[0], memfd_messages[0], abort(3), references[1], *second]),
    ]


# ------------------------------------------------------------------------------------------------------------ control

REQUESTS: Final[list[dict[str, Any]]] = [
    {"do": "attach"},
    {"do": "detach"},
    {"do": "publisher", "session": 1},
    {"do": "fd_socket", "session": 1, "publisher": 2},
    {"do": "retire", "session": 1, "publisher": 2},
    {"do": "flush", "session": 1, "publisher": 2, "delivered": True, "now": False},
    {"do": "flush", "session": 1, "publisher": 2, "now": True},
    {
        "do": "subscribe",
        "session": 1,
        "topics": ["fuzz", "fuzz:*"],
        "capacity": 1 << 16,
        "overflow": "drop_oldest",
        "replay": 0,
        "subscription": 3,
        "publisher": 2,
    },
    {"do": "add topics", "session": 1, "subscription": 3, "topics": ["fuzz:[a-c]?"]},
    {"do": "drop topics", "session": 1, "subscription": 3, "topics": ["fuzz"]},
    {"do": "open", "session": 1, "subscription": 3, "shared": True},
    {"do": "opened", "session": 1, "subscription": 3, "token": 4},
    {"do": "unsubscribe", "session": 1, "subscription": 3},
    {"do": "close", "session": 1, "subscription": 3},
    {"do": "drop", "subscription": 3},
    {"do": "wait", "session": 1, "count": 1, "topic": "fuzz", "now": True},
    {"do": "wait", "session": 1, "count": 1 << 40, "topic": None, "now": False},
    {"do": "stats", "session": 1},
    {"do": "stop", "timeout": -1},
]
NONSENSE: Final[list[Any]] = [
    None, True, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, -(2**70), 10**4000, 1.5, 1e308, float("nan"), float("inf"), "", "x",
    "a\0b", "\ud800", "x" * 1025, "é" * 512, "[", "fuzz:[!", "fuzz:[z-a]*", "fuzz" + "*a" * 500, [], ["fuzz"], ["x", 5, None],
    [[]], ["fuzz"] * 1000, {}, {"do": "stop"}, {"": {}}, "block", "latest", "disconnect", "stats", "subscribe",
]  # fmt: skip


def body_of(data: bytes) -> bytes:
    """The only body in ``data``."""
    inbox = Inbox(MAX_HANDSHAKE)
    inbox.feed(data)
    body = inbox.next()
    assert body is not None
    return body


# ------------------------------------------------------------------------------------------------ memory, descriptors


SEALS: Final = [0, 2, 4, 8, 2 | 4, 2 | 4 | 8, 2 | 4 | 16, 1 | 2 | 4 | 16, 1 | 2 | 4 | 8]


@contextlib.contextmanager
def any_file(choose: Random, name: str = "fuzz") -> Iterator[int]:
    """A descriptor of memory of any size with any seals, or of something that is no memory."""
    kind = choose.randrange(8)
    if kind == 0:
        fd, other = os.pipe()
        os.close(other)
    elif kind == 1:
        fd = os.open(choose.choice(["/dev/null", "/dev/zero", "/", sys.executable]), os.O_RDONLY)
    else:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, choose.choice([0, 1, 100, 3000, 4096, 5000, 1 << 16, 1 << 20, (1 << 20) + 1, 1 << 30, 1 << 45]))
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, choose.choice(SEALS))
    try:
        yield fd
    finally:
        os.close(fd)


@shares_memory
def test_memory_of_any_kind() -> None:
    """What passes the checks has that size and cannot shrink; all else is ``MemoryRefused``."""
    for number in range(300):
        choose = Random(f"{SEED} memory {number}")
        with any_file(choose) as fd:
            size = choose.choice([0, 1, 3000, 4096, 1 << 20, 1 << 63])
            with contextlib.suppress(MemoryRefused):
                check_message(fd, size)
                assert os.fstat(fd).st_size >= size
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
                assert seals & 6 == 6
                assert seals & 24, "others could change it"
            with contextlib.suppress(MemoryRefused):
                assert check_ring(fd) == os.fstat(fd).st_size > 0
                assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 22 == 22
    for fd in (-1, 1 << 20):
        with pytest.raises((MemoryRefused, ValueError)):
            check_ring(fd)


def test_descriptors_of_any_number() -> None:
    """Packets of any length with any number of descriptors are heard one by one; none that came with them is kept."""
    held = descriptors(os.getpid())
    ours, number = DescriptorSocket.pair()
    theirs = DescriptorSocket(number)
    for count in range(200):
        choose = Random(f"{SEED} descriptors {count}")
        fds = [ours.fileno()] * choose.choice([0, 0, 1, 2, 3, 20])
        data = choose.randbytes(choose.choice([1, 15, 16, 64, 65, 300]))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        ours.sendmsg([data], rights)
        if choose.random() < 0.3:
            assert theirs.receive_packet() == data[:64]
        elif choose.random() < 0.5:
            came, numbers, lost = taken_apart(receive(theirs, 32))
            assert (came, lost) == (data[:32], len(fds) > len(numbers))
            assert len(numbers) <= len(fds)
            for fd in numbers:
                os.close(fd)
        else:
            heard = theirs.receive_packet_with_fd()
            assert heard is not None
            assert heard[0] == data[:64]
            assert (heard[1] is not None) == bool(fds)
            del heard
        assert theirs.receive_packet_with_fd() is None
        assert descriptors(os.getpid()) == held + 2
    ours.close()
    assert theirs.receive_packet_with_fd() == (b"", None)
    theirs.close()


# ------------------------------------------------------------------------------------------------------ any request at all


class Asker:
    """What :func:`answer` needs of a connection: takes its replies."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.session: Any = None
        self.closed = False
        self.opening: set[Any] = set()
        self.replies: list[dict[str, Any]] = []

    def reply(self, message: dict[str, Any], *fds: int) -> None:
        for fd in fds:
            os.close(fd)
        json.dumps(message)
        self.replies.append(message)

    def reply_encoded(self, data: bytes) -> None:
        self.reply(decode(data[4:]))

    def no_reply(self) -> None:
        self.replies.append({})

    def fail(self, kind: str, text: str, **more: Any) -> None:
        self.reply({"error": kind, "text": text, **more})


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker in this process, which nobody runs: it is only asked."""
    before = open_files()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        broker = Broker(listener, [b"key"], answer, history=3)
        yield broker
        take_away(broker)
        assert not broker.sessions
        assert not broker.subscriptions
        assert not broker.traffic.publishers
        assert broker.held == 0
        for number, target in open_files() - before:
            if target == os.devnull:  # what it has until its process ends
                os.close(number)
        vars(broker).clear()  # what closes itself when nothing refers to it any more


def take_away(broker: Broker) -> None:
    """End all that was made in this broker."""
    for session in list(broker.sessions.values()):
        broker.end_session(session, clean=False)
    for subscription in list(broker.subscriptions.values()):
        broker.remove(subscription)
    broker.traffic.run_until_idle()
    broker.loop.close_forgotten()


JSON: Final = st.recursive(
    st.sampled_from(NONSENSE) | st.integers(-2, 12) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS: Final = sorted({field for request in REQUESTS for field in request} - {"do"})
ASKED: Final = st.builds(
    lambda request, changes, gone: {
        name: value for name, value in (request | changes).items() if name not in gone or name == "do"
    },
    st.sampled_from(REQUESTS[:-1]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    st.sets(st.sampled_from(FIELDS), max_size=1),
)
ANYTHING: Final = st.dictionaries(st.sampled_from(["do", *FIELDS]) | st.text(max_size=3), JSON, max_size=5)


def ask(broker: Broker, asker: Asker, message: dict[str, Any]) -> None:
    """Ask; there is one reply at the most, and it can travel."""
    asker.replies.clear()
    answer(broker, cast("ControlConnection", asker), message)
    assert len(asker.replies) <= 1


NUMBERS: Final = ("session", "publisher", "subscription", "token")


def numbered(message: dict[str, Any], session: int) -> dict[str, Any]:
    """A message whose small numbers mean what there is: of this session, and made behind it."""
    return {
        name: session - 1 + value if name in NUMBERS and type(value) is int and 0 < value < 12 else value
        for name, value in message.items()
    }


@contextlib.contextmanager
def asking(broker: Broker) -> Iterator[tuple[Asker, Asker, int]]:
    """Two connections of this process; the first has a session, whose number is given, a publisher, and a subscription."""
    peer = Peer(PeerProcess(os.getpid()))
    one, other = Asker(peer), Asker(peer)
    try:
        ask(broker, one, {"do": "attach"})
        session = one.replies[0]["session"]
        for request in (REQUESTS[2], REQUESTS[7]):
            ask(broker, one, numbered(request, session))
        yield one, other, session
    finally:
        for asker in (one, other):
            for subscription in list(asker.opening):
                broker.unopen(subscription)
        take_away(broker)
        fd, peer.process.fd = peer.process.fd, -1
        if fd >= 0:
            os.close(fd)


def test_each_field_of_each_request_wrong(own_broker: Broker) -> None:
    """Whatever stands in one field of a request, it is answered or refused, and nothing is raised."""
    for request in REQUESTS[:-1]:
        with asking(own_broker) as (one, _, session):
            for field, value in itertools.product(request, NONSENSE):
                ask(own_broker, one, numbered(request, session) | {field: value})


@settings(STEADY, max_examples=40)
@given(asked=st.lists(ASKED | ASKED | ANYTHING, max_size=12))
def test_any_objects_as_requests(asked: list[dict[str, Any]], own_broker: Broker) -> None:
    """Whatever objects a broker is asked, it answers or refuses, and raises nothing; what they have made can be taken away."""
    with asking(own_broker) as (one, other, session):
        for place, message in enumerate(asked):
            if message.get("do") != "stop":
                ask(own_broker, other if place % 4 == 3 else one, numbered(message, session))


# --------------------------------------------------------------------------------------------------------- the real broker


class Rude:
    """A connection that has shown the key, and then sends what it likes."""

    def __init__(self, address: str) -> None:
        with keyed_connection(address) as client:
            self.socket = socket.socket(fileno=os.dup(client.fileno()))
        self.socket.settimeout(DEADLINE)
        self._inbox = Inbox(1 << 30)
        self.fds: list[int] = []

    def send(self, data: bytes) -> None:
        """Send it, if the broker has not hung up."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def receive_packet_with_fd(self, seconds: float = DEADLINE) -> dict[str, Any] | None:
        """The next reply; ``None`` when none comes in that time, or the broker has hung up."""
        deadline = time.monotonic() + seconds
        while (body := self._inbox.next()) is None:
            if not select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 8)
            except OSError:
                return None
            self.fds += fds
            if not data:
                return None
            self._inbox.feed(data)
        return decode(body)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the broker replies to a good request."""
        self.send(encode(message))
        reply = self.receive_packet_with_fd()
        assert reply is not None, f"no reply to {message}"
        return reply

    def close(self) -> None:
        self.socket.close()
        self.let_go()

    def let_go(self) -> None:
        """Close what came with replies."""
        while self.fds:
            os.close(self.fds.pop())


class Target:
    """What attackers are told: the broker's address, and numbers of others, which they may name, but not end."""

    def __init__(self, address: str, session: int, publisher: int, subscription: int) -> None:
        self.address = address
        self.session = session
        self.publisher = publisher
        self.subscription = subscription

    def spares(self, message: Any) -> bool:
        """Whether a request does what any holder of the key may do by design, and which would end the others' business.

        Any holder may end a subscription or change its topics, and stop the broker.
        """
        if not isinstance(message, dict):
            return False
        if message.get("do") in ("unsubscribe", "add topics", "drop topics"):
            return message.get("subscription") == self.subscription
        return message.get("do") == "stop" and message.get("timeout") != -1


Attack = Callable[[Target, Random], None]


def strangers(target: Target, choose: Random) -> None:
    """Some connect without a key: random bytes, cut and damaged handshakes, or silence."""
    with contextlib.ExitStack() as stack:
        for _ in range(choose.randint(1, 6)):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(DEADLINE)
            client.connect(target.address)
            if choose.random() < 0.2:
                client.close()  # before the broker's first word
                continue
            challenge = client.recv(1000)
            handshake = client_handshake(choose.choice([b"wrong", bytes(current_process().authkey)]))
            next(handshake)
            said = [challenge, handshake.send(body_of(challenge)), b"", choose.randbytes(300)]
            said += [encode({"do": "stats"}), struct.pack("!i", choose.choice([-1, 0, 256, 257, 1 << 30]))]
            with contextlib.suppress(OSError):
                for _ in range(choose.randint(0, 3)):
                    data = choose.choice(said)
                    client.sendall(damaged(choose, data, said) if choose.random() < 0.7 else data)
                if choose.random() < 0.3:
                    client.shutdown(choose.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))


def requests(target: Target, choose: Random) -> None:
    """One has the key, and asks all that can be asked, damaged, on some connections, with its own and others' numbers."""
    clients = [Rude(target.address) for _ in range(choose.randint(1, 3))]
    try:
        first = clients[0]
        session = first.ask({"do": "attach"})["session"]
        publisher = first.ask({"do": "publisher", "session": session})["publisher"]
        own = [choose.randrange(1, 1 << 48) for _ in range(2)]
        for number in own:
            first.ask(REQUESTS[7] | {"session": session, "publisher": publisher, "subscription": number})
        numbers: dict[str, list[Any]] = {
            "session": [session, session, session, target.session],
            "publisher": [publisher, publisher, target.publisher, None],
            "subscription": [*own, *own, target.subscription, choose.randrange(1, 1 << 48)],
            "token": [0, True],
        }
        seeds = [encode(request) for request in REQUESTS]
        for _ in range(choose.randint(1, 25)):
            message: dict[str, Any] = dict(choose.choice(REQUESTS))
            for name, values in numbers.items():
                if name in message:
                    message[name] = choose.choice(values)
            if choose.random() < 0.6:
                for name in choose.sample([*message, *FIELDS], choose.choice([1, 1, 2])):
                    message[name] = choose.choice(NONSENSE)
            if choose.random() < 0.1:
                message.pop(choose.choice(list(message)))
            body = encode(message)
            if choose.random() < 0.15:
                body = damaged(choose, body, seeds)
                with contextlib.suppress(ControlError):
                    message = decode(body[4:])
            if target.spares(message):
                continue
            client = choose.choice(clients)
            client.send(body)
            reply = client.receive_packet_with_fd(0.02 if message.get("do") in ("drop", "detach", "wait", "flush") else 0.1)
            if reply is not None and "token" in reply:
                numbers["token"].append(reply["token"])
                if choose.random() < 0.5:
                    opened = {"do": "opened", "session": session, "subscription": message.get("subscription")}
                    client.send(encode(opened | {"token": reply["token"]}))
                    client.receive_packet_with_fd(0.1)
            if choose.random() < 0.3:
                client.let_go()
    finally:
        for client in choose.sample(clients, len(clients)):
            client.close()


class Lent:
    """A publisher as the library has it, with a pipe, and perhaps a socket beside it, and a ring."""

    def __init__(self, link: BrokerClient, *, fd_socket: bool) -> None:
        reply = link.request("publisher")
        assert reply.pipe is not None
        self.number = reply.body["publisher"]
        self.pipe = reply.pipe
        self.fd_socket = link.request("fd_socket", publisher=self.number).fd_socket if fd_socket else None

    def write(self, data: bytes) -> None:
        """Write what there is room for, whole or not, unless the broker has closed the pipe."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self.pipe.fd, data)

    def send_packet(self, packet: bytes, *fds: int) -> None:
        """Send a packet with descriptors, if there is room for it, and the broker has not hung up."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        if self.fd_socket is not None:
            with contextlib.suppress(OSError):
                self.fd_socket.sendmsg([packet], rights)

    def ring(self, number: int, seconds: float = DEADLINE) -> None:
        """Share a good ring, and wait until that is answered, but not for longer."""
        descriptor, memory = ring_memory(RING_SIZE)
        self.send_packet(pack(RING, number, 1 << 16), descriptor.fd)
        if self.fd_socket is not None:
            self.fd_socket.wait(seconds)
        memory.close()

    def memory(self, number: int, size: int) -> None:
        """Send the memory of a message."""
        descriptor = message_memory([bytes(size)])
        self.send_packet(pack(MEMORY, 0, number), descriptor.fd)
        descriptor.close()

    def close(self) -> None:
        self.pipe.close()
        if self.fd_socket is not None:
            self.fd_socket.close()


@contextlib.contextmanager
def listening(link: BrokerClient, choose: Random, topics: Sequence[str] = ("fuzz*",)) -> Iterator[tuple[int, Any]]:
    """A subscription of the attacker's own, small or large, open or not: its number, and the reply to its opening."""
    number = choose.randrange(1, 1 << 48)
    link.request(
        "subscribe",
        topics=list(topics),
        overflow=choose.choice(["drop_oldest", "drop_newest", "latest", "disconnect", "block"]),
        capacity=choose.choice([1, 10_000, 1 << 20, 4 << 20, 4 << 20, 4 << 20]),
        replay=0,
        subscription=number,
        publisher=None,
    )
    reply = None
    if choose.random() < 0.8:
        reply = link.request("open", subscription=number, shared=choose.random() < 0.9)
        if choose.random() < 0.9:
            link.request("opened", subscription=number, token=reply.body["token"])
    try:
        yield number, reply
    finally:
        if reply is not None and choose.random() < 0.5:
            for end in (reply.pipe, reply.fd_socket):
                if end is not None:
                    end.close()
        link.request("close", subscription=number)


def frames(target: Target, choose: Random) -> None:
    """One writes damaged streams of all kinds into its publisher's pipe, cut anywhere, with rings and memories beside it."""
    link = BrokerClient(target.address)
    streams = written()
    try:
        with listening(link, choose):
            for _ in range(choose.randint(1, 4)):
                lent = Lent(link, fd_socket=available() and choose.random() < 0.7)
                if choose.random() < 0.8:
                    lent.ring(1)
                for number in range(1, choose.randint(1, 5)):
                    lent.memory(number, choose.choice([0, 2999, 3000, 3000, 3000]))
                stream = b"".join(choose.choices(streams, k=choose.randint(1, 3)))
                if choose.random() < 0.8:
                    stream = damaged(choose, stream, streams, choose.choice([1, 4]))
                for part in cut(choose, stream):
                    lent.write(part)
                ending = choose.randrange(4)
                if ending == 0:
                    link.request("flush", publisher=lent.number, delivered=False, now=True)
                elif ending == 1:
                    link.request("retire", publisher=lent.number)
                lent.close()
    finally:
        link.close()


def beside_publishers(target: Target, choose: Random) -> None:
    """One says nonsense beside its publisher's pipe, with too many descriptors, none, or wrong ones, and refers to them."""
    link = BrokerClient(target.address)
    packets = [pack(kind, number, value) for kind in range(RING, READ + 1) for number in (0, 1, 2) for value in (1, 2, 4096)]
    try:
        with listening(link, choose):
            lent = Lent(link, fd_socket=True)
            for _ in range(choose.randint(1, 20)):
                number = choose.randint(1, 3)
                match choose.randrange(6):
                    case 0:
                        data = choose.choice(packets)
                        lent.send_packet(damaged(choose, data, packets) if choose.random() < 0.7 else data)
                    case 1:
                        with any_file(choose) as fd:
                            chunk = choose.choice([0, 1, 4096, 1 << 16, 1 << 20, 1 << 40, (1 << 64) - 1])
                            packet = pack(RING, number, chunk) if choose.random() < 0.5 else pack(MEMORY, 0, number)
                            lent.send_packet(packet, *[fd] * choose.choice([0, 1, 1, 1, 2, 3, 50]))
                    case 2:
                        lent.ring(number, 0.02)
                    case 3:
                        lent.memory(number, choose.choice([0, 1, 3000, 70_000]))
                    case 4:
                        # No ring again that another one followed: see test_references_into_a_ring_that_is_done_with.
                        offset, length = choose.randrange(RING_SIZE), choose.choice([0, 1, 3000, 70_000])
                        lent.write(reference_frame(1, offset, length, b"fuzz", 0, choose.random() < 0.2))
                    case _:
                        length = choose.choice([0, 1, 3000, 70_000, 0xFFFF_0000])
                        lent.write(memory_frame(number, length, b"fuzz") if choose.random() < 0.8 else abort(number))
                if choose.random() < 0.05:
                    with contextlib.suppress(OSError):
                        again = link.request("fd_socket", publisher=lent.number).fd_socket
                        if again is not None:
                            again.close()
            lent.close()
    finally:
        link.close()


def beside_channels(target: Target, choose: Random) -> None:
    """One that subscribes lies about what it has mapped and read, sends descriptors, reads a part, and goes at any moment."""
    link = BrokerClient(target.address)
    bus: Broadcaster[Any] = connect(target.address)
    kinds = (MAPPED, READ, REFUSED, ACCEPTED, WANTED)
    packets = [pack(kind, number, value) for kind in kinds for number in range(4) for value in (0, 9)]
    try:
        with bus.subscribe("fuzz", overflow="drop_oldest") as healthy, listening(link, choose) as (_, reply):
            healthy.poll(0)
            for number in range(choose.randint(1, 15)):
                with contextlib.suppress(TimeoutError):
                    bus.publish((number, bytes(choose.choice([10, 5000, 100_000, 3 << 20]))), topic="fuzz", timeout=0)
                if reply is None or reply.fd_socket is None:
                    continue
                data = choose.choice([*packets, pack(READ, 0, choose.choice([1, 5, 1 << 40]))])
                data = damaged(choose, data, packets) if choose.random() < 0.2 else data
                with any_file(choose) as fd, contextlib.suppress(OSError):
                    fds = [fd] * choose.choice([0, 0, 0, 1, 3])
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
                    reply.fd_socket.sendmsg([data], rights)
                with contextlib.suppress(OSError):  # the broker may have ended the subscription meanwhile
                    while choose.random() < 0.5 and (heard := reply.fd_socket.receive_packet_with_fd()) is not None:
                        if heard[0] and heard[0][0] == RING and choose.random() < 0.8:
                            reply.fd_socket.send_packet(pack(MAPPED, unpack(heard[0]).ring))
                if choose.random() < 0.4 and reply.pipe is not None:
                    with contextlib.suppress(BlockingIOError):
                        os.read(reply.pipe.fd, choose.choice([1, 100, 1 << 18]))
                if choose.random() < 0.05:
                    reply.fd_socket.close()
                    break
    except BroadcastError as error:
        raise AssertionError(f"the attacker's own broadcaster has broken: {error}") from error
    finally:
        bus.close()
        link.close()


ROUNDS: Final[dict[Attack, int]] = {strangers: 50, requests: 6, frames: 40}
if available():
    ROUNDS.update({beside_publishers: 40, beside_channels: 20})


def attack_in_rounds(attack: Attack, target: Target, seconds: float, counter: Counter) -> None:
    """In a process of its own: round by round, for so many seconds, or else a fixed number of rounds."""
    deadline = time.monotonic() + seconds
    for number in itertools.count(1):
        if time.monotonic() >= deadline if seconds else number > ROUNDS[attack]:
            break
        counter.value = number
        attack(target, Random(f"{SEED} {attack.__name__} {number}"))


@pytest.fixture(params=[False, True], ids=["", "with history"])
def attacked(request: pytest.FixtureRequest, leaves_nothing: None) -> Iterator[Broadcaster[Any]]:
    """A broadcaster, whose broker keeps a history or does not."""
    bus: Broadcaster[Any] = start_broadcaster(history=3 if request.param else 0)
    yield bus
    bus.close(timeout=2.0)


class Business:
    """A publisher and a subscriber whose messages, of all sizes, must all come, in order."""

    def __init__(self, bus: Broadcaster[Any], channel: Channel[Any]) -> None:
        self._bus = bus
        self._channel = channel
        self._number = 0

    def go_on(self) -> None:
        """Some more messages."""
        first = self._number
        for size in (10, 10, 5000, 30_000, 300_000, 3 << 20 if first % 100 == 0 else 0):
            self._bus.publish((self._number, bytes(size)), topic=TOPIC, timeout=DEADLINE)
            self._number += 1
        for number in range(first, self._number):
            assert self._channel.recv(timeout=DEADLINE)[0] == number


def quiet(broker: psutil.Process) -> bool:
    """Whether the broker rests: it uses no processor in a moment in which nobody wants anything."""
    before = sum(broker.cpu_times()[:2])
    time.sleep(0.1)
    return sum(broker.cpu_times()[:2]) - before < 0.03


def first_numbers(bus: Broadcaster[Any]) -> tuple[int, int]:
    """The session and the publisher of the only handle, as the broker counts: from 1 on."""
    probe = Rude(bus.address)
    try:
        publishers = [n for n in range(1, 9) if probe.ask({"do": "fd_socket", "publisher": n}).get("error") != "lost"]
        own = probe.ask({"do": "publisher", "session": 1})["publisher"]
        probe.ask({"do": "retire", "publisher": own})
        return 1, *publishers  # type: ignore[return-value]
    finally:
        probe.close()


@pytest.mark.timeout(60 + 2 * SOAK)
@pytest.mark.parametrize("attack", ROUNDS, ids=lambda attack: attack.__name__)
def test_a_broker_under_attack(attack: Attack, attacked: Broadcaster[Any], fork: BaseContext, children: Children) -> None:
    """The broker lives on and serves others, in order; afterwards it rests, and has no memory and no descriptor of it left."""
    counter = Counter()
    with attacked.subscribe(TOPIC) as channel:
        business = Business(attacked, channel)
        for _ in range(3):
            business.go_on()
        target = Target(attacked.address, *first_numbers(attacked), channel.id)
        broker = psutil.Process(attacked.stats().pid)
        held, memory = descriptors(broker.pid), broker.memory_info().rss
        seconds = SOAK / len(ROUNDS) / 2
        attacker = children(fork, attack_in_rounds, attack, target, seconds, counter)
        try:
            while attacker.is_alive():
                business.go_on()
                assert broker.memory_info().rss - memory < PEAK
                assert descriptors(broker.pid) - held < 400
            attacker.join()
            assert attacker.exitcode == 0
            business.go_on()
            if attacked.stats().history_topics:
                for number in range(MOST_TOPICS):  # so that nothing of the attacker's is in the history any more
                    attacked.publish(None, topic=f"another {number}")
                attacked.flush(timeout=DEADLINE)
            wait_until(lambda: descriptors(broker.pid) <= held)
            assert [row.topics for row in attacked.stats().subscribers] == [(TOPIC,)]
            assert attacked.stats().publishers == 1
            assert broker.memory_info().rss - memory < GROWTH
            wait_until(lambda: quiet(broker))
            assert attacked.stats().pid == broker.pid
        except BaseException:
            print(f"{attack.__name__}: round {counter.value} of seed {SEED}")
            raise


# ------------------------------------------------------------------------------------------ what this has found, one by one


def test_who_has_gone_before_it_is_let_in(own_broker: Broker, tmp_path: Path) -> None:
    """A client that has connected and closed before the broker comes to it is forgotten at once."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
    before = open_files()
    own_broker.loop.round()
    own_broker.loop.close_forgotten()
    assert open_files() == before


def test_who_waits_and_goes(bus: Broadcaster[Any]) -> None:
    """One that waits for subscribers, and goes the moment that they come, does not end the broker."""
    clients = [Rude(bus.address) for _ in range(3)]
    waits, other, subscriber = clients
    try:
        sessions = [client.ask({"do": "attach"})["session"] for client in clients]
        subscribe = REQUESTS[7] | {"publisher": None}
        waits.ask(subscribe | {"session": sessions[0], "topics": ["one"]})
        waits.send(encode({"do": "wait", "count": 2}))
        other.send(encode({"do": "wait", "count": 1, "topic": "two"}))
        pid = bus.stats().pid
        with stopped(pid):
            subscriber.send(encode(subscribe | {"session": sessions[2], "topics": ["two"], "subscription": 4}))
            waits.close()
        assert subscriber.receive_packet_with_fd() == {}
        assert other.receive_packet_with_fd() == {"done": True}
        assert bus.stats().pid == pid
    finally:
        for client in clients:
            client.close()


def test_who_opens_two_and_goes(bus: Broadcaster[Any]) -> None:
    """Channels that one connection has begun to open, and not opened, are unopened when it goes: all of them."""
    one, other = Rude(bus.address), Rude(bus.address)
    try:
        session = one.ask({"do": "attach"})["session"]
        mine = REQUESTS[7] | {"session": session, "publisher": None}
        for number in (3, 4):
            one.ask(mine | {"subscription": number})
        held = descriptors(bus.stats().pid)
        for number in (3, 4):
            other.ask({"do": "open", "session": session, "subscription": number, "shared": True})
        other.close()
        wait_until(lambda: descriptors(bus.stats().pid) < held, timeout=0.5)
    finally:
        one.close()
        other.close()


@shares_memory
def test_references_into_a_ring_that_is_done_with(bus: Broadcaster[Any]) -> None:
    """Who goes back to a ring that it has left is refused; its rings are forgotten, so that others can have some."""
    answers = [answers_to_two_rings(bus) for _ in range(5)]
    assert answers == [[pack(ACCEPTED, 1), pack(ACCEPTED, 2)]] * 5


def answers_to_two_rings(bus: Broadcaster[Any]) -> list[bytes]:
    """What a publisher hears that shares two large rings, refers to the one, the other, and the one again, and goes."""
    link = BrokerClient(bus.address)
    lent = Lent(link, fd_socket=True)
    assert lent.fd_socket is not None
    answers = []
    for number in (1, 2):
        descriptor, memory = ring_memory(1 << 24)
        memory.close()
        lent.send_packet(pack(RING, number, 1 << 18), descriptor.fd)
        assert lent.fd_socket.wait(DEADLINE)
        answers.append(lent.fd_socket.recv(64))
    lent.write(b"".join(reference_frame(number, 100 * index, 100, b"nobody") for index, number in enumerate((1, 2, 1))))
    lent.close()
    link.close()
    wait_until(lambda: bus.stats().publishers == 0)
    return answers


def test_a_publisher_is_ended_by_its_own_process_only(bus: Broadcaster[Any], fork: BaseContext, children: Children) -> None:
    """Another process that names a publisher's number does not end it."""
    assert outlives(bus, lambda number: children(fork, retire, bus.address, number).join())


def outlives(bus: Broadcaster[Any], attack: Callable[[int], None]) -> bool:
    """Whether a publisher can write after an attack on its number."""
    link = BrokerClient(bus.address)
    lent = Lent(link, fd_socket=False)
    try:
        attack(lent.number)
        os.write(lent.pipe.fd, frame_head(0, b"nobody"))
    except BrokenPipeError:
        return False
    finally:
        lent.close()
        link.close()
    return True


def retire(address: str, publisher: int) -> None:
    """Ask for the end of somebody's publisher."""
    client = Rude(address)
    client.ask({"do": "retire", "publisher": publisher})
    client.close()


def test_very_deep_requests(bus: Broadcaster[Any]) -> None:
    """Values as deep as can just be read, or just not, are answered or refused, wherever they stand."""
    client = Rude(bus.address)
    pid = bus.stats().pid
    try:
        least, most = 1, 100_000  # the first is read, the other is not
        while most - least > 1:
            middle = (least + most) // 2
            if deep(client, "nothing", middle):
                least = middle
            else:
                most = middle
                client.close()
                client = Rude(bus.address)
        for field in ("do", "capacity"):
            for depth in range(least - 12, least + 1):
                assert deep(client, field, depth)
        assert bus.stats().pid == pid
    finally:
        client.close()


def deep(client: Rude, field: str, depth: int) -> bool:
    """Whether a request is answered in which this field is so deep."""
    do = "subscribe" if field == "capacity" else "explode"
    fields = {"do": json.dumps(do), "topics": '["fuzz"]', field: "[" * depth + "]" * depth}
    body = ",".join(f'"{name}":{value}' for name, value in fields.items()).encode()
    client.send(struct.pack("!i", len(body) + 2) + b"{" + body + b"}")
    return client.receive_packet_with_fd() is not None


@shares_memory
def test_an_empty_message_in_memory(bus: Broadcaster[Any]) -> None:
    """A message of no bytes in memory of its own is one error at its subscribers, which then go on."""
    error, behind = outcomes_behind_an_empty_one(bus)
    assert error in ("RuntimeError", "OSError")
    assert behind == "behind it"


def outcomes_behind_an_empty_one(bus: Broadcaster[Any]) -> list[Any]:
    """What a channel gives: two messages, or the names of their errors."""
    with bus.subscribe("") as channel:
        channel.fileno()
        link = BrokerClient(bus.address)
        lent = Lent(link, fd_socket=True)
        lent.memory(1, 0)
        lent.write(memory_frame(1, 0, b""))
        link.request("flush", publisher=lent.number, delivered=False, now=False)
        lent.close()
        link.close()
        bus.publish("behind it")
        return [outcome(channel) for _ in range(2)]


def outcome(channel: Channel[Any]) -> Any:
    """The next message, or the name of its error."""
    try:
        return channel.recv(timeout=DEADLINE)
    except Exception as error:
        return type(error).__name__


def test_a_log_that_nobody_reads(leaves_nothing: None) -> None:
    """One whose rude messages fill the log does not hold up a broker whose standard error is a pipe that nobody reads."""
    assert answers_with_a_full_log()


def answers_with_a_full_log() -> bool:
    """Whether a broker answers, once a publisher has made it log more than its standard error takes."""
    reader, writer = os.pipe()
    own = os.dup(2)
    os.dup2(writer, 2)
    try:
        bus: Broadcaster[Any] = start_broadcaster(context=multiprocessing.get_context("fork"))
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(writer)
    link = BrokerClient(bus.address)
    lent = Lent(link, fd_socket=False)
    for number in range(1000):
        lent.write(frame_head(0, bytes([0xFE + number % 2])))
    lent.close()
    asked = Background(bus.stats)
    asked.join(0.5)
    answered = not asked.is_alive()
    os.close(reader)  # which lets it go on
    asked.result()
    link.close()
    bus.close(timeout=2.0)
    return answered


@shares_memory
def test_many_references_to_the_same_memory(own_broker: Broker) -> None:
    """A few kilobytes of references do not make the broker copy gigabytes: a second one to the same bytes is refused."""
    asker = cast("ControlConnection", Asker(Peer(PeerProcess(os.getpid()))))
    session = own_broker.new_session(asker)
    own_broker.add_subscription(3, session, ["fuzz"], 1 << 16, "drop_oldest")
    publisher, pipe = own_broker.traffic.intake.add(own_broker.number(), session)
    fd_socket = DescriptorSocket(own_broker.traffic.memory.add(publisher))
    descriptor, memory = ring_memory(RING_SIZE)
    fd_socket.send_packet(pack(RING, 1, 1 << 16), descriptor.fd)
    own_broker.loop.round()
    os.write(pipe, reference_frame(1, 0, RING_SIZE, b"fuzz") * 150)
    own_broker.traffic.round()
    routed = own_broker.traffic.routing.routed
    os.close(pipe)
    fd_socket.close()
    descriptor.close()
    memory.close()
    assert routed == 1
