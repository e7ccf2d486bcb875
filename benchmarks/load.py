"""``python -m benchmarks.load``: one broker under load for as long as you like, with every message checked.

Publishers send messages of some bytes to some MiB at random rates, one by one and many at once, some with a timeout.
Subscriptions of all overflow policies and of several capacities have one topic, two, a group, or everything; most of them are
open channels of a few processes, which wait for all at once. Subscribers are quick or slow, come and go, and are killed from
time to time, and now and then a publisher is. Each subscriber checks the content, the order and the completeness of what it
receives: under "block" and "disconnect" nothing may be missing, under the others what is missing must have been counted.

A line every few seconds shows how it goes. At the end come the losses, each with its subscription, the gaps that were counted,
and how the broker's memory and descriptors changed with time: a least-squares line over the run, without its first quarter.
Ctrl-C and SIGTERM end it early, with the report. The exit code is 1 if anything was lost, wrong, or left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import pathlib
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Final

import psutil

from benchmarks.load_books import DELIVERED, DRAIN, END, LOST, RUN, WRONG, Account, Board, Message, Wish
from benchmarks.load_report import Report, Sample, left_behind, open_files, seconds_on_cpu, shared_memory
from benchmarks.load_workers import READERS, Manner, publish, subscribe_and_check
from benchmarks.machine import machine
from benchmarks.promises import Broken, check_balance
from benchmarks.rows import private_bytes
from mpbroadcast import Broadcaster, BroadcastError, start_broadcaster

_SPARE_FILES: Final = 200  # descriptors of the broker, for all else
_FILES_OF_A_PROCESS: Final = 6  # of the broker, for each other process
_MEMORY_OF_A_PROCESS: Final = 20 << 20  # bytes, roughly
_MEMORY_OF_A_SUBSCRIPTION: Final = 100 << 10
_IN_ONE_PROCESS: Final = 500  # subscriptions, at most
_PATIENCE: Final = 180.0  # seconds that processes have to end


@dataclass
class _Member:
    """One process, and what it takes to start another one in its place."""

    process: BaseProcess
    pipe: Connection
    place: int
    manner: Manner | None  # None: a publisher
    handed: list[Account] = field(default_factory=list)
    killed: bool = False


class _Load:
    """A broker, its load, and what was seen of it."""

    def __init__(self, options: argparse.Namespace, context: BaseContext) -> None:
        self._options = options
        self._context = context
        self._rng = random.Random(options.seed)
        self._publishers = max(1, min(16, options.processes // 8))
        more = int(min(32, 4 + options.seconds // 4)) if options.kills else 0  # in the place of those that are killed
        self._places = self._publishers + more
        self._topics = max(4, options.subscriptions // 10)
        self._board = Board(context, self._topics, self._places, options.processes)
        self._members: dict[Connection, _Member] = {}
        self._samples: list[Sample] = []
        self._kills = 0
        self._problems = 0
        self._left: list[str] = []  # in the broker, when all others had ended
        self._alone = 0  # descriptors of the broker before there was anyone
        self._ran = (0.0, 0.0)  # seconds that the broker had a CPU, and waited for one
        self._emptied = 0  # bytes of the broker when all others had ended
        self._stopped = False
        self._start = 0.0
        self._next_publisher = 0
        self._bus: Broadcaster[Message]

    def stop(self, number: int = 0, frame: Any = None) -> None:
        """End the run, as a signal handler does."""
        self._stopped = True

    def run(self) -> int:
        """All of it: the exit code."""
        shmem, files = shared_memory(), open_files()
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._run_with_broker()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        report = Report(self._board, self._start, self._samples, self._kills, self._emptied, self._ran, shmem)
        print("\n" + "\n".join(report.lines()))
        left = self._left + left_behind(self._folder, files)
        print(f"left behind        {', '.join(left) or 'nothing'}", flush=True)
        return 1 if self._problems or left or self._board.total(LOST) or self._board.total(WRONG) else 0

    def _run_with_broker(self) -> None:
        bus: Broadcaster[Message] = start_broadcaster(context=self._context)
        self._bus = bus
        self._folder = pathlib.Path(bus.address).parent
        try:
            self._broker = psutil.Process(bus.stats().pid)
            self._alone = self._broker.num_fds()
            self._start_all()
            self._go_on()
            self._end_all()
        finally:
            for member in self._members.values():
                member.process.kill()
                member.process.join()
            self._members.clear()
            bus.close()
            del self._bus

    # --- the processes

    def _start_all(self) -> None:
        options = self._options
        subscribers = max(1, options.processes - self._publishers)
        holders = max(1, min(subscribers // 4, -(-options.subscriptions // _IN_ONE_PROCESS)))
        each, more = divmod(max(0, options.subscriptions - (subscribers - holders)), holders)
        for place in range(subscribers):
            many = each + (place < more) if place < holders else 1
            slow = place >= holders and self._rng.random() < 0.3
            long = 60.0 * many if place % 3 else 0.0  # one of its subscriptions each minute
            manner = Manner(
                seed=0,
                subscriptions=max(1, many),
                reader=READERS[2 + place % 2] if place < holders else self._rng.choice(READERS),
                pause=self._rng.choice((0.01, 0.1, 0.5)) if slow else 0.0,
                stay=long if place < holders else self._rng.choice((0.0, 3.0, 30.0)),
                wide=0.01 if place < holders else 0.2,
            )
            self._start_subscriber(place, manner)
            if self._stopped:
                return
        with contextlib.suppress(TimeoutError):
            self._bus.wait_for_subscribers(max(options.subscriptions, subscribers), timeout=60.0)
        print(
            f"{subscribers} subscriber processes, of which {holders} have most subscriptions; {self._publishers} publishers; ",
            end="",
        )
        print(f"{self._topics} topics; {len(self._bus.stats().subscribers)} subscriptions", flush=True)
        for _ in range(self._publishers):
            self._start_publisher()

    def _start_subscriber(self, place: int, manner: Manner) -> None:
        manner.seed = self._rng.getrandbits(32)
        handed = []
        if manner.subscriptions == 1 and self._rng.random() < 0.3:  # subscribed to here, for it
            handed.append(Account.opened(self._bus, self._board, Wish.drawn(self._rng, self._topics, manner.wide)))
        self._start_process(subscribe_and_check, place, manner, handed, manner, handed)

    def _start_publisher(self) -> None:
        if self._next_publisher < self._places:
            place, self._next_publisher = self._next_publisher, self._next_publisher + 1
            rate = self._options.rate / self._publishers
            self._start_process(publish, place, None, [], self._rng.getrandbits(32), rate)

    def _start_process(self, target: Any, place: int, manner: Manner | None, handed: list[Account], *arguments: Any) -> None:
        mine, its = self._context.Pipe(duplex=False)
        process = self._context.Process(  # type: ignore[attr-defined]
            target=target, args=(self._bus, self._board, place, *arguments, its), daemon=True
        )
        process.start()
        its.close()
        self._members[mine] = _Member(process, mine, place, manner, handed)

    def _look(self, seconds: float) -> None:
        """Take in the reports of the processes, and start others instead of those that were killed."""
        for pipe in wait(list(self._members), seconds):
            assert isinstance(pipe, Connection)
            try:
                self._problem(pipe.recv())
            except (EOFError, OSError):
                self._ended(self._members.pop(pipe))

    def _ended(self, member: _Member) -> None:
        member.process.join(_PATIENCE)
        member.pipe.close()
        if member.process.exitcode and not member.killed:
            self._problem(f"process {member.process.pid} ended with exit code {member.process.exitcode}")
        member.process.close()
        if member.manner is None:
            self._board.since[member.place] = 0.0
        for account in member.handed:  # perhaps it was killed before it opened it
            self._bus.unsubscribe(account.channel)
            with contextlib.suppress(BroadcastError):  # then no process will, and what waits for it must not stay
                account.channel.poll(0)
                account.channel.close()
        if self._board.phase.value == RUN and not self._stopped:
            if member.manner is None:
                self._start_publisher()
            else:
                self._start_subscriber(member.place, member.manner)

    def _kill_one(self) -> None:
        subscribers = self._rng.random() < 0.85 or self._next_publisher >= self._places
        members = [one for one in self._members.values() if not one.killed and (one.manner is not None) == subscribers]
        if members:
            member = self._rng.choice(members)
            member.killed = True
            member.process.kill()
            self._kills += 1

    # --- the run

    def _go_on(self) -> None:
        options = self._options
        self._start = now = time.monotonic()
        end, report = now + options.seconds, now + options.every
        kill = now + self._pause_before_a_kill()
        while now < end and not self._stopped:
            self._look(max(0.0, min(end, report, kill, now + 0.2) - now))
            now = time.monotonic()
            if now >= kill:
                self._kill_one()
                kill = now + self._pause_before_a_kill()
            if now >= report:
                self._sample()
                report += options.every

    def _pause_before_a_kill(self) -> float:
        return self._rng.expovariate(self._options.kills) if self._options.kills else float("inf")

    def _sample(self) -> None:
        board, now = self._board, time.monotonic()
        sample = Sample(
            now, private_bytes([self._broker]), self._broker.num_fds(), sum(board.published), board.total(DELIVERED)
        )
        stats = self._bus.stats()
        for row in stats.subscribers:
            try:
                check_balance(row)
            except Broken as error:
                self._problem(str(error))
        last = self._samples[-1] if self._samples else Sample(self._start, 0, 0, 0, 0)
        seconds = now - last.at
        self._samples.append(sample)
        rows = len(stats.subscribers)
        waits = [time.monotonic() - since for since in board.since[:] if since and now - since > 0.1]
        print(
            f"{now - self._start:7.0f} s: {(sample.published - last.published) / seconds:,.0f} published/s, "
            f"{(sample.delivered - last.delivered) / seconds:,.0f} delivered/s; broker: {sample.memory / (1 << 20):,.1f} MiB, "
            f"{sample.files:,.0f} descriptors, {rows:,} subscriptions, {stats.memory / (1 << 20):,.1f} MiB "
            f"of messages; {len(waits)} publishers wait, up to {max(waits, default=0):.1f} s; {self._kills} killed",
            flush=True,
        )

    def _end_all(self) -> None:
        """Publishers first; when all has been routed, subscribers receive what is left, and draw their balances."""
        self._sample()
        board = self._board
        board.phase.value = DRAIN
        self._wait_for("publishers", lambda member: member.manner is None)
        deadline = time.monotonic() + _PATIENCE
        while self._bus.stats().publishers and time.monotonic() < deadline:
            self._look(0.05)  # until the broker has read what the killed ones have left
        board.flushed[:] = board.done[:]
        board.phase.value = END
        self._wait_for("subscribers", lambda member: True)
        deadline = time.monotonic() + 10.0
        while (more := self._broker.num_fds() - self._alone) > 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        self._emptied = private_bytes([self._broker])
        self._ran = seconds_on_cpu(self._broker.pid)
        self._left = [f"{more} descriptors in the broker"] if more > 0 else []
        if subscribers := self._bus.stats().subscribers:
            self._left.append(f"{len(subscribers)} subscriptions")

    def _wait_for(self, what: str, chosen: Any) -> None:
        deadline = time.monotonic() + _PATIENCE
        while late := [member for member in self._members.values() if chosen(member)]:
            if time.monotonic() > deadline:
                self._problem(f"{len(late)} {what} have not ended within {_PATIENCE} s: {[one.process.pid for one in late]}")
                for row in self._bus.stats().subscribers:
                    if row.stalls:
                        self._problem(f"waited for: {row}")
                return
            self._look(0.2)

    # --- the end

    def _problem(self, text: str) -> None:
        self._problems += 1
        print(f"WRONG: {text}", flush=True)


@contextlib.contextmanager
def _files() -> Iterator[int]:
    """As many descriptors as there may be, and how many that is."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not name
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield sys.maxsize if soft == resource.RLIM_INFINITY else soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _fit(options: argparse.Namespace, files: int) -> None:
    """Take fewer processes and subscriptions, where memory or descriptors are not enough, and print that."""
    memory = psutil.virtual_memory().available // 2
    processes = max(3, min(options.processes, memory // 2 // _MEMORY_OF_A_PROCESS))
    by_memory = memory // 2 // _MEMORY_OF_A_SUBSCRIPTION
    by_files = (files - _SPARE_FILES - _FILES_OF_A_PROCESS * processes) // 2
    subscriptions = max(1, min(options.subscriptions, by_memory, by_files))
    if processes < options.processes:
        print(f"{processes} processes, not {options.processes}: {memory >> 20} MiB of memory are to be had")
    if subscriptions < options.subscriptions:
        why = (
            f"a process may have {files:,} descriptors"
            if by_files < by_memory
            else f"{memory >> 20} MiB of memory are to be had"
        )
        print(f"{subscriptions} subscriptions, not {options.subscriptions}: {why}")
    options.processes, options.subscriptions = processes, subscriptions


def main(argv: Sequence[str] | None = None) -> int:
    """Load a broker, and report: the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long to publish (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=200, help="beside the broker; an eighth, and at most 16, publish (%(default)s)"
    )
    parser.add_argument("--subscriptions", type=int, default=5000, help="at any time (%(default)s)")
    parser.add_argument(
        "--rate", type=float, default=1000, help="messages a second that are aimed at, of all publishers (%(default)s)"
    )
    parser.add_argument(
        "--kills", type=float, default=0.5, help="processes that are killed each second, on average (%(default)s)"
    )
    parser.add_argument("--every", type=float, default=5, help="seconds between two lines (%(default)s)")
    parser.add_argument("--method", choices=multiprocessing.get_all_start_methods(), help="start method, if not Python's own")
    parser.add_argument("--seed", type=int, help="of what is drawn at random; what the system does is not")
    parser.add_argument("--smoke", action="store_true", help="2 seconds, few processes: shows that it runs")
    options = parser.parse_args(argv)
    if options.smoke:
        options.seconds, options.processes, options.subscriptions, options.kills, options.every = 2.0, 8, 40, 2.0, 0.5
    if min(options.seconds, options.every, options.rate, options.processes, options.subscriptions) <= 0 or options.kills < 0:
        parser.error("numbers must be greater than 0; --kills may be 0")
    context = multiprocessing.get_context(options.method)
    if context.get_start_method() != "fork":
        resource_tracker.ensure_running()  # it keeps a descriptor, which is not left behind
    if context.get_start_method() == "forkserver":
        forkserver.ensure_running()
    print("\n".join(machine(context)))
    with _files() as files:
        _fit(options, files)
        try:
            return _Load(options, context).run()
        except BroadcastError as error:
            print(f"WRONG: {error!r}")
            return 1


if __name__ == "__main__":
    sys.exit(main())
