"""Serve a broker at ADDRESS, until SIGTERM or SIGINT comes; then deliver what there is, and end.

One line on standard output shows that it is ready. systemd is notified (Type=notify).
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys

from mpbroadcast.cli.bridge_options import Interrupted
from mpbroadcast.cli.broker_options import add_broker_options, started
from mpbroadcast.cli.systemd import notify

EXAMPLE = "mpbroadcast serve myapp --restart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="a name, or a path with a slash")
    add_broker_options(parser)


def run(options: argparse.Namespace) -> int:
    # Blocked, so that each waits until it is looked at. The broker has a mask of its own.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        with started(options, options.address, (signal.SIGINT, signal.SIGTERM)) as bus:
            (broker,) = multiprocessing.active_children()
            print(f"mpbroadcast: ready at {bus.address}", flush=True)
            notify("READY=1")
            while signal.sigwait(signals) == signal.SIGCHLD:
                if not broker.is_alive():
                    print(f"mpbroadcast: the broker at {bus.address!r} has ended", file=sys.stderr)
                    return 1
            notify("STOPPING=1")
    except Interrupted:
        pass
    return 0
