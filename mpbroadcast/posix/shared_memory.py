"""Sealed anonymous memory: made, checked and mapped. Where the system has none, nothing here is used.

A **ring** is written by its publisher as long as that lives; all others map it for reading. The **memory of a message** is
written once and then sealed; or its publisher keeps it, is the only one that can write it, and does so again when no other
process has it any more. Its receiver maps it privately, so that no other process sees what is written there.

Neither can shrink, so no map of it ever ends in SIGBUS. Memory that comes from another process is checked for that before it is
mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from mpbroadcast.posix.descriptors import OwnedDescriptor, fork_lock

# As Linux has them in its fcntl.h, memfd.h and mman.h; Python has not all of them before 3.13.
_SEAL_SEAL: Final = 0x1
_SEAL_SHRINK: Final = 0x2
_SEAL_GROW: Final = 0x4
SEAL_WRITE: Final = 0x8
SEAL_FUTURE_WRITE: Final = 0x10
_NO_EXECUTION: Final = 0x8  # MFD_NOEXEC_SEAL, from Linux 6.3 on
_MAP_FIXED: Final = 0x10

_FIXED: Final = _SEAL_SHRINK | _SEAL_GROW
_POPULATE_READ: Final = 22  # MADV_POPULATE_READ, from Linux 5.14 on
_POPULATE_WRITE: Final = 23
_LARGE_BLOCK: Final = 1 << 23  # bytes
_MOST_PARTS: Final = 512  # in one call; the system takes 1,024
_WRITE: Final = 1 << 30  # bytes; the system takes nearly twice that

Map = mmap.mmap


class MemoryRefused(Exception):
    """Memory of another process could shrink, or change, or is too small."""


def available() -> bool:
    """Return True if memory can be shared here, and ``MPBROADCAST_INLINE=1`` does not forbid it."""
    possible = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
    return possible and os.environ.get("MPBROADCAST_INLINE", "0") in ("", "0")


def new_memory() -> OwnedDescriptor:
    """Make memory of no size.

    :raises OSError: the system has none to give.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    with fork_lock():
        try:
            return OwnedDescriptor(os.memfd_create("mpbroadcast", flags | _NO_EXECUTION))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return OwnedDescriptor(os.memfd_create("mpbroadcast", flags))


def ring_memory(size: int) -> tuple[OwnedDescriptor, mmap.mmap]:
    """Make memory that only this map can write.

    :raises OSError: the system has none to give.
    """
    descriptor = new_memory()
    os.ftruncate(descriptor.fd, size)
    mapped = map_for_writing(descriptor.fd, size)
    seal(descriptor.fd, SEAL_FUTURE_WRITE)
    return descriptor, mapped


def message_memory(parts: Sequence[Any]) -> OwnedDescriptor:
    """Make memory with these bytes, which cannot be changed any more.

    :raises OSError: the system has none to give.
    """
    descriptor = new_memory()
    fill(descriptor.fd, parts)
    seal(descriptor.fd, SEAL_WRITE)
    return descriptor


def seal(fd: int, writing: int) -> None:
    """Let memory never change its size, nor be written: by any process (``SEAL_WRITE``), or but through maps that are there.

    :raises OSError: the system does not know this seal.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED | writing | _SEAL_SEAL)


def fill(fd: int, parts: Sequence[Any]) -> int:
    """Write these bytes into new memory. Return how many."""
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    whole = sum(map(len, views))
    # Written, not mapped and copied: half the time, as no page is zeroed first.
    while views:
        total = count = 0
        for view in views[:_MOST_PARTS]:
            if total + len(view) > _WRITE and count:
                break
            total += len(view)
            count += 1
        written = os.writev(fd, [view[:_WRITE] for view in views[:count]])
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]
    return whole


def populate(mapped: mmap.mmap, start: int, length: int) -> bool:
    """Have all pages there and in the map, as far as the system can do that. Return False if it has not the memory.

    To enter them one by one, when they are written, takes longer; and if there is no memory then, the process is ended.
    """
    try:
        mapped.madvise(_POPULATE_WRITE, start, length)
    except OSError as error:
        return error.errno not in (errno.EFAULT, errno.ENOMEM)
    return True


def enter_pages(mapped: mmap.mmap, start: int, length: int) -> None:
    """Have all pages there in the map, of memory that has them. The system enters many at once, as they are not written yet."""
    with contextlib.suppress(OSError):
        mapped.madvise(_POPULATE_READ, start, length)


def keep_freed_memory(size: int = _LARGE_BLOCK) -> None:
    """Make the C library keep up to twice ``size`` bytes of what is freed; ``size`` is less than 32 MiB.

    The library gives memory back to the system when a large block is freed, and then each message costs its page faults again,
    several times what copying it takes. Once a larger block was freed, the library keeps more: here one is made and freed.
    """
    bytes(size)


def fits(length: int, size: int) -> bool:
    """Return True if memory of this size may carry a message of this length: it may be a little larger, for another one."""
    return 0 <= size - length <= length // 16 + mmap.PAGESIZE


def read_memory(fd: int, size: int, offset: int = 0) -> bytes:
    """Return ``size`` bytes of the memory from ``offset`` on; fewer where it ends before."""
    data = b""
    while size > len(data) and (more := os.pread(fd, size - len(data), offset + len(data))):
        data = data + more if data else more
    return data


def check_ring(fd: int) -> int:
    """Return the size of a ring's memory.

    :raises MemoryRefused: it is not one.
    """
    return _checked(fd, SEAL_FUTURE_WRITE, 1)


def check_message(fd: int, size: int = 0) -> int:
    """Return the size of the memory of a message, which has ``size`` bytes at least.

    :raises MemoryRefused: it is none, or smaller.
    """
    return _checked(fd, SEAL_WRITE | SEAL_FUTURE_WRITE, size)


def _checked(fd: int, writing: int, size: int) -> int:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        there = os.fstat(fd).st_size
    except OSError as error:
        raise MemoryRefused(f"no sealed memory ({error.strerror})") from error
    if seals & _FIXED != _FIXED or not seals & writing:
        raise MemoryRefused(f"memory with the seals {seals:#x}, without {_FIXED:#x} and one of {writing:#x}")
    if there < size:
        raise MemoryRefused(f"memory of {there} bytes where {size} were announced")
    return there


def map_for_reading(fd: int, size: int) -> memoryview:
    """Map a ring: what its publisher writes is seen in the map.

    :raises OSError: the system does not map it.
    """
    return memoryview(_mapped(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)).toreadonly()


def map_for_writing(fd: int, size: int) -> mmap.mmap:
    """Map memory that is written through this map.

    :raises OSError: the system does not map it.
    """
    return _mapped(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def map_privately(fd: int, size: int) -> mmap.mmap:
    """Return a buffer over the memory of a message that is this process's own: writable, not shared, not copied.

    The buffer lasts until nothing refers to it any more, and needs no descriptor.

    :raises OSError: the system does not map it.
    """
    return _mapped(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)


def _mapped(fd: int, size: int, sharing: int, access: int) -> mmap.mmap:
    """Map it without a descriptor.

    ``mmap.mmap`` keeps a duplicate of it for as long as the map lives, unless ``trackfd`` is false, from Python 3.13 on. A
    process that keeps a thousand arrays would have none left; and a map that a thread reads stays in a child that is forked
    meanwhile, where that thread does not exist. Before 3.13, the system's own function maps.
    """
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, size, sharing, access, trackfd=False)
    buffer = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # Python unmaps it, with what is put over it
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    if _system_map()(address, size, access, sharing | _MAP_FIXED, fd, 0) != address:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: no map of {size} bytes")
    return buffer


@functools.cache
def _system_map() -> Any:
    """``mmap`` of the C library, looked up when it is first needed."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    return function


def map_or_read(fd: int, size: int) -> Any:
    """Return :func:`map_privately`, or a copy where the process has too many maps.

    :raises OSError: the memory cannot be read.
    """
    try:
        return map_privately(fd, size)
    except OSError:
        buffer = bytearray(size)
        view = memoryview(buffer)
        done = 0
        while done < size:
            done += os.preadv(fd, [view[done:]], done)
        return buffer
