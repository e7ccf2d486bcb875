"""Whether the tests notice small faults: changes one thing at a time in the pure parts of the library, and runs the tests.

``python tests/support/mutate.py [words]`` tries all mutants, or those whose file or function has one of the words, and
``--most 100`` a sample. It ends with 1 when one survived that :data:`EXPECTED` does not explain.

A mutant is a function whose syntax tree differs in one place: no line and no layout matters. The tests are collected once. Each
mutant is a fork in which the function has got other code; of the tests, only those that reach it are run, the quickest first.
(Of the well-kept tools, mutmut deletes no statements and has no list of what may survive, but for comments in the library.)
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import gc
import linecache
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final, NamedTuple, TypeVar

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
AT_ONCE: Final = 2
MEMORY: Final = 8 << 30  # bytes of addresses that a mutant may have

# Modules by their names, wherever they are, or what is in them.
TARGETS: Final = (
    *("router", "patterns", "limits", "states", "policies", "backlog", "history", "ring_holds"),
    *("frames", "runs", "control", "fd_packets", "validation", "ring_allocator"),
    *("processes.PeerProcess", "ring.Ring.put", "pipe_reader.decode", "supervisor.Patience", "journal.replayed"),
)
NOT_TRIED: Final = ("__repr__", "listed")  # texts for people

# They need no fixture of conftest.py but ``bus``.
TESTS: Final = (
    *(f"unit/test_{name}.py" for name in ("router", "budget", "states", "backlog", "history", "processes", "validation")),
    *(f"properties/test_{name}.py" for name in ("frames", "runs", "rings", "control")),
    *(f"integration/test_restart.py::test_{name}" for name in ("patience", "cut_lines_are_the_state_before_them")),
    *(
        f"integration/test_bad_input.py::test_{name}"
        for name in (
            *("publish_refuses", "subscribe_refuses", "topics_at_the_limit", "timeouts_that_are_good"),
            *("a_channel_refuses", "connect_refuses", "connect_to_an_impossible_address"),
        )
    ),
)

# Why no test can tell these from the original, or need not. They are given by their beginnings.
EXPECTED: Final[dict[str, tuple[str, ...]]] = {
    "it is only slower, or quicker": (
        "Router.add: made -> False",
        "Patterns.add: made -> False",
        "Backlog._put_fitting: self.takes(run.charge) -> False",
        "matcher: '?' in pattern or '[' in pattern -> True",
        "_beginning: 1 -> ",
        "Router.targets: found is None -> True",
        "Router.targets: len(self._found) >= _CACHED_TOPICS -> True",
        "Router.targets: len(self._found) >= _CACHED_TOPICS -> len(self._found) > _CACHED_TOPICS",
        "Router.targets: self._found[topic] = found -> pass",
        "matches: is_pattern(own) -> True",
        "encoded_topic: ",
        "Splitter.split: self._rest -> True",
        "Splitter.split: route -> True",
        "_route: not tag -> False",
        "Backlog.fitting: run.charge <= room -> ",
        "DropOldest.put: self.takes(run.charge) -> False",
        "_Dropping._drop: run.charge <= excess -> run.charge < excess",
        "_Dropping._drop: run.count == 1 -> ",
        "Backlog._joined: len(parts) > 1 -> ",
    ),
    "no message without a payload comes in pieces": (
        "Splitter._piece: len(frame) < HEAD.size -> len(frame) <= HEAD.size",
        "_route: skip > min(size, len(frame)) -> skip >=",
    ),
    "how much goes together need not be exact": (
        "_references: room > 0 -> room > 1",
        "_Dropping.to_write: 2 * self.pipe -> 3 * self.pipe",
        "_Dropping.to_write: 2 * PIPE_BUF -> 3 * PIPE_BUF",
    ),
    "the size of a pipe is known before it is written to": ("Backlog.__init__: self.pipe_size = 0 -> self.pipe_size = 1",),
    "nothing was missed before": ("Disconnect.put: self.missed += 1 -> self.missed = 1",),
    "what was dropped is in a note or counted, never both": (
        "_Dropping._drop: self._gap += runs[index].missed -> self._gap = ",
    ),
    "it is dropped as a run without messages": ("_Dropping._drop: del runs[index] -> pass",),
    "nothing is used before the first message": ("Holds.__init__: -1 ->", "Holds.__init__: [0] -> [1] #2"),
    "there is always one": ("Holds.arrived: -1 -> 0",),
    "a run that fits, or a single message, is not cut, nor is one cut into all of it and nothing": (
        "_Dropping._split_to: run.size <= room",
        "_Dropping._split_to: run.count <= 1 -> ",
        "_Dropping._split_to: fits < run.count -> ",
    ),
    "it is refused below": (
        "Splitter.split: size < 8 -> size <",
        "Splitter.split: tag > _ROUTE -> tag >= _ROUTE",
    ),
    "a longer question is as good": ("serve_handshake: os.urandom(", "client_handshake: os.urandom("),
    "so much is for ever, too": ("check_timeout: timeout > _FOREVER -> timeout >= _FOREVER",),
    "then psutil says that there is no such process, but for a number that is used again": (
        "PeerProcess.is_dead: not self._process.is_running() -> False",
    ),
    "only what was taken is given back, and once": (
        "RingAllocator.__init__: self._before = (0, 0, 0) -> pass",
        "RingAllocator.__init__: (0, 0, 0) -> ",
        "RingAllocator.undo: self._before = (self.next, self.end, 0) -> pass",
    ),
    "a frame begins with its size, as a table of one would": ("Run.charges: self.count == 1 -> ",),
    "that is the same number": (
        "_route: min(size, len(frame)) -> max(size, len(frame))",
        "RingAllocator._taken: chunks -> True",
    ),
    "the slower way, which puts it in the same place, is taken": (
        "Ring.put: start + length > allocator.end -> start + length >=",
    ),
    "both are of one length": ("Cost.plus: True -> False", "Budget.check: True -> False"),
    "no clock is so exact": ("Patience.pause: self._last[0] < now - self._seconds -> self._last[0] <=",),
}

OTHER: Final = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
OTHER.update([(new, old) for old, new in OTHER.items()])
NAMES: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}
UNTOUCHED: Final = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments, ast.expr_context)
UNTOUCHED_FIELDS: Final = ("decorator_list", "annotation", "returns", "simple")


def alternatives(node: ast.AST, parent: ast.AST, field: str) -> Iterator[ast.AST]:
    """What may stand in the place of ``node``."""
    condition = field in ("test", "ifs")
    if condition and not isinstance(node, ast.Constant):
        yield ast.Constant(field == "ifs")
        if isinstance(parent, (ast.If, ast.IfExp)):
            yield ast.Constant(True)
    elif isinstance(parent, ast.BoolOp) and field == "values":
        yield ast.Constant(isinstance(parent.op, ast.And))
    match node:
        case ast.Compare():
            for index, op in enumerate(node.ops):
                if isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) or not condition:
                    ops = [*node.ops[:index], OTHER[type(op)](), *node.ops[index + 1 :]]
                    yield ast.Compare(node.left, ops, node.comparators)
        case ast.BinOp():
            yield node.left
        case ast.UnaryOp() if not condition:
            yield ast.Constant(0) if isinstance(node.operand, ast.Constant) else node.operand
        case ast.Constant(value=bool(value)) if not condition:
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)) if not isinstance(parent, (ast.AugAssign, ast.Subscript, ast.UnaryOp)):
            yield from map(ast.Constant, (0, 2) if value == 1 else (value + 1,))
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield ast.Call(ast.Name(NAMES[name], ast.Load()), node.args, node.keywords)
        case ast.AugAssign():
            yield from (ast.Pass(), ast.Assign([node.target], node.value))
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)) if len(targets) == len(values):
            for index in range(len(targets)):
                left, right = ([*each[:index], *each[index + 1 :]] for each in (targets, values))
                yield ast.Assign([ast.Tuple(left, ast.Store())], ast.Tuple(right, ast.Load()))
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            if any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(value)):
                yield ast.Pass()
        case ast.Expr(value=ast.Call()) | ast.Assign() | ast.Delete() | ast.Break() | ast.Continue():
            yield ast.Pass()


def edits(parent: ast.AST) -> Iterator[str]:
    """Make one change after the other below ``parent``, each undone before the next; what it is."""
    for field, value in ast.iter_fields(parent):
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if field in UNTOUCHED_FIELDS or not isinstance(child, ast.AST) or isinstance(child, UNTOUCHED):
                continue
            where: tuple[Any, Any] = (value, index) if isinstance(value, list) else (vars(parent), field)
            # A number alone says too little.
            around = isinstance(child, ast.Constant) and isinstance(parent, (ast.expr, ast.Return, ast.Assign))
            old = ast.unparse(parent if around else child)
            for other in alternatives(child, parent, field):
                where[0][where[1]] = other
                yield f"{old} -> {ast.unparse(ast.fix_missing_locations(copy.copy(parent if around else other)))}"
                where[0][where[1]] = child
            yield from edits(child)


def definitions(parent: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions and methods, by qualified name."""
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and node.name not in NOT_TRIED:
            yield prefix + node.name, node


def parsed(file: str) -> tuple[ast.Module, dict[str, ast.FunctionDef]]:
    tree = ast.parse("".join(linecache.getlines(file)))  # which does not change meanwhile
    return tree, dict(definitions(tree))


Place = tuple[str, str]  # the file of a function, and its qualified name


def place_of(code: CodeType) -> Place:
    return code.co_filename, code.co_qualname


def install(tree: ast.Module, file: str) -> None:
    """Let the functions of a module have the code that they have in ``tree``, in this process."""
    codes = [compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True)]
    for code in codes:
        codes += (constant for constant in code.co_consts if isinstance(constant, CodeType))
    found = {place_of(code): code for code in codes if "<" not in code.co_qualname}
    for function in gc.get_objects():
        if isinstance(function, FunctionType):
            function.__code__ = found.get(place_of(function.__code__), function.__code__)


def reported(files: Iterable[str]) -> set[Place]:
    """The functions in these files that are called from now on, in this process."""
    reached: set[Place] = set()
    vars(builtins)["mutate_reached"] = lambda *place: reached.add(place)
    for file in files:
        tree, functions = parsed(file)
        for name, node in functions.items():
            node.body[:0] = ast.parse(f"mutate_reached({file!r}, {name!r})").body
        install(tree, file)
    return reached


class Mutant(NamedTuple):
    """The change of this number in the function there."""

    place: Place
    number: int
    text: str


def mutants() -> Iterator[Mutant]:
    """All that there are."""
    for target in TARGETS:
        stem, _, inside = target.partition(".")
        (file,) = map(str, (ROOT / "mpbroadcast").rglob(f"{stem}.py"))
        chosen = {name: node for name, node in parsed(file)[1].items() if f"{name}.".startswith(f"{inside}.") or not inside}
        assert chosen, f"there is no {target}"
        for name, node in chosen.items():
            seen: Counter[str] = Counter()
            for index, change in enumerate(edits(node)):
                text = f"{name}: {' '.join(change.split())}"
                seen[text] += 1
                yield Mutant((file, name), index, text if seen[text] == 1 else f"{text} #{seen[text]}")


J = TypeVar("J")


def in_children(jobs: Iterable[J], do: Callable[[J], Any]) -> Iterator[tuple[J, Any]]:
    """Do each in a fork: with what ``do`` returned, or the status with which the fork has ended."""
    left = iter(jobs)
    running: dict[int, tuple[J, Any]] = {}
    while True:
        for job in islice(left, AT_ONCE - len(running)):
            file = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed below
            child = os.fork()
            if not child:
                try:
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, 1)
                    os.dup2(null, 2)
                    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                    pickle.dump(do(job), file)
                    file.flush()
                    os._exit(0)
                finally:
                    os._exit(1)
            running[child] = job, file
        if not running:
            return
        child, status = os.wait()
        job, file = running.pop(child)
        with file:
            file.seek(0)
            yield job, status or pickle.load(file)


class Failed(BaseException):
    """A test has failed: no other is run."""


class Tried(NamedTuple):
    """A test: what it takes, in seconds of the processor, its place among the items, and what it reaches."""

    seconds: float
    place: int
    reached: frozenset[Place]


class Plugin:
    """Lets pytest collect the tests, and runs them itself."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.mutants = [*mutants()]
        self.items: Sequence[pytest.Item] = ()
        self.tests: list[Tried] = []
        self.unexplained = 0

    def pytest_configure(self) -> None:
        """That a test fails is enough: the shortest way to the failure takes long."""
        from hypothesis import Phase, settings

        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("mutants", phases=phases, derandomize=True, database=None, deadline=None)
        settings.load_profile("mutants")

    @pytest.fixture
    def bus(self) -> Iterator[Any]:
        """As in conftest.py."""
        from mpbroadcast import start_broadcaster

        with start_broadcaster() as broadcaster:
            yield broadcaster

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            raise Failed(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of running each test once."""
        assert not session.testsfailed, "not all tests could be collected"
        self.items = session.items
        for _, answer in in_children(range(AT_ONCE), self.watched):
            assert isinstance(answer, list), f"without any fault, this fails: {answer}"
            self.tests += answer
        self.tests.sort()
        self.try_all()
        return True

    def failure(self, index: int) -> str:
        """The name of this test, if it fails."""
        try:
            self.items[index].config.hook.pytest_runtest_protocol(item=self.items[index], nextitem=None)
        except Failed as failed:
            return str(failed)
        return ""

    def watched(self, part: int) -> list[Tried] | str:
        """What each of a part of the tests takes and reaches."""
        tests = []
        reached = reported({mutant.place[0] for mutant in self.mutants})
        for index in range(part, len(self.items), AT_ONCE):
            reached.clear()
            start = time.process_time()
            if failure := self.failure(index):
                return failure
            tests.append(Tried(time.process_time() - start, index, frozenset(reached)))
        return tests

    def killer(self, mutant: Mutant) -> str:
        """The first test that fails."""
        tree, functions = parsed(mutant.place[0])
        for index, _ in enumerate(edits(functions[mutant.place[1]])):
            if index == mutant.number:
                install(tree, mutant.place[0])
        for test in self.tests:
            if mutant.place in test.reached:
                signal.setitimer(signal.ITIMER_PROF, 2 + 4 * test.seconds)
                signal.alarm(20 + int(20 * test.seconds))  # if it waits for something
                if failure := self.failure(test.place):
                    return failure
        return ""

    def try_all(self) -> None:
        """Try the mutants that were asked for."""
        words, most = self.options.words, self.options.most
        chosen = [each for each in self.mutants if not words or any(word in f"{each.place[0]} {each.text}" for word in words)]
        if most is not None and most < len(chosen):
            chosen = random.Random(self.options.seed).sample(chosen, most)
        survivors = set()
        start = time.monotonic()
        for mutant, answer in in_children(chosen, self.killer):
            reason = next((reason for reason, texts in EXPECTED.items() if mutant.text.startswith(texts)), "")
            if not answer:
                survivors.add(mutant.text)
                self.unexplained += not reason
            if self.options.verbose or not (answer or reason):
                verdict = f"killed by {answer}" if answer else f"survived: {reason}" if reason else "SURVIVED"
                print(f"{Path(mutant.place[0]).stem}: {mutant.text}: {verdict}", flush=True)
        for text in (text for texts in EXPECTED.values() for text in texts):
            found = {mutant.text for mutant in self.mutants if mutant.text.startswith(text)}
            if not found or (found <= {mutant.text for mutant in chosen} and not found & survivors):
                print(f"stale, as {'it is killed' if found else 'there is no such mutant'}: {text}")
        seconds, killed = time.monotonic() - start, len(chosen) - len(survivors)
        print(f"{killed} of {len(chosen)} killed, {self.unexplained} survived without a reason, in {seconds:.0f} s")


def main() -> int:
    """1 when one survived unexplained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of files or functions")
    parser.add_argument("--most", type=int, help="how many mutants, which the seed chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-v", "--verbose", action="store_true", help="also what was killed, and by which test")
    plugin = Plugin(parser.parse_args())
    sys.path[0] = str(ROOT)
    os.chdir(ROOT)
    options = ["-o", "addopts=", "--noconftest", "-p", "no:cacheprovider", "-p", "no:terminal", "-s", "--timeout", "0"]
    code = pytest.main([*options, *(f"tests/{name}" for name in TESTS)], [plugin])
    return int(code) or int(plugin.unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
