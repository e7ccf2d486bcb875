"""A broker's key file: its key, for processes of the same user that are no children of its starter.

It stands beside the socket, as ``ADDRESS.key``, and holds the key in hexadecimal digits. The broker writes it under another
name, and names it when it is whole, before the socket has its name; it removes it before the socket. So a socket that answers
has its key. A link is never followed, and a file that another user has, or may read, is never trusted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from typing import Final

from mpbroadcast.errors import AuthenticationFailed
from mpbroadcast.key import Key
from mpbroadcast.posix.descriptors import fork_lock

SUFFIX: Final = ".key"
LENGTH: Final = 32  # bytes of a key
_WHOLE: Final = re.compile(rb"[0-9a-f]{%d}\n" % (2 * LENGTH))


def read_key(address: str) -> Key | None:
    """Return the key that belongs to the socket at ``address``; ``None`` if it has no key file.

    :raises AuthenticationFailed: there is a file that cannot be trusted.
    :raises OSError: no file can be read, as no descriptor is left.
    """
    path = address + SUFFIX
    try:
        status, text = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES, errno.EISDIR, errno.ENXIO):
            raise  # it is not the file: perhaps no descriptor is left
        why = "is a link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise AuthenticationFailed(_refused(path, why)) from None
    why = ""
    if not stat.S_ISREG(status.st_mode):
        why = "is no plain file"
    elif status.st_uid != os.geteuid():
        why = f"is user {status.st_uid}'s"
    elif status.st_mode & 0o077:
        why = f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o}, must be 0600)"
    elif not _WHOLE.fullmatch(text):
        why = "holds no key"
    if why:
        raise AuthenticationFailed(_refused(path, why))
    return Key.fromhex(text.decode())


def _refused(path: str, why: str) -> str:
    return f"the key file {path!r} {why}: remove it, and start another broker at this address; or pass authkey"


def _read(path: str) -> tuple[os.stat_result, bytes]:
    with fork_lock():
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe there does not block the call
        try:
            status = os.fstat(fd)
            return status, os.read(fd, 4 * LENGTH) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(fd)


def write_key(address: str, key: bytes, passing: str) -> None:
    """Write the key file of the socket at ``address``: whole, or not at all. ``passing`` is its name until then.

    The caller holds the lock of the folder, and has removed the key file of a dead broker.

    :raises OSError: it cannot be written; EADDRINUSE: another file has this name.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(passing)  # of a process that was killed, and had this process's ID
    fd = os.open(passing, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)  # whatever the umask
        os.write(fd, key.hex().encode() + b"\n")
        os.link(passing, address + SUFFIX)  # unlike a renaming, it replaces nothing
    except FileExistsError:
        text = f"beside it is a file {address + SUFFIX!r} that is no key file of this user's; remove it, or choose another"
        raise OSError(errno.EADDRINUSE, text) from None
    finally:
        os.close(fd)
        os.unlink(passing)


def is_key_file(path: str) -> bool:
    """Return True for a key file that this user has written."""
    try:
        status, text = _read(path)
    except OSError:
        return False
    return status.st_uid == os.geteuid() and _WHOLE.fullmatch(text) is not None


def remove_key(address: str) -> None:
    """Remove the key file of the socket at ``address``, if there is one; no other file."""
    if is_key_file(address + SUFFIX):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address + SUFFIX)
