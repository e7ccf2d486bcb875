"""What a peer has to offer to be measured.

The one who measures makes a :class:`Peer`, which starts a broker where there is one. It starts a process for each publisher
and each subscriber, and gives each a :class:`Source` or an :class:`Endpoint`, which is opened there. So the process that
measures has no thread or socket of any peer, and every peer's processes are started in the same way.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, ClassVar

PROTOCOL = 5  # of pickle, wherever a peer leaves the choice
TO_ALL = "all.all"  # the topic that every subscriber of a topic row hears as well


@dataclass(frozen=True)
class Shape:
    """How many there are, and what they exchange.

    ``size`` is about the bytes of one message. ``topics`` has the subscriber's topics for each subscriber, or is None when
    all hear everything; one that ends with ``.*`` is a pattern, of every topic that begins with what is before the star.
    """

    publishers: int = 1
    subscribers: int = 1
    size: int = 64
    kind: str = "small"
    topics: tuple[tuple[str, ...], ...] | None = None


class Source:
    """A publisher's part."""

    publish: Callable[[Any], None]
    """Give this message to every subscriber, now. Set by :meth:`open`."""

    def open(self) -> None:
        """Connect, in the publisher."""

    def publish_all(self, messages: Iterable[Any]) -> None:
        """Publish one after the other: the call whose rate is measured."""
        publish = self.publish
        for message in messages:
            publish(message)

    def publish_topics(self, messages: Iterable[tuple[str, Any]]) -> None:
        """Publish each to its topic."""
        raise NotImplementedError

    def close(self) -> None:
        """Called when every subscriber has ended, or was given up."""


class Endpoint(ABC):
    """A subscriber's part."""

    @abstractmethod
    def open(self) -> Iterator[Any]:
        """Subscribe, in the subscriber; what it returns gives the messages, unpickled, one after the other."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Called when it has got all."""


class Peer(ABC):
    """One way to tell several processes the same thing."""

    name: ClassVar[str]
    setting: ClassVar[str]  # how it is used here, in one line
    limits: ClassVar[str] = ""  # what it does not promise
    modules: ClassVar[tuple[str, ...]] = ()  # that it needs, and that are imported before any clock runs
    packages: ClassVar[tuple[str, ...]] = ()  # what these come from, for missing() and the versions
    program: ClassVar[str | None] = None  # that it needs on the PATH
    kinds: ClassVar[frozenset[str] | None] = None  # of rows that it is made for; None for all
    most_publishers: ClassVar[int] = 1 << 30
    largest: ClassVar[int] = 1 << 60  # message that is measured, in bytes
    has_topics: ClassVar[bool] = False
    has_broker: ClassVar[bool] = False
    is_floor: ClassVar[bool] = False  # what is least, and no peer that others are compared with
    waits: ClassVar[bool] = True  # without a core for each process that polls, and without overwriting: else compared apart
    lossy: ClassVar[bool] = False  # the last message is sent again until all have it; what else is lost is counted
    environment: ClassVar[dict[str, str]] = {}  # while it is measured, for all its processes

    @abstractmethod
    def __init__(self, context: BaseContext, shape: Shape) -> None:
        """Start the broker, if there is one, and return when it can be connected to."""

    @classmethod
    def missing(cls) -> str | None:
        """Why this peer cannot be measured on this machine, or None."""
        for module, package in zip(cls.modules, cls.packages, strict=False):
            if importlib.util.find_spec(module.partition(".")[0]) is None:
                return f"the package {package} is not installed"
        if cls.program is not None and shutil.which(cls.program) is None:
            return f"the program {cls.program} is not installed"
        return None

    @classmethod
    def unfit(cls, shape: Shape) -> str | None:
        """Why this peer has no place in a row of this shape, or None. An empty reason needs no mention."""
        if cls.kinds is not None and shape.kind not in cls.kinds:
            return ""
        if shape.topics is not None and not cls.has_topics:
            return "topics are not measured with it"
        if shape.publishers > cls.most_publishers:
            return "one publisher only"
        if shape.size > cls.largest:
            return f"no messages over {cls.largest:,} bytes"
        if shape.kind == "memory" and not cls.has_broker:
            return "no broker"
        return None

    @classmethod
    def version(cls) -> str:
        """Of its packages and its program."""
        found = [f"{package} {importlib.metadata.version(package)}" for package in cls.packages]
        if cls.program is not None:
            said = subprocess.run([cls.program, "--version"], capture_output=True, text=True, check=False).stdout
            numbers = [word for word in said.replace("v=", "").split() if word.lstrip("v")[:1].isdigit()]
            found.append(f"{cls.program} {numbers[0].lstrip('v') if numbers else '?'}")
        return ", ".join(found) or "of the standard library"

    @abstractmethod
    def source(self, index: int) -> Source:
        """For publisher ``index``."""

    @abstractmethod
    def endpoint(self, index: int) -> Endpoint:
        """For subscriber ``index``."""

    def broker_pids(self) -> list[int]:
        """The processes that are neither a publisher nor a subscriber."""
        return []

    @abstractmethod
    def close(self) -> None:
        """End the broker, and remove the files. Called when every subscriber and publisher has ended."""


def module(name: str) -> Any:
    """A package that may have no types, and need not be installed where it is not used."""
    return importlib.import_module(name)


def forever(receive: Callable[[], Any]) -> Iterator[Any]:
    """What it returns, again and again. (``iter(receive, None)`` would compare each message with None: arrays mind.)"""
    while True:
        yield receive()


def folder(*, in_memory: bool = False) -> tempfile.TemporaryDirectory[str]:
    """Return one for sockets and the like; for files that processes map, in memory where there is a folder for that."""
    where = "/dev/shm" if in_memory and os.path.isdir("/dev/shm") else None
    return tempfile.TemporaryDirectory(prefix="mpb-", dir=where, ignore_cleanup_errors=True)


def end_program(process: subprocess.Popen[bytes]) -> None:
    """End a server that was started here."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
