"""Arguments at their limits, and beyond them."""

import math
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import AddressError
from mpbroadcast.validation import (
    MAX_ADDRESS,
    check_address,
    check_authkey,
    check_count,
    check_overflow,
    check_timeout,
    check_topics,
    encode_topic,
    encoded_topic,
)

LONGEST = "/" + "x" * (MAX_ADDRESS - 1)


def count(value: Any) -> int:
    return check_count(value, "limit", 1)


def topics(value: Any) -> None:
    check_topics(("good", value))


@pytest.mark.parametrize(
    ("check", "good", "wrong_types", "wrong_values"),
    [
        (check_timeout, [None, 0.0, 1e6], ["1", True, [1], 1j], [-1, -0.001, math.nan, -math.inf]),
        (count, [1, 2], ["1", 1.0, True, None], [0, -1]),
        (check_overflow, ["latest"], [5, None], ["drop"]),
        (encode_topic, [], [5, None, b"room"], ["a\0b", "x" * 1025, "\u00e9" * 513, "\ud800"]),
        (encoded_topic, [], [5, None, ["room"]], ["a\0b", "x" * 1025]),
        (topics, [], [5, None, b"room", ["room"], ("room",), {"room"}, frozenset()], ["a\0b", "x" * 1025]),
        (check_address, [LONGEST], [5, None, b"room", *[*os.scandir(b"/")][:1]], ["", "a\0b", LONGEST + "x"]),
        (check_authkey, [None, b"key"], [5, "key"], [b"", bytearray()]),
    ],
)
def test_a_bad_argument_is_one_clear_error(
    check: Callable[[Any], Any], good: list[Any], wrong_types: list[Any], wrong_values: list[Any]
) -> None:
    """Each check returns what is good, and refuses a wrong type with ``TypeError``, a wrong value with its error."""
    for value in good:
        assert check(value) == value
    for value in wrong_types:
        with pytest.raises(TypeError, match=r"must be|is an argument of its own"):
            check(value)
    for value in wrong_values:
        with pytest.raises(AddressError if check is check_address else ValueError, match=r"must|may|takes"):
            check(value)


def test_arguments_at_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are rounded up, and never too long for a system call; a topic is encoded, an address made absolute."""
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    assert [Deadline(left).milliseconds() for left in (None, 0, 0.0005, 1, 1e7)] == [None, 0, 1, 1001, 2**31 - 1]
    assert check_timeout(1e300) is None
    for topic in ("", "\u00e9" * 512, "x" * 1024):
        assert encode_topic(topic) == encoded_topic(topic) == encoded_topic(topic) == topic.encode()
    with pytest.raises(TypeError, match=r"pass \*topics"):
        check_topics((["room"],))
    assert check_address("here") == os.path.abspath("here")
    assert type(check_authkey(bytearray(b"key"))) is bytes
