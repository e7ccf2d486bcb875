"""Serve a broker at ADDRESS, until SIGTERM or SIGINT comes; then deliver what there is, and end.

One line on standard output shows that it is ready. systemd is notified (Type=notify).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import socket
import sys

from mpbroadcast.cli.broker_options import add_broker_options, started

EXAMPLE = "mpbroadcast serve myapp --restart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="a name, or a path with a slash")
    add_broker_options(parser)


def run(options: argparse.Namespace) -> int:
    # Blocked, so that each waits until it is looked at. The broker has a mask of its own.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with started(options, options.address) as bus:
        (broker,) = multiprocessing.active_children()
        print(f"mpbroadcast: ready at {bus.address}", flush=True)
        _notify("READY=1")
        while signal.sigwait(signals) == signal.SIGCHLD:
            if not broker.is_alive():
                print(f"mpbroadcast: the broker at {bus.address!r} has ended", file=sys.stderr)
                return 1
        _notify("STOPPING=1")
    return 0


def _notify(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            notifier.sendall(state.encode())
