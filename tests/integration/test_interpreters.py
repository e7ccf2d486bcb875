"""Handles in interpreters of their own, and in threads with an event loop each: an address and a key are all they need."""

import asyncio
import multiprocessing
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import Broadcaster, connect, start_broadcaster
from tests.support.helpers import DEADLINE, Background, take

KEY = b"of the test"

EXCHANGE = textwrap.dedent("""
    from mpbroadcast import connect
    with connect({address!r}, authkey={key!r}) as bus, bus.subscribe("to the other") as channel:
        bus.publish("ready", topic="from the other")
        for number in range(1000):
            assert channel.recv(20) == number
            bus.publish((number, bytes(20_000)), topic="from the other")
""")


def execute_isolated(code: str) -> None:
    """Execute this in a new, isolated interpreter."""
    if sys.version_info >= (3, 14):
        from concurrent import interpreters

        interpreters.create().exec(code)
        return
    import _interpreters  # type: ignore[import-not-found,unused-ignore]

    interpreter = _interpreters.create("isolated")
    try:
        assert not _interpreters.exec(interpreter, code)
    finally:
        _interpreters.destroy(interpreter)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="this Python has no isolated interpreters")
def test_a_handle_in_an_isolated_interpreter() -> None:
    """Connect, publish and subscribe there, where psutil cannot be imported; large messages, too."""
    # A process that Python 3.14 or 3.15 forks beside another interpreter is killed by SIGSEGV (cpython#139759).
    spawn = multiprocessing.get_context("spawn")
    with start_broadcaster(context=spawn, authkey=KEY) as bus, bus.subscribe("from the other") as channel:
        running = Background(execute_isolated, EXCHANGE.format(address=bus.address, key=KEY))
        assert channel.recv(DEADLINE) == "ready"
        bus.publish_many(range(1000), topic="to the other")
        assert [message[0] for message in take(channel, 1000)] == list(range(1000))
        running.result()


def test_threads_with_an_event_loop_each(bus: Broadcaster[Any]) -> None:
    """Publish in each loop, and receive what all of them have published, in the same order."""
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


MANY_THREADS = """
import contextlib, itertools, sys
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from mpbroadcast import start_broadcaster

SIZES = (20, 3_000, 20, 60_000, 400_000, 20, 2_500_000)

def publish(publisher):
    for index in range(70):
        bus.publish((publisher, index, bytes([index]) * SIZES[index % 7]), topic=str(publisher % 2))

def receive(thread):
    batches = (zip(channel), iter(channel.recv_many, None), zip(iter(channel.recv, None)))[thread % 3]
    numbers = []
    with contextlib.suppress(EOFError):
        for publisher, index, data in itertools.chain.from_iterable(batches):
            assert data == bytes([index]) * SIZES[index % 7]
            numbers.append((publisher, index))
    assert sorted(numbers, key=itemgetter(0)) == sorted(numbers)
    return numbers

with ThreadPoolExecutor(17) as threads, start_broadcaster() as bus:
    channel = bus.subscribe("0", "1")
    receiving = [threads.submit(receive, number) for number in range(9)]
    assert len([*threads.map(publish, range(8))]) == 8
    bus.flush()
    bus.unsubscribe(channel)
    received = [number for thread in receiving for number in thread.result()]
    assert sorted(received) == [(publisher, index) for publisher in range(8) for index in range(70)]
    print("in turn" if getattr(sys, "_is_gil_enabled", lambda: True)() else "parallel")
"""


@pytest.mark.parametrize("python", [sys.executable, *filter(shutil.which, ("python3.13t", "python3.14t", "python3.15t"))])
def test_many_threads_use_one_handle_and_one_channel(python: str, tmp_path: Path) -> None:
    """Give each message once and whole, those of a thread in its order."""
    program = tmp_path / "program.py"
    program.write_text(MANY_THREADS)
    if subprocess.run([python, "-c", "import psutil"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no psutil")
    done = subprocess.run([python, program], capture_output=True, text=True, check=False)
    parallel = python != sys.executable or bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "parallel\n" if parallel else "in turn\n", "")
