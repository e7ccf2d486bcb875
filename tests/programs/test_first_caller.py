"""The first caller of ``connect_or_start`` is killed at random moments, alone or with its process group, while others call."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from mpbroadcast import connect_or_start
from tests.support.helpers import DEADLINE, Children, answer, finish, wait_until
from tests.support.victims import alive

SECONDS = float(os.environ.get("MPBROADCAST_SOAK", "1"))


@pytest.fixture
def address(leaves_nothing: None, tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "chosen"
    folder.mkdir(0o700)
    yield str(folder / "socket")
    wait_until(lambda: not [*folder.iterdir()], DEADLINE)


def first(address: str) -> None:
    os.setpgid(0, 0)
    connect_or_start(address, linger=0.3, start_timeout=2 * DEADLINE)
    signal.pause()


def other(address: str, pipe: Connection) -> None:
    with connect_or_start(address, linger=0.3, start_timeout=2 * DEADLINE) as bus:
        pipe.send(bus.stats().pid)
        answer(pipe, 3 * DEADLINE)


def wait_for_end(broker: int) -> None:
    wait_until(lambda: not alive(broker), DEADLINE)


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 60)
def test_others_get_the_same_broker_and_it_ends(address: str, fork: BaseContext, children: Children) -> None:
    """Each time, whatever the moment is: before anything has begun, on the way, or when all is there."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    moments = random.Random(seed)
    end = time.monotonic() + SECONDS
    is_first = True
    while is_first or time.monotonic() < end:
        is_first = False
        victim = children(fork, first, address)
        assert victim.pid
        time.sleep(moments.uniform(0, 0.5))
        pipes = [multiprocessing.Pipe() for _ in range(3)]
        processes = [children(fork, other, address, theirs) for _, theirs in pipes]
        time.sleep(moments.uniform(0, 0.1))
        (os.killpg if moments.random() < 0.5 and os.getpgid(victim.pid) == victim.pid else os.kill)(victim.pid, signal.SIGKILL)
        brokers = {answer(ours, 3 * DEADLINE) for ours, _ in pipes}
        (broker,) = brokers
        for ours, theirs in pipes:
            ours.send("end")
            ours.close()
            theirs.close()
        for process in processes:
            finish(process)
        wait_for_end(broker)
        assert not os.path.exists(address)
