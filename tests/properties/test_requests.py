"""Requests in any order, of three processes that have the key, to a broker in this process, which runs round by round.

No client of this package sends them so: the same request twice, an opening while its channel is being removed, descriptors that
are closed in the middle, a process that dies between two parts. No order may end the broker, break what it counts, or leave
anything behind once all sessions have ended.

``MPBROADCAST_SEED`` has other orders, and ``MPBROADCAST_SOAK`` seconds more of them.
"""

import contextlib
import gc
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.limits import SESSION, Cost
from mpbroadcast.broker.host.journal import Journal, Succession
from mpbroadcast.broker.members import Publisher, Session, Subscription
from mpbroadcast.broker.outbox import BridgeReader
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import Broker
from mpbroadcast.posix.shared_memory import available, ring_memory
from mpbroadcast.protocol.control import Inbox, client_handshake, decode, encode
from mpbroadcast.protocol.fd_packets import MAPPED, READ, REFUSED, RING, WANTED, pack
from mpbroadcast.protocol.frames import Arrival, Cursor, bridge_frame, frame_head, pieces, reference_frame
from mpbroadcast.protocol.reports import report
from tests.conftest import descriptors as open_files
from tests.support.helpers import wait_until
from tests.support.own_broker import ask, asking, held, own_broker, subscribing

__all__ = ["own_broker"]

SEED: Final = int(os.environ.get("MPBROADCAST_SEED", "1"))
SOAK: Final = float(os.environ.get("MPBROADCAST_SOAK", "0"))
RUNS: Final = 6
STEPS: Final = 400  # of one run
KEY: Final = b"key"
TOPICS: Final = ("", "a", "b", "a:1", "a:*", "[ab]", "*")
MANY: Final = [f"many {index}" for index in range(2500)]  # a request in parts
GROUPS: Final = (None, "block", "drop_oldest", "drop_newest", "latest", "disconnect")  # of a policy, mostly
POLICIES: Final = ("block", "block", "drop_oldest", "drop_newest", "latest", "disconnect")
OF_THE_BROKER: Final = (Subscription, Publisher, Session, ControlConnection)
SOCKETS: Final = 12  # of a process
OFTEN: Final = {"subscribe": 4, "open": 3, "opened": 4, "attach": 2, "publisher": 2, "stats": 2, "bridge": 2}
SELDOM: Final = ("fd_socket", "retire", "flush", "add topics", "drop topics", "unsubscribe", "close", "drop", "wait", "detach",
                 "history", "bridge end", "bridge report", "bridge flushed", "bridge forget", "newest", "settle",
                 "probe")  # fmt: skip
REQUESTS: Final = OFTEN | dict.fromkeys(SELDOM, 0.7)
STEP: Final = {"ask": 12, "publish": 4, "receive": 2, "round": 8, "connect": 1, "send_packet": 1, "read_replies": 1,
               "report": 1, "hang_up": 0.1, "close_something": 1, "kill": 0.01, "stop": 0.003}  # fmt: skip


NONSENSE: Final[list[Any]] = [
    None, True, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, -(2**70), 10**4000, 1.5, 1e308, float("nan"), float("inf"), "", "x",
    "a\0b", "\ud800", "x" * 1025, "é" * 512, "[", "fuzz:[!", "fuzz:[z-a]*", "fuzz" + "*a" * 500, [], ["fuzz"], ["x", 5, None],
    [[]], ["fuzz"] * 1000, {}, {"do": "stop"}, {"": {}}, "block", "latest", "disconnect", "stats", "subscribe",
]  # fmt: skip


def request(do: str, session: int, publisher: int | None, subscription: int) -> dict[str, Any]:
    """A good request with the fields of all requests: a handler ignores those of others."""
    topics = {"topics": ["fuzz:[a-c]?", "fuzz"], "capacity": 1 << 16, "overflow": "drop_oldest", "replay": 0}
    topics |= {"group": None, "prefetch": 1, "after": None, "limit": 3}
    flags = {"delivered": True, "now": True, "shared": True, "token": 4, "count": 1, "topic": "fuzz"}
    bridge = {"stream": "s", "reader": None, "turn": True, "forget": True, "url": "u", "state": "up", "error": None}
    numbers = {"session": session, "publisher": publisher, "subscription": subscription, "refused": 0, "lag": None}
    return {"do": do, **numbers, **topics, **flags, **bridge}


class Process:
    """A process that has connected some times, and does nothing else: its connections are used here."""

    def __init__(self, address: str) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.pid = os.fork()
        if not self.pid:
            try:
                here.close()
                made = [socket.socket(socket.AF_UNIX) for _ in range(SOCKETS)]
                for one in made:
                    one.connect(address)
                    socket.send_fds(there, [b"x"], [one.fileno()])
                    one.close()
                signal.pause()
            finally:
                os._exit(0)
        there.close()
        with here:
            self.sockets = [socket.socket(fileno=socket.recv_fds(here, 1, 1)[1][0]) for _ in range(SOCKETS)]

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


class Client:
    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.socket = connection
        self.pid = pid
        self.socket.setblocking(False)
        self.inbox = Inbox(1 << 30)
        self.handshake = client_handshake(KEY)
        next(self.handshake)
        self.is_known = False

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(data)


def non_blocking(fd: int, mode: str) -> FileIO:
    os.set_blocking(fd, False)
    return FileIO(fd, mode)


class World:
    """A broker, the processes that use it, and all that they have of it."""

    def __init__(self, choose: Random, folder: Path, number: int) -> None:
        self.choose = choose
        self.listener = socket.socket(socket.AF_UNIX)
        address = str(folder / f"s{number}")
        self.listener.bind(address)
        self.listener.listen(64)
        self.listener.setblocking(False)
        succession = Succession("identity", 1, Journal()) if choose.random() < 0.5 else None
        self.journal = succession.journal if succession is not None else None
        self.history = choose.choice([0, 3])
        self.broker = Broker(self.listener, [KEY], answer, history=self.history, succession=succession)
        self.processes = [Process(address) for _ in range(3)]
        self.clients: list[Client] = []
        self.sessions: list[tuple[int, int]] = []  # each with its process
        self.publishers: list[tuple[int, int]] = []
        self.tokens = [(1, 1)]  # each with its subscription
        self.sessions_at_work: list[tuple[int, int]] = []  # of bridges, likewise
        self.ids = [*range(1000, 1008)]
        self.readers: list[FileIO] = []
        self.writers: list[FileIO] = []
        self.fd_sockets: list[socket.socket] = []
        self.reports: list[FileIO] = []

    def connect(self) -> None:
        alive = [process for process in self.processes if process.sockets]
        if alive:
            process = self.choose.choice(alive)
            self.clients.append(Client(process.sockets.pop(), process.pid))

    def ask(self) -> None:
        """Send any request, mostly with what belongs to the same process; a handler ignores the fields of others."""
        choose = self.choose
        known = [client for client in self.clients if client.is_known]
        if not known:
            return
        client = choose.choice(known)
        (do,) = choose.choices([*REQUESTS], [*REQUESTS.values()])
        there = [*self.broker.registry.subscriptions]
        subscription = choose.choice(there if there and choose.random() < 0.7 else self.ids)
        token_of, token = choose.choice(self.tokens[-2:] if choose.random() < 0.9 else self.tokens)
        topics = choose.sample(TOPICS, choose.randint(1, 4))
        if choose.random() < 0.1:
            start = choose.randrange(1000)
            topics += MANY[start : start + choose.choice([10, 1030, 1500])]
        message = request(do, self.one_of(self.sessions, client), self.one_of(self.publishers, client), subscription) | {
            "topics": topics,
            "capacity": choose.choice([1, 300, 20_000, 5 << 20]),
            "overflow": choose.choice(POLICIES),
            "replay": choose.choice([0, 0, 2]) if self.history else 0,
            "after": choose.choice([None, 0, self.next_id, self.next_id - 2, 1]) if self.history else None,
            "limit": choose.choice([None, 0, 2]),
            "count": choose.randrange(6),
            "topic": choose.choice([None, "a"]),
            "group": choose.choice(GROUPS),
            "prefetch": choose.choice([1, 3]),
            "delivered": choose.random() < 0.5,
            "now": do == "flush" and choose.random() < 0.5,
            "shared": choose.random() < 0.5,
        }
        if do == "subscribe" and message["group"] and choose.random() < 0.9:  # else its members do not agree
            message |= {"topics": ["a", "a:*"], "capacity": 20_000, "overflow": message["group"]}
        if do.startswith("bridge"):
            message |= {"stream": choose.choice("st"), "turn": choose.random() < 0.7, "forget": choose.random() < 0.2}
        if do == "bridge" and choose.random() < 0.9:
            policy = "block" if message["stream"] == "s" else choose.choice(POLICIES[3:5])
            message |= {"topics": ["a", "a:*"], "capacity": 20_000, "overflow": policy}
        if do == "bridge report" or (do in ("publisher", "bridge end") and choose.random() < 0.4):
            message |= {"reader": self.one_of(self.sessions_at_work, client), "refused": choose.randrange(9)}
        if do == "opened":
            message |= {"subscription": token_of, "token": token}
        elif choose.random() < 0.1:
            message[choose.choice([*message])] = choose.choice(NONSENSE)
        client.send(encode(message))

    @property
    def next_id(self) -> int:
        return self.broker.traffic.routing.next_id

    def one_of(self, all_of_them: list[tuple[int, int]], client: Client) -> int:
        own = [id for pid, id in all_of_them if pid == client.pid or self.choose.random() < 0.1]
        return self.choose.choice(own[-3:] or [1])

    def read_replies(self) -> None:
        """Take in what has come on all connections; the first is the handshake."""
        for client in list(self.clients):
            try:
                data, fds, _, _ = socket.recv_fds(client.socket, 1 << 20, 8)
            except BlockingIOError:
                continue
            except OSError:
                data, fds = b"", []
            if not data:
                self.forget(client)
            client.inbox.feed(data)
            while (body := client.inbox.next()) is not None:
                if client.is_known:
                    self.note(client.pid, decode(body), fds)
                    continue
                try:
                    client.send(client.handshake.send(body))
                except StopIteration as done:
                    client.is_known = True
                    client.send(done.value.last)
            for fd in fds:
                os.close(fd)

    def note(self, pid: int, reply: dict[str, Any], fds: list[int]) -> None:
        """Note what a reply gives, and take its descriptors."""
        if "publisher" in reply:
            self.publishers.append((pid, reply["publisher"]))
            self.writers.append(non_blocking(fds.pop(0), "wb"))
        elif "token" in reply:
            self.readers.append(non_blocking(fds.pop(0), "rb"))
            opening = [one.id for one in self.broker.registry.subscriptions.values() if one.pipe.token == reply["token"]]
            self.tokens += [(id, reply["token"]) for id in opening]
        elif "reader" in reply:
            self.readers.append(non_blocking(fds.pop(0), "rb"))
            self.sessions_at_work.append((pid, reply["reader"]))
        elif "session" in reply:
            self.sessions.append((pid, reply["session"]))
        if reply.get("reports"):
            self.reports.append(non_blocking(fds.pop(0), "wb"))
        if reply.get("fd_socket"):
            self.fd_sockets.append(socket.socket(fileno=fds.pop(0)))
            self.fd_sockets[-1].setblocking(False)

    def forget(self, client: Client) -> None:
        client.socket.close()
        self.clients.remove(client)

    def hang_up(self) -> None:
        if self.clients:
            self.forget(self.choose.choice(self.clients))

    def publish(self) -> None:
        """Write frames of any kind, or what is none."""
        choose = self.choose
        if not self.writers:
            return
        topic, exclude = choose.choice(TOPICS[:4]).encode(), choose.choice([0, 0, *self.ids])
        size = choose.choice([0, 1, 100, 3000])
        frame = frame_head(size, topic, exclude) + bytes(size)
        kind = choose.random()
        if kind < 0.1:
            first, count = choose.randint(1, 20), choose.choice([0, 1, 10, 1000])
            arrival = Arrival(choose.choice([b"origin 1", b"origin 2"]), choose.randint(1, 2), first, count)
            between: list[Arrival | Cursor] = [arrival, arrival, Cursor(str(first)), Cursor("")]
            data = bridge_frame(choose.choice(between)) + frame * choose.choice([0, 1, 5])
        elif kind < 0.6:
            data = frame * choose.choice([1, 1, 3, 4096 // len(frame)])
        elif kind < 0.8:
            size = choose.choice([5000, 100_000])
            data = choose.choice([*pieces(frame_head(size, topic) + bytes(size), choose.randint(1, 3))])
        elif kind < 0.97:
            data = reference_frame(choose.randint(1, 3), choose.randrange(100) << 10, 1000, topic, exclude)
        else:
            data = choose.randbytes(30)
        writer = choose.choice(self.writers)
        for _ in range(choose.choice([1, 1, 1, 40])):
            with contextlib.suppress(BrokenPipeError):
                writer.write(data[:4096])

    def send_packet(self) -> None:
        choose = self.choose
        if not (self.fd_sockets and available()):
            return
        one = choose.choice(self.fd_sockets)
        with contextlib.suppress(OSError):
            if choose.random() < 0.5:
                descriptor, memory = ring_memory(1 << 20)
                socket.send_fds(one, [pack(RING, choose.randint(1, 3), 1 << 16)], [descriptor.fd])
                memory.close()
                descriptor.close()
            else:
                one.send(pack(choose.choice([MAPPED, READ, REFUSED, WANTED]), choose.randint(1, 9), choose.randrange(50)))

    def report(self) -> None:
        """Report any count, as the member of a group that it may be of, or what is no report."""
        if self.reports:
            data = self.choose.choice(
                [report(self.choose.randrange(50), leaves=self.choose.random() < 0.1), b"abc", bytes(4096)]
            )
            with contextlib.suppress(BrokenPipeError):
                self.choose.choice(self.reports).write(data)

    def receive(self) -> None:
        if self.readers:
            self.choose.choice(self.readers).read(self.choose.choice([1, 100, 1 << 16]))
        for one in self.fd_sockets:
            with contextlib.suppress(OSError):
                for fd in socket.recv_fds(one, 100, 1)[1]:
                    os.close(fd)

    def close_something(self) -> None:
        things: list[Any] = self.choose.choice([self.readers, self.writers, self.fd_sockets, self.reports])
        if things:
            things.pop(self.choose.randrange(len(things))).close()

    def kill(self) -> None:
        self.choose.choice(self.processes).kill()

    def stop(self) -> None:
        for client in self.clients[:1]:
            client.send(encode({"do": "stop", "timeout": self.choose.choice([0, 0.02, None])}) if client.is_known else b"")

    def round(self) -> None:
        self.broker.round(at_once=True)
        self.read_replies()
        registry, router = self.broker.registry, self.broker.router
        for id, subscription in registry.subscriptions.items():
            backlog = subscription.backlog
            assert id == subscription.id
            assert backlog.published == backlog.delivered + backlog.missed + backlog.waiting
            if not isinstance(subscription, BridgeReader):
                assert subscription.cost.topics >= len(router.topics(subscription.target)), "topics that no budget has"
            assert subscription in subscription.session.peer.subscriptions
        for group in registry.groups:
            assert group.backlog.published == group.backlog.delivered + group.backlog.missed + group.backlog.waiting
            assert group.is_live
        for bridge in self.broker.bridges:
            backlog, outbound = bridge.outbox.backlog, bridge.outbox.outbound
            assert backlog.published == backlog.delivered + backlog.missed + backlog.waiting
            assert outbound.sent <= backlog.delivered
            assert outbound.acknowledged <= outbound.given <= outbound.target
        for field in registry.budget.spent:
            assert field >= 0
        for one in self.broker.traffic.publishers.values():
            assert one.blocked is None or one.blocked.waiters or one in self.broker.traffic.routing.resuming

    def is_empty(self) -> bool:
        registry, traffic = self.broker.registry, self.broker.traffic
        self.broker.round(at_once=True)
        for bridge in self.broker.bridges:  # which outlive all sessions
            self.broker.bridges.forget(bridge)
        left = (registry.sessions, registry.subscriptions, [*registry.groups], registry.to_remove, traffic.publishers)
        return not any((*left, self.broker.parts))

    def end(self) -> None:
        """End all that there is; then nothing may be left."""
        for client in list(self.clients):
            self.forget(client)
        for process in self.processes:
            process.kill()
            for one in process.sockets:
                one.close()
        ends: list[Any] = [*self.readers, *self.writers, *self.fd_sockets, *self.reports]
        for end in ends:
            end.close()
        wait_until(self.is_empty)
        for _ in range(3):
            self.broker.round(at_once=True)
        registry, traffic = self.broker.registry, self.broker.traffic
        assert registry.budget.spent == Cost()
        assert self.broker.is_finished or not traffic.memory.store.rings
        left = {
            "openings": registry.openings,
            "routes": self.broker.router.count,
            "to write": traffic.delivery.dirty,
            "behind": traffic.routing.behind,
            "resuming": traffic.routing.resuming,
            "ready": traffic.intake.ready,
            "waiting": self.broker.waiting,
            "bytes": held(self.broker),
            "journal": self.journal is not None and (self.journal.subscriptions or self.journal.bridges),
            "bridges": [*self.broker.bridges],
        }
        assert not any(left.values()), left
        self.broker.acceptor.close()
        self.broker.poller.close_forgotten()
        vars(self.broker.poller).clear()  # the rooms refer to each other, through its handlers
        self.listener.close()
        for fd in self.journal.files if self.journal is not None else ():
            os.close(fd)


def in_any_order(seed: int, folder: Path) -> None:
    before = open_files()
    world = World(Random(seed), folder, seed)
    try:
        for name in world.choose.choices([*STEP], [*STEP.values()], k=STEPS):
            getattr(world, name)()
    finally:
        for process in world.processes:
            process.kill()
    world.end()
    vars(world).clear()
    assert not gc.collect()  # what the broker makes is in no cycle: its collector looks through little of it
    assert not [one for one in gc.get_objects() if isinstance(one, OF_THE_BROKER)]
    left = {(fd, target) for fd, target in open_files() - before if target != os.devnull}
    assert not left
    for fd, _ in open_files() - before:  # what the poller has until its process ends
        os.close(fd)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.timeout(60 + int(SOAK))
def test_requests_in_any_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No order of requests ends the broker, nor leaves anything in it, nor a cycle for the garbage collector."""
    end = time.monotonic() + SOAK
    with caplog.at_level(logging.ERROR), without_collections():
        for seed in itertools.count(SEED * 10_000):
            print(f"MPBROADCAST_SEED={seed}")
            in_any_order(seed, tmp_path)
            assert not [record for record in caplog.records if record.exc_info]
            if time.monotonic() > end if SOAK else seed == SEED * 10_000 + RUNS - 1:
                break


def test_a_request_that_is_sent_again_costs_its_topics(own_broker: Broker) -> None:
    """A request for the same subscription with other topics gets them out of the session's budget."""
    with asking(own_broker) as (one, _, session):
        for start in range(0, 50_000, 500):
            ask(own_broker, one, subscribing(session, 5000, *map(str, range(start, start + 500))))
        assert "topics and patterns" in one.replies[0]["text"]
        assert len(own_broker.router.topics(own_broker.registry.subscriptions[5000])) <= SESSION.topics


def test_the_id_of_a_subscription_that_is_being_removed(own_broker: Broker) -> None:
    """It is taken until that is done, or what is left of the old subscription would end a new one in parts."""
    with asking(own_broker) as (one, _, session):
        for start in range(0, 2500, 500):
            ask(own_broker, one, subscribing(session, 5000, *MANY[start : start + 500]))
        ask(own_broker, one, {"do": "drop", "subscription": 5000})
        ask(own_broker, one, subscribing(session, 5000, "new"))
        assert "new ID" in one.replies[0]["text"]
        while own_broker.registry.to_remove:
            own_broker.round(at_once=True)
        ask(own_broker, one, subscribing(session, 5000, "new"))
        own_broker.round(at_once=True)
        assert (one.replies, 5000 in own_broker.registry.subscriptions) == ([{}], True)


def test_a_publisher_that_is_closed_gets_no_socket(own_broker: Broker) -> None:
    """While what it has written waits for a full backlog: what it shared now, nothing would ever release."""
    with asking(own_broker) as (one, _, session):
        ask(own_broker, one, {**subscribing(session, 5000, "a"), "overflow": "block", "capacity": 1})
        publisher, fd = own_broker.traffic.intake.add(own_broker.registry.new_id(), own_broker.registry.sessions[session])
        os.write(fd, 2 * frame_head(0, b"a"))
        own_broker.round(at_once=True)
        ask(own_broker, one, {"do": "retire", "publisher": publisher.id})
        ask(own_broker, one, {"do": "fd_socket", "publisher": publisher.id})
        assert one.replies[0]["error"] == "lost"
        os.close(fd)


@pytest.mark.parametrize("do", [*REQUESTS, "stop"])
def test_each_field_of_each_request_wrong(do: str, own_broker: Broker) -> None:
    """Whatever stands in one field of a request, the broker answers or refuses it."""
    for field in ("timeout", *request(do, 1, 2, 3)):
        with asking(own_broker) as (one, _, session):
            good = request(do, session, session + 1, session + 2) | {"timeout": -1}  # which it refuses
            for value in NONSENSE:
                if (do, field) != ("stop", "timeout") or type(value) not in (int, float) or value < 0:
                    ask(own_broker, one, good | {field: value})
                own_broker.round(at_once=True)
