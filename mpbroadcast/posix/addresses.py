"""Addresses: paths of sockets, and plain names that stand for one in a folder of the user's.

A name is looked for in ``$XDG_RUNTIME_DIR``, then in ``/run/user/UID``, then in ``/tmp/mpbroadcast-UID``, which brokers make
and remove: so processes of one user meet although their environments differ. A broker is made in the first of these folders
that exists; the last is made. A folder of another user, or one that others may enter, is never used: they could put a socket
there.

The tests of this library set ``_MPBROADCAST_TMP`` to keep their brokers apart from those of the machine: a folder that stands
for ``/tmp``, and whose ``run-user`` stands for ``/run/user``. It is internal, and may change at any time.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import Any, Final

from mpbroadcast.errors import AddressError
from mpbroadcast.validation import address_problem, check_address

VARIABLE: Final = "MPBROADCAST_ADDRESS"
_RUNTIME: Final = "XDG_RUNTIME_DIR"
_TEST_VARIABLE: Final = "_MPBROADCAST_TMP"
_PREFIX: Final = "mpbroadcast-"


@dataclass
class Candidates:
    """Where the broker of an address may listen."""

    made: str  # the path of the socket of a broker that is started
    paths: list[str]  # all paths to look at, the first one first: one for a path, several for a name
    refused: list[str]  # why other folders are not looked at
    lock: str  # the folder whose lock decides which of many processes starts the broker

    def not_found(self) -> str:
        """Return the text of the error when no broker was found at any path of a name."""
        tried = ", ".join(map(repr, self.paths))
        refused = "".join(f"; {problem}" for problem in self.refused)
        return (
            f"no broker answers at any of {tried}{refused}: it has ended, or has another name; start one, or pass its `address`"
        )


def candidates(address: Any) -> Candidates:
    """Return where the broker at a path, or with a name without a slash, may listen.

    :raises AddressError: no socket can be there, or the folder in which a broker is made is not safe.
    """
    if isinstance(address, str) and address and "/" not in address and "\0" not in address:
        return _candidates_of(address)
    path = check_address(address)
    return Candidates(path, [path], [], os.path.dirname(path))


def default_candidates(address: Any) -> Candidates:
    """Return :func:`candidates` of ``address``; for ``None``, of ``$MPBROADCAST_ADDRESS``.

    :raises AddressError: neither is given.
    """
    if address is None:
        address = os.environ.get(VARIABLE)
        if not address:
            raise AddressError(
                f"there is no address: pass one, or set ${VARIABLE}, as `mpbroadcast run COMMAND` does for its command"
            )
    return candidates(address)


def _candidates_of(name: str) -> Candidates:
    if name.startswith("."):
        raise AddressError(f"the name {name!r} begins with a dot, which no name may; a relative path needs a slash: './{name}'")
    found = Candidates("", [], [], "")
    for folder, what, prefix in _folders():
        is_own = is_own_folder(folder)
        path = os.path.join(folder, prefix + name)
        exists = _is_there(folder)
        problem = _folder_problem(folder, what, follow_links=not is_own) if exists else ""
        advice = "correct that, or pass the path of a socket"
        if not problem and (problem := address_problem(path)):
            advice = "use a shorter name, or pass a shorter path of a socket"
        if not found.made and (exists or is_own):
            if problem:
                raise AddressError(f"{problem}: {advice}")
            found.made = path
        if problem:
            found.refused.append(problem)
        else:
            found.paths.append(path)
            # All processes of the user know the last folder, unlike $XDG_RUNTIME_DIR, and /run/user/UID, which comes and goes.
            if exists or is_own:
                found.lock = folder
    return found


def _folders() -> list[tuple[str, str, str]]:
    """Return the folders of names, the first one first: each with what it is, and with the prefix of names there."""
    temporary = os.environ.get(_TEST_VARIABLE)
    run_user = os.path.join(temporary, "run-user") if temporary else "/run/user"
    system = os.path.join(run_user, str(os.geteuid()))
    folders = [(system, "the runtime folder", _PREFIX), (_own_folder(), "the folder for names", "")]
    folder = os.environ.get(_RUNTIME, "")
    # Relative paths are to be ignored, by the specification of this variable.
    if os.path.isabs(folder) and os.path.realpath(folder) == os.path.realpath(system):
        folders[0] = (folder, f"${_RUNTIME}", _PREFIX)
    elif os.path.isabs(folder):
        folders.insert(0, (folder, f"${_RUNTIME}", _PREFIX))
    return folders


def _own_folder() -> str:
    return os.path.join(os.environ.get(_TEST_VARIABLE) or "/tmp", f"{_PREFIX}{os.geteuid()}")


def is_own_folder(folder: str) -> bool:
    """Return True for the folder of names that a broker makes, and removes when it is empty."""
    return folder == _own_folder()


def make_own_folder(folder: str) -> None:
    """Make the folder of names, unless it is there.

    :raises AddressError: it is another user's, or open to others.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    if problem := _folder_problem(folder, "the folder for names"):
        raise AddressError(f"{problem}: correct that, or pass the path of a socket")


def remove_own_folder() -> None:
    """Remove the folder of names if it is empty. The caller holds its lock."""
    with contextlib.suppress(OSError):
        os.rmdir(_own_folder())


def _is_there(folder: str) -> bool:
    """Return False if there is no such folder; True if that cannot be seen: then it cannot be used, either."""
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _folder_problem(folder: str, what: str, *, follow_links: bool = False) -> str:
    """Return why names in this folder cannot be trusted; an empty text if they can."""
    try:
        status = os.stat(folder, follow_symlinks=follow_links)
    except OSError as error:
        return f"{what}, {folder!r}, cannot be used ({error.strerror})"
    problem = ""
    if not stat.S_ISDIR(status.st_mode):
        problem = "is not a folder"
    elif status.st_uid != os.geteuid():
        problem = f"is user {status.st_uid}'s, and not user {os.geteuid()}'s"
    elif status.st_mode & 0o077:
        problem = f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o}, must be 0700)"
    return f"{what}, {folder!r}, {problem}" if problem else ""
