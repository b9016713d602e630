"""Exactly what inference must repeat."""
