"""Which subscriptions get a message, by its topic. Pure: no descriptor, no clock."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Final, Generic, TypeVar

from mpbroadcast.broker.core.patterns import Patterns, is_pattern

S = TypeVar("S")

_LISTED: Final = 10
_CACHED_TOPICS: Final = 16384  # at most 1 KiB each; all are forgotten when there are more
MOST_LOOKED_UP: Final = 4  # topics at once, in parts
PART: Final = 1 << 21  # steps of trying patterns at once: some 5 ms


class Router(Generic[S]):
    """Topics and patterns, and the subscriptions that they lead to, each once, in no particular order."""

    def __init__(self) -> None:
        self._topics: dict[S, dict[str, None]] = {}
        self._exact: dict[str, dict[S, None]] = {}
        self._patterns: Patterns[S] = Patterns()
        self.steps = 0  # what trying patterns has taken so far
        self.found: dict[bytes, tuple[S, ...]] = {}  # what was looked up; to be read only
        self.alternatives: dict[S, None] = {}  # of which only the first that a topic leads to gets its messages
        self._looked_up = 0  # topics at this moment

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

    def __iter__(self) -> Iterator[S]:
        """All that there are."""
        return iter(tuple(self._topics))

    @property
    def count(self) -> int:
        """How many subscriptions there are."""
        return len(self._topics)

    def topics(self, subscription: S) -> tuple[str, ...]:
        """Return the topics of the subscription, in the order in which they were added."""
        return tuple(self._topics.get(subscription, ()))

    def targets(self, topic: bytes) -> tuple[S, ...] | None:
        """Return the subscriptions that get what is published to ``topic``; ``None`` if that takes too long to look up at once.

        :raises UnicodeDecodeError: the topic is not UTF-8.
        """
        found = self.found.get(topic)
        if found is None:
            text = topic.decode()
            steps = self._patterns.steps(text)
            if steps > PART:
                return None
            self.steps += steps
            found = self._keep(topic, self._members(text, self._patterns.matching(text)))
        return found

    def look_up(self, topic: bytes) -> Generator[None, None, tuple[S, ...]]:
        """Return what :meth:`targets` does, in parts: the subscriptions that get it at the end.

        Few topics are looked up at once, as each has a list of patterns. Others go on when one of these is done, or closed.

        :raises UnicodeDecodeError: the topic is not UTF-8.
        """
        while (found := self.found.get(topic)) is None and self._looked_up >= MOST_LOOKED_UP:
            yield
        if found is None:
            self._looked_up += 1
            try:
                text = topic.decode()
                matching: list[dict[S, None]] = []
                for steps in self._patterns.matching_in_parts(text, PART, matching):
                    self.steps += steps
                    if steps > PART:
                        yield
                found = self._keep(topic, self._members(text, matching))
            finally:
                self._looked_up -= 1
        return found

    def _members(self, text: str, matching: Iterable[dict[S, None]]) -> tuple[S, ...]:
        members = dict(self._exact.get(text, {}))
        for more in matching:
            members.update(more)
        if len(self.alternatives) > 1:
            for other in [*filter(members.__contains__, self.alternatives)][1:]:
                del members[other]
        return tuple(members)

    def _keep(self, topic: bytes, found: tuple[S, ...]) -> tuple[S, ...]:
        if len(self.found) >= _CACHED_TOPICS:
            self.found.clear()
        self.found[topic] = found
        return found


def listed(topics: Sequence[str]) -> str:
    """Return the first of these topics as text for a log, and how many more there are."""
    more = len(topics) - _LISTED
    return ", ".join(topics[:_LISTED]) + (f" and {more} more" if more > 0 else "")
