"""The warning about a call that blocks an event loop: it waits in a thread in which asyncio, uvloop or trio runs.

A call that is about to block looks at :func:`running_loop` first, and :func:`warn_of_blocking` warns, once for each line of
the program that makes such a call. Neither imports a loop.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

_ASYNC_FORMS: Final = {
    name: f"await a{name}()"
    for name in (
        *("connect", "connect_or_start", "subscribe", "unsubscribe", "publish", "publish_many", "publish_payload", "flush"),
        *("wait_for_subscribers", "subscriber_count", "history", "stats", "recv", "recv_many", "receive", "close"),
    )
} | {"__next__": "async for", "__exit__": "async with"}
BRIEF: Final = 20  # milliseconds
_SHOWN: Final = {"__next__": "`for`", "__exit__": "the end of `with`"}

_warned: WeakKeyDictionary[object, set[tuple[str, int]]] = WeakKeyDictionary()


def running_loop() -> object | None:
    """Return what stands for the event loop that runs in this thread; ``None`` if none does."""
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


def warn_of_blocking(loop: object, is_brief: Callable[[], bool] = bool) -> None:
    """Warn, where the program has called this package, that the call blocks ``loop``, if the call has a form that does not.

    A request seldom waits for its reply, and then not long: there, ``is_brief`` waits for at most :data:`BRIEF`, and returns
    whether that was enough.
    """
    frame, name = sys._getframe(1), ""
    while str(frame.f_globals.get("__name__")).startswith("mpbroadcast."):
        name = frame.f_code.co_name
        if frame.f_back is None:
            return
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    lines = _warned.setdefault(loop, set())
    if name not in _ASYNC_FORMS or (file, line) in lines or is_brief():
        return
    lines.add((file, line))
    shown = _SHOWN.get(name, f"{name}()")
    text = f"{shown} blocks the event loop that runs in this thread: use `{_ASYNC_FORMS[name]}`"
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, RuntimeWarning, file, line, module=frame.f_globals.get("__name__"), registry=registry)
