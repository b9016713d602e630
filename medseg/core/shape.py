"""What a label map looks like, structure by structure: in how many pieces, and whether the border
of the scan cuts it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.core.volume import LabelMap

# A part of a structure is a piece of its own where it is no crumb (a share of the largest part) and
# lies apart from it; parts that noise or coarse slices have parted by a few voxels are one.
_CRUMB = 0.05
_APART_MM = 10.0
# Finer label maps are looked at with steps of about so much, which is some ten times as fast.
_STEP_MM = 2.0


def pieces(labels: LabelMap) -> dict[int, int]:
    """In how many far-apart pieces each structure lies, by number; structures that are absent are
    left out.

    A piece is a connected part (by faces, edges or corners) of at least a twentieth of the largest
    one's volume whose bounding box is at least 10 mm away from that of the largest. Counted on
    every n-th voxel of grids finer than 2 mm, so a structure thinner than that may be missed.
    """
    from scipy import ndimage  # a third of a second, for whoever only loads a model

    steps = [max(1, int(_STEP_MM / s)) for s in labels.grid.spacing]
    values = labels.values[tuple(slice(step // 2, None, step) for step in steps)]
    spacing = np.array(labels.grid.spacing) * steps
    boxes = ndimage.find_objects(values.astype(np.int32), max_label=max(labels.labels.numbers))
    return {
        number: _pieces(values[box] == number, spacing)
        for number in labels.labels.numbers
        if (box := boxes[number - 1]) is not None
    }


def _pieces(mask: NDArray[np.bool_], spacing: NDArray[np.float64]) -> int:
    from scipy import ndimage

    parts, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count == 1:
        return 1
    sizes = np.bincount(parts.ravel())[1:]
    boxes = np.array([[(s.start, s.stop - 1) for s in box] for box in ndimage.find_objects(parts)])  # (parts, 3, 2)
    largest = int(np.argmax(sizes))
    gap = np.maximum(boxes[:, :, 0] - boxes[largest, :, 1], boxes[largest, :, 0] - boxes[:, :, 1])
    distance = np.linalg.norm(np.maximum(gap, 0) * spacing, axis=1)
    return 1 + int(np.count_nonzero((sizes >= _CRUMB * sizes[largest]) & (distance >= _APART_MM)))


def cut(labels: LabelMap) -> frozenset[int]:
    """The numbers of the structures that have a voxel on a face of the grid: the scan ends before
    they do, as far as one can tell."""
    # Not numpy's take, which turns a whole array whose first axis varies fastest.
    faces = [labels.values[(slice(None),) * axis + (end,)] for axis in range(3) for end in (0, -1)]
    found = {int(number) for face in faces for number in np.unique(face)}
    return frozenset(found & set(labels.labels.numbers))
