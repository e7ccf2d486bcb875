"""Hooks for ``os.fork``, and the lock that keeps forks out.

An object that owns a descriptor has a hook, and gets it under the lock that ``os.fork`` takes. So a child closes all its
inherited copies, whatever another thread was doing at the moment of the fork. Nothing blocks under this lock.

The lock is acquired before all hooks that are registered by then, and released after them, by functions in C: an interrupt at
the start of a hook in Python skips that hook. A module that registers hooks of its own calls :func:`hold_lock` after it; the
lock is reentrant.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from operator import methodcaller
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from mpbroadcast.posix import locks

T = TypeVar("T")
Hook = Callable[[Any], None]


class _Forks:
    def __init__(self) -> None:
        self.renew()
        self.hooks: WeakKeyDictionary[Any, Hook] = WeakKeyDictionary()

    def renew(self) -> None:
        self.lock = locks.rlock()  # reentrant: a signal handler or finaliser may come in while its own thread has it
        self.acquire, self.release = self.lock.acquire, self.lock.release


_forks = _Forks()
_NO_LOCK: Final = contextlib.nullcontext()


def on_fork(owner: T, in_child: Callable[[T], None]) -> None:
    """From each fork on, while ``owner`` lives: call this with it in the child, in the thread that forked."""
    with _forks.lock:
        _forks.hooks[owner] = in_child


def has_hooks() -> bool:
    """Return True if an object has a hook."""
    return bool(_forks.hooks)


def fork_lock(ending: Callable[[], bool] = sys.is_finalizing) -> AbstractContextManager[Any]:
    """Return the lock that keeps forks out, so that a new descriptor and its hook come together. Nothing blocks under it.

    At the interpreter's end nothing forks any more, and a daemon thread may have been stopped under it for good.
    """
    return _NO_LOCK if ending() else _forks.lock


def hold_lock() -> None:
    """Hold the lock around all hooks that are registered so far."""
    acquire, release = methodcaller("acquire"), methodcaller("release")
    os.register_at_fork(before=partial(acquire, _forks), after_in_parent=partial(release, _forks))


def _in_child() -> None:
    _forks.renew()  # the thread that had the lock may not exist here
    for owner, hook in list(_forks.hooks.items()):
        with contextlib.suppress(Exception):  # one hook's error stops no other
            hook(owner)


os.register_at_fork(after_in_child=_in_child)
hold_lock()
