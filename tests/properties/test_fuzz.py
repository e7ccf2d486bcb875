"""Bytes and objects that no client sends, at every pipe and socket of a living broker; the parsers have files of their own. All
is decided by ``MPBROADCAST_SEED``, which is printed; the attacks go on for ``MPBROADCAST_SOAK`` seconds, all together."""

import contextlib
import itertools
import multiprocessing
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
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
from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.shared_memory import available, ring_memory
from mpbroadcast.posix.waiting import Wait
from mpbroadcast.protocol.control import client_handshake, encode
from mpbroadcast.protocol.fd_packets import ACCEPTED, MAPPED, MEMORY, READ, REFUSED, RING, WANTED, pack, unpack
from mpbroadcast.protocol.frames import abort, frame_head, memory_frame, pieces, reference_frame
from tests.support.frames_made import damaged
from tests.support.helpers import DEADLINE, Background, Children, wait_until
from tests.support.rude import RING_SIZE, Lent, Rude, any_file, shares_memory
from tests.support.victims import descriptors, shared_counter

SEED: Final = int(os.environ.get("MPBROADCAST_SEED", "1"))
SOAK: Final = float(os.environ.get("MPBROADCAST_SOAK", "0"))
GROWTH: Final = 48 << 20  # bytes by which a broker's memory may differ before an attack and after it
PEAK: Final = 192 << 20  # and in the middle of it: what attackers do not read waits, up to their capacities
TOPIC: Final = "the others' " + os.urandom(8).hex()  # that no attacker finds by chance


def streams() -> list[bytes]:
    """What publishers write: small frames, pieces, mixed and aborted, and what refers to shared memory."""
    topic = b"fuzz"
    plain = [frame_head(size, topic, exclude) + bytes(size) for size in (0, 1, 30, 30, 30) for exclude in (0, 7)]
    frame = frame_head(10_000, topic) + bytes(10_000)
    first, second = list(pieces(frame, 1)), list(pieces(frame, 2))
    references = [reference_frame(1, offset << 10, 1 + offset * 50, topic, 0) for offset in range(40)]
    memories = [memory_frame(number, 3000, topic, 0, number % 2 == 0) for number in range(1, 5)]
    return [
        b"".join(plain),
        (frame_head(40, topic) + b"x" * 40) * 100,
        b"".join(first),
        b"".join(itertools.chain(*zip(first, second, strict=True))),
        b"".join([*first[:2], abort(1), *plain]),
        b"".join(references),
        b"".join(memories),
        b"".join([plain[0], references[0], memories[0], abort(3), references[1], *second]),
    ]


Attack = Callable[[str, Random], None]


def strangers(address: str, choose: Random) -> None:
    """Connect without a key: random bytes, cut and damaged handshakes, or silence."""
    with contextlib.ExitStack() as stack:
        for _ in range(choose.randint(1, 6)):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(DEADLINE)
            client.connect(address)
            if choose.random() < 0.2:
                client.close()  # before the broker's first message
                continue
            challenge = client.recv(1000)
            handshake = client_handshake(choose.choice([b"wrong", bytes(current_process().authkey)]))
            next(handshake)
            messages = [challenge, handshake.send(challenge[4:]), b"", choose.randbytes(300), encode({"do": "stats"})]
            messages.append(struct.pack("!i", choose.choice([-1, 0, 256, 257, 1 << 30])))
            with contextlib.suppress(OSError):
                for _ in range(choose.randint(0, 3)):
                    data = choose.choice(messages)
                    client.sendall(damaged(choose, data, messages) if choose.random() < 0.7 else data)
                if choose.random() < 0.3:
                    client.shutdown(choose.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))


@contextlib.contextmanager
def subscribed(link: BrokerClient, choose: Random) -> Iterator[Any]:
    """A subscription of the attacker's own, small or large, open or not: the reply to its opening."""
    number = choose.randrange(1, 1 << 48)
    policy = choose.choice(["drop_oldest", "drop_newest", "latest", "disconnect", "block"])
    capacity = choose.choice([1, 10_000, 1 << 20, 4 << 20, 4 << 20, 4 << 20])
    more: dict[str, Any] = {"topics": ["fuzz*"], "replay": 0, "prefetch": 1, "subscription": number, "publisher": None}
    link.request("subscribe", overflow=policy, capacity=capacity, **more)
    reply = None
    if choose.random() < 0.8:
        reply = link.request("open", subscription=number, shared=choose.random() < 0.9)
        if choose.random() < 0.9:
            link.request("opened", subscription=number, token=reply.body["token"])
    try:
        yield reply
    finally:
        if reply is not None and choose.random() < 0.5:
            for end in (reply.pipe, reply.fd_socket):
                if end is not None:
                    end.close()
        link.request("close", subscription=number)


def frames(address: str, choose: Random) -> None:
    """Write damaged streams of all kinds into a publisher's pipe, cut anywhere, with rings and memories beside it."""
    link = BrokerClient(address)
    made = streams()
    with contextlib.closing(link), subscribed(link, choose):
        for _ in range(choose.randint(1, 4)):
            lent = Lent(link, fd_socket=available() and choose.random() < 0.7)
            if choose.random() < 0.8:
                lent.ring(1)
            for number in range(1, choose.randint(1, 5)):
                lent.memory(number, choose.choice([0, 2999, 3000, 3000, 3000]))
            stream = b"".join(choose.choices(made, k=choose.randint(1, 3)))
            if choose.random() < 0.8:
                stream = damaged(choose, stream, made, choose.choice([1, 4]))
            while stream:
                length = choose.choice([1, 7, 100, 5000, len(stream)])
                lent.write(stream[:length])
                stream = stream[length:]
            ending = choose.randrange(4)
            if ending == 0:
                link.request("flush", publisher=lent.number, delivered=False, now=True)
            elif ending == 1:
                link.request("retire", publisher=lent.number)
            lent.close()


def beside_publishers(address: str, choose: Random) -> None:
    """Send nonsense beside a publisher's pipe, with too many descriptors, none, or wrong ones, and refer to them."""
    link = BrokerClient(address)
    packets = [pack(kind, number, value) for kind in range(RING, READ + 1) for number in (0, 1, 2) for value in (1, 2, 4096)]
    with contextlib.closing(link), subscribed(link, choose):
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
                    # No ring again that another one followed: see test_references_that_are_refused.
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


def beside_channels(address: str, choose: Random) -> None:
    """Lie about what a subscription has mapped and read, send descriptors, read a part, and go at any moment."""
    link = BrokerClient(address)
    bus: Broadcaster[Any] = connect(address)
    kinds = (MAPPED, READ, REFUSED, ACCEPTED, WANTED)
    packets = [pack(kind, number, value) for kind in kinds for number in range(4) for value in (0, 9)]
    try:
        with bus.subscribe("fuzz", overflow="drop_oldest") as healthy, subscribed(link, choose) as reply:
            healthy.poll(0)
            for number in range(choose.randint(1, 15)):
                with contextlib.suppress(TimeoutError):
                    bus.publish((number, bytes(choose.choice([10, 5000, 100_000, 3 << 20]))), topic="fuzz", timeout=0)
                if reply is None or reply.fd_socket is None:
                    continue
                data = choose.choice([*packets, pack(READ, 0, choose.choice([1, 5, 1 << 40]))])
                data = damaged(choose, data, packets) if choose.random() < 0.2 else data
                with contextlib.suppress(OSError):  # the broker may have ended the subscription meanwhile
                    with any_file(choose) as fd:
                        socket.send_fds(reply.fd_socket, [data], [fd] * choose.choice([0, 0, 0, 1, 3]))
                    while choose.random() < 0.5 and (packet := reply.fd_socket.receive_packet_with_fd()) is not None:
                        if packet[0] and packet[0][0] == RING and choose.random() < 0.8:
                            reply.fd_socket.send_packet(pack(MAPPED, unpack(packet[0])[1]))
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


# Each with the history of its broker, and how many rounds.
ATTACKS: Final[dict[Attack, tuple[int, int]]] = {strangers: (0, 50), frames: (3, 40)}
if available():
    ATTACKS.update({beside_publishers: (3, 40), beside_channels: (0, 20)})


def attack_in_rounds(attack: Attack, address: str, counter: memoryview) -> None:
    """Attack round by round for so many seconds, or else a fixed number of rounds: in a process of its own."""
    deadline = time.monotonic() + SOAK / len(ATTACKS)
    for number in itertools.count(1):
        if time.monotonic() >= deadline if SOAK else number > ATTACKS[attack][1]:
            break
        counter[0] = number
        attack(address, Random(f"{SEED} {attack.__name__} {number}"))


def do_business(bus: Broadcaster[Any], channel: Channel[Any], turns: Iterator[int]) -> None:
    """Publish messages of all sizes, which must all come, in order."""
    turn = next(turns)
    for number, size in enumerate((10, 10, 5000, 30_000, 300_000, 3 << 20 if turn % 50 == 0 else 0)):
        bus.publish((turn, number, bytes(size)), topic=TOPIC, timeout=DEADLINE)
    for number in range(6):
        assert channel.recv(timeout=DEADLINE)[:2] == (turn, number)


def rests(broker: psutil.Process) -> bool:
    """Whether the broker uses no processor in a moment in which it has no requests."""
    before = sum(broker.cpu_times()[:2])
    time.sleep(0.1)
    return sum(broker.cpu_times()[:2]) - before < 0.03


@pytest.mark.timeout(60 + 2 * SOAK)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_broker_under_attack(attack: Attack, leaves_nothing: None, fork: BaseContext, children: Children) -> None:
    """The broker lives on and serves others, in order; afterwards it rests, and has no memory and no descriptor of it left."""
    counter = shared_counter()
    bus: Broadcaster[Any] = start_broadcaster(history=ATTACKS[attack][0])
    with contextlib.closing(bus), bus.subscribe(TOPIC) as channel:
        go_on = partial(do_business, bus, channel, itertools.count())
        for _ in range(3):
            go_on()
        broker = psutil.Process(bus.stats().pid)
        held, memory = descriptors(broker.pid), broker.memory_info().rss
        attacker = children(fork, attack_in_rounds, attack, bus.address, counter)
        try:
            while attacker.is_alive():
                go_on()
                assert broker.memory_info().rss - memory < PEAK
                assert descriptors(broker.pid) - held < 400
            attacker.join()
            assert attacker.exitcode == 0
            go_on()
            if bus.stats().history_topics:
                for number in range(MOST_TOPICS):  # so that nothing of the attacker's is in the history any more
                    bus.publish(None, topic=f"another {number}")
                bus.flush(timeout=DEADLINE)
            wait_until(lambda: descriptors(broker.pid) <= held)
            assert [row.topics for row in bus.stats().subscribers] == [(TOPIC,)]
            assert bus.stats().publishers == 1
            assert broker.memory_info().rss - memory < GROWTH
            wait_until(lambda: rests(broker))
            assert bus.stats().pid == broker.pid
        except BaseException:
            print(f"{attack.__name__}: round {counter[0]} of MPBROADCAST_SEED={SEED}")
            raise


@pytest.fixture
def lives_on(bus: Broadcaster[Any]) -> Iterator[Broadcaster[Any]]:
    """A broadcaster whose broker must be the same at the end."""
    pid = bus.stats().pid
    yield bus
    assert bus.stats().pid == pid


@shares_memory
@pytest.mark.parametrize(("ring", "offset"), [(1, 200), (2, (1 << 24) - 50), (2, 150), (3, 0)])
def test_references_that_are_refused(ring: int, offset: int, lives_on: Broadcaster[Any]) -> None:
    """To a ring that was left, beyond the end of one, to bytes of another message, to no ring: their publisher is closed. Its
    rings are forgotten, so that others can have some."""
    for _ in range(5):
        with contextlib.closing(BrokerClient(lives_on.address)) as link:
            lent = Lent(link, fd_socket=True)
            assert lent.fd_socket is not None
            for number in (1, 2):
                descriptor, memory = ring_memory(1 << 24)
                memory.close()
                lent.send_packet(pack(RING, number, 1 << 18), descriptor.fd)
                assert Wait(Deadline(DEADLINE), IN, lent.fd_socket).block()
                assert lent.fd_socket.recv(64) == pack(ACCEPTED, number)
            positions = [(1, 0), (2, 100), (ring, offset)]
            lent.write(b"".join(reference_frame(number, start, 100, b"fuzz") for number, start in positions))
            wait_until(lambda: lives_on.stats().publishers == 0)
            lent.close()


def test_a_publisher_is_ended_by_its_own_process_only(
    lives_on: Broadcaster[Any], fork: BaseContext, children: Children
) -> None:
    """Another process that names a publisher's number does not end it."""
    link = BrokerClient(lives_on.address)
    lent = Lent(link, fd_socket=False)
    children(fork, retire, lives_on.address, lent.number).join()
    os.write(lent.pipe.fd, frame_head(0, b"fuzz"))  # else BrokenPipeError
    lent.close()
    link.close()


def retire(address: str, publisher: int) -> None:
    with contextlib.closing(Rude(address)) as client:
        client.ask({"do": "retire", "publisher": publisher})


def test_very_deep_requests(lives_on: Broadcaster[Any]) -> None:
    """Values at the depth that is read, and far beyond it, are answered, or end the connection, in whatever field they are."""
    for depth, is_answered in ((15, True), (33, False), (100_000, False)):
        for field in ("do", "capacity", "none"):
            with contextlib.closing(Rude(lives_on.address)) as client:
                fields = {"do": '"subscribe"', "topics": '["fuzz"]', field: "[" * depth + "]" * depth}
                body = ",".join(f'"{name}":{value}' for name, value in fields.items()).encode()
                client.send(struct.pack("!i", len(body) + 2) + b"{" + body + b"}")
                assert (client.reply() is not None) == is_answered


def test_a_log_that_nobody_reads(leaves_nothing: None) -> None:
    """Rude messages that fill the log do not hold up a broker whose standard error is a pipe that is never read."""
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
    os.close(reader)  # so that it goes on in any case
    asked.result()
    link.close()
    bus.close(timeout=2.0)
    assert answered
