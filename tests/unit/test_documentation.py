"""README, docs/ and the words: short, complete, true to the code, and in the field's words.
``tests/integration/test_examples.py`` runs the scripts that the pages show."""

import importlib
import importlib.util
import inspect
import io
import pickle
import re
import tokenize
from typing import Any, cast

import pytest

import mpbroadcast
from mpbroadcast import Broadcaster, Channel, channel_to_selector, validation
from mpbroadcast.broker import acceptor, routing
from mpbroadcast.broker.core import history, limits
from mpbroadcast.client import shared_writer, subscribing
from mpbroadcast.protocol import control, frames, pickling, ring_allocator, runs
from mpbroadcast.states import State
from tests.support.pages import BLOCKS, PAGES, README, ROOT, SCRIPTS

PACKAGE = ROOT / "mpbroadcast"
TESTS = ROOT / "tests"
MODULES = sorted(PACKAGE.rglob("*.py"))
TEXTS = {page: page.read_text() for page in [*PAGES, ROOT / "CHANGELOG.md"]}
PROSE = {page: re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE) for page, text in TEXTS.items()}
API = TEXTS[ROOT / "docs" / "api.md"]


def test_the_readme_is_short() -> None:
    """At most 200 lines; each script that shows a use has at most 14 lines of code."""
    assert len(TEXTS[README].splitlines()) <= 200
    uses = [block for block in SCRIPTS[1:] if block.page == README]
    assert not [block.name for block in uses if len([*filter(None, block.text.splitlines())]) > 14]


def test_each_block_is_checked() -> None:
    """Each block is a script, a command, a picture or an output; commands name modules and paths that are there. CI runs the
    README's commands for the demo and the tests exactly as they stand."""
    ci = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    checked = set()
    for block in BLOCKS:
        assert block.language in ("python", "sh", "text", "mermaid"), block.name
        for line in block.text.splitlines() if block.language == "sh" else ():
            if block.page == README and (word := re.search(r"\b(pytest|demo)\b", line)):
                assert line.strip() in ci
                checked.add(word[0])
            command = line.partition("#")[0]
            for module in re.findall(r"python3? -m (\S+)", command):
                assert importlib.util.find_spec(module), f"{block.name}: no module {module}"
            for path in re.findall(r"(?<=\s)((?:tests|docs|benchmarks|mpbroadcast|\.ci)/[\w./-]*)", f" {command}"):
                assert (ROOT / path).exists(), f"{block.name}: no {path}"
    assert checked == {"pytest", "demo"}


def test_a_ratio_was_printed_by_a_benchmark() -> None:
    """Each "1.23 times" of the README stands in a committed report."""
    reports = "".join(path.read_text() for path in (ROOT / "benchmarks" / "results").rglob("*.md"))
    claims = re.findall(r"\b(\d+\.\d\d)\s+times", TEXTS[README])
    assert claims
    assert not [claim for claim in claims if f"{claim} times" not in reports]


def test_each_link_leads_somewhere() -> None:
    """Each relative link leads to a file or folder of the project, each anchor to a heading. The README links to each page."""
    wrong = []
    for page, text in PROSE.items():
        for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            headings = re.findall(r"^#+ (.*)$", PROSE.get(target, ""), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if not target.exists() or ROOT not in (target, *target.parents) or (anchor and anchor not in anchors):
                wrong.append(f"{page.name}: {link}")
    assert not wrong
    assert not [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name}" not in TEXTS[README]]


def test_each_promise_has_its_test() -> None:
    """The tests that RELIABILITY.md and SECURITY.md name are there."""
    texts = TEXTS[ROOT / "RELIABILITY.md"] + TEXTS[ROOT / "SECURITY.md"]
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", texts)
    assert len(named) > 80
    for module, function in named:
        (path,) = TESTS.rglob(module)
        assert re.search(rf"^(?:async )?def {function or 'test'}", path.read_text(), flags=re.MULTILINE), (
            f"{module} has no {function}"
        )


def test_each_path_that_a_page_names_is_there() -> None:
    """Each module, folder and test that a page names in backticks is there."""
    roots = (ROOT, PACKAGE, TESTS, PACKAGE / "broker", PACKAGE / "client")
    named = {(page.name, name) for page in PAGES for name in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", TEXTS[page])}
    assert not [one for one in named if not any((root / one[1]).exists() for root in roots)]


def test_each_public_name_is_documented() -> None:
    """docs/api.md names each public function, class, method and field."""
    named = {*re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", API)))}
    public = {*mpbroadcast.__all__}
    for thing in (getattr(mpbroadcast, name) for name in mpbroadcast.__all__):
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            public |= {member for member in {**vars(thing), **thing.__annotations__} if not member.startswith("_")}
    assert not public - named


def test_dir_shows_what_is_documented(bus: Broadcaster[Any]) -> None:
    """An object, and its class, have the names in the first column of the table of their section, and no others."""
    with bus.subscribe() as channel:
        for thing in (bus, channel, channel_to_selector(channel)):
            name = type(thing).__name__
            section = API.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
            spans = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\|([^|]+)\|", section, flags=re.MULTILINE)))
            documented = {
                re.split(r"\W", span)[0] for span in spans if not re.match(r"for$|async|[A-Z]|channel_to_selector", span)
            }
            for shown in (dir(thing), dir(type(thing))):
                assert {one for one in shown if not one.startswith("_")} == documented, name


def test_errors_name_the_public_class() -> None:
    """Also for a method of a part of it."""
    for call, name in (
        (Broadcaster.publish, "Broadcaster.publish"),
        (Channel.recv_many, "Channel.recv_many"),
        (Channel.close, "Channel.close"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}\(\)"):
            cast(Any, call)()
        assert pickle.loads(pickle.dumps(call)) is call


@pytest.mark.parametrize(
    "name",
    [
        *(
            "start_broadcaster",
            "connect",
            "connect_or_start",
            "Broadcaster.publish",
            "Broadcaster.publish_many",
            "Broadcaster.subscribe",
        ),
        *("Broadcaster.flush", "Broadcaster.wait_for_subscribers", "Broadcaster.close"),
        *("Channel.recv", "Channel.recv_many", "Channel.poll"),
    ],
)
def test_each_argument_is_documented(name: str) -> None:
    """docs/api.md shows the signatures of the calls that have options, as they are."""
    kind, _, method = name.rpartition(".")
    parameters = inspect.signature(getattr(getattr(mpbroadcast, kind) if kind else mpbroadcast, method)).parameters
    empty = inspect.Parameter.empty
    options = [one if value.default is empty else f"{one}={value.default!r}" for one, value in parameters.items()]
    shown = re.search(rf"`{method}\((.*?)\)`", API)  # the first: Channel.subscribe comes later
    assert shown
    found = [one.strip().lstrip("*") for one in shown[1].replace('"', "'").split(",")]
    assert {*found} - {""} == {*options} - {"self"}


def test_the_limits_are_those_of_the_code() -> None:
    """The limits that the pages state are those of the code."""
    mib = 1 << 20
    stated = {
        "guide.md": [
            f"at most {validation.MAX_TOPIC:,} bytes of UTF-8",
            f"`capacity` bytes ({subscribing.DEFAULT_CAPACITY // mib} MiB by default)",
            f"Pickles of less than {shared_writer.SHARED_FROM // 1024} KiB",
            f"Up to {ring_allocator.LONGEST // mib} MiB",
            f"{ring_allocator.CHUNK * ring_allocator.CHUNKS // mib} MiB of memory",
            f"Buffers of less than {pickling.OUT_OF_BAND // 1024} KiB",
            f"at most {history.MOST_TOPICS:,} topics and {history.MOST_BYTES // mib} MiB",
        ],
        "tuning.md": [
            f"at most {frames.MOST_TOGETHER:,} messages, and a channel unpickles at most {runs.MOST_AT_ONCE} at once",
            f"its topic's length and {frames.FRAME_OVERHEAD} bytes",
            f"at most {limits.SESSION.subscriptions:,} subscriptions with {limits.SESSION.topics:,} topics",
            f"{ring_allocator.CHUNKS} chunks of {ring_allocator.CHUNK // 1024} KiB",
        ],
        "protocol.md": [f"{control.MAX_HANDSHAKE} bytes during the handshake, {control.MAX_REQUEST // mib} MiB for a request"],
        "SECURITY.md": [
            f"within {acceptor.HANDSHAKE_TIMEOUT:.0f} seconds",
            f"{limits.MOST_ASKED // mib} MiB for each process",
            f"a process: {limits.MOST_CONNECTIONS:,}",
            f"some {routing.TURN:,} puts into backlogs",
        ],
    }
    texts = {page.name: " ".join(text.split()) for page, text in TEXTS.items()}
    assert not [phrase for name, phrases in stated.items() for phrase in phrases if phrase not in texts[name]]


def section_of(page: str, heading: str) -> str:
    return TEXTS[ROOT / "docs" / page].partition(f"\n## {heading}")[2].partition("\n## ")[0]


def test_each_request_is_documented() -> None:
    """The table of requests in docs/protocol.md has each request that the broker answers, and no other."""
    tables = vars(importlib.import_module("mpbroadcast.broker.requests")).values()
    (handlers,) = [one for one in tables if isinstance(one, dict) and "attach" in one]
    rows = re.findall(r"^\| (`[^|]*`) \|.*\|.*\|$", section_of("protocol.md", "Control connections"), flags=re.MULTILINE)
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == sorted({*handlers, "do"})


@pytest.mark.parametrize(
    ("module", "heading", "kinds"),
    [("runs", "A channel's pipe: runs", range(10)), ("fd_packets", "The descriptor socket", range(1, 11))],
)
def test_each_kind_is_documented(module: str, heading: str, kinds: range) -> None:
    """Each kind of run and of packet stands in docs/protocol.md with its number."""
    constants = vars(importlib.import_module(f"mpbroadcast.protocol.{module}"))
    named = re.findall(r"\b(\d+) (?:\| )?([A-Z][A-Z_]+)\b", section_of("protocol.md", heading))
    assert {int(kind) for kind, _ in named} == {*kinds}
    assert not [name for kind, name in named if constants[name] != int(kind)]


def test_the_states_are_documented() -> None:
    """docs/states.md has each table of transitions in the code, and no other."""
    documented = {}
    for section in re.split(r"^## ", TEXTS[ROOT / "docs" / "states.md"], flags=re.MULTILINE)[1:]:
        if named := re.search(r"^`(\w+)` in `", section, flags=re.MULTILINE):
            rows = re.findall(r"^\| ([A-Z]+) \|[^|]*\|([^|]*)\|$", section, flags=re.MULTILINE)
            documented[named[1]] = {state: {*re.findall(r"\w+", following)} for state, following in rows}
    assert len(documented) == 4
    kinds = State.__subclasses__()
    assert documented == {kind.__name__: {state.name: {*state.following} for state in kind} for kind in kinds}


BANNED = re.compile(
    r"(?<![A-Za-z])("
    r"let(?:s|ting)?[ _](?:\w+ )?go"
    r"|tell(?:s|ing)?|told"
    r"|say(?:s|ing)?|said"
    r"|hear(?:s|ing|d)?"
    r"|who|whoever"
    r"|in its place|done with"
    r")(?![A-Za-z])",
    flags=re.IGNORECASE,
)
BANNED_IDENTIFIERS = {"way", "ways", "place", "places"}


def test_the_words_are_those_of_the_field() -> None:
    """None of the banned words is written, nor begins a docstring; nothing is called a way or a place. Not in tests' names."""
    found = []
    for path in [*MODULES, *PAGES]:
        text = re.sub(r"\btest_\w+", "", path.read_text())
        for number, line in enumerate(text.splitlines(), 1):
            found += [f"{path}:{number}: {word}" for word in BANNED.findall(line)]
        if path.suffix == ".py":
            found += [f"{path}: {opening}" for opening in re.findall(r'"""(?:What|Who|It|They)\b.*', text)]
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                if token.type == tokenize.NAME and BANNED_IDENTIFIERS & {*token.string.split("_")}:
                    found.append(f"{path}:{token.start[0]}: {token.string}")
    assert not found


@pytest.mark.parametrize("name", ["publish", "subscribe", "unsubscribe"])
def test_a_function_has_the_parameters_of_its_method(name: str) -> None:
    """What ``help()`` and an editor show has all names and defaults, not only ``**options``."""
    function, method = inspect.signature(getattr(mpbroadcast, name)), inspect.signature(getattr(mpbroadcast.Broadcaster, name))
    shown = [[(one.name, one.kind, one.default) for one in [*of.parameters.values()][1:]] for of in (function, method)]
    assert shown[0] == shown[1]
