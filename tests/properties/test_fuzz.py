"""Bytes and objects that nobody should send, at every place where a broker takes in what another process has sent.

What the parsers alone do with them is in the other modules of this folder.

All is decided by ``MPBROADCAST_SEED``, which is printed; ``MPBROADCAST_SOAK=<seconds>`` lets the attacks on a broker go on for
so long, all of them together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import current_process
from multiprocessing.context import BaseContext
from random import Random
from typing import Any, Final

import psutil
import pytest

from mpbroadcast import Broadcaster, BroadcastError, Channel, connect, start_broadcaster
from mpbroadcast.broker.core.history import MOST_TOPICS
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.deadline import Deadline
from mpbroadcast.posix.shared_memory import available, ring_memory
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
from tests.support.helpers import DEADLINE, Background, Children, stopped, wait_until
from tests.support.rude import RING_SIZE, Lent, Rude, any_file, shares_memory
from tests.support.victims import Counter, descriptors

SEED: Final = int(os.environ.get("MPBROADCAST_SEED", "1"))
SOAK: Final = float(os.environ.get("MPBROADCAST_SOAK", "0"))
GROWTH: Final = 48 << 20  # bytes by which a broker's memory may differ before an attack and after it
PEAK: Final = 192 << 20  # and in the middle of it: what attackers do not read waits, up to their capacities
TOPIC: Final = "the others' " + os.urandom(8).hex()  # that no attacker finds by chance


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


FIELDS: Final = sorted({field for request in REQUESTS for field in request} - {"do"})


def anything(choose: Random, depth: int = 3) -> Any:
    """Some nonsense, or a list or an object of more."""
    kind = choose.random()
    if depth and kind < 0.15:
        return [anything(choose, depth - 1) for _ in range(choose.randrange(4))]
    if depth and kind < 0.3:
        return {choose.choice(["do", *FIELDS, "x"]): anything(choose, depth - 1) for _ in range(choose.randrange(4))}
    return choose.choice(NONSENSE)


# ------------------------------------------------------------------------------------------------------------ attacks


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
                    message[name] = anything(choose)
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
                            reply.fd_socket.send_packet(pack(MAPPED, unpack(heard[0])[1]))
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
        assert lent.fd_socket.wait(Deadline(DEADLINE))
        answers.append(lent.fd_socket.recv(64))
    lent.write(b"".join(reference_frame(number, 100 * index, 100, b"nobody") for index, number in enumerate((1, 2, 1))))
    lent.close()
    link.close()
    wait_until(lambda: bus.stats().publishers == 0)
    return answers


def test_each_field_of_each_request_wrong(bus: Broadcaster[Any]) -> None:
    """Whatever stands in one field of a request, the broker answers or refuses it, and lives on."""
    pid = bus.stats().pid
    for request in REQUESTS[:-1]:
        for field in request:
            client = Rude(bus.address)
            session = client.ask({"do": "attach"})["session"]
            mine = (
                request | ({"session": session} if "session" in request else {}) | ({"now": True} if "now" in request else {})
            )
            client.send(b"".join(encode(mine | {field: value}) for value in NONSENSE) + encode({"do": "stats"}))
            while "published" not in (client.receive_packet_with_fd(0.3) or {"published": "no reply: it waits"}):
                pass
            client.close()
    assert bus.stats().pid == pid


def test_a_publisher_is_ended_by_its_own_process_only(bus: Broadcaster[Any], fork: BaseContext, children: Children) -> None:
    """Another process that names a publisher's number does not end it."""
    link = BrokerClient(bus.address)
    lent = Lent(link, fd_socket=False)
    children(fork, retire, bus.address, lent.number).join()
    os.write(lent.pipe.fd, frame_head(0, b"nobody"))  # else BrokenPipeError
    lent.close()
    link.close()


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


def test_a_log_that_nobody_reads(leaves_nothing: None) -> None:
    """One whose rude messages fill the log does not hold up a broker whose standard error is a pipe that nobody reads."""
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
    assert answered
