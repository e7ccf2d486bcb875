"""The command line: the argument parser, and what each command's outcome means for the exit code.

A command is a module with ``add_arguments``, ``run`` and ``EXAMPLE``; the module's docstring is its description. What takes
long is imported in ``run``. That returns the exit code, or raises a :class:`BroadcastError`, ``OSError`` or ``ValueError``,
which is one line on standard error and exit code 1. argparse ends with 2 for a wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mpbroadcast import BroadcastError, __version__
from mpbroadcast.cli import bench, bridge, completion, demo, output, pub, run, serve, stats, sub, top

COMMANDS = {
    "run": (run, "run a command beside a broker"),
    "serve": (serve, "serve a broker at an address"),
    "bridge": (bridge, "link the broker with those of other machines"),
    "pub": (pub, "publish lines, JSON values or files"),
    "sub": (sub, "print what is published"),
    "top": (top, "show subscriptions and publishers as they change"),
    "stats": (stats, "print one snapshot"),
    "bench": (bench, "measure this machine"),
    "completion": (completion, "print a script that completes this command in a shell"),
    "demo": (demo, "publish a tree of source files to CPU-bound workers"),
}
_CLIENTS = {"bridge", "pub", "sub", "top", "stats"}  # commands that connect to a broker


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mpbroadcast", usage="%(prog)s [-h] [--version] COMMAND ...", description="Broadcast to processes."
    )
    parser.add_argument("--version", action="version", version=f"mpbroadcast {__version__}")
    commands = parser.add_subparsers(dest="command", prog=parser.prog, required=True)
    for name, (module, summary) in COMMANDS.items():
        example = f"example: {module.EXAMPLE}"
        command = commands.add_parser(name, help=summary, description=module.__doc__, epilog=example)
        module.add_arguments(command)
        if name in _CLIENTS:
            command.add_argument("--address", metavar="NAME", help="the broker's name or path (default: $MPBROADCAST_ADDRESS)")
        command.set_defaults(run=module.run, parsers=commands.choices)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (``sys.argv`` by default) and return the exit code."""
    output.prepare()
    try:
        options = whole_parser().parse_args(argv)
        return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of standard output: what has read it has ended
        return 0
    except (BroadcastError, OSError, ValueError) as error:  # ValueError: an argument that makes no sense
        output.warn(str(error).partition("\n")[0])
        return 1
