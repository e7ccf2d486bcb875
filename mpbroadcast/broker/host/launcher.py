"""The starter's side of the broker process: how it is started, watched and ended.

The process is started through ``multiprocessing``, and reports through a pipe that it is ready, or why it cannot be. Without a
``context`` it is forked where that is the default, and else started in a new interpreter that imports nothing of the main
module.

The process is watched through a pidfd of its own, as it may be reaped by other code: where SIGCHLD is ignored,
``multiprocessing`` never learns that it has ended, and its process ID may be another process's by then. The broker is ended by
a request, then by SIGTERM, then by SIGKILL, each with its time. With ``restart=True`` the process is the supervisor, and the
broker is its child: what is left of that is ended, too.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Final
from weakref import WeakMethod

import psutil

from mpbroadcast import trap_points
from mpbroadcast.broker.host.main import Settings, run
from mpbroadcast.broker.host.no_main import NoMainContext
from mpbroadcast.broker.host.socket_file import identity, remove_leftovers
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import StartError
from mpbroadcast.posix import waiting
from mpbroadcast.posix.descriptors import on_fork, without_heirs
from mpbroadcast.posix.poller import IN
from mpbroadcast.posix.processes import PeerProcess
from mpbroadcast.posix.waiting import Descriptor, Steps, Wait

_GRACE: Final = 3.0  # seconds until a broker ends, where no timeout limits that
_SHORT_GRACE: Final = 0.3  # seconds for what comes behind a timeout

_GUARD: Final = (
    "Under the start methods spawn and forkserver the main module is imported once more in the new process, so what starts "
    'the program must stand under `if __name__ == "__main__":`, in a file that can be imported'
)
_NO_MAIN: Final = (
    "Without a `context` the broker imports nothing of the main module: what log_config names must stand in another one"
)


def _no_time() -> Steps[float]:
    yield from ()
    return 0.0


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
                context, hint = NoMainContext(), _NO_MAIN
        method = context.get_start_method()
        if method == "fork":
            hint = ""
            # Taken before the start, so that the pipes by which multiprocessing watches its processes are not among them.
            settings.inherited = _open_descriptors()
        self._restart = settings.restart
        self._at_exit: Finalize | None = None
        self._watched: PeerProcess | None = None
        on_fork(self, BrokerProcess._in_child)
        try:
            reader, writer = context.Pipe(duplex=False)
        except OSError as error:
            raise StartError(f"the broker process could not be started: {error.strerror}") from error
        with reader, writer:
            self._process: BaseProcess = context.Process(  # type: ignore[attr-defined]
                target=run, args=(settings, writer), name="mpbroadcast-broker", daemon=True
            )
            try:
                _start(method, self._process)
                writer.close()  # and so there is a descriptor for the next line
                self._watched = _process(self._process.pid)
                self.address = _wait_until_ready(self._process, reader, Deadline(timeout), hint)
            except BaseException:
                reader.close()  # a broker that cannot be watched ends when it cannot report
                waiting.run(self._killing(_GRACE))
                raise

    def end_at_exit(self, close: Callable[[], None]) -> None:
        """Call this method at the end of the program, if its object is still there, while the other processes still run.

        That is before multiprocessing terminates daemons and joins the others, which may wait for what is to be delivered.
        """
        method = WeakMethod(close)

        def call() -> None:
            if (still_there := method()) is not None:
                still_there()

        self._at_exit = Finalize(None, call, exitpriority=10)

    def leave(self) -> bool:
        """Leave its end to itself, or else to multiprocessing, which terminates daemons at the end of the program.

        Return True if it has still to end.
        """
        at_exit, self._at_exit = self._at_exit, None
        if self._watched is not None:
            self._watched.close()
        if at_exit is not None:
            at_exit.cancel()
        return at_exit is not None

    def ending(self, timeout: float | None, *, asked: int = 0, time_left: Callable[[], Steps[float]] = _no_time) -> Steps[None]:
        """End it.

        If ``asked`` (the PID that confirmed the stop request; 0: none did), wait for it first, for at most ``timeout`` seconds,
        and longer while ``time_left()`` does not return 0. Then send SIGTERM, and SIGKILL if that does not end it.
        """
        trap_points.reach("ending the broker")
        broker = _process(asked) if asked and self._restart else None
        deadline = Deadline(timeout)
        if asked and self._watched is not None:
            yield from _waiting(self._watched, deadline, time_left)
        if broker is not None:  # its supervisor may have died before. It may stay a zombie: its parent has to reap it
            if not (yield from _waiting(broker, deadline, time_left)):
                broker.send_signal(signal.SIGKILL)
            broker.close()
        left = deadline.remaining()
        yield from self._killing(_GRACE if left is None else max(left, _SHORT_GRACE))
        remove_leftovers(self.address)
        self.leave()

    def _in_child(self) -> None:
        # A child of a plain os.fork() takes its parent's processes for its own, and ends the daemons among them at its end.
        self._forget()
        if self._watched is not None:
            self._watched.close()

    def _forget(self) -> None:
        vars(multiprocessing.process).get("_children", set()).discard(self._process)

    def _killing(self, grace: float) -> Steps[None]:
        process, watched = self._process, self._watched
        try:
            if process.pid is None:
                return
        except ValueError:  # a signal handler has closed it meanwhile
            return
        if watched is not None:
            watched.send_signal(signal.SIGTERM)
            if not (yield from watched.waiting(grace)):
                below = _children(watched.pid) if self._restart else []
                watched.send_signal(signal.SIGKILL)
                yield from watched.waiting(None)
                for broker in below:
                    broker.send_signal(signal.SIGKILL)
                    yield from broker.waiting(_GRACE)
                    broker.close()
            watched.close()
        try:
            if process.exitcode is None:
                yield Wait(Deadline(_GRACE), IN, Descriptor(process.sentinel))  # a fork server reports a moment later
            process.close()
        except ValueError:  # other code has reaped it, so its exit code is not to be had, or a signal handler has closed it
            self._forget()


def _process(pid: int | None) -> PeerProcess | None:
    """Return the process, if it lives."""
    try:
        return PeerProcess(pid) if pid else None
    except (OSError, psutil.Error):
        return None


def _waiting(process: PeerProcess, deadline: Deadline, time_left: Callable[[], Steps[float]]) -> Steps[bool]:
    """Wait for a broker that drains. Return True if it has ended."""
    left = deadline.remaining()
    while not (yield from process.waiting(left)):
        left = yield from time_left()
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
        fds = {int(name) for name in os.listdir("/dev/fd")}
    except OSError:
        fds = set(range(256))
    if sys.__stderr__:
        fds.discard(2)  # the broker logs there
    found = set()
    for fd in fds:
        with contextlib.suppress(OSError):  # the one of the listing itself, among others
            found.add((fd, *identity(fd)))
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
            f"the broker process ended before it was ready (exit code {process.exitcode}); see what it wrote to standard "
            f"error. {hint}".rstrip()
        ) from None
    if "error" in answer:
        raise StartError(answer["error"]) from (OSError(answer["errno"], answer["error"]) if answer.get("errno") else None)
    return str(answer["address"])
