"""What a message costs in the broker: Python calls, from its publisher's pipe to a channel's."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mpbroadcast.broker.core.limits import TOGETHER, Budget
from mpbroadcast.broker.core.policies import new_backlog
from mpbroadcast.broker.members import Peer, Session, Subscription
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import Broker
from mpbroadcast.protocol.frames import frame_head
from tests.conftest import descriptors as open_files

MOST = 30


class Pipes:
    """A broker with one publisher and one channel, in this process."""

    def __init__(self, listener: socket.socket, policy: str) -> None:
        self.peer = Peer(os.getpid())
        self.broker = Broker(listener, [b"key"], answer)
        self.traffic, self.router = self.broker.traffic, self.broker.router
        session = Session(1, self.peer, Budget(TOGETHER))
        self.publisher, self.write_end = self.traffic.intake.add(2, session)
        self.subscription = Subscription(3, session, new_backlog(1 << 20, policy))
        self.router.add(self.subscription, ["*"])
        self.read_end = self.subscription.pipe.begin_opening(self.subscription.backlog)
        os.set_blocking(self.read_end, False)
        self.subscription.pipe.open()
        self.traffic.watch(self.subscription)
        self.traffic.run_until_idle()

    def publish(self, payload: bytes) -> None:
        os.write(self.write_end, frame_head(len(payload), b"topic") + payload)

    def close(self) -> None:
        os.close(self.write_end)
        os.close(self.read_end)
        self.traffic.intake.finish(self.publisher)
        self.broker.poller.close(self.subscription.pipe.close())
        self.broker.poller.close_forgotten()
        self.peer.close()


@contextmanager
def pipes(folder: Path, policy: str = "block") -> Iterator[Pipes]:
    before = open_files()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        made = Pipes(listener, policy)
        try:
            yield made
        finally:
            made.close()
            for fd, target in open_files() - before:
                if target == os.devnull:  # what the broker has until its process ends
                    os.close(fd)
            vars(made.broker).clear()  # what closes itself when nothing refers to it any more


def test_one_small_message_takes_few_calls(tmp_path: Path) -> None:
    """From one pipe into the other, it takes at most :data:`MOST` Python calls."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    with pipes(tmp_path) as path:
        for number in (1, 2):  # the first fills the router's cache
            path.publish(b"payload %d" % number)
            sys.setprofile(note if number == 2 else None)
            path.broker.round()
            sys.setprofile(None)
            assert b"payload %d" % number in os.read(path.read_end, 1 << 16)
    print(len(calls), *calls, sep="\n")
    assert 10 < len(calls) <= MOST


def test_a_subscription_that_is_removed_while_its_own_message_is_routed(tmp_path: Path) -> None:
    """A reader that is gone is found while its message is written: it is on the round's list, and nothing else is touched."""
    with pipes(tmp_path) as path:
        path.publish(b"one")
        os.close(path.read_end)
        path.traffic.round()
        assert list(path.traffic.departed.items()) == [(path.subscription, True)]
        assert path.router.targets(b"topic") == ()
        path.publish(b"two")
        path.traffic.round()
        assert (path.traffic.routing.routed, path.subscription.backlog.published) == (2, 1)
        path.read_end = os.open(os.devnull, os.O_RDONLY)


def test_a_subscription_that_ends_itself_while_its_own_message_is_routed(tmp_path: Path) -> None:
    """A backlog that overflows under ``disconnect`` is routed nothing more, not even of the same round."""
    with pipes(tmp_path, "disconnect") as path:
        path.subscription.backlog.capacity = 100
        for _ in range(3):
            path.publish(bytes(80))
        path.publish(b"behind")
        path.traffic.round()
        assert path.traffic.overflowed == [path.subscription]
        assert not path.subscription.is_live
        assert path.router.targets(b"topic") == ()
        assert b"behind" not in os.read(path.read_end, 1 << 16)
