"""A bridge at work: what one session of the broker sends goes into the log, and what others have sent there comes out of it.

There are two engines, each in a task of its own: one appends, one reads. One that fails is closed, and opened anew. What was on
its way then is appended again, as the engine need not have it; the receiving broker drops copies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from mpbroadcast import Broadcaster, BrokerLost, ClosedError, TimedOut, VersionMismatch
from mpbroadcast.bridge.control import Configuration, State
from mpbroadcast.bridge.engine import Engine, EngineRefused, engine_class, shown
from mpbroadcast.bridge.entries import Assembler, Entry, EntryRefused, OtherFormat, Signer
from mpbroadcast.bridge.timing import BackOff, RateLimit
from mpbroadcast.client.bridging import BridgeSession, BridgeState, Outgoing

log = logging.getLogger("mpbroadcast.bridge")

_OPEN: Final = 10.0  # seconds for an engine to open
_ANSWER: Final = 30.0  # seconds for it to answer anything else; those that are built in have shorter ones of their own
_CLOSE: Final = 2.0
_TICK: Final = 1.0  # seconds between two looks at the log: trimming it, and how much of it was not read yet
_KEEP: Final = 0.1  # seconds between two positions that the broker is given where nothing is routed
_ANNOUNCE: Final = 60.0  # seconds between two announcements, at the most
_WARN: Final = 10.0  # seconds between two lines in the log, at the least
_LEAST: Final = 1.0  # seconds for a reply of the broker, whatever the timeout
_PAUSE: Final = 0.01  # seconds between two looks at what is left, or at the statistics


class Reporting(Protocol):
    """Reports a state to the caller of ``bridge()``, with an error's text or the number of messages that wait."""

    def __call__(self, state: State, value: str | int | None = None) -> None: ...


class Forwarding:
    """One session at work, whose turn has come with ``state``."""

    def __init__(
        self,
        configuration: Configuration,
        bus: Broadcaster[Any],
        session: BridgeSession,
        state: BridgeState,
        report: Reporting,
    ) -> None:
        self._configuration = configuration
        self._url = shown(configuration.url)
        self._bus = bus
        self._session = session
        self._state = state
        self._report = report
        self._make_engine = engine_class(configuration.url)
        self._signer = Signer(configuration.keys, configuration.stream)
        self._next = state.acknowledged + 1  # the position of the first message that is not in the log, and was not dropped
        self._taken: Outgoing | None = None  # what was taken from the broker, and is not all in the log yet
        self._taking: asyncio.Task[Outgoing] | None = None
        self._cursor = state.cursor  # the broker's
        self._announcing: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done: an announcement is due
        self._met: set[bytes] = set()  # origins of which entries were read
        self._has_cursor: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if state.cursor is not None:
            self._has_cursor.set_result(None)
        self._up: set[str] = set()
        self._is_ready = False
        self._error: str | None = None
        self._refused = 0
        self._lag: int | None = None
        self._warns = RateLimit(_WARN)

    def start(self) -> list[asyncio.Task[None]]:
        """Start the tasks, which only end when the session does."""
        return [
            asyncio.ensure_future(task) for task in (self._keep_open("out", self._send), self._keep_open("in", self._receive))
        ]

    @property
    def taking(self) -> list[asyncio.Task[Any]]:
        """The task that waits for what the broker sends, if there is one."""
        return [] if self._taking is None else [self._taking]

    @property
    def was_new(self) -> bool:
        """True if the stream had no position in the log when this session came."""
        return self._state.cursor is None

    async def drain(self, timeout: float | None) -> int:
        """Wait until all that the session has so far is in the log. Return how much was left when ``timeout`` seconds had
        passed without progress."""
        async with asyncio.timeout(None if timeout is None else max(timeout, _LEAST)):
            target = await self._session.target()
        done, reported = self._next, 0.0
        progress = time.monotonic()
        while (left := target + 1 - self._next) > 0:
            now = time.monotonic()
            if self._next != done:
                done, progress = self._next, now
            if timeout is not None and now - progress >= timeout:
                log.warning("%d message(s) of the stream %r were not sent to %s", left, self._configuration.stream, self._url)
                return left
            if now - reported > _TICK:
                reported = now
                self._report("draining", left)
            await asyncio.sleep(_PAUSE)
        return 0

    # Engines

    async def _keep_open(self, name: str, use: Callable[[Engine], Awaitable[None]]) -> None:
        """Open an engine and use it, again whenever it fails."""
        back_off = BackOff(0.05, 2.0)
        chosen = self._configuration
        while True:
            engine: Engine | None = None
            try:
                engine = self._make_engine(chosen.url, chosen.stream, chosen.max_bytes, chosen.max_age)
                async with asyncio.timeout(_OPEN):
                    await engine.open()
                await use(engine)
            except EngineRefused as error:
                self._failed("refused", str(error))
            except (BrokerLost, ClosedError, VersionMismatch):
                # A broker that ends takes no more, and still has its messages appended; the session shows its end itself.
                await asyncio.get_running_loop().create_future()
            except Exception as error:
                self._failed("trying", f"{type(error).__name__}: {error}".removesuffix(": "))
            finally:
                was_up = name in self._up
                self._up.discard(name)
                if engine is not None:
                    with contextlib.suppress(Exception):
                        async with asyncio.timeout(_CLOSE):
                            await engine.close()
            if was_up:
                back_off.reset()
            self._show()
            await asyncio.sleep(back_off.pause())

    def _failed(self, state: State, why: str) -> None:
        self._error = why
        if not self._is_ready:
            self._report(state, why)
        is_final = state == "refused" and not self._is_ready and self._configuration.is_patient  # the caller raises it
        if not is_final and self._warns.passes("engine", time.monotonic()):
            log.warning("%s: %s; trying again", self._url, why)

    async def _note_up(self, name: str) -> None:
        self._up.add(name)
        if self._is_up:
            self._error = None
        self._show()
        if self._is_up and not self._is_ready:
            self._is_ready = True
            while self._is_up and await self._shown_state() == "connecting":  # so that the caller finds it up
                await asyncio.sleep(_PAUSE)
            self._report("ready")

    async def _shown_state(self) -> str | None:
        """Return the state that the statistics show; ``None`` if the broker does not reply."""
        with contextlib.suppress(TimedOut):
            row = (await self._bus.astats()).bridges.get(self._configuration.stream)
            return None if row is None else row.state
        return None

    @property
    def _is_up(self) -> bool:
        return len(self._up) == 2

    def _show(self) -> None:
        state = "up" if self._is_up else "connecting"
        self._session.report(url=self._url, state=state, error=self._error, refused=self._refused, lag=self._lag)

    # Out

    async def _send(self, engine: Engine) -> None:
        position = await self._announce(engine, self._next)
        if not self._has_cursor.done():
            # This bridge reads from here on, and so the bus has all that others send from now on.
            await self._set_cursor(position)
            self._has_cursor.set_result(None)
        await self._note_up("out")
        every = min(_ANNOUNCE, self._configuration.max_age / 4)
        sent = looked = time.monotonic()
        while True:
            if self._taken is None:
                await self._take(engine.max_entry // 2)  # so that it is one entry, with what is around each message
            now = time.monotonic()
            if now - looked >= _TICK:
                looked = now
                async with asyncio.timeout(_ANSWER):
                    await engine.trim()
                    self._lag = await engine.lag(self._cursor or "")
                self._show()
            if self._taken is not None:
                await self._append(engine, self._taken)
                self._taken = None
                sent = now
            elif self._announcing.done() or now - sent >= every:
                if self._announcing.done():
                    self._announcing = asyncio.get_running_loop().create_future()
                await self._announce(engine, self._next)
                sent = now

    async def _take(self, most: int) -> None:
        """Wait for what comes from the broker, but not beyond the next tick."""
        if self._taking is None:
            self._taking = asyncio.ensure_future(self._session.take(most))
        await asyncio.wait((self._taking, self._announcing), timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
        if self._taking.done():
            try:
                self._taken, self._taking = self._taking.result(), None
            except EOFError:  # the broker ends, and has all acknowledgements: so does this session, now
                await asyncio.get_running_loop().create_future()
            except OSError:  # no descriptor or no memory is left for a large message: it is tried again
                self._taking = None
                raise

    async def _append(self, engine: Engine, taken: Outgoing) -> None:
        """Append what was taken, one entry after the other; behind an error, again what is not in the log by then."""
        first = max(taken.first, self._next)
        messages = taken.messages[first - taken.first :]
        origin, incarnation = self._state.origin, self._state.incarnation
        for entry, last in self._signer.pack(origin, incarnation, first, messages, engine.max_entry):
            async with asyncio.timeout(_ANSWER):
                await engine.append(entry)
            self._acknowledge(last)
        if self._next < taken.end:  # what is in between was dropped
            await self._announce(engine, taken.end)
            self._acknowledge(taken.end - 1)

    def _acknowledge(self, position: int) -> None:
        if position >= self._next:
            self._next = position + 1
            self._session.acknowledge(position)

    async def _announce(self, engine: Engine, first: int) -> str:
        """Append an entry without messages, so that others know of this origin, and of what was lost. Return its position."""
        async with asyncio.timeout(_ANSWER):
            return await engine.append(self._signer.hello(self._state.origin, self._state.incarnation, first))

    # In

    async def _receive(self, engine: Engine) -> None:
        await self._has_cursor
        assembler = Assembler(self._state.origin, self._cursor or "")
        async with asyncio.timeout(_ANSWER):
            is_there = await engine.seek(assembler.cursor)
        if not is_there:
            await self._session.note_gap()
            self._let_announce()  # an entry that is there, behind which this bridge reads from then on
        await self._note_up("in")
        looked = kept = time.monotonic()
        while True:
            async with asyncio.timeout(_ANSWER):
                entries = await engine.read(_TICK)
            now, is_routed = time.monotonic(), False
            for position, data in entries:
                entry = assembler.put(position, self._opened(data), now)
                if entry is not None:
                    is_routed = True
                    if entry.origin not in self._met:  # it learns of this one, so that it notices what it misses from now on
                        self._met.add(entry.origin)
                        self._let_announce()
                    await self._session.route(entry.origin, entry.incarnation, entry.first, entry.messages)
            if is_routed or now - kept >= _KEEP:  # entries of this bus may be read, and skipped, once more
                kept = now
                await self._set_cursor(assembler.cursor)
            if now - looked >= _TICK:
                looked = now
                async with asyncio.timeout(_ANSWER):
                    await engine.trim()

    def _let_announce(self) -> None:
        if not self._announcing.done():
            self._announcing.set_result(None)

    def _opened(self, data: bytes) -> Entry | None:
        try:
            return self._signer.open(data)
        except EntryRefused as error:
            self._refused += 1
            kind = "another format" if isinstance(error, OtherFormat) else "refused"
            if self._warns.passes(kind, time.monotonic()):
                stream = self._configuration.stream
                log.warning("%s: an entry of %r was refused, %d so far: %s", self._url, stream, self._refused, error)
            return None

    async def _set_cursor(self, position: str) -> None:
        if position != self._cursor:
            await self._session.set_cursor(position)
            self._cursor = position
