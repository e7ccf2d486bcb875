"""Let the methods that a public class inherits from its mixins carry the name of the public class."""

from __future__ import annotations

from types import FunctionType
from typing import TypeVar

C = TypeVar("C", bound=type)


def named_throughout(cls: C) -> C:
    """Rename the methods of this package's base classes after ``cls``, so that errors and tracebacks name the public class."""
    for base in cls.__mro__[1:]:
        for name, member in vars(base).items() if base.__module__.startswith("mpbroadcast.") else ():
            function = member.fget if isinstance(member, property) else member
            if isinstance(function, FunctionType):
                function.__qualname__ = f"{cls.__qualname__}.{name}"
                function.__module__ = cls.__module__  # where pickle finds it by that name
    return cls
