"""The name of a public class for what it has from the classes of this package that it is made of."""

from __future__ import annotations

from types import FunctionType
from typing import TypeVar

C = TypeVar("C", bound=type)


def named_throughout(cls: C) -> C:
    """Give this class's name to the methods of its bases: errors and tracebacks name the class that a program has."""
    for base in cls.__mro__[1:]:
        for name, member in vars(base).items() if base.__module__.startswith("mpbroadcast.") else ():
            function = member.fget if isinstance(member, property) else member
            if isinstance(function, FunctionType):
                function.__qualname__ = f"{cls.__qualname__}.{name}"
                function.__module__ = cls.__module__  # where pickle finds it by that name
    return cls
