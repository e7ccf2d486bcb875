"""One measurement in an interpreter of its own, which prints its figures as JSON. ``benchmarks.against`` starts it.

Its arguments are the tree that ``mpbroadcast`` must come from and, as JSON, what :func:`_measure` takes; without the latter it
only looks whether the package does come from there.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pathlib
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)  # so that everything that was started is ended


def _imported() -> str:
    return str(importlib.import_module("mpbroadcast").__file__)


def _report_imported(report: Connection) -> None:
    report.send(_imported())


def _check(root: pathlib.Path, context: BaseContext) -> None:
    """The package comes from this tree, here and in a child process, as the broker is one; and the peers can use it."""
    wanted = (root / "mpbroadcast" / "__init__.py").resolve()
    mine = _imported()
    here, there = context.Pipe()
    child = context.Process(target=_report_imported, args=(there,))  # type: ignore[attr-defined]
    child.start()
    there.close()
    for found, whose in ((mine, "the process that measures"), (here.recv(), "its child")):
        if pathlib.Path(found).resolve() != wanted:
            raise ImportError(f"{whose} imports mpbroadcast from {found}, and not from {wanted}")
    child.join()
    importlib.import_module("benchmarks.peers")  # finds all that it needs there


def _measure(context: BaseContext, row: str, peer: str, count: int, patience: float, smoke: bool) -> dict[str, Any]:
    # Imported here: what is wrong with the package shall be reported, too.
    from benchmarks.peers import OWN
    from benchmarks.rows import ROWS, smaller

    chosen = next(one for one in ROWS if one.name == row)
    if smoke:
        chosen = smaller(chosen)
    measured = chosen.ask(chosen, next(one for one in OWN if one.name == peer), context, count, patience)
    return {"values": measured.values, "seconds": measured.seconds, "gave_up": measured.gave_up}


def main() -> None:
    """Check, measure, and print."""
    signal.signal(signal.SIGTERM, _terminate)
    context = multiprocessing.get_context()
    answer: dict[str, Any] = {}
    try:
        _check(pathlib.Path(sys.argv[1]), context)
        if len(sys.argv) > 2:
            answer = _measure(context, **json.loads(sys.argv[2]))
    except Exception as error:
        answer = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
