"""The broker process: how it is started, what it takes over from its starter, and how it ends.

It is started through ``multiprocessing``, and says that it is ready, or why it cannot be, through a pipe. A forked broker has
copies of all its starter's descriptors; it puts ``/dev/null`` in their places before anything else, so that no pipe or socket
of the user's lives on in it. (It does not close them: objects of the user's that are collected later would close whatever
has got these numbers.)

It ends when it is asked to, on SIGTERM, and when its starter is dead, however that came about; each time it drains first. A
Ctrl-C goes to the whole group and is the starter's to handle: the broker ignores it from before its first instruction on.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import multiprocessing
import multiprocessing.process
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Final
from weakref import WeakMethod

import psutil

from mpbroadcast import trap_points
from mpbroadcast.broker.host.alone import AloneContext
from mpbroadcast.broker.host.journal import Journal
from mpbroadcast.broker.host.logs import set_up
from mpbroadcast.broker.host.socket_file import Listening, identity, remove_forgotten_folders, remove_leftovers, why_not
from mpbroadcast.broker.host.succession import READY, STOPPING, Succession, new_identity
from mpbroadcast.broker.host.supervisor import keep
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import DRAIN_TIMEOUT, Broker
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import StartError
from mpbroadcast.posix.descendants import without_heirs
from mpbroadcast.posix.forks import on_fork
from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.processes import PeerProcess

log = logging.getLogger("mpbroadcast.broker")

_GRACE: Final = 3.0  # seconds until a broker ends, where no timeout limits that
_SHORT_GRACE: Final = 0.3  # seconds for what comes behind a timeout

_GUARD: Final = (
    "Under the start methods spawn and forkserver the main module is imported once more in the new process, so what starts "
    'the program must stand under `if __name__ == "__main__":`, in a file that can be imported'
)
_NO_MAIN: Final = (
    "Without a `context` the broker imports nothing of the main module: what log_config names must stand in another one"
)


@dataclass
class Settings:
    """What a broker process is to be; the arguments are those of ``start_broadcaster``."""

    address: str | None
    authkey: bytes | None
    history: int
    stall_timeout: float | None
    log_config: dict[str, Any] | None
    restart: bool
    keys: list[bytes] = field(default_factory=list)
    starter: int = field(default_factory=os.getpid)
    temporary: str = field(default_factory=lambda: os.path.abspath(tempfile.gettempdir()))
    inherited: frozenset[tuple[int, int, int]] = frozenset()  # its descriptors, each with the device and inode of its file


# --- in the starter


class BrokerProcess:
    """A broker that this process has started, until it has ended it.

    :raises StartError: it could not be started within ``timeout`` seconds; nothing is left of it.
    """

    def __init__(self, context: BaseContext | None, timeout: float | None, settings: Settings) -> None:
        current = multiprocessing.current_process()
        if current.daemon:
            raise StartError(
                "a daemonic process (such as a Pool's worker) may not start a broker: start it in the main process, and hand "
                "the broadcaster on, or use connect() here"
            )
        own_key = bytes(current.authkey)
        settings.keys = [own_key] if settings.authkey is None else [settings.authkey, own_key]
        hint = _GUARD
        if context is None:
            context = multiprocessing.get_context()
            if context.get_start_method() != "fork":
                context, hint = AloneContext(), _NO_MAIN
        method = context.get_start_method()
        if method == "fork":
            hint = ""
            # Taken before the start, so that the pipes by which multiprocessing watches its processes are not among them.
            settings.inherited = _open_descriptors()
        self._restart = settings.restart
        self._at_exit: Finalize | None = None
        # The process, whoever reaps it: where SIGCHLD is ignored, multiprocessing never knows that it has ended.
        self._watched: PeerProcess | None = None
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
                writer.close()  # and so there is a descriptor for the next line
                self._watched = _process(self._process.pid)
                self.address = _wait_until_ready(self._process, reader, Deadline(timeout), hint)
            except BaseException:
                reader.close()  # a broker that cannot be watched ends when it cannot report
                self._kill(_GRACE)
                raise

    def end_at_exit(self, close: Callable[[], None]) -> None:
        """Call this method at the end of the program, if its object is still there, while the other processes still run.

        That is before multiprocessing terminates daemons and joins the others, which may wait for what is to be delivered.
        """
        self._at_exit = Finalize(None, _call, (WeakMethod(close),), exitpriority=10)

    def leave(self) -> bool:
        """Let it end by itself, or else when multiprocessing terminates daemons at the end of the program.

        Return whether it has still to end.
        """
        at_exit, self._at_exit = self._at_exit, None
        if self._watched is not None:
            self._watched.close()
        if at_exit is not None:
            at_exit.cancel()
        return at_exit is not None

    def end(self, timeout: float | None, *, asked: int, time_left: Callable[[], float]) -> None:
        """Wait for it, for at most ``timeout`` seconds, and end it then. Process ``asked``, if any, was requested to stop.

        Readers that go on reading give it more time: ``time_left`` requests from it how many seconds are left.
        """
        trap_points.reach("ending the broker")
        kept = _process(asked) if asked and self._restart else None
        deadline = Deadline(timeout)
        if asked and self._watched is not None:
            _wait(self._watched, deadline, time_left)
        if kept is not None:  # its keeper may have died before. It may stay a zombie: that is up to whoever has to reap it
            if not _wait(kept, deadline, time_left):
                kept.send_signal(signal.SIGKILL)
            kept.close()
        left = deadline.remaining()
        self._kill(_GRACE if left is None else max(left, _SHORT_GRACE))
        remove_leftovers(self.address)
        self.leave()

    def _in_child(self) -> None:
        # A child of a plain os.fork() takes its parent's processes for its own, and ends the daemons among them at its end.
        self._forget()
        if self._watched is not None:
            self._watched.close()

    def _forget(self) -> None:
        vars(multiprocessing.process).get("_children", set()).discard(self._process)

    def _kill(self, grace: float) -> None:
        process, watched = self._process, self._watched
        if process.pid is None:
            return
        if watched is not None:
            if not watched.wait(0):
                watched.send_signal(signal.SIGTERM)
            if not watched.wait(grace):
                below = _children(watched.pid) if self._restart else []
                watched.send_signal(signal.SIGKILL)
                watched.wait(None)
                for broker in below:
                    broker.send_signal(signal.SIGKILL)
                    broker.wait(_GRACE)
                    broker.close()
            watched.close()
        if process.exitcode is None:
            connection.wait([process.sentinel], _GRACE)  # a fork server reports a moment later
        try:
            process.close()
        except ValueError:  # somebody else has reaped it, so its exit code is not to be had
            self._forget()


def _call(method: WeakMethod[Callable[[], None]]) -> None:
    close = method()
    if close is not None:
        close()


def _process(pid: int | None) -> PeerProcess | None:
    """The process, if it lives."""
    try:
        return PeerProcess(pid) if pid else None
    except (OSError, psutil.Error):
        return None


def _wait(process: PeerProcess, deadline: Deadline, time_left: Callable[[], float]) -> bool:
    """Wait for a broker that drains: whether it has ended."""
    left = deadline.remaining()
    while not process.wait(left):
        left = time_left()
        if not left:
            return False
        left += _SHORT_GRACE
    return True


def _children(pid: int) -> list[PeerProcess]:
    with contextlib.suppress(psutil.Error):
        return [found for child in psutil.Process(pid).children() if (found := _process(child.pid)) is not None]
    return []


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
        without_heirs(process.start)
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # A fork server imports the main module first, and that may have ended it.
        no_server = method == "forkserver" and isinstance(error, (ConnectionError, EOFError))
        bootstrapping = isinstance(error, RuntimeError) and "bootstrapping" in str(error)
        raise StartError(
            _GUARD if bootstrapping or no_server else f"the broker process could not be started: {text}"
        ) from error
    finally:
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _wait_until_ready(process: BaseProcess, reader: connection.Connection, deadline: Deadline, hint: str) -> str:
    trap_points.reach("waiting for the broker")
    ready = connection.wait([reader, process.sentinel], deadline.remaining())
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
            f"says why. {hint}".rstrip()
        ) from None
    if "error" in answer:
        raise StartError(answer["error"]) from (OSError(answer["errno"], answer["error"]) if answer["errno"] else None)
    return str(answer["address"])


# --- in the broker process


def _main(settings: Settings, ready: connection.Connection) -> None:
    _let_go_of_descriptors(settings.inherited)
    _ignore_signals()
    _allow_descriptors()
    gc.freeze()  # what the starter had allocated is not ours to look through
    try:
        set_up(log, settings.log_config)
    except Exception as error:
        set_up(log, None)
        causes = [str(error)]
        cause = error.__cause__ or error.__context__
        while cause is not None:
            causes.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__ or cause.__context__
        _report(ready, f"log_config is no dictionary that logging.config can use: {'; '.join(causes)}")
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})  # until somebody waits for them
    listening: Listening | None = None
    try:
        remove_forgotten_folders(settings.temporary)
        listening = Listening(settings.address, settings.temporary)
        journal = Journal() if settings.restart else None
    except OSError as error:
        _report(ready, why_not(error, settings.address, settings.temporary), error)
    else:
        if journal is None:
            _serve(settings, ready, listening)
        else:
            _keep_serving(settings, ready, listening, journal)
    finally:
        if listening is not None:
            listening.remove()


def _keep_serving(settings: Settings, ready: connection.Connection, listening: Listening, journal: Journal) -> None:
    """Serve at this socket, in one child process after the other: what connects in between waits in the socket's queue."""
    name = new_identity()

    def serve(number: int) -> None:
        succession = Succession(name, number, Journal(journal.files))
        _serve(settings, None if number else ready, listening, succession)

    def wanted() -> bool:
        entries = Journal(journal.files).entries
        return READY in entries and STOPPING not in entries

    keep(settings.starter, serve, wanted, time.monotonic)


def _report(ready: connection.Connection | None, text: str, error: OSError | None = None) -> None:
    if ready is None:
        log.error("%s", text)
        sys.exit(1)
    with contextlib.suppress(BrokenPipeError):  # the starter has died before it could read this
        ready.send_bytes(json.dumps({"error": text, "errno": (error and error.errno) or 0}).encode())


def _serve(
    settings: Settings, ready: connection.Connection | None, listening: Listening, succession: Succession | None = None
) -> None:
    signals = _take_over_signals()
    broker: Broker | None = None
    try:
        broker = Broker(
            listening.socket,
            settings.keys,
            answer,
            history=settings.history,
            stall_timeout=settings.stall_timeout,
            succession=succession,
        )
        _watch(broker, signals)
        try:
            broker.end_with(settings.starter)
        except ProcessLookupError as error:
            if ready is not None:
                _report(ready, why_not(error, settings.address, settings.temporary), error)
            return
        if ready is not None:
            try:
                ready.send_bytes(json.dumps({"address": listening.address}).encode())
            except BrokenPipeError:  # the starter has died before it could read this
                return
            ready.close()
        if succession is not None:
            succession.journal.put({"number": READY, "it": True})
        broker.run()
        listening.remove()  # its keeper may be dead
    except BaseException as error:
        if not isinstance(error, SystemExit):
            log.critical("the broker has crashed", exc_info=True)
            if broker is not None:
                broker.tell_of_crash(traceback.format_exc())
        sys.exit(1)


def _ignore_signals() -> None:
    """What is not for the broker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal's end: the starter decides what that means
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_IGN)  # a handler of the starter's
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _allow_descriptors() -> None:
    """As many as the system lets it have: each subscription takes two."""
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _take_over_signals() -> int:
    """The read end of a pipe that becomes readable with SIGTERM."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return reader


def _watch(broker: Broker, signals: int) -> None:
    def terminated(events: int) -> None:
        if signal.SIGTERM in os.read(signals, 4096):
            broker.stop(DRAIN_TIMEOUT)

    broker.loop.watch(signals, IN, terminated)


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
