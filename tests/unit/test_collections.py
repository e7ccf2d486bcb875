"""Garbage collections in the broker's process."""

import gc
from collections.abc import Iterator

import pytest

from mpbroadcast.broker.host.main import MOST_LOOKED_THROUGH, bound_collections


@pytest.fixture
def looked_through() -> Iterator[list[int]]:
    """The number of objects that each collection of the test looks through."""
    counts: list[int] = []
    threshold, callbacks = gc.get_threshold(), [*gc.callbacks]

    def note(phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            counts.append(len(gc.get_objects()))

    bound_collections()
    gc.callbacks.append(note)
    yield counts
    gc.set_threshold(*threshold)
    gc.callbacks[:] = callbacks
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # as it is for all tests


def test_a_collection_looks_through_little_however_much_waits(looked_through: list[int]) -> None:
    """Whether objects become more, or come and go."""
    waiting = [[index] for index in range(3 * MOST_LOOKED_THROUGH)]
    for index in range(len(waiting)):
        waiting[index] = [index]
    waiting += [[index] for index in range(len(waiting))]
    assert looked_through
    assert max(looked_through) <= MOST_LOOKED_THROUGH


def test_what_is_in_a_cycle_does_not_become_more_and_more(looked_through: list[int]) -> None:
    """As the tracebacks that a handler of the user's log keeps may be."""
    for _ in range(3 * MOST_LOOKED_THROUGH):
        cycle: list[object] = []
        cycle.append(cycle)
    assert looked_through
    assert len(gc.get_objects()) < 2 * MOST_LOOKED_THROUGH
