"""Topics and patterns."""

from __future__ import annotations

import re
from typing import Final

_SPECIAL: Final = re.compile(r"[*?[]")


def escape(topic: str) -> str:
    """Return the pattern that matches exactly this topic, as ``glob.escape`` does for paths.

    Use it to subscribe to a topic that comes from outside. Without it, ``"room:*"`` would be taken for a pattern, and
    ``"sensor[3]"`` would match ``"sensor3"``, and not itself. A topic without ``*``, ``?`` and ``[`` is returned as it is.

    :raises TypeError: ``topic`` is not a ``str``.
    """
    if not isinstance(topic, str):
        raise TypeError(f"a topic must be a str, not {type(topic).__name__}")
    return _SPECIAL.sub(r"[\g<0>]", topic)
