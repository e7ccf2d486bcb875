"""The main function of the broker process: set itself up, listen, serve, and leave nothing behind.

A forked broker has copies of all its starter's descriptors. It puts ``/dev/null`` under their numbers before anything else, so
that no pipe or socket of the user's lives on in it. (It does not close them: objects of the user's that are collected later
would close what has got these numbers since.)

It ends by a request, on SIGTERM, and when its starter is dead, however that came about; each time it drains first. A Ctrl-C
goes to the whole process group and is the starter's to handle: the broker ignores it from before its first instruction on.

With ``restart=True`` this process is the supervisor, which owns the listening socket and the journal, and each broker is a
child of it that inherits both.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import resource
import secrets
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

from mpbroadcast.broker.core.linger import Linger
from mpbroadcast.broker.host.journal import Journal, Succession
from mpbroadcast.broker.host.logs import configure
from mpbroadcast.broker.host.socket_file import Listening, identity, remove_forgotten_folders
from mpbroadcast.broker.host.supervisor import supervise
from mpbroadcast.broker.requests import answer
from mpbroadcast.broker.server import DRAIN_TIMEOUT, Broker
from mpbroadcast.key import Key
from mpbroadcast.posix.key_file import LENGTH as KEY_LENGTH
from mpbroadcast.posix.pipes import new_pipe
from mpbroadcast.posix.poller import IN

log = logging.getLogger("mpbroadcast.broker")

_FAILED: Final = 1  # exit code
_FIRST_LINGER: Final = 3.0  # seconds, at least, in which the first handle on a broker without a starter connects
_SIGNALS: Final = 4096  # that are read at once
MOST_LOOKED_THROUGH: Final = 50_000  # objects, in one garbage collection: some 5 ms
_GROWTH: Final = 20_000  # objects more than at the last collection, until the next one


@dataclass
class Settings:
    """The arguments of ``start_broadcaster``, and what the broker takes over from its starter: sent to the new process."""

    address: str | None
    authkey: bytes | None = field(repr=False)
    history: int
    stall_timeout: float | None
    log_config: dict[str, Any] | None
    restart: bool
    has_key_file: bool = False
    stands_apart: bool = False  # in a session of its own, and no SIGTERM ends it: it ends with its starter, or by a request
    linger: float | None = None  # seconds that a broker without a starter goes on without any session or subscription
    keys: list[bytes] = field(default_factory=list, repr=False)
    starter: int | None = field(default_factory=os.getpid)  # None: it belongs to no process
    temporary: str = field(default_factory=lambda: os.path.abspath(tempfile.gettempdir()))
    inherited: frozenset[tuple[int, int, int]] = frozenset()  # descriptors, each with the device and inode of its file


def run(settings: Settings, ready: Connection, lock: Connection | None = None) -> None:
    """Be the broker, or the supervisor of brokers, until the end. Report to ``ready`` where it listens, or why it cannot.

    ``lock`` is a descriptor that holds the lock of the folder of its socket.
    """
    if settings.stands_apart:
        os.setsid()
    _release_descriptors(settings.inherited)
    _ignore_signals()
    _allow_descriptors()
    bound_collections()
    if not _configure_log(settings.log_config, ready):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})  # until they are waited for
    listening: Listening | None = None
    try:
        remove_forgotten_folders(settings.temporary)
        key = Key(os.urandom(KEY_LENGTH)) if settings.has_key_file else None
        if key is not None:
            settings.keys.append(key)
        listening = Listening(settings.address, settings.temporary, key, None if lock is None else lock.fileno())
        if lock is not None:
            listening.remove_empty_folder()
            lock.close()
        journal = Journal() if settings.restart else None
    except OSError as error:
        where = settings.address or f"a folder in {settings.temporary!r}"
        is_used = error.errno == errno.EADDRINUSE
        problem = f"the address {where!r} is in use" if is_used else f"the broker cannot listen at {where!r}"
        _report(ready, error=f"{problem}: {error.strerror or error}", errno=error.errno)
    else:
        if journal is None:
            _serve(settings, ready, listening)
        else:
            _serve_again_and_again(settings, ready, listening, journal)
    finally:
        if listening is not None:
            listening.remove()


def _configure_log(config: dict[str, Any] | None, ready: Connection) -> bool:
    try:
        configure(log, config)
        return True
    except Exception as error:
        configure(log, None)
        causes = [str(error)]
        cause = error.__cause__ or error.__context__
        while cause is not None:
            causes.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__ or cause.__context__
        _report(ready, error=f"log_config is no dictionary that logging.config can use: {'; '.join(causes)}")
        return False


def _serve_again_and_again(settings: Settings, ready: Connection, listening: Listening, journal: Journal) -> None:
    """Serve at this socket, in one child process after the other: what connects in between waits in the socket's queue."""
    identity = secrets.token_hex(8)

    def serve(generation: int) -> None:
        succession = Succession(identity, generation, Journal(journal.files))
        _serve(settings, None if generation else ready, listening, succession)

    supervise(
        None if settings.linger is not None else settings.starter, serve, lambda: Journal(journal.files).is_another_wanted
    )


def _report(ready: Connection | None, **report: Any) -> bool:
    """Report to the starter, if it waits for that. Return False if it does not read that any more."""
    if ready is not None:
        try:
            ready.send_bytes(json.dumps(report).encode())
        except BrokenPipeError:
            return False
        ready.close()
    return True


def _serve(settings: Settings, ready: Connection | None, listening: Listening, succession: Succession | None = None) -> None:
    broker: Broker | None = None
    try:
        broker = Broker(
            listening.socket,
            settings.keys,
            answer,
            history=settings.history,
            stall_timeout=settings.stall_timeout,
            succession=succession,
            linger=None if settings.linger is None else Linger(settings.linger, first=_FIRST_LINGER),
        )
        _stop_on_sigterm(broker, ignored=settings.stands_apart)
        if settings.starter is not None:
            try:
                broker.end_with(settings.starter)
            except ProcessLookupError as error:
                _report(ready, error="its starter has ended", errno=error.errno)
                return
        if not _report(ready, address=listening.address) and settings.starter is not None:
            return
        if broker.succession.journal is not None:
            broker.succession.journal.note_ready()
        broker.run()
        listening.remove()  # its supervisor may be dead
    except BaseException as error:
        if not isinstance(error, SystemExit):
            log.critical("the broker has crashed", exc_info=True)
            if broker is not None:
                broker.report_crash(traceback.format_exc())
        sys.exit(_FAILED)


def _ignore_signals() -> None:
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            # SIGHUP is the terminal's end: the starter decides what that means. What is callable is a handler of the starter's.
            if number in (signal.SIGINT, signal.SIGHUP) or callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def bound_collections() -> None:
    """Let each garbage collection look through a bounded number of objects, however much waits in the broker.

    The broker's own objects are in no cycle, so each is freed when nothing refers to it any more, without a collection.
    Collections are for objects that handlers of the user's log leave, and come when there are more objects than before, not
    with each message.
    """
    gc.freeze()  # what the starter had allocated is not looked through here
    gc.callbacks.append(_exempt_what_waits)
    gc.set_threshold(_GROWTH)


def _exempt_what_waits(phase: str, _info: dict[str, int]) -> None:
    if phase == "start" and len(gc.get_objects()) > MOST_LOOKED_THROUGH:
        gc.freeze()  # in no time, and for good: what is not in a cycle by now is freed all the same


def _allow_descriptors() -> None:
    """Allow as many as the system permits: each subscription takes two."""
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _stop_on_sigterm(broker: Broker, *, ignored: bool) -> None:
    reader, writer = new_pipe(_SIGNALS)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def read(events: int) -> None:
        if signal.SIGTERM in os.read(reader, _SIGNALS):
            broker.stop(DRAIN_TIMEOUT)

    broker.poller.watch(reader, IN, read)


def _release_descriptors(inherited: frozenset[tuple[int, int, int]]) -> None:
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
