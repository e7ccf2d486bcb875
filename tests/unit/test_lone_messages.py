"""The fast path of a reader: a message that comes alone is read exactly, and what is not one stays for the general way."""

import os
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mpbroadcast.client.pipe_ownership import OPEN
from mpbroadcast.client.pipe_reader import ENDED, NOTHING, Stream, follow, take_lone
from mpbroadcast.client.received import PLAIN, WITH_ID, WITH_TOPIC, Received
from mpbroadcast.posix.pipes import PipeEnd, unread
from mpbroadcast.protocol import runs
from mpbroadcast.protocol.pickling import ALL_KINDS, PAYLOADS, Failure
from tests.support.frames_made import batch_of
from tests.support.workers import Raises


class Pipe:
    """A pipe, and a stream that is read from it as a channel reads."""

    def __init__(self) -> None:
        reader, self.write_end = os.pipe()
        os.set_blocking(reader, False)
        self.reader = PipeEnd(reader)
        self.stream = Stream()

    def take_lone(self, form: int = PLAIN, loaders: Any = ALL_KINDS) -> Any:
        ownership: Any = SimpleNamespace(pipe=self.reader, state=OPEN)
        return take_lone(self.stream, ownership, form, loaders)

    def follow(self) -> list[Any]:
        """Return what the general way decodes next."""
        after = follow(self.stream, self.reader, PLAIN, None, ALL_KINDS, False)
        if after is None:
            return []
        self.stream = after
        items = [*after.ready]
        after.ready.clear()
        if after.has_tail and not after.is_decodable:  # as the channel does behind the last one
            after.has_tail = False
            after.chunks.append(os.read(self.reader.fd, 1))
        return items


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.write_end)
    made.reader.close()
    del made.reader, made.stream  # which frees the number of the descriptor: a failure refers to it in its traceback


def run(*messages: object, position: int = 7) -> bytes:
    return bytes(runs.run_of(batch_of(messages, b"topic"), position).data)


@pytest.mark.parametrize(
    ("form", "loaders", "expected"),
    [
        (PLAIN, ALL_KINDS, 1),
        (WITH_TOPIC, ALL_KINDS, ("topic", 1)),
        (WITH_ID, ALL_KINDS, Received(7, "topic", 1)),
        (PLAIN, PAYLOADS, pickle.dumps(1)),
    ],
)
def test_one_is_read_with_its_tail_byte_and_nothing_behind_it(form: int, loaders: Any, expected: object, pipe: Pipe) -> None:
    """So the descriptor is readable if, and only if, there is something to receive."""
    os.write(pipe.write_end, run(1) + run(1))
    for left in (len(run(1)), 0):
        assert pipe.take_lone(form, loaders) == expected
        assert unread(pipe.write_end) == left
    assert pipe.take_lone() is NOTHING
    assert pipe.stream.handed_out == 2


def test_one_that_comes_in_two_parts_is_received_whole(pipe: Pipe) -> None:
    """Wherever it is cut: what was read of it is kept, and the next one can be read alone again."""
    data = run("message")
    for cut in range(1, len(data)):
        os.write(pipe.write_end, data[:cut])
        assert pipe.take_lone() is NOTHING
        assert pipe.follow() == []
        os.write(pipe.write_end, data[cut:])
        assert pipe.take_lone() is NOTHING
        assert pipe.follow() == ["message"]
        os.write(pipe.write_end, run("next"))
        assert pipe.take_lone() == "next"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (run(1, 2), [1, 2]),
        (runs.note(runs.END, 0), [ENDED]),
        (run(bytes(2 * runs.PART)), None),
    ],
    ids=["two messages", "a note", "a long message"],
)
def test_what_is_no_lone_message_is_left_to_the_general_way(data: bytes, expected: list[Any] | None, pipe: Pipe) -> None:
    """All of it, also its head, which was read already."""
    os.write(pipe.write_end, data[: 1 << 15])  # less than a pipe has room for
    assert pipe.take_lone() is NOTHING
    assert pipe.follow() == (expected or [])
    assert expected or len(b"".join(pipe.stream.chunks)) == 1 << 15


def test_behind_many_nothing_is_read_alone(pipe: Pipe) -> None:
    """A head that is read alone makes the general way copy what is behind it. Behind a single message it begins again."""
    os.write(pipe.write_end, run(1, 2))
    assert pipe.follow() == [1, 2]
    os.write(pipe.write_end, run(3))
    assert pipe.take_lone() is NOTHING
    assert unread(pipe.write_end) == len(run(3))
    assert pipe.follow() == [3]
    os.write(pipe.write_end, run(4))
    assert pipe.take_lone() == 4


def test_one_that_cannot_be_unpickled_is_a_failure(pipe: Pipe) -> None:
    """It counts as a message."""
    os.write(pipe.write_end, run(Raises(ValueError())))
    assert pipe.take_lone() is NOTHING
    [failure] = pipe.stream.ready
    assert type(failure) is Failure
    assert type(failure.error) is ValueError
    assert (pipe.stream.plain, unread(pipe.write_end)) == (False, 0)
