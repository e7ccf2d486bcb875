"""Unpickling of plain data only: what is made of None, bool, int, float, str, bytes, list, tuple, dict and set.

A pickle is a program. :func:`load_plain` runs those of its operations that make plain data, and refuses any other before it has
an effect: nothing is imported and nothing is called, as there is no operation here that could. What it costs is bounded, too:

- Nothing is allocated for a length that the pickle claims, only for bytes that it has. There is no numbered memo entry: those
  would allow ten bytes to claim gigabytes.
- Nested tuples are not hashed before their number is known: the hash of a deep one overflows the stack of C, and that of one
  whose parts are the same tuple takes exponential time.
- What its references expand to when it is printed is counted before it is returned.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from struct import Struct
from struct import error as StructError
from typing import Any, Final

from mpbroadcast.protocol.pickling import Loaders

_STOP: Final = ord(".")
_MARK: Final = ord("(")
_MEMOIZE: Final = 0x94
_GET: Final = ord("h")
_LONG_GET: Final = ord("j")
_POP: Final = ord("0")
_POP_MARK: Final = ord("1")
_STACK_GLOBAL: Final = 0x93
_TUPLE: Final = ord("t")
_APPEND: Final = ord("a")
_APPENDS: Final = ord("e")
_SET_ITEM: Final = ord("s")
_SET_ITEMS: Final = ord("u")
_ADD_ITEMS: Final = 0x90

_BYTE: Final = Struct("<B")
_U32: Final = Struct("<I")
_U64: Final = Struct("<Q")


def _text(data: bytes | memoryview) -> str:
    return str(data, "utf-8", "surrogatepass")


def _integer(data: bytes | memoryview) -> int:
    return int.from_bytes(data, "little", signed=True)


_SIZED: Final[dict[int, tuple[Struct, Callable[[bytes | memoryview], Any]]]] = {  # a length, and so many bytes
    0x8C: (_BYTE, _text),
    ord("X"): (_U32, _text),
    0x8D: (_U64, _text),
    ord("C"): (_BYTE, bytes),
    ord("B"): (_U32, bytes),
    0x8E: (_U64, bytes),
    0x8A: (_BYTE, _integer),
    0x8B: (_U32, _integer),
}
_FIXED: Final = {ord("K"): _BYTE, ord("M"): Struct("<H"), ord("J"): Struct("<i"), ord("G"): Struct(">d")}
_CONSTANT: Final = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY: Final[dict[int, Callable[[], Any]]] = {ord("]"): list, ord(")"): tuple, ord("}"): dict, 0x8F: set}
_SHORT_TUPLE: Final = {0x85: 1, 0x86: 2, 0x87: 3}
_SKIPPED: Final = {0x80: 1, 0x95: 8}  # the protocol's number, and the length of a frame
_REFUSED: Final = {0x96: "a bytearray", 0x91: "a frozenset", 0x97: "a buffer"}
_CONTAINERS: Final = (list, tuple, dict, set)
_DEEPEST_KEY: Final = 100  # tuples in tuples, of a key
_KEYS_A_BYTE: Final = 16  # items of keys that are tuples, for each byte of a pickle
_ROOM: Final = 1 << 26  # what any message may expand to, and so many bytes more for each of its own:
_ROOM_A_BYTE: Final = 128
_ITEM: Final = 128  # what an item counts beside its text: as much as looking at it costs
_END: Final = object()


def load_plain(data: bytes | memoryview) -> Any:
    """Return the plain data that a pickle makes. What follows its end does not matter.

    :raises pickle.UnpicklingError: it is no pickle, makes anything else, or expands to far more than its length.
    """
    try:
        value, has_references = _run(data)
    except (IndexError, StructError, UnicodeDecodeError, TypeError) as error:
        raise pickle.UnpicklingError(f"this is no pickle of plain data: {error}") from None
    if has_references:
        _check_expansion(value, _ROOM + _ROOM_A_BYTE * len(data))
    return value


def refuse_image(payload: Any) -> Any:
    """Refuse a message with buffers outside of its pickle.

    :raises pickle.UnpicklingError: always.
    """
    raise pickle.UnpicklingError("this is no plain data: it has large buffers, as arrays have")


PLAIN_DATA: Final = Loaders(load_plain, refuse_image, refuse_image)


def _run(data: bytes | memoryview) -> tuple[Any, bool]:
    """Run the operations up to the end. Return the value, and whether anything in it is referred to more than once."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below each mark
    memo: list[Any] = []
    has_references = False
    room = _KEYS_A_BYTE * len(data)
    position = 0
    while True:
        operation = data[position]
        position += 1
        if operation in _SIZED:
            length, convert = _SIZED[operation]
            start = position + length.size
            position = start + length.unpack_from(data, position)[0]
            if position > len(data):
                raise pickle.UnpicklingError("the pickle ends too early")
            stack.append(convert(data[start:position]))
        elif operation == _MEMOIZE:
            memo.append(stack[-1])
        elif operation in _FIXED:
            shape = _FIXED[operation]
            stack.extend(shape.unpack_from(data, position))
            position += shape.size
        elif operation in (_GET, _LONG_GET):
            shape = _BYTE if operation == _GET else _U32
            stack.append(memo[shape.unpack_from(data, position)[0]])
            position += shape.size
            has_references = True
        elif operation in _CONSTANT:
            stack.append(_CONSTANT[operation])
        elif operation in _EMPTY:
            stack.append(_EMPTY[operation]())
        elif operation in _SHORT_TUPLE:
            count = _SHORT_TUPLE[operation]
            stack[-count:] = [tuple(stack[-count:])] if len(stack) >= count else [stack[-count]]  # which is no index
        elif operation == _MARK:
            below.append(stack)
            stack = []
        elif operation in (_TUPLE, _APPENDS, _SET_ITEMS, _ADD_ITEMS, _POP_MARK):
            items, stack = stack, below.pop()
            if operation == _TUPLE:
                stack.append(tuple(items))
            elif operation != _POP_MARK:
                room = _add(stack[-1], operation, items, room)
        elif operation == _APPEND:
            item = stack.pop()
            room = _add(stack[-1], _APPENDS, [item], room)
        elif operation == _SET_ITEM:
            item, key = stack.pop(), stack.pop()
            room = _add(stack[-1], _SET_ITEMS, [key, item], room)
        elif operation in _SKIPPED:
            position += _SKIPPED[operation]
        elif operation == _POP:
            stack.pop()
        elif operation == _STOP:
            return stack.pop(), has_references
        else:
            raise pickle.UnpicklingError(f"this is no plain data: it has {_description(operation, stack)}")


def _description(operation: int, stack: list[Any]) -> str:
    """Return what an operation that is refused would have made."""
    if operation == _STACK_GLOBAL and len(stack) > 1 and type(stack[-1]) is type(stack[-2]) is str:
        return f"an object of {stack[-2][:80]}.{stack[-1][:80]}"
    return _REFUSED.get(operation, f"operation {operation:#04x}")


def _add(target: Any, operation: int, items: list[Any], room: int) -> int:
    """Add items to a list, a dict or a set. Return the room that is left for nested keys."""
    if operation == _APPENDS and type(target) is list:
        target.extend(items)
    elif operation == _SET_ITEMS and type(target) is dict and len(items) % 2 == 0:
        keys = items[::2]
        room = _check_keys(keys, room)
        target.update(zip(keys, items[1::2], strict=True))
    elif operation == _ADD_ITEMS and type(target) is set:
        room = _check_keys(items, room)
        target.update(items)
    else:
        raise pickle.UnpicklingError(f"{len(items)} items cannot be added to a {type(target).__name__}")
    return room


def _check_keys(keys: Iterable[Any], room: int) -> int:
    """Check that hashing these is cheap. Return the room that is left for others.

    :raises pickle.UnpicklingError: it is not.
    """
    level = [key for key in keys if type(key) is tuple]
    for _ in range(_DEEPEST_KEY):
        if not level:
            return room
        items = [*islice(chain.from_iterable(level), room + 1)]
        room -= len(items)
        if room < 0:
            raise pickle.UnpicklingError("its keys expand to far more than its length")
        level = [item for item in items if type(item) is tuple]
    raise pickle.UnpicklingError("its keys are nested too deeply")


def _check_expansion(value: Any, room: int) -> None:
    """Check how long the text of ``value`` is, in which each reference stands for all that it refers to.

    :raises pickle.UnpicklingError: it is longer than ``room``.
    """
    path: list[int] = []  # a container within itself is not printed again
    inside: set[int] = set()
    left: list[Iterator[Any]] = [iter((value,))]  # of each container of the path
    while left:
        room -= _ITEM
        if room < 0:
            raise pickle.UnpicklingError("it expands to far more than its length")
        item: Any = next(left[-1], _END)
        if item is _END:
            left.pop()
            if path:
                inside.discard(path.pop())
        elif type(item) in (str, bytes):
            room -= len(item)
        elif type(item) is int:
            room -= item.bit_length() >> 2
        elif type(item) in _CONTAINERS and id(item) not in inside:
            left.append(chain.from_iterable(item.items()) if type(item) is dict else iter(item))
            path.append(id(item))
            inside.add(id(item))
