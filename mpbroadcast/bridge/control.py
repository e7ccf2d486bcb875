"""Messages between a bridge's processes: the caller of ``bridge()``, the supervisor, and the bridge's process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

ENDED: Final = 0
"""The exit code of the bridge's process behind which no other one is started."""

State = Literal["at work", "standing by", "trying", "ready", "refused", "wrong", "lost", "mismatch", "draining", "ended"]
Report = tuple[State, str | int | None]
"""A report of the bridge's process: its state, and an error's text, or how many messages wait."""

SETTLED: Final = {"ready", "standing by"}
"""Reports behind which the caller reads no other one, until it closes the bridge."""


@dataclass(frozen=True)
class Configuration:
    """All that the bridge's process needs. It travels through a pipe, as it holds keys."""

    caller: int
    bus: bytes
    bus_key: bytes
    url: str
    topics: tuple[str, ...]
    stream: str
    keys: tuple[bytes, ...]
    overflow: Literal["block", "drop_oldest", "drop_newest"]
    capacity: int
    max_bytes: int
    max_age: float
    is_patient: bool

    def __repr__(self) -> str:
        return f"<Configuration of {self.stream!r}>"  # without keys and passwords


@dataclass(frozen=True)
class Stop:
    """The end of a bridge: the seconds without progress after which it drops what waits (``None``: no limit), and what is
    forgotten with it: all that the broker keeps for the stream, the same if it has no position in the log yet, or nothing."""

    timeout: float | None = 5.0
    forget: Literal["all", "new", "nothing"] = "nothing"
