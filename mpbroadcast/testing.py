"""For tests of programs that use mpbroadcast: waiting without a sleep, and a plugin for pytest.

The plugin has the fixture ``broadcaster`` and the marker ``mpbroadcast``. pytest imports this module in each run, so it imports
nothing before it is used, and works without pytest.
"""

from __future__ import annotations

from typing import Any, TypeVar

import mpbroadcast

__all__ = ["drain", "handled", "settle"]

M = TypeVar("M")


def settle(bus: mpbroadcast.Broadcaster[Any], timeout: float | None = 5.0) -> None:
    """Block until all messages that any process has published by now are in the pipes of the open channels.

    A message that was dropped by a policy does not count. Neither does a channel that no process has opened, unless its full
    backlog blocks a publisher. Of a group, each message is in the pipe of one member.

    Call it from a thread in an asynchronous test, as it blocks the event loop: ``await asyncio.to_thread(settle, bus)``.

    :raises AssertionError: it took longer than ``timeout`` seconds; the text names the channel and its process.
    :raises BrokerLost, ClosedError: as :meth:`Broadcaster.publish`.
    """
    from mpbroadcast.client import settling

    settling.settle(bus, timeout)


def drain(bus: mpbroadcast.Broadcaster[Any], channel: mpbroadcast.Channel[M], timeout: float | None = 5.0) -> list[M]:
    """Return all messages that any process has published to ``channel`` by now and that were not received yet.

    It opens the channel first. ``assert drain(bus, channel) == []`` shows without a sleep that nothing came. At the end of the
    channel it returns what was left.

    :raises AssertionError: it took longer than ``timeout`` seconds.
    :raises Lagged: messages were dropped; a note of the exception has those that were received before.
    :raises Exception: as :meth:`Channel.recv`.
    """
    from mpbroadcast.client import settling

    return settling.drain(bus, channel, timeout)


def handled(bus: mpbroadcast.Broadcaster[Any], timeout: float | None = 5.0) -> None:
    """Block as :func:`settle`, and until the reader of each open channel has received everything and asked for more.

    A reader asks for more when it calls ``recv``, or anything else that receives or waits, after the last message: so it has
    handled that one. What handlers publish is waited for, too. Channels that the calling process has open count as well: close
    those that nothing reads, or read them in a thread.

    :raises AssertionError: it took longer than ``timeout`` seconds; the text names the channel and its process.
    :raises BrokerLost, ClosedError: as :meth:`Broadcaster.publish`.
    """
    from mpbroadcast.client import settling

    settling.handled(bus, timeout)


def pytest_configure(config: Any) -> None:
    """Register the marker, and the plugin that has the fixture: a hook of pytest."""
    text = "mpbroadcast(**options): options of start_broadcaster() for the fixture `broadcaster`, and leaks='error' or 'ignore'"
    config.addinivalue_line("markers", text)
    from mpbroadcast import testing_fixtures

    if not config.pluginmanager.is_registered(testing_fixtures):
        config.pluginmanager.register(testing_fixtures, "mpbroadcast.testing_fixtures")
