"""A publish/subscribe broadcaster for the processes of one machine, over OS pipes.

All modules are imported when the first name is used (PEP 562): each run of pytest imports the plugin in
``mpbroadcast.testing``, which must cost nothing where no test uses it. Type checkers read the names in ``__init__.pyi``.
"""

import importlib
import sys

if sys.platform == "win32":
    raise ImportError("mpbroadcast needs the pipes, sockets and signals of a POSIX system, such as Linux or macOS: not Windows")

_NAMES = {
    "mpbroadcast.client.api": (
        "aconnect",
        "aconnect_or_start",
        "connect",
        "connect_or_start",
        "publish",
        "start_broadcaster",
        "subscribe",
        "unsubscribe",
    ),
    "mpbroadcast.client.broadcaster": ("Broadcaster",),
    "mpbroadcast.client.channel": ("Channel",),
    "mpbroadcast.client.received": ("Received",),
    "mpbroadcast.client.selector": ("Selector", "channel_to_selector"),
    "mpbroadcast.errors": (
        "AddressError",
        "AuthenticationFailed",
        "BroadcastError",
        "BrokerCrashed",
        "BrokerLost",
        "BrokerRestarted",
        "ChannelBusy",
        "ChannelInUse",
        "ClosedError",
        "Lagged",
        "Overflowed",
        "StartError",
        "TimedOut",
        "VersionMismatch",
    ),
    "mpbroadcast.stats": ("BridgeStats", "BrokerStats", "GroupStats", "PublisherStats", "SubscriberStats"),
    "mpbroadcast.topics": ("escape",),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("mpbroadcast.protocol.version").VERSION
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = {one: getattr(importlib.import_module(module), one) for module, names in _NAMES.items() for one in names}
    globals().update(found)
    return found[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
