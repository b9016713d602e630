"""Overlap of two masks: plain functions on boolean arrays of one shape, any number of axes.

Two empty masks have no overlap to speak of: the answer is NaN, not 1 and not 0. Where one alone is
empty the answer is 0, of precision and recall too: what is nowhere found, or found where nothing is,
counts as badly as can be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def dice(first: Mask, second: Mask) -> float:
    """Twice the shared voxels over the voxels of both, 0 to 1; NaN for two empty masks.

    Raises ValueError where the shapes differ. Dice, "Measures of the amount of ecologic
    association between species", 1945.

    >>> dice(np.array([True, True, False]), np.array([False, True, False]))
    0.6666666666666666
    """
    shared, one, other = _counts(first, second)
    return 2 * shared / (one + other) if one + other else float("nan")


def iou(first: Mask, second: Mask) -> float:
    """Shared voxels over the voxels of either (Jaccard), 0 to 1; NaN for two empty masks.

    Raises ValueError where the shapes differ.

    >>> iou(np.array([True, True, False]), np.array([False, True, False]))
    0.5
    """
    shared, one, other = _counts(first, second)
    return shared / (one + other - shared) if one + other else float("nan")


def precision(prediction: Mask, reference: Mask) -> float:
    """Shared voxels over the predicted ones, 0 to 1; NaN for two empty masks.

    Raises ValueError where the shapes differ.

    >>> precision(np.array([True, True, False]), np.array([False, True, False]))
    0.5
    """
    shared, ours, theirs = _counts(prediction, reference)
    return shared / (ours or 1) if ours + theirs else float("nan")


def recall(prediction: Mask, reference: Mask) -> float:
    """Shared voxels over those of the reference, 0 to 1; NaN for two empty masks.

    Raises ValueError where the shapes differ.

    >>> recall(np.array([True, True, False]), np.array([False, True, False]))
    1.0
    """
    return precision(reference, prediction)


def _counts(first: NDArray[Any], second: NDArray[Any]) -> tuple[int, int, int]:
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != other.shape:
        raise ValueError(f"masks of shape {one.shape} and {other.shape}")
    return int(np.count_nonzero(one & other)), int(np.count_nonzero(one)), int(np.count_nonzero(other))
