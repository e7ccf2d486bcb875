"""Options of the commands that link the broker with those of other machines, and the start of the bridge."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

from mpbroadcast import Broadcaster, BroadcastError, StartError
from mpbroadcast.bridge import Bridge, EngineRefused, bridge
from mpbroadcast.bridge.keys import keys_of
from mpbroadcast.cli import output
from mpbroadcast.cli.parsing import one_of, size

T = TypeVar("T")

_PATIENCE: Final = 2.0  # seconds until the command prints that it waits for the engine
_POLICIES: Final = ("drop_oldest", "drop_newest", "block")
_OPTIONS: Final = (
    ("--topics", {"nargs": "+", "action": "extend", "metavar": "T"}, "topics or patterns like 'room:*' (default: everything)"),
    ("--stream", {"metavar": "S"}, "stream name, the same on all machines (default: mpbroadcast)"),
    ("--key-file", {"metavar": "F"}, "file with one key per line (default: $MPBROADCAST_BRIDGE_KEY)"),
    (
        "--overflow",
        {"type": one_of(*_POLICIES), "metavar": "P"},
        "drop_oldest (default), drop_newest or block when the outbox is full",
    ),
    ("--capacity", {"type": size, "metavar": "N"}, "size of the outbox in bytes, or as 64M (default: 64M)"),
    ("--max-bytes", {"type": size, "metavar": "N"}, "bytes that the engine keeps, or as 256M (default: 256M)"),
    ("--max-age", {"type": float, "metavar": "S"}, "seconds that the engine keeps messages (default: 3600)"),
)
_NAMES: Final = [name[2:].replace("-", "_") for name, _, _ in _OPTIONS]


class Interrupted(Exception):
    """A signal has ended what the command waited for."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interruptibly(signals: Collection[signal.Signals], call: Callable[[], T]) -> T:
    """Return what ``call`` returns. The signals, which are blocked, are not blocked meanwhile.

    :raises Interrupted: one of them has come; those that come behind it, or that the caller ignores (nohup), have no effect.
    """
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise Interrupted(number)

    heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heeded}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return call()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        for number, handler in before.items():
            signal.signal(number, handler)


def add_bridge_options(parser: argparse.ArgumentParser, *, are_shown: bool = True) -> None:
    """Add the options of a bridge, in the help text or not."""
    for name, form, text in _OPTIONS:
        parser.add_argument(name, **form, help=text if are_shown else argparse.SUPPRESS)


def add_bridge(parser: argparse.ArgumentParser) -> None:
    """Add the option of a command that starts a broker, and with it those of the bridge."""
    text = "link the broker with those of other machines; all options of 'mpbroadcast bridge' are accepted"
    parser.add_argument("--bridge", nargs="?", const="", metavar="URL", help=text)
    add_bridge_options(parser, are_shown=False)


def check_bridge(options: argparse.Namespace) -> None:
    """Raise ``ValueError`` if there are options of a bridge, and no bridge."""
    given = [name for name in _NAMES if getattr(options, name) is not None]
    if given and options.bridge is None:
        raise ValueError(f"--{given[0].replace('_', '-')} is an option of a bridge: give --bridge URL, too")


def linked(bus: Broadcaster[Any], url: str | None, options: argparse.Namespace, signals: Collection[signal.Signals]) -> Bridge:
    """Start the bridge. Block until it is ready, also while there is no engine: then one line on standard error shows it.

    :raises Interrupted: one of the signals, which are blocked, has come before that.
    :raises Exception: as ``mpbroadcast.bridge.bridge``.
    """
    chosen = {name: value for name in _NAMES if (value := getattr(options, name)) is not None}
    if "key_file" in chosen:
        chosen["key"] = keys_of(Path(chosen.pop("key_file")).read_bytes().decode("utf-8", "surrogateescape"))

    def start() -> Bridge:
        try:
            return bridge(bus, url or None, start_timeout=_PATIENCE, **chosen)
        except StartError as error:
            if isinstance(error.__cause__, EngineRefused):
                raise
            output.warn(f"waiting: {error}")
        except ImportError as error:
            raise BroadcastError(str(error)) from error
        return bridge(bus, url or None, start_timeout=None, **chosen)

    return interruptibly(signals, start)
