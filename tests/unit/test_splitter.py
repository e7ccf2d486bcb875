"""What a splitter reports beside its items."""

from __future__ import annotations

from array import array

import pytest

from mpbroadcast.protocol.frames import Batch, Splitter, abort, frame_head, memory_frame, pieces, plain_reference

LONG = frame_head(5000, b"") + bytes(5000)


@pytest.mark.parametrize(
    ("data", "has_shared"),
    [
        (frame_head(0, b""), False),
        (b"".join(pieces(LONG, 1)), False),
        (plain_reference(1, 0, 10), True),
        (memory_frame(1, 10, b""), True),
        (abort(1), True),
    ],
)
def test_what_refers_to_memory_is_reported(data: bytes, has_shared: bool) -> None:
    """References, messages in memory, and what aborts one: the reader looks for descriptors after these only."""
    splitter = Splitter()
    splitter.split(data)
    assert splitter.has_shared == has_shared


def test_a_long_message_is_a_batch_of_one() -> None:
    """Without a topic, and for all."""
    assert Splitter().split(b"".join(pieces(LONG, 1))) == [Batch(LONG, array("I", [len(LONG)]), b"", 0, 8)]
