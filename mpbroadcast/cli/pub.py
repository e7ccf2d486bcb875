"""Publish each MESSAGE as a str. Without MESSAGE, publish each line of standard input as soon as it arrives."""

from __future__ import annotations

import argparse
import json
import os
import select
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from mpbroadcast import Broadcaster
from mpbroadcast.cli import output
from mpbroadcast.cli.addressing import reached
from mpbroadcast.cli.parsing import UsageError
from mpbroadcast.cli.progress import Progress
from mpbroadcast.cli.text import decode

EXAMPLE = "mpbroadcast pub room:1 hello"

_BLOCK: Final = 1 << 18  # bytes of one read: a pipe gives what it has


class NotJson(Exception):
    """A line or a message that is not JSON."""


class Splitter:
    """Cuts what is read into lines. What comes behind the last separator waits for the next block."""

    def __init__(self, separator: bytes) -> None:
        self._separator = separator
        self._rest: list[bytes] = []

    def lines(self, block: bytes) -> list[str]:
        """Return the lines that end in this block."""
        whole, separator, rest = block.rpartition(self._separator)
        if not separator:
            self._rest.append(block)
            return []
        text = decode(b"".join((*self._rest, whole)))
        self._rest = [rest] if rest else []
        return text.split(self._separator.decode())

    def last(self) -> list[str]:
        """Return the last line, if there is one without a separator."""
        rest = b"".join(self._rest)
        return [decode(rest)] if rest else []


def parse_json(lines: Iterable[str], first: int, what: str = "line") -> Iterator[Any]:
    """Yield the value of each line; ``first`` is the number of the first one, ``what`` its name in an error.

    :raises NotJson: a line is not JSON.
    """
    for number, line in enumerate(lines, first):
        try:
            line.encode()  # no bytes that are no UTF-8
            value = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            raise NotJson(f"{what} {number} is not JSON: {reason}") from None
        yield value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("topic", nargs="?", default="", metavar="TOPIC", help="the topic of each message (default: none)")
    parser.add_argument("messages", nargs="*", metavar="MESSAGE", help="what to publish, instead of standard input")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="each message or line is a JSON value")
    form.add_argument("--file", nargs="+", metavar="FILE", help="publish the bytes of each file, instead of lines")
    parser.add_argument("-0", "--null", action="store_true", help="lines end in NUL, as those of find -print0 do")


def run(options: argparse.Namespace) -> int:
    """Publish what the options name, and return the exit code."""
    if options.file and options.null:
        raise UsageError("-0 is about lines, and --file publishes whole files")
    if options.messages and (options.file or options.null):
        name = "--file publishes files" if options.file else "-0 is about the lines of standard input"
        raise UsageError(f"{name}: give either that or MESSAGE")
    topic = decode(os.fsencode(options.topic))
    with reached(options.address) as bus:
        try:
            if options.messages:
                _publish_messages(bus, topic, options.messages, as_json=options.json)
            elif options.file:
                _publish_files(bus, topic, options.file)
            else:
                _publish_lines(bus, topic, b"\0" if options.null else b"\n", as_json=options.json)
        except NotJson as error:
            output.warn(str(error))
            return 1
        bus.flush()
    return 0


def _publish_messages(bus: Broadcaster[Any], topic: str, words: list[str], *, as_json: bool) -> None:
    messages = [decode(os.fsencode(word)) for word in words]
    bus.publish_many(parse_json(messages, 1, "message") if as_json else messages, topic=topic)


def _publish_files(bus: Broadcaster[Any], topic: str, names: list[str]) -> None:
    paths = [Path(name) for name in names]
    with Progress(sum(path.stat().st_size for path in paths if path.is_file())) as progress:
        for path in paths:
            data = path.read_bytes()
            bus.publish(data, topic=topic)
            progress.add(1, len(data))


def _publish_lines(bus: Broadcaster[Any], topic: str, separator: bytes, *, as_json: bool) -> None:
    splitter = Splitter(separator)
    count = 0
    with Progress(_length_of_input()) as progress:
        while block := _read():
            lines = splitter.lines(block)
            bus.publish_many(parse_json(lines, count + 1) if as_json else lines, topic=topic)
            count += len(lines)
            progress.add(len(lines), len(block))
        last = splitter.last()
        bus.publish_many(parse_json(last, count + 1) if as_json else last, topic=topic)
        progress.add(len(last), 0)


def _read() -> bytes:
    """Return what standard input has, at least one byte; nothing at its end."""
    while True:
        try:
            return os.read(0, _BLOCK)
        except BlockingIOError:  # another process has made it non-blocking
            select.select([0], [], [])


def _length_of_input() -> int:
    """Return how many bytes standard input has; 0 if that is not known."""
    status = os.fstat(0)
    return max(0, status.st_size - os.lseek(0, 0, os.SEEK_CUR)) if stat.S_ISREG(status.st_mode) else 0
