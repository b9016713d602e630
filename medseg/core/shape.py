"""What a label map looks like, structure by structure: in how many pieces, and whether the border
of the scan cuts it."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
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
    steps = [max(1, int(_STEP_MM / s)) for s in labels.grid.spacing]
    spacing = np.array(labels.grid.spacing) * steps
    parts = connected(labels.values[tuple(slice(step // 2, None, step) for step in steps)])
    return {
        int(n): _pieces(parts.sizes[one], parts.edges[one], spacing)
        for n in labels.labels.numbers
        if (one := parts.numbers == n).any()
    }


@dataclass(frozen=True)
class Parts:
    """What touches by faces, edges or corners and has one number: ``index`` (X, Y, Z), from 1, 0 being
    the background; and for each, background included, the ``numbers`` (n,), ``sizes`` (n,) in voxels
    and ``edges`` (n, 3, 2), the first and last voxels along each axis."""

    index: NDArray[np.unsignedinteger]
    numbers: NDArray[np.integer]
    sizes: NDArray[np.int64]
    edges: NDArray[np.int64]


def connected(values: NDArray[np.integer], things: NDArray[np.integer] | None = None) -> Parts:
    """The connected parts of a label map's values (X, Y, Z). Where ``things`` (X, Y, Z) has a number above 0, its
    voxels are one part, whether they touch or not, and no part of any other; they have one value."""
    # A frame of background, since there must be fewer parts than voxels.
    alone = values if things is None else np.where(things > 0, 0, values)
    index = cc3d.connected_components(np.pad(alone, 1), connectivity=26)
    if things is not None:
        numbered = np.pad(things, 1)
        ranks = np.unique(numbered, return_inverse=True)[1].reshape(numbered.shape)
        index = np.where(numbered > 0, index.max() + ranks, index).astype(np.uint32)
    found = cc3d.statistics(index)
    index = index[1:-1, 1:-1, 1:-1]
    numbers = np.zeros(len(found["voxel_counts"]), dtype=values.dtype)
    numbers[index] = values
    edges = np.array([[(s.start - 1, s.stop - 2) for s in box] for box in found["bounding_boxes"]])
    return Parts(index, numbers, found["voxel_counts"].astype(np.int64), edges)


def _pieces(sizes: NDArray[np.int64], edges: NDArray[np.int64], spacing: NDArray[np.float64]) -> int:
    largest = int(np.argmax(sizes))
    gap = np.maximum(edges[:, :, 0] - edges[largest, :, 1], edges[largest, :, 0] - edges[:, :, 1])
    distance = np.linalg.norm(np.maximum(gap, 0) * spacing, axis=1)
    return 1 + int(np.count_nonzero((sizes >= _CRUMB * sizes[largest]) & (distance >= _APART_MM)))


def cut(labels: LabelMap) -> frozenset[int]:
    """The numbers of the structures that have a voxel on a face of the grid: the scan ends before
    they do, as far as one can tell."""
    # Not numpy's take, which turns a whole array whose first axis varies fastest.
    faces = [labels.values[(slice(None),) * axis + (end,)] for axis in range(3) for end in (0, -1)]
    found = {int(number) for face in faces for number in np.unique(face)}
    return frozenset(found & set(labels.labels.numbers))
