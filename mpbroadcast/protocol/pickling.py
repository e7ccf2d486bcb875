"""A message and the bytes that carry it.

Most messages are one pickle. Large buffers that pickle protocol 5 leaves out of it (those of numpy, pandas, PyArrow, and of
``PickleBuffer``) follow it, uncopied, in an **image**::

    parts u32 | 0 u32 | for each part: offset u64, length u64 | the pickle | the buffers, each at a multiple of 64 bytes

So that small messages do not pay for it, a message is expected to be like the one before it: :func:`dumps` with
:func:`keep_in_band` for small ones, which raises :class:`LargeBuffer` when it meets one that is not, and :func:`gather` for
messages with large parts.

Where a program takes messages as bytes (``raw=True``), an image is **wrapped**: a pickle that calls :func:`load_image` on it::

    _WRAPPER | its length u64 | the image | _WRAPPER_END

So each payload is a pickle, and :func:`as_payload` finds the image again without parsing one. Payloads travel to other machines
and versions: the name of :func:`load_image` is a part of this format.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from itertools import accumulate, islice, pairwise
from struct import Struct, error
from typing import Any, Final, NamedTuple

from mpbroadcast.errors import BroadcastError
from mpbroadcast.protocol.runs import AROUND, RunView

PROTOCOL: Final = 5
OUT_OF_BAND: Final = 1 << 16  # bytes of a buffer from which on it is left out of the pickle
_GATHER_FROM: Final = 1 << 17
GATHER_BYTES_FROM: Final = 1 << 15  # for a message that is one ``bytes`` object: no pickler has to find its parts

dumps = pickle.dumps
loads: Final = pickle.loads

_COUNT: Final = Struct("<II")
_PART: Final = Struct("<QQ")
_WRAPPER: Final = b"\x80\x05\x8c\x1dmpbroadcast.protocol.pickling\x8c\x0aload_image\x93\x96"
_WRAPPER_END: Final = b"\x85R."
_LENGTH: Final = Struct("<Q")
_ALIGNMENT: Final = 64
_BYTES: Final = Struct("<3sI")  # PROTO 5 and BINBYTES, its length
_BYTES_END: Final = b"\x94."  # MEMOIZE, STOP
_AROUND_BYTES: Final = _BYTES.size + len(_BYTES_END)
_MOST_BYTES: Final = 0xFFFF_FFFF
# A message that raises these would be taken for the channel's own end or error.
_NOT_OF_A_MESSAGE: Final = (EOFError, StopIteration, StopAsyncIteration, BroadcastError)


class Payload(NamedTuple):
    """The bytes of a message, in parts. ``image`` is True if they are no plain pickle."""

    parts: Sequence[Any]
    size: int
    image: bool


class LargeBuffer(Exception):
    """A message has a buffer that is too large to copy into a pickle."""


def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
    """Return True, for :func:`dumps`: a small buffer goes into the pickle.

    :raises LargeBuffer: this one is not small.
    """
    with memoryview(buffer) as view:
        if view.nbytes >= OUT_OF_BAND and view.contiguous:
            raise LargeBuffer
    return True


class _Parts(list[Any]):
    write = list.append


def gather_from(message: object) -> int:
    """Return the bytes of such a message from which on joining the parts of its pickle takes longer than gathering them."""
    return GATHER_BYTES_FROM if type(message) is bytes else _GATHER_FROM


def gather(message: object) -> Payload:
    """Pickle a message. Its large buffers (of pickle protocol 5) and large ``bytes`` and ``bytearray`` are not copied."""
    if type(message) is bytes and len(message) <= _MOST_BYTES:  # what the pickler would write, without one
        size = len(message)
        around = (_BYTES.pack(b"\x80\x05B", size), message, _BYTES_END)
        return tuple.__new__(Payload, (around, size + _AROUND_BYTES, False))  # the constructor is a Python function
    parts = _Parts()
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        with memoryview(buffer) as view:
            if view.nbytes < OUT_OF_BAND or not view.contiguous:
                return True
        buffers.append(buffer.raw())
        return False

    pickle.dump(message, parts, PROTOCOL, buffer_callback=keep)
    pickled: list[Any] = parts
    if bytearray in map(type, parts):  # it cannot change its size while a view of it exists
        pickled = [memoryview(part) if type(part) is bytearray else part for part in parts]
    size = sum(map(len, pickled))
    if not buffers:
        return Payload(pickled, size, False)
    lengths = [size, *(raw.nbytes for raw in buffers)]
    start = _COUNT.size + len(lengths) * _PART.size
    # Each part begins where the one before it ends, aligned.
    offsets = list(accumulate(lengths[:-1], lambda at, length: _aligned(at + length), initial=_aligned(start)))
    head = _COUNT.pack(len(lengths), 0) + b"".join(map(_PART.pack, offsets, lengths))
    whole: list[Any] = [head, bytes(offsets[0] - start), *pickled]
    end = offsets[0] + size
    for offset, raw in zip(offsets[1:], buffers, strict=True):
        whole += (bytes(offset - end), raw)
        end = offset + raw.nbytes
    return Payload(whole, end, True)


def explain(error: Exception, message: object, topic: str) -> None:
    """Add a note to an error of pickling: the type of the message, and its topic."""
    with contextlib.suppress(Exception):  # a user's exception may take no note
        kind = type(message).__name__
        error.add_note(f"publish() could not pickle this message, a {kind}, for topic {topic!r}: nothing was sent of it")


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def load_image(buffer: Any) -> Any:
    """Return the message of an image. Its buffers are parts of ``buffer``, which must therefore be the message's own.

    :raises pickle.UnpicklingError: it is no image.
    """
    view = memoryview(buffer).cast("B")
    try:
        count, _ = _COUNT.unpack_from(view)
        positions = list(_PART.iter_unpack(view[_COUNT.size : _COUNT.size + count * _PART.size]))
    except error:
        positions = []
    parts = [view[offset : offset + length] for offset, length in positions]
    if not parts or len(parts) != count or any(len(part) != length for part, (_, length) in zip(parts, positions, strict=True)):
        raise pickle.UnpicklingError("the message's buffers are not where its head has them")
    return loads(parts[0], buffers=parts[1:])


def load_copied_image(payload: memoryview) -> Any:
    """Return the message of an image in memory that will be written again: of a copy."""
    return load_image(bytearray(payload))


def wrapped(image: Any) -> bytes:
    """Return an image as a pickle."""
    return b"".join((_WRAPPER, _LENGTH.pack(len(image)), image, _WRAPPER_END))


def as_payload(data: Any) -> Payload:
    """Return what is published for the payload of a message: a pickle, or the image that one wraps. Nothing is copied.

    :raises TypeError: it is not bytes-like, or not contiguous.
    """
    try:
        view: Any = memoryview(data).cast("B")
    except TypeError:
        raise TypeError(
            f"payload must be a contiguous bytes-like object, as a channel with raw=True gives it, not {type(data).__name__}: "
            "publish() takes the message itself"
        ) from None
    start, end = len(_WRAPPER) + _LENGTH.size, len(view) - len(_WRAPPER_END)
    if view[: len(_WRAPPER)] == _WRAPPER and end >= start and view[end:] == _WRAPPER_END:
        (length,) = _LENGTH.unpack_from(view, len(_WRAPPER))
        if length == end - start:
            return Payload((view[start:end],), length, True)
    return Payload((view,), len(view), False)


class Loaders(NamedTuple):
    """Three functions that make a message of bytes: a pickle, an image in its own memory, an image that is overwritten."""

    pickle: Callable[[Any], Any]
    image: Callable[[Any], Any]
    copied_image: Callable[[Any], Any]


ALL_KINDS: Final = Loaders(loads, load_image, load_copied_image)
PAYLOADS: Final = Loaders(bytes, wrapped, wrapped)  # for a channel with raw=True. Only this one gets no byte behind a payload


class Failure:
    """Stands for a message that could not be unpickled, or ``missed`` ones: ``error`` is raised at its position."""

    __slots__ = ("error", "missed")

    def __init__(self, error: Exception, missed: int = 0) -> None:
        self.error = error
        self.missed = missed


def load_run(data: bytes, run: RunView, loaders: Loaders = ALL_KINDS) -> tuple[list[Any], bool]:
    """Return the messages of a run whose frames are all in ``data``, and whether all could be unpickled.

    One that could not is a :class:`Failure` at its position. An error that does not come again was an interrupt: it is raised,
    and the run can be loaded again.
    """
    start = run.first + run.skip
    view = memoryview(data)
    loader = loaders.copied_image if run.image else loaders.pickle
    if run.sizes is None:
        end = run.first + run.size - AROUND if loaders is PAYLOADS else None
        return load_each([view[start:end]], loader)
    messages: list[Any] = []
    failed: BaseException | None = None
    if not run.image and loaders is not PAYLOADS:
        stream = BytesIO(data)  # each read is a payload and the next frame's head: no loop in Python
        stream.seek(start)
        failed = _extend(messages, map(loader, map(stream.read, run.sizes)), run.messages)
        if failed is None:
            return messages, True
    ends = accumulate(run.sizes, initial=start)
    return load_each([view[a : b - run.skip] for a, b in pairwise(ends)], loader, messages, failed)


def load_each(
    payloads: Sequence[bytes | memoryview],
    loader: Callable[[Any], Any],
    messages: list[Any] | None = None,
    failed: BaseException | None = None,
) -> tuple[list[Any], bool]:
    """Return the messages in ``payloads``, and whether all could be unpickled, as :func:`load_run`.

    ``messages`` are the first ones, unpickled before, and ``failed`` is the error that the next one has raised.
    """
    messages = [] if messages is None else messages
    whole = True
    while True:
        if failed is None:
            failed = _extend(messages, map(loader, islice(payloads, len(messages), None)), len(payloads))
        if failed is None:
            return messages, whole
        messages.append(_failure(payloads[len(messages)], failed, loader))
        failed, whole = None, False


def _extend(messages: list[Any], more: Iterable[Any], count: int) -> BaseException | None:
    """Append ``more`` until there are ``count`` messages. Return the error that came before that."""
    try:
        messages.extend(more)
    except BaseException as raised:  # extend has kept those before it
        if len(messages) == count:
            raise
        return raised
    return None if len(messages) == count else StopIteration()  # of a message: it has ended the map


def _failure(payload: bytes | memoryview, error: BaseException, loader: Callable[[Any], Any]) -> Failure:
    """Return the failure of a message whose unpickling raised ``error``, or raise that if it does not come again."""
    if _may_be_the_users(error):
        raise error
    try:
        loader(payload)
    except BaseException as again:
        if _may_be_the_users(again):
            raise
        if isinstance(again, Exception) and not isinstance(again, _NOT_OF_A_MESSAGE):
            return Failure(again)
        wrapped = RuntimeError(f"unpickling a message raised {type(again).__name__}")
        wrapped.__cause__ = again
        return Failure(wrapped)
    raise error


def _may_be_the_users(error: BaseException) -> bool:
    """Return whether this may be a Ctrl-C; a second one comes from an impatient user. It interrupts the main thread only."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
