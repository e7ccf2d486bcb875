"""Change one thing at a time in the pure modules, and see whether a test fails.

``python tests/support/mutate.py [words]`` tries all mutants, or those whose module or text has one of the words, prints the
survivors (``-v``: all), and ends with 1 unless :data:`EQUIVALENT` explains each.

A mutant is a function whose syntax tree differs in one position: no line and no layout matters. Each is a fork, in which the
function has other code, and the tests of its module run until one fails, those first that are the quickest without a mutant.
(Of the well-kept tools, mutmut deletes no statements and has no list of what may survive, but for comments in the library.)
"""

import argparse
import ast
import copy
import gc
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
MEMORY: Final = 8 << 30  # bytes of addresses that a mutant may have
TESTS: Final = {
    "broker/core/backlog": ["unit/test_backlog"],
    "broker/core/groups": ["unit/test_shares"],
    "broker/core/history": ["unit/test_history"],
    "broker/core/limits": ["unit/test_budget"],
    "broker/core/linger": ["unit/test_linger"],
    "broker/core/patterns": ["unit/test_router", "unit/test_budget"],
    "broker/core/policies": ["unit/test_backlog"],
    "broker/core/ring_holds": ["properties/test_rings"],
    "broker/core/router": ["unit/test_router"],
    "broker/core/singles": ["unit/test_singles"],
    **{f"cli/{name}": ["unit/test_cli"] for name in ("figures", "progress", "prometheus", "text", "view")},
    "protocol/control": ["properties/test_control", "unit/test_version"],
    "protocol/fd_packets": ["properties/test_rings"],
    "protocol/frames": ["properties/test_frames", "properties/test_runs", "unit/test_history"],
    "protocol/plain_pickling": ["properties/test_plain_pickling"],
    "protocol/ring_allocator": ["properties/test_rings"],
    "protocol/runs": ["unit/test_backlog", "properties/test_runs"],
    "protocol/splitter": ["properties/test_frames", "properties/test_runs", "unit/test_bridging"],
    "protocol/version": ["unit/test_version"],
    "states": ["unit/test_states"],
    "validation": ["unit/test_validation"],
}

# The mutants, by their beginnings, that no test can distinguish from the original, or need not, and the reason.
EQUIVALENT: Final[dict[str, tuple[str, ...]]] = {
    "it is only slower, or quicker": (
        "Router.targets: steps > PART -> steps >= PART",
        "Router.look_up: found is None -> True",
        "Patterns.add: text.startswith(beginning) -> True",
        "Patterns.matching_in_parts: taken > most -> taken >= most",
        "matcher: made is None -> True",
        "matcher: _matchers[pattern] = made -> pass",
        "Backlog._put_fitting: self.takes(run.charge) -> False",
        "runs_by_target: groups.pop((), None) -> pass",
        "runs_by_target: not groups -> False",
        "matcher: '?' in pattern or '[' in pattern -> True",
        "_beginning: 1 -> ",
        "encoded_topic: ",
        "Run.divided: self.count <= MOST_AT_ONCE",
        "decode: body.count(b'[') + body.count(b'{') > _DEEPEST -> ",
        "Splitter.split: self.rest -> True",
        "Splitter.split: route -> True",
        "Splitter.split: tag <= MAX_TOPIC -> tag < MAX_TOPIC",
        "_route: not tag -> False",
        "Backlog.fitting: run.charge <= room -> ",
        "DropOldest.put: self.takes(run.charge) -> False",
        "_Dropping._drop: run.charge <= excess -> run.charge < excess",
        "_Dropping._drop: run.count == 1 -> ",
        "_Dropping._drop: runs[index].charge > excess -> True",
        "_Dropping._drop: runs[index].charge > excess -> runs[index].charge >=",
        "Backlog.to_write: len(runs) == 1 -> ",
        "Backlog._joined: len(parts) > 1 -> ",
        "_Dropping._split_to: self._divide(index, run.first) -> ",
        "run_of: len(sizes) > 1 -> ",
        "_pack: count <= MOST_AT_ONCE -> ",
        "History.last: excess > 0 -> excess >= 0",
        "SharedRun.copied: self.item.length > PART -> self.item.length >= PART",
        "Shares.next: not unfinished -> False",
        "columns_of: text.isascii() -> False",
        "printable: text.isprintable() -> False",
        "cut: len(text) > width -> False",
        "cut: width - 1 -> width #2",
        "cut: width - 1 -> width - 0 #2",
        "load_plain: has_references -> True",
        "_run: has_references = False -> has_references = True",
        "_check_keys: room + 1 -> room + 2",
    ),
    "both have as many": ("Singles.batches: True -> False", "single_runs: True -> False"),
    "a run has more than its head": ("read_singles: start > last -> start >= last",),
    "it is read behind what sets it": (
        "Splitter.split: last, alike = (b'', 0) -> ",
        "Splitter.split: (b'', 0) -> ",
        "Shares.next: found, fewest = (None, 0) -> found",
        "Shares.next: (None, 0) -> (None, 1)",
    ),
    "it is as true": ("_run: True -> 2",),
    "the one is out of range where the other is": ("_run: -count -> count #3",),
    "the first of several has more than one message, and a run of several has their sizes": (
        "Run.divided: 0 < count",
        "Run.divided: self.sizes is None -> False",
    ),
    "no message without a payload comes in pieces": (
        "Splitter._piece: len(frame) < HEAD.size -> len(frame) <= HEAD.size",
        "_route: skip > min(size, len(frame)) -> skip >=",
    ),
    "how much goes together, or is kept, need not be exact": (
        "_references: room <= 0 -> room <= 1",
        "Router.targets: len(self.found) >= _CACHED_TOPICS -> len(self.found) > _CACHED_TOPICS",
        "_Dropping.to_write: 2 * self.pipe -> 3 * self.pipe",
        "_check_keys: room < 0 -> room <",
        "_check_expansion: room < 0 -> room <",
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
    "it is refused below": ("Splitter.split: size < 8 -> size <", "Splitter.split: tag > _ROUTE -> tag >= _ROUTE"),
    "only what was taken is given back, and once": (
        "RingAllocator.__init__: self._before = (0, 0, 0) -> pass",
        "RingAllocator.__init__: (0, 0, 0) -> ",
        "RingAllocator.undo: self._before = (self.next, self.end, 0) -> pass",
    ),
    "that is the same number": (
        "_route: min(size, len(frame)) -> max(size, len(frame))",
        "RingAllocator._taken: chunks -> True",
        "short: number >= 99.95 -> number >",
    ),
    "only a note has no sizes, and it always fits": ("Backlog.fitting: () -> False",),
    "it runs when the module is loaded": ("State.__init__: ", "_value: "),
    "both are of one length": (
        *("Cost.plus: True -> False", "Budget.check: True -> False", "_add: True -> False", "_table: True -> False"),
        "table: True -> False",
    ),
    "there is no rate in no time, nor before there is anything": (
        "figures: before is not None -> True #2",
        "figures: before is not None -> True #3",
        "figures: is_same -> True #2",
    ),
    "either leaves out the last character": ("cut: len(text) > width -> len(text) >=",),
    "a carriage return is flushed, a byte is soon done, and any width will do where none is known": (
        "Progress._show: sys.stderr.flush() -> pass",
        "Progress.__init__: total > 0 -> total > 1",
        "Progress._show: os.get_terminal_size(sys.stderr.fileno()).columns or 80 -> ",
        "Progress._show: columns = 80 -> ",
    ),
}

OTHER: Final = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
OTHER.update([(new, old) for old, new in OTHER.items()])
NAMES: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}
UNTOUCHED: Final = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments, ast.expr_context)
UNTOUCHED_FIELDS: Final = ("decorator_list", "annotation", "returns", "simple")


def alternatives(node: ast.AST, parent: ast.AST, field: str) -> Iterator[ast.AST]:
    """Yield what may replace ``node``."""
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
    """Make one change after the other below ``parent``, each undone before the next, and yield what it is."""
    for field, value in ast.iter_fields(parent):
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if field in UNTOUCHED_FIELDS or not isinstance(child, ast.AST) or isinstance(child, UNTOUCHED):
                continue
            where: tuple[Any, Any] = (value, index) if isinstance(value, list) else (vars(parent), field)
            # A number alone means too little.
            around = isinstance(child, ast.Constant) and isinstance(parent, (ast.expr, ast.Return, ast.Assign))
            old = ast.unparse(parent if around else child)
            for other in alternatives(child, parent, field):
                where[0][where[1]] = other
                yield f"{old} -> {ast.unparse(ast.fix_missing_locations(copy.copy(parent if around else other)))}"
                where[0][where[1]] = child
            yield from edits(child)


def functions(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the functions and methods, with their qualified names."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


class Mutant(NamedTuple):
    module: str
    text: str
    code: CodeType


def place_of(code: CodeType) -> tuple[str, str]:
    return code.co_filename, code.co_qualname


def code_in(tree: ast.Module, file: str, name: str) -> CodeType:
    codes = [compile(tree, file, "exec", dont_inherit=True)]
    for code in codes:
        codes += (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return next(code for code in codes if code.co_qualname == name)


def mutants(words: list[str]) -> Iterator[Mutant]:
    """Yield each mutant whose module or text has one of the words."""
    for module in TESTS:
        file = ROOT / "mpbroadcast" / f"{module}.py"
        tree = ast.parse(file.read_text())
        for name, node in functions(tree, ""):
            seen: Counter[str] = Counter()
            for change in edits(node) if name != "listed" else ():  # a text for people
                text = f"{name}: {' '.join(change.split())}"
                seen[text] += 1
                text += f" #{seen[text]}" if seen[text] > 1 else ""
                if not words or any(word in f"{module}.{text}" for word in words):
                    yield Mutant(module, text, code_in(ast.fix_missing_locations(tree), str(file), name))


class Failed(BaseException):
    """A test has failed: no other one runs."""


class Plugin:
    """Pytest collects the tests; this runs them, once for each mutant."""

    def __init__(self, words: list[str], verbose: bool) -> None:
        self.mutants = [*mutants(words)]
        self.verbose = verbose
        self.unexplained = 0

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings  # pytest rewrites it when it loads it first

        # The shortest failure takes long, and so do others.
        settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
        settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            raise Failed(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Replace pytest's own loop."""
        assert not session.testsfailed, "not all tests could be collected"
        tests = sorted(((self.seconds(item), item) for item in session.items), key=lambda test: test[0])
        functions = [one for one in gc.get_objects() if isinstance(one, FunctionType)]
        re.purge()  # it keeps the matchers that patterns have had so far, and mutants would not make their own
        gc.freeze()
        counts: Counter[str] = Counter()
        for mutant in self.mutants:
            own = [test for test in tests if test[1].nodeid.partition(".py")[0].removeprefix("tests/") in TESTS[mutant.module]]
            killer = self.killer(mutant.code, functions, own)
            reason = next((reason for reason, texts in EQUIVALENT.items() if mutant.text.startswith(texts)), "")
            verdict = "killed" if killer else "equivalent" if reason else "SURVIVED"
            counts[verdict] += 1
            if self.verbose or verdict == "SURVIVED":
                print(f"{mutant.module}: {mutant.text}: {verdict} {killer or reason}", flush=True)
        print(f"{len(self.mutants)} mutants: {dict(counts)}")
        self.unexplained = counts["SURVIVED"]
        return True

    def seconds(self, item: pytest.Item) -> float:
        start = time.process_time()
        self.run(item)
        return time.process_time() - start

    def run(self, item: pytest.Item) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)

    def killer(self, mutant: CodeType, functions: list[FunctionType], tests: list[tuple[float, pytest.Item]]) -> str:
        """Return the first test that fails with the mutant, in a fork, or how the fork has ended; empty if it survives."""
        with tempfile.TemporaryFile() as answer, open(os.devnull, "w") as null:
            child = os.fork()
            if not child:
                try:
                    for stream in (1, 2):
                        os.dup2(null.fileno(), stream)
                    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                    for function in functions:
                        if place_of(function.__code__) == place_of(mutant):
                            function.__code__ = mutant
                    for seconds, item in tests:
                        signal.setitimer(signal.ITIMER_PROF, 2 + 4 * seconds)
                        signal.alarm(20 + int(20 * seconds))  # for a test that waits
                        self.run(item)
                    os._exit(0)
                except Failed as failed:
                    os.write(answer.fileno(), str(failed).encode())
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            answer.seek(0)
            return answer.read().decode() or (f"with status {status}" if status else "")


def main() -> int:
    """Return 1 if one survived unexplained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of modules or mutants")
    parser.add_argument("-v", "--verbose", action="store_true", help="also what was killed, and by which test")
    options = parser.parse_args()
    sys.path[0] = str(ROOT)
    os.chdir(ROOT)
    plugin = Plugin(options.words, options.verbose)
    flags = ["-oaddopts=", "--noconftest", "-pno:cacheprovider", "-pno:terminal", "-s", "--timeout=0", "--assert=plain"]
    files = {f"tests/{name}.py" for mutant in plugin.mutants for name in TESTS[mutant.module]}
    code = pytest.main([*flags, *files], [plugin])
    return int(code) or int(plugin.unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
