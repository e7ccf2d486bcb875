"""Reports, which a member of a group writes into the pipe back to the broker. Sans-IO: bytes in, bytes out.

A report is one u64: how many messages the member has finished, of all that came through its pipe. The highest bit is set in the
last one: the member is closed, and wants no more. A report repeats what the one before it has, so only the last one matters.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

_REPORT: Final = Struct("<Q")
_LEAVES: Final = 1 << 63
REPORT_SIZE: Final = _REPORT.size


def report(count: int, *, leaves: bool = False) -> bytes:
    """Return a report, for one write, which a pipe takes whole or not at all."""
    return _REPORT.pack(count | _LEAVES if leaves else count)


def last_report(data: bytes) -> tuple[int, bool]:
    """Return the count of the last whole report in ``data``, 0 if there is none, and whether the member leaves."""
    whole = len(data) // REPORT_SIZE
    if not whole:
        return 0, False
    (value,) = _REPORT.unpack_from(data, (whole - 1) * REPORT_SIZE)
    return value & ~_LEAVES, bool(value & _LEAVES)
