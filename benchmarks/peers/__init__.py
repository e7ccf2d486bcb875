"""What is measured: one small class a peer, each in its own file.

A new peer is a subclass of :class:`benchmarks.peers.base.Peer` in a file of its own, and a line in ``PEERS``.
"""

from benchmarks.peers.base import Peer
from benchmarks.peers.broadcast import Broadcast, BroadcastSingly
from benchmarks.peers.pipes import Pipes
from benchmarks.peers.queues import Queues
from benchmarks.peers.zeromq import ZeroMQ

__all__ = ["PEERS", "Peer"]

PEERS: tuple[type[Peer], ...] = (Broadcast, BroadcastSingly, Queues, Pipes, ZeroMQ)
