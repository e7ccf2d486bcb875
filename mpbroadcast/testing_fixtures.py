"""The fixture ``broadcaster`` of pytest, and its check that a test leaves nothing. ``mpbroadcast.testing`` registers it."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

import mpbroadcast

_PASSED: Final = pytest.StashKey[bool]()
_GRACE: Final = 2.0  # seconds for what is just ending
_DRAIN: Final = 1.0  # seconds without progress until close() gives up: no channel is left open then
_LONGEST_FOLDER: Final = 60  # bytes: a socket's path has 104 on macOS, 108 on Linux


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note that a test has passed: a failed one has left what it has left, and its traceback keeps channels alive."""
    if call.when == "call" and call.excinfo is None:
        item.stash[_PASSED] = True


@pytest.fixture
def broadcaster(request: pytest.FixtureRequest) -> Iterator[mpbroadcast.Broadcaster[Any]]:
    """A broker of this test alone. ``MPBROADCAST_ADDRESS`` has its address, so ``connect()`` in any process leads to it.

    ``@pytest.mark.mpbroadcast(history=10)`` passes options to ``start_broadcaster``. A test that passes, and leaves a channel
    open, a process running or a file behind, fails in the end, unless the marker has ``leaks="ignore"``.
    """
    options, looks = _options(request.node)
    with contextlib.ExitStack() as stack:
        folder = _short_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        options.setdefault("address", os.path.join(folder, "bus"))
        before = _descendants()
        try:
            bus: mpbroadcast.Broadcaster[Any] = mpbroadcast.start_broadcaster(**options)
        except (TypeError, ValueError, mpbroadcast.StartError) as error:
            pytest.fail(f"the broadcaster of this test could not be started: {error}", pytrace=False)
        stack.callback(bus.close, _DRAIN)
        before |= _descendants()
        witness = _witness(bus, options.get("authkey"))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("MPBROADCAST_ADDRESS", bus.address)
        yield bus
        patch.undo()
        looks = looks and request.node.stash.get(_PASSED, False)
        end = time.monotonic() + _GRACE
        problems = _channels_left(bus, end) if looks else []
        bus.close(_DRAIN)
        crash = witness()
        if looks:
            problems += _left(lambda: [text for process, text in _descendants().items() if process not in before], end)
            problems += [f"file {path}" for path in _files(folder, bus.address)]
    if crash is not None:
        pytest.fail(f"the broker has crashed:\n{crash}", pytrace=False)
    if problems:
        pytest.fail("the test has left behind: " + "; ".join(problems), pytrace=False)


def _options(node: Any) -> tuple[dict[str, Any], bool]:
    """Return the options of the markers, those of the closest one first, and whether to look at what is left."""
    options: dict[str, Any] = {}
    for marker in node.iter_markers("mpbroadcast"):
        if marker.args:
            pytest.fail(f"the marker mpbroadcast takes keyword arguments only, not {marker.args[0]!r}", pytrace=False)
        options = {**marker.kwargs, **options}
    leaks = options.pop("leaks", "error")
    if leaks not in ("error", "ignore"):
        pytest.fail(f"the marker mpbroadcast has leaks={leaks!r}: it must be 'error' or 'ignore'", pytrace=False)
    known = [*inspect.signature(mpbroadcast.start_broadcaster).parameters]
    unknown = [name for name in options if name not in known]
    if unknown:
        text = f"the marker mpbroadcast has an unknown option {unknown[0]!r}: it takes {', '.join(known)} and leaks"
        pytest.fail(text, pytrace=False)
    return options, leaks == "error"


def _short_folder() -> str:
    """Return a new folder in which a socket's path is not too long, whatever TMPDIR is."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        folder = next((one for one in ("/tmp", "/var/tmp") if os.access(one, os.W_OK | os.X_OK)), folder)
    return tempfile.mkdtemp(prefix="mpbroadcast-test-", dir=folder)


def _witness(bus: mpbroadcast.Broadcaster[Any], authkey: bytes | None) -> Callable[[], BaseException | None]:
    """Connect to the broker for nothing but its last words: return a function that returns the error of its crash, if any."""
    from mpbroadcast.client.broker_client import BrokerClient

    client = BrokerClient(bus.address, authkey=authkey)
    client.session()
    return lambda: client.lost_error().__cause__


def _channels_left(bus: mpbroadcast.Broadcaster[Any], end: float) -> list[str]:
    from mpbroadcast.client.settling import described

    def open_channels() -> list[str]:
        gc.collect()
        return [described(row) for row in bus.stats().subscribers if row.is_open]

    try:
        return _left(open_channels, end)
    except (mpbroadcast.BrokerLost, mpbroadcast.ClosedError):  # the test has ended it
        return []


def _left(look: Callable[[], list[str]], end: float) -> list[str]:
    """Return what is left when it has had until ``end`` to go."""
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def _descendants() -> dict[tuple[int, float], str]:
    """Return the living processes below this one, without those that multiprocessing starts for itself, once in a run."""
    from multiprocessing import active_children, forkserver, resource_tracker

    import psutil

    active_children()  # joins those that have ended
    helpers = {
        getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None),
        getattr(getattr(resource_tracker, "_resource_tracker", None), "_pid", None),
    }
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.pid not in helpers and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid, process.create_time()] = f"process {process.pid} ({' '.join(process.cmdline())[:100]})"
    return found


def _files(folder: str, address: str) -> list[str]:
    beside = [address, f"{address}.key"]
    inside = [os.path.join(folder, name) for name in os.listdir(folder)]
    return sorted({*inside, *filter(os.path.lexists, beside)})
