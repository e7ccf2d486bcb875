"""The control connection's bytes: the inbox, both sides of the handshake, and bodies, right and wrong."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import pytest
from hypothesis import given, settings
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
from tests.support.helpers import Background

STEADY = settings(max_examples=100, derandomize=True, database=None, deadline=None, print_blob=True)
KEY, OTHER = b"one key", b"another key"


def framed(body: bytes) -> bytes:
    """A body behind its length, as it travels."""
    return len(body).to_bytes(4, "big") + body


def bodies(data: bytes) -> list[bytes]:
    """The bodies in ``data``, which must all be whole."""
    inbox = Inbox(MAX_HANDSHAKE)
    inbox.feed(data)
    found = []
    while (body := inbox.next()) is not None:
        found.append(body)
    assert not inbox
    return found


# -------------------------------------------------------------------------------------------------------------- inbox


@STEADY
@given(sent=st.lists(st.binary(max_size=30), max_size=8), lengths=st.lists(st.integers(0, 20), max_size=20))
def test_bodies_come_out_as_they_were_sent(sent: list[bytes], lengths: list[int]) -> None:
    """However the bytes are cut, each body comes out once and whole; then nothing is left."""
    data = b"".join(map(framed, sent))
    inbox = Inbox(30)
    found = []
    for length in [*lengths, len(data)]:
        inbox.feed(data[:length])
        data = data[length:]
        while (body := inbox.next()) is not None:
            found.append(body)
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


@STEADY
@given(data=st.binary(max_size=200), limit=st.integers(0, 300))
def test_random_bytes_give_bodies_or_an_error(data: bytes, limit: int) -> None:
    """Whatever comes, bodies are at most as long as the limit, and all of them came."""
    inbox = Inbox(limit)
    inbox.feed(data)
    taken = b""
    try:
        while (body := inbox.next()) is not None:
            assert len(body) <= limit
            taken += framed(body)
    except ControlError:
        pass
    assert data.startswith(taken)


# ------------------------------------------------------------------------------------------------------------- bodies


@STEADY
@given(
    message=st.dictionaries(
        st.text(max_size=5),
        st.none() | st.booleans() | st.integers() | st.text(max_size=10) | st.lists(st.text(max_size=5), max_size=3),
        max_size=5,
    )
)
def test_what_is_encoded_is_decoded(message: dict[str, Any]) -> None:
    """A request or a reply comes out as it was, lone surrogates and all."""
    (body,) = bodies_of_any_length(encode(message))
    assert decode(body) == message


def bodies_of_any_length(data: bytes) -> list[bytes]:
    inbox = Inbox(len(data))
    inbox.feed(data)
    body = inbox.next()
    assert body is not None
    assert not inbox
    return [body]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="half"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'"text"', id="a text"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{} {}", id="two"),
        pytest.param(b'{"a": 1}\0', id="a zero byte behind it"),
        pytest.param(b"\xff\xfe\xff", id="no text in the encoding that it says"),
        pytest.param(b"\xef\xbb\xbf", id="a byte order mark only"),
        pytest.param(b'{"a": "\xff"}', id="no text"),
        pytest.param(b'{"a": ' * 100_000, id="objects deep in each other"),
        pytest.param(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="lists deep in each other"),
        pytest.param(b'{"a": ' + b"9" * 10_000 + b"}", id="a number that is too long"),
    ],
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    """Whatever is wrong with it, it is the one error that says so."""
    with pytest.raises(ControlError):
        decode(body)


def nested(depth: int) -> Any:
    """A list in a list, so deep."""
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
    with pytest.raises(ControlError, match="deep"):
        decode(deep)
    with pytest.raises(ControlError, match="deep"):
        decode(b'{"a": [' * 17 + b"]}" * 17)


PARTS_OF_JSON = [b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"u12", b"d800", b"1", b"e99", b"-", b"null", b"NaN"]


REQUEST = encode({"do": "subscribe", "topics": ["a", "ü"], "capacity": 1 << 20, "more": {"x": None}})[4:]
DAMAGED = st.builds(
    lambda index, value, kept: REQUEST[:index] + bytes([value]) + REQUEST[index + 1 : kept],
    st.integers(0, len(REQUEST) - 1),
    st.integers(0, 255),
    st.integers(0, len(REQUEST)),
)


@STEADY
@given(body=st.binary(max_size=60) | DAMAGED | st.lists(st.sampled_from(PARTS_OF_JSON), max_size=20).map(b"".join))
def test_any_bytes_are_an_object_or_an_error(body: bytes) -> None:
    """Nothing else than ControlError comes of bytes that are no JSON object, and of a request that is damaged or cut."""
    with contextlib.suppress(ControlError):
        assert isinstance(decode(body), dict)


# ---------------------------------------------------------------------------------------------------------- handshake


def shake_hands(server: Handshake, client: Handshake, damage: Callable[[int, bytes], bytes]) -> list[str]:
    """Let both sides talk until each has come to its end; how it ended for each, the server first.

    ``damage`` may change a body on its way, given how many came before it.
    """
    sides = (server, client)
    ends = ["waits", "waits"]
    to_send = [bodies(next(server)), bodies(next(client))]
    assert not to_send[1], "the server speaks first"
    count = 0
    while to_send[0] or to_send[1]:
        sender = 0 if to_send[0] else 1
        body = damage(count, to_send[sender].pop(0))
        count += 1
        other = 1 - sender
        if ends[other] != "waits":
            continue
        try:
            to_send[other] += bodies(sides[other].send(body))
        except StopIteration as done:
            ends[other] = "proved"
            to_send[other] += bodies(done.value)
        except ControlError as error:
            ends[other] = "refused"
            to_send[other] += bodies(error.args[1]) if len(error.args) > 1 else []
    return ends


def as_it_is(_: int, body: bytes) -> bytes:
    """Change nothing."""
    return body


@pytest.mark.parametrize("keys", [[KEY], [KEY, OTHER], [OTHER, KEY]])
def test_both_sides_prove_their_key(keys: list[bytes]) -> None:
    """Whichever of the server's keys the client has, both know that the other has it."""
    assert shake_hands(serve_handshake(keys), client_handshake(KEY), as_it_is) == ["proved", "proved"]


@pytest.mark.parametrize("key", [b"third key", KEY[:-1], KEY + b"\0x", b"\0"])
def test_a_wrong_key_is_refused_on_both_sides(key: bytes) -> None:
    """The server takes none but its own, and says so to the client; without any, it takes nobody."""
    assert shake_hands(serve_handshake([KEY, OTHER]), client_handshake(key), as_it_is) == ["refused", "refused"]
    assert shake_hands(serve_handshake([]), client_handshake(KEY), as_it_is) == ["refused", "refused"]


def test_a_server_without_the_key_is_found_out() -> None:
    """One that welcomes whatever it is answered does not come past the client's own question."""
    client = client_handshake(KEY)
    next(client)
    client.send(b"#CHALLENGE#{sha256}" + bytes(32))
    (question,) = bodies(client.send(b"#WELCOME#"))
    assert question.startswith(b"#CHALLENGE#")
    with pytest.raises(ControlError) as caught:
        client.send(b"{sha256}" + bytes(32))
    assert bodies(caught.value.args[1]) == [b"#FAILURE#"]


def test_questions_are_never_the_same() -> None:
    """An answer that was overheard opens nothing the next time."""
    assert next(serve_handshake([KEY])) != next(serve_handshake([KEY]))


def test_every_truncation_is_refused() -> None:
    """Each of the handshake's bodies, cut at any byte, is refused by who receives it."""
    lengths: list[int] = []

    def measure(_: int, body: bytes) -> bytes:
        lengths.append(len(body))
        return body

    assert shake_hands(serve_handshake([KEY]), client_handshake(KEY), measure) == ["proved", "proved"]
    assert len(lengths) == 6
    for number, length in enumerate(lengths):
        for cut in range(length):

            def damage(count: int, body: bytes, number: int = number, cut: int = cut) -> bytes:
                return body[:cut] if count == number else body

            ends = shake_hands(serve_handshake([KEY]), client_handshake(KEY), damage)
            assert "refused" in ends
            assert "proved" not in ends or number == 5  # which the client sends when it has nothing more to ask


def test_every_changed_byte_is_refused() -> None:
    """Each of the handshake's bodies, with any byte changed, is refused by one of the two."""
    for number in range(6):
        for place in range(60):
            changed = False

            def damage(count: int, body: bytes, number: int = number, place: int = place) -> bytes:
                nonlocal changed
                if count != number or place >= len(body):
                    return body
                changed = True
                return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]

            ends = shake_hands(serve_handshake([KEY]), client_handshake(KEY), damage)
            assert ("refused" in ends) == changed


STARTS = st.sampled_from([b"", b"#CHALLENGE#", b"#CHALLENGE#{sha256}", b"#CHALLENGE#{md5}", b"#WELCOME#", b"{sha256}"])
BODIES = st.builds(lambda start, rest: (start + rest)[:MAX_HANDSHAKE], STARTS, st.binary(max_size=MAX_HANDSHAKE))


def goes_on(side: Handshake, received: list[bytes]) -> str:
    """How a side ends that receives these bodies."""
    try:
        for body in received:
            side.send(body)
    except StopIteration:
        return "proved"
    except ControlError:
        return "refused"
    return "waits"


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
        assert goes_on(client, received) == "refused"
        # when the client has proved its key, the rest is for the client to ask
        assert goes_on(server, received) == "refused" or (steps and received[2 - steps] == b"#WELCOME#")


@pytest.mark.parametrize("question", [b"", b"x" * 15, b"{sha256}" + bytes(7), b"{sha256}" + bytes(238), b"{md5}" + bytes(32)])
def test_a_challenge_of_another_length_or_kind_is_not_answered(question: bytes) -> None:
    """One may not be made to sign what somebody else could know, nor with a digest that is not chosen here."""
    client = client_handshake(KEY)
    next(client)
    with pytest.raises(ControlError):
        client.send(b"#CHALLENGE#" + question)


@pytest.mark.parametrize("length", [8, 237])
def test_a_challenge_of_any_length_between_is_answered(length: int) -> None:
    """The shortest, and the longest that fits into a message of the handshake."""
    client = client_handshake(KEY)
    next(client)
    question = b"{sha256}" + bytes(length)
    assert bodies(client.send(b"#CHALLENGE#" + question)) == [b"{sha256}" + hmac.digest(KEY, question, "sha256")]


# ------------------------------------------------------------------------------------------ the standard library's side


def talk(handshake: Handshake, connection: Connection) -> str:
    """Go through a handshake on a connection of the standard library's, byte for byte; how it ended."""
    inbox = Inbox(MAX_HANDSHAKE)
    try:
        data = next(handshake)
        while True:
            os.write(connection.fileno(), data)
            while (body := inbox.next()) is None:
                more = os.read(connection.fileno(), 7)
                assert more, "the other side has hung up"
                inbox.feed(more)
            data = handshake.send(body)
    except StopIteration as done:
        os.write(connection.fileno(), done.value)
        return "proved"
    except ControlError as error:
        os.write(connection.fileno(), error.args[1] if len(error.args) > 1 else b"")
        return "refused"


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    """The two ends of a connection."""
    ours, theirs = Pipe()
    with ours, theirs:
        yield ours, theirs


with_sha256 = pytest.mark.skipif(sys.version_info < (3, 12), reason="multiprocessing has HMAC-MD5 only")


def standard_server(connection: Connection, key: bytes) -> None:
    """What multiprocessing's Listener does with who connects."""
    deliver_challenge(connection, key)
    answer_challenge(connection, key)


def standard_client(connection: Connection, key: bytes) -> None:
    """What multiprocessing's Client does when it has connected."""
    answer_challenge(connection, key)
    deliver_challenge(connection, key)


@with_sha256
def test_the_standard_client_is_let_in(ends: tuple[Connection, Connection]) -> None:
    """Python's own client and our server prove their key to each other."""
    ours, theirs = ends
    client = Background(standard_client, theirs, KEY)
    assert talk(serve_handshake([OTHER, KEY]), ours) == "proved"
    client.result()


@with_sha256
def test_the_standard_server_lets_us_in(ends: tuple[Connection, Connection]) -> None:
    """Our client and Python's own server prove their key to each other."""
    ours, theirs = ends
    server = Background(standard_server, theirs, KEY)
    assert talk(client_handshake(KEY), ours) == "proved"
    server.result()


@with_sha256
def test_the_standard_client_hears_that_its_key_is_wrong(ends: tuple[Connection, Connection]) -> None:
    """It gets its usual error from our server."""
    ours, theirs = ends
    client = Background(standard_client, theirs, b"wrong")
    assert talk(serve_handshake([OTHER, KEY]), ours) == "refused"
    assert isinstance(client.error(), AuthenticationError)


@with_sha256
def test_the_standard_server_tells_us_that_our_key_is_wrong(ends: tuple[Connection, Connection]) -> None:
    """Our client understands its refusal."""
    ours, theirs = ends
    server = Background(standard_server, theirs, KEY)
    assert talk(client_handshake(b"wrong"), ours) == "refused"
    assert isinstance(server.error(), AuthenticationError)


def test_the_handshake_does_not_depend_on_the_cutting(ends: tuple[Connection, Connection]) -> None:
    """Both of our sides, over a real connection that is read in small parts, come to the same end."""
    ours, theirs = ends
    client = Background(talk, client_handshake(KEY), theirs)
    assert talk(serve_handshake([KEY]), ours) == "proved"
    assert client.result() == "proved"
