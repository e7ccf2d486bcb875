"""Sessions of bridges in one process, and a log in memory between them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from multiprocessing.connection import Connection
from typing import Any

from mpbroadcast import Broadcaster, BrokerLost
from mpbroadcast.client.bridging import BridgeSession, BridgeState, Outgoing
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
    session = bus.bridge_session(STREAM, **options)
    try:
        yield session, await soon(session.turn())
    finally:
        await session.end(forget=forget)


async def taken(session: BridgeSession, until: int) -> list[Outgoing]:
    """Return what a session takes up to the position ``until``."""
    batches: list[Outgoing] = []
    while not batches or batches[-1].end <= until:
        batches.append(await soon(session.take()))
    return batches


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
        session = bus.bridge_session(STREAM, **options)
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
