"""Whether the tests notice small faults: changes one line of the library at a time, in a copy, and runs the tests that should.

``python tests/mutate.py [words]`` goes through all, or those whose file or text has one of the words. It ends with 1 when a
fault was found by no test and nothing explains that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
TIMEOUT: Final = 100.0
"""Seconds that the tests of one fault may take; a fault that makes them hang is found, too."""


QUICK: Final = """
from hypothesis import Phase, settings

settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")
"""
"""For the end of the copy's conftest.py: that a test fails is enough, the shortest way to the failure takes long."""


class Mutation(NamedTuple):
    """A fault: ``old`` occurs once in ``file``; these test modules should find it; or why none can."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""


ROUTER: Final = ("test_survivors", "test_router")
OUTBOX: Final = ("test_survivors", "test_outbox")
FRAMES: Final = ("test_survivors", "test_frames", "test_ring_parts")
PARTS: Final = ("test_survivors", "test_ring_parts")
SURVIVORS: Final = ("test_survivors",)

MUTATIONS: Final = (
    # --- who gets what
    Mutation("broker/router.py", "if length <= len(text):", "if length < len(text):", ROUTER),
    Mutation("broker/router.py", "self._lengths[len(beginning)] += 1", "self._lengths[len(beginning)] = 1", ROUTER),
    Mutation(
        "broker/router.py",
        "self._found.clear()\n        own = self._topics.get(subscription, {})",
        "own = self._topics.get(subscription, {})",
        ROUTER,
    ),
    Mutation("broker/router.py", "tuple(sorted(members, key=self._rank.__getitem__))", "tuple(members)", ROUTER),
    Mutation("broker/router.py", "if len(self._found) >= _CACHED_TOPICS:", "if False:", ROUTER),
    Mutation("broker/router.py", "if not alike:\n", "if False:\n", ROUTER),
    Mutation("broker/router.py", "self._found[topic] = found", "pass", ROUTER, "it is only remembered to be quicker"),
    # --- backlogs
    Mutation("broker/outbox.py", "self.referred + charge <= self.capacity", "self.referred + charge < self.capacity", OUTBOX),
    Mutation("broker/outbox.py", "self.pipe + self.referred + charge <=", "self.pipe + charge <=", OUTBOX),
    Mutation("broker/outbox.py", "not self.waiting and self.pipe <= 1", "not self.waiting and self.pipe <= 0", OUTBOX),
    Mutation("broker/outbox.py", "self.published -= missed - 1", "self.published -= missed", OUTBOX),
    Mutation("broker/outbox.py", "missed += last.missed", "missed = last.missed", OUTBOX),
    Mutation("broker/outbox.py", "if len(self._runs) > (1 if self._offset else 0)", "if len(self._runs) > 0", OUTBOX),
    Mutation("broker/outbox.py", "if first == run.count and self.clear:", "if first == run.count:", OUTBOX),
    Mutation(
        "broker/outbox.py",
        "if run.charge <= excess or run.count == 1:",
        "if run.charge <= excess:",
        OUTBOX,
        "a single message that is larger is dropped below as well",
    ),
    Mutation("broker/outbox.py", "self.left += run.count + self._later", "self.left += run.count", OUTBOX),
    Mutation("broker/outbox.py", "runs, place = self._runs, 1 if self._offset else 0", "runs, place = self._runs, 0", OUTBOX),
    Mutation("broker/outbox.py", '"latest" and self.pipe > 0 and self', '"latest" and self', OUTBOX),
    Mutation("broker/outbox.py", "if not run.holders:", "if True:", OUTBOX),
    Mutation("broker/outbox.py", "(total > limit and parts) or run.parcel is not None", "total > limit and parts", OUTBOX),
    Mutation("broker/outbox.py", "self.pipe_size - 2 * self.pipe - 2 * PIPE_BUF", "self.pipe_size - self.pipe", OUTBOX),
    Mutation("broker/outbox.py", "charge - FRAME_OVERHEAD + 12", "charge - FRAME_OVERHEAD", OUTBOX),
    # --- frames
    Mutation("wire/frames.py", "if self.held > MAX_FRAME:", "if False:", FRAMES),
    Mutation("wire/frames.py", "start + _ROOM >= len(frame)", "start + _ROOM > len(frame)", FRAMES),
    Mutation("wire/frames.py", "if size > PIPE_BUF or size < 8:", "if size > PIPE_BUF:", FRAMES),
    Mutation("wire/frames.py", "if HEAD.unpack_from(frame)[0] != len(frame):", "if False:", FRAMES),
    Mutation("wire/frames.py", "room > 0 and position <= last", "room > 0 and position < last", FRAMES),
    Mutation("wire/frames.py", "head[16 if HEAD.unpack_from(head)[1] & EXCLUDE else 8 :]", "head[8:]", FRAMES),
    Mutation("wire/frames.py", "self.given_up.append(number)", "pass", FRAMES),
    Mutation("wire/frames.py", "block *= 4", "block *= 1", FRAMES, "how many are compared at once is only a matter of speed"),
    # --- who is dead
    Mutation("broker/liveness.py", "if pid <= 0:", "if pid < 0:", SURVIVORS),
    Mutation("broker/liveness.py", " or self._process.status() == psutil.STATUS_ZOMBIE", "", SURVIVORS),
    Mutation(
        "broker/liveness.py",
        "except psutil.NoSuchProcess:\n            return True",
        "except psutil.NoSuchProcess:\n            return False",
        SURVIVORS,
    ),
    Mutation("broker/liveness.py", "fd, self.fd = self.fd, -1", "fd = self.fd", SURVIVORS),
    # --- runs
    Mutation(
        "wire/runs.py",
        "if self.sizes is None or count >= self.messages:",
        "if self.sizes is None or count > self.messages:",
        FRAMES,
    ),
    Mutation("wire/runs.py", "4 * self.count + sum(sizes[:start])", "4 * self.count + sum(sizes[: start + 1])", FRAMES),
    Mutation("wire/runs.py", "if start == 0 and stop == self.count:", "if stop == self.count:", FRAMES),
    Mutation("wire/runs.py", "len(frames) + count * OVERHEAD)", "len(frames) + OVERHEAD)", FRAMES),
    # --- rings
    Mutation("broker/rings.py", "and chunk != self._current:", ":", PARTS),
    Mutation("broker/rings.py", "self._used &= ~freed", "pass", PARTS),
    Mutation("broker/rings.py", "self._entries[0][0] <= count:", "self._entries[0][0] < count:", PARTS),
    Mutation("broker/rings.py", "self.memories -= ring is None", "pass", PARTS),
    Mutation("wire/ring.py", "self.free &= ~chunks", "pass", PARTS),
    Mutation("wire/ring.py", "(runs & -runs).bit_length() - 1", "runs.bit_length() - 1", PARTS),
    Mutation(
        "wire/ring.py",
        "self._before = (self.next, self.end, 0)",
        "pass",
        PARTS,
        "nobody gives back twice, and then it is free already",
    ),
    Mutation("wire/ring.py", "room.next = start\n", "pass\n", PARTS),
    Mutation("wire/ring.py", "(offset + length - 1) // chunk + 1)", "(offset + length) // chunk + 1)", PARTS),
    Mutation(
        "wire/ring.py",
        "if start + length > room.end:",
        "if start + length >= room.end:",
        PARTS,
        "the slower way, which puts it in the same place, is taken",
    ),
)


def check() -> None:
    """Each text must be there, and only once: else the list is older than the code."""
    for mutation in MUTATIONS:
        count = (ROOT / "mpbroadcast" / mutation.file).read_text().count(mutation.old)
        if count != 1:
            raise SystemExit(f"{mutation.file}: {mutation.old!r} is there {count} times, not once")
        for name in mutation.tests:
            if not (ROOT / "tests" / f"{name}.py").exists():
                raise SystemExit(f"{mutation.file}: there is no tests/{name}.py")


def found(copy: Path, mutation: Mutation) -> str:
    """What a run of the tests says with this fault in the copy: ``""`` when all passed."""
    file = copy / "mpbroadcast" / mutation.file
    text = file.read_text()
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        return failure(copy, mutation.tests)
    finally:
        file.write_text(text)


def failure(copy: Path, tests: tuple[str, ...]) -> str:
    """The first failure of these test modules in the copy; ``""`` for none."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--timeout",
        "30",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "--no-header",
    ]
    command += [f"tests/{name}.py" for name in tests]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"more than {TIMEOUT:.0f} s"
    if run.returncode == 0:
        return ""
    if run.returncode != 1:  # the tests did not run, or broke off: that is no finding
        return "a hang" if "Timeout" in run.stdout + run.stderr else f"pytest ended with {run.returncode}"
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0].partition("::")[2] if lines else "a failure"


def main(words: list[str]) -> int:
    """Try all faults, or those that have one of the words; 1 when one survived unexplained."""
    check()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not words or any(word in f"{mutation.file} {mutation.old} {mutation.new}" for word in words)
    ]
    start = time.monotonic()
    survived = killed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", ".venv"))
        with (copy / "tests" / "conftest.py").open("a") as conftest:
            conftest.write(QUICK)
        modules = tuple(sorted({name for mutation in chosen for name in mutation.tests}))
        unchanged = failure(copy, modules)
        if unchanged:
            raise SystemExit(f"the tests fail without any fault: {unchanged}")
        for mutation in chosen:
            said = found(copy, mutation)
            killed += bool(said)
            if said:
                verdict = f"killed by {said}"
            elif mutation.reason:
                verdict = f"SURVIVED, as expected: {mutation.reason}"
            else:
                verdict = "SURVIVED"
                survived += 1
            old, new = (" ".join(text.split()) for text in (mutation.old, mutation.new))
            print(f"{mutation.file}: {old} -> {new or '(nothing)'}: {verdict}", flush=True)
    seconds = time.monotonic() - start
    print(f"{killed} of {len(chosen)} killed, {survived} survived without a reason, in {seconds:.0f} s")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
