"""Images: messages with large buffers, which travel uncopied behind their pickle."""

import pickle
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpbroadcast.protocol.pickling import (
    GATHER_BYTES_FROM,
    OUT_OF_BAND,
    LargeBuffer,
    as_payload,
    dumps,
    gather,
    keep_in_band,
    load_image,
    loads,
    wrapped,
)
from mpbroadcast.protocol.plain_pickling import load_plain
from tests.support.frames_made import STEADY
from tests.support.helpers import pattern


class Named(bytes):
    """A subclass, which a pickle names."""


def image_of(message: object) -> bytes | None:
    """The image that a message becomes, or ``None`` when it is a plain pickle; its size must be right."""
    payload = gather(message)
    data = b"".join(payload.parts)
    assert len(data) == payload.size
    if payload.image:
        return data
    assert loads(data) == message
    return None


BUFFERS = st.lists(st.sampled_from([0, 1, 63, 64, 1000, OUT_OF_BAND - 1, OUT_OF_BAND, OUT_OF_BAND + 1, 200_001]), max_size=8)


@settings(STEADY, max_examples=40)
@given(sizes=BUFFERS, extra=st.sampled_from([b"", b"x" * 70_000, bytearray(70_000)]))
def test_buffers_come_back_as_they_were(sizes: list[int], extra: bytes | bytearray) -> None:
    """Large ones uncopied and aligned behind the pickle, small ones in it; each with its own bytes, and writable."""
    buffers = [bytearray(pattern(number, size)) for number, size in enumerate(sizes)]
    message = [extra, *map(pickle.PickleBuffer, buffers)]
    if max(sizes, default=0) < OUT_OF_BAND:
        assert not gather(message).image
        for data in (b"".join(gather(message).parts), dumps(message, 5, buffer_callback=keep_in_band)):
            assert loads(data) == [extra, *buffers]
        return
    with pytest.raises(LargeBuffer):
        dumps(message, 5, buffer_callback=keep_in_band)
    data = image_of(message) or b""
    whole = bytearray(data)
    first, *others = load_image(whole)
    assert first == extra
    assert [bytes(other) for other in others] == [bytes(buffer) for buffer in buffers]
    for other in others:
        if len(other) >= OUT_OF_BAND:
            assert isinstance(other, memoryview)
            assert whole.find(bytes(other)) % 64 == 0
            other[0] ^= 0xFF
    assert bytes(whole) != data  # they are in there, not copied


@pytest.mark.parametrize("size", [0, 1, 255, 256, GATHER_BYTES_FROM, OUT_OF_BAND - 1, OUT_OF_BAND, 1 << 20])
def test_bytes_are_gathered_without_a_pickler(size: int) -> None:
    """In what the pickler would write, which frames the shorter ones, the message itself is a part; plain data, too."""
    message = pattern(7, size)
    payload = gather(message)
    assert payload.parts[1] is message
    assert image_of(message) is None
    data = b"".join(payload.parts)
    assert load_plain(data) == message
    if size >= OUT_OF_BAND:  # the same, byte by byte
        assert data == dumps(message, 5)
    assert type(loads(b"".join(gather(Named(message)).parts))) is Named  # of a subclass, it would be another object


def test_arrays_of_every_layout() -> None:
    """C and Fortran order, pieces of others, read-only, empty and structured arrays come back the same, and many at once."""
    numpy = pytest.importorskip("numpy")
    large = numpy.arange(120_000, dtype="<u4").reshape(300, 400)
    constant = large.copy()
    constant.flags.writeable = False
    arrays = [
        large,
        numpy.asfortranarray(large),
        large[::2, ::3],
        large.T,
        large[:, :0],
        constant,
        numpy.zeros(9000, dtype=[("a", "u1"), ("b", "f8")]),
        *(large + number for number in range(30)),
    ]
    data = image_of(arrays)
    assert data is not None
    for one, other in zip(arrays, load_image(bytearray(data)), strict=True):
        assert (one.shape, one.dtype, one.flags.writeable) == (other.shape, other.dtype, other.flags.writeable)
        assert (one == other).all()
    assert image_of("no buffer at all") is None


@settings(STEADY, max_examples=150)
@given(
    positions=st.lists(st.tuples(st.integers(0, 200_000) | st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=3),
    count=st.integers(0, 4) | st.integers(0, 2**32 - 1),
    cut=st.integers(0, 120),
    true=st.booleans(),
)
def test_an_image_that_lies_is_no_message(positions: list[tuple[int, int]], count: int, cut: int, true: bool) -> None:
    """Parts that are not where they should be, or too many, or none, raise a pickling error: nothing outside of it is read."""
    data = bytearray(image_of([pickle.PickleBuffer(bytearray(OUT_OF_BAND))]) or b"")
    if true:
        whole = data[: len(data) - 1 - cut]  # the last part is cut off
    else:
        table = b"".join(struct.pack("<QQ", *position) for position in positions)
        whole = bytearray(struct.pack("<II", count, 0) + table + bytes(cut))
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        load_image(whole)


def test_a_wrapped_image_is_a_pickle_that_other_versions_know() -> None:
    """Its bytes are a format that travels: pickle makes the message of it, and publishing it finds the image again."""
    image = image_of([pickle.PickleBuffer(bytearray(pattern(1, OUT_OF_BAND))), "x"]) or b""
    payload = wrapped(image)
    head = b"\x80\x05\x8c\x1dmpbroadcast.protocol.pickling\x8c\x0aload_image\x93\x96" + struct.pack("<Q", len(image))
    assert payload == head + image + b"\x85R."
    buffer, text = loads(payload)
    assert (bytes(buffer), text, buffer.readonly) == (pattern(1, OUT_OF_BAND), "x", False)
    for data in (payload, bytearray(payload), memoryview(payload).cast("B", (1, len(payload)))):
        found = as_payload(data)
        assert (b"".join(found.parts), found.size, found.image) == (image, len(image), True)
    # Any other pickle is published as it is, also one that begins or ends as an image does.
    for other in (
        payload[:-1],
        payload + b".",
        payload[:40] + payload[41:],
        head,
        head[:20],
        dumps("x", 5),
        b"",
        wrapped(b"")[:-1],
    ):
        found = as_payload(other)
        assert (b"".join(found.parts), found.size, found.image) == (other, len(other), False)
