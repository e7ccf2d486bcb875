"""Handles in interpreters of their own, and in threads with an event loop each: an address and a key are all they need."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from mpbroadcast import Broadcaster, connect, start_broadcaster
from tests.support.helpers import DEADLINE, Background, take

KEY = b"of the test"
COUNT = 1000

EXCHANGE = textwrap.dedent("""
    from mpbroadcast import connect
    with connect({address!r}, authkey={key!r}) as bus, bus.subscribe("to the other") as channel:
        bus.publish("ready", topic="from the other")
        for number in range({count}):
            assert channel.recv({deadline}) == number
            bus.publish((number, bytes(20_000)), topic="from the other")
""")


def isolated() -> Callable[[str], object]:
    """A function that runs code in a new, isolated interpreter; what it returns is falsy when all went well."""
    if sys.version_info >= (3, 14):
        from concurrent import interpreters

        return interpreters.create().exec
    if sys.version_info >= (3, 13):
        import _interpreters  # type: ignore[import-not-found,unused-ignore]

        def run(code: str) -> object:
            interpreter = _interpreters.create("isolated")
            try:
                return _interpreters.exec(interpreter, code)
            finally:
                _interpreters.destroy(interpreter)

        return run
    pytest.skip("this Python has no isolated interpreters")


def test_a_handle_in_an_isolated_interpreter() -> None:
    """It connects, publishes and subscribes there, where psutil cannot be imported; large messages, too."""
    run = isolated()
    # A process that Python 3.14 or 3.15 forks beside another interpreter is killed by SIGSEGV (cpython#139759).
    spawn = multiprocessing.get_context("spawn")
    with start_broadcaster(context=spawn, authkey=KEY) as bus, bus.subscribe("from the other") as channel:
        code = EXCHANGE.format(address=bus.address, key=KEY, count=COUNT, deadline=DEADLINE)
        running = Background(run, code)
        assert channel.recv(DEADLINE) == "ready"
        bus.publish_many(range(COUNT), topic="to the other")
        assert [message[0] for message in take(channel, COUNT)] == list(range(COUNT))
        assert not running.result()


def test_threads_with_an_event_loop_each(bus: Broadcaster[Any]) -> None:
    """Each loop publishes, and gets all that all of them have published, in the same order."""
    loops = 4

    async def exchange(number: int) -> list[Any]:
        with connect(bus.address) as own, own.subscribe() as channel:
            await asyncio.to_thread(own.wait_for_subscribers, loops, timeout=DEADLINE)
            received = []
            for turn in range(100):
                own.publish((number, turn))
            async for message in channel:
                received.append(message)
                if len(received) == loops * 100:
                    break
            return received

    threads = [Background(asyncio.run, exchange(number)) for number in range(loops)]
    received = [thread.result() for thread in threads]
    assert sorted(received[0]) == [(number, turn) for number in range(loops) for turn in range(100)]
    assert all(one == received[0] for one in received)
