"""``python -m benchmarks.floor``: what a small message costs its publisher and a subscriber, and what of it is this library's.

The steps of each side are timed one after the other, round by round: without the library, what no Python program can leave out
to send a message from one process to another through a pipe, and then what the library takes for all of it. The figures are CPU
times of one process that nothing disturbs, hot, in a stream; the median of the rounds, and the least.

- A publisher makes a message, pickles it, and writes it into a pipe which another process empties after naps.
- A subscriber looks at each message, and unpickles it before. What it reads from has all messages already.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any

from mpbroadcast import Broadcaster, Channel, start_broadcaster

_COUNT = 1500  # messages in a round: as many as a pipe takes
_HEAD = b"\0" * 8
_NAP = 0.0004  # seconds
_PROTOCOL = 5


def _empty(reader: Connection, writer: Connection) -> None:
    """Read what is written until the end, after naps, as a broker does that is not waited for."""
    writer.close()
    while os.read(reader.fileno(), 1 << 20):
        time.sleep(_NAP)


def _receive(channel: Channel[Any]) -> None:
    for _ in channel:
        pass


def _messages() -> Iterator[dict[str, Any]]:
    return ({"sequence": sequence, "sensor": "north", "value": 21.5} for sequence in range(_COUNT))


def _look(messages: Iterable[Any]) -> None:
    """Look at each message, as the subscribers of the other benchmarks do, up to the last."""
    last = _COUNT - 1
    for message in messages:
        if message["sequence"] == last:
            break


def _publishing(bus: Broadcaster[Any], fd: int) -> dict[str, Callable[[], object]]:
    def bare() -> None:
        for message in _messages():
            os.write(fd, _HEAD + pickle.dumps(message, _PROTOCOL))

    def whole() -> None:
        for message in _messages():
            bus.publish(message)

    return {
        "making it": lambda: [None for _ in _messages()],
        "and pickle.dumps": lambda: [pickle.dumps(message, _PROTOCOL) for message in _messages()],
        "and os.write": bare,
        "publish()": whole,
    }


def _receiving(channel: Channel[Any]) -> dict[str, Callable[[], object]]:
    messages = [*_messages()]
    pickles = [pickle.dumps(message, _PROTOCOL) for message in messages]
    return {
        "looking at it": lambda: _look(messages),
        "and pickle.loads": lambda: _look(map(pickle.loads, pickles)),
        "for message in channel": lambda: _look(channel),
        "recv_many()": lambda: _look(chain.from_iterable(iter(channel.recv_many, None))),
        "recv()": lambda: _look(iter(channel.recv, None)),
    }


def _print(title: str, times: dict[str, list[float]], floor: str) -> None:
    print(f"\n{title}\n{'':24}{'median µs':>10}{'least':>8}{'of the floor':>14}")
    for step, seconds in times.items():
        ratio = statistics.median(mine / least for mine, least in zip(seconds, times[floor], strict=True))
        each = [1e6 * one / _COUNT for one in seconds]
        print(f"{step:24}{statistics.median(each):10.2f}{min(each):8.2f}{ratio:14.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, metavar="R", help="the median counts (default: %(default)s)")
    rounds = parser.parse_args().rounds
    reader, writer = multiprocessing.Pipe(duplex=False)
    emptier = multiprocessing.Process(target=_empty, args=(reader, writer))
    emptier.start()
    reader.close()
    sent: dict[str, list[float]] = {}
    received: dict[str, list[float]] = {}
    with start_broadcaster() as bus, start_broadcaster() as here:
        subscriber = multiprocessing.Process(target=_receive, args=(bus.subscribe(),))
        subscriber.start()
        channel = here.subscribe()
        channel.poll(0)  # the first use opens it
        for _ in range(rounds):
            for step, run in _publishing(bus, writer.fileno()).items():
                start = time.process_time()
                run()
                sent.setdefault(step, []).append(time.process_time() - start)
                bus.flush()
            for step, run in _receiving(channel).items():
                if not step.startswith(("looking", "and ")):
                    here.publish_many(_messages())
                    here.flush()
                start = time.process_time()
                run()
                received.setdefault(step, []).append(time.process_time() - start)
    subscriber.join()
    writer.close()
    emptier.join()
    _print("A publisher, CPU for a message", sent, "and os.write")
    _print("A subscriber, CPU for a message", received, "and pickle.loads")


if __name__ == "__main__":
    main()
