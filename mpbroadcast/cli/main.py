"""The command line: the argument parser, and what each command's outcome means for the exit code.

A command is a module with ``add_arguments``, ``run`` and ``EXAMPLE``; the module's docstring is its description. What takes
long is imported in ``run``. That returns the exit code, or raises a :class:`BroadcastError`, which is one line on standard
error and exit code 1. argparse ends with 2 for a wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from mpbroadcast import BroadcastError
from mpbroadcast.cli import demo, run, serve

_COMMANDS = {
    "run": (run, "run a command beside a broker"),
    "serve": (serve, "serve a broker at an address"),
    "demo": (demo, "publish a tree of source files to CPU-bound workers"),
}


def _version() -> str:
    try:
        return importlib.metadata.version("mpbroadcast")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpbroadcast", description="Broadcast to processes.")
    parser.add_argument("--version", action="version", version=f"mpbroadcast {_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in _COMMANDS.items():
        example = f"example: {module.EXAMPLE}"
        command = commands.add_parser(name, help=summary, description=module.__doc__, epilog=example)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (``sys.argv`` by default) and return the exit code."""
    try:
        options = _parser().parse_args(argv)
        return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BroadcastError as error:
        print("mpbroadcast:", *str(error).split("\n", 1)[:1], file=sys.stderr)
        return 1
