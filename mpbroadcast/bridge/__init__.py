"""Bridges: the buses of several machines, linked over an engine such as Redis or NATS."""

from mpbroadcast.bridge.engine import Engine, EngineRefused
from mpbroadcast.bridge.link import Bridge, bridge
from mpbroadcast.client.bridging import BridgeSession, bridge_flushed, bridge_session, forget_bridge

__all__ = ["Bridge", "BridgeSession", "Engine", "EngineRefused", "bridge", "bridge_flushed", "bridge_session", "forget_bridge"]
