"""Messages of changing topics, sorted by subscription. Pure: no descriptor, no clock.

Where each message has another topic than the one before it, a run for each of them, put into each backlog, is what the broker
takes longest for. So the messages of a subscription that were read together are one run for its backlog.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import TypeVar

from mpbroadcast.protocol.frames import Singles
from mpbroadcast.protocol.runs import Account, SinglesRun, single_runs

S = TypeVar("S", bound=Hashable)


def runs_by_target(singles: Singles, targets: Sequence[tuple[S, ...]], position: int, account: Account) -> dict[S, SinglesRun]:
    """Return the run of each target. ``targets`` are those of each message, and ``position`` is the id of the first one.

    Each run has its messages in their order. Targets with the same messages share a run, and no message is copied for a target.
    """
    groups: defaultdict[tuple[S, ...], list[int]] = defaultdict(list)  # of messages with the same targets
    for index, own in enumerate(targets):
        groups[own].append(index)
    groups.pop((), None)
    if not groups:
        return {}
    messages = single_runs(singles, position)
    indices = [*groups.values()]
    counted = [SinglesRun([messages[index] for index in group], account) for group in indices]
    groups_of: defaultdict[S, list[int]] = defaultdict(list)
    for number, own in enumerate(groups):
        for target in own:
            groups_of[target].append(number)
    runs: dict[tuple[int, ...], SinglesRun] = {(number,): run for number, run in enumerate(counted)}
    found: dict[S, SinglesRun] = {}
    for target, numbers in groups_of.items():
        run = runs.get(key := tuple(numbers))
        if run is None:
            order = sorted(chain.from_iterable(indices[number] for number in numbers))
            run = SinglesRun([messages[index] for index in order], account, tuple(counted[number] for number in numbers))
            runs[key] = run
        found[target] = run
    return found
