"""A key as an object, wherever it comes from."""

from __future__ import annotations


class Key(bytes):
    """A key that is not shown where the values of variables are, as in some tracebacks."""

    def __repr__(self) -> str:
        return "<key>"
