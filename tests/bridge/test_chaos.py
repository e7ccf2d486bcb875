"""Three buses over one engine, under load, while everything is killed, stopped, cut off and forged; and that this finds bugs.

``MPBROADCAST_SOAK=120 python -m pytest tests/bridge/test_chaos.py`` runs each for so many seconds; the modules ``chaos`` and
``bugs`` beside this one are commands.
"""

import os
from typing import Any

import pytest

from tests.bridge.bugs import BUGS, find
from tests.bridge.chaos import run
from tests.bridge.roles import Settings

SECONDS = float(os.environ.get("MPBROADCAST_SOAK", "4"))

pytestmark = [pytest.mark.timeout(300 + 2 * SECONDS), pytest.mark.xdist_group("chaos")]


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["redis", "nats"])
@pytest.mark.parametrize(
    "options",
    [{}, {"buses": True}, {"overflow": "drop_oldest", "capacity": 100_000, "trims": True}],
    ids=["bridges and engine", "and brokers", "and logs, outboxes full"],
)
def test_exactly_once_or_announced(engine: str, options: dict[str, Any]) -> None:
    """Each channel has all messages of all buses once, in order, and one mark where some are missing; statistics agree."""
    assert not run(Settings(engine=engine, seconds=SECONDS, seed=7, pause=0.4, **options))


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_each_bug_can_be_put_in(bug: Any) -> None:
    """The text that it changes is there, once. ``python -m tests.bridge.bugs`` shows that each is found."""
    compile(bug.changed(), bug.module, "exec")


def test_a_bug_is_found() -> None:
    """A copy of the package in which a batch is reordered does not pass."""
    (bug,) = [bug for bug in BUGS if bug.name == "the messages of a batch change places"]
    assert "reordered" in find(bug, "redis", 2.0)
