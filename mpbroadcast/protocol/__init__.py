"""The formats of pipes and sockets: bytes in, bytes out. No descriptor, no clock."""
