"""This library alone, once with each overflow policy, its subscribers keeping up, against ``block``.

Under ``latest`` a subscriber gets what is newest when it looks, so only the publishing is compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from multiprocessing.context import BaseContext

from benchmarks.peers.base import Shape
from benchmarks.peers.policies import POLICIES, Block, Latest
from benchmarks.running import Options
from benchmarks.session import Failed, Result, measure
from benchmarks.tables import Table, number
from benchmarks.works import Work

_MESSAGES = 300_000


def policy_tables(context: BaseContext, options: Options) -> list[Table]:
    """One to 1 and one to 4."""
    return [_table(context, n, options) for n in (1, 4)]


def _table(context: BaseContext, subscribers: int, options: Options) -> Table:
    count = 500 if options.smoke else max(1, int(2 * _MESSAGES * options.scale) // (subscribers + 1))
    results: dict[type[Block], list[Result]] = {peer: [] for peer in POLICIES}
    notes: list[str] = []
    for turn in range(options.rounds):
        for place in range(len(POLICIES)):
            peer = POLICIES[(place + turn) % len(POLICIES)]
            try:
                results[peer].append(measure(peer, context, Shape(subscribers=subscribers), Work(count), options.patience))
            except Failed as error:
                notes.append(f"failed: {peer.name}: {error}")
    head = ["", "messages/s", "lowest", "highest", "of block's", "publish/s", "lowest", "highest", "of block's", "not received"]
    rows: list[Sequence[str]] = []
    for peer, measured in results.items():
        if not measured:
            continue
        delivering = (
            [""] * 4 if peer is Latest else _figures([one.rate for one in measured], [one.rate for one in results[Block]])
        )
        publishing = _figures([one.publish_rate for one in measured], [one.publish_rate for one in results[Block]])
        rows.append([peer.name, *delivering, *publishing, number(sum(one.lost for one in measured), 0)])
    return Table(f"overflow policies, to {subscribers}, {count:,} messages to each", head, rows, notes)


def _figures(rates: list[float], others: list[float]) -> list[str]:
    share = statistics.median(rates) / statistics.median(others) if others else 0.0
    return [*(number(figure, 0) for figure in (statistics.median(rates), min(rates), max(rates))), f"{share:.2f}"]
