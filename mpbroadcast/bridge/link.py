"""Bridges as a program has them: ``bridge()`` checks what it is given and starts the processes, ``Bridge`` is the handle."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable
from types import TracebackType
from typing import Any, Final, Literal, Self

import psutil

from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, ClosedError, StartError, TimedOut, VersionMismatch
from mpbroadcast.bridge.control import Configuration, Stop
from mpbroadcast.bridge.engine import EngineRefused, engine_class, shown
from mpbroadcast.bridge.keys import check_keys
from mpbroadcast.client.bridging import bridge_flushed, forget_bridge, key_of
from mpbroadcast.validation import check_bool, check_count, check_outbox, check_stream, check_timeout, check_topics

URL_VARIABLE: Final = "MPBROADCAST_BRIDGE_URL"
DEFAULT_CAPACITY: Final = 64 << 20  # bytes

Overflow = Literal["block", "drop_oldest", "drop_newest"]

_GRACE: Final = 15.0  # seconds beyond its timeout that the end of a bridge may take without a report
_LAST: Final = 2.0  # seconds for its processes to be gone then
_FORGET: Final = 1.0  # seconds until the broker has seen that
_FIRST_PAUSE: Final = 0.001  # seconds between two looks at how much was sent
_LONGEST_PAUSE: Final = 0.02
# The new interpreter finds the package where this one has found it, and imports nothing of the main module. The pipe's
# descriptor is its only argument.
_BEGIN: Final = (
    "import sys; from multiprocessing.connection import Connection; caller = Connection(int(sys.argv[1])); "
    "path = caller.recv(); sys.path[:] = path if isinstance(path, list) else sys.exit(); "  # else the caller was interrupted
    "from mpbroadcast.bridge.supervisor import main; main(caller)"
)

# A bridge lives until it is closed, also if the program keeps no reference to it.
_bridges: set[Bridge] = set()


def bridge(
    bus: Broadcaster[Any],
    url: str | None = None,
    *,
    topics: Iterable[str] = (),
    stream: str = "mpbroadcast",
    key: str | bytes | Sequence[str | bytes] | None = None,
    overflow: Overflow = "drop_oldest",
    capacity: int | None = None,
    max_bytes: int = 256 << 20,
    max_age: float = 3600.0,
    start_timeout: float | None = 10.0,
) -> Bridge:
    """Link ``bus`` with those of other machines, by a process beside the broker. Block until it is ready, or stands by.

    What is published on one bus to a topic that ``topics`` has (as in :meth:`Broadcaster.subscribe`; none: everything) reaches
    the subscribers of the others whose ``topics`` have it, too: exactly once, in the order of each bus, from the return of this
    call on. Where that cannot be, each channel that may be concerned raises one :class:`Lagged` at that position.

    ``url`` is the engine's: ``redis://``, ``rediss://``, ``unix://``, ``nats://`` or ``tls://``; if not given, that of the
    environment variable ``MPBROADCAST_BRIDGE_URL``. ``stream`` is the name that all buses have in common there: of letters,
    digits, ``-`` and ``_``. Entries are signed with ``key``, of at least 16 bytes; of several, the first one signs, and all are
    accepted; if not given, they are the lines of the environment variable ``MPBROADCAST_BRIDGE_KEY``.

    What waits for the engine waits in the broker, up to ``capacity`` bytes (64 MiB). Then ``overflow`` decides:
    ``"drop_oldest"`` and ``"drop_newest"`` drop, and the others' channels raise :class:`Lagged`; ``"block"`` blocks the
    publishers of these topics. The engine keeps about the last ``max_bytes`` bytes, at most twice that, and nothing older than
    ``max_age`` seconds.

    For one stream, a broker serves one bridge: further calls, in any process, return at once, and stand by. One of them takes
    over when the first bridge has gone. The bridge ends with :meth:`Bridge.close`, with the broker, and when this process dies.
    It is replaced when it is killed, or gives no sign of life for 30 seconds. Its log goes to standard error.

    :raises StartError: the engine did not answer within ``start_timeout`` seconds (0: the bridge goes on trying beside the
        caller; ``None``: no limit), refuses the password, or has something else under that name. Nothing is left behind.
    :raises ValueError, TypeError: an argument makes no sense; or the broker has a bridge of this stream with other ``topics``,
        ``overflow`` or ``capacity``.
    :raises ImportError: the client library for the engine is not installed; the text names the extra.
    :raises BrokerLost, VersionMismatch, ClosedError: as :meth:`Broadcaster.publish`.
    """
    if not isinstance(bus, Broadcaster):
        raise TypeError(f"bus must be a Broadcaster, not {type(bus).__name__}")
    url = _checked_url(url)
    if isinstance(topics, (str, bytes)) or not isinstance(topics, Iterable):
        raise TypeError(f"topics must be a list of topics and patterns, not {type(topics).__name__}")
    chosen = tuple(topics)
    check_topics(chosen)
    check_stream(stream)
    check_outbox(overflow)
    capacity = DEFAULT_CAPACITY if capacity is None else check_count(capacity, "capacity", 1)
    check_count(max_bytes, "max_bytes", 1)
    age = check_timeout(max_age, "max_age")
    if not age:
        raise ValueError(f"max_age must be a number of seconds above 0, not {max_age!r}")
    timeout = check_timeout(start_timeout, "start_timeout")
    keys = check_keys(key)
    engine_class(url)(url, stream, max_bytes, age)  # which checks the URL
    configuration = Configuration(
        caller=os.getpid(),
        bus=pickle.dumps(bus),
        bus_key=key_of(bus),
        url=url,
        topics=chosen,
        stream=stream,
        keys=keys,
        overflow=overflow,
        capacity=capacity,
        max_bytes=max_bytes,
        max_age=age,
        is_patient=timeout != 0,
    )
    return Bridge(bus, configuration, timeout)


def _checked_url(url: str | None) -> str:
    if url is None:
        url = os.environ.get(URL_VARIABLE)
        if not url:
            raise ValueError(f"a bridge needs the URL of its engine, such as redis://HOST/0: url=, or ${URL_VARIABLE}")
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {type(url).__name__}")
    return url


class Bridge:
    """A handle on a bridge, which :func:`bridge` makes. Used with ``with``, the bridge is closed at the end.

    In a process that was forked from the caller's, it is a handle as well, but closing it there does not close the bridge.
    """

    def __init__(self, bus: Broadcaster[Any], configuration: Configuration, timeout: float | None) -> None:
        self._bus = bus
        self._stream = configuration.stream
        self._shown = shown(configuration.url)
        self._caller = configuration.caller
        self._process: Connection | None = None
        ours, theirs = Pipe()
        try:
            with theirs:
                command = [get_executable(), "-P", "-c", _BEGIN, str(theirs.fileno())]
                between = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # so that no signal of the caller's terminal reaches it
                )
            ours.send(sys.path)
            ours.send(configuration)
            between.wait()
            self._await_start(ours, timeout)
        except BaseException as error:
            _end(ours, Stop(0.0, "new"))
            ours.close()
            if isinstance(error, OSError) and not isinstance(error, BroadcastError):
                raise StartError(f"the bridge's process could not be started: {error}") from error
            raise
        self._process = ours
        _bridges.add(self)

    def _await_start(self, process: Connection, timeout: float | None) -> None:
        limit = None if timeout is None else time.monotonic() + (timeout or 10.0)
        why = "its process was not ready in time"
        while process.poll(None if limit is None else max(0.0, limit - time.monotonic())):
            try:
                state, text = process.recv()
            except EOFError:
                raise StartError("the bridge's process ended at its start; see what it wrote to standard error") from None
            if state in ("ready", "standing by") or (state == "at work" and timeout == 0):
                return
            if state == "wrong":
                raise ValueError(text)
            if state == "lost":
                raise BrokerLost(text)
            if state == "mismatch":
                raise VersionMismatch(text)
            if state == "refused":
                raise StartError(f"the engine at {self._shown} refuses: {text}") from EngineRefused(text)
            if state == "trying":
                why = text
        raise StartError(f"the engine at {self._shown} was not reached within {timeout} s: {why}")

    @property
    def stream(self) -> str:
        """The stream's name."""
        return self._stream

    @property
    def alive(self) -> bool:
        """True until the bridge is closed, or has ended as its broker has; also while it stands by, or the engine is gone."""
        process = self._process
        if process is None:
            return False
        try:
            return not process.poll()  # it reports nothing until its end
        except OSError:
            return False

    def flush(self, timeout: float | None = None) -> None:
        """Block until all that was routed before, and published by this handle on the bus, is in the stream, or was dropped.

        ``timeout`` is in seconds; ``None`` waits for ever, also while the engine is gone.

        :raises TimedOut: (a ``TimeoutError``) it took longer.
        :raises ClosedError: the bridge is closed.
        :raises BrokerLost: as :meth:`Broadcaster.publish`.
        """
        limit = check_timeout(timeout)
        end = None if limit is None else time.monotonic() + limit
        if self._process is None:
            raise ClosedError(f"{self!r}: flush() of a closed bridge")
        positions = bridge_flushed(self._bus, self._stream, timeout=limit)
        last = positions[0] if positions else 0
        pause = _FIRST_PAUSE
        while positions is not None and positions[1] < last:
            if end is not None and time.monotonic() >= end:
                raise TimedOut(f"{limit} s were not enough for {last - positions[1]} message(s) to reach {self._shown}")
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)
            positions = bridge_flushed(self._bus, self._stream)
        if positions is None:
            raise ClosedError(f"{self!r} was closed by another process")

    def close(self, timeout: float | None = 5.0, *, forget: bool = True) -> None:
        """End the bridge, and forget its stream in the broker: row, outbox and position. It can be called again.

        What waits is sent first. This blocks until that is done, or nothing was acknowledged for ``timeout`` seconds (``None``:
        no limit); what is left then is dropped, and the log has its number. A bridge that stands by elsewhere takes over. With
        ``forget=False``, all stays in the broker, what is left included, for the next bridge of this stream.
        """
        limit = check_timeout(timeout)
        check_bool(forget, "forget")
        process, self._process = self._process, None
        _bridges.discard(self)
        if process is None:
            return
        with process:
            if os.getpid() != self._caller:
                return
            _end(process, Stop(limit, "all" if forget else "nothing"))
        if forget:
            self._forget()

    def _forget(self) -> None:
        """Drop what is left in the broker of a bridge that has died, or whose turn came while it ended."""
        end = time.monotonic() + _FORGET
        with contextlib.suppress(BroadcastError):
            while time.monotonic() < end:
                try:
                    forget_bridge(self._bus, self._stream)
                    return
                except ValueError:  # a bridge is at work: this one, of which the broker has not seen the end, or the next one
                    row = self._bus.stats().bridges.get(self._stream)
                    if row is not None and row.pid is not None and psutil.pid_exists(row.pid):
                        return
                    time.sleep(_LONGEST_PAUSE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._process is None else "alive" if self.alive else "ended"
        return f"<mpbroadcast.bridge.Bridge of {self._stream!r} over {self._shown}, {state}>"


def _end(process: Connection, stop: Stop) -> None:
    """End a bridge, and wait for it as long as it reports."""
    patience = None if stop.timeout is None else stop.timeout + _GRACE
    with contextlib.suppress(EOFError, OSError):
        process.send(stop)
        while process.poll(patience):
            state, _ = process.recv()
            if state == "ended":
                patience = _LAST  # a process that was forked at the wrong moment may hold the other end open
