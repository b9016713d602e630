"""The cases, and whether they are sound."""
