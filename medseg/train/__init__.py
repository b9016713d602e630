"""A run, from plan to weights."""
