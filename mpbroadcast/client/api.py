"""Create or connect a broadcaster; function forms of its methods."""

from __future__ import annotations

import os
from multiprocessing.context import BaseContext
from typing import Any, Literal, TypeVar, Unpack, overload

from mpbroadcast.client.broadcaster import Broadcaster, Options
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.channel import Channel
from mpbroadcast.errors import AddressError, BroadcastError, StartError
from mpbroadcast.validation import Policy, check_address, check_authkey, check_count, check_timeout

M = TypeVar("M")


def start_broadcaster(
    *,
    context: BaseContext | None = None,
    address: str | os.PathLike[str] | None = None,
    authkey: bytes | None = None,
    start_timeout: float | None = 10.0,
    history: int = 0,
    stall_timeout: float | None = 30.0,
    log_config: dict[str, Any] | None = None,
    restart: bool = False,
) -> Broadcaster[Any]:
    """Start a broker process, and return a handle on it. Block until it is ready, at most ``start_timeout`` seconds.

    ``context`` is what ``multiprocessing.get_context()`` returns. If not given, the broker is forked where that is the default
    start method, and else started in a new interpreter, which does not import the main module. ``address`` is the path of the
    socket to listen at; if not given, one in a new folder that only this user can enter. ``authkey`` is a key that the broker
    accepts beside this process's own, which its children have.

    ``history`` is the number of messages of each topic that are kept for :meth:`Broadcaster.subscribe` with ``replay``: of at
    most 4,096 topics, and at most 64 MiB in all; the topics with the oldest last message are dropped first. When a ``publish``
    has blocked for ``stall_timeout`` seconds, the broker logs one warning that names the subscription; ``None`` for never.

    The broker logs to the logger ``mpbroadcast.broker``, in its own process: warnings to standard error, or as the dictionary
    ``log_config`` for ``logging.config.dictConfig`` has it; at ``INFO``, also each removal and its reason. It logs at most 20
    lines a second.

    With ``restart``, a small supervisor process starts another broker at the same address when the broker dies: handles and
    channels go on with that one. A channel raises one :class:`BrokerRestarted` at the position of what may be missing. What
    was in the broker, and its history, is lost. A broker that dies 5 times in 30 seconds is not replaced again.

    The broker ends with :meth:`Broadcaster.close`, at the end of this program, on SIGTERM, and when this process dies; each
    time it drains first.

    :raises StartError: the broker could not be started, and nothing is left behind; ``__cause__`` has the reason.
    :raises TypeError, ValueError: an argument is of the wrong type, or out of range.
    """
    if context is not None and not isinstance(context, BaseContext):
        raise TypeError(
            f"context must be what multiprocessing.get_context() returns, not {type(context).__name__}: for a start method's "
            'name, multiprocessing.get_context("spawn")'
        )
    authkey = check_authkey(authkey)
    timeout = check_timeout(start_timeout, "start_timeout")
    check_count(history, "history", 0)
    stall = check_timeout(stall_timeout, "stall_timeout")
    if log_config is not None and not isinstance(log_config, dict):
        raise TypeError(f"log_config must be a dictionary for logging.config.dictConfig, not {type(log_config).__name__}")
    if not isinstance(restart, bool):
        raise TypeError(f"restart must be True or False, not {type(restart).__name__}")
    try:
        path = None if address is None else check_address(address)
    except AddressError as error:
        raise StartError(str(error)) from error
    # And with it psutil: a program that only connects needs neither.
    from mpbroadcast.broker.host.launcher import BrokerProcess
    from mpbroadcast.broker.host.main import Settings

    process: BrokerProcess | None = None
    try:
        # An interrupt before it is assigned leaves a daemon process that multiprocessing ends with the program.
        process = BrokerProcess(context, timeout, Settings(path, authkey, history, stall, log_config, restart))
        client = BrokerClient(process.address)
        client.session()
        bus: Broadcaster[Any] = Broadcaster(client, process)
        process.end_at_exit(bus.close)
    except BaseException as error:
        if process is not None:
            process.end(0, asked=0, time_left=float)
            if isinstance(error, BroadcastError):
                raise StartError(f"the broker started, but did not answer: {error}") from error
        raise
    return bus


def connect(address: str | os.PathLike[str], *, authkey: bytes | None = None) -> Broadcaster[Any]:
    """Return a handle on the broker at ``address``, in any process of the same user. It has its own pipe, and its own order.

    ``authkey`` is the broker's key; if not given, this process's own, which is right in the starter's children. Block until the
    broker replies, at most 10 seconds; also while a broker is being replaced.

    :raises AuthenticationFailed: (a ``multiprocessing.AuthenticationError``) the broker has another key.
    :raises BrokerLost: there is no broker at this address, or not even its folder.
    :raises TimedOut: the broker did not reply in time.
    :raises AddressError: no socket can have this address.
    """
    path = check_address(address)
    client = BrokerClient(path, authkey=check_authkey(authkey))
    client.session()
    return Broadcaster(BrokerClient.shared(path, client.broker, client.restarts))


def publish(
    bus: Broadcaster[M], message: M, *, topic: str = "", exclude: Channel[Any] | None = None, timeout: float | None = None
) -> None:
    """Call :meth:`Broadcaster.publish`."""
    _checked(bus).publish(message, topic=topic, exclude=exclude, timeout=timeout)


@overload
def subscribe(
    bus: Broadcaster[M], *topics: str, with_topic: Literal[False] = False, **options: Unpack[Options]
) -> Channel[M]: ...
@overload
def subscribe(
    bus: Broadcaster[M], *topics: str, with_topic: Literal[True], **options: Unpack[Options]
) -> Channel[tuple[str, M]]: ...
@overload
def subscribe(
    bus: Broadcaster[M], *topics: str, with_topic: bool, **options: Unpack[Options]
) -> Channel[M] | Channel[tuple[str, M]]: ...
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    overflow: Policy = "block",
    capacity: int | None = None,
    replay: int = 0,
    with_topic: bool = False,
) -> Channel[Any]:
    """Call :meth:`Broadcaster.subscribe`."""
    return _checked(bus).subscribe(*topics, overflow=overflow, capacity=capacity, replay=replay, with_topic=with_topic)


def unsubscribe(bus: Broadcaster[Any], channel: Channel[Any]) -> None:
    """Call :meth:`Broadcaster.unsubscribe`."""
    _checked(bus).unsubscribe(channel)


def _checked(bus: Broadcaster[M]) -> Broadcaster[M]:
    if not isinstance(bus, Broadcaster):
        raise TypeError(f"bus must be a Broadcaster, not {type(bus).__name__}")
    return bus
