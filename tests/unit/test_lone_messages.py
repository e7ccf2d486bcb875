"""The fast path of a reader: a message that comes alone, and what is not one, which the general way decodes."""

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
        message = take_lone(self.stream, ownership, form, loaders)
        if message is not NOTHING:
            self._consume_tail_byte()
        return message

    def follow(self) -> list[Any]:
        """Return what the general way decodes next."""
        after = follow(self.stream, self.reader, PLAIN, None, ALL_KINDS, False)
        if after is None:
            return []
        self.stream = after
        items = [*after.ready]
        after.ready.clear()
        self._consume_tail_byte()
        return items

    def _consume_tail_byte(self) -> None:
        """Read it as a channel does behind the last message that is decoded."""
        stream = self.stream
        if stream.has_tail and not (stream.chunks and stream.is_decodable):
            stream.has_tail = False
            stream.chunks.append(os.read(self.reader.fd, 1))


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
def test_one_is_returned_and_its_tail_byte_stays_until_then(form: int, loaders: Any, expected: object, pipe: Pipe) -> None:
    """So the descriptor is readable if, and only if, there is something to receive."""
    for count in (1, 2, 3):
        os.write(pipe.write_end, run(1))
        assert not pipe.stream.ready
        assert pipe.take_lone(form, loaders) == expected
        assert unread(pipe.write_end) == 0
        assert pipe.stream.is_used_up
        assert pipe.stream.handed_out == count
    assert pipe.take_lone() is NOTHING
    assert pipe.follow() == []


def test_one_that_comes_in_two_parts_is_received_whole(pipe: Pipe) -> None:
    """Wherever it is cut: what was read of it is kept, and the next one can come alone again."""
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
        (run(1) + run(2), [1, 2]),
        (runs.note(runs.END, 0), [ENDED]),
        (run(bytes(2 * runs.PART)), None),
    ],
    ids=["two messages", "one behind another", "a note", "a long message"],
)
def test_what_is_no_lone_message_is_left_to_the_general_way(data: bytes, expected: list[Any] | None, pipe: Pipe) -> None:
    """All of it, with a byte in the pipe as long as there is something to receive. Then one can come alone again."""
    os.write(pipe.write_end, data[: 1 << 15])  # less than a pipe has room for
    assert pipe.take_lone() is NOTHING
    assert unread(pipe.write_end) == 1
    assert pipe.follow() == (expected or [])
    if expected is None:
        assert len(b"".join(pipe.stream.chunks)) == 1 << 15
    else:
        os.write(pipe.write_end, run("next"))
        assert pipe.take_lone() == "next"


def test_one_that_cannot_be_unpickled_is_a_failure(pipe: Pipe) -> None:
    """It counts as a message."""
    os.write(pipe.write_end, run(Raises(ValueError())))
    assert pipe.take_lone() is NOTHING
    [failure] = pipe.stream.ready
    assert type(failure) is Failure
    assert type(failure.error) is ValueError
    assert (pipe.stream.plain, unread(pipe.write_end)) == (False, 1)
