"""Show subscriptions, publishers, groups and bridges as they change, until q or Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
from typing import Any

from mpbroadcast import Broadcaster, BrokerStats
from mpbroadcast.cli import output
from mpbroadcast.cli.addressing import reached
from mpbroadcast.cli.figures import figures, report
from mpbroadcast.cli.text import encode, json_line

EXAMPLE = "mpbroadcast top --address myapp --interval 2"

_EXTRA = "pip install 'mpbroadcast[cli]' shows this on a full screen, with keys to sort, filter and scroll"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="seconds between updates (default: 1)")
    parser.add_argument("--once", action="store_true", help="print the figures of one interval as text, and exit")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line and interval")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.05 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.05 to 86400")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Show the figures until the user or the reader of the output ends it. Return the exit code."""
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError), reached(options.address) as bus:
        if options.once or options.json or not _is_screen():
            _print(bus, options)
        elif importlib.util.find_spec("rich") is None:
            output.warn(_EXTRA)
            _print(bus, options)
        else:
            from mpbroadcast.cli.screen import show

            show(bus, options.interval)
    return 0


def _is_screen() -> bool:
    """Return whether there is a terminal on both sides, and it can do more than print lines."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def _print(bus: Broadcaster[Any], options: argparse.Namespace) -> None:
    """Print the figures of each interval, or of one."""
    from mpbroadcast.cli.processes import Processes  # and psutil, which the other commands do not need

    processes = Processes()
    before: BrokerStats = bus.stats()
    while True:
        output.wait(None, options.interval)
        now = bus.stats()
        whole = figures(now, before, processes.of(now))
        if options.json:
            output.write(json_line(whole))
        else:
            lines = report(whole, bus.address, shutil.get_terminal_size((120, 24)).columns)
            output.write(encode("".join(f"{line}\n" for line in [*lines, *([] if options.once else [""])])))
        if options.once:
            return
        before = now
