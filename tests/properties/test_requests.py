"""Requests in any order, of three processes that have the key, to a broker in this process, which runs round by round.

No client of this package sends them so: the same request twice, an opening while its channel is being removed, descriptors that
are closed in the middle, a process that dies between two parts. No order may end the broker, break what it counts, or leave
anything behind once all sessions have ended.

``MPBROADCAST_SEED`` has other orders, and ``MPBROADCAST_SOAK=<seconds>`` more of them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.limits import SESSION, Cost
from mpbroadcast.broker.host.journal import Journal, Succession
from mpbroadcast.broker.members import Publisher, Session, Subscription
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import Broker
from mpbroadcast.posix.shared_memory import available, ring_memory
from mpbroadcast.protocol.control import Inbox, client_handshake, decode, encode
from mpbroadcast.protocol.fd_packets import MAPPED, READ, REFUSED, RING, WANTED, pack
from mpbroadcast.protocol.frames import frame_head, pieces, reference_frame
from tests.conftest import descriptors as open_files
from tests.support.own_broker import ask, asking, held, own_broker, subscribing

__all__ = ["own_broker"]

SEED: Final = int(os.environ.get("MPBROADCAST_SEED", "1"))
SOAK: Final = float(os.environ.get("MPBROADCAST_SOAK", "1.5"))
STEPS: Final = 400  # of one run
KEY: Final = b"key"
TOPICS: Final = ("", "a", "b", "a:1", "a:*", "[ab]", "*")
MANY: Final = [f"many {index}" for index in range(2500)]  # a request in parts
POLICIES: Final = ("block", "block", "drop_oldest", "drop_newest", "latest", "disconnect")
OF_THE_BROKER: Final = (Subscription, Publisher, Session, ControlConnection)
SOCKETS: Final = 12  # of a process


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
        self.sockets: list[socket.socket] = []
        with here:
            for _ in range(SOCKETS):
                _, (fd,), _, _ = socket.recv_fds(here, 1, 1)
                self.sockets.append(socket.socket(fileno=fd))

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


class Client:
    """One connection, with the key."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.socket = connection
        self.pid = pid
        self.socket.setblocking(False)
        self.inbox = Inbox(1 << 30)
        self.handshake = client_handshake(KEY)
        next(self.handshake)
        self.is_known = False


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
        self.broker = Broker(self.listener, [KEY], answer, history=choose.choice([0, 3]), succession=succession)
        self.processes = [Process(address) for _ in range(3)]
        self.clients: list[Client] = []
        self.sessions: list[tuple[int, int]] = []  # each with its process
        self.publishers: list[tuple[int, int]] = []
        self.tokens = [(1, 1)]
        self.subscriptions = [*range(1000, 1008)]
        self.readers: list[int] = []
        self.writers: list[int] = []
        self.fd_sockets: list[socket.socket] = []
        self.rings = itertools.count(1)

    # --- what a step does

    def connect(self) -> None:
        alive = [process for process in self.processes if process.sockets]
        if alive:
            process = self.choose.choice(alive)
            self.clients.append(Client(process.sockets.pop(), process.pid))

    def ask(self) -> None:
        """Send any request, mostly with what belongs to the same process."""
        choose = self.choose
        known = [client for client in self.clients if client.is_known]
        if not known:
            return
        client = choose.choice(known)
        session, publisher = self.one_of(self.sessions, client), self.one_of(self.publishers, client)
        there = [*self.broker.registry.subscriptions]
        subscription = choose.choice(there if there and choose.random() < 0.7 else self.subscriptions)
        topics = choose.sample(TOPICS, choose.randint(1, 4))
        if choose.random() < 0.1:
            start = choose.randrange(1000)
            topics += MANY[start : start + choose.choice([10, 1030, 1500])]
        both: dict[str, Any] = {"session": session, "subscription": subscription}
        token_of, token = choose.choice(self.tokens[-2:] if choose.random() < 0.9 else self.tokens)
        requests: list[Callable[[], dict[str, Any]]] = [
            lambda: {"do": "attach"},
            lambda: {"do": "attach"},
            lambda: {"do": "detach"} if choose.random() < 0.3 else {"do": "stats"},
            lambda: {"do": "publisher", "session": session},
            lambda: {"do": "publisher", "session": session},
            lambda: {"do": "fd_socket", "publisher": publisher},
            lambda: {"do": "retire", "publisher": publisher},
            lambda: {
                "do": "flush",
                "publisher": publisher,
                "delivered": choose.random() < 0.5,
                "now": choose.random() < 0.5,
            },
            *[
                lambda: {
                    "do": "subscribe",
                    **both,
                    "topics": topics,
                    "capacity": choose.choice([1, 300, 20_000, 5 << 20]),
                    "overflow": choose.choice(POLICIES),
                    "replay": choose.choice([0, 0, 2]) if self.broker.traffic.routing.history is not None else 0,
                    "publisher": choose.choice([None, publisher]),
                }
            ]
            * 4,
            lambda: {"do": "add topics", **both, "topics": topics},
            lambda: {"do": "drop topics", **both, "topics": topics},
            *[lambda: {"do": "open", **both, "shared": choose.random() < 0.5}] * 3,
            *[lambda: {"do": "opened", "session": session, "subscription": token_of, "token": token}] * 4,
            lambda: {"do": "unsubscribe", **both},
            lambda: {"do": choose.choice(["close", "drop", "stats"]), **both},
            lambda: {"do": "wait", "count": choose.randrange(6), "topic": choose.choice([None, "a"]), "now": False},
            lambda: {"do": "stats"},
        ]
        self.send(client, encode(choose.choice(requests)()))

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
                    fds = self.note(client.pid, decode(body), fds)
                    continue
                try:
                    self.send(client, client.handshake.send(body))
                except StopIteration as done:
                    client.is_known = True
                    self.send(client, done.value)
            for fd in fds:
                os.close(fd)

    @staticmethod
    def send(client: Client, data: bytes) -> None:
        with contextlib.suppress(OSError):
            client.socket.send(data)

    def note(self, pid: int, reply: dict[str, Any], fds: list[int]) -> list[int]:
        """Note what a reply gives. Return the descriptors that it does not take."""
        if "publisher" in reply:
            self.publishers.append((pid, reply["publisher"]))
            self.writers.append(fds.pop(0))
            os.set_blocking(self.writers[-1], False)
        elif "token" in reply:
            self.readers.append(fds.pop(0))
            os.set_blocking(self.readers[-1], False)
            if reply["fd_socket"]:
                self.fd_sockets.append(socket.socket(fileno=fds.pop(0)))
                self.fd_sockets[-1].setblocking(False)
            opening = [one.id for one in self.broker.registry.subscriptions.values() if one.pipe.token == reply["token"]]
            self.tokens += [(id, reply["token"]) for id in opening]
        elif reply.get("fd_socket") is True:
            self.fd_sockets.append(socket.socket(fileno=fds.pop(0)))
            self.fd_sockets[-1].setblocking(False)
        elif "session" in reply:
            self.sessions.append((pid, reply["session"]))
        return fds

    def forget(self, client: Client) -> None:
        client.socket.close()
        self.clients.remove(client)

    def hang_up(self) -> None:
        if self.clients and self.choose.random() < 0.1:
            self.forget(self.choose.choice(self.clients))

    def publish(self) -> None:
        """Write frames of any kind, or what is none."""
        choose = self.choose
        if not self.writers:
            return
        topic, exclude = choose.choice(TOPICS[:4]).encode(), choose.choice([0, 0, *self.subscriptions])
        size = choose.choice([0, 1, 100, 3000])
        frame = frame_head(size, topic, exclude) + bytes(size)
        kind = choose.random()
        if kind < 0.6:
            data = frame * choose.choice([1, 1, 3, 4096 // len(frame)])
        elif kind < 0.8:
            size = choose.choice([5000, 100_000])
            data = choose.choice([*pieces(frame_head(size, topic) + bytes(size), choose.randint(1, 3))])
        elif kind < 0.97:
            data = reference_frame(choose.randint(1, 3), choose.randrange(100) << 10, 1000, topic, exclude)
        else:
            data = choose.randbytes(30)
        fd = choose.choice(self.writers)
        for _ in range(choose.choice([1, 1, 1, 40])):
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(fd, data[:4096])

    def send_packet(self) -> None:
        """Send a packet of any kind on a socket for descriptors."""
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

    def receive(self) -> None:
        if self.readers:
            with contextlib.suppress(BlockingIOError):
                os.read(self.choose.choice(self.readers), self.choice_of_size())
        for one in self.fd_sockets:
            with contextlib.suppress(OSError):
                for fd in socket.recv_fds(one, 100, 1)[1]:
                    os.close(fd)

    def choice_of_size(self) -> int:
        return self.choose.choice([1, 100, 1 << 16])

    def close_something(self) -> None:
        kind = self.choose.randrange(3)
        if kind == 0 and self.readers:
            os.close(self.readers.pop(self.choose.randrange(len(self.readers))))
        elif kind == 1 and self.writers:
            os.close(self.writers.pop(self.choose.randrange(len(self.writers))))
        elif self.fd_sockets:
            self.fd_sockets.pop(self.choose.randrange(len(self.fd_sockets))).close()

    def kill(self) -> None:
        if self.choose.random() < 0.01:
            self.choose.choice(self.processes).kill()

    def stop(self) -> None:
        if self.clients and self.choose.random() < 0.003:
            client = self.choose.choice(self.clients)
            if client.is_known:
                self.send(client, encode({"do": "stop", "timeout": self.choose.choice([0, 0.02, None])}))

    def step(self) -> None:
        """Do one thing, or run a round."""
        often = [*[self.ask] * 12, *[self.publish] * 4, *[self.receive] * 2, *[self.round] * 8]
        seldom = [self.connect, self.send_packet, self.read_replies, self.hang_up, self.close_something, self.kill, self.stop]
        self.choose.choice(often + seldom)()

    # --- what holds

    def round(self) -> None:
        self.broker.round(at_once=True)
        self.read_replies()
        self.check()

    def check(self) -> None:
        """Check what holds between two rounds."""
        registry, router = self.broker.registry, self.broker.router
        for id, subscription in registry.subscriptions.items():
            backlog = subscription.backlog
            assert id == subscription.id
            assert backlog.published == backlog.delivered + backlog.missed + backlog.waiting
            assert subscription.cost.topics >= len(router.topics(subscription)), "topics that no budget has"
            assert subscription in subscription.session.peer.subscriptions
        for field in registry.budget.spent:
            assert field >= 0
        for one in self.broker.traffic.publishers.values():
            assert one.blocked is None or one.blocked.waiters or one in self.broker.traffic.routing.resuming

    def end(self) -> None:
        """End all that there is; then nothing may be left."""
        for client in list(self.clients):
            self.forget(client)
        for process in self.processes:
            process.kill()
            for one in process.sockets:
                one.close()
        for fd in (*self.readers, *self.writers):
            os.close(fd)
        for one in self.fd_sockets:
            one.close()
        registry, traffic = self.broker.registry, self.broker.traffic
        deadline = time.monotonic() + 5
        while registry.sessions or registry.subscriptions or registry.to_remove or traffic.publishers or self.broker.parts:
            assert time.monotonic() < deadline, "something never ends"
            self.broker.round(at_once=True)
        for _ in range(3):
            self.broker.round(at_once=True)
        assert not registry.openings
        assert registry.budget.spent == Cost()
        assert not self.broker.router.count
        assert not traffic.delivery.dirty
        assert not traffic.routing.behind
        assert not traffic.routing.resuming
        assert not traffic.intake.ready
        assert self.broker.is_finished or not traffic.memory.store.rings
        assert not self.broker.waiting
        assert held(self.broker) == 0
        assert self.journal is None or not self.journal.subscriptions
        self.broker.acceptor.close()
        self.broker.poller.close_forgotten()
        self.listener.close()
        for fd in self.journal.files if self.journal is not None else ():
            os.close(fd)


def in_any_order(seed: int, folder: Path) -> None:
    """Run one order of requests, and compare what there is before and after it."""
    before = open_files()
    world = World(Random(seed), folder, seed)
    try:
        for _ in range(STEPS):
            world.step()
    finally:
        for process in world.processes:
            process.kill()
    world.end()
    vars(world).clear()
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, OF_THE_BROKER)]
    left = {(fd, target) for fd, target in open_files() - before if target != os.devnull}
    assert not left
    for fd, _ in open_files() - before:  # what the poller has until its process ends
        os.close(fd)


def test_requests_in_any_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No order of requests ends the broker, nor leaves anything in it."""
    end = time.monotonic() + SOAK
    with caplog.at_level(logging.ERROR):
        for seed in seeds():
            print(f"MPBROADCAST_SEED={seed}")
            in_any_order(seed, tmp_path)
            assert not [record for record in caplog.records if record.exc_info]
            if time.monotonic() > end:
                break


def seeds() -> Iterator[int]:
    return itertools.count(SEED * 10_000)


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
