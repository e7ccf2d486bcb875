"""One measurement: a peer, a number of subscriber processes, a number of messages.

The clock runs from before the first publish until the last subscriber has unpickled the last message.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from types import FrameType

from benchmarks.peers.base import Endpoint, Peer


@dataclass(frozen=True)
class Result:
    """``rate`` is in messages published, each of them to all subscribers, a second; ``lost`` in deliveries.

    ``publish_rate`` is that of the publishing alone, whose clock stops when the last publish has returned.
    """

    rate: float
    lost: int
    publish_rate: float


class _GivenUp(Exception):
    """The last message has not come in time."""


def _give_up(signum: int, frame: FrameType | None) -> None:
    raise _GivenUp


def _subscriber(endpoint: Endpoint, report: Connection, last: int) -> None:
    """The loop of every subscriber of every peer: take messages, count them, stop at the last."""
    seen = 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the publisher
    try:
        signal.signal(signal.SIGTERM, _give_up)
        messages = endpoint.open()
        report.send(None)
        for message in messages:
            seen += 1
            if message["sequence"] == last:
                break
    except (_GivenUp, EOFError):
        pass
    report.send((seen, time.monotonic()))


def measure(peer_class: type[Peer], context: BaseContext, subscribers: int, count: int, patience: float) -> Result:
    """Publish ``count`` small dicts; who has not got the last one ``patience`` seconds later is not waited for."""
    peer = peer_class(context, subscribers)
    processes = []
    reports: list[Connection] = []
    try:
        for endpoint in peer.endpoints():
            report, send_end = context.Pipe(duplex=False)
            process = context.Process(target=_subscriber, args=(endpoint, send_end, count - 1))  # type: ignore[attr-defined]
            process.start()
            send_end.close()
            processes.append(process)
            reports.append(report)
        for report in reports:
            report.recv()
        peer.join()
        publish = peer.publish

        start = time.monotonic()
        for sequence in range(count):
            publish({"sequence": sequence, "sensor": "north", "value": 21.5})
        published = time.monotonic()
        _await_all(reports, patience)
        for process, report in zip(processes, reports, strict=True):
            if not report.poll(0):
                process.terminate()
        answers: list[tuple[int, float]] = [report.recv() for report in reports]
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
        peer.close()
    lost = sum(count - seen for seen, _ in answers)
    return Result(count / (max(end for _, end in answers) - start), lost, count / (published - start))


def _await_all(reports: list[Connection], patience: float) -> None:
    waiting = set(reports)
    deadline = time.monotonic() + patience
    while waiting and (left := deadline - time.monotonic()) > 0:
        waiting.difference_update(wait(waiting, left))
