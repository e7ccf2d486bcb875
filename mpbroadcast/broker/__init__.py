"""What runs in the broker process."""
