"""What crosses a process boundary, used by both sides."""
