from mpbroadcast.client.api import (
    aconnect,
    aconnect_or_start,
    connect,
    connect_or_start,
    publish,
    start_broadcaster,
    subscribe,
    unsubscribe,
)
from mpbroadcast.client.broadcaster import Broadcaster
from mpbroadcast.client.channel import Channel
from mpbroadcast.client.received import Received
from mpbroadcast.client.selector import Selector, channel_to_selector
from mpbroadcast.errors import (
    AddressError,
    AuthenticationFailed,
    BroadcastError,
    BrokerCrashed,
    BrokerLost,
    BrokerRestarted,
    ChannelBusy,
    ChannelInUse,
    ClosedError,
    Lagged,
    Overflowed,
    StartError,
    TimedOut,
    VersionMismatch,
)
from mpbroadcast.stats import BridgeStats, BrokerStats, GroupStats, PublisherStats, SubscriberStats
from mpbroadcast.topics import escape

__all__ = [
    "AddressError",
    "AuthenticationFailed",
    "BridgeStats",
    "BroadcastError",
    "Broadcaster",
    "BrokerCrashed",
    "BrokerLost",
    "BrokerRestarted",
    "BrokerStats",
    "Channel",
    "ChannelBusy",
    "ChannelInUse",
    "ClosedError",
    "GroupStats",
    "Lagged",
    "Overflowed",
    "PublisherStats",
    "Received",
    "Selector",
    "StartError",
    "SubscriberStats",
    "TimedOut",
    "VersionMismatch",
    "aconnect",
    "aconnect_or_start",
    "channel_to_selector",
    "connect",
    "connect_or_start",
    "escape",
    "publish",
    "start_broadcaster",
    "subscribe",
    "unsubscribe",
]

__version__: str
