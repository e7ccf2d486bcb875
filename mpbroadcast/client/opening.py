"""Open a handle or a channel in a task: the object that the calls return, to be awaited or entered with ``async with``."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar


class _Closable(Protocol):
    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...


H_co = TypeVar("H_co", bound=_Closable, covariant=True)


class Opening(Coroutine[Any, Any, H_co]):
    """A coroutine that returns an open handle or channel, and an async context manager that opens it and closes it.

    ``create_task``, ``gather``, ``wait_for`` and trio's ``start_soon`` take it. It can be awaited or entered once.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, H_co], name: str) -> None:
        self._coroutine = coroutine
        self._opened: list[H_co] = []
        self.__name__ = name.rpartition(".")[2]
        self.__qualname__ = name
        named: Any = coroutine  # for the warning if it is never awaited
        named.__qualname__ = name

    def send(self, value: Any, /) -> Any:
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, H_co]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> H_co:
        opened = await self._coroutine
        self._opened.append(opened)
        return await opened.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._opened.pop().__aexit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"<mpbroadcast.{self.__qualname__}() to be awaited, or entered with async with>"
