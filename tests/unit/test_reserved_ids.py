"""The ids that a broker gives to messages: where they begin, and what is written down of them for the next one."""

import os
from collections.abc import Iterator

import pytest

from mpbroadcast.broker.host.journal import MOST_IDS, Journal, Succession, first_id
from mpbroadcast.broker.server import Broker
from tests.support.own_broker import own_broker

__all__ = ["own_broker"]


@pytest.fixture
def journal(leaves_nothing: None) -> Iterator[Journal]:
    made = Journal()
    yield made
    for file in made.files:
        os.close(file)


def test_the_ids_of_a_first_broker_begin_at_random(journal: Journal) -> None:
    """So that another broker's id is never taken for one of its own."""
    found = [first_id(one) for one in (None, None, journal, journal) for _ in range(100)]
    assert len({*found}) == len(found)
    assert all(0 < one <= 1 << 52 for one in found)


def test_the_ids_of_the_next_broker_begin_above_those_that_were_reserved(own_broker: Broker, journal: Journal) -> None:
    """More are reserved long before those that are there have been given out."""
    routing = own_broker.traffic.routing
    own_broker.succession = Succession("identity", 0, journal)
    for _ in range(3):
        routing.next_id += MOST_IDS * 3 // 4
        own_broker.round(at_once=True)
        assert first_id(Journal(journal.files)) == first_id(journal) == routing.next_id + MOST_IDS
    routing.next_id += MOST_IDS // 4
    own_broker.round(at_once=True)
    assert first_id(journal) == routing.next_id + MOST_IDS * 3 // 4
