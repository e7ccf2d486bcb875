"""A progress bar: one line on standard error, rewritten where it stands."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Final, Self

_EVERY: Final = 0.1  # seconds from one picture to the next


def bar(done: int, total: int, messages: int, seconds: float, columns: int) -> str:
    """Return the bar of so many columns, for ``done`` of ``total`` bytes and so many messages, published in ``seconds``."""
    part = min(1.0, done / total) if total else 1.0
    left = f"{seconds * (1 - part) / part:.0f} s left" if part else "-"
    text = f" {part:4.0%}  {messages:,} messages, {messages / max(seconds, 1e-3):,.0f}/s, {left}"
    width = max(0, min(40, columns - len(text) - 3))
    filled = int(part * width)
    return f"[{'#' * filled}{'.' * (width - filled)}]{text}"[: columns - 1]


class Progress:
    """Shows how much of ``total`` bytes is done, if standard error is a terminal and there is a total."""

    def __init__(self, total: int) -> None:
        self._whole = total
        self._is_shown = total > 0 and sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start
        self._messages = 0
        self._done = 0

    def add(self, messages: int, size: int) -> None:
        """Count so many messages and bytes, and show the bar if it is time."""
        self._messages += messages
        self._done += size
        if self._is_shown and time.monotonic() >= self._next:
            self._show("")

    def _show(self, end: str) -> None:
        now = time.monotonic()
        self._next = now + _EVERY
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        except OSError:
            columns = 80
        sys.stderr.write("\r\033[K" + bar(self._done, self._whole, self._messages, now - self._start, columns) + end)
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._is_shown:
            self._show("\n")
