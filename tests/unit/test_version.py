"""The version of the protocol increases with all that travels, and each side announces it in the handshake."""

import ast
import dataclasses
import hashlib
import pickle
import re
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import mpbroadcast
from mpbroadcast import BridgeStats, BrokerStats, GroupStats, PublisherStats, SubscriberStats, VersionMismatch
from mpbroadcast.bridge.entries import EntryRefused, OtherFormat, Signer
from mpbroadcast.protocol import fd_packets, frames, pickling, runs
from mpbroadcast.protocol.control import Inbox, client_handshake, encode, serve_handshake
from mpbroadcast.protocol.reports import report
from mpbroadcast.protocol.version import OWN, PROTOCOL, VERSION, Announcement, announce, announced

ROOT: Final = Path(mpbroadcast.__file__).parents[1]

# The digest of all that travels between a process and its broker, under this number. If a test here fails, what travels has
# changed: increase PROTOCOL in mpbroadcast/protocol/version.py by one, and enter the number and the new digest here, which the
# failure shows. Never change the digest alone: programs of both versions would connect, and misread each other.
DIGEST: Final = (1, "c588d131c8c13d9c2dd0fadc8059eb09")

# The same of the entries of bridges, whose format is the fourth character of each: _FORMAT in mpbroadcast/bridge/entries.py.
ENTRIES: Final = (b"MPB1", "98815cce472ec0fe71f933fb3e9d4660")


def digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(b"%d %b" % (len(part), part) for part in parts)).hexdigest()[:32]


def frames_made() -> Iterator[bytes]:
    """Yield a frame of each kind."""
    for exclude in (0, 7):
        yield frames.frame_head(3, b"topic", exclude, frames.IMAGE) + b"abc"
        yield frames.reference_frame(1, 2 << 16, 3, b"topic", exclude, True)
        yield frames.memory_frame(1, 2, b"topic", exclude)
    yield frames.plain_reference(1, 2, 3)
    yield from frames.pieces(b"a piece", 5)
    yield frames.abort(5)
    yield frames.bridge_frame(frames.Arrival(b"12345678", 1, 2, 3))
    yield frames.bridge_frame(frames.Cursor("a position"))


def runs_made() -> Iterator[bytes]:
    """Yield a run of each kind."""
    head = frames.frame_head(3, b"t")
    batch = frames.Batch((head + b"abc") * 3, array("I", [len(head) + 3] * 3), b"t", 0, len(head))
    yield bytes(runs.run_of(batch, 1000).data)
    yield from runs.single_runs(frames.Singles([b"t", b""], [head + b"abc", frames.frame_head(1, b"") + b"a"]), 1000)
    references = frames.reference_frame(1, 2 << 16, 3, b"t")
    several = frames.References(2 * references, array("I", [len(references)] * 2), b"t", 0, len(head), False, 1)
    yield runs.references_run(several, 1000, 4)
    yield runs.memory_run(frames.MemfdMessage(1, 9, b"t", 0, frames.memory_frame(1, 9, b"t"), True), 1000, 5)
    for kind in (runs.END, runs.GAP, runs.SKIPPED, runs.OVERFLOWED, runs.RING_OFFERED, runs.RING_GONE, runs.RESTARTED):
        yield runs.note(kind, 6, is_exact=kind != runs.GAP)


def packets_made() -> Iterator[bytes]:
    """Yield a packet of each kind with its name, the reports, and a payload that is not a plain pickle."""
    for name, kind in sorted(vars(fd_packets).items()):
        if name.isupper() and not name.startswith("_"):
            yield name.encode() + fd_packets.pack(kind, 1, 2)
    yield report(3)
    yield report(3, leaves=True)
    image = b"".join(map(bytes, pickling.gather(pickle.PickleBuffer(bytearray(1 << 16))).parts))
    yield image
    yield pickling.wrapped(image)


def requests_made() -> Iterator[bytes]:
    """Yield a request as it travels, and the names of all requests, and of the fields that are read and replied."""
    yield encode({"do": "attach", "a": [None, True, 1.5, "ü"]})
    for path in sorted((ROOT / "mpbroadcast/broker").glob("*request*.py")):
        names = set[str]()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("message.get", "integer"):
                names |= {one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)}
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "message":
                names.add(ast.literal_eval(node.slice))
            elif isinstance(node, ast.Dict):
                names |= {one.value for one in node.keys if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        yield " ".join(sorted(names)).encode()
    page = (ROOT / "docs/protocol.md").read_text()
    rows = re.findall(
        r"^\| (`[^|]*`) \|(.*)\|(.*)\|$", page.partition("JSON object")[2].partition("\n## ")[0], flags=re.MULTILINE
    )
    assert len(rows) > 20
    for row in rows:  # the names only: their explanations do not travel
        yield " | ".join(" ".join(re.findall(r"`([^`]+)`", cell)) for cell in row).encode()
    for kind in (BrokerStats, SubscriberStats, PublisherStats, GroupStats, BridgeStats):
        yield " ".join(field.name for field in dataclasses.fields(kind)).encode()


def test_the_number_increases_with_what_travels() -> None:
    """A change of a frame, a run, a packet, a report or a request has another PROTOCOL: see DIGEST."""
    made = digest([*frames_made(), *runs_made(), *packets_made(), *requests_made()])
    assert (PROTOCOL, made) == DIGEST, "what travels has changed, or the number: read the text above DIGEST"


def test_the_format_of_entries_changes_with_them() -> None:
    """A change of an entry has another format: see ENTRIES."""
    signer = Signer([b"sixteen bytes at"], "stream")
    entries = [signer.hello(b"12345678", 1, 2)]
    entries += [entry for entry, _ in signer.pack(b"12345678", 1, 2, [("topic", b"abc"), ("t", bytes(3000))], 2048)]
    assert (entries[0][:4], digest(entries)) == ENTRIES, "entries have changed, or their format: read the text above ENTRIES"


@pytest.mark.parametrize("damage", ["format", "name"])
def test_an_entry_of_another_format_is_refused_as_one(damage: str) -> None:
    """It is not taken for damage, also where its signature is another; what is not a bridge's at all is."""
    signer = Signer([b"sixteen bytes at"], "stream")
    entry = signer.hello(b"12345678", 1, 2)
    with pytest.raises(EntryRefused) as caught:
        signer.open(b"MPB2" + entry[4:] if damage == "format" else b"xyz1" + entry[4:])
    assert isinstance(caught.value, OtherFormat) == (damage == "format")
    assert ("format 2" in str(caught.value)) == (damage == "format")


def outcomes(client: Announcement, broker: Announcement) -> tuple[Announcement | None, Announcement | None]:
    """Return what the client and the broker know of each other after a handshake."""
    serving, connecting = serve_handshake([b"key"], announce(broker)), client_handshake(b"key", announce(client))
    data, known = next(serving), list[Announcement | None]()
    next(connecting)
    receiver, other = connecting, serving
    while len(known) < 2:
        inbox = Inbox(1000)
        inbox.feed(data)
        body = inbox.next()
        assert body is not None
        try:
            data = receiver.send(body)
        except StopIteration as done:
            data = done.value.last
            known.append(done.value.peer)
        receiver, other = other, receiver
    return known[0], known[1]


@pytest.mark.parametrize("other", [OWN, Announcement(PROTOCOL + 1, "9.8.7rc1+local")])
def test_each_side_knows_the_version_of_the_other(other: Announcement) -> None:
    """After the handshake, whichever side is the newer one."""
    assert outcomes(OWN, other) == (other, OWN)
    assert outcomes(other, OWN) == (OWN, other)


@pytest.mark.parametrize(
    "data",
    [b"", b"protocol 1", b"protocol x, mpbroadcast 1", b"protocol 1, mpbroadcast a b", announce(OWN) + b"\n", b"\xff" * 60],
)
def test_what_is_not_an_announcement(data: bytes) -> None:
    """The other side is taken for one without a version."""
    assert announced(data) is None
    assert announced(announce(OWN)) == OWN


def test_the_error_can_be_pickled_and_caught() -> None:
    """As the other errors; it is a ConnectionError, but not a BrokerLost, after which calls try again."""
    error = VersionMismatch("text")
    assert isinstance(error, ConnectionError)
    assert isinstance(error, mpbroadcast.BroadcastError)
    assert not isinstance(error, mpbroadcast.BrokerLost)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (VersionMismatch, "text")


def test_the_version_of_a_source_tree() -> None:
    """It is right where the package is not installed, and reads nothing that is installed."""
    code = "import sys, mpbroadcast; print(mpbroadcast.__version__, 'importlib.metadata' in sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [VERSION, "False"]
    assert mpbroadcast.__version__ == VERSION
