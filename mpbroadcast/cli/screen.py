"""The full screen of ``top``, by rich: the terminal's keys and size go to ``view``, and its lines to the terminal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mpbroadcast import Broadcaster
from mpbroadcast.cli.figures import figures
from mpbroadcast.cli.processes import Processes
from mpbroadcast.cli.view import Line, View, changed, keys_in, screen
from mpbroadcast.deadline import Deadline

STYLES: Final = {"summary": "bold", "title": "black on green", "alarm": "bold red", "notice": "yellow", "footer": "reverse"}


def rendered(lines: list[Line]) -> Group:
    """Return what rich shows of the lines."""
    return Group(*(Text(line.text, STYLES.get(line.style, ""), no_wrap=True, overflow="crop") for line in lines))


def show(bus: Broadcaster[Any], interval: float) -> None:
    """Show the figures of each interval, until q is pressed or the terminal is gone."""
    console = Console(highlight=False)
    processes, view = Processes(), View()
    now = before = bus.stats()
    deadline = Deadline(interval)
    with _keyboard() as resized, Live(console=console, screen=True, auto_refresh=False, redirect_stderr=False) as live:
        whole = figures(now, None, processes.of(now))
        while True:
            width, height = console.size
            lines, view = screen(whole, bus.address, view, width, height)
            live.update(rendered(lines), refresh=True)
            ready, _, _ = select.select([0, resized], [], [], deadline.remaining())
            if 0 in ready:
                data = os.read(0, 1024)
                for key in keys_in(data) if data else ["q"]:
                    after = changed(view, key, max(1, height - 8))
                    if after is None:
                        return
                    view = after
            if resized in ready:
                os.read(resized, 1024)
            if deadline.remaining() == 0:
                before, now = now, bus.stats()
                whole = figures(now, before, processes.of(now))
                deadline = Deadline(interval)


@contextlib.contextmanager
def _keyboard() -> Iterator[int]:
    """Let the terminal give each key at once. Yield a descriptor that is readable when its size has changed."""
    settings = termios.tcgetattr(0)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {signal.SIGWINCH: _ignore, signal.SIGTERM: _end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        tty.setcbreak(0)
        raw = termios.tcgetattr(0)
        raw[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave the shell on this screen
        termios.tcsetattr(0, termios.TCSANOW, raw)
        yield reader
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, settings)
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the signal's number in the pipe wakes the loop."""


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # so that the terminal is set back
