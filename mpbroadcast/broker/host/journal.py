"""Which subscriptions there are, written down for the broker that comes after this one.

Two anonymous files, which the keeper hands on from one broker to the next. One of them counts: that with the higher number in
its head. A change is a line at its end, written before it is answered for, and never waited for. When there are many lines for
few subscriptions, all are written into the other one, whose head comes last: so one of the two is whole at every moment.

A write that the system refuses, as beyond a limit on the size of files, is no error: what has changed is then not known to the
next broker, unless a later write has room for all.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from typing import Any, Final

log = logging.getLogger("mpbroadcast.broker")

_HEAD: Final = 17  # characters: a number in hexadecimal, and the end of the line
_SHORT: Final = 1 << 16  # bytes that are not worth writing anew

Entry = dict[str, Any]


def replayed(lines: bytes) -> dict[int, Entry]:
    """What the lines come to. The last one may be cut, and is then not there."""
    entries: dict[int, Entry] = {}
    for line in lines.split(b"\n")[:-1]:
        entry = json.loads(line)
        if len(entry) > 1:
            entries[entry["number"]] = entry
        else:
            entries.pop(entry["number"], None)
    return entries


class Journal:
    """The files, and what is in them."""

    def __init__(self, files: tuple[int, int] | None = None) -> None:
        """Of the broker before this one; without ``files``, new ones.

        :raises OSError: there can be none.
        """
        self.files = files or (_anonymous(), _anonymous())
        heads = [int(os.pread(file, _HEAD - 1, 0) or b"0", 16) for file in self.files]
        self._version = max(heads)
        self._current = heads.index(self._version)
        self._whole = 0  # bytes, when all were written last
        self._refused = 0  # writes, since all were written last
        file = self.files[self._current]
        self._size = max(os.fstat(file).st_size, _HEAD)
        lines = os.pread(file, self._size - _HEAD, _HEAD)
        self.entries = replayed(lines)
        if not lines.endswith(b"\n") and not self._rewrite():
            self._refuse()

    def put(self, entry: Entry) -> None:
        """This is how a subscription is now; ``entry["number"]`` is its."""
        if self.entries.get(entry["number"]) != entry:
            self.entries[entry["number"]] = entry
            self._write(entry)

    def drop(self, number: int) -> None:
        """It is gone."""
        if self.entries.pop(number, None) is not None:
            self._write({"number": number})

    def _write(self, entry: Entry) -> None:
        line = _line(entry)
        if self._refused or not _written(self.files[self._current], line, self._size):
            self._refuse()
            return
        self._size += len(line)
        if self._size > _SHORT and self._size > 8 * self._whole:
            self._rewrite()

    def _rewrite(self) -> bool:
        other = 1 - self._current
        file = self.files[other]
        lines = b"".join(map(_line, self.entries.values()))
        os.ftruncate(file, 0)
        head = b"%016x\n" % (self._version + 1)
        if not (_written(file, lines, _HEAD) and _written(file, head, 0)):
            os.ftruncate(file, 0)
            return False
        self._version += 1
        self._current, self._size = other, _HEAD + len(lines)
        self._whole = len(lines)
        self._refused = 0
        return True

    def _refuse(self) -> None:
        """Write all, if that is possible, as the line cannot be. It is tried more and more seldom, as it takes long."""
        self._refused += 1
        if self._refused & (self._refused - 1) or self._rewrite() or self._refused > 1:
            return
        log.warning(
            "the subscriptions cannot be written down (a limit on the size of files?): "
            "a broker that takes over does not know the last ones"
        )


def _written(file: int, data: bytes, position: int) -> bool:
    try:
        return os.pwrite(file, data, position) == len(data)
    except OSError:
        return False


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _anonymous() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mpbroadcast-journal", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
