"""Messages of changing topics, sorted by subscription."""

from hypothesis import given
from hypothesis import strategies as st

from mpbroadcast.broker.core.singles import runs_by_target
from mpbroadcast.protocol.frames import Singles
from mpbroadcast.protocol.runs import Account, single_runs
from tests.support.frames_made import STEADY, batch_of

TARGETS = st.lists(st.lists(st.integers(0, 4), unique=True, max_size=3).map(tuple), min_size=1, max_size=30)


@STEADY
@given(targets=TARGETS)
def test_each_target_gets_its_messages_in_order(targets: list[tuple[int, ...]]) -> None:
    """In one run, which those with the same messages share; and each message counts once, whatever has it."""
    batches = [batch_of([number], b"t%d" % (number % 7)) for number in range(len(targets))]
    singles = Singles([batch.topic for batch in batches], [batch.frames for batch in batches])
    alone = single_runs(singles, 50)
    account = Account()
    runs = runs_by_target(singles, targets, 50, account)
    own = {target: [index for index, some in enumerate(targets) if target in some] for target in range(5)}
    assert {target: run.data for target, run in runs.items()} == {
        target: b"".join(alone[index] for index in indices) for target, indices in own.items() if indices
    }
    assert account.held == sum(batch.charge for batch, some in zip(batches, targets, strict=True) if some)
    assert all(run.charge == sum(batches[index].charge for index in own[target]) for target, run in runs.items())
    for target in runs:
        for other in runs:
            is_same = [target in some for some in targets] == [other in some for some in targets]
            assert is_same or runs[target] is not runs[other]
            assert not is_same or len({*map(frozenset, targets)}) < len({*targets}) or runs[target] is runs[other]
    for target in list(runs):
        run = runs.pop(target)
        assert account.held >= run.charge
        del run
    assert account.held == 0
