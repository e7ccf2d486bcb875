"""A broker in the test's own process, which runs only round by round, when a test asks for it."""

import contextlib
import json
import os
import socket
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from mpbroadcast.broker.control_connection import ControlConnection
from mpbroadcast.broker.core.limits import cost_of
from mpbroadcast.broker.members import Peer, Session, Subscription
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import Broker
from mpbroadcast.broker.statistics import memory
from mpbroadcast.protocol.control import decode
from tests.conftest import descriptors as open_files

T = TypeVar("T")


class Asker:
    """What :func:`answer` needs of a connection: takes its replies."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.session: Any = None
        self.is_closed = False
        self.replies: list[dict[str, Any]] = []

    def reply(self, message: dict[str, Any], *fds: int) -> None:
        for fd in fds:
            os.close(fd)
        json.dumps(message)
        self.replies.append(message)

    def reply_encoded(self, parts: Sequence[bytes]) -> None:
        self.reply(decode(b"".join(parts[1:])))

    def no_reply(self) -> None:
        self.replies.append({})


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker in this process, which runs only when it is asked."""
    before = open_files()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        broker = Broker(listener, [b"key"], answer, history=3)
        yield broker
        take_away(broker)
        assert not broker.registry.sessions
        assert not broker.registry.subscriptions
        assert not broker.traffic.publishers
        assert held(broker) == 0
        for number, target in open_files() - before:
            if target == os.devnull:  # what it has until its process ends
                os.close(number)
        vars(broker).clear()  # what closes itself when nothing refers to it any more


def complete(parts: Iterator[None] | Generator[None, None, T]) -> T:
    while True:
        try:
            next(parts)
        except StopIteration as done:
            return cast("T", done.value)


def held(broker: Broker) -> int:
    """The bytes that the broker's statistics report as its memory."""
    return complete(memory(broker))


def take_away(broker: Broker) -> None:
    for session in list(broker.registry.sessions.values()):
        broker.registry.end_session(session, clean=False)
    for subscription in list(broker.registry.subscriptions.values()):
        broker.registry.remove(subscription)
    while broker.registry.to_finish:
        complete(broker.registry.to_finish.pop())
    while broker.registry.to_remove:
        broker.registry.remove_some()
    broker.traffic.run_until_idle()
    while broker.traffic.is_behind:
        broker.traffic.round(at_once=True)
    broker.poller.close_forgotten()


def subscribed(broker: Broker, number: int, session: Session, topics: list[str], policy: str) -> Subscription:
    """A subscription, made without a request."""
    made = broker.registry.add_subscription(number, session, 1 << 16, policy, cost_of({*topics}, 1))
    broker.registry.route(made, topics)
    return made


def ask(broker: Broker, asker: Asker, message: dict[str, Any]) -> None:
    """Ask; there is one reply at the most, and it can travel."""
    asker.replies.clear()
    answer(broker, cast("ControlConnection", asker), message)
    assert len(asker.replies) <= 1


def subscribing(session: int, subscription: int, *topics: str) -> dict[str, Any]:
    fields = {"capacity": 1 << 16, "overflow": "drop_oldest", "replay": 0, "publisher": None, "group": None}
    fields |= {"prefetch": 1}
    return {"do": "subscribe", "session": session, "subscription": subscription, "topics": [*topics], **fields}


@contextlib.contextmanager
def asking(broker: Broker) -> Iterator[tuple[Asker, Asker, int]]:
    """Two connections of this process; the first has a session, whose number is given, a publisher, and a subscription."""
    peer = Peer(os.getpid())
    one, other = Asker(peer), Asker(peer)
    try:
        ask(broker, one, {"do": "attach"})
        session = one.replies[0]["session"]
        ask(broker, one, {"do": "publisher", "session": session})
        ask(broker, one, subscribing(session, session + 2, "fuzz", "fuzz:*"))
        yield one, other, session
    finally:
        for subscription in list(broker.registry.openings):
            broker.registry.unopen(subscription)
        take_away(broker)
        peer.close()
