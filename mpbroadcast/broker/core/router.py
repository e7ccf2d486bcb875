"""Who gets what is published to a topic. Pure: no descriptor, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final, Generic, TypeVar

from mpbroadcast.broker.core.patterns import Matcher, Patterns, is_pattern

S = TypeVar("S")

_LISTED: Final = 10
_CACHED_TOPICS: Final = 16384  # at most 1 KiB each; all are forgotten when there are more


class Router(Generic[S]):
    """Topics and patterns, and the subscriptions that they lead to, each once, in no particular order."""

    def __init__(self) -> None:
        self._topics: dict[S, dict[str, None]] = {}
        self._exact: dict[str, dict[S, None]] = {}
        self._patterns: Patterns[S] = Patterns()
        self.steps = 0  # what trying patterns has taken so far
        self._found: dict[bytes, tuple[S, ...]] = {}

    def add(self, subscription: S, topics: Iterable[str], made: Mapping[str, Matcher] | None = None) -> None:
        """Lead these topics to it, too; ``made`` are matchers of patterns that there are already."""
        self._found.clear()
        own = self._topics.setdefault(subscription, {})
        for topic in topics:
            own[topic] = None
            if is_pattern(topic):
                self._patterns.add(topic, subscription, made.get(topic) if made else None)
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
                self._patterns.drop(topic, subscription)
            else:
                members = self._exact[topic]
                del members[subscription]
                if not members:
                    del self._exact[topic]

    def remove(self, subscription: S) -> None:
        """Forget it."""
        self.drop(subscription, self.topics(subscription))
        self._topics.pop(subscription, None)

    @property
    def count(self) -> int:
        """How many subscriptions there are."""
        return len(self._topics)

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
            self.steps += self._patterns.steps(text)
            for matching in self._patterns.matching(text):
                members.update(matching)
            found = tuple(members)
            if len(self._found) >= _CACHED_TOPICS:
                self._found.clear()
            self._found[topic] = found
        return found


def listed(topics: Sequence[str]) -> str:
    """Some of them, for people."""
    more = len(topics) - _LISTED
    return ", ".join(topics[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def matches(topics: Iterable[str], topic: bytes) -> bool:
    """Whether one of these topics and patterns hears what is published to ``topic``."""
    text = topic.decode()
    return any(fnmatchcase(text, own) if is_pattern(own) else text == own for own in topics)
