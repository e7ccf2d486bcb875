"""The warning about a call that blocks the event loop (asyncio, uvloop or trio) of its own thread.

A call that is about to block checks :func:`running_loop`, and then :func:`warn_of_blocking` warns once for each line of the
program that makes such a call. Neither function imports an event loop.
"""

from __future__ import annotations

import sys
import warnings
from typing import Final
from weakref import WeakKeyDictionary

_ASYNC_FORMS: Final = {
    name: f"await a{name}()"
    for name in (
        *("connect", "connect_or_start", "subscribe", "unsubscribe", "publish", "publish_many", "publish_payload", "flush"),
        *("wait_for_subscribers", "subscriber_count", "history", "stats", "recv", "recv_many", "receive", "close"),
    )
} | {"__next__": "async for", "__exit__": "async with"}
_SHOWN: Final = {"__next__": "`for`", "__exit__": "the end of `with`"}

_warned: WeakKeyDictionary[object, set[tuple[str, int]]] = WeakKeyDictionary()


def running_loop() -> object | None:
    """Return an object that identifies the event loop running in this thread, or ``None``."""
    modules = sys.modules
    if (events := modules.get("asyncio.events")) is not None:
        loop: object = getattr(events, "_get_running_loop", bool)()
        if loop:
            return loop
    if (trio := modules.get("trio")) is not None:
        try:
            token: object = trio.lowlevel.current_trio_token()
            return token
        except (AttributeError, RuntimeError):  # it is being imported, or does not run here
            pass
    return None


def warn_of_blocking(loop: object) -> None:
    """Warn that the call of this package which the program has made blocks ``loop``, if that call has an async form.

    The warning has the program's own file and line.
    """
    frame, name = sys._getframe(1), ""
    while str(frame.f_globals.get("__name__")).startswith("mpbroadcast."):
        name = frame.f_code.co_name
        if frame.f_back is None:
            return
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    lines = _warned.setdefault(loop, set())
    if name not in _ASYNC_FORMS or (file, line) in lines:
        return
    lines.add((file, line))
    shown = _SHOWN.get(name, f"{name}()")
    text = f"{shown} blocks the event loop that runs in this thread: use `{_ASYNC_FORMS[name]}`"
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, RuntimeWarning, file, line, module=frame.f_globals.get("__name__"), registry=registry)
