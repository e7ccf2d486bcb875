"""The subscriptions that there are, written down for the broker that comes after this one.

The journal is two anonymous files, which each broker inherits from the supervisor. One of them counts: that with the higher
version in its head. A change is a line at its end, written before the request is replied to, and never waited for. When there
are many lines for few subscriptions, all are written into the other file, whose head comes last: so one of the two is whole at
every moment.

A write that the system refuses, as beyond a limit on the size of files, is no error: the next broker does not know what has
changed, unless a later write has room for all.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
from typing import Any, Final, NamedTuple

log = logging.getLogger("mpbroadcast.broker")

_HEAD: Final = 17  # characters: a version in hexadecimal, and the end of the line
_SHORT: Final = 1 << 16  # bytes that are not worth writing anew

# Entries beside those of subscriptions, which have positive IDs. That of a process is below the last by its process ID.
_READY: Final = -1
_STOPPING: Final = -2
_PROCESS: Final = -16
_RESERVED: Final = -3
_BRIDGES: Final = -(1 << 40)  # and below: streams, and positions of others in them

# Ids of messages are below 2**53. A broker's are a part of the numbers that nothing but chance finds: another broker's id is
# unknown to it. A broker that takes over begins above all that the one before it had reserved.
_FIRST_IDS: Final = 1 << 52
MOST_IDS: Final = 1 << 32  # to reserve at once: some hours' at the least

Entry = dict[str, Any]


def replayed(lines: bytes) -> dict[int, Entry]:
    """Return the entries that these lines leave. The last line may be cut, and is then ignored."""
    entries: dict[int, Entry] = {}
    for line in lines.split(b"\n")[:-1]:
        entry = json.loads(line)
        if len(entry) > 1:
            entries[entry["id"]] = entry
        else:
            entries.pop(entry["id"], None)
    return entries


class Journal:
    """The two files, and the entries in them."""

    def __init__(self, files: tuple[int, int] | None = None) -> None:
        """Read the files of the broker before this one; without ``files``, make new ones.

        :raises OSError: there can be none.
        """
        self.files = files or (_anonymous(), _anonymous())
        self._version = max(int(os.pread(file, _HEAD - 1, 0) or b"0", 16) for file in self.files)
        self._whole = 0  # bytes, when all were written last
        self._refused = 0  # writes, since all were written last
        lines = os.pread(self._file, self._end() - _HEAD, _HEAD)
        self.entries = replayed(lines)
        if not lines.endswith(b"\n") and not self._rewrite():
            self._refuse()

    def put(self, entry: Entry) -> None:
        if self.entries.get(entry["id"]) != entry:
            self.entries[entry["id"]] = entry
            self._write(entry)

    def drop(self, id: int) -> None:
        if self.entries.pop(id, None) is not None:
            self._write({"id": id})

    def note_ready(self) -> None:
        """Write down that a broker has served: if it dies, another one takes over."""
        self.put({"id": _READY, "it": True})

    def note_stopping(self) -> None:
        """Write down that the broker ends: if it dies from now on, none takes over."""
        self.put({"id": _STOPPING, "it": True})

    def reserve_ids(self, end: int) -> None:
        """Write down that the messages of this broker have ids below ``end``."""
        self.put({"id": _RESERVED, "end": end})

    @property
    def reserved_ids(self) -> int:
        """The last argument of :meth:`reserve_ids`, by this broker or the one before it; 0 if it was not."""
        end: int = self.entries.get(_RESERVED, {"end": 0})["end"]
        return end

    @property
    def is_another_wanted(self) -> bool:
        """True if a broker has served, and was not to end."""
        return _READY in self.entries and _STOPPING not in self.entries

    def put_process(self, pid: int, birth: float) -> None:
        """Write down that a process has a session."""
        self.put({"id": _PROCESS - pid, "pid": pid, "birth": birth})

    def drop_process(self, pid: int) -> None:
        self.drop(_PROCESS - pid)

    @property
    def processes(self) -> list[Entry]:
        return [entry for id, entry in self.entries.items() if _BRIDGES < id < _PROCESS]

    @property
    def bridges(self) -> list[Entry]:
        return [entry for id, entry in self.entries.items() if id <= _BRIDGES]

    def new_bridge_id(self) -> int:
        """Return an id for another entry of :attr:`bridges`."""
        return min(_BRIDGES + 1, *self.entries) - 1 if self.entries else _BRIDGES

    @property
    def subscriptions(self) -> list[Entry]:
        return [entry for id, entry in self.entries.items() if id > 0]

    @property
    def _file(self) -> int:
        return self.files[self._version % 2]

    def _end(self) -> int:
        return max(os.fstat(self._file).st_size, _HEAD)

    def _write(self, entry: Entry) -> None:
        if self._refused or not _written(self._file, _line(entry), self._end()):
            self._refuse()
        elif self._end() > max(_SHORT, 8 * self._whole):
            self._rewrite()

    def _rewrite(self) -> bool:
        version = self._version + 1
        file = self.files[version % 2]
        lines = b"".join(map(_line, self.entries.values()))
        os.ftruncate(file, 0)
        if not (_written(file, lines, _HEAD) and _written(file, b"%016x\n" % version, 0)):
            os.ftruncate(file, 0)
            return False
        self._version = version
        self._whole = len(lines)
        self._refused = 0
        return True

    def _refuse(self) -> None:
        """Write all, if that is possible, as the line cannot be written. Try it more and more seldom, as it takes long."""
        self._refused += 1
        if self._refused & (self._refused - 1) or self._rewrite() or self._refused > 1:
            return
        log.warning(
            "the subscriptions cannot be written down (a limit on the size of files?): "
            "a broker that takes over does not know the last ones"
        )


class Succession(NamedTuple):
    """The data that brokers that follow each other have in common; ``generation`` counts them from 0 on."""

    identity: str
    generation: int
    journal: Journal | None  # None: no other broker follows


def first_id(journal: Journal | None) -> int:
    """Return the id of the first message of a broker: above all of the one before it, else by chance."""
    return (journal.reserved_ids if journal is not None else 0) or secrets.randbelow(_FIRST_IDS) + 1


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
