"""Options of the commands that start a broker."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Collection, Iterator
from typing import Any

from mpbroadcast import Broadcaster
from mpbroadcast.cli.bridge_options import add_bridge, check_bridge, linked
from mpbroadcast.client.api import start_apart


def add_broker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--history", type=_count, default=0, metavar="N", help="messages to keep for replay, for each topic (default: 0)"
    )
    parser.add_argument("--no-restart", dest="restart", action="store_false", help="do not replace the broker if it dies")
    parser.add_argument("--restart", action="store_true", default=True, help=argparse.SUPPRESS)  # the default
    add_bridge(parser)


@contextlib.contextmanager
def started(
    options: argparse.Namespace, address: str | None, signals: Collection[signal.Signals]
) -> Iterator[Broadcaster[Any]]:
    """Start a broker at ``address``, with these options, and its bridge. Both end with this process, and by no signal.

    :raises Interrupted: one of the signals, which are blocked, has come before the bridge was ready.
    """
    check_bridge(options)
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(start_apart(address=address, history=options.history, restart=options.restart))
        if options.bridge is not None:
            stack.enter_context(linked(bus, options.bridge, options, signals))
        yield bus


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return count
