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
import gc
import io
import json
import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Final

from mpbroadcast.arguments import Deadline
from mpbroadcast.broker.broker import Broker
from mpbroadcast.broker.listening import Listening, identity, remove_forgotten_folders, remove_leftovers, why_not
from mpbroadcast.broker.liveness import PeerProcess
from mpbroadcast.broker.loop import IN
from mpbroadcast.broker.requests import answer
from mpbroadcast.errors import StartError
from mpbroadcast.wire.descriptors import on_fork

__all__ = ["BrokerProcess"]

log = logging.getLogger("mpbroadcast.broker")

DRAIN_TIMEOUT: Final = 5.0  # seconds, when nobody says how long
_GRACE: Final = 3.0  # seconds for what comes behind the draining
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
    history: int
    stall_timeout: float | None
    inherited: frozenset[tuple[int, int, int]]  # the starter's descriptors, each with the device and inode of its file


# --- in the starter


class BrokerProcess:
    """A broker that this process has started, until it has ended it.

    :raises StartError: it could not be started within ``timeout`` seconds; nothing is left of it.
    """

    def __init__(
        self,
        context: BaseContext,
        address: str | None,
        authkey: bytes | None,
        timeout: float | None,
        *,
        history: int,
        stall_timeout: float | None,
    ) -> None:
        current = multiprocessing.current_process()
        if current.daemon:
            raise StartError(
                "a daemonic process (such as a Pool's worker) may not start a broker: start it in the main process, and hand "
                "the broadcaster on, or use connect() here"
            )
        own_key = bytes(current.authkey)
        keys = [own_key] if authkey is None or authkey == own_key else [authkey, own_key]
        temporary = os.path.abspath(tempfile.gettempdir())
        method = context.get_start_method()
        # Taken before the start, so that the pipes by which multiprocessing watches its processes are not among them.
        inherited = _open_descriptors() if method == "fork" else frozenset[tuple[int, int, int]]()
        settings = _Settings(address, keys, os.getpid(), temporary, history, stall_timeout, inherited)
        self.starter = os.getpid()
        self._at_exit: Finalize | None = None
        on_fork(self, BrokerProcess._in_child)
        try:
            reader, writer = context.Pipe(duplex=False)
        except OSError as error:
            raise StartError(f"the broker process could not be started: {error.strerror}") from error
        with reader, writer:
            self._process: BaseProcess = context.Process(  # type: ignore[attr-defined]
                target=_main, args=(settings, writer), name="mpbroadcast-broker", daemon=True
            )
            try:
                _start(method, self._process)
                writer.close()
                self.address = _wait_until_ready(self._process, reader, Deadline(timeout), "" if method == "fork" else _GUARD)
            except BaseException:
                self._kill()
                raise

    def end_at_exit(self, close: Callable[..., None], *args: Any) -> None:
        """Call ``close`` at the end of the program, while the other processes still run.

        That is before multiprocessing terminates daemons and joins the others, which may wait for what is to be delivered.
        """
        self._at_exit = Finalize(None, close, args, exitpriority=10)

    def end(self, timeout: float | None, *, told: bool) -> None:
        """Wait for it, if it was ``told`` to stop within ``timeout``, and end it if it has not."""
        if told:
            self._process.join(None if timeout is None else timeout + _GRACE)
        self._kill()
        remove_leftovers(self.address)
        if self._at_exit is not None:
            self._at_exit.cancel()

    def _in_child(self) -> None:
        # A child of a plain os.fork() takes its parent's processes for its own, and ends the daemons among them at its end.
        vars(multiprocessing.process).get("_children", set()).discard(self._process)

    def _kill(self) -> None:
        process = self._process
        if process.pid is None:
            return
        if process.exitcode is None:
            process.terminate()
            process.join(_GRACE)
        if process.exitcode is None:
            process.kill()
            process.join()
        process.close()


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
            found.add((number, *identity(number)))
    return frozenset(found)


def _start(method: str, process: BaseProcess) -> None:
    # Its first instructions must not be interrupted by a Ctrl-C, so SIGINT is blocked in it from the start. A fork server
    # would hand a blocked SIGINT on to all that it starts later, and its children do not have our mask: not there.
    masked = method != "forkserver"
    if masked:
        if method == "spawn":
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


# --- in the broker process


def _main(settings: _Settings, ready: connection.Connection) -> None:
    _let_go_of_descriptors(settings.inherited)
    signals = _take_over_signals()
    _log_to_standard_error()
    gc.freeze()  # what the starter had allocated is not ours to look through
    listening: Listening | None = None
    try:
        try:
            starter = PeerProcess(settings.starter)
            remove_forgotten_folders(settings.temporary)
            listening = Listening(settings.address, settings.temporary)
        except OSError as error:
            text = why_not(error, settings.address, settings.temporary)
            ready.send_bytes(json.dumps({"error": text, "errno": error.errno or 0}).encode())
            return
        broker = Broker(listening.socket, settings.keys, answer, history=settings.history, stall_timeout=settings.stall_timeout)
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
    for fd, device, inode in inherited:
        with contextlib.suppress(OSError):  # closed in between
            # A number that has been given to another file since is one of the pipes by which processes are watched.
            if fd != nowhere and identity(fd) == (device, inode):
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
