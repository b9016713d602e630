"""Numbers as words; others' words, for the eyes of all."""

from __future__ import annotations

import re


def count(number: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would choose: ``30 s``, ``12 min``, ``2.5 h``."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2g} s"


def size(number: int) -> str:
    """Bytes in the unit that a person would choose: ``12 bytes``, ``3.4 MiB``, ``27 GiB``."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            value = number / (1 << power)
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return count(number, "byte")


def discreet(text: str) -> str:
    """Text on one line, and of each path in it only the last part: paths hold names of users, and of more."""
    return re.sub(r"(?<![\w:/.])~?/(?:[^\s/'\":,;()]+/)+", "", " ".join(text.split()))
