"""Start a broker, and run COMMAND with its address in MPBROADCAST_ADDRESS, where connect() finds it.

SIGINT, SIGTERM and SIGHUP are forwarded to the command. When it has ended, what was published is delivered, and the exit
status is the command's: 128 and the signal's number, if one has ended it.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys

from mpbroadcast.cli.bridge_options import Interrupted
from mpbroadcast.cli.broker_options import add_broker_options, started
from mpbroadcast.posix.addresses import VARIABLE

EXAMPLE = "mpbroadcast run -- uvicorn app:app --workers 4"

_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_NOT_FOUND = 127  # exit codes, as a shell has them
_NOT_EXECUTABLE = 126
_BY_SIGNAL = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s [--address NAME] [--history N] [--restart]\n                       [--bridge URL [OPTIONS]] -- COMMAND..."
    )
    parser.add_argument("--address", metavar="NAME", help="a name, or a path with a slash; otherwise one of its own")
    add_broker_options(parser)
    parser.add_argument("arguments", nargs="+", metavar="COMMAND", help="the command, and its arguments")


def run(options: argparse.Namespace) -> int:
    # Blocked, so that each waits until it is looked at. The broker and the command have masks of their own.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_FORWARDED, signal.SIGCHLD})
    # What a terminal sends goes to the whole process group, so there the command stays in this one. Without a terminal it has a
    # group of its own: a signal to the group of this process reaches it once.
    group = os.getpgrp() if _has_terminal() else 0
    try:
        with started(options, options.address, _FORWARDED) as bus:
            try:
                command = os.posix_spawnp(
                    options.arguments[0],
                    options.arguments,
                    os.environ | {VARIABLE: bus.address},
                    setpgroup=group,
                    setsigmask=before,
                    setsigdef={signal.SIGPIPE, signal.SIGXFSZ},  # which Python ignores
                )
            except OSError as error:
                is_absent = error.errno == errno.ENOENT
                why = "command not found" if is_absent else error.strerror
                print(f"mpbroadcast: {options.arguments[0]}: {why}", file=sys.stderr)
                return _NOT_FOUND if is_absent else _NOT_EXECUTABLE
            return _wait_for(command)
    except Interrupted as ended:
        return _BY_SIGNAL + ended.number


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
        return True
    except OSError:
        return False


def _wait_for(command: int) -> int:
    """Forward signals until the command has ended. Return its exit status, as a shell has it."""
    while True:
        came, sent = _next_signal()
        if came == signal.SIGCHLD:
            ended, status = os.waitpid(command, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else _BY_SIGNAL - code
        elif sent:
            os.kill(command, came)


def _next_signal() -> tuple[int, bool]:
    """Wait for one. Return it, and whether a process has sent it: what the terminal sends has reached the command, too."""
    signals = {*_FORWARDED, signal.SIGCHLD}
    if not hasattr(signal, "sigwaitinfo"):
        return signal.sigwait(signals), True
    info = signal.sigwaitinfo(signals)
    return info.si_signo, info.si_code <= 0
