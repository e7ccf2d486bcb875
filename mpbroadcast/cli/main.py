"""The command line: the argument parser, and what each command's outcome means for the exit code.

A command is a module with ``add_arguments``, ``run`` and ``EXAMPLE``; the module's docstring is its description. What takes
long is imported in ``run``. That returns the exit code, or raises a :class:`BroadcastError`, ``OSError`` or ``ValueError``,
which is one line on standard error and exit code 1. argparse ends with 2 for a wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from mpbroadcast import BroadcastError, __version__
from mpbroadcast.cli import bench, bridge, completion, demo, output, pub, run, serve, stats, sub, top
from mpbroadcast.cli.addressing import add_address
from mpbroadcast.cli.parsing import Parser, UsageError, suggestion

COMMANDS = {
    "run": (run, "run a command with a broker: all that a web server needs"),
    "serve": (serve, "serve a broker for programs and shells"),
    "bridge": (bridge, "link the broker with those of other machines"),
    "pub": (pub, "publish messages, lines or files"),
    "sub": (sub, "print what is published"),
    "top": (top, "show subscriptions and publishers as they change"),
    "stats": (stats, "print one snapshot"),
    "bench": (bench, "measure this machine"),
    "completion": (completion, "print a script that completes this command in a shell"),
    "demo": (demo, "publish a tree of source files to CPU-bound workers"),
}
_DESCRIPTION: Final = "Publish/subscribe between the processes of one machine."
_EXAMPLES: Final = """\
examples:
  mpbroadcast run uvicorn app:app --workers 4    connect() in each worker works

  mpbroadcast serve                              in one terminal: a broker
  mpbroadcast sub                                in another: print messages
  mpbroadcast pub room:1 hello                   in a third: publish one

mpbroadcast COMMAND --help shows the options of a command."""
_CLIENTS = {"bridge", "pub", "sub", "top", "stats"}  # commands that connect to a broker


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the words before the command, and those of the commands."""
    listed = "".join(f"  {name:<12}{summary}\n" for name, (_, summary) in COMMANDS.items())
    parser = Parser(
        prog="mpbroadcast",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listed}\n{_EXAMPLES}",
    )
    parser.add_argument("--version", action="version", version=f"mpbroadcast {__version__}")
    commands: dict[str, Parser] = {}
    for name, (module, _) in COMMANDS.items():
        example = f"example: {module.EXAMPLE}"
        command = commands[name] = Parser(prog=f"{parser.prog} {name}", description=module.__doc__, epilog=example)
        module.add_arguments(command)
        if name in _CLIENTS:
            add_address(command)
        command.set_defaults(command=name, run=module.run, parsers=commands)
    return parser, commands


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, Parser]:
    """Return the options of a command line, and the parser of its command.

    :raises SystemExit: the usage is wrong, or it asks for a help text or the version.
    """
    parser, commands = _parsers()
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    name, *rest = words
    if name in ("-h", "--help", "--version"):
        parser.parse_args([name])
    if name not in commands:
        kind, near = ("option", ("--help", "--version")) if name.startswith("-") else ("command", commands)
        parser.error(f"unknown {kind} {name!r}{suggestion(name, near)}")
    return commands[name].parse(rest), commands[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (``sys.argv`` by default) and return the exit code."""
    output.prepare()
    try:
        options, parser = parse(sys.argv[1:] if argv is None else argv)
        try:
            return int(options.run(options))
        except UsageError as error:
            parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of standard output: what has read it has ended
        return 0
    except (BroadcastError, OSError, ValueError) as error:  # ValueError: an argument that makes no sense
        output.warn(str(error).partition("\n")[0])
        return 1
