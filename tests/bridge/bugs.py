"""Bugs put in on purpose, each a change of one text in a copy of the package: the chaos run must find every one.

    python -m tests.bridge.bugs --engine redis [words]

runs it for each bug, or those whose name has one of the words, and prints what was found. The exit status is 0 if each bug was
found as what the table expects, within some runs with different seeds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
RUNS: Final = 3
TIMEOUT: Final = 400.0  # seconds for a run


class Bug(NamedTuple):
    """What is wrong, the text of a module that is replaced, what the run needs for it to matter, and what it must find."""

    name: str
    module: str
    text: str
    replacement: str
    finds: str  # a regular expression
    options: str = ""

    def changed(self) -> str:
        """Return the module with the bug.

        :raises ValueError: the text is not there once.
        """
        source = (ROOT / "mpbroadcast" / self.module).read_text()
        if source.count(self.text) != 1:
            raise ValueError(f"{self.module} has the text of {self.name!r} {source.count(self.text)} times")
        return source.replace(self.text, self.replacement)


FORWARDING: Final = "bridge/forwarding.py"
ENTRIES: Final = "bridge/entries.py"
CORE: Final = "broker/core/bridging.py"
BRIDGES: Final = "broker/bridges.py"
KILLS: Final = "--only kill_bridge kill_supervisor kill_engine --pause 0.3"
DROPS: Final = "--overflow drop_oldest --capacity 100000 --only stop_engine cut_off kill_bridge"
FORGED: Final = "--only forge --pause 0.2"
BUSES: Final = "--buses --only kill_bus --pause 2"
QUIET: Final = "--only forge --pause 2"
GAPS: Final = "gap (not announced|announced without reason|announced twice)"

BUGS: Final[list[Bug]] = [
    Bug(
        "a position is acknowledged before its entry is in the log",
        FORWARDING,
        """            async with asyncio.timeout(_ANSWER):
                await engine.append(entry)
            self._acknowledge(last)
""",
        """            self._acknowledge(last)
            async with asyncio.timeout(_ANSWER):
                await engine.append(entry)
""",
        "lost",
        "--only kill_engine kill_bridge --pause 0.5",
    ),
    Bug(
        "what an error of the engine interrupts is not appended again",
        FORWARDING,
        """                await self._append(engine, self._taken)
                self._taken = None
""",
        """                taken, self._taken = self._taken, None
                await self._append(engine, taken)
""",
        "lost",
        "--only kill_engine --pause 0.5",
    ),
    Bug(
        "messages behind a gap have the positions of those that were dropped",
        FORWARDING,
        "first = max(taken.first, self._next)",
        "first = self._next",
        GAPS,
        DROPS,
    ),
    Bug(
        "the messages of a batch change places",
        FORWARDING,
        "messages = taken.messages[first - taken.first :]",
        "messages = taken.messages[first - taken.first :][::-1]",
        "reordered",
        QUIET,
    ),
    Bug(
        "the cursor is moved before what was read is handed on",
        FORWARDING,
        """            for position, data in entries:
                entry =""",
        """            if entries:
                await self._set_cursor(entries[-1][0])
                await asyncio.sleep(0.05)  # so that it is found soon
            for position, data in entries:
                entry =""",
        "lost",
        KILLS,
    ),
    Bug(
        "garbage in the log ends what reads it",
        FORWARDING,
        """            self._refused += 1
""",
        """            raise
""",
        "lost|stuck",
        FORGED,
    ),
    Bug(
        "what was dropped last is not announced",
        FORWARDING,
        """            await self._announce(engine, taken.end)
            self._acknowledge(taken.end - 1)
""",
        """            pass
""",
        "stuck|stats|gap",
        "--overflow drop_newest --capacity 100000 --only stop_engine cut_off",
    ),
    Bug(
        "pieces are put together in the wrong order",
        ENTRIES,
        "partial.data += piece[len(partial.data) - entry.offset :]",
        "partial.data[:0] = piece[len(partial.data) - entry.offset :]",
        "error|spoiled|forged",
        QUIET + " --large 0.05",
    ),
    Bug(
        "reading begins anew behind the first pieces of a message",
        ENTRIES,
        "return next(iter(self._partial.values())).cursor if self._partial else self._last",
        "return self._last",
        "lost",
        "--only kill_bridge --pause 0.3 --large 0.1",
    ),
    Bug("a bus gets its own messages", ENTRIES, "entry is None or entry.origin == self._own", "entry is None", "echoed", QUIET),
    Bug(
        "a signature is not verified",
        ENTRIES,
        "if not hmac.compare_digest(mac.digest(), view[-_MAC:]):",
        "if not mac:",
        "forged|lost|spoiled|doubled",
        FORGED,
    ),
    Bug(
        "a signature does not cover the stream",
        ENTRIES,
        'prefix = b"mpbroadcast bridge %d %b" % (len(name), name)',
        'prefix = b"mpbroadcast bridge %d" % bool(name)',
        "forged|lost|doubled",
        FORGED,
    ),
    Bug(
        "copies are routed",
        CORE,
        "had = count if self._incarnation < incarnation else min(count, max(0, position + 1 - self._next))",
        "had = 0",
        "doubled",
        FORGED,
    ),
    Bug(
        "a gap is not announced",
        CORE,
        "has_gap = (is_missing or is_successor) and",
        "has_gap = is_successor and",
        "gap not announced",
        DROPS,
    ),
    Bug(
        "a takeover is not announced",
        CORE,
        "has_gap = (is_missing or is_successor) and",
        "has_gap = is_missing and",
        "takeover not announced|gap not announced",
        BUSES,
    ),
    Bug(
        "a gap is announced for each of its entries",
        CORE,
        "            self._resumed.add(origin)\n",
        "            pass\n",
        "gap announced twice",
        DROPS,
    ),
    Bug(
        "a session is not given again what the one before it had",
        CORE,
        """            had = max(0, self.acknowledged + 1 - first)
""",
        """            had = 1 << 60
            if run.count:
                continue
""",
        "lost|stuck|error",
        KILLS,
    ),
    Bug(
        "a gap has a number",
        "broker/core/backlog.py",
        "self._append_gap(0, is_exact=False)",
        "self._append_gap(1, is_exact=True)",
        "gap with a number",
        DROPS,
    ),
    Bug(
        "a gap is announced to channels that cannot have missed anything",
        "broker/routing.py",
        "if topics.may_reach(own):",
        "if topics:",
        "gap announced",
        DROPS,
    ),
    Bug(
        "topics that are not wanted here come in",
        BRIDGES,
        "if not self._bridge.wanted.wants(item.topic):",
        "if not self._bridge:",
        "not bridged|transit",
        QUIET,
    ),
    Bug(
        "all topics go out",
        BRIDGES,
        'self._router.add(outbox, topics or ["*"])',
        'self._router.add(outbox, ["*"])',
        "not bridged|transit|lost|stats",
        QUIET,
    ),
    Bug(
        "what came over a bridge leaves over another one",
        BRIDGES,
        "publisher.not_yet.extend(map(_never, self._router.alternatives))",
        "pass",
        "echoed|transit|doubled|stuck",
        QUIET,
    ),
    Bug(
        "a message leaves over each bridge that has its topic",
        "broker/core/router.py",
        "if len(self.alternatives) > 1:",
        "if len(self.alternatives) > 9:",
        "doubled|transit",
        QUIET,
    ),
    Bug(
        "a broker that takes over does not know how far others had been routed",
        BRIDGES,
        'known.inbound.restore(bytes.fromhex(entry["origin"]), entry["incarnation"], entry["position"])',
        "pass",
        "doubled",
        BUSES,
    ),
    Bug(
        "a position is written down behind the messages",
        BRIDGES,
        "            if begun.ahead:\n",
        "            if begun.ahead > 1 << 40:\n",
        "doubled",
        BUSES,
    ),
    Bug(
        "a broker that takes over is not known as another one",
        BRIDGES,
        'entry["incarnation"] + 1)',
        'entry["incarnation"])',
        "lost|gap not announced",
        BUSES,
    ),
    Bug(
        "a stream is forgotten when its bridge dies",
        BRIDGES,
        """            if self._is_stopping:
                self.forget(bridge)
""",
        """            if True:
                self.forget(bridge)
""",
        "lost|stuck|stats",
        KILLS,
    ),
    Bug(
        "what is received is not counted in full",
        BRIDGES,
        "self._bridge.inbound.received += count",
        "self._bridge.inbound.received += 1",
        "stats: received",
        QUIET,
    ),
]


def find(bug: Bug, engine: str, seconds: float) -> str:
    """Run with a bug until it is found; return what was found, or an empty text and print all that came."""
    with tempfile.TemporaryDirectory(prefix="bug-") as folder:
        shutil.copytree(ROOT / "mpbroadcast", Path(folder, "mpbroadcast"), ignore=shutil.ignore_patterns("__pycache__"))
        os.symlink(ROOT / "tests", Path(folder, "tests"))
        Path(folder, "mpbroadcast", bug.module).write_text(bug.changed())
        environment = {**os.environ, "PYTHONPATH": folder, "MPBROADCAST_PATIENCE": "25"}
        for seed in range(1, RUNS + 1):
            words = ["-m", "tests.bridge.chaos", "--engine", engine, "--seed", str(seed), "--seconds", str(seconds)]
            command = [sys.executable, *words, "--pause", "0.5", *bug.options.split()]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
            found = re.findall(r"^WRONG (.*)$", done.stdout, flags=re.MULTILINE)
            if any(re.match(bug.finds, one) for one in found):
                return "; ".join(one.partition(",")[0] for one in found)
            print(f"{bug.name}, seed {seed}: status {done.returncode}", done.stdout, done.stderr[-3000:], sep="\n", flush=True)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="redis")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    missed = []
    for bug in BUGS:
        if not options.words or any(word in bug.name for word in options.words):
            found = find(bug, options.engine, options.seconds)
            print(f"{bug.name}: {found or 'NOT FOUND'}", flush=True)
            missed += [] if found else [bug.name]
    print(f"not found: {missed}" if missed else "all were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
