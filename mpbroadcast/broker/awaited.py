"""The processes that have sessions, written down for the broker that takes over (``restart=True``).

A broker that belongs to no process ends when nothing needs it. A handle that is not used does not notice that its broker has
died, and attaches to the next one with its next call: until then, or until its process ends, the next one awaits it.
"""

from __future__ import annotations

import contextlib

from mpbroadcast.broker.host.journal import Entry, Journal
from mpbroadcast.broker.members import Peer
from mpbroadcast.broker.peers import Peers
from mpbroadcast.posix.processes import birth


class Awaited:
    """Those of the broker before this one that have not attached yet: ``peers``."""

    def __init__(self, peers: Peers, journal: Journal | None) -> None:
        self.peers: set[Peer] = set()
        self._all = peers
        self._journal = journal

    def restore(self) -> None:
        """Await the processes that are written down and live."""
        for entry in self._journal.processes if self._journal is not None else ():
            self._restore(entry)

    def _restore(self, entry: Entry) -> None:
        peer = None
        with contextlib.suppress(OSError):
            peer = self._all.get(entry["pid"])
        if peer is not None and birth(peer.pid) == entry["birth"]:
            peer.is_awaited = True
            self.peers.add(peer)
        else:
            self._journal_of(entry["pid"], None)
            if peer is not None:
                self._all.release(peer)

    def note_session(self, peer: Peer) -> None:
        """Note that a session of this process has begun."""
        peer.sessions += 1
        self._journal_of(peer.pid, peer)
        self._await_no_more(peer)

    def note_end(self, peer: Peer) -> None:
        """Note that a session of this process has ended."""
        peer.sessions -= 1
        if not peer.sessions:
            self._journal_of(peer.pid, None)

    def note_death(self, peer: Peer) -> None:
        if peer in self.peers:
            self._journal_of(peer.pid, None)
            self._await_no_more(peer)

    def _await_no_more(self, peer: Peer) -> None:
        peer.is_awaited = False
        self.peers.discard(peer)

    def _journal_of(self, pid: int, peer: Peer | None) -> None:
        """Write down that the process has a session; for ``None``, that it has none."""
        if self._journal is None or pid <= 0:  # of a process of another PID namespace, the next broker could not see the end
            return
        if peer is None:
            self._journal.drop_process(pid)
        elif born := birth(pid):
            self._journal.put_process(pid, born)
