"""Addresses: paths of sockets, and plain names that stand for one in a folder of the user's.

A name is a file in ``$XDG_RUNTIME_DIR``, else in a folder of the user's own in the temporary folder, which the broker makes
and removes. A folder of another user, or one that others may enter, is refused: they could put a socket of theirs there.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from typing import Any, Final

from mpbroadcast.errors import AddressError
from mpbroadcast.validation import check_address

VARIABLE: Final = "MPBROADCAST_ADDRESS"
_RUNTIME: Final = "XDG_RUNTIME_DIR"
_PREFIX: Final = "mpbroadcast-"


def resolve(address: Any) -> str:
    """Return the absolute path of the socket that a path, or a name without a slash, stands for.

    :raises AddressError: no socket can be there, or the folder of names is not safe.
    """
    if isinstance(address, str) and address and "/" not in address and "\0" not in address:
        return check_address(_path_of(address))
    return check_address(address)


def resolve_default(address: Any) -> str:
    """Return :func:`resolve` of ``address``; for ``None``, of ``$MPBROADCAST_ADDRESS``.

    :raises AddressError: there is none, either.
    """
    if address is None:
        address = os.environ.get(VARIABLE)
        if not address:
            raise AddressError(
                f"there is no address: pass one, or set ${VARIABLE}, as `mpbroadcast run -- COMMAND` does for its command"
            )
    return resolve(address)


def _path_of(name: str) -> str:
    if name.startswith("."):
        raise AddressError(f"the name {name!r} begins with a dot, which no name may; a relative path needs a slash: './{name}'")
    folder = os.environ.get(_RUNTIME, "")
    if os.path.isabs(folder):  # the specification of this variable has it that others are ignored
        _check_folder(folder, f"${_RUNTIME}", follow_links=True)
        return os.path.join(folder, _PREFIX + name)
    folder = _own_folder()
    if os.path.lexists(folder):  # else there is no broker with a name
        _check_folder(folder, "the folder for names")
    return os.path.join(folder, name)


def _own_folder() -> str:
    return os.path.join(os.path.abspath(tempfile.gettempdir()), f"{_PREFIX}{os.geteuid()}")


def is_own_folder(folder: str) -> bool:
    """Return True for the folder of names that a broker makes, and removes when it is empty."""
    return os.path.basename(folder) == f"{_PREFIX}{os.geteuid()}"


def make_own_folder(folder: str) -> None:
    """Make the folder of names, unless it is there.

    :raises AddressError: it is another user's, or open to others.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    _check_folder(folder, "the folder for names")


def _check_folder(folder: str, what: str, *, follow_links: bool = False) -> None:
    try:
        status = os.stat(folder, follow_symlinks=follow_links)
    except OSError as error:
        raise AddressError(f"{what}, {folder!r}, cannot be used ({error.strerror}): pass the path of a socket") from error
    problem = ""
    if not stat.S_ISDIR(status.st_mode):
        problem = "is no folder"
    elif status.st_uid != os.geteuid():
        problem = f"is user {status.st_uid}'s, and not user {os.geteuid()}'s"
    elif status.st_mode & 0o077:
        problem = f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o}, must be 0700)"
    if problem:
        raise AddressError(f"{what}, {folder!r}, {problem}: correct that, or pass the path of a socket")
