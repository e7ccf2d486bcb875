"""Interrupts, forks and collections at any moment of any call."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil
import pytest

from mpbroadcast import Broadcaster, Channel, ClosedError, TimedOut, channel_to_selector, start_broadcaster, trap_points
from mpbroadcast.broker.host.launcher import BrokerProcess
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.deadline import Deadline
from mpbroadcast.posix import locks
from mpbroadcast.posix.descriptors import OwnedDescriptor
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.posix.shared_memory import available
from tests.conftest import descriptors, leaked
from tests.support.helpers import DEADLINE, Background, pattern, wait_until
from tests.support.interrupting import (
    SEED,
    SOAK,
    STORM,
    Interrupt,
    Interrupting,
    Storm,
    before_opcode,
    behind_call,
    duration,
    entering,
    interrupting,
    storming,
)
from tests.support.victims import ROOT

Bus = Broadcaster[Any]

pytestmark = [
    pytest.mark.timeout(60 + 3 * SOAK),
    # An interrupt in a finaliser, or between the making of a socket and its keeping, is Python's to tell of.
    pytest.mark.filterwarnings("ignore:.*unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def storm(request: pytest.FixtureRequest) -> Iterator[Storm]:
    """What interrupts calls in this test."""
    with storming(2, request.node) as raising:
        yield raising


@pytest.fixture
def once(request: pytest.FixtureRequest) -> Iterator[Storm]:
    """The same, with one interrupt a call: where nothing is promised while it cleans up after the first."""
    with storming(1, request.node) as raising:
        yield raising


# ------------------------------------------------------------------------------------------------------------ publishing

# size, topic, messages between two looks at what has come
KINDS = {
    "small": (20, "", 200),
    "topic": (20, "t", 200),
    "ring": (10_000, "", 50),
    "ring topic": (10_000, "t", 50),
    "memory": (3_000_000, "", 4),
}


def taken_in(channel: Channel[Any], bus: Bus, got: list[int]) -> None:
    """Take in what has been published, up to a last message; each must be whole."""
    bus.flush(timeout=DEADLINE)
    bus.publish((-1, b""), timeout=DEADLINE)
    while True:
        number, data = channel.recv(timeout=DEADLINE)
        if number == -1:
            return
        assert data == pattern(number, len(data))
        got.append(number)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_publish_is_whole_or_not_at_all(bus: Bus, storm: Storm, kind: str) -> None:
    """What returned comes once, what raised comes once or never, all are whole, and the next call works."""
    size, topic, pause = KINDS[kind]
    channel = bus.subscribe()
    # From here on the handle has its pipe, and its ring.
    longest = duration(lambda: bus.publish((0, pattern(0, size)), topic=topic))
    for _ in range(3):
        taken_in(channel, bus, [])
        bus.publish((0, pattern(0, size)), topic=topic)
    taken_in(channel, bus, [])
    got: list[int] = []
    returned: list[int] = []
    for number in storm.moments():
        message = (number, pattern(number, size))
        if not storm.interrupts(longest, bus.publish, message, topic=topic):
            returned.append(number)
        if number % pause == pause - 1:
            taken_in(channel, bus, got)
    taken_in(channel, bus, got)
    assert got == sorted(set(got)), "each once, and in order"
    assert set(returned) <= set(got) <= set(range(number + 1))
    wait_until(lambda: bus.stats().memory == 0 or kind.startswith("ring"))
    channel.close()


@pytest.mark.parametrize("size", [20, 10_000])
def test_an_interrupted_publish_many_says_how_many_were_sent(bus: Bus, storm: Storm, size: int) -> None:
    """Of a call that was interrupted, the first so many were published as its error says, each whole and once."""
    channel = bus.subscribe()
    each = 300 if size < 1000 else 40
    longest = duration(bus.publish_many, [(0, pattern(0, size)) for _ in range(each)])
    taken_in(channel, bus, [])
    got: list[int] = []
    batches: dict[int, int | None] = {}
    said = 0
    for turn in storm.moments():
        first = turn * each
        messages = [(number, pattern(number, size)) for number in range(first, first + each)]
        error = storm.interrupts(longest, bus.publish_many, messages)
        batches[turn] = each if error is None else getattr(error, "sent", None)
        said += error is not None and batches[turn] is not None
        if turn % 5 == 4:
            taken_in(channel, bus, got)
    taken_in(channel, bus, got)
    assert said
    assert got == sorted(set(got))
    for turn, sent in batches.items():
        own = [number - turn * each for number in got if number // each == turn]
        assert own == list(range(len(own))), "nothing is missing in between"
        # Where the interrupt came before the call had begun, or behind its end, nobody could say it.
        assert sent is None or len(own) == sent
    channel.close()


def test_an_interrupted_first_publish_leaves_a_handle_that_works(bus: Bus, once: Storm) -> None:
    """Attaching, and the making of the pipe, can be interrupted anywhere: the next call makes what is missing."""
    channel = bus.subscribe()
    handle = pickle.dumps(bus)
    longest = duration(lambda: pickle.loads(handle).publish((0, b"")))
    taken_in(channel, bus, [])
    got: list[int] = []
    returned: list[int] = []
    for number in once.moments():
        other: Bus = pickle.loads(handle)
        if not once.interrupts(longest, other.publish, (2 * number, b"")):
            returned.append(2 * number)
        other.publish((2 * number + 1, b""))
        returned.append(2 * number + 1)
        other.flush(timeout=DEADLINE)
    taken_in(channel, bus, got)
    assert got == sorted(set(got))
    assert set(returned) <= set(got)
    del other
    gc.collect()
    # One whose pipe was leaked is there until this process goes.
    wait_until(lambda: bus.stats().publishers <= 1 + leaked(once.raised))
    channel.close()


@pytest.mark.parametrize("size", [20, 10_000, 600_000, 3_000_000])
def test_interrupts_while_publish_waits(bus: Bus, storm: Storm, size: int) -> None:
    """A call that waits for a full backlog, or has run out of time, can be interrupted; no room is lost by that."""
    channel = bus.subscribe(capacity=2 * size + 10_000)
    channel.poll(0)
    got: list[int] = []
    returned: list[int] = []

    def publish(number: int) -> None:
        with contextlib.suppress(TimedOut):
            bus.publish((number, pattern(number, size)), timeout=0.002)
            returned.append(number)

    for number in storm.moments():
        storm.interrupts(0.003, publish, number)
        if number % 10 == 9:
            while channel.poll(0):
                message, data = channel.recv(timeout=DEADLINE)
                assert data == pattern(message, size)
                got.append(message)
    reading = Background(lambda: [got.append(number) for number, data in channel if data == pattern(number, size)])  # type: ignore[func-returns-value]
    for last in range(number + 1, number + 30):  # more than may be unrouted at a time
        bus.publish((last, pattern(last, size)), timeout=DEADLINE)
        returned.append(last)
    bus.flush(timeout=DEADLINE)
    bus.unsubscribe(channel)
    reading.result()
    assert got == sorted(set(got))
    assert set(returned) <= set(got) <= set(range(last + 1))
    channel.close()


@pytest.mark.skipif(not available(), reason="there is no memory to share here")
def test_an_interrupt_behind_a_large_message_that_ran_out_of_time_costs_nothing(
    bus: Bus, own_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are interrupted while they are withdrawn, and wherever, the next one goes at once."""
    channel = bus.subscribe()
    channel.poll(0)
    handle, message = pickle.dumps(bus), bytes(10_000)
    behind: Interrupting | None = None

    def reach(name: str, subject: object = None) -> None:
        if name == "publishing memory" and behind is not None:
            behind.begin()
            raise TimedOut("the pipe is full between the sending of the memory and that of its frame")

    monkeypatch.setattr(trap_points, "reach", reach)
    outcomes = {"interrupted"}
    for count in itertools.count():
        if "out of time" in outcomes:
            break
        other: Bus = pickle.loads(handle)
        outcomes.clear()
        for _ in range(8):
            behind = Interrupting(behind_call(count), sys.setprofile)
            try:
                if behind(partial(other.publish, message, timeout=0.2), begin=False):
                    outcomes.add("interrupted")
            except TimedOut:
                outcomes.add("out of time")
        behind = None
        other.publish(count, timeout=1.0)
        other.publish(message, timeout=1.0)
        while channel.recv(timeout=DEADLINE) != count:
            pass
        assert channel.recv(timeout=DEADLINE) == message
    assert count > 10
    channel.close()


# ------------------------------------------------------------------------------------------------------------- receiving


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        *(("small", call) for call in ("next", "poll", "recv", "recv_many")),
        *(("topic", "recv"), ("ring", "poll"), ("ring", "recv"), ("ring", "recv_many"), ("memory", "recv")),
        ("memory", "recv_many"),
    ],
)
def test_an_interrupted_receive_loses_nothing(bus: Bus, storm: Storm, kind: str, call: str) -> None:
    """Whatever is interrupted, each message comes once, in order and whole."""
    size, topic, pause = KINDS[kind]
    pause = min(pause, 80)
    channel = bus.subscribe(with_topic=bool(topic))
    channel.poll(0)
    received: deque[Any] = deque()
    longest = 30e-6 if size < 100_000 else 0.002
    for _ in storm.moments():
        bus.publish_many([(number, pattern(number, size)) for number in range(pause)], topic=topic)
        deadline = time.monotonic() + DEADLINE
        while len(received) < pause:
            assert time.monotonic() < deadline, f"{pause - len(received)} are lost"
            # What comes goes into the deque without an instruction between, where the test itself could lose it.
            if call == "recv":
                storm.interrupts(longest, received.extend, map(channel.recv, (DEADLINE / 2,)))
            elif call == "recv_many":
                storm.interrupts(2 * longest, received.extend, chain.from_iterable(map(channel.recv_many, (None,))))
            elif call == "next":
                storm.interrupts(longest, received.extend, map(next, (channel,)))
            else:
                storm.interrupts(longest, channel.poll, 0.01)
                received.append(channel.recv(timeout=DEADLINE))
        for number in range(pause):
            message: Any = received.popleft()
            assert (message[1] if topic else message) == (number, pattern(number, size))
    assert not channel.poll(0)
    channel.close()


def test_an_interrupted_selector_overlooks_no_message(bus: Bus) -> None:
    """Wherever it is interrupted: a message that the channel still has is received, without another one that wakes it."""
    channel = bus.subscribe()
    selector = channel_to_selector(channel)
    bus.publish(-1)
    assert selector.receive(timeout=DEADLINE) == -1
    for count in itertools.count():
        bus.publish(count)
        bus.flush(delivered=True)
        if not Interrupting(behind_call(count), sys.setprofile)(selector.receive, DEADLINE):
            break
        if channel.poll(0):
            assert selector.receive(timeout=1.0) == count
    assert count > 10


# ----------------------------------------------------------------------------------------- subscribing, asking, and closing


def nothing_grows(before: set[tuple[int, str]], bus: Bus, storm: Storm) -> None:
    """The connection of a request or two is kept for the next one; beside that, few descriptors were leaked."""
    gc.collect()
    bus.stats()
    left = [target for _, target in sorted(descriptors() - before)]
    assert len(left) <= 4 + leaked(storm.raised), left


def test_an_interrupted_subscribe_leaves_a_channel_or_nothing(bus: Bus, once: Storm) -> None:
    """There is a channel that works in the end, or no subscription."""
    longest = duration(lambda: bus.subscribe("t").close())
    before = descriptors()
    for number in once.moments(2000):
        made: list[Channel[Any]] = []
        once.interrupts(longest, lambda made=made: made.append(bus.subscribe("t")))
        for channel in made:
            bus.publish(number, topic="t")
            assert channel.recv(timeout=DEADLINE) == number
            channel.close()
        channel = None  # type: ignore[assignment]
    wait_until(lambda: not bus.stats().subscribers)
    nothing_grows(before, bus, once)


def test_an_interrupted_opening_can_be_done_again(bus: Bus, once: Storm) -> None:
    """However often the opening of a channel is interrupted, it can be opened then, and nothing was lost."""
    longest = duration(lambda: bus.subscribe().poll(0))
    for number in once.moments(2000):
        channel = bus.subscribe()
        bus.publish(number)
        for _ in range(3):
            once.interrupts(longest, channel.poll, 0)
        assert channel.recv(timeout=DEADLINE) == number
        channel.close()
    assert bus.stats().subscribers == ()


def test_an_interrupted_change_of_topics_can_be_done_again(bus: Bus, storm: Storm) -> None:
    """``channel.subscribe`` and ``unsubscribe``: the next call works, and then the topics are what they should be."""
    with bus.subscribe("always") as channel:
        longest = duration(channel.subscribe, "t")
        before = descriptors()
        for number in storm.moments():
            storm.interrupts(longest, channel.subscribe, "t", "u")
            channel.subscribe("t", "u")
            bus.publish(number, topic="u")
            storm.interrupts(longest, channel.unsubscribe, "t", "u")
            channel.unsubscribe("t", "u")
            bus.publish("not heard", topic="t")
            assert channel.recv(timeout=DEADLINE) == number
        assert bus.stats().subscribers[0].topics == ("always",)
        assert not channel.poll(0)
        nothing_grows(before, bus, storm)


def test_interrupted_questions_are_answered_when_they_are_asked_again(bus: Bus, storm: Storm) -> None:
    """``flush``, ``stats`` and ``wait_for_subscribers``: no answer meets another question."""
    with bus.subscribe() as channel:
        bus.publish(0)
        assert channel.recv(timeout=DEADLINE) == 0
        questions: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (bus.flush, (DEADLINE,)),
            (bus.stats, ()),
            (bus.wait_for_subscribers, (1,)),
        ]
        longest = max(duration(function, *args) for function, args in questions)
        before = descriptors()
        for turn in storm.moments():
            function, args = questions[turn % 3]
            storm.interrupts(longest, function, *args)
            bus.publish(turn)
            bus.flush(timeout=DEADLINE)
            assert channel.recv(timeout=DEADLINE) == turn
            assert len(bus.stats().subscribers) == 1
        nothing_grows(before, bus, storm)


@pytest.mark.parametrize("opened", [False, True], ids=["unopened", "opened"])
def test_an_interrupted_close_of_a_channel_can_be_done_again(bus: Bus, storm: Storm, opened: bool) -> None:
    """After a second ``close`` there is no subscription any more, and the handle is closed."""

    def made() -> Channel[Any]:
        channel = bus.subscribe()
        if opened:
            bus.publish(bytes(3000))
            assert channel.poll(DEADLINE)
        return channel

    longest = duration(lambda: made().close())
    before = descriptors()
    for _ in storm.moments(2000):
        channel = made()
        storm.interrupts(longest, channel.close)
        channel.close()
        with pytest.raises(ClosedError):
            channel.recv(timeout=0)
    del channel
    wait_until(lambda: not bus.stats().subscribers)
    nothing_grows(before, bus, storm)


def test_an_interrupted_close_of_an_attached_handle_can_be_done_again(bus: Bus, storm: Storm) -> None:
    """After a second ``close`` the handle is closed, and when it is gone the broker does not know it any more."""

    def made() -> Bus:
        other: Bus = pickle.loads(handle)
        other.publish("hello")
        return other

    handle = pickle.dumps(bus)
    longest = duration(lambda: made().close())
    before = descriptors()
    for _ in storm.moments(1000):
        other = made()
        storm.interrupts(longest, other.close)
        other.close()
        assert other.closed
        with pytest.raises(ClosedError):
            other.flush()
    del other
    wait_until(lambda: bus.stats().publishers <= leaked(storm.raised))
    nothing_grows(before, bus, storm)


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
        storm.interrupts(2e-5, use)
        with pytest.raises(RuntimeError):  # nobody holds it
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
from mpbroadcast.posix.forks import fork_lock

os.fork() or os._exit(0)
os.wait()
thread = threading.Thread(target=lock, daemon=True)
thread.start()
thread.join(5)
print("held" if thread.is_alive() else "free")
"""


def test_an_interrupt_behind_a_fork_leaves_no_lock_held() -> None:
    """What a signal's handler raises just behind ``os.fork`` comes up in a hook; other threads can use the library then."""
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED_FORK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "free\n"), done.stderr
    assert "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize("kind", [OwnedDescriptor, PipeEnd])
def test_a_descriptor_is_never_closed_twice(kind: type[OwnedDescriptor]) -> None:
    """Wherever its making, closing and collection are interrupted: it may stay open, but somebody else's is never closed."""
    child = os.fork()  # for interrupts come where no signal can, too, and may leave a lock held
    if not child:
        count = -1
        with contextlib.suppress(BaseException):
            count = interrupts_without_closing_twice(kind)
        os._exit(0 if count > 20 else 1)
    assert os.waitpid(child, 0)[1] == 0


def interrupts_without_closing_twice(kind: type[OwnedDescriptor]) -> int:
    """How many moments there are, none of which makes a descriptor be closed twice."""
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


@pytest.mark.parametrize("moment", [BrokerClient.request, PipeEnd.close], ids=lambda function: function.__qualname__)
def test_an_interrupted_close_of_the_broadcaster_can_be_done_again(moment: Callable[..., Any]) -> None:
    """After a second ``close`` the broker process has ended."""
    bus = start_broadcaster()
    bus.publish(1)
    broker = psutil.Process(bus.stats().pid)
    try:
        interrupting(entering(moment), bus.close)
        bus.close()
        assert not any(child.pid == broker.pid for child in multiprocessing.active_children())
    finally:
        bus.close()


@pytest.mark.interrupted(100)
def test_a_handle_whose_close_was_interrupted_publishes_no_more(bus: Bus) -> None:
    """After a second ``close`` there is no way to publish through the handle, and the broker does not wait for it."""
    handle = pickle.dumps(bus)
    for count in itertools.count():
        other: Bus = pickle.loads(handle)
        other.publish("hello")
        interrupted = Interrupting(behind_call(count), sys.setprofile)(other.close)
        other.close()
        wait_until(lambda: bus.stats().publishers == 0, 1.0)
        with pytest.raises(ClosedError):
            other.publish("late")
        if not interrupted:
            break
    assert count > 10


def test_an_interrupted_subscribe_that_is_interrupted_again(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C, while the first is cleaned up after, leaves no subscription that nobody holds."""
    finalised = []

    def interrupted(channel: Channel[Any]) -> None:
        finalised.append(channel.id)
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "__del__", interrupted)
        interrupting(entering(WeakSet.add), bus.subscribe)  # behind the request
    assert finalised
    assert not bus.stats().subscribers


@pytest.mark.parametrize(
    "moment",
    [
        "waiting for the broker",
        BrokerClient.session,
        Broadcaster.__init__,
        BrokerProcess.end_at_exit,
    ],
    ids=lambda moment: getattr(moment, "__qualname__", moment),
)
def test_a_start_that_is_interrupted_leaves_nothing(
    moment: Callable[..., Any] | str, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no process and no file."""
    if isinstance(moment, str):

        def reach(name: str, subject: object = None) -> None:
            if name == moment:
                raise Interrupt

        monkeypatch.setattr(trap_points, "reach", reach)
        with pytest.raises(Interrupt):
            start_broadcaster()
    else:
        interrupting(entering(moment), start_broadcaster)
    gc.collect()
    left = [str(path) for path in temporary_folder.glob("mpbroadcast-*")]
    for child in multiprocessing.active_children():
        left.append(child.name)
        child.terminate()
        child.join(DEADLINE)
        child.close()
    assert not left


# ----------------------------------------------------------------------------------------------------------------- forks


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_at_any_moment_leaves_both_sides_working(bus: Bus) -> None:
    """While a thread publishes and another receives, a third forks: each child publishes and subscribes anew."""
    print(f"MPBROADCAST_SEED={SEED}")
    rng = random.Random(SEED)
    channel = bus.subscribe("main")
    children = bus.subscribe("child")
    ended = threading.Event()
    sizes = (20, 20, 10_000, 20, 300_000)

    def publish() -> int:
        number = 0
        while not ended.is_set():
            bus.publish((number, pattern(number, sizes[number % 5])), topic="main", timeout=DEADLINE)
            number += 1
        bus.publish((-1, b""), topic="main")
        return number

    def receive() -> list[int]:
        got: list[int] = []
        while True:
            number, data = channel.recv(timeout=DEADLINE)
            if number == -1:
                return got
            assert data == pattern(number, len(data))
            got.append(number)

    publishing, receiving = Background(publish), Background(receive)
    pids: list[int] = []
    end = time.monotonic() + 2 * STORM
    while len(pids) < 5 or time.monotonic() < end:
        time.sleep(rng.random() * 0.002)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                signal.alarm(int(DEADLINE))  # a child that hangs is found
                code = use_anew(bus, f"of child {len(pids)}")
            finally:
                os._exit(code)
        pids.append(pid)
        if len(pids) % 4 == 0:
            assert os.waitpid(pids[-1], 0)[1] == 0
            pids[-1] = -pid
    codes = {pid: os.waitpid(pid, 0)[1] for pid in pids if pid > 0}
    ended.set()
    count = publishing.result()
    assert receiving.result() == list(range(count))
    assert set(codes.values()) <= {0}
    numbers = sorted(children.recv(timeout=DEADLINE) for _ in pids)
    assert numbers == sorted(f"of child {number}" for number in range(len(pids)))
    channel.close()
    children.close()
    wait_until(lambda: not bus.stats().subscribers)


def use_anew(bus: Bus, name: str) -> int:
    """Publish and subscribe in a child; 0 when all went well."""
    bus.publish(name, topic="child", timeout=DEADLINE)
    with bus.subscribe(name) as own:
        bus.publish((name, pattern(1, 10_000)), topic=name, timeout=DEADLINE)
        if own.recv(timeout=DEADLINE) != (name, pattern(1, 10_000)):
            return 2
    bus.flush(timeout=DEADLINE)
    return 0


# ------------------------------------------------------------------------------------------------------------ collection


class Cycle:
    """Something that only the garbage collector takes away, with all that it holds."""

    def __init__(self, *held: Any) -> None:
        self.held = held
        self.me = self


@pytest.fixture
def eager() -> Iterator[None]:
    """The garbage collector comes at every chance."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def test_a_collection_at_any_moment_takes_what_nobody_holds(bus: Bus, eager: None) -> None:
    """Channels and handles in reference cycles go at any moment, in the middle of any call, and disturb none."""
    channel = bus.subscribe()
    handle = pickle.dumps(bus)
    end = time.monotonic() + STORM
    number = 0
    while number < 20 or time.monotonic() < end:
        opened, unopened = bus.subscribe("other"), bus.subscribe("other")
        opened.poll(0)
        other: Bus = pickle.loads(handle)
        Cycle(Cycle(opened, unopened), other)
        del opened, unopened
        data = pattern(number, (20, 10_000, 300_000)[number % 3])
        (bus, other)[number % 2].publish((number, data), timeout=DEADLINE)
        other.flush(timeout=DEADLINE)
        del other
        assert channel.recv(timeout=DEADLINE) == (number, data)
        number += 1
    gc.collect()
    wait_until(lambda: [row.topics for row in bus.stats().subscribers] == [("*",)])
    wait_until(lambda: bus.stats().publishers == 1)
    channel.close()


def test_what_a_collection_calls_may_use_the_same_handle(bus: Bus) -> None:
    """A callback of the collector publishes, subscribes and drops channels, in the middle of the same thread's calls."""
    channel = bus.subscribe("main")
    heard = bus.subscribe("gc")
    called = 0
    may_call = 0  # so many per message: receiving a message makes collections, and could go on for ever
    busy = False

    def callback(phase: str, info: dict[str, int]) -> None:
        nonlocal called, busy, may_call
        if phase != "stop" or busy or not may_call:
            return
        busy = True
        may_call -= 1
        try:
            bus.publish((called, pattern(called, (20, 10_000)[called % 2])), topic="gc", timeout=DEADLINE)
            called += 1
            if called % 10 == 0:
                Cycle(bus.subscribe("other"))
        finally:
            busy = False

    got: list[Any] = []
    before = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1, 1000, 1000)
    try:
        end = time.monotonic() + STORM
        count = 0
        while called <= 10 or count < 50 or time.monotonic() < end:
            data = pattern(count, (20, 10_000)[count % 2])
            may_call = count % 40
            bus.publish((count, data), topic="main", timeout=DEADLINE)
            assert channel.recv(timeout=DEADLINE) == (count, data)
            count += 1
            if heard.poll(0):
                got.extend(heard.recv_many())
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(callback)
    while len(got) < called:
        got.extend(heard.recv_many(timeout=DEADLINE))
    assert called > 10
    assert got == [(number, pattern(number, (20, 10_000)[number % 2])) for number in range(called)]
    gc.collect()
    wait_until(lambda: sorted(row.topics for row in bus.stats().subscribers) == [("gc",), ("main",)])
    channel.close()
    heard.close()
