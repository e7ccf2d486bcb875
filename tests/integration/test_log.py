"""What the broker logs: where to, what, and how much; and its crash, which reaches every handle."""

import logging
import os
import re
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

import mpbroadcast
from mpbroadcast import Broadcaster, BrokerCrashed, BrokerLost, StartError, connect, start_broadcaster, trap_points
from mpbroadcast.broker.host.logs import RateLimitFilter
from tests.support import workers
from tests.support.helpers import DEADLINE, Children, fill, wait_until

Bus = Broadcaster[Any]


def to_file(file: Path) -> dict[str, Any]:
    """Return a configuration that writes each line into ``file``."""
    return {
        "version": 1,
        "formatters": {"plain": {"format": "%(name)s %(levelname)s %(process)d %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(file), "formatter": "plain"}},
        "root": {"handlers": ["file"], "level": "INFO"},
    }


def wait_for_line(file: Path, *words: str) -> None:
    """Wait until a line has these words, in this order."""
    pattern = re.compile(".*".join(words))
    wait_until(file.exists)
    wait_until(lambda: pattern.search(file.read_text()))


def test_a_dictionary_leads_the_log_to_where_it_has_it(context: BaseContext, tmp_path: Path, children: Children) -> None:
    """From the broker's process: a subscriber that was removed, and why; a client with another key; a stall."""
    file, own = tmp_path / "log", str(os.getpid())
    with start_broadcaster(context=context, log_config=to_file(file), stall_timeout=0.1) as bus:
        children(context, workers.subscribe_and_die, bus)
        wait_for_line(file, "mpbroadcast.broker INFO", str(bus.stats().pid), "channel", "is removed")
        with pytest.raises(mpbroadcast.AuthenticationFailed):
            connect(bus.address, authkey=b"wrong")
        wait_for_line(file, "WARNING", "refused", own)
        with bus.subscribe(capacity=1000) as channel:
            assert not channel.poll()
            fill(bus, size=500)
            wait_for_line(file, "WARNING", "waited", own)


@pytest.mark.parametrize("restart", [False, True])
def test_a_bad_dictionary_is_refused_with_its_cause(restart: bool) -> None:
    """The error of ``logging.config`` names only the handler, and has the reason as its cause: the text has both."""
    handler = {"version": 1, "handlers": {"mine": {"class": "no.such.Handler"}}}
    for config, words in (({"version": 7}, "log_config"), (handler, "configure handler 'mine'.*No module named 'no'")):
        with pytest.raises(StartError, match=words):
            start_broadcaster(log_config=config, restart=restart)


def test_at_most_so_many_lines_a_second() -> None:
    """Count what was left out in the next line that passes; a critical one always passes."""
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
    """As the cause of each ``BrokerLost``, with the traceback; and the log has it."""
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
        other.publish(0)
        assert channel.recv(timeout=DEADLINE) == 0
        trigger.touch()
        other.publish_many([1, 2])  # one alone takes another route
        with pytest.raises(BrokerLost):
            wait_until(lambda: not bus.stats())
        calls: list[tuple[Any, ...]] = [(bus.stats,), (channel.recv,)]
        calls += [(handle.publish_many, range(100_000)) for handle in (bus, other)]
        for call, *arguments in calls:
            with pytest.raises(BrokerLost) as caught:
                call(*arguments)
            assert isinstance(caught.value.__cause__, BrokerCrashed)
            assert "ZeroDivisionError: a bug" in str(caught.value.__cause__)
        wait_for_line(file, "CRITICAL", "crashed")
        other.close()
    finally:
        bus.close()
