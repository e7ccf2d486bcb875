"""Create or connect a broadcaster; function forms of its methods."""

from __future__ import annotations

import contextlib
import math
import os
from multiprocessing.context import BaseContext
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from mpbroadcast.client.broadcaster import Broadcaster
from mpbroadcast.client.broker_client import BrokerClient
from mpbroadcast.client.channel import Channel
from mpbroadcast.client.opening import Opening
from mpbroadcast.client.received import Received
from mpbroadcast.client.subscribing import Options
from mpbroadcast.client.tasks import drive
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import AddressError, BroadcastError, BrokerLost, StartError, VersionMismatch
from mpbroadcast.posix.addresses import Candidates, candidates, default_candidates, is_own_folder
from mpbroadcast.posix.waiting import Steps, run
from mpbroadcast.validation import Policy, check_authkey, check_bool, check_count, check_timeout

M = TypeVar("M")


class StartOptions(TypedDict, total=False):
    """Arguments of :func:`start_broadcaster`, for :func:`connect_or_start`."""

    authkey: bytes | None
    start_timeout: float | None
    history: int
    stall_timeout: float | None
    log_config: dict[str, Any] | None
    restart: bool


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
    start method, and else started in a new interpreter, which does not import the main module.

    ``address`` is the path of the socket to listen at, or a plain name without a slash, for a socket in the first of
    ``$XDG_RUNTIME_DIR``, ``/run/user/UID`` and ``/tmp/mpbroadcast-UID`` that exists (the last is made); if not given, a path in
    a new folder that only this user can enter. At an address of your choice the broker writes a key into the file
    ``ADDRESS.key``, from which :func:`connect` reads it, and removes it at its end; unless ``authkey`` is given, a key that it
    accepts then. This process's own key, which its children have, is accepted in any case.

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
    :raises VersionMismatch: the package was upgraded after this process had imported it: restart this program.
    :raises TypeError, ValueError: an argument is of the wrong type, or out of range.
    """
    if context is not None and not isinstance(context, BaseContext):
        raise TypeError(
            f"context must be what multiprocessing.get_context() returns, not {type(context).__name__}: for a start method's "
            'name, multiprocessing.get_context("spawn")'
        )
    timeout, settings = _checked_options(
        authkey=authkey,
        start_timeout=start_timeout,
        history=history,
        stall_timeout=stall_timeout,
        log_config=log_config,
        restart=restart,
    )
    return _start(context, timeout, address, has_key_file=address is not None and authkey is None, **settings)


def connect_or_start(
    address: str | os.PathLike[str] | None = None, *, linger: float | None = 5.0, **options: Unpack[StartOptions]
) -> Broadcaster[Any]:
    """Return a handle on the broker at ``address``, as :func:`connect` does; start one if there is none, and block until then.

    Many processes may call this at once: one starts the broker, all get a handle on the same. It belongs to no process: it is
    none's child, goes on when the process that started it ends, is reached by no signal to that one's process group, and writes
    no log unless ``log_config`` names a file. It ends ``linger`` seconds after the last handle and channel of any process has
    gone (``None``: by SIGTERM only), and drains first.

    ``address`` is as for :func:`connect`. ``options`` are those of :func:`start_broadcaster` except ``context``; they are
    without effect if the broker is there already, but for ``authkey``. Without ``authkey``, the key is in a key file.

    :raises StartError: there is no broker, and none could be started within ``start_timeout`` seconds.
    :raises AuthenticationFailed, VersionMismatch, TimedOut, AddressError: as :func:`connect`.
    :raises TypeError, ValueError: an argument is of the wrong type, or out of range.
    """
    return run(_connecting_or_starting(address, linger, options))


def aconnect_or_start(
    address: str | os.PathLike[str] | None = None, *, linger: float | None = 5.0, **options: Unpack[StartOptions]
) -> Opening[Broadcaster[Any]]:
    """Do as :func:`connect_or_start`, in a task. Await the result, or enter it, as that of :func:`aconnect`.

    Cancelled, it leaves no connection. The broker that it was starting may start all the same: it belongs to no process, and
    ends ``linger`` seconds later if no other process has connected.
    """
    return Opening(drive(_connecting_or_starting(address, linger, options)), "aconnect_or_start")


def _connecting_or_starting(
    address: str | os.PathLike[str] | None, linger: float | None, options: StartOptions
) -> Steps[Broadcaster[Any]]:
    lingering = check_timeout(linger, "linger")
    timeout, settings = _checked_options(**options)
    found = default_candidates(address)
    folder = os.path.dirname(found.made)
    if not (os.path.isdir(folder) or is_own_folder(folder)):
        raise AddressError(f"there is no folder {folder!r}: make it, or choose another address")
    from mpbroadcast.broker.host.main import Settings
    from mpbroadcast.broker.host.ownerless import starting

    key = settings["authkey"]
    settings |= {"has_key_file": key is None, "keys": [key] if key else [], "starter": None}
    settings |= {"linger": math.inf if lingering is None else lingering}
    deadline, tries = Deadline(timeout), 0
    while True:
        with contextlib.suppress(BrokerLost):
            return (yield from _connecting_to(found, key))
        yield from starting(found, Settings(found.made, **settings), deadline, tries)
        tries += 1


def start_apart(*, address: str | None, history: int, restart: bool) -> Broadcaster[Any]:
    """Start a broker for a program that does nothing else: any address has a key file, and signals are left to this process."""
    timeout, settings = _checked_options(history=history, restart=restart)
    return _start(None, timeout, address, has_key_file=True, stands_apart=True, **settings)


def _checked_options(
    *,
    authkey: bytes | None = None,
    start_timeout: float | None = 10.0,
    history: int = 0,
    stall_timeout: float | None = 30.0,
    log_config: dict[str, Any] | None = None,
    restart: bool = False,
) -> tuple[float | None, dict[str, Any]]:
    """Return the time for the start, and the options as the broker's settings."""
    if log_config is not None and not isinstance(log_config, dict):
        raise TypeError(f"log_config must be a dictionary for logging.config.dictConfig, not {type(log_config).__name__}")
    check_bool(restart, "restart")
    return check_timeout(start_timeout, "start_timeout"), {
        "authkey": check_authkey(authkey),
        "history": check_count(history, "history", 0),
        "stall_timeout": check_timeout(stall_timeout, "stall_timeout"),
        "log_config": log_config,
        "restart": restart,
    }


def _start(
    context: BaseContext | None, timeout: float | None, address: str | os.PathLike[str] | None, **settings: Any
) -> Broadcaster[Any]:
    try:
        found = None if address is None else candidates(address)
    except AddressError as error:
        raise StartError(str(error)) from error
    # And with it psutil: a program that only connects needs neither.
    from mpbroadcast.broker.host.launcher import BrokerProcess
    from mpbroadcast.broker.host.main import Settings
    from mpbroadcast.broker.host.socket_file import answers

    path = None if found is None else found.made
    for other in found.paths if found is not None else ():
        if other != path and answers(other):
            raise StartError(f"the name {address!r} is in use: a broker listens at {other!r}; end it, or choose another name")
    process: BrokerProcess | None = None
    try:
        # An interrupt before it is assigned leaves a daemon process that multiprocessing ends with the program.
        process = BrokerProcess(context, timeout, Settings(address=path, **settings))
        client = BrokerClient(process.address)
        client.session()
        bus: Broadcaster[Any] = Broadcaster(client, process)
        process.end_at_exit(bus.close)
    except BaseException as error:
        if process is not None:
            run(process.ending(0))
            if isinstance(error, BroadcastError) and not isinstance(error, VersionMismatch):
                raise StartError(f"the broker started, but did not answer: {error}") from error
        raise
    return bus


def connect(address: str | os.PathLike[str] | None = None, *, authkey: bytes | None = None) -> Broadcaster[Any]:
    """Return a handle on the broker at ``address``, in any process of the same user. It has its own pipe, and its own order.

    ``address`` is a path, or a plain name without a slash, which is looked for in each of the folders of names (see
    :func:`start_broadcaster`), whatever the environment of the process that started the broker; if not given, that of the
    environment variable ``MPBROADCAST_ADDRESS``, which ``mpbroadcast run`` sets. ``authkey`` is the broker's key; if not given,
    that of its key file, or else this process's own, which is right in the starter's children. Block until the broker replies,
    at most 10 seconds; also while a broker is being replaced.

    :raises AuthenticationFailed: (a ``multiprocessing.AuthenticationError``) the broker has another key, or its key file is
        not safe: a link, another user's, or open to others.
    :raises BrokerLost: there is no broker at this address, or not even its folder.
    :raises VersionMismatch: (a ``ConnectionError``) the broker is of a version of this package with another protocol.
    :raises TimedOut: the broker did not reply in time.
    :raises AddressError: no socket can have this address, or there is none.
    """
    return run(_connecting(address, authkey))


def aconnect(address: str | os.PathLike[str] | None = None, *, authkey: bytes | None = None) -> Opening[Broadcaster[Any]]:
    """Do as :func:`connect`, in a task. Cancelled, it leaves no connection.

    Await the result for the handle, or enter it: ``async with aconnect() as bus`` closes the handle at the end.
    """
    return Opening(drive(_connecting(address, authkey)), "aconnect")


def _connecting(address: str | os.PathLike[str] | None, authkey: bytes | None) -> Steps[Broadcaster[Any]]:
    authkey = check_authkey(authkey)
    return (yield from _connecting_to(default_candidates(address), authkey))


def _connecting_to(found: Candidates, authkey: bytes | None) -> Steps[Broadcaster[Any]]:
    for path in found.paths:
        try:
            return (yield from _connecting_at(path, authkey))
        except BrokerLost as error:
            if found.paths == [path] and not found.refused:
                raise
            cause = error.__cause__
    raise BrokerLost(found.not_found()) from cause


def _connecting_at(path: str, authkey: bytes | None) -> Steps[Broadcaster[Any]]:
    client = BrokerClient(path, authkey=authkey)
    yield from client.attaching()
    return Broadcaster(BrokerClient.shared(path, client.broker, client.restarts))


def publish(
    bus: Broadcaster[M], message: M, *, topic: str = "", exclude: Channel[Any] | None = None, timeout: float | None = None
) -> None:
    """Call :meth:`Broadcaster.publish`."""
    _checked(bus).publish(message, topic=topic, exclude=exclude, timeout=timeout)


@overload
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    with_topic: Literal[False] = False,
    with_id: Literal[False] = False,
    raw: Literal[False] = False,
    **options: Unpack[Options],
) -> Channel[M]: ...
@overload
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    with_topic: Literal[True],
    with_id: Literal[False] = False,
    raw: Literal[False] = False,
    **options: Unpack[Options],
) -> Channel[tuple[str, M]]: ...
@overload
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    with_topic: bool = False,
    with_id: Literal[True],
    raw: Literal[False] = False,
    **options: Unpack[Options],
) -> Channel[Received[M]]: ...
@overload
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    with_topic: bool,
    with_id: Literal[False] = False,
    raw: Literal[False] = False,
    **options: Unpack[Options],
) -> Channel[M] | Channel[tuple[str, M]]: ...
@overload
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    with_topic: bool = False,
    with_id: bool,
    raw: Literal[False] = False,
    **options: Unpack[Options],
) -> Channel[M] | Channel[tuple[str, M]] | Channel[Received[M]]: ...
@overload
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    with_topic: Literal[False] = False,
    with_id: Literal[False] = False,
    raw: Literal[True],
    **options: Unpack[Options],
) -> Channel[bytes]: ...
@overload
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    with_topic: Literal[True],
    with_id: Literal[False] = False,
    raw: Literal[True],
    **options: Unpack[Options],
) -> Channel[tuple[str, bytes]]: ...
@overload
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    with_topic: bool = False,
    with_id: Literal[True],
    raw: Literal[True],
    **options: Unpack[Options],
) -> Channel[Received[bytes]]: ...
@overload
def subscribe(
    bus: Broadcaster[M], *topics: str, with_topic: bool = False, with_id: bool = False, raw: bool, **options: Unpack[Options]
) -> Channel[Any]: ...
def subscribe(
    bus: Broadcaster[M],
    *topics: str,
    overflow: Policy = "block",
    capacity: int | None = None,
    replay: int = 0,
    after: int | None = None,
    with_topic: bool = False,
    with_id: bool = False,
    raw: bool = False,
    group: str | None = None,
    prefetch: int | None = None,
    name: str | None = None,
) -> Channel[Any]:
    """Call :meth:`Broadcaster.subscribe`."""
    options: Options = {
        "overflow": overflow,
        "capacity": capacity,
        "replay": replay,
        "after": after,
        "group": group,
        "prefetch": prefetch,
        "name": name,
    }
    return _checked(bus).subscribe(*topics, with_topic=with_topic, with_id=with_id, raw=raw, **options)


def unsubscribe(bus: Broadcaster[Any], channel: Channel[Any]) -> None:
    """Call :meth:`Broadcaster.unsubscribe`."""
    _checked(bus).unsubscribe(channel)


def _checked(bus: Broadcaster[M]) -> Broadcaster[M]:
    if not isinstance(bus, Broadcaster):
        raise TypeError(f"bus must be a Broadcaster, not {type(bus).__name__}")
    return bus
