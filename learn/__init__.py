"""What is learned from a batch, and what keeps the base's knowledge."""
