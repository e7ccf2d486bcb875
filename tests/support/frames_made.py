"""Frames of all kinds, as publishers write them: what the property tests of the parsers draw and compare."""

import pickle
from array import array
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, Final, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mpbroadcast.protocol.frames import IMAGE, PIPE_BUF, Batch, abort, frame_head, memory_frame, pieces, reference_frame
from tests.support.helpers import pattern

STEADY: Final = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
TOPICS: Final = st.sampled_from([b"", b"a", b"b", b"room:1", b"room:2", "tür".encode(), b"x" * 1024])
EXCLUDED: Final = st.sampled_from([0, 0, 0, 1, 2**63])
SIZES: Final = st.integers(0, 40) | st.sampled_from([1000, PIPE_BUF - 8, PIPE_BUF - 7, PIPE_BUF, 3 * PIPE_BUF, 20_000])
SHARED_SIZES: Final = st.integers(1, 5000) | st.sampled_from([1 << 18, 1 << 21, 0xFFFF_0000])


class Message(NamedTuple):
    """What is published; of one in shared memory, its ring or none, its position or ID, and its length."""

    topic: bytes = b""
    exclude: int = 0
    payload: bytes | tuple[int | None, int, int] = b""
    image: bool = False

    @property
    def frame(self) -> bytes:
        if isinstance(self.payload, bytes):
            return frame_head(len(self.payload), self.topic, self.exclude, IMAGE if self.image else 0) + self.payload
        ring, position, length = self.payload
        if ring is None:
            return memory_frame(position, length, self.topic, self.exclude, self.image)
        return reference_frame(ring, position, length, self.topic, self.exclude, self.image)


ROUTES: Final = st.tuples(TOPICS, EXCLUDED, st.booleans())
PLAIN: Final = st.builds(pattern, st.integers(0, 255), SIZES)
IN_MEMORY: Final = st.tuples(st.none(), st.integers(0, 2**64 - 1), SHARED_SIZES)
IN_RING: Final = st.tuples(st.integers(1, 3), st.integers(0, 2**32 - 1), SHARED_SIZES)
MESSAGES: Final = st.builds(Message, TOPICS, EXCLUDED, PLAIN | PLAIN | IN_RING | IN_MEMORY, st.booleans())


class Written(NamedTuple):
    """What several threads of one publisher have written."""

    writes: list[bytes]
    messages: list[Message]  # in the order in which they are complete
    aborted: list[int]


@st.composite
def written(draw: st.DrawFn) -> Written:
    """Writes of three threads, mixed; some long messages are given up in their middle."""
    threads: list[list[tuple[bytes, Message | int | None]]] = [[], [], []]
    for number, message in enumerate(draw(st.lists(MESSAGES, max_size=12)), 1):
        own = threads[draw(st.integers(0, 2))]
        if len(message.frame) <= PIPE_BUF:
            own.append((message.frame, message))
            continue
        parts = list(pieces(message.frame, number))
        kept = draw(st.integers(1, len(parts) - 1)) if draw(st.integers(0, 3)) == 3 else len(parts)
        for index, part in enumerate(parts[:kept]):
            own.append((part, message if index == len(parts) - 1 else None))
        if kept < len(parts):
            own.append((abort(number), number))
    result = Written([], [], [])
    while any(threads):
        busy = [thread for thread in threads if thread]
        write, done = busy[draw(st.integers(0, len(busy) - 1))].pop(0)
        result.writes.append(write)
        if isinstance(done, Message):
            result.messages.append(done)
        elif done is not None:
            result.aborted.append(done)
    return result


def chunks(data: bytes, lengths: Iterable[int]) -> list[bytes]:
    """``data``, cut into parts of these lengths, and the rest."""
    parts = []
    start = 0
    for length in lengths:
        parts.append(data[start : start + length])
        start += length
    return [*parts, data[start:]]


def batch_of(values: Iterable[Any], topic: bytes = b"", exclude: int = 0) -> Batch:
    frames = [Message(topic, exclude, pickle.dumps(value)).frame for value in values]
    return Batch(b"".join(frames), array("I", map(len, frames)), topic, exclude, len(frame_head(0, topic, exclude)))


NUMBERS: Final = [0, 1, 7, 8, 16, 0x7F, 0x80, 0xFF, PIPE_BUF, PIPE_BUF + 1, 0xFFFF, 1 << 16, 1 << 17, 1 << 24, 2 << 24, 3 << 24,
                  4 << 24, 5 << 24, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1]  # fmt: skip


def damaged(choose: Random, data: bytes, others: Sequence[bytes], most: int = 4) -> bytes:
    """``data`` with some bytes flipped, cut out, put in, doubled, or replaced by a part of another stream."""
    result = bytearray(data)
    for _ in range(choose.randint(1, most)):
        start = choose.randrange(len(result) + 1)
        end = start + choose.choice([1, 1, 2, 4, 8, 20, 100])
        match choose.randrange(8):
            case 0 if start < len(result):
                result[start] ^= 1 << choose.randrange(8)
            case 1:
                del result[start:end]
            case 2:
                result[start:start] = choose.randbytes(end - start)
            case 3:
                result[start:start] = result[start:end]
            case 4:
                del result[start:]
            case 5:
                other = choose.choice(others)
                result[start:] = other[choose.randrange(len(other) + 1) :]
            case _:
                size = choose.choice([1, 2, 4, 4, 8])
                value = choose.choice(NUMBERS) & ((1 << 8 * size) - 1)
                result[start : start + size] = value.to_bytes(size, choose.choice(["little", "big"]))
    return bytes(result)
