"""Sessions of bridges in one process, and a log in memory between them."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable
from multiprocessing.connection import Connection
from typing import Any

from mpbroadcast import Broadcaster, BroadcastError, BrokerLost
from mpbroadcast.client.bridging import BridgeSession, BridgeState, bridge_session
from mpbroadcast.client.broker_client import BrokerClient
from tests.support.helpers import DEADLINE

Bus = Broadcaster[Any]
STREAM = "stream"


async def soon(call: Awaitable[Any]) -> Any:
    """Return what a call of a session returns, within the deadline of tests."""
    async with asyncio.timeout(DEADLINE):
        return await call


@contextlib.asynccontextmanager
async def at_work(bus: Bus, *, forget: bool = True, **options: Any) -> AsyncIterator[tuple[BridgeSession, BridgeState]]:
    """Have a session at work for a block."""
    session = bridge_session(bus, STREAM, **options)
    try:
        yield session, await soon(session.turn())
    finally:
        await session.end(forget=forget)


async def copied(source: BridgeSession, state: BridgeState, target: BridgeSession, until: int) -> None:
    """Hand on to one bus what another one has, up to the position ``until``, and acknowledge it."""
    end = 0
    while end <= until:
        first, messages, end = await soon(source.take())
        await soon(target.route(state.origin, state.incarnation, first, messages))
        source.acknowledge(end - 1)


def hold(bus: Bus, pipe: Connection, size: int, options: dict[str, Any]) -> None:
    """Be a session in a process of its own: take what makes ``size`` bytes, acknowledge nothing, and wait to be killed."""

    async def run() -> None:
        session = bridge_session(bus, STREAM, **options)
        state = await session.turn()
        pipe.send(("turn", *state))
        held = 0
        while held < size:
            batch = await session.take()
            held += sum(len(payload) for _, payload in batch.messages)
            pipe.send(("took", batch.first, len(batch.messages), batch.end))
        await asyncio.sleep(3600)

    with contextlib.suppress(BrokerLost):
        asyncio.run(run())


def acknowledge_all(bus: Bus, pipe: Connection) -> None:
    """Be a session in a process of its own up to the end of the broker, and acknowledge all behind that. Send home how many
    messages it took, whether the broker had ended before it acknowledged them, and ``lost``."""

    async def run() -> None:
        session, count = bridge_session(bus, STREAM), 0
        await session.turn()
        pipe.send("turn")
        with contextlib.suppress(EOFError):
            while True:
                count += len((await session.take()).messages)
        closed = asyncio.ensure_future(session.closed())
        await asyncio.wait([closed], timeout=0.05)
        is_early = closed.done()
        session.acknowledge(count)
        await closed
        pipe.send((count, is_early, session.lost))

    asyncio.run(run())


def use_session(session: BridgeSession, pipe: Connection) -> None:
    """Call a session of another process; send home the names of the errors."""

    async def run() -> list[str]:
        found = []
        for call in (session.take, session.target, session.note_gap):
            try:
                await call()
            except BroadcastError as error:
                found.append(type(error).__name__)
        return found

    pipe.send(asyncio.run(run()))


class RudeSession:
    """The session at work, whose publisher writes what it likes."""

    def __init__(self, link: BrokerClient, stream: str) -> None:
        options: dict[str, Any] = {"topics": [], "overflow": "drop_oldest", "capacity": 64 << 20}
        self._reply = link.request("bridge", stream=stream, turn=True, shared=False, **options)
        self._publisher = link.request("publisher", reader=self._reply.body["reader"])
        self._link = link

    def write(self, data: bytes) -> None:
        assert self._publisher.pipe is not None
        os.write(self._publisher.pipe.fd, data)

    def close(self) -> None:
        for end in (self._reply.pipe, self._reply.reports, self._publisher.pipe):
            if end is not None:
                end.close()
        self._link.close()
