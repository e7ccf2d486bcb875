"""What a broker and the one that replaces it have in common."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

from mpbroadcast.broker.host.journal import Journal


@dataclass(frozen=True)
class Succession:
    """What brokers that follow each other have in common; ``number`` counts them from 0 on."""

    identity: str
    number: int
    journal: Journal


# What a broker writes down beside its subscriptions.
READY: Final = -1
STOPPING: Final = -2


def new_identity() -> str:
    return secrets.token_hex(8)
