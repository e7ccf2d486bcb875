"""Text of the command line: UTF-8 in and out, whatever the locale, and always one line for one message."""

from __future__ import annotations

import json
import re
from typing import Any, Final

_BREAKS: Final = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # what any reader may take for the end of a line
_NOT_IN_JSON: Final = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # what is escaped besides what json escapes


def decode(data: bytes) -> str:
    """Return the text of bytes; what is no UTF-8 is kept as surrogates, which :func:`encode` turns back into the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Return the bytes of a text, also of one with surrogates that stand for no bytes: those are escaped."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def one_line(text: str) -> str:
    """Return the text with its line breaks escaped."""
    return _BREAKS.sub(_escaped, text)


def plain_line(message: object) -> bytes:
    """Return the line of a message: a ``str`` as it is, anything else as its ``repr``."""
    return encode(one_line(message if type(message) is str else repr(message))) + b"\n"


def json_line(value: dict[str, Any]) -> bytes:
    """Return the line of a JSON object, in which what JSON has no form for is its ``repr``."""
    parts = []
    for name, item in value.items():
        try:
            text = json.dumps(item, ensure_ascii=False, allow_nan=False, default=repr)
        except (TypeError, ValueError, RecursionError):  # a key that is a tuple, a NaN, a list in itself
            text = json.dumps(repr(item), ensure_ascii=False)
        parts.append(f'"{name}": {text}')
    return (_NOT_IN_JSON.sub(_json_escaped, f"{{{', '.join(parts)}}}") + "\n").encode()


def _escaped(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


def _json_escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
