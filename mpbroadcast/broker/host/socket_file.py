"""The socket that the broker listens at: its file, its folder, and what dead brokers have left there.

The file gets its name, and a mark in its modification time, only when the socket listens. So a socket that has the mark and
refuses a connection is that of a dead broker, and one without it may be of another program: it is left alone. Removing and
naming are done under a lock on the folder, which leaves nothing behind. Files are unlinked by name, and only sockets that a
broker of this user has made; a folder is removed when it is empty. A key file comes before its socket, and goes before it: as
long as the socket is there and open, no other broker takes the address over (``posix/key_file.py``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.posix.addresses import is_own_folder, make_own_folder, remove_own_folder
from mpbroadcast.posix.fd_socket import control_socket
from mpbroadcast.posix.key_file import SUFFIX, is_key_file, remove_key, write_key
from mpbroadcast.validation import MAX_ADDRESS

_FOLDER: Final = "mpbroadcast-broker-"
_OWN_FOLDER: Final = re.compile(_FOLDER + "[a-z0-9_]{8}")  # as tempfile.mkdtemp() completes it
_SOCKET: Final = "broker"
_QUEUE: Final = 4096  # connections: a client that waits in it keeps its turn, beside however many others
_PASSING: Final = re.compile(r"\.mpbroadcast-[0-9a-f]+~")  # a socket's name until it listens
_PASSING_KEY: Final = re.compile(r"\.mpbroadcast-[0-9a-f]+~" + SUFFIX)
_MARK: Final = 627_294_121  # nanoseconds in the time of a broker's socket; a connection to it changes the time of access only
_FORGOTTEN: Final = 60.0  # seconds after which a folder without a socket is removed


class Listening:
    """The socket, and its file, which only this user can open. With a ``key``, that is in a file beside it.

    ``lock`` is a descriptor of the folder, with its lock; without, the lock is waited for.

    :raises OSError: it cannot be made.
    """

    def __init__(self, address: str | None, temporary: str, key: bytes | None = None, lock: int | None = None) -> None:
        self.socket = control_socket()
        self._made = ""  # its folder, if a broker has made it
        self._key = key
        try:
            if address is None:
                self._made = tempfile.mkdtemp(prefix=_FOLDER, dir=_short(temporary))  # of mode 0700
                address = os.path.join(self._made, _SOCKET)
            self.address = address
            folder, name = os.path.split(address)
            if is_own_folder(folder):
                self._made = folder
            while not self._listen_in(folder, name, lock):
                pass
            self._identity = identity(address)
        except BaseException:
            self.socket.close()
            self._remove_folder()
            raise
        finally:
            os.chdir("/")

    def _listen_in(self, folder: str, name: str, lock: int | None) -> bool:
        """Return False if a broker that has ended meanwhile has removed the folder of names."""
        if is_own_folder(folder):
            make_own_folder(folder)
        try:
            os.chdir(folder)  # so that no name that is bound is longer than the address itself
            if lock is not None and identity(lock) == identity("."):
                self._listen(name)
            else:
                with folder_lock("."):
                    self._listen(name)
        except FileNotFoundError:
            if not is_own_folder(folder):
                raise
            return False
        return True

    def _listen(self, name: str) -> None:
        passing = f".mpbroadcast-{os.getpid():x}~"
        _remove_dead_socket(name)
        remove_key(name)
        with contextlib.suppress(FileNotFoundError):
            if _is_unfinished(passing):
                os.unlink(passing)
        if self._key is not None:
            write_key(name, self._key, passing + SUFFIX)
            trap_points.reach("naming the key")
        try:
            self._bind(name, passing)
        except BaseException:
            if self._key is not None:
                remove_key(name)
            raise

    def _bind(self, name: str, passing: str) -> None:
        before = os.umask(0o777)  # a socket of mode 0 is one that has not come to listen
        try:
            self.socket.bind(passing)
        finally:
            os.umask(before)
        try:
            self.socket.listen(_QUEUE)
            marked = os.lstat(passing).st_mtime_ns // 10**9 * 10**9 + _MARK
            os.utime(passing, ns=(marked, marked))
            os.chmod(passing, 0o600)
            trap_points.reach("naming the socket")
            os.link(passing, name)  # unlike a renaming, it replaces nothing
        except FileExistsError:
            raise OSError(errno.EADDRINUSE, "something has just been put there; choose another address") from None
        finally:
            os.unlink(passing)

    def remove(self) -> None:
        """Unlink the files, remove a folder that a broker has made, and close the socket."""
        with contextlib.suppress(OSError):
            # While the socket is open, no broker takes the address over, and no other file gets its inode.
            if identity(self.address) == self._identity:
                if self._key is not None:
                    remove_key(self.address)
                os.unlink(self.address)
        self._remove_folder()
        self.socket.close()

    def remove_empty_folder(self) -> None:
        """Remove the folder of names if it was made for its lock only, which is held: the process that made it may be dead."""
        if not self._made:
            remove_own_folder()

    def _remove_folder(self) -> None:
        if is_own_folder(self._made):
            # While another process holds the lock to start a broker, the folder stays: that process removes it.
            with contextlib.suppress(OSError), _lock_at_once(self._made):
                remove_own_folder()
        elif self._made:
            with contextlib.suppress(OSError):  # others are in it
                os.rmdir(self._made)


@contextlib.contextmanager
def folder_lock(folder: str) -> Iterator[None]:
    """Hold the lock under which sockets and key files of this folder are removed and named. It leaves nothing behind."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _lock_at_once(folder: str) -> Iterator[None]:
    """Hold the lock of a folder.

    :raises BlockingIOError: another process holds it.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(fd)


def identity(file: str | int) -> tuple[int, int]:
    """Return the device and inode of a file, by its path or descriptor."""
    status = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    return status.st_dev, status.st_ino


def _short(temporary: str) -> str:
    longest = MAX_ADDRESS - len("/" + _FOLDER + "12345678/" + _SOCKET)
    return temporary if len(os.fsencode(temporary)) <= longest else "/tmp"  # socket paths are short, and TMPDIR may be long


def _remove_dead_socket(path: str) -> None:
    """Remove the socket of a dead broker, if there is one.

    :raises OSError: EADDRINUSE.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EADDRINUSE, "there is a file that is no socket, which is left alone; choose another address")
    if answers(path):
        text = "another process listens there, or none can be seen from here; end it, or choose another address"
        raise OSError(errno.EADDRINUSE, text)
    if not _is_brokers(status):
        text = "there is a socket that no broker of this user has left; if nothing needs it, remove it, or choose another"
        raise OSError(errno.EADDRINUSE, text)
    if identity(path) == (status.st_dev, status.st_ino):
        os.unlink(path)


def _is_brokers(status: os.stat_result) -> bool:
    """True for a socket at which a broker of this user has listened."""
    return _is_own_socket(status, 0o600) and status.st_mtime_ns % 10**9 == _MARK


def _is_own_socket(status: os.stat_result, mode: int) -> bool:
    return status.st_mode == stat.S_IFSOCK | mode and status.st_uid == os.geteuid()


def _is_dead(path: str) -> bool:
    return _is_brokers(os.lstat(path)) and not answers(path)


def _is_unfinished(path: str) -> bool:
    """True for a socket of a broker that was killed before the socket had its name."""
    return _is_own_socket(os.lstat(path), 0) or _is_dead(path)


def answers(path: str) -> bool:
    """Return False only if certainly no process listens at this socket."""
    with control_socket() as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # its queue is full, or it is not ours to look at
        return True


def remove_forgotten_folders(temporary: str) -> None:
    """Remove the folders of brokers that were killed together with their starters."""
    with contextlib.suppress(OSError), os.scandir(_short(temporary)) as entries:
        for entry in entries:
            if _OWN_FOLDER.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_forgotten(entry.path)


def _remove_if_forgotten(folder: str) -> None:
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o777 != 0o700 or status.st_uid != os.geteuid():
        return
    old = time.time() - status.st_mtime > _FORGOTTEN  # else it may be one that is being made
    paths = [os.path.join(folder, name) for name in os.listdir(folder)]
    if all(_is_forgotten(path, old) for path in paths) and (paths or old):
        for path in paths:
            os.unlink(path)
        os.rmdir(folder)


def _is_forgotten(path: str, old: bool) -> bool:
    name = os.path.basename(path)
    if name == _SOCKET:
        return _is_dead(path)
    if name == _SOCKET + SUFFIX:
        socket = path.removesuffix(SUFFIX)
        return is_key_file(path) and (_is_dead(socket) if os.path.lexists(socket) else old)
    if _PASSING_KEY.fullmatch(name):
        return old and stat.S_ISREG(os.lstat(path).st_mode)
    return old and _PASSING.fullmatch(name) is not None and _is_unfinished(path)


def remove_leftovers(address: str) -> None:
    """Remove the socket of a broker that was killed, its key file and its folder."""
    with contextlib.suppress(OSError):
        if _is_dead(address):
            remove_key(address)
            os.unlink(address)
            folder, name = os.path.split(address)
            if is_own_folder(folder) or (name == _SOCKET and _OWN_FOLDER.fullmatch(os.path.basename(folder))):
                os.rmdir(folder)
