"""The pytest plugin: runs of pytest with tests that pass, fail, leave something behind, or whose broker crashes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.victims import ROOT

HEAD = """
import multiprocessing, os, signal, subprocess, sys, threading, time
import psutil, pytest
import mpbroadcast
from mpbroadcast.testing import drain, handled, settle

fork = multiprocessing.get_context("fork")
kept = []
"""


class Runs:
    """Runs pytest in a folder of its own, as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}

    def __call__(self, tests: str, *options: str) -> str:
        (self.folder / "test_it.py").write_text(HEAD + tests)
        # The tests fork, in a process of pytest-xdist that has a thread.
        filters = "error\n    ignore:This process .* is multi-threaded:DeprecationWarning"
        (self.folder / "pytest.ini").write_text(f"[pytest]\naddopts = --strict-markers\nfilterwarnings =\n    {filters}\n")
        (self.folder / "conftest.py").write_text("import multiprocessing; multiprocessing.set_start_method('fork')\n")
        command = [sys.executable, "-m", "pytest", "-p", "mpbroadcast.testing", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        text = done.stdout + done.stderr
        assert "INTERNALERROR" not in text, text
        pids = {int(pid) for pid in re.findall(r"broker (\d+)", text)}
        assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")], text
        return text


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_a_test_has_a_broker_of_its_own(runs: Runs) -> None:
    """Children and commands find it by ``MPBROADCAST_ADDRESS``, which is as before at the end; the marker passes options on."""
    text = runs(
        """
def child():
    with mpbroadcast.connect() as bus:
        bus.publish("from a child", topic="a")

@pytest.mark.mpbroadcast(history=2, restart=True)
@pytest.mark.parametrize("number", range(2))
def test_first(broadcaster, number):
    print("broker", broadcaster.stats().pid)
    channel = broadcaster.subscribe("a", name="mine")
    process = fork.Process(target=child)
    process.start()
    process.join()
    command = "import mpbroadcast; mpbroadcast.connect().publish('from a command', topic='a')"
    subprocess.run([sys.executable, "-c", command], check=True)
    assert drain(broadcaster, channel) == ["from a child", "from a command"]
    assert [one.message for one in broadcaster.history(limit=2)] == ["from a child", "from a command"]
    assert broadcaster.stats().published == 2

@pytest.mark.parametrize("number", range(2))
def test_second(broadcaster, number):
    print("broker", broadcaster.stats().pid)
    assert os.environ["MPBROADCAST_ADDRESS"] == broadcaster.address
    with pytest.raises(ValueError):
        broadcaster.history()

def test_none():
    assert "MPBROADCAST_ADDRESS" not in os.environ
""",
        "-s",
        "-m",
        "mpbroadcast or not mpbroadcast",
    )
    assert "5 passed" in text, text


def test_what_a_test_leaves_fails_it(runs: Runs) -> None:
    text = runs("""
def reads(channel):
    channel.poll(None)

def test_own_channel(broadcaster):
    kept.append(broadcaster.subscribe("a", "b", name="forgotten"))
    kept[-1].poll(0)

def test_channel_of_another_process(broadcaster):
    process = fork.Process(target=reads, args=(broadcaster.subscribe("c"),), daemon=True)
    process.start()
    kept.append(process)
    while not any(row.is_open for row in broadcaster.stats().subscribers):
        time.sleep(0.01)

def test_process(broadcaster):
    kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))

def test_file(broadcaster):
    open(broadcaster.address + ".mine", "w").close()

@pytest.mark.mpbroadcast(leaks="ignore")
def test_ignored(broadcaster):
    kept.append(broadcaster.subscribe("a"))
    kept[-1].poll(0)
    open(broadcaster.address + ".mine", "w").close()

def test_nothing(broadcaster):
    channel = broadcaster.subscribe("a")
    channel.poll(0)
    unopened = broadcaster.subscribe("b")
    kept.append(unopened)
    broadcaster.publish(1, topic="b")

def test_closed(broadcaster):
    broadcaster.close()

def test_the_end():
    for one in kept:
        if isinstance(one, subprocess.Popen):
            one.kill()
            one.wait()
""")
    assert "8 passed, 4 errors" in text, text
    for pattern in (
        r"left behind: channel \d+ 'forgotten' on 'a', 'b' of process \d+ \(this process\)",
        r"left behind: channel \d+ on 'c' of process \d+[^(]",
        r"left behind: process \d+ \(.*time.sleep\(60\)\)",
        r"left behind: file \S+\.mine",
    ):
        assert re.search(pattern, text), text


def test_a_test_that_fails_ends_its_broker(runs: Runs) -> None:
    """What it has left is not reported: its traceback keeps it."""
    text = runs("""
def test_it(broadcaster):
    print("broker", broadcaster.stats().pid)
    channel = broadcaster.subscribe("a")
    channel.poll(0)
    assert channel.recv(timeout=0) == 1
""")
    assert re.search(r"broker \d+", text), text
    assert "1 failed" in text, text
    assert "error" not in text.splitlines()[-1], text


def test_an_interrupted_run_ends_its_broker(runs: Runs) -> None:
    text = runs(
        """
def test_it(broadcaster):
    print("broker", broadcaster.stats().pid, flush=True)
    kept.append(broadcaster.subscribe("a"))
    kept[-1].poll(0)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
""",
        "-s",
    )
    assert re.search(r"broker \d+", text), text
    assert "KeyboardInterrupt" in text, text


@pytest.mark.parametrize("options", ["", "restart=True"])
def test_a_crash_fails_the_test_with_its_traceback(runs: Runs, options: str) -> None:
    text = runs(f"""
from mpbroadcast import trap_points

@pytest.fixture
def trigger(monkeypatch, tmp_path):
    trigger = tmp_path / "now"
    def reach(name, subject=None):
        if name == "routing" and os.path.exists(trigger):
            raise ZeroDivisionError("a bug")
    monkeypatch.setattr(trap_points, "reach", reach)
    return trigger

@pytest.mark.mpbroadcast({options})
def test_it(trigger, broadcaster):
    print("broker", broadcaster.stats().pid)
    pid = broadcaster.stats().pid
    broadcaster.subscribe().close()
    trigger.touch()
    broadcaster.publish_many([1, 2])
    broker = psutil.Process(pid)
    while broker.is_running() and broker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    trigger.unlink()
""")
    assert "the broker has crashed" in text, text
    assert "1 passed, 1 error" in text, text
    assert re.search(r"Traceback(.|\n)*ZeroDivisionError: a bug", text), text


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("histroy=10", "the marker mpbroadcast has an unknown option 'histroy': it takes context, address, "),
        ("10", "the marker mpbroadcast takes keyword arguments only, not 10"),
        ("history=-1", "could not be started: history must be"),
        ("leaks='no'", "leaks='no': it must be 'error' or 'ignore'"),
    ],
)
def test_a_wrong_marker_is_one_clear_error(runs: Runs, marker: str, message: str) -> None:
    text = runs(f"@pytest.mark.mpbroadcast({marker})\ndef test_it(broadcaster): pass\n")
    assert "1 error" in text, text
    assert message in text, text
    assert "Traceback" not in text, text
    assert text.count("\n") < 20, text


def test_deep_folders_do_not_matter(runs: Runs, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    runs.environment["TMPDIR"] = str(deep)
    text = runs(
        """
@pytest.mark.mpbroadcast(restart=True)
def test_it(broadcaster, tmp_path):
    print("broker", broadcaster.stats().pid)
    with mpbroadcast.connect() as bus:
        bus.publish(1)
""",
        f"--basetemp={deep / 'base'}",
    )
    assert "1 passed" in text, text


def test_with_xdist(runs: Runs) -> None:
    text = runs(
        """
@pytest.mark.parametrize("number", range(6))
def test_it(broadcaster, number):
    channel = broadcaster.subscribe()
    broadcaster.publish(number)
    assert drain(broadcaster, channel) == [number]
""",
        "-n",
        "2",
    )
    assert "6 passed" in text, text


@pytest.mark.parametrize("plugin", ["anyio", "pytest_asyncio"])
def test_with_asynchronous_tests(runs: Runs, plugin: str) -> None:
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed")
    text = runs(
        f"""
@pytest.mark.{"anyio" if plugin == "anyio" else "asyncio"}
async def test_it(broadcaster):
    async with await broadcaster.asubscribe("a") as channel:
        await broadcaster.apublish(1, topic="a")
        assert await channel.arecv(5) == 1
""",
        "-W",
        "default",
    )
    assert "passed" in text, text
    assert not re.search("failed|error", text), text


def test_the_plugin_imports_nothing_before_it_is_used(runs: Runs) -> None:
    """Nor does ``mpbroadcast.testing`` import pytest, nor ``mpbroadcast`` its modules before a name is used."""
    runs.environment["PYTHONPATH"] = str(ROOT)
    text = runs("""
del mpbroadcast, drain, handled, settle

def test_it():
    assert "mpbroadcast.testing_fixtures" in sys.modules
    loaded = {name for name in sys.modules if name.startswith("mpbroadcast.")}
    assert loaded == {"mpbroadcast.testing", "mpbroadcast.testing_fixtures"}
""")
    assert "1 passed" in text, text
    code = "import mpbroadcast.testing, sys; print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pytest" not in done.stdout
    assert "mpbroadcast.client" not in done.stdout


def test_the_plugin_can_be_named_twice(runs: Runs) -> None:
    text = runs(
        """
pytest_plugins = ["mpbroadcast.testing"]

def test_it(broadcaster):
    pass
""",
        "-p",
        "mpbroadcast.testing",
    )
    assert "1 passed" in text, text
