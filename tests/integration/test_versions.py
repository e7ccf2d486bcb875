"""The broker and clients of other versions, connection by connection, in one process; programs are in tests/programs."""

import logging
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast.broker.server import Broker
from mpbroadcast.protocol.control import decode, encode
from mpbroadcast.protocol.version import OWN, PROTOCOL, Announcement, announce
from tests.support.helpers import DEADLINE, Background, keyed_connection, wait_until
from tests.support.own_broker import own_broker

__all__ = ["own_broker"]


class Client:
    """A connection that has proved its key with any announcement; the broker has handled all of that."""

    def __init__(self, broker: Broker, address: str, announcement: bytes) -> None:
        self.broker = broker
        connecting = Background(keyed_connection, address, b"key", announcement)
        while connecting.is_alive():
            broker.round(at_once=True)
        self.connection: Connection = connecting.result()
        self.rounds()

    def rounds(self) -> None:
        for _ in range(5):
            self.broker.round(at_once=True)

    def ask(self, message: dict[str, Any]) -> None:
        self.connection.send_bytes(encode(message)[4:])
        self.rounds()

    def is_answered(self) -> bool:
        self.rounds()
        return self.connection.poll(0)

    def replies(self) -> Iterator[dict[str, Any]]:
        """Yield what the broker has sent, up to the end of the connection."""
        try:
            while self.connection.poll(0):
                yield decode(self.connection.recv_bytes())
        except EOFError:
            yield {"end": True}


def mismatches(log: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in log.messages if "version mismatch" in text]


@pytest.mark.parametrize("request_", [{"do": "attach"}, {"do": "stats"}, {"do": "no such request"}, {}])
def test_a_client_without_a_version_gets_a_reply_to_its_first_request(
    own_broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture, request_: dict[str, Any]
) -> None:
    """What has no reply before it is ignored; then the connection is closed. The broker serves nothing, and logs one line."""
    caplog.set_level(logging.WARNING)
    client = Client(own_broker, str(tmp_path / "s"), b"")
    with client.connection:
        client.ask({"do": "drop", "subscription": 1})
        assert not [*client.replies()]
        client.ask(request_)
        reply, end = client.replies()
        assert reply["error"] == "lost"
        assert str(OWN) in reply["text"]
        assert end == {"end": True}
        with pytest.raises(ValueError, match="version mismatch") as caught:  # such a client expects a number
            int(reply["session"])
        assert reply["text"] in str(caught.value)
    assert not own_broker.registry.sessions
    assert not own_broker.registry.dropped_early
    (line,) = mismatches(caplog)
    assert "it announces no protocol" in line


def test_a_silent_client_without_a_version_is_closed_in_time(
    own_broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that does not show its key, but with the reason in the log."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("mpbroadcast.broker.acceptor.HANDSHAKE_TIMEOUT", 0.5)
    client = Client(own_broker, str(tmp_path / "s"), b"")
    with client.connection:
        wait_until(client.is_answered, DEADLINE)
        assert [*client.replies()] == [{"end": True}]
    assert len(mismatches(caplog)) == 1


@pytest.mark.parametrize("protocol", [0, PROTOCOL + 1])
def test_a_client_with_another_protocol_is_closed(
    own_broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture, protocol: int
) -> None:
    """After the handshake, from which it knows why; a request that it has sent at once is not handled."""
    caplog.set_level(logging.WARNING)
    client = Client(own_broker, str(tmp_path / "s"), announce(Announcement(protocol, "9.8.7")))
    with client.connection:
        assert [*client.replies()] == [{"end": True}]
    assert not own_broker.registry.sessions
    (line,) = mismatches(caplog)
    assert f"it has protocol {protocol} (mpbroadcast 9.8.7), and this broker has {OWN}" in line


def test_the_version_of_the_package_is_for_people(own_broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client with the same protocol is served, whatever its package's version."""
    client = Client(own_broker, str(tmp_path / "s"), announce(Announcement(PROTOCOL, "9.8.7")))
    with client.connection:
        client.ask({"do": "attach"})
        (reply,) = client.replies()
        assert reply["session"] in own_broker.registry.sessions
    client.rounds()
    assert not mismatches(caplog)
