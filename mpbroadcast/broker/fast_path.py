"""The fast path of a message that comes alone: from its publisher's pipe into the channels' pipes at once.

Where messages come one by one, all code is cold, and what counts is how much of it runs. For such a message one function does
what intake, routing and delivery do for all others, where none of them has anything to decide:

- What was read is one whole frame, with nothing in shared memory, in pieces or excluded, and short enough for a write that a
  pipe takes whole or not at all. Nothing of its publisher is parked or unfinished. Its topic was routed before.
- For each of its targets nothing waits and nothing is reported, no publisher waits, the pipe is open, and the message fits
  into the capacity as far as is known. So it comes behind all that was routed before, in each pipe.
- This round has room for so many writes. Where many messages with many targets come at once, the general way joins them.

Everything else goes the general way, which this must not differ from. A pipe that does not take the message, as it is full or
its reader is gone, finds it in the backlog, and is written in the same round as always.
"""

from __future__ import annotations

from array import array
from typing import Final

from mpbroadcast.broker.core.router import Router
from mpbroadcast.broker.core.states import PipeState
from mpbroadcast.broker.delivery import Dirty
from mpbroadcast.broker.members import Publisher, Subscription
from mpbroadcast.broker.routing import Routing
from mpbroadcast.posix.pipes import write
from mpbroadcast.protocol.frames import HEAD, OVERHEAD, PIPE_BUF, Batch
from mpbroadcast.protocol.runs import MESSAGES, RUN, TAIL, Account, Run, run_of
from mpbroadcast.validation import MAX_TOPIC

_AROUND: Final = RUN.size + len(TAIL)
_LONGEST: Final = PIPE_BUF - _AROUND
MOST_WRITES: Final = 1 << 10  # into pipes, in one round: some milliseconds


class FastPath:
    """Passes lone messages on, for all publishers."""

    def __init__(self, router: Router[Subscription], routing: Routing, dirty: Dirty, account: Account) -> None:
        self._found = router.found
        self._routing = routing
        self._dirty = dirty
        self._account = account
        self.room = MOST_WRITES  # writes that are left to this round

    def pass_on(self, publisher: Publisher, chunk: bytes) -> bool:
        """Write what was read into the pipes of its targets. Return False, with nothing done, if it must go the general way."""
        size = len(chunk)
        if not HEAD.size <= size <= _LONGEST:
            return False
        length, tag = HEAD.unpack_from(chunk)
        skip = HEAD.size + tag
        source, routing = publisher.pipe, self._routing
        if length != size or tag > MAX_TOPIC or skip > size or publisher.parked or publisher.not_yet:
            return False
        if source.splitter.rest or source.barriers:
            return False
        targets = self._found.get(chunk[HEAD.size : skip])
        if targets is None or len(targets) > self.room:
            return False
        charge = size + OVERHEAD
        for subscription in targets:
            backlog, pipe, window = subscription.backlog, subscription.pipe, subscription.window
            if backlog.runs or backlog.drops or subscription.waiters or subscription.is_abandoned:
                return False
            if pipe.state is not PipeState.OPEN or pipe.write_interest or (window is not None and window.notes):
                return False
            if backlog.pipe + backlog.referred + charge > backlog.capacity:
                return False
        data = b"".join((RUN.pack(size + _AROUND, 1, MESSAGES, False, skip, routing.next_id), chunk, TAIL))
        run: Run | None = None
        for subscription in targets:
            backlog = subscription.backlog
            try:
                write(subscription.pipe.fd, data)
            except OSError:
                if run is None:
                    run = run_of(_batch(chunk, skip), routing.next_id, self._account)
                publisher.last_in[subscription] = backlog.put(run)
                self._dirty[subscription] = None
                continue
            backlog.passed_on(len(data))
            publisher.last_in[subscription] = backlog.departed
            if subscription.window is not None:
                subscription.window.moved += len(data)
        if routing.history is not None:
            routing.history.add(routing.next_id, _batch(chunk, skip))
        self.room -= len(targets)
        source.position += size
        routing.next_id += 1
        return True


def _batch(frame: bytes, skip: int) -> Batch:
    return Batch(frame, array("I", (len(frame),)), frame[HEAD.size : skip], 0, skip)
