"""The side of a user's process: handles, channels, selectors."""
