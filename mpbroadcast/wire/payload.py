"""A message and the bytes that carry it."""

from __future__ import annotations

import pickle
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mpbroadcast.wire.frames import RunView

__all__ = ["PROTOCOL", "Failure", "dumps", "load_run"]

PROTOCOL: Final = 5

dumps = pickle.dumps
_loads = pickle.loads


class Failure:
    """Stands in the place of a message: ``error`` is raised when its turn comes."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


def load_run(data: bytes, run: RunView) -> tuple[list[Any], bool]:
    """The messages of a run whose frames are all in ``data``, and whether all could be unpickled.

    One that could not is an :class:`Failure` in its place. What is no ``Exception`` (an interrupt) goes through, and the
    run can be loaded again.
    """
    start = run.first + run.skip
    if run.sizes is None:
        try:
            return [_loads(memoryview(data)[start:])], True
        except Exception as error:
            return [Failure(error)], False
    stream = BytesIO(data)
    stream.seek(start)
    messages: list[Any] = []
    sizes = iter(run.sizes)
    whole = True
    while len(messages) < run.messages:
        try:
            messages.extend(map(_loads, map(stream.read, sizes)))
        except Exception as error:  # extend has kept those before it, and the stream stands behind it
            messages.append(Failure(error))
            whole = False
        else:
            if len(messages) < run.messages:  # a StopIteration from a message's own code has ended the map
                messages.append(Failure(RuntimeError("unpickling a message raised StopIteration")))
                whole = False
    return messages, whole
