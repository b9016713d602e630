"""What the data look like, and what to do about it."""
