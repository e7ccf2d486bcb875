"""The layout: which module may import and call what, and what is public."""

import ast
import functools
import gc
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import mpbroadcast

PACKAGE = Path(mpbroadcast.__file__).parent
ROOT = PACKAGE.parent
TESTS = Path(__file__).parents[1]

# From the top to the bottom. A module imports what stands below its own row, and in its own row only what is in its own room.
LAYERS = [
    {"__main__"},
    {"cli", "testing"},
    {"bridge", "testing_fixtures"},
    {"__init__"},
    {"client", "broker"},
    {"posix", "protocol"},
    {"validation", "deadline", "states", "topics", "trap_points"},
    {"errors", "key", "stats"},
]
CORE = "mpbroadcast.broker.core."
HOST = "mpbroadcast.broker.host"


def dotted(path: Path) -> str:
    """Return the name of a module as an import statement has it: ``mpbroadcast.protocol.frames``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
BROKER = [name for name in PATHS if name.startswith("mpbroadcast.broker.")]


@functools.cache  # and not made when it is collected, in each process
def nodes() -> dict[str, list[ast.AST]]:
    """Return all that each module consists of. No collection of later tests looks through it: that is some 100,000 objects."""
    made = {name: [*ast.walk(ast.parse(path.read_text()))] for name, path in PATHS.items()}
    gc.freeze()
    return made


def room(module: str) -> str:
    """Return the room that a module stands in: ``broker`` for ``mpbroadcast.broker.core.router``."""
    return [*module.split("."), "__init__"][1]


def layer(module: str) -> int:
    """Return how far from the top a module's room stands."""
    (found,) = [index for index, rooms in enumerate(LAYERS) if room(module) in rooms]
    return found


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each import at any depth of a module. A plain ``import x`` has no name."""
    for node in nodes()[module]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in PATHS else (node.module or "", alias.name)


def imported(module: str) -> set[str]:
    return {name for name, _ in imports(module)}


def test_a_module_imports_only_what_stands_below_it() -> None:
    """Imports go down only, types included. ``client/api.py`` imports the launcher in the function that starts a broker."""
    wrong = [
        (me, module)
        for me in PATHS
        for module in imported(me) & {*PATHS}
        if layer(module) < layer(me) or (layer(module) == layer(me) and room(module) != room(me))
    ]
    api = "mpbroadcast.client.api"
    assert {me for me, _ in wrong} <= {api}
    functions = [node for node in nodes()[api] if isinstance(node, ast.FunctionDef)]
    inside = [part for function in functions for part in ast.walk(function)]
    assert {module for _, module in wrong} <= {node.module for node in inside if isinstance(node, ast.ImportFrom)}
    assert {module.rpartition(".")[0] for _, module in wrong} == {HOST}
    assert not [path for path in PATHS.values() if "TYPE_CHECKING" in path.read_text()]


def test_no_import_cycle() -> None:
    """No module imports itself through others."""
    TopologicalSorter({name: imported(name) - {name} for name in PATHS}).prepare()


def test_bridges_use_public_names_only() -> None:
    """A bridge is a program like any other: it imports nothing of a broker, and an engine's client only in its own module."""
    public = re.compile(
        r"mpbroadcast(\.(bridge(\..*)?|client\..*|errors|key|stats|validation|trap_points|posix\.standard_error))?"
    )
    clients = {"redis", "nats"}
    for me in (name for name in PATHS if room(name) == "bridge"):
        assert not [module for module in imported(me) & {*PATHS} if not public.fullmatch(module)], me
        own = clients - {me.rpartition(".")[2].removesuffix("_engine")}
        assert not [module for module in imported(me) if module.partition(".")[0] in own], me


def test_the_core_of_the_broker_is_pure() -> None:
    """What decides (backlogs, policies, routes, states) has no descriptor, no clock and no process."""
    impure = {"os", "time", "select", "socket", "fcntl", "mmap", "signal", "psutil", "resource", "threading"}
    core = [name for name in PATHS if name.startswith(CORE)]
    assert core
    for name in core:
        assert not imported(name) & impure, name
        own = {module for module in imported(name) & {*PATHS} if room(module) in ("broker", "posix")}
        assert all(module.startswith(CORE) for module in own), name


SYSTEM_CALLS = re.compile(
    r"os\.(p?readv?|p?writev?|open|close|closerange|dup2?|pipe2?|fstat|ftruncate|set_blocking|set_inheritable|memfd_create)"
    r"|(socket|select|fcntl|mmap|termios)\.(?![A-Z_]+$)\w+"
)


def test_only_some_rooms_call_the_system_on_descriptors() -> None:
    """Outside ``posix/``, ``broker/host/`` and ``cli/``, no module has such a function of the system, by whatever name. What is
    on the data path is imported from ``posix/pipes.py``, where it is the system's own function. Constants are no calls."""
    found = []
    for module, own in nodes().items():
        if room(module) not in ("posix", "cli") and not module.startswith(HOST):
            used = [ast.unparse(node) for node in own if isinstance(node, ast.Attribute)]
            used += [f"{other}.{name}" for other, name in imports(module)]
            found += [f"{module}: {name}" for name in used if SYSTEM_CALLS.fullmatch(name)]
    assert not found


def test_objects_of_the_broker_are_small() -> None:
    """None has more than 16 attributes."""
    large = []
    for kind in (node for name in BROKER for node in nodes()[name] if isinstance(node, ast.ClassDef)):
        stored = [node for node in ast.walk(kind) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
        own = {node.attr for node in stored if ast.unparse(node.value) == "self"}
        if len(own) > 16:
            large.append((kind.name, len(own)))
    assert not large


def test_no_constructor_of_the_broker_takes_a_callback() -> None:
    """What a room has found is returned, or on a list that the server works off. The broker itself is given its requests."""
    found = {
        f"{kind.name}({argument.arg})"
        for name in BROKER
        if not name.startswith(HOST)
        for kind in nodes()[name]
        if isinstance(kind, ast.ClassDef)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        for argument in (*method.args.args, *method.args.kwonlyargs)
        if argument.annotation is not None and "Callable" in ast.unparse(argument.annotation)
    }
    assert found == {"Broker(answer)"}


def test_each_trap_point_is_used() -> None:
    """Each name is reached at one position, and some test waits for it."""
    calls = [node for own in nodes().values() for node in own if isinstance(node, ast.Call)]
    reached = [ast.literal_eval(node.args[0]) for node in calls if ast.unparse(node.func) == "trap_points.reach"]
    tests = "".join(path.read_text() for path in TESTS.rglob("*.py"))
    assert len({*reached}) == len(reached)
    assert not [name for name in reached if f'"{name}"' not in tests]


def private_names() -> set[str]:
    """Return what is defined anywhere in the package with one leading underscore."""
    found: set[str] = set()
    for node in (node for own in nodes().values() for node in own):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    found.discard("_replace")  # each NamedTuple has it
    return {name for name in found if re.match("_[^_]", name)}


def test_nothing_private_is_imported() -> None:
    """What starts with an underscore stays in its module, and out of the tests, which stop the code at trap points."""
    crossing = [(me, module, name) for me in PATHS for module, name in imports(me) if module.startswith("mpbroadcast")]
    assert not [one for one in crossing if re.search(r"(^|\.)_(?!_)", f"{one[1]}.{one[2]}")]
    private = private_names()
    assert len(private) > 100
    named: dict[str, set[str]] = {}
    for path in TESTS.rglob("*.py"):
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and not re.match(r"(self|cls|multiprocessing)\b", ast.unparse(node.value)):
                found.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpbroadcast"):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {*re.findall(r"\.(_\w+)", node.value), node.value}
        if found & private and path.name not in ("mutate.py", "bugs.py"):  # which change the code that they name
            named[path.name] = found & private
    assert not named


def test_the_broker_never_unpickles() -> None:
    """Nothing that the broker imports, through others too, imports pickle or anything built on it."""
    banned = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "mpbroadcast.protocol.pickling"}
    todo = [*BROKER]
    seen: set[str] = set()
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            names = {f"{module}.{inner}" for module, inner in imports(name)} | imported(name)
            assert not names & banned, name
            assert not {inner for _, inner in imports(name)} & {"loads", "Unpickler", "ForkingPickler"}, name
            todo += imported(name) & {*PATHS}
    assert seen > {*BROKER}


def test_the_stub_has_the_names_of_the_package() -> None:
    """What type checkers read in ``__init__.pyi`` is what the package gives, from the same modules."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    stated = {node.module: {alias.name for alias in node.names} for node in tree.body if isinstance(node, ast.ImportFrom)}
    (listed,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert listed == mpbroadcast.__all__
    assert {*dir(mpbroadcast)} >= {*listed}
    for module, names in stated.items():
        assert all(getattr(mpbroadcast, name) is getattr(sys.modules[module or ""], name) for name in names)
    assert sorted(name for names in stated.values() for name in names) == listed


def test_an_import_loads_no_broker() -> None:
    """A process that only connects, publishes and subscribes loads neither asyncio nor psutil, nor any module of the broker."""
    code = "import sys, mpbroadcast; mpbroadcast.connect; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "mpbroadcast.client.broker_client" in loaded
    assert not [name for name in loaded if name in ("asyncio", "trio", "psutil") or name.startswith("mpbroadcast.broker")]


def test_a_loop_is_imported_only_where_it_runs() -> None:
    """A task loads what waits in its own loop, though other loops are installed."""
    code = """
import sys, mpbroadcast
from mpbroadcast.client.tasks import give_turn
{run}
print(*sys.modules)
"""
    waits = {"asyncio": "mpbroadcast.client.asyncio_wait", "trio": "mpbroadcast.client.trio_wait"}
    runs = {"asyncio": "import asyncio; asyncio.run(give_turn())", "trio": "import trio; trio.run(give_turn)"}
    for loop, run in runs.items():
        if importlib.util.find_spec(loop) is not None:
            command = [sys.executable, "-c", code.format(run=run)]
            loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
            assert {*waits.values()} & {*loaded} == {waits[loop]}


def test_each_public_name_has_a_docstring() -> None:
    """Each has one of its own, and so has each public method of a public class. Type checkers find the annotations."""
    bare = []
    for name in mpbroadcast.__all__:
        thing = getattr(mpbroadcast, name)
        if not thing.__doc__ or thing.__doc__.startswith(f"{name}("):  # a text that a dataclass has made
            bare.append(name)
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            members = [name for name in vars(thing) if not name.startswith("_") and hasattr(thing, name)]
            bare += [f"{name}.{member}" for member in members if not getattr(thing, member).__doc__]
    assert not bare
    assert (PACKAGE / "py.typed").is_file()


def test_modules_are_short() -> None:
    """No module has more than 450 lines, and each has a docstring."""
    texts = {name: path.read_text() for name, path in PATHS.items()}
    assert not {name: count for name, text in texts.items() if (count := len(text.splitlines())) > 450}
    assert not [name for name, text in texts.items() if not ast.get_docstring(ast.parse(text))]


def test_one_module_makes_locks() -> None:
    """All locks come from ``posix/locks.py``, which makes them safe with interrupts where a plain one is not."""
    kinds = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier", "allocate_lock"}
    makers = set()
    for module, own in nodes().items():
        named = {node.attr for node in own if isinstance(node, ast.Attribute)} | {name for _, name in imports(module)}
        if named & kinds:
            makers.add(module)
    assert makers == {"mpbroadcast.posix.locks"}


def test_nothing_loops_under_a_lock() -> None:
    """From Python 3.12 on, an interrupt at the end of a loop's turn does not release a lock whose ``with`` is around it."""
    loops = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp)
    found = []
    for module, own in nodes().items():
        for node in (node for node in own if isinstance(node, ast.With)):
            if any(re.search("lock|opening", ast.unparse(item.context_expr)) for item in node.items):
                found += [f"{module}:{part.lineno}" for part in ast.walk(node) if isinstance(part, loops)]
    assert not found
