"""The load program of the benchmarks runs, checks what it receives, and notices what is wrong."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from benchmarks import load_books as books
from benchmarks.load_books import Account, Board, Books, Message, Wish
from benchmarks.promises import body
from mpbroadcast import Broadcaster
from tests.unit.test_structure import ROOT


@pytest.fixture(scope="module", autouse=True)
def shared_heap() -> None:
    """Open the file in which multiprocessing puts shared arrays, and which it keeps, before the first test."""
    multiprocessing.RawArray("B", 1 << 16)


def test_a_short_run_loses_nothing_and_leaves_nothing() -> None:
    """Ended early by SIGTERM: the report comes, and nothing is lost, wrong, or left behind."""
    program = [sys.executable, "-m", "benchmarks.load", "--smoke", "--seed", "1"]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        while "subscriptions" not in (line := process.stdout.readline()):  # they are there
            assert line
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    assert "losses             0; otherwise wrong: 0" in output
    assert output.endswith("left behind        nothing\n")


def checked(bus: Broadcaster[Message], context: Any, overflow: str, messages: list[Message]) -> tuple[list[int], list[str]]:
    """Return what an account finds in these messages of topic 0: its counts of lost and wrong, and its words."""
    board = Board(context, 4, 1, 1)
    account = Account.opened(bus, board, Wish(("g0.t0",), (0,), overflow, None))
    mine, its = context.Pipe(duplex=False)
    account.books = Books(board, 0, its)
    for message in messages:
        bus.publish(message, topic="g0.t0")
    bus.flush()
    board.begun[0] = board.done[0] = board.flushed[0] = 5
    while account.receive(None, 0.1):
        pass
    account.end(bus, board)
    its.close()
    words = []
    with mine, contextlib.suppress(EOFError):
        while mine.poll():
            words.append(mine.recv())
    return [board.total(books.LOST), board.total(books.WRONG)], words


def message(number: int) -> Message:
    """What publisher 0 sends to topic 0."""
    return (0, 0, number, 100, body(0, 0, number, 100))


def test_an_account_finds_what_is_missing_or_wrong_and_nothing_else(bus: Broadcaster[Message], fork: Any) -> None:
    """Find a gap and a missing end, which would have to be counted where messages may be dropped; a copy; other bytes."""

    def check(overflow: str, *messages: int | Message) -> tuple[list[int], list[str]]:
        return checked(bus, fork, overflow, [message(one) if isinstance(one, int) else one for one in messages])

    assert check("block", 1, 2, 3, 4, 5) == ([0, 0], [])
    (lost, wrong), words = check("block", 1, 2, 4)
    assert (lost >= 2, wrong) == (True, 0)
    assert f"process {os.getpid()}: block" in words[0]
    assert "3 to 3 did not come" in words[0]
    (lost, wrong), words = check("drop_oldest", 1, 2, 4, 5)
    assert (lost >= 1, wrong) == (True, 0)
    assert "3 to 3 did not come: 1 of them, and 0 were counted as missing" in words[0]
    assert check("latest", 1, 4)[0][0] >= 1
    (_, wrong), words = check("block", 1, 2, 2, 3, 4, 5)
    assert wrong >= 1
    assert "number 2 after 2" in words[0]
    (_, wrong), words = check("block", 1, 2, (0, 0, 3, 100, body(0, 0, 4, 100)), 4, 5)
    assert wrong == 1
    assert "not the 100 bytes that were sent" in words[0]
