"""What child processes of the tests run. It stands in a module, so that every start method can import it."""

import os
import signal
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import mpbroadcast
from mpbroadcast import Broadcaster, BroadcastError, BrokerRestarted, Channel
from tests.support.helpers import DEADLINE, answer, pattern, rest

PACKAGE_ERRORS: list[Any] = [
    kind(*{"Lagged": (3,), "ChannelInUse": ("text", 5)}.get(name, ("text",)))
    for name, kind in vars(mpbroadcast).items()
    if isinstance(kind, type) and issubclass(kind, BroadcastError)
]
"""One error of each public class."""


class Boom(Exception):
    """Raised on purpose, by objects that cannot be pickled or unpickled."""


class CannotBePickled:
    """Its pickling raises."""

    def __reduce__(self) -> NoReturn:
        raise Boom("this cannot be pickled")


def throw(error: BaseException) -> NoReturn:
    """Raise this, while something is unpickled, with no frame in its traceback that refers to it."""
    try:
        raise error
    finally:
        del error


class Raises:
    """Pickles well, and raises this error when it is unpickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return throw, (self.error,)


class CannotBeUnpickled(Raises):
    """Raises :class:`Boom` when it is unpickled."""

    def __init__(self) -> None:
        super().__init__(Boom("this cannot be unpickled"))


def describe(error: BaseException) -> tuple[str, Any]:
    """An error as something that can be compared: its type's name, and the PID that it carries."""
    return type(error).__name__, getattr(error, "pid", None)


def receive_on_order(channel: Channel[Any], orders: Connection) -> None:
    """Report that the process runs, leave the channel alone until an order comes, then receive up to the end."""
    orders.send("started")
    answer(orders)
    try:
        orders.send(rest(channel))
    except BaseException as error:
        orders.send(describe(error))


def receive_over_a_gap(channel: Channel[Any], bus: Broadcaster[Any], orders: Connection) -> None:
    """On an order, receive up to the message "end", while the broker may be replaced; send home all, then publish."""
    orders.send("here")
    answer(orders)
    seen: list[Any] = []
    while not seen or seen[-1] != "end":
        try:
            seen.append(channel.recv(timeout=DEADLINE))
        except BrokerRestarted:
            seen.append("gap")
    orders.send(seen)
    bus.publish("from the worker")


def subscribe_and_die(bus: Broadcaster[Any]) -> None:
    bus.subscribe("a").poll()
    os.kill(os.getpid(), signal.SIGKILL)


def open_and_hold(channel: Channel[Any], orders: Connection) -> None:
    """Open the channel, report that, and hold it until an order comes."""
    channel.fileno()
    orders.send(os.getpid())
    answer(orders, 3 * DEADLINE)


def publish_patterns(bus: Broadcaster[Any], orders: Connection, topic: str, size: int) -> None:
    """Publish ``(number, pattern)`` until an order to stop comes; then send home how many."""
    orders.send("started")
    number = 0
    while not orders.poll(0):
        bus.publish((number, pattern(number, size)), topic=topic)
        number += 1
    bus.flush(timeout=DEADLINE)
    orders.send(number)


def publish_on_order(bus: Broadcaster[Any], orders: Connection) -> None:
    """Publish each thing that comes through the pipe, report that, and end at ``None``."""
    orders.send("started")
    while (message := orders.recv()) is not None:
        bus.publish(message)
        orders.send("published")


def subscribe_on_order(bus: Broadcaster[Any], topics: tuple[str, ...], orders: Connection) -> None:
    """Subscribe once an order has come, and hold the channel until the next one."""
    answer(orders)
    with bus.subscribe(*topics):
        answer(orders, 3 * DEADLINE)


def publish_one(bus: Broadcaster[Any], message: Any) -> int:
    """Publish one message; return the PID of this process."""
    bus.publish(message)
    return os.getpid()
