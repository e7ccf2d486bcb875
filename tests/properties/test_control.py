"""The control connection's bytes: the inbox, bodies, and both sides of the handshake, right and wrong."""

import contextlib
import hmac
import json
import sys
from collections.abc import Callable
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpbroadcast.protocol.control import (
    MAX_HANDSHAKE,
    ControlError,
    Handshake,
    Inbox,
    client_handshake,
    decode,
    encode,
    serve_handshake,
)
from tests.support.frames_made import STEADY, damaged
from tests.support.helpers import Background

KEY, OTHER = b"one key", b"another key"


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def bodies(data: bytes, limit: int = MAX_HANDSHAKE) -> list[bytes]:
    """The bodies in ``data``, which must all be whole."""
    inbox = Inbox(limit)
    inbox.feed(data)
    found = [*iter(inbox.next, None)]
    assert not inbox
    return found


@STEADY
@given(sent=st.lists(st.binary(max_size=30), max_size=8), lengths=st.lists(st.integers(0, 20), max_size=20))
def test_bodies_come_out_as_they_were_sent(sent: list[bytes], lengths: list[int]) -> None:
    """However the bytes are cut, each body comes out once and whole; then nothing is left."""
    data = b"".join(map(framed, sent))
    inbox = Inbox(30)
    found: list[bytes] = []
    for length in [*lengths, len(data)]:
        inbox.feed(data[:length])
        data = data[length:]
        found += iter(inbox.next, None)
        assert bool(inbox) == (sum(4 + len(body) for body in found) + len(data) < sum(4 + len(body) for body in sent))
    assert found == sent
    assert not inbox


@pytest.mark.parametrize("length", [-1, -(2**31), 11, 2**31 - 1])
def test_a_length_out_of_bounds_is_refused(length: int) -> None:
    """As soon as it has come, before what it announces; one at the limit is taken."""
    inbox = Inbox(5)
    inbox.limit = 10  # as it is raised once a peer has proved its key
    inbox.feed(framed(b"x" * 10))
    assert inbox.next() == b"x" * 10
    inbox.feed(length.to_bytes(4, "big", signed=True))
    with pytest.raises(ControlError):
        inbox.next()


TEXTS = st.text('aü\ud800"[{\\\0', max_size=10)


@STEADY
@given(
    message=st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers() | TEXTS | st.lists(TEXTS, max_size=3), max_size=5)
)
def test_what_is_encoded_is_decoded(message: dict[str, Any]) -> None:
    """A request or a reply comes out as it was, lone surrogates and all."""
    data = encode(message)
    (body,) = bodies(data, len(data))
    assert decode(body) == message


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="half"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"{} {}", id="two"),
        pytest.param(b"\xff\xfe\xff", id="no text in the encoding of its mark"),
        pytest.param(b"\xef\xbb\xbf", id="a byte order mark only"),
        pytest.param(b'{"a": "\xff"}', id="no text"),
        pytest.param(b'{"a": ' + b"9" * 10_000 + b"}", id="a number that is too long"),
    ],
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    """Whatever is wrong with it, it is the one error for that."""
    with pytest.raises(ControlError):
        decode(body)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth > 1 else []


def test_a_deep_body_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 levels are read, 33 are not; brackets in strings are no levels, whatever stands before them."""
    rest = {
        "many": [[], {}] * 50,
        "texts": ["[" * 100, '"[' * 50, '\\"{', "\\", "[" * 100, '\\\\"', "{" * 100],
        '"[[': ["["] * 100,
    }
    flat = rest | {"a": nested(15)}
    assert decode(json.dumps(flat).encode()) == flat
    assert decode(json.dumps(flat, ensure_ascii=False).encode()) == flat
    deep = json.dumps(rest | {"a": nested(32)}).encode()
    monkeypatch.setattr(json, "loads", None)
    for body in (deep, b'{"a": [' * 17 + b"]}" * 17, b'{"a": ' * 33 + b"1" + b"}" * 33):
        with pytest.raises(ControlError, match="deep"):
            decode(body)


PARTS_OF_JSON = [b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"u12", b"d800", b"1", b"e99", b"-", b"null", b"NaN"]
REQUEST = encode({"do": "subscribe", "topics": ["a", "ü"], "capacity": 1 << 20, "more": {"x": None}})[4:]
DAMAGED = st.builds(damaged, st.randoms(), st.just(REQUEST), st.just([REQUEST]))


@STEADY
@given(
    data=st.binary(max_size=60) | DAMAGED | st.lists(st.sampled_from(PARTS_OF_JSON), max_size=20).map(b"".join),
    limit=st.integers(0, 300),
)
def test_any_bytes_are_bodies_and_objects_or_an_error(data: bytes, limit: int) -> None:
    """Nothing else than ControlError comes of bytes that are none, and of a request that is damaged or cut."""
    inbox = Inbox(limit)
    inbox.feed(data)
    taken = b""
    with contextlib.suppress(ControlError):
        for body in iter(inbox.next, None):
            assert len(body) <= limit
            taken += framed(body)
    assert data.startswith(taken)
    with contextlib.suppress(ControlError):
        assert isinstance(decode(data), dict)


def step(side: Handshake, body: bytes) -> tuple[str, list[bytes]]:
    """Give a side the next body: how it goes on or ends, and what it sends."""
    try:
        return "waits", bodies(side.send(body))
    except StopIteration as done:
        return "proved", bodies(done.value.last)
    except ControlError as error:
        return "refused", bodies(error.args[1]) if len(error.args) > 1 else []


def shake_hands(
    keys: list[bytes], key: bytes, damage: Callable[[bytes], bytes] = bytes, number: int = -1
) -> tuple[list[str], list[bytes]]:
    """Let a server with ``keys`` and a client with ``key`` exchange bodies, of which ``damage`` changes one. Return how it
    ended for each, the server first, and the bodies that were sent."""
    sides = (serve_handshake(keys), client_handshake(key))
    ends = ["waits", "waits"]
    to_send = [bodies(next(side)) for side in sides]
    assert not to_send[1], "the server begins"
    sent: list[bytes] = []
    while any(to_send):
        sender = 0 if to_send[0] else 1
        other = 1 - sender
        sent.append(to_send[sender].pop(0))
        body = damage(sent[-1]) if len(sent) - 1 == number else sent[-1]
        if ends[other] == "waits":
            ends[other], more = step(sides[other], body)
            to_send[other] += more
    return ends, sent


@pytest.mark.parametrize("keys", [[KEY], [KEY, OTHER], [OTHER, KEY]])
def test_both_sides_prove_their_key(keys: list[bytes]) -> None:
    """Whichever of the server's keys the client has, both know that the other has it; no question is asked again."""
    (ends, sent), (_, other) = (shake_hands(keys, KEY) for _ in range(2))
    assert ends == ["proved", "proved"]
    assert sent[0] != other[0]


@pytest.mark.parametrize("key", [b"third key", KEY[:-1], KEY + b"\0x", b"\0"])
def test_a_wrong_key_is_refused_on_both_sides(key: bytes) -> None:
    """The server takes none but its own, and the client learns of it; a server without a key takes none."""
    assert shake_hands([KEY, OTHER], key)[0] == ["refused", "refused"]
    assert shake_hands([], KEY)[0] == ["refused", "refused"]


def test_every_truncation_and_changed_byte_is_refused() -> None:
    """Each of the handshake's bodies, cut at any byte or with any byte changed, is refused by its receiver."""
    ends, sent = shake_hands([KEY], KEY)
    assert (ends, len(sent)) == (["proved", "proved"], 6)
    for number, whole in enumerate(sent):
        for index in range(len(whole)):
            ends, _ = shake_hands([KEY], KEY, lambda body, cut=index: body[:cut], number)  # type: ignore[misc]
            assert "refused" in ends
            assert "proved" not in ends or number == 5  # which the client sends when it has nothing more to ask

            def changed(body: bytes, index: int = index) -> bytes:
                return body[:index] + bytes([body[index] ^ 1]) + body[index + 1 :]

            assert "refused" in shake_hands([KEY], KEY, changed, number)[0]


STARTS = st.sampled_from([b"", b"#CHALLENGE#", b"#CHALLENGE#{sha256}", b"#CHALLENGE#{md5}", b"#WELCOME#", b"{sha256}"])
BODIES = st.builds(lambda start, rest: (start + rest)[:MAX_HANDSHAKE], STARTS, st.binary(max_size=MAX_HANDSHAKE))


def end_of(side: Handshake, received: list[bytes]) -> str:
    end = "waits"
    while received and end == "waits":
        end, _ = step(side, received[0])
        received = received[1:]
    return end


@STEADY
@given(received=st.lists(BODIES, min_size=3, max_size=3))
def test_random_bodies_prove_nothing(received: list[bytes]) -> None:
    """Whatever a side receives instead of what is due, from whichever step on, it refuses, and raises nothing else."""
    for steps in range(3):
        server, client = serve_handshake([KEY, OTHER]), client_handshake(KEY)
        to_client, to_server = next(server), next(client)
        for _ in range(steps):  # these go well
            to_server = client.send(bodies(to_client)[0])
            to_client = server.send(bodies(to_server)[0])
        assert end_of(client, received) == "refused"
        # when the client has proved its key, the rest is for the client to ask
        assert end_of(server, received) == "refused" or (steps and received[2 - steps] == b"#WELCOME#")


@pytest.mark.parametrize(
    ("question", "is_answered"),
    [
        (b"", False),
        (b"x" * 15, False),
        (b"{sha256}" + bytes(7), False),
        (b"{sha256}" + bytes(8), True),
        (b"{sha256}" + bytes(237), True),  # the longest that fits into a message of the handshake
        (b"{sha256}" + bytes(238), False),
        (b"{md5}" + bytes(32), False),
    ],
)
def test_a_challenge_of_another_length_or_kind_is_not_answered(question: bytes, is_answered: bool) -> None:
    """A client does not sign what another program could know, nor with a digest that is not chosen here."""
    client = client_handshake(KEY)
    next(client)
    signed = b"{sha256}" + hmac.digest(KEY, question, "sha256")
    assert step(client, b"#CHALLENGE#" + question) == (("waits", [signed]) if is_answered else ("refused", []))


def talk(handshake: Handshake, connection: Connection) -> str:
    """Go through a handshake on a connection; how it ended."""
    end, answers = "waits", bodies(next(handshake))
    while True:
        for answer in answers:
            connection.send_bytes(answer)
        if end != "waits":
            return end
        end, answers = step(handshake, connection.recv_bytes())


def standard(connection: Connection, key: bytes, functions: list[Callable[[Connection, bytes], None]]) -> str:
    """Do what multiprocessing's Listener or Client does with its connection: how it ended."""
    try:
        for function in functions:
            function(connection, key)
    except AuthenticationError:
        return "refused"
    return "proved"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="multiprocessing has HMAC-MD5 only")
@pytest.mark.parametrize(("key", "end"), [(KEY, "proved"), (b"wrong", "refused")])
def test_the_standard_library_is_a_peer(key: bytes, end: str) -> None:
    """Python's own client and server and ours prove their key to each other, or refuse a wrong one."""
    deliver_first: list[Callable[[Connection, bytes], None]] = [deliver_challenge, answer_challenge]
    for handshake, functions in ((serve_handshake([OTHER, KEY]), deliver_first[::-1]), (client_handshake(KEY), deliver_first)):
        ours, theirs = Pipe()
        with ours, theirs:
            peer = Background(standard, theirs, key, functions)
            assert talk(handshake, ours) == end
            assert peer.result() == end
