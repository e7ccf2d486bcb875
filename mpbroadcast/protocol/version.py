"""The versions of the protocol and of the package, and how each side of a control connection announces both.

An announcement stands in the challenge of the handshake, after its random bytes, so each side has it before the first request,
it costs no message of its own, and the answer to the challenge covers it. Every version of this package, also one that
announces nothing, answers such a challenge. The handshake itself must therefore never change.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

VERSION: Final = "0.1.0"
"""The version of the package; pyproject.toml reads it here."""

PROTOCOL: Final = 1
"""The version of all that travels between a process and its broker. It increases with every change of a frame, a run, a
request, a reply, a packet or a report. Two sides whose numbers differ serve each other nothing."""


class Announcement(NamedTuple):
    """The version of a side's protocol, and of its package."""

    protocol: int
    version: str

    def __str__(self) -> str:
        return f"protocol {self.protocol} (mpbroadcast {self.version})"


OWN: Final = Announcement(PROTOCOL, VERSION)

_FORM: Final = re.compile(rb"protocol (\d{1,9}), mpbroadcast ([!-~]{1,64})")


def announce(own: Announcement) -> bytes:
    """Return an announcement as bytes: at most 100."""
    return b"protocol %d, mpbroadcast %s" % (own.protocol, own.version.encode())


def announced(data: bytes) -> Announcement | None:
    """Return the announcement in ``data``; ``None`` if it is not one."""
    found = _FORM.fullmatch(data)
    return None if found is None else Announcement(int(found[1]), found[2].decode())
