"""Start a broker and run COMMAND beside it.

connect() in COMMAND and its children finds the broker through MPBROADCAST_ADDRESS. COMMAND begins at the first word that is
not an option of run. If the broker dies, it is replaced. SIGINT, SIGTERM and SIGHUP are forwarded to COMMAND. The exit status
is that of COMMAND (128 plus the signal's number if a signal ended it), or 1 if that is 0 and the broker was lost for good.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess

from mpbroadcast.cli import output
from mpbroadcast.cli.bridge_options import Interrupted
from mpbroadcast.cli.broker_options import add_broker_options, started
from mpbroadcast.cli.parsing import Parser
from mpbroadcast.posix.addresses import VARIABLE

EXAMPLE = "mpbroadcast run uvicorn app:app --workers 4"

_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_NOT_FOUND = 127  # exit codes, as a shell has them
_NOT_EXECUTABLE = 126
_BY_SIGNAL = 128


def add_arguments(parser: Parser) -> None:
    parser.takes_command = True
    parser.usage = (
        "%(prog)s [--address NAME] [--history N] [--no-restart]\n"
        "                       [--bridge URL [OPTIONS]] [--] COMMAND [ARGUMENT...]"
    )
    parser.add_argument("--address", metavar="NAME", help="the broker's name, or a path with a slash (default: a private one)")
    add_broker_options(parser)
    parser.add_argument("arguments", nargs="*", metavar="COMMAND", help="the command and its arguments")


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
            (broker,) = multiprocessing.active_children()
            return _wait_for(command, broker, bus.address)
    except Interrupted as ended:
        return _BY_SIGNAL + ended.number


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
        return True
    except OSError:
        return False


def _wait_for(command: int, broker: BaseProcess, address: str) -> int:
    """Forward signals until the command has ended. Return its exit status, as a shell has it, or 1 for 0 without a broker.

    ``broker`` is its supervisor if it is replaced when it dies: that ends when no broker follows.
    """
    is_lost = False
    while True:
        came, sent = _next_signal()
        if came == signal.SIGCHLD:
            if not is_lost and not broker.is_alive():
                is_lost = True
                output.warn(f"the broker at {address!r} is lost; the command continues without it")
            ended, status = os.waitpid(command, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return (code or int(is_lost)) if code >= 0 else _BY_SIGNAL - code
        elif sent:
            os.kill(command, came)


def _next_signal() -> tuple[int, bool]:
    """Wait for one. Return it, and whether a process has sent it: what the terminal sends has reached the command, too."""
    signals = {*_FORWARDED, signal.SIGCHLD}
    if not hasattr(signal, "sigwaitinfo"):
        return signal.sigwait(signals), True
    info = signal.sigwaitinfo(signals)
    return info.si_signo, info.si_code <= 0
