"""Bridges: the buses of several machines, linked over an engine such as Redis or NATS."""

from mpbroadcast.bridge.engine import Engine, EngineRefused
from mpbroadcast.bridge.link import Bridge, bridge

__all__ = ["Bridge", "Engine", "EngineRefused", "bridge"]
