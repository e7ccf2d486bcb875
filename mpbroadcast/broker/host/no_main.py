"""A start method for the broker that imports nothing of the user's main module, so that this needs no guard.

The method is ``spawn``, whose child first gets a dictionary from which it prepares itself; here that does not name the main
module. The class of ``multiprocessing`` that sends it gets another module ``spawn`` among its globals: nothing changes for
others.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import popen_spawn_posix, spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FunctionType, SimpleNamespace
from typing import Any


def _data_without_main(name: str) -> dict[str, Any]:
    return {key: value for key, value in spawn.get_preparation_data(name).items() if not key.startswith("init_main_from_")}


class _Popen(popen_spawn_posix.Popen):
    _spawn = SimpleNamespace(**(vars(spawn) | {"get_preparation_data": _data_without_main}))
    _launch = FunctionType(vars(popen_spawn_posix.Popen)["_launch"].__code__, vars(popen_spawn_posix) | {"spawn": _spawn})


class _Process(SpawnProcess):
    _Popen = staticmethod(_Popen)


def spawn_alone(target: Callable[..., None], *args: Any) -> _Popen:
    """Start such a process, which does not count among this one's children: a daemonic process may start it, too.

    The caller waits for its end.
    """
    return _Popen(_Process(target=target, args=args))


class NoMainContext(SpawnContext):
    """As ``multiprocessing.get_context("spawn")``, for targets and arguments that are in no main module."""

    Process = _Process
