"""Publish the files of a tree to CPU-bound worker processes.

The parent subscribes for its workers before it starts them, hands each its channel, and publishes every file once. Each
worker computes something different, and a digest of everything it received, in order: equal digests prove that all workers
saw the same messages in the same order.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from mpbroadcast import Broadcaster, BroadcastError, Channel, Selector, start_broadcaster
from mpbroadcast.cli.demo_worker import JOBS, Report, Tally, Text, work

EXAMPLE = "mpbroadcast demo"

# Small, so that the slowest worker sets the pace and memory stays bounded, however large the tree is.
_CAPACITY = 1 << 20
_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class _Progress:
    """One line on standard error, rewritten in place on a terminal, and now and then a line anywhere else."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._due = 0.0
        self._start = time.monotonic()

    def show(self, text: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if now < self._due and not last:
            return
        self._due = now + (0.1 if self._live else 1.0)
        line = f"{text}, {now - self._start:.1f} s"
        if self._live:
            sys.stderr.write(f"\r{line:<79}" + "\n" * last)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back, for this process and for what it starts meanwhile, so that no half-started worker sees it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Demo:
    """One run: the workers, what they have reported, and what was published to them."""

    def __init__(
        self, bus: Broadcaster[Text], workers: int, root: Path, paths: Sequence[Path], processes: list[BaseProcess]
    ) -> None:
        self.bus = bus
        self.published = Tally()
        self.reports: dict[int, Report] = {}
        self.victim: int | None = None
        self.channels: list[Channel[Text]] = [bus.subscribe(capacity=_CAPACITY) for _ in range(workers)]
        self.processes = processes
        self._root = root
        self._paths = paths
        self._files_done = 0
        self._results: Selector[Report] = Selector()
        self._progress = _Progress()

    def start(self) -> None:
        for worker, channel in enumerate(self.channels):
            results, send_end = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(target=work, args=(worker, channel, send_end))
            with _interrupts_held():
                process.start()
                self.processes.append(process)
            send_end.close()  # the worker has the only one: its death ends the pipe
            self._results.select(results)

    def run(self, *, kill: bool) -> None:
        half = max(len(self._paths) // 2, 1)
        for done, path in enumerate(self._paths, 1):
            name = os.fsencode(path.relative_to(self._root)).decode(errors="replace")
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                print(f"skipped {path}: {error.strerror}", file=sys.stderr)
            else:
                self._until_done(partial(self.bus.publish, (name, text)))
                self.published.add(name, text)
            self._files_done = done
            self._show()
            if kill and done == half:
                self._kill(len(self.processes) - 1)
        self._until_done(self.bus.flush)
        for channel in self.channels:
            self.bus.unsubscribe(channel)  # what has been routed arrives before the end does
        while self._collect(timeout=0.1):
            self._show()
        self._show(last=True)
        for process in self.processes:
            process.join()

    def _until_done(self, call: Callable[..., None]) -> None:
        """Make this call, which waits for the slowest worker, and receive the workers' reports meanwhile."""
        waiting = True
        while waiting:
            with suppress(TimeoutError):
                call(timeout=0.1)
                waiting = False
            self._collect(timeout=0)
            self._show()

    def _collect(self, timeout: float) -> bool:
        """Take in the reports that are there; False when every worker has ended."""
        try:
            while True:
                report = self._results.receive(timeout=timeout)
                self.reports[report.worker] = report
                timeout = 0
        except TimeoutError:
            return True
        except EOFError:
            return False

    def _show(self, *, last: bool = False) -> None:
        size = self.published.size / 1e6
        seen = [self.reports[n].messages if n in self.reports else 0 for n in self._survivors()]
        done, total = self._files_done, len(self._paths)
        text = f"published {done:,} of {total:,} files, {size:.1f} MB, slowest of {len(seen)} workers at {min(seen):,}"
        self._progress.show(text, last=last)

    def _survivors(self) -> list[int]:
        return [worker for worker in range(len(self.channels)) if worker != self.victim]

    def _kill(self, worker: int) -> None:
        """SIGKILL this worker, once it is at work, and see its subscription go."""
        process = self.processes[worker]
        while worker not in self.reports and process.is_alive():
            self._collect(timeout=0.1)
        before = len(self.bus.stats().subscribers)
        self.victim = worker
        process.kill()
        start = time.monotonic()
        while any(s.pid == process.pid for s in self.bus.stats().subscribers):
            if time.monotonic() > start + 1:
                raise BroadcastError(f"the subscription of worker {worker}, which was killed, is still there")
            time.sleep(0.001)
        took = time.monotonic() - start
        after = len(self.bus.stats().subscribers)
        print(
            f"killed worker {worker} with SIGKILL after {self.published.messages:,} files were published; "
            f"its subscription was gone within {took * 1000:.0f} ms ({before} subscribers before, {after} after)"
        )

    def table(self) -> str:
        rows = [("worker", "computes", "messages", "bytes", "messages/s*", "answer")]
        for worker, process in enumerate(self.processes):
            report = self.reports.get(worker, Report(worker, 0, 0, 0.0, "", None))
            answer = report.answer
            if worker == self.victim:
                answer = "killed half-way (what it last reported)"
            elif answer is None:
                answer = f"failed with exit code {process.exitcode}"
            rate = f"{report.messages / report.seconds:,.0f}" if report.seconds else "-"
            title = JOBS[worker % len(JOBS)].title
            rows.append((str(worker), title, f"{report.messages:,}", f"{report.size:,}", rate, answer))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{a:>{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e:>{widths[4]}}  {f}"
            for a, b, c, d, e, f in rows
        ]
        return "\n".join([*lines, "* in a second of the worker's own CPU time"])

    def proof(self) -> tuple[bool, str]:
        """Return whether all workers that were left alone received what was published, in its order, and the text for it."""
        survivors = self._survivors()
        digest = self.published.order.hexdigest()
        seen = {worker: self.reports[worker].digest for worker in survivors if worker in self.reports}
        finished = all(w in self.reports and self.reports[w].answer is not None for w in survivors)
        if finished and set(seen.values()) == {digest}:
            same = f"saw the same {self.published.messages:,} messages in the same order"
            return True, f"All {len(survivors)} workers {same}, digest {digest}"
        lines = [f"  worker {worker}: {seen.get(worker, 'no report')}" for worker in survivors]
        return False, "\n".join(["The workers did NOT see the same messages:", f"  published: {digest}", *lines])


def source_files(root: Path) -> list[Path]:
    """All ``*.py`` files below ``root`` in a fixed order, without tests and installed packages."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".py")]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--workers", type=int, default=len(JOBS), metavar="N", help="worker processes (default: %(default)s)")
    parser.add_argument("--path", metavar="DIR", help="the tree to read (default: Python's standard library)")
    parser.add_argument("--kill", action="store_true", help="SIGKILL one worker half-way, and see the rest go on")


def run(options: argparse.Namespace) -> int:
    """Run the demonstration, print its outcome, and return the exit code."""
    root = Path(options.path if options.path is not None else sysconfig.get_path("stdlib"))
    if not root.is_dir():
        return _usage_error(f"--path {root}: there is no such directory")
    if options.workers < 1:
        return _usage_error(f"--workers must be at least 1, not {options.workers}")
    if options.kill and options.workers < 2:
        return _usage_error("--kill needs at least 2 workers: one to kill, and one to see that it goes on")
    paths = source_files(root)
    if not paths:
        return _usage_error(f"there is no Python source file below {root}")
    start = time.monotonic()
    bus: Broadcaster[Text] = start_broadcaster()
    processes: list[BaseProcess] = []
    try:
        demo = _Demo(bus, options.workers, root, paths, processes)
        demo.start()
        demo.run(kill=options.kill)
    except BaseException:
        with _interrupts_held():
            for process in processes:
                process.kill()
                process.join()
            bus.close(timeout=0)
        raise
    bus.close()
    seconds = time.monotonic() - start
    same, proof = demo.proof()
    print(demo.table())
    print(f"{demo.published.messages:,} files, {demo.published.size:,} bytes from {root} in {seconds:.1f} s")
    print(proof)
    return 0 if same else 1


def _usage_error(message: str) -> int:
    print(f"mpbroadcast: {message}", file=sys.stderr)
    return 2
