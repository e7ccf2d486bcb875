"""Named moments at which a test can stop the code, or make it fail.

A test replaces :func:`reach` in its own process; the processes that it forks inherit that. The names are of moments that a
test needs, not of functions, so they stay when code is moved. None is where a message passes one by one.
"""

from __future__ import annotations


def reach(name: str, subject: object = None) -> None:
    """Do nothing. A test replaces this function to stop the code at the moment of that name."""
