"""A random schedule on the real library, compared step by step with the model of its promises, ``benchmarks/promises.py``.

The driver, this process, draws the steps from a seed: publish, subscribe, receive, fork, hand on, close, kill. It carries out
each here or in an actor, a process of its own, and waits for the answer: so it knows the order of all steps. One channel, the
witness, receives everything, and so shows the order of all messages.

The schedules are the same each time, unless ``MPBROADCAST_SOAK`` asks for new ones for so many seconds;
``MPBROADCAST_SEED`` replays another run.
"""

import contextlib
import os
import pickle
import signal
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from random import Random
from typing import Any, Final

import pytest

from benchmarks.promises import DROPPING, POLICIES, Ledger, body, check_balance, is_body
from mpbroadcast import (
    Broadcaster,
    BroadcastError,
    Channel,
    ChannelInUse,
    ClosedError,
    Lagged,
    Overflowed,
    TimedOut,
    connect,
    start_broadcaster,
)
from tests.support.helpers import DEADLINE, Children, answer, wait_for, wait_until

Bus = Broadcaster[Any]
Item = tuple[int, str, int]
"""The number, the topic and the size of a message to publish."""
Event = tuple[str, int, int, int, int]
"""What a channel returned or raised: its kind, the handle and number of a message or the length of a gap, and ``missed``."""

SOAK: Final = float(os.environ.get("MPBROADCAST_SOAK", "0"))
RUNS: Final = 6
STEPS: Final = 250  # of one run
DRIVER: Final = 0  # this process; the actors have the numbers from 1 on
TOPICS: Final = ("", "a", "a:1", "a:2", "b", "b:1", "ü:1", "x*")
WANTED: Final = ("", "a", "a:1", "b", "x*", "a:*", "*:1", "?", "[ab]", "[!a]*", "x[*]", "*", "none has it")
CAPACITIES: Final = (1500, 20_000, 100_000, 1 << 20, 5 << 20, None, None)  # under "block"
SMALL: Final = (1500, 1500, 5000, 5000, 20_000, 1 << 20, None)
SIZES: Final = (1900, 2040, 2050, 3000, 4080, 20_000, 65_500, 100_000, (1 << 18) - 60, (1 << 18) + 60)
LARGE: Final = ((2 << 20) - 100, (2 << 20) + 100, 3 << 20)
OVERHEAD: Final = 400  # more than what a message takes beside its bytes


def message(handle: int, item: Item) -> tuple[int, int, str, Any]:
    number, topic, size = item
    kinds: tuple[Callable[[bytes], Any], ...] = (bytes, bytearray, pickle.PickleBuffer)
    return handle, number, topic, kinds[number % (3 if size > 1000 else 2)](body(handle, 0, number, size))


def result_of(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What this returns, or the error of the library that it raises."""
    try:
        return call(*arguments, **more)
    except BroadcastError as error:
        return error


class Hands:
    """The handles and channels of one process. Each ``do_`` is a command."""

    def __init__(self, buses: dict[int, Bus], channels: dict[int, Channel[Any]], forms: dict[int, int]) -> None:
        self.buses = buses
        self.channels = channels
        self.forms = forms

    def do(self, command: str, *arguments: Any, **more: Any) -> Any:
        return getattr(self, f"do_{command}")(*arguments, **more)

    def do_publish(
        self, handle: int, items: list[Item], many: bool, exclude: int | None, timeout: float | None, new: int | None = None
    ) -> int:
        """Publish these up to the first that runs out of time, as handle ``new`` if it has another number: how many were."""
        bus, own = self.buses[handle], handle if new is None else new
        excluded = None if exclude is None else self.channels[exclude]
        done = 0
        try:
            if many:
                messages = (message(own, item) for item in items)
                return bus.publish_many(messages, topic=items[0][1], exclude=excluded, timeout=timeout)
            for item in items:
                bus.publish(message(own, item), topic=item[1], exclude=excluded, timeout=timeout)
                done += 1
        except TimedOut as error:
            return int(getattr(error, "sent", done))
        return done

    def do_subscribe(self, handle: int, key: int, topics: tuple[str, ...], form: int, more: dict[str, Any]) -> int:
        self.channels[key] = self.buses[handle].subscribe(*topics, with_topic=form == 1, with_id=form == 2, **more)
        self.forms[key] = form
        return self.channels[key].id

    def do_receive(self, key: int, limit: int, timeout: float, call: str) -> list[Event]:
        """Receive up to ``limit`` times, and wait for the first."""
        channel = self.channels[key]
        events: list[Event] = []
        while len(events) < limit:
            patience = 0.0 if events else timeout
            is_ready = False
            if call == "poll":
                is_ready, patience = channel.poll(patience), 0.0
            elif call == "wait":
                is_ready = bool(wait_for([channel], 0)) and channel.poll(0)
            try:
                got = channel.recv_many(limit - len(events), patience) if call == "many" else [channel.recv(patience)]
            except Lagged as error:
                events.append(("lagged", error.missed or 0, 0, 0, channel.missed))
            except Overflowed:
                events.append(("overflowed", 0, 0, 0, channel.missed))
            except EOFError:
                return [*events, ("end", 0, 0, 0, channel.missed)]
            except TimedOut:
                assert not is_ready, "poll returned True, and there was nothing"
                break
            else:
                events += [("message", *self.checked(one, self.forms[key]), channel.missed) for one in got]
        return events

    @staticmethod
    def checked(got: Any, form: int) -> tuple[int, int, int]:
        came_with, id = None, 0
        if form == 1:
            came_with, got = got
        elif form == 2:
            id, came_with, got = got
        handle, number, topic, data = got
        assert came_with in (None, topic), f"message {number} of {handle} has topic {topic!r}, and came with {came_with!r}"
        assert is_body(data, handle, 0, number, len(data)), f"message {number} of handle {handle} is spoilt"
        return handle, number, id

    def do_bus(self, handle: int, method: str, *arguments: Any, **more: Any) -> Any:
        return result_of(getattr(self.buses[handle], method), *arguments, **more)

    def do_channel(self, key: int, method: str, *arguments: Any) -> Any:
        return result_of(getattr(self.channels[key], method), *arguments)

    def do_unsubscribe(self, handle: int, key: int) -> None:
        self.buses[handle].unsubscribe(self.channels[key])

    def do_close(self, key: int) -> None:
        channel = self.channels[key]
        channel.close()
        channel.close()
        with pytest.raises(ClosedError):
            channel.recv(0)

    def do_forget(self, key: int) -> None:
        del self.channels[key]

    def do_give(self, key: int) -> bytes:
        return pickle.dumps(self.channels[key])

    def do_take(self, key: int, channel: bytes, form: int) -> None:
        self.channels[key] = pickle.loads(channel)
        self.forms[key] = form

    def do_fork_and_publish(self, handle: int, new: int, items: list[Item]) -> int:
        """Publish from a forked process, through the handle that it inherits, up to its end: how many were."""
        pid = os.fork()
        if not pid:
            published = 255
            try:
                published = self.do_publish(handle, items, False, None, 0.05, new)
            finally:
                os._exit(published)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def do_connect(self, handle: int, address: str) -> None:
        self.buses[handle] = connect(address)


def act(hands: Hands, orders: Connection) -> None:
    """Carry out one command after the other, until the order to end, or killed."""
    signal.alarm(0)
    while True:
        try:
            command, arguments, more = orders.recv()
        except EOFError:
            return
        if command == "end":
            orders.send(("done", None))
            return
        try:
            orders.send(("done", hands.do(command, *arguments, **more)))
        except BaseException as error:
            orders.send(("failed", f"{type(error).__name__}: {error}"))


def matches(topics: dict[str, None], topic: str) -> bool:
    return any(fnmatchcase(topic, own) if set(own) & set("*?[") else own == topic for own in topics)


class Sub(Ledger):
    """A subscription. Its row is what was published to it, in the order of all."""

    def __init__(self, key: int, topics: tuple[str, ...], policy: str, capacity: int, form: int, actor: int) -> None:
        super().__init__(policy, capacity, has_one_row=True, may_drop=False)
        self.key = key
        self.id = 0
        self.topics = dict.fromkeys(topics or ("*",))
        self.form = form  # of what it gives: a message, with its topic, with its id
        self.subscriber = actor
        self.opener: int | None = None
        self.holders = {actor}  # which could open it
        self.inherited: set[int] = set()  # holders by a fork: the collector never comes to what they have from there
        self.handed = False
        self.live = True
        self.gone = False
        self.replayed = False
        self.row: list[tuple[int, int, int]] = []  # the position in the order of all, how many before it are certain, charge
        self.certain = 0  # of the row

    def gets(self, topic: str) -> bool:
        return self.live and matches(self.topics, topic)

    def add(self, position: int, sure: bool, charge: int) -> None:
        """This one is, or may be, for it."""
        self.row.append((position, self.certain, charge))
        self.certain += sure

    def certain_before(self, number: int) -> int:
        return self.row[number][1] if number < len(self.row) else self.certain

    @property
    def received_to(self) -> int:
        return self.next.get(self.key, 0)

    def left(self) -> tuple[int, int]:
        """How many there are behind the last received one: at least, and at most."""
        start = self.received_to
        return self.certain - self.certain_before(start), len(self.row) - start

    @property
    def is_due(self) -> bool:
        """Whether there must be something to receive."""
        return not self.live or self.left()[0] > self.gap

    def receive(self, position: int) -> None:
        start, number = self.received_to, bisect_left(self.row, (position,))
        assert number < len(self.row), f"{self} got a message that is not for it"
        assert self.row[number][0] == position, f"{self} got a message that is not for it"
        self.message(self.key, number, certain=self.certain_before(number) - self.certain_before(start))
        self.release(number + 1 - start, sum(charge for _, _, charge in self.row[start : number + 1]))

    @property
    def may_end(self) -> bool:
        """Whether it may have ended by itself: by an overflow, or since no process can open it any more."""
        return (self.overflow == "disconnect" and self.may_drop) or (self.opener is None and not self.holders)

    def may_block(self, count: int = 0, charge: int = 0) -> bool:
        """Whether publishing so much to it may have to wait."""
        return self.live and self.overflow == "block" and self.is_full(count, charge)

    def __repr__(self) -> str:
        return f"<{self.key}: {self.overflow}, {self.capacity}, {list(self.topics)}>"


class Sent:
    """A message that was published and that the witness has not received yet."""

    def __init__(self, item: Item, targets: dict[Sub, bool], clock: dict[int, int]) -> None:
        self.number, self.topic, size = item
        self.charge = size + OVERHEAD
        self.targets = targets  # whether it is certain that it is for this one
        self.clock = clock  # of other handles, what the broker had before this was published
        self.doubtful = False  # its publisher was killed meanwhile


class Handle:
    """A publisher. One that has ended is in no process, and may have messages that are not routed yet."""

    def __init__(self, key: int, actor: int | None) -> None:
        self.key = key
        self.actor = actor
        self.next = 0
        self.pending: deque[Sent] = deque()
        self.checked: dict[int, int] | None = None


class Driver:
    """Carries out a run, and compares."""

    def __init__(self, seed: int, children: Children, context: BaseContext) -> None:
        self.seed = seed
        self.children = children
        self.context = context
        self.step = 0
        self.steps: deque[str] = deque(maxlen=25)
        self.covered: Counter[str] = Counter()
        self.keys = count(1)
        self.random = Random(seed)
        self.history = self.random.choice([0, 1, 5, 30])
        self.bus: Bus = start_broadcaster(history=self.history)
        witness = self.bus.subscribe("*", capacity=1 << 40, with_id=True)
        self.hands = Hands({0: self.bus}, {-1: witness}, {-1: 2})
        self.handles = {0: Handle(0, DRIVER)}
        self.subs: dict[int, Sub] = {}
        self.actors: dict[int, tuple[BaseProcess, Connection]] = {}
        self.routed: dict[int, int] = {}  # of each handle, the last number that the broker has for certain
        self.clock: dict[int, int] = {}
        self.order: dict[tuple[int, int], int] = {}
        self.first_id = 0
        self.last: dict[int, int] = {}  # of each handle, in this order
        self.kept: dict[str, deque[tuple[int, int]]] = {}
        self.given_up = False
        witness.fileno()

    def run(self) -> None:
        try:
            for self.step in range(STEPS):
                self.random = Random(f"{self.seed} {self.step}")
                (name,) = self.random.choices([*WEIGHTS], [*WEIGHTS.values()])
                self.covered[name] += 1
                getattr(self, name)()
                if self.step % 50 == 49:
                    self.watch(0.0)
            self.random = Random(f"{self.seed} end")
            self.end()
        except BaseException as error:
            text = f"MPBROADCAST_SEED={self.seed} failed in step {self.step}: {type(error).__name__}: {error}"
            raise AssertionError("\n".join([text, "the last steps:", *self.steps])) from error
        finally:
            self.clean_up()

    def clean_up(self) -> None:
        for process, orders in self.actors.values():
            orders.close()
            process.kill()
        closers: list[Callable[[], None]] = [channel.close for channel in self.hands.channels.values()]
        closers += [lambda bus=bus: bus.close(timeout=2.0) for bus in self.hands.buses.values()]  # type: ignore[misc]
        for close in closers:
            with contextlib.suppress(Exception):
                close()

    def do(self, actor: int, command: str, *arguments: Any, **more: Any) -> Any:
        shown = [*arguments, more]
        if command == "publish":
            shown[1] = f"{len(arguments[1])} from {arguments[1][0]}"
        self.steps.append(f"{self.step}: {f'actor {actor}' if actor else 'driver'} {command} {str(shown)[:150]}")
        if actor == DRIVER:
            result = self.hands.do(command, *arguments, **more)
        else:
            orders = self.actors[actor][1]
            orders.send((command, arguments, more))
            status, result = answer(orders, 2 * DEADLINE)
            assert status == "done", f"actor {actor}: {result}"
        if not isinstance(result, bytes):
            self.steps[-1] += f" -> {str(result)[:150]}"
        return result

    def pid(self, actor: int) -> int:
        return os.getpid() if actor == DRIVER else self.actors[actor][0].pid or 0

    def any_actor(self) -> int:
        return self.random.choice([DRIVER] * 3 + list(self.actors))

    def handles_of(self, actor: int) -> list[Handle]:
        return [handle for handle in self.handles.values() if handle.actor == actor]

    def any_handle(self, actor: int) -> Handle:
        return self.random.choice(self.handles_of(actor))

    def unopened(self) -> list[Sub]:
        return [sub for sub in self.subs.values() if sub.opener is None and sub.holders]

    def is_crowded(self) -> bool:
        return any(sub.may_block() for sub in self.subs.values())

    def pending(self) -> Iterator[Sent]:
        """All that the witness has not received."""
        for handle in self.handles.values():
            yield from handle.pending

    def items(self, handle: Handle, number: int, topic: str) -> list[Item]:
        items = []
        for _ in range(number):
            size = self.random.randrange(300)
            if self.random.random() < 0.06:
                size = self.random.choice(SIZES) + self.random.randrange(-30, 30)
                if self.random.random() < 0.06:
                    size = self.random.choice(LARGE)
            items.append((handle.next, topic, size))
            handle.next += 1
        return items

    def targets(self, topic: str, exclude: int | None = None) -> list[Sub]:
        return [sub for sub in self.subs.values() if sub.key != exclude and sub.gets(topic)]

    def publish(self) -> None:
        handle = self.any_handle(self.any_actor())
        number = self.random.choice([1, 1, 2, 5, 20])
        self.publish_from(handle, self.items(handle, number, self.random.choice(TOPICS)))

    def publish_from(self, handle: Handle, items: list[Item]) -> None:
        assert handle.actor is not None
        topic = items[0][1]
        held = [sub.key for sub in self.subs.values() if handle.actor in sub.holders]
        exclude = self.random.choice(held) if held and self.random.random() < 0.1 else None
        targets = self.targets(topic, exclude)
        charge = sum(size + OVERHEAD for _, _, size in items)
        crowded = self.is_crowded() or any(sub.may_block(len(items), charge) for sub in targets)
        timeout = self.random.choice([0.0, 0.002, 0.02]) if crowded else self.random.choice([None, DEADLINE])
        self.note(handle, items, targets)
        many = self.random.random() < 0.4
        sent = self.do(handle.actor, "publish", handle.key, items, many, exclude, timeout)
        if sent < len(items):
            assert crowded, f"{len(items) - sent} could not be published, and no backlog was full"
            self.take_back(handle, len(items) - sent)
            if self.random.random() < 0.7:
                self.relieve()

    def note(self, handle: Handle, items: list[Item], targets: list[Sub]) -> None:
        """These are being published."""
        if self.clock != self.routed:
            self.clock = dict(self.routed)
        for item in items:
            sent = Sent(item, dict.fromkeys(targets, True), self.clock)
            handle.pending.append(sent)
            for sub in targets:
                sub.expect(sent.charge)

    def take_back(self, handle: Handle, number: int) -> None:
        """The last ones were not published after all."""
        for _ in range(number):
            sent = handle.pending.pop()
            for sub in sent.targets:
                sub.release(1, sent.charge)

    def fork_and_publish(self) -> None:
        """A forked process publishes, and ends at once."""
        actor = self.any_actor()
        new = Handle(next(self.keys), None)
        self.handles[new.key] = new
        items = self.items(new, self.random.choice([1, 5, 20]), self.random.choice(TOPICS))
        self.note(new, items, self.targets(items[0][1]))
        self.forked(actor)
        sent = self.do(actor, "fork_and_publish", self.any_handle(actor).key, new.key, items)
        assert sent <= len(items), "the forked process failed"
        self.take_back(new, len(items) - sent)

    def flush(self) -> None:
        self.flush_handle(self.any_handle(self.random.choice([DRIVER, *self.actors])), self.random.random() < 0.1)

    def flush_handle(self, handle: Handle, delivered: bool = False) -> None:
        """Flush it, which must succeed, unless a backlog may be full."""
        assert handle.actor is not None
        crowded = delivered or self.is_crowded()
        timeout = self.random.choice([0, 0.02]) if crowded else DEADLINE
        error = self.do(handle.actor, "bus", handle.key, "flush", timeout, delivered=delivered)
        assert crowded or not error, f"handle {handle.key} could not be flushed, and no backlog was full"
        assert error is None or isinstance(error, TimedOut)
        if not error and handle.pending:
            self.routed[handle.key] = handle.pending[-1].number

    def watch(self, timeout: float, until: tuple[int, int] | None = None) -> int:
        """Let the witness receive what is there, or up to a certain message: how many came."""
        received = 0
        while until is None or until not in self.order:
            events = self.hands.do_receive(-1, 10_000, timeout, self.random.choice(["many", "one"]))
            for kind, key, number, id, _ in events:
                if kind == "end":
                    return received
                assert kind == "message", f"the witness got {kind} of {key}"
                self.witnessed(self.handles[key], number)
                self.first_id = self.first_id or id
                self.check_id(id, (key, number))
                received += 1
            if not events:
                assert until is None, f"the witness does not get message {until[1]} of handle {until[0]}"
                break
        return received

    def witnessed(self, handle: Handle, number: int) -> None:
        """Note the next message in the order of all, which must be the next one of its publisher, for all that get it."""
        key = handle.key
        assert handle.pending, f"message {number} of handle {key} came, and was never published"
        sent = handle.pending.popleft()
        assert sent.number == number, f"message {number} of handle {key} came instead of {sent.number}"
        if sent.clock is not handle.checked:
            for other, before in sent.clock.items():
                behind = f"message {number} of handle {key} came before message {before} of handle {other}"
                assert self.last.get(other, -1) >= before, f"{behind}, which was flushed before it was published"
            handle.checked = sent.clock
        position = self.order[key, number] = len(self.order)
        self.last[key] = number
        self.routed[key] = max(number, self.routed.get(key, -1))
        for sub, sure in sent.targets.items():
            sub.add(position, sure, sent.charge)
        if self.history:
            self.kept.setdefault(sent.topic, deque(maxlen=self.history)).append((position, sent.charge))

    def receive(self) -> None:
        subs = [sub for sub in self.subs.values() if sub.opener is not None]
        if subs:
            self.receive_from(self.random.choice(subs), self.random.choice([1, 5, 100, 1000]))

    def receive_from(self, sub: Sub, limit: int = 1000) -> int:
        """Receive, and compare: how many came."""
        assert sub.opener is not None
        if sub.ended:
            return 0
        is_due = sub.is_due
        call = self.random.choice(["many", "one", "one", "poll", "wait"])
        if sub.overflow == "latest" and call == "many":
            call = "one"
        events = self.do(sub.opener, "receive", sub.key, limit, DEADLINE if is_due else 0, call)
        assert events or not is_due, f"{sub} got nothing, and something is due"
        for event in events:
            self.compare(sub, *event)
        return len(events)

    def compare(self, sub: Sub, kind: str, key: int, number: int, id: int, missed: int) -> None:
        """Compare what a channel returned or raised with what it must."""
        self.covered[kind] += 1
        if kind == "message":
            if (key, number) not in self.order:
                self.watch(DEADLINE, (key, number))
            sub.count(missed)
            sub.receive(self.order[key, number])
            if sub.form == 2:
                self.check_id(id, (key, number))
        elif kind == "lagged":
            first = not sub.received and not sub.missed
            assert not first or sub.overflow != "drop_newest" or sub.replayed, f"{sub} missed the very first"
            sub.lag(key)
        elif kind == "overflowed":
            sub.overflow_once()
            sub.live = False
        else:
            assert not sub.live, f"{sub} ended, and was not unsubscribed"
            sub.ended = True
        sub.count(missed)

    def check_id(self, id: int, message: tuple[int, int]) -> None:
        """A message has the same id in each channel: its position in the order of all."""
        position = id - self.first_id
        assert position == self.order[message], (
            f"message {message} is {self.order[message]} in the order, and has id {position}"
        )

    def settle(self) -> None:
        """Wait until all that was published is routed, receiving what keeps it; then compare what has ended."""
        deadline = time.monotonic() + 2 * DEADLINE
        while owing := [sent for sent in self.pending() if not sent.doubtful]:
            if not self.watch(0.005):
                self.relieve()
            assert time.monotonic() < deadline, f"not routed: {[(sent.topic, sent.number) for sent in owing]}"
        self.watch(0.0)
        self.handles = {key: one for key, one in self.handles.items() if one.pending or one.actor is not None}
        for sub in [sub for sub in self.subs.values() if sub.ended]:
            self.check_end(sub)
            self.do(sub.opener or DRIVER, "close", sub.key)
            self.remove(sub)

    def check_end(self, sub: Sub) -> None:
        """A channel has come to its end: it has had everything."""
        before = sub.received + sub.missed - sub.gap
        least, most = sub.left()
        sub.end(before + least, before + most + sum(sub in sent.targets for sent in self.pending()))

    def relieve(self) -> None:
        for sub in [sub for sub in self.subs.values() if sub.overflow == "block"]:
            if sub.opener is None and sub.holders:
                self.open_sub(sub)
            if sub.opener is not None:
                self.receive_from(sub)
            elif not sub.gone:
                self.give_up(sub)

    def subscribe(self) -> None:
        if len(self.subs) > 8:
            self.close()
            return
        actor = self.any_actor()
        handle = self.any_handle(actor)
        topics = self.random.choice([(), (), tuple(self.random.sample(WANTED, self.random.choice([1, 2, 4])))])
        policy = self.random.choice(POLICIES)
        capacity = self.random.choice(CAPACITIES if policy == "block" else SMALL)
        replay = self.random.choice([0, 1, 3, 100]) if self.history else 0
        if replay:
            self.settle()
            replay *= not any(self.pending())  # else the last one is not known
        sub = Sub(next(self.keys), topics, policy, capacity or 64 << 20, self.random.choice([0, 1, 2]), actor)
        more = {"overflow": policy, "capacity": capacity, "replay": replay}
        sub.id = self.do(actor, "subscribe", handle.key, sub.key, topics, sub.form, more)
        self.subs[sub.key] = sub
        if replay:
            self.expect_replay(sub, replay)
        for other in self.handles.values():
            for sent in other.pending if other is not handle else ():
                if sub.gets(sent.topic):
                    self.may_get(sub, sent)

    @staticmethod
    def may_get(sub: Sub, sent: Sent) -> None:
        sent.targets[sub] = False
        sub.expect(sent.charge)

    def expect_replay(self, sub: Sub, replay: int) -> None:
        """It begins with the last ones, as far as they fit."""
        sub.replayed = True
        most = 1 if sub.overflow == "latest" else replay
        kept = sorted(one for topic, ones in self.kept.items() if matches(sub.topics, topic) for one in ones)[-most:]
        complete = sum(charge for ones in self.kept.values() for _, charge in ones) < 48 << 20
        sure = 2 * sum(charge for _, charge in kept) < sub.capacity
        for position, charge in kept:
            sub.add(position, complete and (sure or position == kept[-1][0]), charge)
            sub.expect(charge)

    def unrouted(self) -> Iterator[Sent]:
        """What the broker may not have routed yet."""
        for handle in self.handles.values():
            for sent in handle.pending:
                if sent.doubtful or sent.number > self.routed.get(handle.key, -1):
                    yield sent

    def topics(self) -> None:
        """A channel gets more topics, or fewer."""
        subs = [sub for sub in self.subs.values() if sub.live and (sub.opener is not None or sub.holders)]
        if not subs:
            return
        sub = self.random.choice(subs)
        actor = sub.opener if sub.opener is not None else self.random.choice(sorted(sub.holders))
        add = self.random.random() < 0.5
        topics = tuple(self.random.sample(WANTED, self.random.choice([1, 2])))
        if not add and sub.topics and self.random.random() < 0.7:
            topics = (self.random.choice(list(sub.topics)), *topics)
        changed = {**sub.topics, **dict.fromkeys(topics)} if add else {one: None for one in sub.topics if one not in topics}
        crowded = self.is_crowded()
        if error := self.do(actor, "channel", sub.key, "subscribe" if add else "unsubscribe", *topics):
            assert isinstance(error, ClosedError)
            assert sub.may_end, f"{sub} was never unsubscribed"
            return
        for sent in self.unrouted():
            before, now = sub in sent.targets, matches(changed, sent.topic)
            if before and not now and (crowded or sent.doubtful):
                sent.targets[sub] = False
            elif now and not before:
                self.may_get(sub, sent)
        sub.topics = changed

    def unsubscribe(self) -> None:
        subs = [sub for sub in self.subs.values() if sub.live]
        if subs:
            self.unsubscribe_sub(self.random.choice(subs))

    def unsubscribe_sub(self, sub: Sub) -> None:
        """End this one, by a handle that has published before or another: what was routed can still be received."""
        actor = self.random.choice([one for one in {sub.subscriber, *sub.holders, sub.opener} if one is not None])
        handle = self.any_handle(actor)
        crowded = self.is_crowded()
        for _ in range(self.random.choice([1] * 9 + [2])):
            self.do(actor, "unsubscribe", handle.key, sub.key)
        for sent in self.unrouted():
            if sub in sent.targets and (crowded or sent.doubtful):
                sent.targets[sub] = False
        sub.live = False

    def open(self) -> None:
        if subs := self.unopened():
            self.open_sub(self.random.choice(subs))

    def open_sub(self, sub: Sub) -> None:
        """Open it in a process that has it; in all others it is then in use."""
        opener = sub.opener = self.random.choice(sorted(sub.holders))
        fd = self.do(opener, "channel", sub.key, "fileno")
        assert isinstance(fd, int), f"{sub} could not be opened: {fd!r}"
        for other in sorted(sub.holders - {opener}):
            error = self.do(other, "channel", sub.key, "fileno")
            assert isinstance(error, ChannelInUse), f"{sub} is open in two processes"
            assert error.pid == self.pid(opener), f"{sub} is reported to be in use by {error.pid}, not by {self.pid(opener)}"
        sub.holders = {opener}

    def hand_on(self) -> None:
        if not (subs := self.unopened()):
            return
        sub = self.random.choice(subs)
        giver = self.random.choice(sorted(sub.holders))
        takers = [actor for actor in (DRIVER, *self.actors) if actor not in sub.holders and actor != sub.subscriber]
        if takers:
            taker = self.random.choice(takers)
            self.do(taker, "take", sub.key, self.do(giver, "give", sub.key), sub.form)
            sub.holders.add(taker)
            sub.handed = True

    def forked(self, actor: int) -> None:
        """Channels that are not open count as handed on from a fork on."""
        for sub in self.subs.values():
            if sub.opener is None and actor == sub.subscriber:
                sub.handed = True

    def close(self) -> None:
        """A channel is closed, or left to the garbage collector: what waits is dropped."""
        if not self.subs:
            return
        sub = self.random.choice([*self.subs.values()])
        if sub.opener is not None:
            how = "close" if sub.opener in sub.inherited else self.random.choice(["close", "forget"])
            self.do(sub.opener, how, sub.key)
            self.remove(sub)
        elif sub.holders:
            actor = self.random.choice(sorted(sub.holders))
            self.do(actor, "close", sub.key)
            sub.holders.discard(actor)
            if not (sub.handed and actor == sub.subscriber):
                self.remove(sub)
        else:
            self.give_up(sub)

    def give_up(self, sub: Sub) -> None:
        """No process can open it any more: the one that has subscribed ends it."""
        self.do(sub.subscriber, "unsubscribe", self.any_handle(sub.subscriber).key, sub.key)
        self.remove(sub, listed=False)
        self.given_up = True

    def remove(self, sub: Sub, listed: bool = True) -> None:
        """It is gone; if it was ``listed``, wait until it is not among the statistics."""
        self.subs.pop(sub.key)
        sub.live = False
        sub.gone = True
        for sent in self.pending():
            sent.targets.pop(sub, None)
        if listed:
            self.wait_gone([sub])

    def wait_gone(self, subs: list[Sub]) -> None:
        ids = {sub.id for sub in subs}
        wait_until(lambda: not ids & {row.id for row in self.bus.stats().subscribers})

    def begin_actor(self) -> None:
        """Start a process, and hand some channels on to it by the fork."""
        if len(self.actors) >= 3:
            self.kill()
            return
        actor = next(self.keys)
        handle = Handle(next(self.keys), actor)
        self.forked(DRIVER)
        given = [sub for sub in self.unopened() if DRIVER in sub.holders and self.random.random() < 0.3]
        channels = {sub.key: self.hands.channels[sub.key] for sub in given}
        orders, theirs = self.context.Pipe()
        hands = Hands({handle.key: self.bus}, channels, {sub.key: sub.form for sub in given})
        self.actors[actor] = (self.children(self.context, act, hands, theirs), orders)
        theirs.close()
        self.handles[handle.key] = handle
        for sub in given:
            sub.holders.add(actor)
            sub.inherited.add(actor)
        self.steps.append(f"{self.step}: actor {actor} begins, with {given}")

    def kill(self) -> None:
        """A process ends, or is killed: before, or in the middle of what it publishes."""
        if not self.actors:
            return
        actor = self.random.choice(list(self.actors))
        process, orders = self.actors[actor]
        how = self.random.choice(["end", "kill", "kill while it publishes"])
        self.steps.append(f"{self.step}: actor {actor}: {how}")
        handles = self.handles_of(actor)
        if how == "end":
            orders.send(("end", (), {}))
            answer(orders)
        elif how != "kill":
            handle = self.random.choice(handles)
            items = self.items(handle, 50, self.random.choice(TOPICS))
            self.note(handle, items, self.targets(items[0][1]))
            for sent in list(handle.pending)[-50:]:
                sent.doubtful = True
            orders.send(("publish", (handle.key, items, False, None, 1.0), {}))
            time.sleep(self.random.uniform(0.0, 0.002))  # which moment it is, is left to chance
        if how != "end":
            process.kill()
        process.join()
        orders.close()
        del self.actors[actor]
        for handle in handles:
            handle.actor = None
        died = [sub for sub in self.subs.values() if (sub.subscriber if sub.opener is None else sub.opener) == actor]
        for sub in died:
            self.remove(sub, listed=False)
        self.wait_gone(died)
        for sub in self.subs.values():
            sub.holders.discard(actor)
            if sub.subscriber == actor and sub.opener is not None:
                sub.subscriber = sub.opener

    def attach(self) -> None:
        """One more handle in a process, or one fewer: what it has published comes nevertheless."""
        others = [handle for handle in self.handles_of(DRIVER) if handle.key]
        if len(others) > 1:
            handle = self.random.choice(others)
            self.do(DRIVER, "bus", handle.key, "close")
            handle.actor = None
            return
        actor = self.any_actor()
        new = Handle(next(self.keys), actor)
        self.do(actor, "connect", new.key, self.bus.address)
        self.handles[new.key] = new

    def stats(self) -> None:
        snapshot = self.bus.stats()
        rows = {row.id: row for row in snapshot.subscribers}
        del rows[self.hands.channels[-1].id]
        assert len(self.order) <= snapshot.published <= len(self.order) + sum(1 for _ in self.pending())
        for sub in [sub for sub in self.subs.values() if sub.live]:
            row = rows.pop(sub.id, None)
            if row is None:
                assert sub.may_end, f"{sub} is not in the statistics"
                continue
            owner = self.pid(sub.subscriber if sub.opener is None else sub.opener)
            found = (row.topics, row.overflow, row.capacity, row.pid)
            assert found == (tuple(sub.topics), sub.overflow, sub.capacity, owner), f"{sub}: {found}"
            check_balance(row)
            most = len(sub.row) + sum(sub in sent.targets for sent in self.pending())
            assert sub.certain <= row.published <= most, f"{sub}, {sub.certain}: {row}"
            assert sub.received + sub.missed <= row.delivered + row.missed, f"{sub}: {row}"
            may_miss = sub.overflow == "latest" or (sub.overflow in DROPPING and sub.may_drop)
            assert may_miss or not row.missed, f"{sub}: {row}"
            if row.stalls and not sub.may_block():  # the broker may not have read yet that a message was given up
                wait_until(lambda: not any(one.stalls for one in self.bus.stats().subscribers if one.id == row.id))  # noqa: B023
        assert not rows, f"in the statistics, and ended: {rows}"
        topic = self.random.choice(TOPICS)
        sure = [sub for sub in self.targets(topic) if not sub.may_end]
        self.bus.wait_for_subscribers(1 + len(sure), topic=topic, timeout=0)

    def finish(self, sub: Sub) -> None:
        while not sub.ended:
            if sub.opener is None:
                self.open_sub(sub)
            self.receive_from(sub)

    def end(self) -> None:
        """Receive everything that is left: of some channels behind an unsubscribing, of others behind the broker's end."""
        self.settle()
        doubtful = any(self.pending())
        for sub in list(self.subs.values()):
            if not sub.holders and sub.opener is None:
                self.give_up(sub)
            elif sub.overflow == "block" and sub.capacity > 10_000 and not doubtful and self.random.random() < 0.5:
                if sub.opener is None:
                    self.open_sub(sub)
                while self.receive_from(sub) and not sub.ended:
                    pass
            else:
                if sub.live:
                    self.unsubscribe_sub(sub)
                self.finish(sub)
        self.settle()
        self.stats()
        handle = self.handles[0]
        for topic in TOPICS:
            self.publish_from(handle, [(handle.next, topic, 50)])
            handle.next += 1
        self.flush_handle(handle)
        wait_until(self.is_delivered)
        self.bus.close(timeout=0 if self.given_up else DEADLINE)  # it would wait for those that no process will open
        self.watch(DEADLINE)
        for sub in self.subs.values():
            sub.live = False
            self.finish(sub)
            self.check_end(sub)
        assert all(sent.doubtful for sent in self.pending()), "what was published never came"

    def is_delivered(self) -> bool:
        """Whether nothing waits. A long message that need not have come may be in the pipe in part, until it is received."""
        for sub in [sub for sub in self.subs.values() if sub.live and sub.opener is not None]:
            self.receive_from(sub)
        return not any(row.waiting for row in self.bus.stats().subscribers)


WEIGHTS: Final = {"publish": 45, "receive": 22, "flush": 5, "settle": 2, "subscribe": 6, "topics": 4, "unsubscribe": 2,
                  "open": 5, "hand_on": 3, "close": 1, "begin_actor": 1, "kill": 0.6,
                  "fork_and_publish": 0.7, "attach": 1, "stats": 3}  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(int(SOAK) + 120)
def test_random_schedules(children: Children, fork: BaseContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many thousand steps, drawn from one seed after the other: each channel gets what the model has, and nothing else."""
    first = int(os.environ.get("MPBROADCAST_SEED", time.time_ns() % 1_000_000_007 if SOAK else 1))
    print(f"MPBROADCAST_SEED={first}")
    covered: Counter[str] = Counter()
    deadline = time.monotonic() + SOAK
    for seed in count(first):
        with monkeypatch.context() as environment:
            if seed % 8 == 7:  # now and then without shared memory
                environment.setenv("MPBROADCAST_INLINE", "1")
            driver = Driver(seed, children, fork)
            driver.run()
            children.end()
        covered += driver.covered
        if time.monotonic() >= deadline if SOAK else seed == first + RUNS - 1:
            break
    print(f"up to seed {seed}: {dict(sorted(covered.items()))}")
    assert covered["message"]
