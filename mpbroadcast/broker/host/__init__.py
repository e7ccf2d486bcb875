"""The process around the broker: its start, socket, supervisor, journal and log."""
