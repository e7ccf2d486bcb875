"""Link the broker with those of other machines through an engine: a Redis server (redis://HOST/0) or NATS (nats://HOST).

It prints one line when it is connected. On SIGTERM or SIGINT it sends what is left in the outbox, and exits.
"""

from __future__ import annotations

import argparse
import signal
import time
from typing import Final

from mpbroadcast.bridge import forget_bridge
from mpbroadcast.cli import output
from mpbroadcast.cli.addressing import reached
from mpbroadcast.cli.bridge_options import Interrupted, add_bridge_options, interruptibly, linked
from mpbroadcast.cli.systemd import notify
from mpbroadcast.cli.text import encode, one_line

EXAMPLE = "mpbroadcast bridge redis://db/0 --topics 'room:*' --address myapp"

_LOOK: Final = 0.25  # seconds from one look at the bridge to the next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.usage = "%(prog)s [URL] [--topics T...] [OPTIONS]\n       %(prog)s --forget STREAM [--address NAME]"
    parser.add_argument("url", nargs="?", metavar="URL", help="URL of the engine (default: $MPBROADCAST_BRIDGE_URL)")
    add_bridge_options(parser)
    parser.add_argument("--forget", metavar="STREAM", help="drop what the broker keeps for a bridge, and exit")


def run(options: argparse.Namespace) -> int:
    """Run the bridge until a signal comes or the broker has gone, and return the exit code."""
    signals = (signal.SIGINT, signal.SIGTERM)
    with reached(options.address) as bus:
        if options.forget is not None:
            if forget_bridge(bus, options.forget):
                return 0
            raise ValueError(f"the broker at {bus.address!r} keeps nothing for a bridge of the stream {options.forget!r}")
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # and so each waits until it is looked at
        try:
            link = linked(bus, options.url, options, signals)
            output.write(encode(one_line(f"mpbroadcast: ready, {link!r} for {bus.address}") + "\n"))
            notify("READY=1")
        except Interrupted:
            return 0

        def watch() -> None:
            while link.alive:
                time.sleep(_LOOK)

        try:
            interruptibly(signals, watch)
        except Interrupted:
            notify("STOPPING=1")
            link.close(forget=False)
            return 0
        output.warn(f"the broker at {bus.address!r} has gone, and so the bridge has ended")
    return 1
