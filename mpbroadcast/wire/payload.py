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

    One that could not is a :class:`Failure` in its place. An interrupt, which is what raises once and not again, goes
    through, and the run can be loaded again.
    """
    start = run.first + run.skip
    if run.sizes is None:
        payload = memoryview(data)[start:]
        try:
            return [_loads(payload)], True
        except Exception as error:
            return [_failure(payload, error)], False
    stream = BytesIO(data)
    stream.seek(start)
    messages: list[Any] = []
    sizes = iter(run.sizes)
    whole = True
    while len(messages) < run.messages:
        try:
            messages.extend(map(_loads, map(stream.read, sizes)))
            if len(messages) == run.messages:
                break
            failed: Exception = RuntimeError("unpickling a message raised StopIteration")  # which has ended the map
        except Exception as raised:  # extend has kept those before it, and the stream stands behind it
            if len(messages) == run.messages:
                raise
            failed = raised
        end = stream.tell()
        messages.append(_failure(memoryview(data)[end - run.sizes[len(messages)] : end], failed))
        whole = False
    return messages, whole


def _failure(payload: memoryview, error: Exception) -> Failure:
    """What stands in the place of a message whose unpickling raised ``error``; if it does not again, that was an interrupt."""
    try:
        _loads(payload)
    except Exception:
        return Failure(error)
    raise error
