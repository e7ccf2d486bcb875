"""Interrupts, forks and collections at any moment of any call."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from types import FrameType
from typing import Any, cast
from weakref import WeakValueDictionary

import psutil
import pytest

from mpbroadcast import (
    Broadcaster,
    BrokerRestarted,
    Channel,
    ClosedError,
    Lagged,
    TimedOut,
    channel_to_selector,
    start_broadcaster,
    trap_points,
)
from mpbroadcast.broker.host.launcher import BrokerProcess
from mpbroadcast.client import channel as channel_module
from mpbroadcast.client import receiving, shared_reader
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.pipe_writer import PipeWriter
from mpbroadcast.deadline import Deadline
from mpbroadcast.posix import locks
from mpbroadcast.posix.descriptors import OwnedDescriptor
from mpbroadcast.posix.pipes import PipeEnd, new_pipe
from mpbroadcast.posix.shared_memory import available
from mpbroadcast.protocol.frames import PIECE_HEAD, PIPE_BUF, abort
from mpbroadcast.protocol.pickling import Failure
from tests.conftest import FAILED, descriptors, leaked
from tests.support import workers
from tests.support.helpers import DEADLINE, Background, pattern, take, wait_until
from tests.support.interrupting import (
    SEED,
    SOAK,
    STORM,
    Interrupt,
    Interrupted,
    Moment,
    Storm,
    before_opcode,
    behind_call,
    each_moment,
    entering,
    interrupting,
)
from tests.support.large_workers import number_of
from tests.support.victims import Program

SHARED = pytest.mark.skipif(not available(), reason="there is no memory to share here")
Bus = Broadcaster[Any]
END = 1_000_000_000  # the number of a last message

pytestmark = [
    pytest.mark.timeout(60 + 3 * SOAK),
    # An interrupt in a finaliser, or between the making of a socket and its keeping, is Python's to report.
    pytest.mark.filterwarnings("ignore:.*unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def storm(request: pytest.FixtureRequest) -> Iterator[Storm]:
    """Yield what interrupts calls in this test."""
    print(f"MPBROADCAST_SEED={SEED}")
    raising = Storm()
    gc.disable()  # a collection in a call takes longer than the call
    hook, sys.unraisablehook = sys.unraisablehook, id  # one in Python would be interrupted itself; id() does nothing
    yield raising
    sys.unraisablehook = hook
    gc.enable()
    raising.end()
    request.node.add_marker(pytest.mark.interrupted(raising.raised))
    assert raising.raised or request.node.stash.get(FAILED, False)


# size, topic, messages between two looks at what has come
KINDS = {
    "small": (20, "", 200),
    "topic": (20, "t", 200),
    "ring": (10_000, "", 50),
    "ring topic": (10_000, "t", 50),
    "large ring": (600_000, "", 10),
    "memory": (3_000_000, "", 4),
}


def up_to_the_last(channel: Channel[Any]) -> list[int]:
    """Return the numbers of all messages up to the last one; each must be whole."""
    return list(iter(lambda: number_of(channel.recv(timeout=DEADLINE)), END))


@pytest.mark.parametrize(
    ("kind", "waits"),
    [*((kind, False) for kind in KINDS), *((kind, True) for kind in ("small", "ring", "large ring", "memory"))],
)
def test_an_interrupted_publish_is_whole_or_not_at_all(bus: Bus, storm: Storm, kind: str, waits: bool) -> None:
    """What returned comes once, what raised comes once or never, all are whole; no room is lost, also of a full backlog."""
    size, topic, pause = KINDS[kind]
    channel = bus.subscribe(capacity=2 * size + 10_000 if waits else None)
    got: list[int] = []
    returned: list[int] = []

    def publish(number: int, timeout: float | None) -> None:
        with contextlib.suppress(TimedOut):
            bus.publish((number, pattern(number, size)), topic=topic, timeout=timeout)
            returned.append(number)

    for number in storm.moments():
        storm(publish, number, 0.002 if waits else None, within=0.003 if waits else 0)
        if number < 5 or number % pause == pause - 1:  # the first ones make the pipe and the ring
            while channel.poll(0):
                got.append(number_of(channel.recv(timeout=DEADLINE)))
    receiving = Background(lambda: [number_of(message) for message in channel])
    for last in range(number + 1, number + 30):  # more than may be unrouted at a time
        publish(last, DEADLINE)
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    got += receiving.result()
    assert got == sorted(set(got)), "each once, and in order"
    assert set(range(number + 1, last + 1)) <= set(returned) <= set(got) <= set(range(last + 1))
    wait_until(lambda: bus.stats().memory == 0 or "ring" in kind)
    channel.close()


@pytest.mark.parametrize("size", [20, 10_000])
def test_an_interrupted_publish_many_has_how_many_were_sent(bus: Bus, storm: Storm, size: int) -> None:
    """Of a call that was interrupted, the first so many were published as its error has it, each whole and once."""
    channel = bus.subscribe()
    each = 300 if size < 1000 else 40
    has_sent = 0
    for turn in storm.moments():
        first = turn * each
        messages = [(number, pattern(number, size)) for number in range(first, first + each)]
        error = storm(bus.publish_many, messages)
        # Where the interrupt came before the call had begun, or behind its end, no code can note it.
        sent = each if error is None else getattr(error, "sent", None)
        has_sent += error is not None and sent is not None
        bus.flush(timeout=DEADLINE)
        bus.publish((END, b""), timeout=DEADLINE)
        got = up_to_the_last(channel)
        assert got == list(range(first, first + len(got))), "nothing is missing in between"
        assert sent is None or len(got) == sent
    assert has_sent
    channel.close()


@SHARED
def test_an_interrupt_behind_a_large_message_that_ran_out_of_time_costs_nothing(
    bus: Bus, own_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are interrupted while they are withdrawn, and wherever, the next one goes at once."""
    channel = bus.subscribe()
    channel.poll(0)
    handle, message = pickle.dumps(bus), bytes(10_000)
    fails = is_behind = False

    def reach(name: str, subject: object = None) -> None:
        nonlocal is_behind
        if name == "publishing memory" and fails:
            is_behind = True
            raise TimedOut("the pipe is full between the sending of the memory and that of its frame")

    def behind(count: int) -> Moment:
        call = behind_call(count)
        return call._replace(is_here=lambda frame, event: is_behind and call.is_here(frame, event))

    monkeypatch.setattr(trap_points, "reach", reach)
    for count in itertools.count():
        other: Bus = pickle.loads(handle)
        ran_out_of_time = False
        fails = True
        for _ in range(8):
            is_behind = False
            try:
                interrupting(behind(count), lambda other=other: other.publish(message, timeout=0.2))
            except TimedOut:
                ran_out_of_time = True
        fails = False
        other.publish(count, timeout=1.0)
        other.publish(message, timeout=1.0)
        while channel.recv(timeout=DEADLINE) != count:
            pass
        assert channel.recv(timeout=DEADLINE) == message
        if ran_out_of_time:
            break
    assert count > 10
    channel.close()


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        *(("small", call) for call in ("for", "messages", "next", "poll", "recv", "recv_many")),
        *(("topic", "recv"), ("ring", "poll"), ("ring", "recv"), ("ring", "recv_many"), ("memory", "recv")),
        ("memory", "recv_many"),
        *(("group", call) for call in ("for", "recv", "recv_many")),
    ],
)
def test_an_interrupted_receive_loses_nothing(bus: Bus, storm: Storm, kind: str, call: str) -> None:
    """Whatever is interrupted, each message comes once, in order and whole."""
    size, topic, pause = KINDS["small" if kind == "group" else kind]
    pause = min(pause, 80)
    channel = bus.subscribe(
        with_topic=bool(topic), group="g" if kind == "group" else None, prefetch=3 if kind == "group" else None
    )
    channel.poll(0)
    iterator = iter(channel.messages() if call == "messages" else channel)
    received: deque[Any] = deque()
    within = 30e-6 if size < 100_000 else 0.002
    for _ in storm.moments():
        bus.publish_many([(number, pattern(number, size)) for number in range(pause)], topic=topic)
        deadline = time.monotonic() + DEADLINE
        while len(received) < pause:
            assert time.monotonic() < deadline, f"{pause - len(received)} are lost"
            # What comes goes into the deque without an instruction between, where the test itself could lose it.
            if call == "recv":
                storm(received.extend, map(channel.recv, (DEADLINE / 2,)), within=within)
            elif call == "recv_many":
                storm(received.extend, chain.from_iterable(map(channel.recv_many, (None,))), within=2 * within)
            elif call in ("for", "messages"):
                storm(received.extend, islice(iterator, pause - len(received)), within=within)
            elif call == "next":
                storm(received.extend, map(next, (channel,)), within=within)
            else:
                storm(channel.poll, 0.01, within=within)
                received.append(channel.recv(timeout=DEADLINE))
        for number in range(pause):
            message: Any = received.popleft()
            assert (message[1] if topic else message) == (number, pattern(number, size))
    assert not channel.poll(0)
    channel.close()


class Waits:
    """Reaches a trap point when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return trap_points.reach, ("waiting for a reply",)


@pytest.mark.parametrize("meanwhile", ["decodes", "reconnects"])
def test_a_message_that_an_interrupt_puts_back_while_another_thread_waits_is_not_lost(
    meanwhile: str, leaves_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes next, before what the other thread decodes, or the report of what may be missing."""
    waits, put_back, others = threading.Event(), threading.Event(), list[Background]()

    def reach(name: str, subject: object = None) -> None:
        if name == "waiting for a reply" and threading.current_thread() is not threading.main_thread():
            waits.set()
            assert put_back.wait(DEADLINE)

    def is_taken(frame: FrameType, event: str) -> bool:
        if event != "line" or frame.f_locals.get("message") != "first":
            return False
        others.extend([] if others else [Background(channel.recv, DEADLINE)])
        return waits.wait(0.05)  # not while the lock is held

    with start_broadcaster(restart=True) as bus, bus.subscribe() as channel:
        bus.publish("first")
        assert channel.poll(DEADLINE)
        if meanwhile == "decodes":
            bus.publish(Waits())
            bus.flush(timeout=DEADLINE, delivered=True)
        else:
            os.kill(bus.stats().pid, signal.SIGKILL)
        monkeypatch.setattr(trap_points, "reach", reach)
        assert interrupting(Moment(is_taken), channel.recv, DEADLINE)
        put_back.set()
        assert others[0].result() == "first"
        with pytest.raises(BrokerRestarted) if meanwhile == "reconnects" else contextlib.nullcontext():
            assert channel.recv(DEADLINE) is None


def test_an_error_that_an_interrupt_delays_is_not_handed_out_as_a_message(bus: Bus) -> None:
    """Though an iteration in another thread has received what is behind it."""
    channel = bus.subscribe()
    bus.publish(workers.CannotBeUnpickled())
    assert channel.poll(DEADLINE)
    bus.publish_many(range(5))
    bus.flush(timeout=DEADLINE, delivered=True)
    iteration, others, received = iter(channel), list[Background](), list[int]()

    def is_taken(frame: FrameType, event: str) -> bool:
        if any(isinstance(value, Failure) for value in frame.f_locals.values()):
            others.extend([] if others else [Background(next, iteration)])
            others[0].join(0.05)  # not while the lock is held
        return bool(others) and not others[0].is_alive()

    with contextlib.suppress(workers.Boom):
        interrupting(Moment(is_taken), channel.recv, DEADLINE)
        with pytest.raises(workers.Boom):
            received.extend(islice(iteration, 5))
    received.insert(0, others[0].result())
    assert [*received, *islice(iteration, 5 - len(received))] == list(range(5))


@pytest.mark.parametrize("call", ["recv", "recv_many"])
def test_an_interrupted_receive_loses_no_error(bus: Bus, call: str) -> None:
    """The error at the position of a message is raised by the next call, if an interrupt came before it was raised."""
    for count in range(40):
        channel = bus.subscribe(overflow="drop_newest", capacity=1)
        bus.publish_many([workers.CannotBeUnpickled(), "dropped"])
        bus.flush(timeout=DEADLINE)
        for error in (workers.Boom, Lagged):
            behind = behind_call(count)

            def is_here(frame: FrameType, event: str, behind: Moment = behind) -> bool:
                # An error that leaves a function is reported as a return, too, and no signal is looked for there.
                in_channel = frame.f_code.co_filename in (channel_module.__file__, receiving.__file__)
                return not (event == "return" and in_channel) and behind.is_here(frame, event)

            try:
                interrupting(Moment(is_here, sys.setprofile), partial(getattr(channel, call), timeout=DEADLINE))
            except error:
                continue
            with pytest.raises(error):
                channel.recv(DEADLINE)
        channel.close()


def publish_first(bus: Bus, interrupted: Interrupted) -> None:
    """Attaching, and the making of the pipe, can be interrupted anywhere: the next call makes what is missing."""
    with bus.subscribe() as channel:
        other: Bus = pickle.loads(pickle.dumps(bus))
        came = interrupted(other.publish, 1)
        other.publish(2)
        received = [channel.recv(timeout=DEADLINE)]
        if received == [1]:
            received.append(channel.recv(timeout=DEADLINE))
        assert received in ([[1, 2], [2]] if came else [[1, 2]])


def select(bus: Bus, interrupted: Interrupted) -> None:
    """A message that the channel still has is received, without another one that wakes the selector."""
    with bus.subscribe() as channel, channel_to_selector(channel) as selector:
        for message in (1, 2):
            bus.publish(message)
            bus.flush(delivered=True)
            if message == 2:
                interrupted(selector.receive, DEADLINE)
            if message == 1 or channel.poll(0):
                assert selector.receive(timeout=1.0) == message


def subscribe(bus: Bus, interrupted: Interrupted) -> None:
    """There is a channel that works in the end, or no subscription."""
    made: list[Channel[Any]] = []
    interrupted(lambda: made.append(bus.subscribe("t")))
    for channel in made:
        bus.publish(1, topic="t")
        assert channel.recv(timeout=DEADLINE) == 1
        channel.close()


def open_channel(bus: Bus, interrupted: Interrupted) -> None:
    """However often the opening is interrupted, it can be repeated, and nothing is lost."""
    with bus.subscribe() as channel:
        bus.publish(1)
        for _ in range(3):
            interrupted(channel.poll, 0)
        assert channel.recv(timeout=DEADLINE) == 1


def change_topics(bus: Bus, interrupted: Interrupted) -> None:
    """The next call works, and then the topics are what they should be."""
    with bus.subscribe("always") as channel:
        for change in (channel.subscribe, channel.unsubscribe):
            interrupted(change, "t", "u")
            change("t", "u")
            bus.publish(change.__name__, topic="u")
        bus.publish("last", topic="always")
        assert take(channel, 2) == ["subscribe", "last"]
        assert bus.stats().subscribers[0].topics == ("always",)


def request(bus: Bus, interrupted: Interrupted) -> None:
    """No reply is taken for that of another request."""
    with bus.subscribe() as channel:
        for call in (bus.stats, bus.flush, lambda: bus.wait_for_subscribers(1)):
            interrupted(call)
            bus.publish(1)
            bus.flush(timeout=DEADLINE)
            assert channel.recv(timeout=DEADLINE) == 1
            assert len(bus.stats().subscribers) == 1


def close_channel(bus: Bus, interrupted: Interrupted) -> None:
    """After a second ``close`` there is no subscription any more, and the handle is closed."""
    for is_opened in (False, True):
        channel = bus.subscribe()
        bus.publish(bytes(3000))
        assert not is_opened or channel.poll(DEADLINE)
        interrupted(channel.close)
        channel.close()
        with pytest.raises(ClosedError):
            channel.recv(timeout=0)


def close_handle(bus: Bus, interrupted: Interrupted) -> None:
    """After a second ``close`` the handle is closed."""
    other: Bus = pickle.loads(pickle.dumps(bus))
    other.publish("hello")
    interrupted(other.close)
    other.close()
    for call in (other.flush, lambda: other.publish("late")):
        with pytest.raises(ClosedError):
            call()


CALLS = [publish_first, subscribe, open_channel, change_topics, request, close_channel, close_handle]


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupted_call_can_be_repeated(call: Callable[[Bus, Interrupted], None], bus: Bus, storm: Storm) -> None:
    """Whenever it is interrupted, it works the next time; nothing is left in the broker, and few descriptors here."""
    if call in (publish_first, subscribe, open_channel):
        storm.times = 1  # nothing is promised while they clean up after the first
    bus.publish("this makes the pipe")
    before = descriptors()
    for _ in storm.moments(2000):
        call(bus, storm)
    gc.collect()
    wait_until(lambda: not bus.stats().subscribers)
    # One whose pipe was leaked is there until this process ends; and a connection or two are kept for the next request.
    wait_until(lambda: bus.stats().publishers <= 1 + leaked(storm.raised))
    left = [target for _, target in sorted(descriptors() - before)]
    assert len(left) <= 4 + leaked(storm.raised), left


@pytest.mark.interrupted(100)
@pytest.mark.parametrize("call", [select, close_handle])
def test_a_call_can_be_repeated_wherever_it_was_interrupted(call: Callable[[Bus, Interrupted], None], bus: Bus) -> None:
    """At each moment in turn; the broker waits for no handle that was closed."""
    bus.publish("this makes the pipe")
    for interrupted in each_moment():
        call(bus, interrupted)
        wait_until(lambda: bus.stats().publishers == 1, 1.0)


@pytest.mark.parametrize(
    ("make", "hold"),
    [
        (locks.lock, lambda lock: lock),
        (locks.rlock, lambda lock: lock),
        (locks.rlock, lambda lock: locks.within(lock, Deadline(1.0))),
    ],
    ids=["lock", "rlock", "rlock within a second"],
)
def test_an_interrupt_leaves_no_lock_held(make: Callable[[], Any], hold: Callable[[Any], Any], storm: Storm) -> None:
    """Wherever a block under a lock is interrupted, its end releases the lock (a plain one stays held on Python 3.14)."""
    lock = make()

    def use() -> None:
        for _ in range(100):
            with hold(lock):
                os.getpid()

    for _ in storm.moments():
        storm(use, within=2e-5)
        with pytest.raises(RuntimeError):  # no thread holds it
            lock.release()


INTERRUPTED_FORK = """
import asyncio, os, signal, threading
from functools import partial

def lock():
    with fork_lock():
        pass

signal.signal(signal.SIGALRM, signal.default_int_handler)
# Two functions in C, which handle no signal: it arrives in the second, and is handled in the first hook of the package.
os.register_at_fork(after_in_parent=partial(signal.setitimer, signal.ITIMER_REAL, 1e-6))
os.register_at_fork(after_in_parent=partial(sum, range(1_000_000)))
from mpbroadcast.posix.descriptors import fork_lock

os.fork() or os._exit(0)
os.wait()
thread = threading.Thread(target=lock, daemon=True)
thread.start()
thread.join(5)
print("held" if thread.is_alive() else "free")
"""


def test_an_interrupt_behind_a_fork_leaves_no_lock_held() -> None:
    """What a signal's handler raises just behind ``os.fork`` comes up in a hook; other threads can use the library then."""
    with Program("-W", "ignore", "-c", INTERRUPTED_FORK) as program:
        code, out, errors = program.end()
    assert (code, out) == (0, "free\n"), errors
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("kind", [OwnedDescriptor, PipeEnd])
def test_a_descriptor_is_never_closed_twice(kind: type[OwnedDescriptor]) -> None:
    """Wherever its making, closing and collection are interrupted: it may stay open, but no other one is ever closed."""
    child = os.fork()  # for interrupts come where no signal can, too, and may leave a lock held
    if not child:
        count = -1
        with contextlib.suppress(BaseException):
            count = interrupts_without_closing_twice(kind)
        os._exit(0 if count > 20 else 1)
    assert os.waitpid(child, 0)[1] == 0


def interrupts_without_closing_twice(kind: type[OwnedDescriptor]) -> int:
    """Return how many moments there are, none of which makes a descriptor be closed twice."""
    close, closed = os.close, list[int]()

    def noted(fd: int) -> None:
        closed.append(fd)
        close(fd)

    os.close = noted
    for count in itertools.count():
        fd = os.open(os.devnull, os.O_RDONLY)
        closed.clear()
        interrupted = interrupting(before_opcode(count), lambda fd=fd: kind(fd).close())
        assert len(closed) == len(set(closed))
        if not interrupted:
            break
    return count


@pytest.mark.parametrize("function", [BrokerClient.request, PipeEnd.close])
def test_an_interrupted_close_of_the_broadcaster_can_be_repeated(function: Callable[..., Any]) -> None:
    """After a second ``close`` the broker process has ended."""
    with start_broadcaster() as bus:
        bus.publish(1)
        broker = psutil.Process(bus.stats().pid)
        interrupting(entering(function), bus.close)
        bus.close()
        assert not any(child.pid == broker.pid for child in multiprocessing.active_children())


def test_an_interrupted_subscribe_that_is_interrupted_again(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C, while the first is cleaned up after, leaves no subscription without a channel."""
    finalised = []

    def interrupted(channel: Channel[Any]) -> None:
        finalised.append(channel.id)
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "__del__", interrupted)
        interrupting(entering(WeakValueDictionary.__setitem__), bus.subscribe)  # behind the request
    assert finalised
    assert not bus.stats().subscribers


def test_an_interrupted_withdrawal_is_made_up_for() -> None:
    """A message that is given up at its timeout, and interrupted as it is withdrawn, is withdrawn with the next write."""
    reader, end = new_pipe(2 * PIPE_BUF)
    writer = PipeWriter(BrokerClient(""), cast(Any, None), PipeEnd(end), 1)
    assert interrupting(entering(PipeWriter.send_aborts), writer.send, bytes(10 * PIPE_BUF), Deadline(0), [])
    _, _, message_id, _ = PIECE_HEAD.unpack_from(os.read(reader, 2 * PIPE_BUF))
    writer.write(b"next", Deadline(0), [])
    assert os.read(reader, 2 * PIPE_BUF) == abort(message_id) + b"next"
    os.close(reader)


@pytest.mark.parametrize(
    "moment", ["waiting for the broker", BrokerClient.session, Broadcaster.__init__, BrokerProcess.end_at_exit]
)
def test_a_start_that_is_interrupted_leaves_nothing(moment: Callable[..., Any] | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no process and no file."""

    def reach(name: str, subject: object = None) -> None:
        if name == moment:
            raise Interrupt

    monkeypatch.setattr(trap_points, "reach", reach)
    if isinstance(moment, str):
        with pytest.raises(Interrupt):
            start_broadcaster()
    else:
        interrupting(entering(moment), start_broadcaster)
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_at_any_moment_leaves_both_sides_working(bus: Bus) -> None:
    """While a thread publishes and another receives, a third forks: each child publishes and subscribes anew."""
    print(f"MPBROADCAST_SEED={SEED}")
    rng = random.Random(SEED)
    channel, children = bus.subscribe("main"), bus.subscribe("child")
    ended = threading.Event()
    sizes = (20, 20, 10_000, 20, 300_000)

    def publish() -> int:
        number = 0
        while not ended.is_set():
            bus.publish((number, pattern(number, sizes[number % 5])), topic="main", timeout=DEADLINE)
            number += 1
        bus.publish((END, b""), topic="main")
        return number

    publishing, receiving = Background(publish), Background(up_to_the_last, channel)
    pids: list[int] = []
    codes: list[int] = []
    end = time.monotonic() + 2 * STORM
    while len(pids) < 5 or time.monotonic() < end:
        time.sleep(rng.random() * 0.002)
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                signal.alarm(int(DEADLINE))  # a child that hangs is found
                name = f"of child {len(pids)}"
                bus.publish(name, topic="child", timeout=DEADLINE)
                with bus.subscribe(name) as own:
                    bus.publish(pattern(1, 10_000), topic=name, timeout=DEADLINE)
                    assert own.recv(timeout=DEADLINE) == pattern(1, 10_000)
                bus.flush(timeout=DEADLINE)
                os._exit(0)
            os._exit(1)
        pids.append(pid)
        if len(pids) % 4 == 0:
            codes += [os.waitpid(one, 0)[1] for one in pids[-4:]]
    codes += [os.waitpid(pid, 0)[1] for pid in pids[len(codes) :]]
    ended.set()
    assert receiving.result() == list(range(publishing.result()))
    assert set(codes) == {0}
    assert sorted(take(children, len(pids))) == sorted(f"of child {number}" for number in range(len(pids)))
    channel.close()
    children.close()
    wait_until(lambda: not bus.stats().subscribers)


@pytest.mark.parametrize("what", [pytest.param("memory", marks=SHARED), "pipe"])
def test_a_fork_while_a_thread_closes_leaves_no_copy(
    what: str, bus: Bus, own_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child has nothing of the descriptor of a message's memory, or of the dead pipe that replaces a channel's own."""
    forking: list[Background] = []

    def fork() -> int:
        if (pid := os.fork()) == 0:
            os._exit(len({kind for _, kind in descriptors() - before if "memfd" in kind or "pipe" in kind}))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def closing(call: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        forking.append(Background(fork))
        forking[0].join(0.1)  # a fork that waits goes on behind this call
        call(*args, **keywords)

    channel = bus.subscribe()
    channel.poll(0)
    before = descriptors()
    of_each_fork = fork()  # its pipe, and what a library of event loops makes
    if what == "memory":
        monkeypatch.setattr(shared_reader, "close_fd", partial(closing, os.close))
        bus.publish(bytes(5000))
        assert len(channel.recv(DEADLINE)) == 5000
    else:
        monkeypatch.setattr(os, "dup2", partial(closing, os.dup2))
        channel.close()
    assert forking[0].result() == of_each_fork


def test_a_collection_at_any_moment_disturbs_no_call(bus: Bus) -> None:
    """Channels and handles in reference cycles go in the middle of any call; and a callback of the collector publishes."""
    channel, other_channel = bus.subscribe("main"), bus.subscribe("gc")
    handle = pickle.dumps(bus)
    called = may_call = 0  # so many a message: receiving one makes collections, and could go on for ever
    is_busy = False

    def callback(phase: str, info: dict[str, int]) -> None:
        nonlocal called, is_busy, may_call
        if phase == "stop" and may_call and not is_busy:
            is_busy = True
            may_call -= 1
            bus.publish((called, pattern(called, (20, 10_000)[called % 2])), topic="gc", timeout=DEADLINE)
            called += 1
            is_busy = False

    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1, 1, 1)
    gc.callbacks.append(callback)
    try:
        end = time.monotonic() + 2 * STORM
        number = 0
        while number < 30 or time.monotonic() < end:
            opened, unopened = bus.subscribe("other"), bus.subscribe("other")
            opened.poll(0)
            other: Bus = pickle.loads(handle)
            cycle: list[Any] = [opened, unopened, other]
            cycle.append(cycle)
            del opened, unopened, cycle
            message = (number, pattern(number, (20, 10_000, 300_000)[number % 3]))
            may_call = number % 7
            (bus, other)[number % 2].publish(message, topic="main", timeout=DEADLINE)
            other.flush(timeout=DEADLINE)
            del other
            assert channel.recv(timeout=DEADLINE) == message
            number += 1
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*before)
        gc.unfreeze()
    assert called > 10
    assert [number_of(message) for message in take(other_channel, called)] == list(range(called))
    gc.collect()
    wait_until(lambda: sorted(row.topics for row in bus.stats().subscribers) == [("gc",), ("main",)])
    wait_until(lambda: bus.stats().publishers == 1)
    channel.close()
    other_channel.close()
