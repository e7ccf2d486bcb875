"""Patterns of topics: ``fnmatch.fnmatchcase``, and what matching them costs. Pure: no descriptor, no clock.

A **step** is the time in which one character is compared, some nanoseconds; a call of a matcher counts as ``_CALL`` of them.
Patterns are kept by their beginnings, up to the first special character: a topic is compared only with those that begin as it
does.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from fnmatch import translate
from typing import Final, Generic, TypeVar
from weakref import WeakValueDictionary

from mpbroadcast.validation import MAX_TOPIC

S = TypeVar("S")

_SPECIAL: Final = re.compile(r"[*?[]")
_CALL: Final = 100
_FIND: Final = 10  # characters that str.find compares in the time of a step
_POSITION: Final = 5  # characters, in whose time it goes on to the next position of the text


class _Parts:
    """A pattern without special characters but stars: in the time that ``re`` needs to compile one, it is matched 100 times."""

    def __init__(self, pattern: str) -> None:
        self._first, *self._middle, self._last = pattern.split("*")
        self._least = len(pattern) - pattern.count("*")

    def match(self, text: str) -> bool:
        if len(text) < self._least or not (text.startswith(self._first) and text.endswith(self._last)):
            return False
        position, end = len(self._first), len(text) - len(self._last)
        for part in self._middle:
            position = text.find(part, position, end)
            if position < 0:
                return False
            position += len(part)
        return True


Matcher = re.Pattern[str] | _Parts  # a pattern, compiled by `matcher`


def is_pattern(topic: str) -> bool:
    return "*" in topic or "?" in topic or "[" in topic


_matchers: WeakValueDictionary[str, Matcher] = WeakValueDictionary()


def matcher(pattern: str) -> Matcher:
    """Return a matcher that matches as ``fnmatch.fnmatchcase`` does: for as long as it is kept anywhere, the same one."""
    made = _matchers.get(pattern)
    if made is None:
        made = re.compile(translate(pattern)) if "?" in pattern or "[" in pattern else _Parts(pattern)
        _matchers[pattern] = made
    return made


def steps(pattern: str) -> int:
    """Return the most steps that it takes to compare the longest topic with a pattern, without the call."""
    star = pattern.find("*")
    if star < 0:
        return len(pattern)
    if "?" in pattern or "[" in pattern:
        return MAX_TOPIC * len(pattern[star:].strip("*"))
    middle = pattern[star : pattern.rfind("*")].strip("*")  # the end is compared at one position only
    return MAX_TOPIC * (len(middle) + _POSITION) // _FIND if middle else 0


def steps_of_all(topics: Iterable[str]) -> int:
    """Return the most steps that it takes to compare the longest topic with all patterns among ``topics``."""
    return sum(_CALL + steps(topic) for topic in topics if is_pattern(topic))


def _beginning(pattern: str) -> str:
    return _SPECIAL.split(pattern, maxsplit=1)[0]


_Entry = tuple[Matcher, dict[S, None], int]  # of a pattern: its members, and its steps for the longest topic


class Patterns(Generic[S]):
    """Patterns, each with members."""

    def __init__(self) -> None:
        self._alike: dict[str, dict[str, _Entry[S]]] = {}  # by their beginnings
        self._steps: Counter[str] = Counter()  # of those that begin so
        self._lengths: Counter[int] = Counter()  # of the beginnings
        self._running: dict[
            int, tuple[str, deque[_Entry[S]]]
        ] = {}  # topics that are matched in parts, and what is left of each

    def add(self, pattern: str, member: S) -> None:
        beginning = _beginning(pattern)
        if beginning not in self._alike:
            self._alike[beginning] = {}
            self._lengths[len(beginning)] += 1
        alike = self._alike[beginning]
        if pattern not in alike:
            longest = steps(pattern)
            entry = alike[pattern] = (matcher(pattern), {}, longest)
            self._steps[beginning] += longest
            for text, left in self._running.values():
                if text.startswith(beginning):
                    left.append(entry)
        alike[pattern][1][member] = None

    def drop(self, pattern: str, member: S) -> None:
        beginning = _beginning(pattern)
        alike = self._alike[beginning]
        members = alike[pattern][1]
        del members[member]
        if not members:
            del alike[pattern]
            self._steps[beginning] -= steps(pattern)
        if not alike:
            del self._alike[beginning], self._steps[beginning]
            self._lengths[len(beginning)] -= 1
            if not self._lengths[len(beginning)]:
                del self._lengths[len(beginning)]

    def _begin_as(self, text: str) -> Iterator[str]:
        return (text[:length] for length in self._lengths if length <= len(text) and text[:length] in self._alike)

    def steps(self, text: str) -> int:
        """Return the most steps that :meth:`matching` takes for this topic."""
        total = len(self._lengths)
        for beginning in self._begin_as(text):
            total += _CALL * len(self._alike[beginning]) + self._steps[beginning] * len(text) // MAX_TOPIC
        return total

    def matching(self, text: str) -> Iterator[dict[S, None]]:
        """Return the members of each pattern that matches this topic."""
        for beginning in self._begin_as(text):
            for made, members, _ in self._alike[beginning].values():
                if made.match(text):
                    yield members

    def matching_in_parts(self, text: str, most: int, matching: list[dict[S, None]]) -> Iterator[int]:
        """Append what :meth:`matching` returns, in parts of more than ``most`` steps but the last. Yield how many each took.

        At the end it is right: patterns that come meanwhile are tried, too, and members come and go in what was appended.
        """
        left = deque(entry for beginning in self._begin_as(text) for entry in self._alike[beginning].values())
        taken = 0
        try:
            self._running[id(left)] = text, left
            while left:
                made, members, longest = left.popleft()
                taken += _CALL + longest * len(text) // MAX_TOPIC
                if made.match(text):
                    matching.append(members)
                if taken > most:
                    yield taken
                    taken = 0
            yield taken
        finally:
            del self._running[id(left)]
