"""What the broker logs: where to, what, and how much; and its crash, which reaches every handle."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from mpbroadcast import (
    AuthenticationFailed,
    Broadcaster,
    BrokerCrashed,
    BrokerLost,
    StartError,
    connect,
    start_broadcaster,
    trap_points,
)
from mpbroadcast.broker.host.logs import RateLimitFilter
from tests.support import workers
from tests.support.helpers import DEADLINE, Children, fill, wait_until

Bus = Broadcaster[Any]


def to_file(file: Path, level: str = "INFO") -> dict[str, Any]:
    """A configuration that writes each line into ``file``."""
    return {
        "version": 1,
        "formatters": {"plain": {"format": "%(name)s %(levelname)s %(process)d %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(file), "formatter": "plain"}},
        "root": {"handlers": ["file"], "level": level},
    }


def wait_for_line(file: Path, *words: str) -> str:
    """The first line that has all these words."""

    def line() -> str | None:
        lines = file.read_text().splitlines() if file.exists() else []
        return next((one for one in lines if all(word in one for word in words)), None)

    found: str = wait_until(line)
    return found


def test_a_dictionary_works_under_each_start_method(every_context: BaseContext, tmp_path: Path, children: Children) -> None:
    """The log goes where the dictionary has it, in the broker's process; who was removed is there, and why."""
    file = tmp_path / "log"
    with start_broadcaster(context=every_context, log_config=to_file(file)) as bus:
        children(every_context, workers.subscribe_and_die, bus)
        line = wait_for_line(file, "mpbroadcast.broker INFO", "channel", "is removed")
        assert str(bus.stats().pid) in line


@pytest.mark.parametrize("restart", [False, True])
def test_a_bad_dictionary_is_refused(restart: bool) -> None:
    """With one clear error, and nothing is left."""
    with pytest.raises(StartError, match="log_config"):
        start_broadcaster(log_config={"version": 7}, restart=restart)
    with pytest.raises(TypeError, match="log_config"):
        start_broadcaster(log_config="a string")  # type: ignore[arg-type]


def test_refused_clients_are_named(tmp_path: Path) -> None:
    """Who has another key is a warning."""
    file = tmp_path / "log"
    with start_broadcaster(log_config=to_file(file, "WARNING")) as bus:
        with pytest.raises(AuthenticationFailed):
            connect(bus.address, authkey=b"wrong")
        wait_for_line(file, "WARNING", "refused", str(os.getpid()))


def test_stalls_are_named(tmp_path: Path) -> None:
    """As they are on standard error."""
    file = tmp_path / "log"
    with start_broadcaster(log_config=to_file(file, "WARNING"), stall_timeout=0.1) as bus:
        channel = bus.subscribe(capacity=1000)
        assert not channel.poll()
        fill(bus, size=500)
        wait_for_line(file, "WARNING", str(os.getpid()))
        channel.close()


def test_at_most_so_many_lines_a_second() -> None:
    """What was left out is counted in the next line that passes; what is critical always passes."""
    now = 0.0
    limit = RateLimitFilter(3, lambda: now)

    def passes(level: int = logging.WARNING) -> str | None:
        record = logging.LogRecord("x", level, "", 0, "line %d", (1,), None)
        return record.getMessage() if limit.filter(record) else None

    assert [passes() for _ in range(5)] == ["line 1"] * 3 + [None] * 2
    assert passes(logging.CRITICAL) == "line 1 (2 line(s) before this one were left out)"
    assert passes() is None
    now = 1.5
    assert passes() == "line 1 (1 line(s) before this one were left out)"
    assert passes() == "line 1"


def test_a_crash_reaches_every_handle(tmp_path: Path, fork: BaseContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cause of each BrokerLost, with the traceback; and it is in the log."""
    trigger, file = tmp_path / "now", tmp_path / "log"

    def crash(name: str, subject: object = None) -> None:
        if name == "routing" and trigger.exists():
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(trap_points, "reach", crash)
    bus: Bus = start_broadcaster(context=fork, log_config=to_file(file))
    try:
        other: Bus = connect(bus.address)
        channel = bus.subscribe()
        channel.poll()
        calls: list[Callable[[], Any]] = [
            bus.stats,
            lambda: channel.recv(timeout=DEADLINE),
            lambda: bus.publish_many(range(100_000)),
            lambda: other.publish_many(range(100_000)),
        ]
        other.publish(0)
        assert channel.recv(timeout=DEADLINE) == 0
        trigger.touch()
        other.publish(1)
        with pytest.raises(BrokerLost):
            wait_until(lambda: not bus.stats())
        for call in calls:
            with pytest.raises(BrokerLost) as caught:
                call()
            assert isinstance(caught.value.__cause__, BrokerCrashed)
            assert "ZeroDivisionError: a bug" in str(caught.value.__cause__)
        wait_for_line(file, "CRITICAL", "crashed")
        other.close()
    finally:
        bus.close()


def test_a_killed_broker_has_no_last_words(bus: Bus) -> None:
    """Then the cause is the system's error, or nothing."""
    channel = bus.subscribe()
    channel.poll()
    os.kill(bus.stats().pid, signal.SIGKILL)
    with pytest.raises(BrokerLost) as caught:
        channel.recv(timeout=DEADLINE)
    assert not isinstance(caught.value.__cause__, BrokerCrashed)
