"""The system calls on descriptors, memory and processes."""
