"""The keys with which bridges sign: from an argument, the environment or a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

from mpbroadcast.key import Key

VARIABLE: Final = "MPBROADCAST_BRIDGE_KEY"
SHORTEST: Final = 16  # bytes
_HOW: Final = (
    "all machines of a bridge need the same key of 16 bytes or more, with which they sign: pass key=, or set "
    f"${VARIABLE}. This makes one: python3 -c 'import secrets; print(secrets.token_hex(32))'"
)


def check_keys(key: str | bytes | Sequence[str | bytes] | None) -> tuple[Key, ...]:
    """Return the keys, of which the first signs, and all are accepted. ``None``: those of the environment, a line each.

    :raises ValueError: there is none, or one is too short; no key is in the text.
    :raises TypeError: one is neither ``str`` nor ``bytes``.
    """
    if key is None:
        return keys_of(os.environ.get(VARIABLE, ""))
    given: Sequence[Any] = [key] if isinstance(key, (str, bytes, bytearray)) else key
    if not isinstance(given, Sequence):
        raise TypeError(f"key must be a str, bytes or a list of these, not {type(key).__name__}")
    return tuple(_checked(one) for one in given) or keys_of("")


def keys_of(text: str) -> tuple[Key, ...]:
    """Return the keys in the text of a file or a variable: one in each line; empty lines do not count.

    :raises ValueError: there is none, or one is too short.
    """
    keys = tuple(_checked(line.strip()) for line in text.splitlines() if line.strip())
    if not keys:
        raise ValueError(f"no key: {_HOW}")
    return keys


def _checked(key: Any) -> Key:
    if not isinstance(key, (str, bytes, bytearray)):
        raise TypeError(f"key must be a str, bytes or a list of these, not one of {type(key).__name__}")
    encoded = Key(key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key)
    if len(encoded) < SHORTEST:
        raise ValueError(f"a key of {len(encoded)} bytes is too short: {_HOW}")
    return encoded
