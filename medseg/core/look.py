"""How label maps and scans are shown: one colour a structure, one way to look at a slice."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

# Bright enough on grey, and most people can tell the first ones apart (after Okabe and Ito).
COLOURS = ("#56b4e9", "#f5a623", "#2fd6a3", "#f3a6d0", "#f0e442", "#ff7a4d", "#a99cff", "#ffffff")


def colour(place: int) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of the structure at a place, from 0, in its label set."""
    red, green, blue = bytes.fromhex(COLOURS[place % len(COLOURS)][1:])
    return red, green, blue


def seen(values: NDArray[Any], axis: int, at: int) -> NDArray[Any]:
    """The slice (rows, columns) of an array (X, Y, Z) in RAS order at an index of an axis, in the
    radiological convention: the patient's right on the left, anterior on top of an axial and on the
    left of a sagittal slice, superior on top."""
    return values.take(at, axis=axis)[::-1, ::-1].T
