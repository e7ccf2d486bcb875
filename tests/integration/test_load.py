"""The load program of the benchmarks runs, checks what it receives, and notices what is wrong."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load_books as books
from benchmarks.load_books import Account, Board, Books, Message, Wish, body
from mpbroadcast import Broadcaster
from tests.unit.test_structure import ROOT


@pytest.fixture(scope="module", autouse=True)
def shared_heap() -> None:
    """Multiprocessing keeps the file in which it puts shared arrays: let it open that before the first test."""
    multiprocessing.RawArray("B", 1 << 16)


PROGRAM = [sys.executable, "-m", "benchmarks.load", "--smoke", "--seed", "1"]


def test_a_short_run_loses_nothing_and_leaves_nothing(temporary_folder: Path) -> None:
    """Ended early by SIGTERM: the report comes, and nothing is lost, wrong, or left behind."""
    process = subprocess.Popen(PROGRAM, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
    assert not list(temporary_folder.glob("mpbroadcast-*"))


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
    while mine.poll():
        try:
            words.append(mine.recv())
        except EOFError:
            break
    mine.close()
    return [board.total(books.LOST), board.total(books.WRONG)], words


def message(number: int) -> Message:
    """What publisher 0 sends to topic 0."""
    return (0, 0, number, 100, body(0, 0, number, 100))


def test_an_account_finds_nothing_where_nothing_is(bus: Broadcaster[Message], fork: Any) -> None:
    """All five messages, in order."""
    assert checked(bus, fork, "block", [message(number) for number in range(1, 6)]) == ([0, 0], [])


def test_an_account_finds_what_is_missing(bus: Broadcaster[Message], fork: Any) -> None:
    """One in the middle, and one at the end; where messages may be dropped, they would have to be counted."""
    (lost, wrong), words = checked(bus, fork, "block", [message(number) for number in (1, 2, 4)])
    assert (lost >= 2, wrong) == (True, 0)
    assert f"process {os.getpid()}: block" in words[0]
    assert "3 to 3 did not come" in words[0]
    (lost, wrong), words = checked(bus, fork, "drop_oldest", [message(number) for number in (1, 2, 4, 5)])
    assert (lost >= 1, wrong) == (True, 0)
    assert "1 so far, and 0 were said to be missing" in words[0]
    assert checked(bus, fork, "latest", [message(number) for number in (1, 4)])[0][0] >= 1


def test_an_account_finds_what_is_wrong(bus: Broadcaster[Message], fork: Any) -> None:
    """A message twice, and one with other bytes."""
    (_, wrong), words = checked(bus, fork, "block", [message(number) for number in (1, 2, 2, 3, 4, 5)])
    assert wrong >= 1
    assert "number 2 after 2" in words[0]
    bad = (0, 0, 3, 100, body(0, 0, 4, 100))
    (_, wrong), words = checked(bus, fork, "block", [message(1), message(2), bad, message(4), message(5)])
    assert wrong == 1
    assert "not the 100 bytes that were sent" in words[0]
