"""Print one snapshot of the broker: subscriptions, publishers, groups and bridges."""

from __future__ import annotations

import argparse
import dataclasses
import shutil

from mpbroadcast.cli import output
from mpbroadcast.cli.addressing import reached
from mpbroadcast.cli.figures import figures, report
from mpbroadcast.cli.prometheus import exposition
from mpbroadcast.cli.text import encode, json_line

EXAMPLE = "mpbroadcast stats --json --address myapp | jq .published"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object, with the fields of BrokerStats")
    form.add_argument("--prometheus", action="store_true", help="print Prometheus' text format")


def run(options: argparse.Namespace) -> int:
    """Print the snapshot, and return the exit code."""
    with reached(options.address) as bus:
        stats = bus.stats()
        if options.json:
            output.write(json_line(dataclasses.asdict(stats)))
        elif options.prometheus:
            output.write(encode(exposition(stats)))
        else:
            from mpbroadcast.cli.processes import Processes  # and psutil, which the other forms do not need

            whole = figures(stats, None, Processes().of(stats))
            lines = report(whole, bus.address, shutil.get_terminal_size((120, 24)).columns)
            output.write(encode("".join(f"{line}\n" for line in lines)))
    return 0
