"""The command line: ``python -m mpbroadcast demo`` fans real files out to CPU-bound worker processes.

The parent subscribes for its workers before it starts them, hands each its channel, and publishes every file once. Each
worker computes something different, and a running digest over all that it received, in the order in which it came:
equal digests are the proof that all saw the same messages in the same order.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import keyword
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from mpbroadcast.client.api import start_broadcaster
from mpbroadcast.client.broadcaster import Broadcaster
from mpbroadcast.client.channel import Channel
from mpbroadcast.client.selector import Selector
from mpbroadcast.errors import BroadcastError

# Small, so that the slowest worker sets the pace and memory stays bounded, however large the tree is.
_CAPACITY = 1 << 20
_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_KEYWORDS = frozenset(keyword.kwlist)

Text = tuple[str, str]  # what is published: a file's name and its text


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker computes: ``count`` looks at one file, ``answer`` at the sum over all of them."""

    title: str
    count: Callable[[str, str], dict[str, int]]
    answer: Callable[[Counter[str]], str]


def _count_lines(name: str, text: str) -> dict[str, int]:
    lines = text.splitlines()
    return {"all": len(lines), "blank": sum(not line.strip() for line in lines)}


def _count_words(name: str, text: str) -> dict[str, int]:
    return Counter(re.findall(r"\w+", text))


def _count_nodes(name: str, text: str) -> dict[str, int]:
    try:
        with warnings.catch_warnings(action="ignore"):  # what the parser thinks of an escape in somebody's string
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a template, say, or another language version
        return {}
    return Counter(type(node).__name__ for node in ast.walk(tree))


def _count_digests(name: str, text: str) -> dict[str, int]:
    return {hashlib.sha256(text.encode()).hexdigest(): 1}


def _count_longest(name: str, text: str) -> dict[str, int]:
    return {name: max(map(len, text.splitlines()), default=0)}


def _count_identifiers(name: str, text: str) -> dict[str, int]:
    return Counter(word for word in re.findall(r"\b[^\W\d]\w*", text) if word not in _KEYWORDS)


def _count_packed(name: str, text: str) -> dict[str, int]:
    data = text.encode()
    return {"raw": len(data), "packed": len(zlib.compress(data))}


def _count_imports(name: str, text: str) -> dict[str, int]:
    return Counter(re.findall(r"^\s*(?:from|import)\s+(\w+)", text, re.MULTILINE))


def _top(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common(3)) or "none"


def _answer_lines(counts: Counter[str]) -> str:
    return f"{counts['all']:,} lines, {counts['blank']:,} of them blank"


def _answer_words(counts: Counter[str]) -> str:
    return f"{counts.total():,} words, {len(counts):,} different"


def _answer_digests(counts: Counter[str]) -> str:
    return f"{len(counts):,} different files, {counts.total() - len(counts):,} copies"


def _answer_packed(counts: Counter[str]) -> str:
    return f"{counts['raw']:,} bytes, zlib leaves {counts['packed'] / max(counts['raw'], 1):.1%}"


JOBS = (
    Job("AST nodes", _count_nodes, _top),
    Job("words", _count_words, _answer_words),
    Job("identifiers", _count_identifiers, _top),
    Job("compression", _count_packed, _answer_packed),
    Job("imports", _count_imports, _top),
    Job("longest line", _count_longest, lambda counts: ", ".join(f"{n}: {c:,}" for n, c in counts.most_common(1))),
    Job("lines", _count_lines, _answer_lines),
    Job("SHA-256", _count_digests, _answer_digests),
)


@dataclass(slots=True)
class Tally:
    """What has been seen so far: how much, and a digest of all of it in its order."""

    messages: int = 0
    size: int = 0
    order: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, name: str, text: str) -> None:
        data = text.encode()
        self.messages += 1
        self.size += len(data)
        self.order.update(f"{name}\0{len(data)}\0".encode() + data)


class Report(NamedTuple):
    """What a worker tells its parent: now and then on the way, and once at the end, with its answer."""

    worker: int
    messages: int
    size: int
    seconds: float
    digest: str
    answer: str | None


def _work(worker: int, channel: Channel[Text], results: Connection) -> None:
    """The worker process: receive until the end, compute, report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    job = JOBS[worker % len(JOBS)]
    counts: Counter[str] = Counter()
    tally = Tally()
    due = 0.0

    def report(answer: str | None) -> None:
        digest = tally.order.hexdigest()
        results.send(Report(worker, tally.messages, tally.size, time.process_time() - start, digest, answer))

    start = time.process_time()
    with suppress(BrokenPipeError):  # the parent has gone, and the broker with it: nobody is left to tell
        for name, text in channel:
            tally.add(name, text)
            counts.update(job.count(name, text))
            if time.monotonic() >= due:
                report(None)
                due = time.monotonic() + 0.1
        report(job.answer(counts))


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
            process = multiprocessing.Process(target=_work, args=(worker, channel, send_end))
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
        """Make this call, which waits for the slowest worker, and listen to the workers meanwhile."""
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
        """Whether all workers that were left alone saw what was published, in its order, and how to say it."""
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


def demo(root: Path, *, workers: int, kill: bool) -> int:
    """Run the demonstration and print what came of it; return the exit code."""
    paths = source_files(root)
    if not paths:
        return _usage_error(f"there is no Python source file below {root}")
    start = time.monotonic()
    bus: Broadcaster[Text] = start_broadcaster()
    processes: list[BaseProcess] = []
    try:
        run = _Demo(bus, workers, root, paths, processes)
        run.start()
        run.run(kill=kill)
    except BaseException:
        with _interrupts_held():
            for process in processes:
                process.kill()
                process.join()
            bus.close(timeout=0)
        raise
    bus.close()
    seconds = time.monotonic() - start
    same, proof = run.proof()
    print(run.table())
    print(f"{run.published.messages:,} files, {run.published.size:,} bytes from {root} in {seconds:.1f} s")
    print(proof)
    return 0 if same else 1


def _usage_error(message: str) -> int:
    print(f"mpbroadcast: {message}", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return importlib.metadata.version("mpbroadcast")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mpbroadcast", description="Broadcast to processes.")
    parser.add_argument("--version", action="version", version=f"mpbroadcast {_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="publish a tree of source files to CPU-bound workers", description=__doc__)
    command.add_argument("--workers", type=int, default=len(JOBS), metavar="N", help="worker processes (default: %(default)s)")
    command.add_argument("--path", metavar="DIR", help="the tree to read (default: Python's standard library)")
    command.add_argument("--kill", action="store_true", help="SIGKILL one worker half-way, and see the rest go on")
    options = parser.parse_args(argv)

    root = Path(options.path if options.path is not None else sysconfig.get_path("stdlib"))
    if not root.is_dir():
        return _usage_error(f"--path {root}: there is no such directory")
    if options.workers < 1:
        return _usage_error(f"--workers must be at least 1, not {options.workers}")
    if options.kill and options.workers < 2:
        return _usage_error("--kill needs at least 2 workers: one to kill, and one to see that it goes on")
    return demo(root, workers=options.workers, kill=options.kill)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (``sys.argv`` by default) and return the exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BroadcastError as error:
        print(f"mpbroadcast: {error}", file=sys.stderr)
        return 1
