"""Which broker a command means: ``--address``, else ``$MPBROADCAST_ADDRESS``, else the broker of ``mpbroadcast serve``."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any, Final

from mpbroadcast import Broadcaster, BrokerLost, connect
from mpbroadcast.posix.addresses import VARIABLE

DEFAULT: Final = "default"  # the name of a broker that nobody has named


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the option of a command that connects to a broker."""
    text = f"the broker's name or path (default: ${VARIABLE}, or {DEFAULT!r})"
    parser.add_argument("--address", metavar="NAME", help=text)


def chosen(address: str | None) -> str:
    """Return the address that a command's option, or its absence, stands for."""
    return address if address is not None else os.environ.get(VARIABLE) or DEFAULT


def reached(address: str | None) -> Broadcaster[Any]:
    """Connect to the broker at :func:`chosen` of ``address``.

    :raises BrokerLost: there is none; the text names the command that starts one.
    :raises Exception: as ``connect``.
    """
    name = chosen(address)
    try:
        return connect(name)
    except BrokerLost as error:
        if name == DEFAULT:
            text = f"{error}. Start one with `mpbroadcast serve` in another terminal, or name one with --address or ${VARIABLE}"
        else:
            text = f"{error}. `mpbroadcast serve {shlex.quote(name)}` starts one"
        raise BrokerLost(text) from error
