"""Bridges: the buses of several machines, linked over an engine such as Redis or NATS."""
