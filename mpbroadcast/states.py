"""States that know which states can follow them. Pure.

An object has its state in one attribute, and changes it by ``self.state = self.state.to(...)``: a transition that is not listed
raises, and changes nothing. Flags that an object has beside that are independent of its state.
"""

from __future__ import annotations

from enum import Enum
from typing import Self


class IllegalTransition(RuntimeError):
    """A change of state that is not listed."""


class State(Enum):
    """A state: its meaning, and the names of the states that can follow it."""

    def __init__(self, meaning: str, *following: str) -> None:
        self.following = following

    def to(self, following: Self) -> Self:
        """Return ``following``.

        :raises IllegalTransition: that state cannot follow this one.
        """
        if following.name not in self.following:
            raise IllegalTransition(f"{type(self).__name__}: {self.name} -> {following.name}")
        return following
