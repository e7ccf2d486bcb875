"""The broker process: how it is started, what it takes over from its starter, and how it ends.

It is started through ``multiprocessing``, and says that it is ready, or why it cannot be, through a pipe. A forked broker has
copies of all its starter's descriptors; it puts ``/dev/null`` in their places before anything else, so that no pipe or socket
of the user's lives on in it. (It does not close them: objects of the user's that are collected later would close whatever
has got these numbers.)

It ends when it is told to, on SIGTERM, and when its starter is dead, however that came about; each time it drains first. A
Ctrl-C goes to the whole group and is the starter's to handle: the broker ignores it from before its first instruction on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Final

from mpbroadcast.arguments import MAX_ADDRESS, Deadline
from mpbroadcast.broker.broker import Broker
from mpbroadcast.broker.liveness import PeerProcess
from mpbroadcast.broker.loop import IN
from mpbroadcast.broker.requests import answer
from mpbroadcast.errors import StartError

__all__ = ["end", "launch"]

log = logging.getLogger("mpbroadcast.broker")

DRAIN_TIMEOUT: Final = 5.0  # seconds, when nobody says how long
_GRACE: Final = 3.0  # seconds for what comes behind the draining
_FOLDER: Final = "mpbroadcast-"
_SOCKET: Final = "broker"
_FORGOTTEN: Final = 60.0  # seconds after which a folder without a socket is nobody's
_SWEEP: Final = 1.0

_GUARD: Final = (
    "Under the start methods spawn and forkserver the main module is imported once more in the new process, so what starts "
    'the program must stand under `if __name__ == "__main__":`, in a file that can be imported'
)


@dataclass(frozen=True)
class _Settings:
    address: str | None
    keys: list[bytes]
    starter: int
    temporary: str
    inherited: frozenset[tuple[int, int, int]]  # the starter's descriptors, each with the device and inode of its file


# --- in the starter


def launch(context: BaseContext, address: str | None, authkey: bytes | None, timeout: float | None) -> tuple[BaseProcess, str]:
    """Start a broker process, and wait until it listens: the process and its address.

    :raises StartError: it did not come to that; the process has ended.
    """
    current = multiprocessing.current_process()
    if current.daemon:
        raise StartError(
            "a daemonic process (such as a Pool's worker) may not start a broker: start it in the main process, and hand "
            "the broadcaster on, or use connect() here"
        )
    own_key = bytes(current.authkey)
    keys = [own_key] if authkey is None or authkey == own_key else [authkey, own_key]
    temporary = os.path.abspath(tempfile.gettempdir())
    # Taken before the start, so that the pipes by which multiprocessing watches its processes are not among them.
    inherited = _open_descriptors() if context.get_start_method() == "fork" else frozenset[tuple[int, int, int]]()
    settings = _Settings(address, keys, os.getpid(), temporary, inherited)
    reader, writer = context.Pipe(duplex=False)
    with reader:
        process = context.Process(target=_main, args=(settings, writer), name="mpbroadcast-broker", daemon=True)  # type: ignore[attr-defined]
        try:
            with writer:
                _start(context, process)
            deadline = Deadline(timeout)
            guard = "" if context.get_start_method() == "fork" else _GUARD
            return process, _wait_until_ready(process, reader, deadline, guard)
        except BaseException:
            _kill(process)
            raise


def _open_descriptors() -> frozenset[tuple[int, int, int]]:
    try:
        numbers = {int(name) for name in os.listdir("/dev/fd")}
    except OSError:
        numbers = set(range(256))
    if sys.__stderr__:
        numbers.discard(2)  # the broker logs there
    found = set()
    for number in numbers:
        with contextlib.suppress(OSError):  # the one of the listing itself, among others
            found.add((number, *_identity(number)))
    return frozenset(found)


def _start(context: BaseContext, process: BaseProcess) -> None:
    # Its first instructions must not be interrupted by a Ctrl-C, so SIGINT is blocked in it from the start. A fork server
    # would hand a blocked SIGINT on to all that it starts later, and its children do not have our mask: not there.
    masked = context.get_start_method() != "forkserver"
    if masked:
        if context.get_start_method() == "spawn":
            resource_tracker.ensure_running()  # which unblocks SIGINT, up to 3.11
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    else:
        forkserver.ensure_running()
    try:
        process.start()
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        bootstrapping = isinstance(error, RuntimeError) and "bootstrapping" in str(error)
        raise StartError(_GUARD if bootstrapping else f"the broker process could not be started: {text}") from error
    finally:
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _wait_until_ready(process: BaseProcess, reader: connection.Connection, deadline: Deadline, guard: str) -> str:
    ready = connection.wait([reader, process.sentinel], deadline.left())
    if not ready:
        raise StartError(
            "the broker process was not ready in time: the machine is very busy, or start_timeout is too short for its start "
            "method"
        )
    try:
        if not reader.poll():
            raise EOFError
        answer = json.loads(reader.recv_bytes())
    except (EOFError, OSError):
        process.join(1)
        raise StartError(
            f"the broker process ended before it was ready (exit code {process.exitcode}); what it wrote to standard error "
            f"says why. {guard}".rstrip()
        ) from None
    if "error" in answer:
        raise StartError(answer["error"]) from OSError(answer["errno"], answer["error"])
    return str(answer["address"])


def end(process: BaseProcess, address: str, timeout: float | None, *, told: bool) -> None:
    """Wait for a broker that was ``told`` to stop within ``timeout``, and end it if it does not."""
    if told:
        process.join(None if timeout is None else timeout + _GRACE)
    _kill(process)
    with contextlib.suppress(OSError):  # what a broker that was killed has left
        if not _answers(address):
            os.unlink(address)
        folder, name = os.path.split(address)
        if name == _SOCKET and os.path.basename(folder).startswith(_FOLDER):
            os.rmdir(folder)


def _kill(process: BaseProcess) -> None:
    if process.pid is None:
        return
    if process.exitcode is None:
        process.terminate()
        process.join(_GRACE)
    if process.exitcode is None:
        process.kill()
        process.join()
    process.close()


# --- in the broker process


def _main(settings: _Settings, ready: connection.Connection) -> None:
    _let_go_of_descriptors(settings.inherited)
    signals = _take_over_signals()
    _log_to_standard_error()
    gc.freeze()  # what the starter had allocated is not ours to look through
    listening: _Listening | None = None
    try:
        try:
            starter = PeerProcess(settings.starter)
            _remove_forgotten_folders(settings.temporary)
            listening = _Listening(settings)
        except OSError as error:
            text = _why_not(error, settings)
            ready.send_bytes(json.dumps({"error": text, "errno": error.errno or 0}).encode())
            return
        broker = Broker(listening.socket, settings.keys, answer)
        _watch(broker, starter, signals)
        ready.send_bytes(json.dumps({"address": listening.address}).encode())
        ready.close()
        broker.run()
    except BaseException as error:
        if not isinstance(error, BrokenPipeError):  # the starter has died before it could be told
            log.critical("the broker has crashed", exc_info=True)
            sys.exit(1)
    finally:
        if listening is not None:
            listening.remove()


def _take_over_signals() -> tuple[int, int]:
    """Ignore what is not for the broker, and get a pipe that tells of SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal's end: the starter decides what that means
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_IGN)  # a handler of the starter's
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return reader, writer


def _let_go_of_descriptors(inherited: frozenset[tuple[int, int, int]]) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd, *identity in inherited:
        with contextlib.suppress(OSError):  # closed in between
            # A number that has been given to another file since is one of the pipes by which processes are watched.
            if fd != nowhere and _identity(fd) == tuple(identity):
                os.dup2(nowhere, fd, inheritable=False)
    for standard in (sys.__stdin__, sys.__stdout__):
        if standard is not None and not standard.closed:
            os.dup2(nowhere, standard.fileno(), inheritable=False)
    os.close(nowhere)


def _log_to_standard_error() -> None:
    log.propagate = False
    log.setLevel(logging.WARNING)
    if sys.__stderr__ is None:  # descriptor 2 may be anything
        log.handlers = [logging.NullHandler()]
        return
    # Not sys.stderr, which under fork may be an object of the starter's that writes elsewhere.
    descriptor = io.FileIO(2, "w", closefd=False)
    handler = logging.StreamHandler(io.TextIOWrapper(descriptor, "utf-8", "backslashreplace", line_buffering=True))
    handler.setFormatter(logging.Formatter("mpbroadcast broker %(process)d: %(levelname)s: %(message)s"))
    log.handlers = [handler]


def _watch(broker: Broker, starter: PeerProcess, signals: tuple[int, int]) -> None:
    def terminated(events: int) -> None:
        if signal.SIGTERM in os.read(signals[0], 4096):
            broker.stop(DRAIN_TIMEOUT)

    def starter_died(events: int) -> None:
        broker.loop.close(starter.fd)
        broker.stop(DRAIN_TIMEOUT)

    def ask() -> None:
        if starter.dead():
            broker.stop(DRAIN_TIMEOUT)
        else:
            broker.loop.later(_SWEEP, ask)

    broker.loop.watch(signals[0], IN, terminated)
    if starter.fd >= 0:
        broker.loop.watch(starter.fd, IN, starter_died)
    else:
        ask()


def _why_not(error: OSError, settings: _Settings) -> str:
    where = settings.address or f"a folder in {settings.temporary!r}"
    if isinstance(error, ProcessLookupError):
        return "its starter has ended"
    if error.errno == errno.EADDRINUSE:
        return f"the address {where!r} is in use: {error.strerror}"
    return f"the broker cannot listen at {where!r}: {error.strerror or error}"


class _Listening:
    """The socket, and its file, which nobody but this user can open.

    The file gets its name only when the socket listens, so whoever finds a socket there that refuses knows that its broker is
    dead. What is done about it is done under a lock on the folder, which leaves nothing behind.
    """

    def __init__(self, settings: _Settings) -> None:
        self._own_folder = settings.address is None
        if settings.address is None:
            folder, name = _make_folder(settings.temporary), _SOCKET
        else:
            folder, name = os.path.split(settings.address)
        self.address = os.path.join(folder, name)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        try:
            os.chdir(folder)  # so that no name that is bound is longer than the address itself
            self._listen(name)
        except BaseException:
            self.socket.close()
            if self._own_folder:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.chdir("/")
        self._identity = _identity(self.address)

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
            if _identity(self.address) == self._identity:
                os.unlink(self.address)
            if self._own_folder:
                os.rmdir(os.path.dirname(self.address))


def _identity(file: str | int) -> tuple[int, int]:
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


def _remove_forgotten_folders(temporary: str) -> None:
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
