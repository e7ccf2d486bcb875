"""The policy of the broker. Pure: no descriptor, no clock, no process."""
