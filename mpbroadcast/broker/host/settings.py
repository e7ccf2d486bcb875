"""What a broker process is to be: sent from its starter to the new process."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Settings:
    """The arguments of ``start_broadcaster``, and what the broker takes over from its starter."""

    address: str | None
    authkey: bytes | None
    history: int
    stall_timeout: float | None
    log_config: dict[str, Any] | None
    restart: bool
    keys: list[bytes] = field(default_factory=list)
    starter: int = field(default_factory=os.getpid)
    temporary: str = field(default_factory=lambda: os.path.abspath(tempfile.gettempdir()))
    inherited: frozenset[tuple[int, int, int]] = frozenset()  # descriptors, each with the device and inode of its file
