"""The bridge's process: it moves messages between the broker and the engine. It keeps nothing that matters.

Outbox, positions and the cursor are the broker's (``BridgeSession``), so this process can be killed at any moment: the next one
goes on from what the broker has. It has two engines, one that appends and one that reads, and opens each again when it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import pickle
import sys
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any, Final

from mpbroadcast import Broadcaster, BroadcastError, BrokerLost, TimedOut, VersionMismatch
from mpbroadcast.bridge.control import Configuration, Report, State, Stop
from mpbroadcast.bridge.forwarding import Forwarding
from mpbroadcast.bridge.timing import BackOff
from mpbroadcast.client.bridging import BridgeSession, bridge_session
from mpbroadcast.posix.standard_error import StandardError

log = logging.getLogger("mpbroadcast.bridge")

_TURN: Final = 0.2  # seconds for a turn that comes while the bridge is to end
_LEAVE: Final = 5.0  # seconds for the broker to end a session
_STANDING_BY: Final = 0.05  # seconds without a turn after which a bridge finds out whether another one is at work


def run(configuration: Configuration, supervisor: Connection) -> None:
    """Be the bridge's process until it is to end, or its broker has gone for good."""
    handler = StandardError() if sys.__stderr__ else logging.NullHandler()  # descriptor 2 may be anything
    handler.setFormatter(logging.Formatter("mpbroadcast bridge %(process)d: %(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    asyncio.run(_run(configuration, supervisor))


async def _run(configuration: Configuration, supervisor: Connection) -> None:
    await Process(configuration, supervisor).run()


async def cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """End tasks. One may swallow a cancellation, as ``asyncio.wait_for`` does up to Python 3.11: it is cancelled again."""
    left = {*tasks}
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=0.1)
        for task in done:
            if not task.cancelled():
                task.exception()  # which is known, or not worth a line in the log


class Process:
    """The process: its supervisor, and one session with the broker after the other."""

    def __init__(self, configuration: Configuration, supervisor: Connection) -> None:
        self._configuration = configuration
        self._supervisor = supervisor
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Serve brokers until the bridge is to end, or there is none any more."""
        asyncio.get_running_loop().add_reader(self._supervisor.fileno(), self._read_supervisor)
        multiprocessing.current_process().authkey = self._configuration.bus_key  # which a handle does not carry
        bus: Broadcaster[Any] = pickle.loads(self._configuration.bus)
        back_off = BackOff(0.05, 2.0)
        while not self._stop.done():
            try:
                session = self._session(bus)
                if session is None or not await self._serve(bus, session, back_off):
                    return
            except TimedOut as error:  # the broker is stopped
                self._report("trying", str(error))
            except BrokerLost:
                pass  # another one may have taken over
            except VersionMismatch as error:  # one has, and this process cannot use it
                self._end_with("mismatch", error)
                return
            await asyncio.sleep(back_off.pause())

    def _session(self, bus: Broadcaster[Any]) -> BridgeSession | None:
        chosen = self._configuration
        try:
            return bridge_session(bus, chosen.stream, topics=chosen.topics, overflow=chosen.overflow, capacity=chosen.capacity)
        except (TimedOut, VersionMismatch):
            raise
        except (ValueError, BroadcastError) as error:
            self._end_with("wrong" if isinstance(error, ValueError) else "lost", error)
            return None

    def _end_with(self, state: State, error: Exception) -> None:
        self._report(state, str(error))
        log.warning("the bridge of %r ends: %s", self._configuration.stream, error)

    def _read_supervisor(self) -> None:
        try:
            message: Stop | None = self._supervisor.recv()
        except (EOFError, OSError):
            os._exit(1)  # no process watches this one any more
        if message is None:
            self._supervisor.send(None)
        elif not self._stop.done():
            self._stop.set_result(message)

    def _report(self, state: State, value: str | int | None = None) -> None:
        report: Report = state, value
        with contextlib.suppress(OSError):
            self._supervisor.send(report)

    async def _serve(self, bus: Broadcaster[Any], session: BridgeSession, back_off: BackOff) -> bool:
        """Serve one broker. Return True if another one may have taken over."""
        closed, turn = asyncio.ensure_future(session.closed()), asyncio.ensure_future(session.turn())
        tasks: list[asyncio.Future[Any]] = [closed, turn]
        forwarding: Forwarding | None = None
        try:
            await self._await_turn(bus, {closed, turn, self._stop})
            if self._stop.done():  # a turn that comes just now is to be ended, too
                await asyncio.wait({closed, turn}, timeout=_TURN, return_when=asyncio.FIRST_COMPLETED)
            if turn.done():
                forwarding = Forwarding(self._configuration, bus, session, turn.result(), self._report)
                back_off.reset()
                self._report("at work")
                tasks += forwarding.start()
                await asyncio.wait({*tasks, self._stop} - {turn}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.done():
                tasks.append(asyncio.ensure_future(self._end(session, forwarding)))
                await asyncio.wait({closed, tasks[-1]}, return_when=asyncio.FIRST_COMPLETED)
                return False
            for task in tasks:
                if task.done():
                    task.result()
            return session.lost
        finally:
            await cancel([*tasks, *(forwarding.taking if forwarding else ())])
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_LEAVE):
                    await session.end(forget=False)  # without effect if it has ended

    async def _await_turn(self, bus: Broadcaster[Any], events: set[asyncio.Future[Any]]) -> None:
        """Wait for one of these, and report when another bridge is at work."""
        while not (await asyncio.wait(events, timeout=_STANDING_BY, return_when=asyncio.FIRST_COMPLETED))[0]:
            with contextlib.suppress(TimedOut):
                at_work = (await bus.astats()).bridges.get(self._configuration.stream)
                if at_work is not None and at_work.pid not in (None, os.getpid()):
                    self._report("standing by")
                    await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)

    async def _end(self, session: BridgeSession, forwarding: Forwarding | None) -> None:
        """Send what waits, and leave the session."""
        stop = self._stop.result()
        left = 0
        with contextlib.suppress(TimeoutError):  # a broker that is stopped does not end the session, either
            left = 0 if forwarding is None else await forwarding.drain(stop.timeout)
        forget = forwarding is not None and (stop.forget == "all" or (stop.forget == "new" and forwarding.was_new))
        async with asyncio.timeout(_LEAVE):
            await session.end(forget=forget)
        self._report("ended", left)
