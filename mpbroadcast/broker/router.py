"""Who gets what is published to a topic. Pure: no descriptor, no clock."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase, translate
from typing import Final, Generic, TypeVar

S = TypeVar("S")

_LISTED: Final = 10
_SPECIAL: Final = "*?["
_CACHED_TOPICS: Final = 16384  # at most 1 KiB each; all are forgotten when there are more


class Router(Generic[S]):
    """Topics and patterns, and the subscriptions that they lead to, each once, in no particular order."""

    def __init__(self) -> None:
        self._topics: dict[S, dict[str, None]] = {}
        self._exact: dict[str, dict[S, None]] = {}
        # By what a pattern begins with before its first special character: of many, a topic has to be compared with few.
        self._patterns: dict[str, dict[str, tuple[re.Pattern[str], dict[S, None]]]] = {}
        self._lengths: Counter[int] = Counter()  # of those beginnings
        self._found: dict[bytes, tuple[S, ...]] = {}

    def add(self, subscription: S, topics: Iterable[str]) -> None:
        """Lead these topics to it, too."""
        self._found.clear()
        own = self._topics.setdefault(subscription, {})
        for topic in topics:
            own[topic] = None
            if is_pattern(topic):
                beginning = _beginning(topic)
                if beginning not in self._patterns:
                    self._patterns[beginning] = {}
                    self._lengths[len(beginning)] += 1
                alike = self._patterns[beginning]
                if topic not in alike:
                    alike[topic] = (re.compile(translate(topic)), {})
                alike[topic][1][subscription] = None
            else:
                self._exact.setdefault(topic, {})[subscription] = None

    def drop(self, subscription: S, topics: Iterable[str]) -> None:
        """Lead these topics to it no more; what it does not have is passed over."""
        self._found.clear()
        own = self._topics.get(subscription, {})
        for topic in topics:
            if topic not in own:
                continue
            del own[topic]
            if is_pattern(topic):
                beginning = _beginning(topic)
                alike = self._patterns[beginning]
                members = alike[topic][1]
                del members[subscription]
                if not members:
                    del alike[topic]
                if not alike:
                    del self._patterns[beginning]
                    self._lengths[len(beginning)] -= 1
                    if not self._lengths[len(beginning)]:
                        del self._lengths[len(beginning)]
            else:
                members = self._exact[topic]
                del members[subscription]
                if not members:
                    del self._exact[topic]

    def remove(self, subscription: S) -> None:
        """Forget it."""
        self.drop(subscription, self.topics(subscription))
        self._topics.pop(subscription, None)

    def topics(self, subscription: S) -> tuple[str, ...]:
        """What leads to it, in the order in which it was added."""
        return tuple(self._topics.get(subscription, ()))

    def targets(self, topic: bytes) -> tuple[S, ...]:
        """Who gets what is published to ``topic``.

        :raises UnicodeDecodeError: the topic is not UTF-8.
        """
        found = self._found.get(topic)
        if found is None:
            text = topic.decode()
            members = dict(self._exact.get(text, {}))
            for length in self._lengths:
                if length <= len(text):
                    for pattern, subscriptions in self._patterns.get(text[:length], {}).values():
                        if pattern.match(text):
                            members.update(subscriptions)
            found = tuple(members)
            if len(self._found) >= _CACHED_TOPICS:
                self._found.clear()
            self._found[topic] = found
        return found


def is_pattern(topic: str) -> bool:
    return any(character in topic for character in _SPECIAL)


def _beginning(pattern: str) -> str:
    return pattern[: min(pattern.index(character) for character in _SPECIAL if character in pattern)]


def listed(topics: Sequence[str]) -> str:
    """Some of them, for people."""
    more = len(topics) - _LISTED
    return ", ".join(topics[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def matches(topics: Iterable[str], topic: bytes) -> bool:
    """Whether one of these topics and patterns hears what is published to ``topic``."""
    text = topic.decode()
    return any(fnmatchcase(text, own) if is_pattern(own) else text == own for own in topics)
