"""The layout: which module may import which, and what is public."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import mpbroadcast

PACKAGE = Path(mpbroadcast.__file__).parent
ROOT = PACKAGE.parent
TESTS = Path(__file__).parents[1]
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the top to the bottom. A module imports what stands below its own row, and in its own row only what is in its own room.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"__init__"},
    {"client", "broker"},
    {"posix", "protocol"},
    {"validation", "deadline", "trap_points"},
    {"errors", "stats"},
]
PUBLIC = {
    "AddressError",
    "AuthenticationFailed",
    "BroadcastError",
    "Broadcaster",
    "BrokerCrashed",
    "BrokerLost",
    "BrokerRestarted",
    "BrokerStats",
    "Channel",
    "ChannelInUse",
    "ClosedError",
    "Lagged",
    "Overflowed",
    "Selector",
    "StartError",
    "SubscriberStats",
    "TimedOut",
    "channel_to_selector",
    "connect",
    "publish",
    "start_broadcaster",
    "subscribe",
    "unsubscribe",
}


def dotted(path: Path) -> str:
    """The name of a module as an import statement has it: ``mpbroadcast.protocol.frames``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in MODULES}


def room(module: str) -> str:
    """The room that a module stands in: ``broker`` for ``mpbroadcast.broker.core.router``."""
    return [*module.split("."), "__init__"][1]


def layer(module: str) -> int:
    """How far from the top a module's room stands."""
    (found,) = [index for index, rooms in enumerate(LAYERS) if room(module) in rooms]
    return found


def imports(path: Path, *, package_only: bool = True) -> list[tuple[str, str | None]]:
    """(module, name) of each import at any depth of a file, resolved; a plain ``import x`` has no name."""
    tree = ast.parse(path.read_text())
    package = dotted(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.append((whole, None) if whole in NAMES else (module, alias.name))
    if package_only:
        found = [(module, name) for module, name in found if module.split(".")[0] == "mpbroadcast"]
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def in_functions(path: Path) -> set[str]:
    """What a module imports inside functions only."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(part) for function in functions for part in ast.walk(function) if isinstance(part, ast.ImportFrom)}
    return {node.module or "" for node in ast.walk(tree) if id(node) in inside and isinstance(node, ast.ImportFrom)}


def test_a_module_imports_only_what_stands_below_it() -> None:
    """Imports go down only, types included. ``client/api.py`` imports the launcher in the function that starts a broker."""
    wrong = [
        (me, module)
        for me, path in NAMES.items()
        for module, _ in imports(path)
        if layer(module) < layer(me) or (layer(module) == layer(me) and room(module) != room(me))
    ]
    api = "mpbroadcast.client.api"
    assert {me for me, _ in wrong} <= {api}
    assert {module for _, module in wrong} <= in_functions(NAMES[api])
    assert {module.rpartition(".")[0] for _, module in wrong} == {"mpbroadcast.broker.host"}
    assert not [path for path in MODULES if "TYPE_CHECKING" in path.read_text()]


def test_the_core_of_the_broker_is_pure() -> None:
    """What decides (backlogs, policies, routes, states) has no descriptor, no clock and no process."""
    impure = {"os", "time", "select", "socket", "fcntl", "mmap", "signal", "psutil", "resource", "threading"}
    core = [name for name in NAMES if name.startswith("mpbroadcast.broker.core.")]
    assert core
    for name in core:
        used = {module for module, _ in imports(NAMES[name], package_only=False)}
        assert not used & impure, name
        inner = {module for module in used if module.startswith("mpbroadcast.") and room(module) in ("broker", "posix")}
        assert all(module.startswith("mpbroadcast.broker.core.") for module in inner), name


SYSTEM_CALLS = re.compile(
    r"os\.(p?readv?|p?writev?|open|close|closerange|dup2?|pipe2?|fstat|ftruncate|set_blocking|set_inheritable|memfd_create)"
    r"|(socket|select|fcntl|mmap|termios)\.(?![A-Z_]+$)\w+"
)


def test_only_some_rooms_call_the_system_on_descriptors() -> None:
    """Outside ``posix/``, ``broker/host/`` and ``cli/``, no module has such a function of the system, also not by another name.

    What is on the data path is imported from ``posix/pipes.py``, where it is the system's own function. Constants are no calls.
    """
    found = []
    for path in MODULES:
        if relative(path).startswith(("posix/", "broker/host/", "cli/")):
            continue
        tree = ast.parse(path.read_text())
        found += [
            f"{relative(path)}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and SYSTEM_CALLS.fullmatch(ast.unparse(node))
        ]
        found += [
            f"{relative(path)}: {module} {name}"
            for module, name in imports(path, package_only=False)
            if module in ("os", "socket", "select", "fcntl", "mmap", "termios")
            and name is not None
            and SYSTEM_CALLS.fullmatch(f"{module}.{name}")
        ]
    assert not found


def test_objects_of_the_broker_are_small() -> None:
    """None has more than 16 attributes."""
    large = []
    for path in (PACKAGE / "broker").rglob("*.py"):
        for kind in ast.walk(ast.parse(path.read_text())):
            if isinstance(kind, ast.ClassDef):
                own = {
                    node.attr
                    for node in ast.walk(kind)
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
                }
                if len(own) > 16:
                    large.append((kind.name, len(own)))
    assert not large


def test_no_constructor_of_the_broker_takes_a_callback() -> None:
    """What a room has found is returned, or on a list that the server works off. The broker itself is given its requests."""
    found = {
        f"{kind.name}({argument.arg})"
        for path in (PACKAGE / "broker").rglob("*.py")
        if not relative(path).startswith("broker/host/")
        for kind in ast.walk(ast.parse(path.read_text()))
        if isinstance(kind, ast.ClassDef)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        for argument in (*method.args.args, *method.args.kwonlyargs)
        if argument.annotation is not None and "Callable" in ast.unparse(argument.annotation)
    }
    assert found == {"Broker(answer)"}


def test_no_import_cycle() -> None:
    """No module imports itself by way of others."""
    graph = {name: {module for module, _ in imports(path) if module != name} for name, path in NAMES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for below in graph.get(name, ()):
                visit(below, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_nothing_private_is_imported() -> None:
    """What starts with an underscore stays in its module."""
    private = [
        f"{me} imports {name} from {module}"
        for me, path in NAMES.items()
        for module, name in imports(path)
        if (name or "").startswith("_") or any(re.match(r"_(?!_)", part) for part in module.split("."))
    ]
    assert not private


def test_each_trap_point_is_used() -> None:
    """Each name is reached at one place, and some test waits for it."""
    reached = [
        ast.literal_eval(node.args[0])
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "trap_points.reach"
    ]
    tests = "".join(path.read_text() for path in TESTS.rglob("*.py"))
    assert len({*reached}) == len(reached)
    assert not [name for name in reached if f'"{name}"' not in tests]


def private_names() -> set[str]:
    """What is defined anywhere in the package with one leading underscore."""
    found: set[str] = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    found.discard("_replace")  # each NamedTuple has it
    return {name for name in found if re.match("_[^_]", name)}


def test_no_test_depends_on_a_private_name() -> None:
    """No attribute, import or text of the tests has a private name of the package: they stop the code at trap points."""
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
        if found & private and path.name not in ("test_structure.py", "mutate.py"):
            named[path.name] = found & private
    assert not named


def test_the_broker_never_unpickles() -> None:
    """Nothing that runs in the broker imports pickle, anything built on it, or the module that unpickles messages."""
    banned = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "mpbroadcast.protocol.pickling"}
    paths = sorted((PACKAGE / "broker").rglob("*.py"))
    assert paths
    for path in paths:
        used = {module for module, _ in imports(path, package_only=False)}
        used |= {f"{module}.{name}" for module, name in imports(path, package_only=False) if name}
        assert not used & banned, relative(path)
        calls = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
            and node.attr in ("loads", "Unpickler", "ForkingPickler")
            and ast.unparse(node) != "json.loads"
        ]
        assert not calls, relative(path)


def test_the_broker_never_unpickles_through_others() -> None:
    """What the broker's modules import does not import the module that unpickles messages either."""
    seen: set[str] = set()
    todo = [name for name in NAMES if name.startswith("mpbroadcast.broker")]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += [module for module, _ in imports(NAMES[name]) if module in NAMES]
    assert "mpbroadcast.protocol.pickling" not in seen


def test_an_import_loads_no_broker() -> None:
    """A process that only connects, publishes and subscribes loads neither asyncio nor psutil, nor any module of the broker."""
    code = "import sys, mpbroadcast; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "mpbroadcast.client.broker_client" in loaded
    assert not [name for name in loaded if name in ("asyncio", "psutil") or name.startswith("mpbroadcast.broker")]


def test_all_is_exactly_the_public_names() -> None:
    """``mpbroadcast.__all__`` has the public names, each of them, and nothing else."""
    assert sorted(name for name in mpbroadcast.__all__ if not name.startswith("__")) == sorted(PUBLIC)
    assert len(set(mpbroadcast.__all__)) == len(mpbroadcast.__all__)
    for name in mpbroadcast.__all__:
        assert hasattr(mpbroadcast, name)


def test_what_is_public_is_documented() -> None:
    """Each public name has a docstring of its own, and so has each public method of a public class."""
    bare = []
    for name in sorted(PUBLIC):
        thing = getattr(mpbroadcast, name)
        text = (thing.__doc__ or "").strip()
        if not text or text.startswith(f"{name}("):  # a dataclass's generated text says nothing
            bare.append(name)
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            bare += [
                f"{name}.{attribute}"
                for attribute, value in vars(thing).items()
                if not attribute.startswith("_")
                and (inspect.isfunction(value) or isinstance(value, property))
                and not inspect.getdoc(value)
            ]
    assert not bare


def test_modules_are_short() -> None:
    """No module has more than 450 lines, and each has a docstring."""
    texts = {relative(path): path.read_text() for path in MODULES}
    long = {name: len(text.splitlines()) for name, text in texts.items() if len(text.splitlines()) > 450}
    assert not long
    assert not [name for name, text in texts.items() if not ast.get_docstring(ast.parse(text))]


def test_the_package_says_that_it_is_typed() -> None:
    """Type checkers read the package's own annotations: the marker file is there."""
    assert (PACKAGE / "py.typed").is_file()


def test_one_module_makes_locks() -> None:
    """All locks come from ``posix/locks.py``, which makes them safe with interrupts where a plain one is not."""
    kinds = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier", "allocate_lock"}
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in kinds)
        or (isinstance(node, ast.ImportFrom) and kinds & {alias.name for alias in node.names})
    ]
    assert found
    assert not [place for place in found if not place.startswith("posix/locks.py")]


def test_nothing_loops_under_a_lock() -> None:
    """From Python 3.12 on, an interrupt at the end of a loop's turn does not let go of a lock whose ``with`` is around it."""
    loops = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp)
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.With) and any(
                re.search("lock|opening", ast.unparse(item.context_expr)) for item in node.items
            ):
                found += [f"{path}:{part.lineno}" for part in ast.walk(node) if isinstance(part, loops)]
    assert not found
