"""Arguments at their limits."""

from __future__ import annotations

import os
import time

import pytest

from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import AddressError
from mpbroadcast.validation import MAX_ADDRESS, check_address, check_authkey, check_timeout


def test_arguments_at_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are rounded up, and never too long for a system call; an address is made absolute, and can use all of its room."""
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    assert [Deadline(left).milliseconds() for left in (None, 0, 0.0005, 1, 1e7)] == [None, 0, 1, 1001, 2**31 - 1]
    assert (check_timeout(1e300), check_timeout(0)) == (None, 0)
    assert check_address("here") == os.path.abspath("here")
    longest = "/" + "x" * (MAX_ADDRESS - 1)
    assert check_address(longest) == longest
    with pytest.raises(AddressError):
        check_address(longest + "x")
    with os.scandir(b"/") as entries, pytest.raises(TypeError, match="str path"):
        check_address(next(entries))
    assert check_authkey(bytearray(b"key")) == b"key"
