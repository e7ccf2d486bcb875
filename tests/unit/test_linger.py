"""When a broker ends that belongs to no process."""

import pytest

from mpbroadcast.broker.core.linger import Linger


def test_it_ends_some_time_after_it_was_needed_last() -> None:
    """Of looks that find nothing new, only the one at the end returns anything: a timer is set already."""
    linger = Linger(5.0)
    assert [linger.look(now) for now in (10.0, 11.0, 14.9, 14.9999, 16.0)] == [5.0, None, None, 0.0, 0.0]
    tick = Linger(0.001)
    assert [tick.look(0.0), tick.look(0.0)] == [0.001, None]


def test_a_session_between_two_looks_begins_the_time_anew() -> None:
    """Under churn it never ends, whether a look finds the session, or it has come and gone in between."""
    linger = Linger(5.0)
    for now in range(0, 100, 4):
        assert linger.look(float(now)) == 5.0
        linger.begin_anew()
    assert linger.look(104.0) == 5.0
    assert linger.look(109.0) == 0.0


@pytest.mark.parametrize(("seconds", "first"), [(0.0, 0.0), (float("inf"), float("inf"))])
def test_at_once_and_never(seconds: float, first: float) -> None:
    linger = Linger(seconds)
    assert linger.look(1.0) == first
    assert linger.look(1e9) == (0.0 if not seconds else None)


def test_it_waits_for_the_first_session() -> None:
    linger = Linger(0.0, first=3.0)
    assert [linger.look(now) for now in (1.0, 2.0)] == [3.0, None]
    linger.begin_anew()
    assert linger.look(2.5) == 0.0
    assert Linger(0.0, first=3.0).look(1.0) == 3.0
    assert Linger(5.0, first=3.0).look(1.0) == 5.0
