"""What overlap and surface distances do not tell of two masks: borders, middles and centre lines.

Masks (X, Y, Z) on one grid. A metric of two empty masks is NaN; where one alone is empty, overlaps are 0
and distances infinite.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.evaluate.overlap import Mask, iou, precision

Float64 = NDArray[np.float64]

# The same as of surfaces: rounding of an affine must not decide what lies at a distance.
_ROUNDING_MM = 1e-4
# Names of what is longer than it is wide, at the start of a word.
_TUBES = re.compile(
    r"\b(vessel|arter(y|ies)|veins?\b|venous|vena|venae|aort|airway|trachea|bronch|duct|ureter|tubes?\b|nerve)", re.I
)


def boundary_iou(first: Mask, second: Mask, grid: Grid, width_mm: float, flat: Collection[int] = ()) -> float:
    """Intersection over union of what lies in each mask within ``width_mm`` of its border, 0 to 1: of large
    structures it sees what the overlap of their insides hides.

    A voxel counts where the middle of a voxel outside its mask is no farther than ``width_mm``, and the next
    voxel along any axis is always near enough. What is beyond the image is outside, but for the axes that are ``flat``:
    along them the image is a single slice, and nothing ends. On a sheared grid the
    axes are taken to be at right angles. Cheng et al., "Boundary IoU", CVPR 2021.
    """
    spacing = [step for axis, step in enumerate(grid.spacing) if axis not in flat]
    thin = [np.squeeze(np.asarray(mask, dtype=bool), axis=tuple(flat)) for mask in (first, second)]
    return iou(*(_border(mask, spacing, max(width_mm, *spacing)) for mask in thin))


def centroid_distance(first: Mask, second: Mask, grid: Grid) -> float:
    """Distance in mm of the two masks' centres of mass."""
    empty = [not mask.any() for mask in (first, second)]
    if any(empty):
        return float("nan") if all(empty) else float("inf")
    step = _centre(first) - _centre(second)
    return float(np.linalg.norm(grid.affine[:3, :3] @ step))


def cldice(prediction: Mask, reference: Mask) -> float:
    """clDice, 0 to 1: the harmonic mean of the share of the prediction's centre line that lies in the
    reference, and of the reference's that lies in the prediction. It tells whether a tube is found along
    its length, however thick it is drawn.

    Centre lines are those of Lee et al. 1994 (scikit-image). Shit et al., "clDice", CVPR 2021.
    """
    masks = [np.pad(np.asarray(mask, dtype=bool), 1) for mask in (prediction, reference)]
    ours, theirs = map(_centre_line, masks)
    if not ours.any() and not theirs.any():
        return float("nan")
    exact, complete = precision(ours, masks[1]), precision(theirs, masks[0])
    return 2 * exact * complete / (exact + complete) if exact + complete else 0.0


def tubes(labels: LabelSet) -> frozenset[int]:
    """Numbers of the labels whose names say that they are tubes: vessels, airways, ducts, nerves."""
    return frozenset(label.number for label in labels if _TUBES.search(label.name.replace("_", " ")))


def _border(mask: Mask, spacing: Sequence[float], width_mm: float) -> Mask:
    import edt

    # One voxel around, for the library's own border is half a voxel away.
    depth = edt.edt(np.pad(mask, 1), anisotropy=spacing)[(slice(1, -1),) * mask.ndim]
    border: Mask = mask & (depth <= width_mm + _ROUNDING_MM)
    return border


def _centre_line(mask: Mask) -> Mask:
    from scipy.ndimage import label
    from skimage.morphology import skeletonize

    line: Mask = skeletonize(mask, method="lee") > 0
    # The thinning loses lumps of some even sizes altogether; these stay as they are.
    pieces, number = label(mask, np.ones((3, 3, 3)))
    kept = np.zeros(number + 1, dtype=bool)
    kept[np.unique(pieces[line])] = True
    return line | (mask & ~kept[pieces])


def _centre(mask: Mask) -> Float64:
    """The mean index (3,) of the voxels inside."""
    profiles = (mask.sum(axis=tuple(b for b in range(3) if b != axis)) for axis in range(3))
    return np.array([np.average(np.arange(len(profile)), weights=profile) for profile in profiles])
