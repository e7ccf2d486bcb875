"""From when on, and until when, a publisher's pipe is read after naps."""

import pytest

from mpbroadcast.broker.core.pace import HOLD, MANY, SPAN, Pace

_GAP = SPAN / MANY  # between messages of a stream that is just too slow


@pytest.mark.parametrize(
    ("reads", "gap", "has_much", "expected"),
    [
        pytest.param([1] * 2 * MANY, 0.9 * _GAP, False, True, id="a stream of which each message is read alone"),
        pytest.param([3] * MANY, 2.0 * _GAP, False, True, id="the same in small batches"),
        pytest.param([1] * 4 * MANY, 1.1 * _GAP, False, False, id="slower"),
        pytest.param([MANY - 1], 1.0, False, False, id="few at once"),
        pytest.param([MANY], 1.0, False, False, id="many at once, as far as the time shows"),
        pytest.param([1], 1.0, True, True, id="much at once"),
    ],
)
def test_it_is_busy(reads: list[int], gap: float, has_much: bool, expected: bool) -> None:
    pace, now = Pace(), 1000.0
    for count in reads:
        now += gap
        pace.count += count
        is_busy = pace.is_busy(now, has_much=has_much)
    assert is_busy is expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.9 * HOLD, True), (1.1 * HOLD, False)])
def test_it_stays_busy_over_a_pause(seconds: float, expected: bool) -> None:
    """A few messages in the pause do not extend it."""
    pace = Pace()
    assert pace.is_busy(1000.0, has_much=True)
    pace.count += 1
    assert pace.is_busy(1000.0 + HOLD / 2)
    assert pace.is_busy(1000.0 + seconds) is expected
