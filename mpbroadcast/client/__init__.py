"""What runs in a user's process: handles, channels, selectors."""
