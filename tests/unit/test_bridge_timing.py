"""When a bridge tries again, when its process hangs, how much it logs, and how its tasks end."""

import asyncio
import contextlib

from mpbroadcast.bridge.process import cancel
from mpbroadcast.bridge.timing import BackOff, RateLimit, Watch


def test_pauses_grow() -> None:
    back_off = BackOff(0.1, 1.0)
    assert [back_off.pause() for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    back_off.reset()
    assert back_off.pause() == 0.1


def test_a_silent_process_hangs() -> None:
    watch = Watch(1.0)
    watch.begin(100.0)
    assert [watch.silence(100.0 + second) for second in range(1, 4)] == [1.0, 2.0, 3.0]
    watch.begin(104.0)
    assert watch.silence(105.0) == 1.0


def test_a_machine_that_was_suspended_hangs_none() -> None:
    """Only the time counts in which the supervisor itself has run."""
    watch = Watch(1.0)
    watch.begin(100.0)
    assert watch.silence(5000.0) == 2.0


def test_few_lines_are_logged() -> None:
    limit = RateLimit(10.0)
    assert [limit.passes("a", now) for now in (0.0, 1.0, 9.9, 10.0, 11.0)] == [True, False, False, True, False]
    assert limit.passes("b", 11.0)


def test_a_task_that_swallows_a_cancellation_ends() -> None:
    """As ``asyncio.wait_for`` does up to Python 3.11: it is cancelled again. Its error is not logged."""

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        try:
            await asyncio.sleep(3600)
        finally:
            raise OSError

    async def run() -> None:
        tasks = [asyncio.ensure_future(stubborn()), asyncio.ensure_future(asyncio.sleep(3600))]
        await asyncio.sleep(0)
        await cancel(tasks)
        assert all(task.done() for task in tasks)

    asyncio.run(run())
