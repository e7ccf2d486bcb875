"""A worker of the demo: a digest of all that it receives, in its order, and one job of its own."""

from __future__ import annotations

import ast
import hashlib
import keyword
import re
import signal
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

from mpbroadcast import Channel

_KEYWORDS = frozenset(keyword.kwlist)

Text = tuple[str, str]  # what is published: a file's name and its text


@dataclass(frozen=True, slots=True)
class Job:
    """The task of a worker: ``count`` looks at one file, ``answer`` at the sum over all of them."""

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
        with warnings.catch_warnings(action="ignore"):  # about escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a template, for one, or another language version
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
    """A sum of all that was received so far: how much, and a digest of all of it in its order."""

    messages: int = 0
    size: int = 0
    order: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, name: str, text: str) -> None:
        data = text.encode()
        self.messages += 1
        self.size += len(data)
        self.order.update(f"{name}\0{len(data)}\0".encode() + data)


class Report(NamedTuple):
    """A worker's message to its parent: now and then while it works, and once at the end, with its answer."""

    worker: int
    messages: int
    size: int
    seconds: float
    digest: str
    answer: str | None


def work(worker: int, channel: Channel[Text], results: Connection) -> None:
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
    with suppress(BrokenPipeError):  # the parent has gone, and the broker with it
        for name, text in channel:
            tally.add(name, text)
            counts.update(job.count(name, text))
            if time.monotonic() >= due:
                report(None)
                due = time.monotonic() + 0.1
        report(job.answer(counts))
