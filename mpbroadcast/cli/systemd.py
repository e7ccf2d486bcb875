"""Notifying systemd of the state of a service with ``Type=notify``."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send a state, such as ``READY=1``, to the service manager; without one, do nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            notifier.sendall(state.encode())
