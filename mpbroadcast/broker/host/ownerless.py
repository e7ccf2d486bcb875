"""A broker that belongs to no process: the first process that needs it starts it, and it ends by itself.

::

    caller ── spawns ──▶ a new interpreter ── forks ──▶ the broker, or its supervisor
      ▲                     in a session of its own;       │
      │                     it ends at once                │
      └──────────── a pipe: it is ready, or why not ───────┘

So the broker is no process's child, and a signal to the caller's process group or terminal does not reach it. It keeps nothing
of the caller's: of its descriptors none, standard error included; its working directory is the root.

The lock of the socket's folder decides which of many callers starts it. For a name, it is the lock of the last of the folders
of names, which all processes of the user share: so two callers with different environments do not start a broker each, if one
of them sees the folder in which the other makes it. The lock belongs to a descriptor that the broker inherits, and closes when
its socket answers: whatever dies at whatever moment, the lock is held as long as a start is under way, and not for longer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from multiprocessing import Pipe, resource_tracker
from multiprocessing.connection import Connection
from typing import Final

from mpbroadcast import trap_points
from mpbroadcast.broker.host.main import Settings, run
from mpbroadcast.broker.host.no_main import spawn_alone
from mpbroadcast.broker.host.socket_file import answers, identity
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import StartError
from mpbroadcast.posix.addresses import Candidates, is_own_folder, make_own_folder, remove_own_folder
from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.waiting import Descriptor, Steps, Wait

_PAUSE: Final = 0.01  # seconds until the next try while another process starts it; then twice that, and so on
_LONGEST_PAUSE: Final = 0.2
_GRACE: Final = 1.0  # seconds until the interpreter between has ended
_GROUP_SIGNALS: Final = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
_LATE: Final = (
    "no broker was ready at {!r} in time: the machine is very busy, another process that starts it is stopped, or "
    "start_timeout is too short"
)


def starting(candidates: Candidates, settings: Settings, deadline: Deadline, tries: int) -> Steps[None]:
    """Start a broker, or wait a little while another process does. Then the caller tries to connect, and calls this again.

    ``tries`` is how often it was called before.

    :raises StartError: it could not be started, or not until ``deadline``.
    """
    if deadline.remaining() == 0:
        raise StartError(_LATE.format(candidates.made))
    if is_own_folder(candidates.lock):
        make_own_folder(candidates.lock)
    with _lock_of(candidates.lock) as lock:
        if lock is not None:
            try:
                yield from _starting_unless_there(candidates, settings, lock, deadline)
            finally:
                if is_own_folder(candidates.lock):
                    remove_own_folder()
    if lock is None:
        yield Wait(deadline.at_most(min(_PAUSE * 2 ** min(tries, 10), _LONGEST_PAUSE)))


def _starting_unless_there(candidates: Candidates, settings: Settings, lock: Connection, deadline: Deadline) -> Steps[None]:
    if any(map(answers, candidates.paths)):
        return
    trap_points.reach("starting for all")
    try:
        yield from _starting(candidates.made, settings, lock, deadline)
    except StartError as error:
        # start_broadcaster, which takes another lock, may have taken the address meanwhile.
        if getattr(error.__cause__, "errno", None) != errno.EADDRINUSE or not answers(candidates.made):
            raise


@contextlib.contextmanager
def _lock_of(folder: str) -> Iterator[Connection | None]:
    """Hold the lock of a folder; ``None`` if another process has it. A ``Connection`` can be handed to a new process."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # a broker that has ended has removed it
        yield None
        return
    with Connection(fd, writable=False) as lock:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError:  # a file system without locks: only one of several that start a broker gets the socket's name
            pass
        yield lock if _is_at(fd, folder) else None


def _is_at(fd: int, folder: str) -> bool:
    """Return False if the folder of this descriptor was removed before it was locked."""
    try:
        return identity(fd) == identity(os.path.realpath(folder))
    except FileNotFoundError:
        return False


def _starting(address: str, settings: Settings, lock: Connection, deadline: Deadline) -> Steps[None]:
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        resource_tracker.ensure_running()  # which unblocks SIGINT, up to 3.11
        # The new process inherits the mask, so no signal to this process's group ends it before it has left the group.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        try:
            between = spawn_alone(_fork_broker, settings, writer, lock)
        except OSError as error:
            raise StartError(f"the broker process could not be started: {error.strerror}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        writer.close()
        try:
            report = yield from _reporting(reader, address, deadline)
            yield Wait(Deadline(_GRACE), IN, Descriptor(between.sentinel))
        finally:
            if between.poll() is None:
                between.kill()
                between.wait(_GRACE)
            between.close()
    if "error" in report:
        raise StartError(report["error"]) from (OSError(report["errno"], report["error"]) if report.get("errno") else None)


def _reporting(reader: Connection, address: str, deadline: Deadline) -> Steps[dict[str, str]]:
    trap_points.reach("waiting for all")
    if not (yield Wait(deadline, IN, reader)):
        raise StartError(_LATE.format(address))
    try:
        report: dict[str, str] = json.loads(reader.recv_bytes())
    except (EOFError, OSError):
        raise StartError("the broker process ended before it was ready; see what it wrote to standard error") from None
    return report


def _fork_broker(settings: Settings, ready: Connection, lock: Connection) -> None:
    """Leave the session of the caller, and leave the broker to no process."""
    os.setsid()
    if os.fork():
        os._exit(0)
    kept, standard = {ready.fileno(), lock.fileno()}, {0, 1, 2}
    for fd in {int(name) for name in os.listdir("/dev/fd")} - kept - standard:
        with contextlib.suppress(OSError):  # that of the listing
            os.close(fd)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in standard - kept - {nowhere}:
        os.dup2(nowhere, fd)
    run(settings, ready, lock)
