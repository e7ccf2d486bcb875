"""README, docs/ and the words: short, complete, true to the code, and in the field's words.

``tests/integration/test_examples.py`` runs the scripts that the pages show.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import re
import tokenize
from collections.abc import Collection, Iterator
from enum import Enum
from pathlib import Path

import pytest

import mpbroadcast
from mpbroadcast import validation
from mpbroadcast.broker import acceptor, routing
from mpbroadcast.broker.core import history, limits
from mpbroadcast.client import broadcaster, shared_writer
from mpbroadcast.protocol import control, frames, pickling, ring_allocator
from tests.support.pages import BLOCKS, PAGES, README, ROOT, SCRIPTS, Block, blocks_of

PACKAGE = ROOT / "mpbroadcast"
TESTS = ROOT / "tests"
MODULES = sorted(PACKAGE.rglob("*.py"))
WITH_CHANGES = [*PAGES, ROOT / "CHANGELOG.md"]

LONGEST_README = 200
LONGEST_USE = 14
LONGEST_OF_LINES = 450
LANGUAGES = {"python", "sh", "text", "mermaid"}


# ------------------------------------------------------------------------------------------------------- code blocks


def test_each_block_is_of_a_known_kind() -> None:
    """Each block is a script, a command, a picture or an output: nothing is shown that is not checked."""
    assert not [f"{block.name}: {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES]


@pytest.mark.parametrize("word", ["pytest", "demo"])
def test_ci_runs_the_commands_of_the_readme(word: str) -> None:
    """CI runs the README's commands, the one for the demo and the one for the tests, exactly as they stand."""
    commands = [
        line.strip()
        for block in blocks_of(README)
        for line in block.text.splitlines()
        if block.language == "sh" and re.search(rf"\b{word}\b", line)
    ]
    assert commands
    run = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert not [command for command in commands if command not in run]


def commands() -> Iterator[tuple[Block, str]]:
    """Each single command of the ``sh`` blocks."""
    for block in BLOCKS:
        if block.language == "sh":
            for line in block.text.splitlines():
                for command in line.partition("#")[0].split("&&"):
                    if command.strip():
                        yield block, command.strip()


def test_commands_name_what_is_there() -> None:
    """Each command runs a module that can be found, and each of its paths leads to a file or folder."""
    wrong = []
    for block, command in commands():
        module = re.search(r"python3? -m (\S+)", command)
        if module and not importlib.util.find_spec(module[1]):
            wrong.append(f"{block.name}: no module {module[1]}")
        paths = re.findall(r"(?<=\s)((?:tests|docs|benchmarks|mpbroadcast|\.ci)/[\w./-]*)", f" {command}")
        wrong += [f"{block.name}: no {path}" for path in paths if not (ROOT / path).exists()]
    assert list(commands())
    assert not wrong


# ------------------------------------------------------------------------------------------------- length, links, tables


def test_the_readme_is_short() -> None:
    """At most 200 lines; each script that shows a use has at most 14 lines of code."""
    assert len(README.read_text().splitlines()) <= LONGEST_README
    long = {
        block.name: len(lines)
        for block in SCRIPTS[1:]
        if block.page == README and len(lines := list(filter(None, block.text.splitlines()))) > LONGEST_USE
    }
    assert not long


def test_no_page_is_too_long() -> None:
    """No page of docs/ is longer than a module may be."""
    long = {page.name: count for page in PAGES if (count := len(page.read_text().splitlines())) > LONGEST_OF_LINES}
    assert not long


def test_a_ratio_was_printed_by_a_benchmark() -> None:
    """Each "1.23 times" of the README stands in a committed report."""
    reports = "".join(path.read_text() for path in (ROOT / "benchmarks" / "results").rglob("*.md"))
    claims = re.findall(r"\b(\d+\.\d\d)\s+times", README.read_text())
    assert claims
    assert not [claim for claim in claims if f"{claim} times" not in reports]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_link_leads_somewhere() -> None:
    """Each relative link leads to a file or folder of the project, each anchor to a heading."""
    wrong = []
    for page in WITH_CHANGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or ROOT not in (target, *target.parents):
                wrong.append(f"{page.name}: {link}")
            elif anchor and anchor not in anchors(target):
                wrong.append(f"{page.name}: no heading for {link}")
    assert not wrong


def test_the_map_has_each_page() -> None:
    """The README links to each page of docs/."""
    text = README.read_text()
    assert not [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name}" not in text]


def test_each_promise_has_its_test() -> None:
    """The tests that RELIABILITY.md and SECURITY.md name are there."""
    texts = ((ROOT / name).read_text() for name in ("RELIABILITY.md", "SECURITY.md"))
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", "".join(texts))
    assert len(named) > 80
    for module, function in named:
        (path,) = TESTS.rglob(module)
        text = path.read_text()
        assert not function or re.search(rf"^(?:async )?def {function}\(", text, flags=re.MULTILINE), (
            f"{module} has no {function}"
        )


def test_each_path_that_a_page_names_is_there() -> None:
    """Each module, folder and test that docs/ names in backticks is there."""
    wrong = []
    roots = (ROOT, PACKAGE, TESTS, PACKAGE / "broker", PACKAGE / "client")
    for page in PAGES:
        for name in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", page.read_text()):
            if not any((root / name).exists() for root in roots) and not name.startswith("/"):
                wrong.append(f"{page.name}: {name}")
    assert not wrong


FOR_THE_BROADCASTER = {"broker", "broker_has_ended", "open_if_own"}
"""What a channel has for its broadcaster only."""


def public_members() -> Iterator[str]:
    """Each public name, and each public method, property and field of a public class, in backticks as a page has it."""
    for name in mpbroadcast.__all__:
        thing = getattr(mpbroadcast, name)
        yield name
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            yield from (member for member in {**vars(thing), **thing.__annotations__} if not member.startswith("_"))


def test_each_public_name_is_documented() -> None:
    """docs/api.md names each public function, class, method and field."""
    named = {*re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", (ROOT / "docs" / "api.md").read_text())))}
    assert not {*public_members()} - named - FOR_THE_BROADCASTER


def test_each_argument_is_documented() -> None:
    """docs/api.md shows the signatures of the calls that have options, as they are."""
    text = (ROOT / "docs" / "api.md").read_text()
    wrong = []
    for function in (
        mpbroadcast.start_broadcaster,
        mpbroadcast.connect,
        mpbroadcast.Broadcaster.publish,
        mpbroadcast.Broadcaster.publish_many,
        mpbroadcast.Broadcaster.subscribe,
        mpbroadcast.Broadcaster.flush,
        mpbroadcast.Broadcaster.wait_for_subscribers,
        mpbroadcast.Broadcaster.close,
        mpbroadcast.Channel.recv,
        mpbroadcast.Channel.recv_many,
        mpbroadcast.Channel.poll,
    ):
        shown = re.search(rf"`{function.__name__}\((.*?)\)`", text)  # the first: Channel.subscribe comes later
        options = [(name, one.default) for name, one in inspect.signature(function).parameters.items() if name != "self"]
        expected = {name if default is inspect.Parameter.empty else f"{name}={default!r}" for name, default in options}
        found = {one.strip().lstrip("*") for one in shown[1].replace("'", '"').split(",")} - {""} if shown else set()
        if found != {one.replace("'", '"') for one in expected}:
            wrong.append(f"{function.__qualname__}: {expected ^ found}")
    assert not wrong


def test_the_limits_are_those_of_the_code() -> None:
    """The limits that the pages state are those of the code."""
    mib = 1 << 20
    stated = {
        "guide.md": [
            f"at most {validation.MAX_TOPIC:,} bytes of UTF-8",
            f"`capacity` bytes ({broadcaster.DEFAULT_CAPACITY // mib} MiB by default)",
            f"Pickles of less than {shared_writer.SHARED_FROM // 1024} KiB",
            f"Up to {ring_allocator.LONGEST // mib} MiB",
            f"{ring_allocator.CHUNK * ring_allocator.CHUNKS // mib} MiB of memory",
            f"Buffers of less than\n  {pickling.OUT_OF_BAND // 1024} KiB",
            f"at most {history.MOST_TOPICS:,} topics and {history.MOST_BYTES // mib} MiB",
        ],
        "tuning.md": [
            f"at most {frames.MOST_TOGETHER} messages",
            f"its topic's length and {frames.FRAME_OVERHEAD} bytes",
            f"at most {limits.SESSION.subscriptions:,} subscriptions with {limits.SESSION.topics:,} topics",
            f"{ring_allocator.CHUNKS} chunks of {ring_allocator.CHUNK // 1024} KiB",
        ],
        "protocol.md": [f"{control.MAX_HANDSHAKE} bytes during the handshake, {control.MAX_REQUEST // mib} MiB for a request"],
        "../SECURITY.md": [
            f"within {acceptor.HANDSHAKE_TIMEOUT:.0f} seconds",
            f"{limits.MOST_ASKED // mib} MiB for each process",
            f"a process: {limits.MOST_CONNECTIONS:,}",
            f"some {routing.TURN:,} puts into backlogs",
        ],
    }
    wrong = [
        f"{page}: {phrase}"
        for page, phrases in stated.items()
        for phrase in phrases
        if re.sub(r"\s+", " ", phrase) not in re.sub(r"\s+", " ", (ROOT / "docs" / page).read_text())
    ]
    assert not wrong


# ------------------------------------------------------------------------------------------------ the protocol's tables


def section_of(page: str, heading: str) -> str:
    """The text below one heading of a page."""
    text = (ROOT / "docs" / page).read_text()
    start = text.index(f"\n## {heading}")
    return text[start : text.find("\n## ", start + 1)]


def test_each_request_is_documented() -> None:
    """The table of requests in docs/protocol.md has each request that the broker answers, and no other."""
    tables = [
        value
        for value in vars(importlib.import_module("mpbroadcast.broker.requests")).values()
        if isinstance(value, dict) and value and all(map(callable, value.values())) and "attach" in value
    ]
    (handlers,) = tables
    rows = re.findall(r"^\| (`[^|]*`) \|.*\|.*\|$", section_of("protocol.md", "Control connections"), flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted({*handlers, "do"})


@pytest.mark.parametrize(
    ("module", "heading", "kinds"),
    [
        ("runs", "A channel's pipe: runs", range(10)),
        ("fd_packets", "The descriptor socket", range(1, 11)),
    ],
)
def test_each_kind_is_documented(module: str, heading: str, kinds: range) -> None:
    """Each kind of run and of packet stands in docs/protocol.md with its number."""
    constants = vars(importlib.import_module(f"mpbroadcast.protocol.{module}"))
    text = section_of("protocol.md", heading)
    documented = {name: int(kind) for kind, name in re.findall(r"\b(\d+) (?:\| )?([A-Z][A-Z_]+)\b", text)}
    assert documented == {name: constants[name] for name in documented}
    assert {*documented.values()} == {*kinds}


# -------------------------------------------------------------------------------------------------------------- states


def state_tables() -> Iterator[tuple[str, dict[Enum, Collection[Enum]]]]:
    """Each table of transitions in the code, with the name of its enumeration."""
    for path in MODULES:
        text = path.read_text()
        if re.search(r"^from enum import|^import enum", text, flags=re.MULTILINE):
            parts = path.relative_to(ROOT).with_suffix("").parts
            for value in vars(importlib.import_module(".".join(parts))).values():
                if isinstance(value, dict) and value and all(isinstance(key, Enum) for key in value):
                    yield type(next(iter(value))).__name__, value


def documented_states() -> dict[str, dict[str, set[str]]]:
    """The tables of docs/states.md, by the enumeration that their section names: the states and what may follow them."""
    tables: dict[str, dict[str, set[str]]] = {}
    for section in re.split(r"^## ", (ROOT / "docs" / "states.md").read_text(), flags=re.MULTILINE)[1:]:
        if named := re.search(r"^`(\w+)` in `", section, flags=re.MULTILINE):
            rows = re.findall(r"^\| ([A-Z]+) \|[^|]*\|([^|]*)\|$", section, flags=re.MULTILINE)
            tables[named[1]] = {state: {*re.findall(r"\w+", following)} for state, following in rows}
    return tables


def test_the_states_are_documented() -> None:
    """docs/states.md has each table of transitions in the code, and no other."""
    in_code = {
        name: {state.name: {following.name for following in after} for state, after in transitions.items()}
        for name, transitions in state_tables()
    }
    assert len(in_code) == 4
    assert documented_states() == in_code


# --------------------------------------------------------------------------------------------------------------- words

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


def words_in(path: Path) -> list[str]:
    """Where a text has a banned word. The names of tests do not count, nor do they in RELIABILITY.md."""
    text = re.sub(r"\btest_\w+", "", path.read_text())
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for number, line in enumerate(text.splitlines(), 1)
        for word in BANNED.findall(line)
    ]
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found += [
            f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}"
            for token in tokens
            if token.type == tokenize.NAME and BANNED_IDENTIFIERS & {*token.string.split("_")}
        ]
    return found


@pytest.mark.parametrize("path", [*MODULES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_those_of_the_field(path: Path) -> None:
    """No "let go", "tell", "say" or "hear", no "who" as a subject, and nothing is called a way or a place."""
    assert not words_in(path)
