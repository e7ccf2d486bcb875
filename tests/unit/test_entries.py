"""Entries of bridges: what is signed comes back as it was, anything else is refused by one exception; keys; URLs; retention."""

import contextlib
import hashlib
import hmac
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpbroadcast.bridge.engine import engine_class, shown
from mpbroadcast.bridge.entries import LEAST, Assembler, Entry, EntryRefused, Message, Signer
from mpbroadcast.bridge.keys import check_keys, keys_of
from mpbroadcast.bridge.retention import Retention
from tests.support.frames_made import STEADY

OLD, NEW, OTHER = b"the key of yesterday", b"the key of tomorrow", b"the key of an enemy"
ORIGIN = b"originAA"
TOPICS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)
MESSAGES = st.lists(st.tuples(TOPICS, st.binary(max_size=5000)), min_size=1, max_size=30)
SIGNER = Signer([NEW, OLD], "room")


def packed(messages: Sequence[Message], most: int = 1 << 19, first: int = 1, signer: Signer = SIGNER) -> list[bytes]:
    return [data for data, _ in signer.pack(ORIGIN, 1, first, messages, most)]


def received(entries: Sequence[bytes], own: bytes = b"ourselfs") -> list[tuple[int, str, bytes]]:
    """Return what an assembler returns for these entries: each message with its position."""
    assembler = Assembler(own, "0")
    found = []
    for index, data in enumerate(entries):
        if entry := assembler.put(str(index + 1), SIGNER.open(data), 0.0):
            found += [(entry.first + i, topic, bytes(payload)) for i, (topic, payload) in enumerate(entry.messages)]
    return found


@settings(STEADY, max_examples=40)
@given(messages=MESSAGES, most=st.integers(LEAST, 1 << 15), first=st.integers(1, 1 << 60))
def test_what_is_signed_comes_back(messages: list[tuple[str, bytes]], most: int, first: int) -> None:
    """All messages, with their positions, in entries that are no longer than they may be. What may be acknowledged grows, and
    an entry is the last of a message exactly when its position may be."""
    entries = [*SIGNER.pack(ORIGIN, 7, first, messages, most)]
    assert received([data for data, _ in entries]) == [(first + i, *message) for i, message in enumerate(messages)]
    assert all(len(data) <= most for data, _ in entries)
    acknowledged = [position for _, position in entries]
    assert acknowledged == sorted(acknowledged)
    assert acknowledged[-1] == first + len(messages) - 1
    for data, position in entries:
        entry = SIGNER.open(data)
        is_whole = entry.offset + len(entry.messages[0][1]) == entry.total if entry.is_piece else True
        assert (entry.origin, entry.incarnation) == (ORIGIN, 7)
        assert position == entry.first + len(entry.messages) - 1 - (not is_whole)


def test_a_hello_comes_back() -> None:
    """It has no message, and the position of what comes next."""
    assert SIGNER.open(SIGNER.hello(ORIGIN, 3, 99)) == Entry(ORIGIN, 3, 99, [])


@settings(STEADY, max_examples=100)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    """Nothing but the one exception, also behind a right beginning."""
    for one in (data, packed([("t", b"x")])[0][: len(data) % 60] + data):
        with pytest.raises(EntryRefused):
            SIGNER.open(one)


BODIES = st.binary(max_size=200) | st.integers(0, 20).map(
    lambda size: b"\1\0\0\0" + bytes([size]) + bytes(3) + b"t" * (1 + size)
)


@settings(STEADY, max_examples=100)
@given(body=BODIES, kind=st.integers(0, 4), numbers=st.tuples(*[st.integers(0, 30) | st.integers(0, (1 << 64) - 1)] * 4))
def test_what_holds_a_key_and_writes_nonsense_is_refused(body: bytes, kind: int, numbers: tuple[int, ...]) -> None:
    """Signed with the right key, with any fields: an entry whose parts fit together, or the one exception."""
    incarnation, first, offset, total = numbers
    key_id = hashlib.sha256(b"mpbroadcast bridge key " + NEW).digest()[:4]
    count = 1 if len(body) < 40 else 5
    head = b"MPB1" + bytes([kind]) + key_id + ORIGIN + incarnation.to_bytes(8, "little") + first.to_bytes(8, "little")
    data = head + count.to_bytes(4, "little") + offset.to_bytes(8, "little") + total.to_bytes(8, "little") + body
    data += hmac.digest(NEW, b"mpbroadcast bridge 4 room" + data, "sha256")
    with contextlib.suppress(EntryRefused):
        entry = SIGNER.open(data)
        assert sum(len(topic.encode()) + len(payload) + 8 for topic, payload in entry.messages) == len(body)
        assert 0 < entry.first < 1 << 62


def test_each_field_is_signed() -> None:
    """No byte of any kind of entry can be another one, none can be missing or added. An entry is good in its stream only."""
    large = [("topic", b"payload" * 1000)]
    for data in (*packed([("a", b"b"), ("c", b"d")]), packed(large, LEAST)[1], SIGNER.hello(ORIGIN, 1, 5)):
        SIGNER.open(data)
        positions = range(len(data)) if len(data) < 300 else [*range(120), *range(len(data) - 40, len(data))]
        changed = [data[:i] + bytes([data[i] ^ (1 << (i % 8))]) + data[i + 1 :] for i in positions]
        for one in (*changed, data[:-1], data + b"\0", data[1:], data * 2):
            with pytest.raises(EntryRefused):
                SIGNER.open(one)
        with pytest.raises(EntryRefused):
            Signer([NEW, OLD], "roo").open(data)


def test_keys_can_be_changed() -> None:
    """The first signs, all are accepted, no other."""
    data = packed([("a", b"b")])[0]
    for keys in ([NEW], [OLD, NEW], [OTHER, NEW]):
        assert Signer(keys, "room").open(data).messages == [("a", memoryview(b"b"))]
    for keys in ([OLD], [OTHER, OLD]):
        with pytest.raises(EntryRefused, match="key"):
            Signer(keys, "room").open(data)


def test_payloads_are_not_copied() -> None:
    """Those of a batch are views into the entry; the pieces of a large message have one buffer from the first on."""
    data = packed([("a", b"b" * 1000)])[0]
    assert SIGNER.open(data).messages[0][1].obj is data
    for payload in (b"x" * 9000, bytearray(b"x" * 9000), memoryview(b"x" * 9000)):
        assert received(packed([("t", payload)], LEAST)) == [(1, "t", b"x" * 9000)]


LARGE = random.Random(1).randbytes(20_000)


def pieces(first: int, most: int = 4096, incarnation: int = 1, origin: bytes = ORIGIN) -> list[bytes]:
    return [data for data, _ in SIGNER.pack(origin, incarnation, first, [("large", LARGE)], most)]


@pytest.mark.parametrize(
    ("entries", "positions"),
    [
        (packed([("s", b"1")]) + pieces(2) + packed([("s", b"3")], first=3), [1, 2, 3]),
        (pieces(5)[:3] + pieces(5) + packed([("s", b"")], first=6), [5, 6]),  # a bridge that was killed: all again
        (pieces(5)[:3] + pieces(5, 2500), [5]),  # in pieces of another size
        (pieces(5) + pieces(5), [5, 5]),  # a copy, which the broker drops
        ([piece for piece in pieces(5) for _ in range(2)], [5]),
        (pieces(5)[:3] + packed([("s", b"")], first=4) + pieces(5)[3:], [4, 5]),  # a copy of what came before
        (pieces(5)[:3] + pieces(3)[:2] + pieces(5)[3:], [5]),
        (pieces(5)[:3] + pieces(6), [6]),  # 5 was dropped by its sender
        (pieces(5)[:3] + packed([("s", b"")], first=5) + pieces(5)[3:], [5]),  # it was completed by a copy
        (pieces(5)[:3] + pieces(1, incarnation=2), [1]),  # a broker that has taken over
        (pieces(5)[1:], []),  # its beginning was removed from the log
        (pieces(5)[:2] + pieces(5)[3:], []),
        (pieces(5)[:2] + pieces(5)[3:] + pieces(5), [5]),
        ([SIGNER.hello(ORIGIN, 1, 5), *pieces(5)[:3], SIGNER.hello(ORIGIN, 1, 5), *pieces(5)[3:]], [5]),
        ([data for pair in zip(pieces(5), pieces(9, origin=b"anotherO"), strict=True) for data in pair], [5, 9]),
    ],
)
def test_pieces_among_other_entries(entries: list[bytes], positions: list[int]) -> None:
    """In order among the small ones; copies and old ones do no harm; what is not whole is not returned."""
    found = received(entries)
    assert [position for position, _, _ in found] == positions
    assert all(payload == LARGE for _, topic, payload in found if topic == "large")
    assert received(entries, own=ORIGIN) == [one for one in found if one[0] == 9]  # its own come back to it


def test_reading_begins_again_before_what_is_not_whole() -> None:
    """The cursor stays in front of the oldest message of which a piece is missing, for as long as its sender may go on."""
    assembler = Assembler(b"ourselfs", "start", patience=10.0, most=2)
    first, *more = [SIGNER.open(data) for data in pieces(5)]
    small = SIGNER.open(packed([("s", b"")])[0])
    assert assembler.put("1", None, 0.0) is None  # refused
    assert assembler.cursor == "1"
    assembler.put("2", first, 0.0)
    assert assembler.put("3", small, 9.0) is small
    assert assembler.cursor == "1"
    assembler.put("4", more[0], 9.0)
    assembler.put("5", small, 18.0)
    assert assembler.cursor == "1"  # a piece had come
    assembler.put("6", small, 19.5)
    assert assembler.cursor == "6"
    for name in (b"origin-1", b"origin-2", b"origin-3"):
        assembler.put(name.decode(), SIGNER.open(pieces(1, origin=name)[0]), 20.0)
    assert assembler.cursor == "origin-1"  # of three the oldest is given up


def test_where_keys_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An argument, or the environment, a line each. An error shows how to make one, and shows none; neither does a repr."""
    assert check_keys("k" * 16) == (b"k" * 16,)
    assert check_keys(["ä" * 8, b"k" * 20]) == ("ä".encode() * 8, b"k" * 20)
    monkeypatch.setenv("MPBROADCAST_BRIDGE_KEY", f"{'n' * 16}\n\n {'o' * 17} \n")
    assert check_keys(None) == (b"n" * 16, b"o" * 17)
    assert "nnn" not in repr(check_keys(None))
    monkeypatch.delenv("MPBROADCAST_BRIDGE_KEY")
    cases: list[Any] = [None, "", [], "secret", ["k" * 16, b"secret"]]
    for wrong in cases:
        with pytest.raises(ValueError, match="token_hex") as caught:
            check_keys(wrong)
        assert "secret'" not in str(caught.value)
        assert caught.value.__cause__ is None
    with pytest.raises(ValueError, match="token_hex"):
        keys_of("\n")
    cases = [5, [5], {b"k" * 16}]
    for odd in cases:
        with pytest.raises(TypeError):
            check_keys(odd)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://host/0", "redis://host/0"),
        ("rediss://user:secret@[::1]:6379/0?ssl_ca_certs=/secret", "rediss://[::1]:6379/0"),
        ("redis://:sec/ret@host/0", "redis://..."),  # as a URL, its host is ":sec"
        ("redis://:sec#ret@host", "redis://..."),
        ("redis://:1?secret@host", "redis://..."),
        ("redis://:secret:secret@host", "redis://host"),
        ("redis://:a,secret@host", "redis://host"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
        ("nats://u:secret@a:4222,nats://u:secret@b:4222?credentials=/secret", "nats://a:4222,nats://b:4222"),
        ("redis://host?password=secret@x", "redis://..."),
        ("secret@host", "..."),
        ("", "..."),
    ],
)
def test_a_url_is_shown_without_secrets(url: str, text: str) -> None:
    assert shown(url) == text


def test_the_engine_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the package's own, or that of an entry point. A missing client library is an error that names the extra."""

    class Point:
        name = "kafka"

        def load(self) -> Any:
            return Point

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point()] * (group == "mpbroadcast.engines"))
    assert engine_class("kafka://host") is Point  # type: ignore[comparison-overlap]
    with pytest.raises(ValueError, match=r"'amqp://host'.*redis://"):
        engine_class("amqp://user:secret@host")
    monkeypatch.setitem(__import__("sys").modules, "mpbroadcast.bridge.nats_engine", None)
    with pytest.raises(ImportError, match=r"mpbroadcast\[nats\]"):
        engine_class("nats://host")


def test_what_may_be_removed() -> None:
    """By bytes, and by the time since a bridge has read it; never the newest part; nothing twice."""
    retention: Retention[int] = Retention(1_000_000, 100.0)
    for position in range(1, 1001):
        retention.add(position, 9_936, 0.0)  # 10,000 with what an entry costs
    cut = retention.cut(1.0)
    assert cut is not None
    assert 870 < cut <= 901
    assert retention.cut(1.0) is None
    for position in range(900, 1101):
        retention.add(position, 0, 90.0)  # some are read again
    assert retention.cut(99.0) is None
    assert retention.cut(100.0) == 1001
    assert retention.cut(1000.0) is None  # a reader stands on the newest
    retention.add(1101, 0, 1000.0)
    assert retention.cut(1000.0) == 1101
    retention.reset()
    retention.add(1, 0, 0.0)  # the engine was emptied
    retention.add(2, 0, 100.0)
    assert retention.cut(100.0) == 2
