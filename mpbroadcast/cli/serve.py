"""Start a broker and serve it until SIGTERM or SIGINT; then deliver what was published, and exit.

It prints one line when the broker is ready, and notifies systemd (Type=notify). If the broker dies, it is replaced.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys

from mpbroadcast.cli.addressing import DEFAULT, chosen
from mpbroadcast.cli.bridge_options import Interrupted
from mpbroadcast.cli.broker_options import add_broker_options, started
from mpbroadcast.cli.parsing import UsageError
from mpbroadcast.cli.systemd import notify
from mpbroadcast.posix.addresses import VARIABLE

EXAMPLE = "mpbroadcast serve myapp --history 1000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="ADDRESS",
        help=f"the broker's name, or a path with a slash (default: ${VARIABLE}, or {DEFAULT!r})",
    )
    parser.add_argument("--address", metavar="NAME", help="the same as ADDRESS")
    add_broker_options(parser)


def run(options: argparse.Namespace) -> int:
    if options.name is not None and options.address is not None:
        raise UsageError(f"two addresses, {options.name!r} and --address {options.address!r}: give one of them")
    address = chosen(options.address if options.name is None else options.name)
    # Blocked, so that each waits until it is looked at. The broker has a mask of its own.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        with started(options, address, (signal.SIGINT, signal.SIGTERM)) as bus:
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
