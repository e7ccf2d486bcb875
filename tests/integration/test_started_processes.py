"""Channels among the arguments of processes: when no process can open one any more, its subscription ends."""

import gc
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mpbroadcast import Broadcaster, Channel
from tests.conftest import descriptors
from tests.support import workers
from tests.support.helpers import DEADLINE, Children, answer, finish, only_subscriber, take, wait_until

Bus = Broadcaster[Any]
Pipe = tuple[Connection, Connection]


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def method(request: pytest.FixtureRequest) -> BaseContext:
    return multiprocessing.get_context(request.param)


class KillsWhenUnpickled:
    """Kills the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _kill_me, ()


def _kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _end(channel: Channel[Any], how: str, orders: Connection) -> None:
    orders.send("started")
    answer(orders)
    if how == "exec":
        os.execv("/bin/sleep", ["sleep", "60"])
    if how == "exit":
        os._exit(0)


@pytest.mark.parametrize("how", ["return", "exit", "exec"])
def test_a_channel_ends_with_the_last_process_that_could_open_it(
    how: str, bus: Bus, children: Children, method: BaseContext, pipe: Pipe
) -> None:
    child = children(method, _end, bus.subscribe(), how, pipe[1])
    assert answer(pipe[0]) == "started"
    gc.collect()
    assert len(bus.stats().subscribers) == 1
    pipe[0].send("end")
    wait_until(lambda: not bus.stats().subscribers, DEADLINE)
    if how == "exec":
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)  # it still runs


@pytest.mark.parametrize("name", ["spawn", "forkserver"])
def test_a_child_that_is_killed_before_it_has_its_arguments(name: str, bus: Bus, children: Children) -> None:
    children(multiprocessing.get_context(name), print, KillsWhenUnpickled(), bus.subscribe())
    wait_until(lambda: not bus.stats().subscribers, DEADLINE)


def test_a_closed_channel_ends_too(bus: Bus, children: Children, method: BaseContext, pipe: Pipe) -> None:
    channel = bus.subscribe()
    children(method, _end, channel, "return", pipe[1])
    channel.close()
    assert answer(pipe[0]) == "started"
    assert len(bus.stats().subscribers) == 1
    pipe[0].send("end")
    wait_until(lambda: not bus.stats().subscribers, DEADLINE)


@pytest.mark.parametrize("name", ["spawn", "forkserver"])
def test_a_start_that_fails_keeps_no_channel(name: Any, bus: Bus) -> None:
    channel = bus.subscribe()
    process = multiprocessing.get_context(name).Process(target=print, args=(channel, workers.CannotBePickled()))
    with pytest.raises(workers.Boom):
        process.start()
    del channel, process
    gc.collect()
    wait_until(lambda: not bus.stats().subscribers, DEADLINE)


def _start_another(method: Any, channel: Channel[Any], orders: Connection) -> None:
    child = multiprocessing.get_context(method).Process(target=workers.receive_on_order, args=(channel, orders))
    child.start()
    os._exit(0)  # which does not join it


def test_a_grandchild_receives_when_its_parent_has_ended(bus: Bus, children: Children, method: BaseContext, pipe: Pipe) -> None:
    child = children(method, _start_another, method.get_start_method(), bus.subscribe(), pipe[1])
    gc.collect()
    assert answer(pipe[0]) == "started"
    wait_until(lambda: child.exitcode == 0, DEADLINE)  # a join would wait for the grandchild, too, under fork
    bus.publish("message")
    pipe[0].send("receive")
    wait_until(lambda: only_subscriber(bus).delivered == 1)
    bus.close()
    assert answer(pipe[0]) == ["message"]


def _put(channel: Channel[Any], orders: Connection) -> None:
    orders.send(channel)
    answer(orders)


def test_what_a_child_sends_on_stays_when_the_child_has_ended(
    bus: Bus, children: Children, method: BaseContext, pipe: Pipe
) -> None:
    """It was pickled for any process: it stays until it is opened or unsubscribed."""
    child = children(method, _put, bus.subscribe(), pipe[1])
    gc.collect()
    assert pipe[0].poll(DEADLINE)
    copy = pipe[0].recv()
    pipe[0].send("end")
    finish(child)
    bus.publish("message")
    assert len(bus.stats().subscribers) == 1
    assert take(copy, 1) == ["message"]
    copy.close()


_mine: list[Channel[Any]] = []


def _keep(channel: Channel[Any]) -> None:
    _mine.append(channel)


def _is_kept() -> int:
    return len(_mine)


def _receive_kept() -> Any:
    return _mine[0].recv(timeout=DEADLINE)


@pytest.mark.parametrize("receives", [True, False])
def test_a_pool_whose_workers_have_it(receives: bool, bus: Bus, method: BaseContext) -> None:
    with ProcessPoolExecutor(1, mp_context=method, initializer=_keep, initargs=(bus.subscribe(),)) as pool:
        assert pool.submit(_is_kept).result(DEADLINE) == 1
        assert len(bus.stats().subscribers) == 1
        if receives:
            bus.publish("message")
            assert pool.submit(_receive_kept).result(DEADLINE) == "message"
    del pool
    gc.collect()
    wait_until(lambda: not bus.stats().subscribers, DEADLINE)


def test_many_children_leave_no_descriptor(bus: Bus, children: Children, method: BaseContext) -> None:
    bus.stats()
    before = descriptors()
    count = 4 if method.get_start_method() == "spawn" else 30
    for _ in range(count):
        process = method.Process(target=id, args=(bus.subscribe(), bus.subscribe()))  # type: ignore[attr-defined]
        process.start()
        process.join(DEADLINE)
        process.close()
    wait_until(lambda: not bus.stats().subscribers, DEADLINE)
    del process
    wait_until(lambda: len(descriptors() - before) <= 2)
