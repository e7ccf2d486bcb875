"""What is measured: one small class a peer, each in its own file.

A new peer is a subclass of :class:`benchmarks.peers.base.Peer` in a file of its own, and a line in ``PEERS``.
"""

from benchmarks.peers.base import Endpoint, Peer, Shape, Source
from benchmarks.peers.broadcast import Broadcast, BroadcastInline, BroadcastIterated, BroadcastSingly
from benchmarks.peers.ezmsg import Ezmsg
from benchmarks.peers.fifo import FasterFifo
from benchmarks.peers.iceoryx import Iceoryx
from benchmarks.peers.kickmsg import Kickmsg
from benchmarks.peers.managers import Managers
from benchmarks.peers.mmbus import Mmbus
from benchmarks.peers.nats import NATS
from benchmarks.peers.nng import Pairs, PubSub
from benchmarks.peers.pipes import Pipes
from benchmarks.peers.queues import Queues
from benchmarks.peers.redis import Redis
from benchmarks.peers.relay import Relay
from benchmarks.peers.subetha import SubEtha
from benchmarks.peers.vllm import MessageQueue
from benchmarks.peers.zenoh import Zenoh
from benchmarks.peers.zeromq import ZeroMQ
from benchmarks.peers.zeromq_large import ZeroMQLarge
from benchmarks.peers.zeromq_proxy import ZeroMQProxy

__all__ = ["OWN", "PEERS", "Endpoint", "Peer", "Shape", "Source"]

OWN: tuple[type[Peer], ...] = (Broadcast, BroadcastSingly, BroadcastIterated, BroadcastInline)
PEERS: tuple[type[Peer], ...] = (
    *OWN,
    Queues,
    Pipes,
    Managers,
    ZeroMQ,
    ZeroMQProxy,
    ZeroMQLarge,
    PubSub,
    Pairs,
    Redis,
    NATS,
    FasterFifo,
    Iceoryx,
    Zenoh,
    Ezmsg,
    SubEtha,
    Kickmsg,
    Mmbus,
    MessageQueue,
    Relay,
)
