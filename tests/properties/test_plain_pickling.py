"""Unpickling of plain data only: what is plain comes back as it was, and nothing else has an effect."""

import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpbroadcast.protocol.pickling import dumps, loads, wrapped
from mpbroadcast.protocol.plain_pickling import PLAIN_DATA, load_plain
from tests.support.frames_made import STEADY

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary(max_size=300) | st.text(max_size=300)
ATOMS |= st.sampled_from(["\ud800", "x" * 300, b"y" * 300, 1 << 3000])
KEYS = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=5)
PLAIN = st.recursive(
    ATOMS | st.sets(KEYS, max_size=5),
    lambda inner: st.lists(inner) | st.lists(inner, max_size=5).map(tuple) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@settings(STEADY, max_examples=60)
@given(value=PLAIN, twice=st.booleans())
def test_plain_data_comes_back(value: Any, twice: bool) -> None:
    """Also where a part is in it twice, with what follows the pickle in a pipe, and from shared memory."""
    message = [value, value] if twice else value
    data = dumps(message, 5) + b"next"
    for found in (load_plain(data), load_plain(memoryview(data))):
        assert found == message
        assert repr(found) == repr(loads(data))  # True is not 1


def test_what_is_large_or_a_part_of_itself_comes_back() -> None:
    """Lists, dicts and tuples that contain themselves, or refer to much; all that expands to little more than they are."""
    texts = [str(number) for number in range(300)]
    for large in ("x" * 70_000, b"y" * 70_000, [*range(70_000)], [texts, texts[-1]], [LARGE] * 60):
        assert load_plain(dumps(large, 5)) == large
    inner: list[Any] = []
    inner += [inner, {"me": inner}, (inner,), (inner, 2, 3, 4)]
    long: tuple[Any, ...] = ([], 2, 3, 4, 5)
    long[0].append(long)
    for value in (inner, inner[2], inner[3], long):
        assert repr(load_plain(dumps(value, 5))) == repr(value)


class Hostile:
    """Imports ``this``, and calls what is in it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("this",)


def doubled(depth: int, kind: Callable[[Any], Any]) -> Any:
    value = kind(())
    for _ in range(depth):
        value = kind((value, value))
    return value


LARGE = [1 << 8_000_000]
LONGEST = b"\xff\xff\xff\x7f"
REFUSED = {
    "a call": (dumps(Hostile(), 5), "an object of builtins.__import__"),
    "a call of an old protocol": (pickle.dumps(Hostile(), 0), "operation 0x63"),
    "an object": (dumps([complex(1, 2)], 5), "an object of builtins.complex"),
    "a class": (dumps({"kind": Hostile}, 5), "an object of tests"),
    "a bytearray": (dumps(bytearray(3), 5), "a bytearray"),
    "a frozenset": (dumps(frozenset((1,)), 5), "a frozenset"),
    "a buffer": (dumps(pickle.PickleBuffer(b"xyz"), 5, buffer_callback=lambda _: False), "a buffer"),
    "an image": (wrapped(b""), "an object of mpbroadcast.protocol.pickling.load_image"),
    "a registered class": (b"\x80\x05\x82\x01.", "operation 0x82"),
    "an id from elsewhere": (b"\x80\x05NQ.", "operation 0x51"),
    "a large memo": (b"\x80\x05]r" + LONGEST + b".", "operation 0x72"),
    "a large bytearray": (b"\x80\x05\x96" + LONGEST + bytes(4) + b".", "a bytearray"),
    "large bytes": (b"\x80\x05\x8e" + LONGEST + bytes(4) + b".", "ends too early"),
    "a large number": (b"\x80\x05\x8b" + LONGEST + b".", "ends too early"),
    "a deep key": (b"\x80\x05})" + b"\x85" * 100_000 + b"Ns.", "nested too deeply"),
    "a deep member": (b"\x80\x05\x8f()" + b"\x85" * 100_000 + b"\x90.", "nested too deeply"),
    "lists that double": (dumps(doubled(60, list), 5), "expands"),
    "tuples that double": (dumps(doubled(60, tuple), 5), "expands"),
    "dicts that double": (dumps(doubled(60, lambda pair: dict(enumerate(pair))), 5), "expands"),
    "a text repeated": (dumps(["x" * 100_000] * 5_000, 5), "expands"),
    "a number repeated": (dumps([LARGE] * 120, 5), "expands"),
    "a list as a key": (b"\x80\x05}]Ns.", "unhashable"),
    "half a dict": (b"\x80\x05}(Nu.", "cannot be added"),
    "a set of a list": (b"\x80\x05](N\x90.", "cannot be added"),
    "a list of a set": (b"\x80\x05\x8f(Ne.", "cannot be added"),
    "a set of a dict": (b"\x80\x05}(NN\x90.", "cannot be added"),
    "an object without a name": (b"\x80\x05N\x93.", "operation 0x93"),
    "an object whose name is none": (b"\x80\x05K\x01K\x02\x93.", "operation 0x93"),
    "a call behind names": (b"\x80\x05\x8c\x01a\x8c\x01bR.", "operation 0x52"),
    "no end": (b"\x80\x05\x8c\x01a", "out of range"),
    "no memo": (b"\x80\x05h\x07.", "out of range"),
    "no text": (b"\x80\x05\x8c\x01\xff.", "codec"),
    "no mark": (b"\x80\x05t.", "pop from empty list"),
    "no tuple": (b"\x80\x05N\x86.", "out of range"),
    "nothing": (b"", "out of range"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused(case: str) -> None:
    """With its reason, and before it has imported or called anything, taken much memory, or taken long."""
    data, reason = REFUSED[case]
    with pytest.raises(pickle.UnpicklingError, match=reason):
        load_plain(data)
    assert "this" not in sys.modules


def test_a_key_that_doubles_is_refused() -> None:
    """Its hash would take 2 ** 60 steps."""
    key = doubled(60, tuple)
    data = dumps(key, 5)
    with pytest.raises(pickle.UnpicklingError, match="its keys expand"):
        load_plain(b"\x80\x05}" + data[2:-1] + b"Ns.")


def test_buffers_beside_a_pickle_are_refused() -> None:
    """What numpy leaves out of its pickles."""
    for loader in (PLAIN_DATA.image, PLAIN_DATA.copied_image):
        with pytest.raises(pickle.UnpicklingError, match="large buffers"):
            loader(b"")


PIECES = [b"N", b"\x88", b"K\x01", b"\x8c\x01a", b"C\x02xy", b"\x8a\x01\xff", b"G" + bytes(8), b"]", b"}", b")", b"\x8f"]
PIECES += [b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"\x90", b"\x94", b"h\x00", b"j\x01\0\0\0"]
PIECES += [b"0", b"1", b"\x93", b"R", b"."]


@settings(STEADY, max_examples=100)
@example(pieces=[b"N", b"K\x01", b"0"], noise=b"")
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30), noise=st.binary(max_size=5))
def test_any_bytes_are_plain_data_or_an_error(pieces: list[bytes], noise: bytes) -> None:
    """Whatever bytes come; what is accepted is what ``pickle`` itself makes of them."""
    data = b"\x80\x05" + b"".join(pieces) + noise + b"."
    try:
        found = load_plain(data)
    except pickle.UnpicklingError:
        return
    assert repr(loads(data)) == repr(found)
