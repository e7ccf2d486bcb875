"""Which subscriptions get a message, by its topic. Pure: no descriptor, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Generic, TypeVar

from mpbroadcast.broker.core.patterns import Patterns, is_pattern

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
        self.found: dict[bytes, tuple[S, ...]] = {}  # what was looked up; to be read only

    def add(self, subscription: S, topics: Iterable[str]) -> None:
        self.found.clear()
        own = self._topics.setdefault(subscription, {})
        for topic in topics:
            own[topic] = None
            if is_pattern(topic):
                self._patterns.add(topic, subscription)
            else:
                self._exact.setdefault(topic, {})[subscription] = None

    def drop(self, subscription: S, topics: Iterable[str]) -> None:
        """Route these topics to the subscription no more. Topics that it does not have are ignored."""
        self.found.clear()
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
        """Route nothing to the subscription any more."""
        self.drop(subscription, self.topics(subscription))
        self._topics.pop(subscription, None)

    @property
    def count(self) -> int:
        """How many subscriptions there are."""
        return len(self._topics)

    def topics(self, subscription: S) -> tuple[str, ...]:
        """Return the topics of the subscription, in the order in which they were added."""
        return tuple(self._topics.get(subscription, ()))

    def targets(self, topic: bytes) -> tuple[S, ...]:
        """Return the subscriptions that get what is published to ``topic``.

        :raises UnicodeDecodeError: the topic is not UTF-8.
        """
        found = self.found.get(topic)
        if found is None:
            text = topic.decode()
            members = dict(self._exact.get(text, {}))
            self.steps += self._patterns.steps(text)
            for matching in self._patterns.matching(text):
                members.update(matching)
            found = tuple(members)
            if len(self.found) >= _CACHED_TOPICS:
                self.found.clear()
            self.found[topic] = found
        return found


def listed(topics: Sequence[str]) -> str:
    """Return the first of these topics as text for a log, and how many more there are."""
    more = len(topics) - _LISTED
    return ", ".join(topics[:_LISTED]) + (f" and {more} more" if more > 0 else "")
