"""Options of the commands that start a broker."""

from __future__ import annotations

import argparse
from typing import Any

from mpbroadcast import Broadcaster
from mpbroadcast.client.api import start_apart


def add_broker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--history", type=_count, default=0, metavar="N", help="messages of each topic that are kept for replay"
    )
    parser.add_argument("--restart", action="store_true", help="replace the broker when it dies")


def started(options: argparse.Namespace, address: str | None) -> Broadcaster[Any]:
    """Start a broker at ``address``, with these options; it ends with this process, and by no signal."""
    return start_apart(address=address, history=options.history, restart=options.restart)


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return count
