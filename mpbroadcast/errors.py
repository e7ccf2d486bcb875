"""The exceptions of the public interface.

The exceptions are split by cause: the handle was closed (:class:`ClosedError`), the broker ended (:class:`BrokerLost`), the
subscriber was too slow (:class:`Lagged`, :class:`Overflowed`), the call would have blocked for too long (:class:`TimedOut`). A
clean end is the built-in ``EOFError``. Wrong arguments raise the built-in ``TypeError`` and ``ValueError``. A message that
cannot be pickled raises whatever its pickling raises.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from typing import Any, cast


class BroadcastError(Exception):
    """The base of all exceptions of this package.

    ``channel`` is the :class:`Channel` that the error concerns, or ``None``. A pickled error has no channel, but a note
    (``__notes__``) with the channel's description and the process.
    """

    channel: Any = None  # a Channel, whose module imports this one

    def __str__(self) -> str:
        return self._about(super().__str__())

    def _about(self, text: str) -> str:
        """Return the text with the name of its channel, if that has one."""
        name = getattr(self.channel, "_name", None)
        return text if name is None else f"{text} (channel {name!r})"

    def __reduce__(self) -> Any:
        made, arguments, *_ = cast(tuple[Any, ...], super().__reduce__())
        return made, arguments, _without_channel(vars(self))


def set_channel(error: Exception, channel: object) -> None:
    """Set an error's channel, and let the error be pickled without it, also when its class is not of this package."""
    with contextlib.suppress(Exception):  # a user's exception may take no attribute
        if not isinstance(error, BroadcastError):
            # The present state: a reference to the error would make a cycle, and keep the channel until a collection.
            made, arguments, *more = cast(tuple[Any, ...], error.__reduce_ex__(4))
            reduced = made, arguments, _without_channel({**(more[0] if more else {}), "channel": channel}), *more[1:]
            error.__reduce_ex__ = lambda protocol: reduced  # type: ignore[method-assign]
        error.channel = channel  # type: ignore[attr-defined]


def _without_channel(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes without the channel, and with a note that names it."""
    state = dict(attributes)
    channel = state.pop("channel", None)
    if channel is not None:
        state["__notes__"] = [*state.get("__notes__", ()), f"in process {os.getpid()}, from {channel!r}"]
    return state


class StartError(BroadcastError, RuntimeError):
    """The broker could not be started; nothing is left behind. ``__cause__`` has the reason where there is one."""


class AddressError(BroadcastError, OSError, ValueError):
    """An address that no socket can have: too long, empty, or with a NUL byte."""


class AuthenticationFailed(BroadcastError, multiprocessing.AuthenticationError):
    """The broker and this process do not have the same key, or not the same user."""


class BrokerLost(BroadcastError, ConnectionError):
    """The broker has ended without a clean end for this handle: it was killed or closed, or there was none."""


class VersionMismatch(BroadcastError, ConnectionError):
    """The broker and this process have versions of this package that do not understand each other."""


class BrokerCrashed(BroadcastError):
    """The traceback of a bug that ended the broker. It is the cause (``__cause__``) of the :class:`BrokerLost` that follows."""


class BrokerRestarted(BroadcastError):
    """The broker has died, and another one has taken over (``restart=True``).

    From a channel: an unknown number of messages may be missing at this position; the next receive goes on behind it. From
    ``flush``: what this handle had published before may not have reached every channel; the handle goes on publishing.
    """


class ClosedError(BroadcastError, OSError):
    """This handle was closed in this process, by ``close()``, by ``with``, or because its broadcaster was closed."""


class ChannelInUse(BroadcastError, RuntimeError):
    """Another process has opened this channel, and only that one can receive from it. ``pid`` is its process ID, or 0."""

    def __init__(self, message: str, pid: int = 0) -> None:
        super().__init__(message, pid)
        self.pid = pid

    def __str__(self) -> str:
        return self._about(str(self.args[0]))


class ChannelBusy(BroadcastError, RuntimeError):
    """A task of this process receives from this channel, which one call at a time may do; the task goes on."""


class Lagged(BroadcastError):
    """Messages are missing at this position; receiving goes on behind them.

    They were dropped, as the backlog was full, or, where a channel with ``after`` begins, the history has them no more.
    ``missed`` is their exact number; ``None`` where the broker cannot know it, which is only where such a channel begins.
    """

    def __init__(self, missed: int | None) -> None:
        super().__init__(missed)
        self.missed = missed

    def __str__(self) -> str:
        if self.missed is None:
            return self._about(
                "messages are missing here, and their number is not known: the history has not all that this channel was to "
                "begin with, or the id is another broker's; the next receive goes on behind the gap"
            )
        return self._about(
            f"{self.missed} message(s) were dropped here because this channel's backlog was full, or the history has them no "
            "more; the next receive goes on behind the gap. Receive faster, or subscribe with a larger capacity or another "
            "overflow policy"
        )


class Overflowed(BroadcastError):
    """The backlog was full under ``overflow="disconnect"``, and the channel was unsubscribed; ``EOFError`` comes next."""


class TimedOut(BroadcastError, TimeoutError):
    """The call did not succeed within its ``timeout`` seconds. Its work is not done, and will not be."""
