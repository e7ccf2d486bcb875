"""Named moments at which a test can stop the code, or make it fail.

A test replaces :func:`reach` in its own process; the processes that it forks inherit that. The names are of moments that a
test needs, not of functions, so they stay when code is moved.
"""

from __future__ import annotations

from typing import Final

NAMES: Final = {
    # in a user's process
    "connected": "a control connection is accepted by the system, and nothing was sent",
    "answering": "the next part of the handshake is about to be sent",
    "waiting for a reply": "a request was sent; the subject is what it asks for, and the socket",
    "waiting for the broker": "a broker process was started, and has not reported that it is ready",
    "waiting for room": "a publisher is about to wait until its pipe has room; the subject is its descriptor",
    "sending the last piece": "a message in pieces is written, except for its last piece",
    "populating a ring": "a message has its room in a ring, and is not written there",
    "publishing memory": "the memory of a message was sent, and its frame is not in the pipe",
    "mapping kept memory": "memory that is kept is mapped, and has no hook for forks yet",
    "unmapping kept memory": "memory that is kept is about to be unmapped",
    "waiting for messages": "a channel has nothing to return; the subject is what it has read",
    "taking memory": "the frame of a message was read, and its memory is still in the socket",
    "ending the broker": "a broadcaster is closed, and its broker process has not ended",
    # in the broker
    "accepting": "a connection waits to be accepted",
    "checking a key": "a part of the handshake has come",
    "replied with descriptors": "a reply was sent, with descriptors that nobody may have received",
    "routing": "a part of a publisher's pipe was read, and is not routed",
    "fetched memory": "the memory of a message has come, and is not routed",
    "sent memory": "the memory of a message was sent to a channel, and its run is not in the pipe",
    "restoring": "a broker that takes over is about to restore the subscriptions",
    "replacing": "a broker has died, and the next one is about to be started",
}


def reach(name: str, subject: object = None) -> None:
    """Do nothing. A test replaces this function to stop the code at the moment of that name."""
