"""The socket that the broker listens at: its file, its folder, and what others have left there.

The file gets its name only when the socket listens, so whoever finds a socket there that refuses knows that its broker is dead.
What is done about it is done under a lock on the folder, which leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import tempfile
import time
from typing import Final

from mpbroadcast.arguments import MAX_ADDRESS

_FOLDER: Final = "mpbroadcast-"
_SOCKET: Final = "broker"
_FORGOTTEN: Final = 60.0  # seconds after which a folder without a socket is nobody's


def why_not(error: OSError, address: str | None, temporary: str) -> str:
    where = address or f"a folder in {temporary!r}"
    if isinstance(error, ProcessLookupError):
        return "its starter has ended"
    if error.errno == errno.EADDRINUSE:
        return f"the address {where!r} is in use: {error.strerror}"
    return f"the broker cannot listen at {where!r}: {error.strerror or error}"


class Listening:
    """The socket, and its file, which nobody but this user can open.

    :raises OSError: it cannot be; :func:`why_not` says why.
    """

    def __init__(self, address: str | None, temporary: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self._made = ""  # its folder, if it is its own
        try:
            if address is None:
                self._made = _make_folder(temporary)
                address = os.path.join(self._made, _SOCKET)
            self.address = address
            folder, name = os.path.split(address)
            os.chdir(folder)  # so that no name that is bound is longer than the address itself
            self._listen(name)
            self._identity = identity(address)
        except BaseException:
            self.socket.close()
            if self._made:
                os.rmdir(self._made)
            raise
        finally:
            os.chdir("/")

    def _listen(self, name: str) -> None:
        passing = f".{os.getpid():x}~"
        lock = os.open(".", os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            _refuse_occupied(name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(passing)
            self.socket.bind(passing)
            try:
                os.chmod(passing, 0o600)
                self.socket.listen(128)
                os.rename(passing, name)
            except BaseException:
                os.unlink(passing)
                raise
        finally:
            os.close(lock)

    def remove(self) -> None:
        """Leave nothing behind."""
        self.socket.close()
        with contextlib.suppress(OSError):
            if identity(self.address) == self._identity:
                os.unlink(self.address)
            if self._made:
                os.rmdir(self._made)


def identity(file: str | int) -> tuple[int, int]:
    status = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    return status.st_dev, status.st_ino


def _make_folder(temporary: str) -> str:
    longest = MAX_ADDRESS - len("/" + _FOLDER + "12345678/" + _SOCKET)
    if len(os.fsencode(temporary)) > longest:
        temporary = "/tmp"  # socket paths are short, and TMPDIR may be long
    return tempfile.mkdtemp(prefix=_FOLDER, dir=temporary)  # it makes folders with mode 0700


def _refuse_occupied(path: str) -> None:
    """Nothing, when ``path`` is free or the socket of a dead broker.

    :raises OSError: EADDRINUSE.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EADDRINUSE, "there is a file that is no socket, which is left alone; choose another address")
    if _answers(path):
        raise OSError(errno.EADDRINUSE, "another process listens there; end it, or choose another address")


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # its queue is full, or it is not ours to look at
        return True


def remove_forgotten_folders(temporary: str) -> None:
    """Of brokers that were killed together with their starters."""
    with contextlib.suppress(OSError), os.scandir(temporary) as entries:
        for entry in entries:
            if entry.name.startswith(_FOLDER):
                with contextlib.suppress(OSError):
                    _remove_if_forgotten(entry.path)


def _remove_if_forgotten(folder: str) -> None:
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    path = os.path.join(folder, _SOCKET)
    try:
        os.lstat(path)
    except FileNotFoundError:
        forgotten = time.time() - status.st_mtime > _FORGOTTEN  # one that is being made has no socket yet
    else:
        forgotten = not _answers(path)
    if forgotten:
        shutil.rmtree(folder)


def remove_leftovers(address: str) -> None:
    """Of a broker that has ended, if it was killed."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(address).st_mode) and not _answers(address):
            os.unlink(address)
            folder, name = os.path.split(address)
            if name == _SOCKET and os.path.basename(folder).startswith(_FOLDER):
                os.rmdir(folder)
