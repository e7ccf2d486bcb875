"""Checks of arguments: one clear error for a bad one, before anything is sent."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Literal, get_args

from mpbroadcast.errors import AddressError

Policy = Literal["block", "drop_oldest", "drop_newest", "latest", "disconnect"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
MAX_TOPIC = 1024  # bytes of UTF-8
MAX_NAME = 64  # characters of a subscription's name
MAX_ADDRESS = 107 if sys.platform == "linux" else 103  # bytes: the size of sun_path, less its NUL

_KEPT_TOPICS = 16384
_SHORT_TOPIC = 128  # bytes
_encoded: dict[str, bytes] = {}
_FOREVER = 1e6  # seconds: system calls take no more


def check_timeout(timeout: Any, name: str = "timeout") -> float | None:
    """Return ``timeout`` in seconds; ``None`` for ``None`` and infinity, which wait for ever."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or None, not {type(timeout).__name__}")
    if not timeout >= 0:  # NaN too
        raise ValueError(f"{name} must be 0 or more seconds (None waits for ever), not {timeout!r}")
    return None if timeout > _FOREVER else float(timeout)


def check_bool(value: Any, name: str) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type(value).__name__}")


def check_count(value: Any, name: str, least: int) -> int:
    """Return ``value`` if it is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def check_overflow(overflow: Any) -> str:
    """Return ``overflow`` if it is one of the policies."""
    if not isinstance(overflow, str):
        raise TypeError(f"overflow must be a str, not {type(overflow).__name__}")
    if overflow not in POLICIES:
        raise ValueError(f"overflow must be one of {', '.join(map(repr, POLICIES))}, not {overflow!r}")
    return overflow


def check_group(group: Any) -> str | None:
    """Return the name of a group, or ``None`` for none. It may be as long as a topic, and is not empty."""
    if group is None:
        return None
    if not isinstance(group, str):
        raise TypeError(f"group must be a str or None, not {type(group).__name__}")
    if not group:
        raise ValueError("group must not be empty: None is no group")
    encode_topic(group)
    return group


def check_name(name: Any) -> str | None:
    """Return the name of a subscription, or ``None`` for none: 1 to ``MAX_NAME`` printable characters."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"name must be a str or None, not {type(name).__name__}")
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"name must be 1 to {MAX_NAME} printable characters, not {name!r}: leave it out, or shorten it")
    return name


def check_prefetch(prefetch: Any, group: str | None) -> int:
    """Return the number of unfinished messages that a member of ``group`` may have; 1 for ``None``."""
    if prefetch is None:
        return 1
    check_count(prefetch, "prefetch", 1)
    if group is None:
        raise ValueError(f"prefetch={prefetch} needs a group: pass group=..., or leave prefetch out")
    return int(prefetch)


def check_outbox(overflow: Any) -> str:
    """Return ``overflow`` if it is one of the policies that an outbox of a bridge can have."""
    if check_overflow(overflow) in ("latest", "disconnect"):
        raise ValueError(f"overflow of a bridge must be 'block', 'drop_oldest' or 'drop_newest', not {overflow!r}")
    return str(overflow)


def check_stream(stream: Any) -> str:
    """Return the name of a bridge's stream, which engines take as it is."""
    if not isinstance(stream, str):
        raise TypeError(f"stream must be a str, not {type(stream).__name__}")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,256}", stream):
        raise ValueError(f"stream must be made of letters, digits, - and _, and not be empty or longer than 256: {stream!r}")
    return stream


def encode_topic(topic: Any) -> bytes:
    """Return a topic as it travels: UTF-8, at most ``MAX_TOPIC`` bytes, without NUL."""
    if not isinstance(topic, str):
        raise TypeError(f"a topic must be a str, not {type(topic).__name__}")
    try:
        encoded = topic.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a topic must be valid Unicode text (a lone surrogate is not): {topic!r}") from None
    if len(encoded) > MAX_TOPIC:
        raise ValueError(f"a topic may have at most {MAX_TOPIC} bytes of UTF-8; this one has {len(encoded)}")
    if b"\0" in encoded:
        raise ValueError(f"a topic may not hold a NUL character: {topic!r}")
    return encoded


def check_topics(topics: tuple[Any, ...]) -> None:
    """Raise unless :func:`encode_topic` takes each of them."""
    for topic in topics:
        if isinstance(topic, (list, tuple, set, frozenset)):
            raise TypeError(f"each topic is an argument of its own, not one of a {type(topic).__name__}: pass *topics")
        encode_topic(topic)


def encoded_topic(topic: Any) -> bytes:
    """Return the result of :func:`encode_topic`, which is kept for the next call."""
    try:
        return _encoded[topic]
    except (KeyError, TypeError):
        encoded = encode_topic(topic)
        if type(topic) is str and len(encoded) <= _SHORT_TOPIC:
            if len(_encoded) >= _KEPT_TOPICS:
                _encoded.clear()
            _encoded[topic] = encoded
        return encoded


def check_address(address: Any) -> str:
    """Return the absolute path of a socket file."""
    if not isinstance(address, (str, os.PathLike)):
        raise TypeError(f"address must be the path of a socket file, not {type(address).__name__}")
    path = os.fspath(address)
    if not isinstance(path, str):
        raise TypeError(f"address must be a str path, not {type(path).__name__}")
    if not path or "\0" in path:
        raise AddressError(f"address must be the path of a socket file, not {path!r}")
    path = os.path.abspath(path)
    if problem := address_problem(path):
        raise AddressError(f"{problem}: use a shorter one, or a plain name without a slash")
    return path


def address_problem(path: str) -> str:
    """Return why this absolute path is too long for a socket; an empty text if it is not."""
    length = len(os.fsencode(path))
    if length <= MAX_ADDRESS:
        return ""
    more = length - MAX_ADDRESS
    return f"the socket path {path!r} has {length} bytes, {more} more than the limit of the system, which takes {MAX_ADDRESS}"


def check_authkey(authkey: Any) -> bytes | None:
    """Return a key that is neither text nor empty; ``None``, for this process's own, stays ``None``."""
    if authkey is None:
        return None
    if not isinstance(authkey, (bytes, bytearray)):
        raise TypeError(f"authkey must be bytes, not {type(authkey).__name__}")
    if not authkey:
        raise ValueError("authkey must not be empty: an empty key admits every process. Leave it out, or use os.urandom(32)")
    return bytes(authkey)
