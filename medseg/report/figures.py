"""Label maps as pictures: planes through a scan, and what of it a viewer needs.

A plane is described here and drawn as SVG by the template. Only the grey values of a scan become an image (PNG); what
is outlined on it stays a path, so that it prints sharply.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.look import seen
from medseg.core.resample import crop
from medseg.core.volume import LabelMap, Volume

_CURVE_POINTS = 300
# What surrounds the organs in a picture, in mm: enough to know the place.
_MARGIN_MM = 30.0
# So many voxels tell the range of all, and fewer than so many tell none.
_ENOUGH, _FEW = 2**24, 20
_VIEWS = (("axial", 2, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 0, "APSI"))


def thinned(points: Sequence[tuple[float, float]], most: int = _CURVE_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points (x, y): means of neighbours. Values that are not finite are left out."""
    finite = np.array([p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]).reshape(-1, 2)
    groups = np.array_split(finite, min(most, max(len(finite), 1)))
    return [(float(g[:, 0].mean()), float(g[:, 1].mean())) for g in groups if len(g)]


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane through a scan as it is looked at.

    ``grey`` (rows, columns) uint8, row 0 on top; ``reference`` and ``prediction`` of the same
    shape hold label numbers. ``pixel_mm`` is the size of a pixel (height, width), ``letters`` say
    which way is the left, right, top and bottom edge of the picture, and ``position`` (mm) is
    where the plane cuts the axis it stands on.
    """

    name: str
    grey: NDArray[np.uint8]
    reference: NDArray[Any]
    prediction: NDArray[Any]
    pixel_mm: tuple[float, float]
    letters: str
    position: float

    @property
    def size_mm(self) -> tuple[float, float]:
        """Height and width."""
        return self.grey.shape[0] * self.pixel_mm[0], self.grey.shape[1] * self.pixel_mm[1]


@dataclass(frozen=True, eq=False)
class Crop:
    """What is to be seen of a scan: grey values (X, Y, Z) uint8 and both label maps' numbers, on an upright ``grid``
    (R, A, S) that holds the labelled region and 30 mm around it."""

    grid: Grid
    grey: NDArray[np.uint8]
    reference: NDArray[Any]
    prediction: NDArray[Any]

    def of(self, voxels: int) -> Crop:
        """Every few voxels of it, so that no more than so many are left; the finest axis is given up first. Grey is the
        mean around each."""
        from scipy.ndimage import uniform_filter

        steps, size = np.ones(3, dtype=int), np.array(self.grid.shape)
        while np.prod(-(-size // steps)) > voxels:
            steps[np.argmin(np.array(self.grid.spacing) * steps)] += 1
        if (steps == 1).all():
            return self
        first = (np.minimum(steps, size) - 1) // 2
        every = tuple(slice(int(a), None, int(n)) for a, n in zip(first, steps, strict=True))
        affine = self.grid.affine.copy()
        affine[:3, 3] = self.grid.to_world(first)
        affine[:3, :3] = affine[:3, :3] * steps
        grey = uniform_filter(self.grey, steps, mode="nearest")[every]
        return Crop(Grid(grey.shape, affine), grey, self.reference[every], self.prediction[every])


def cropped(image: NDArray[Any], grid: Grid, reference: LabelMap, prediction: LabelMap) -> Crop:
    """What is to be seen of ``image`` (X, Y, Z). Raises InputError where the label maps do not lie on its grid."""
    part, values, truth, guess = _part(image, grid, reference, prediction, 0.0)
    return Crop(part, _grey(values, *_window(values, truth)), truth, guess)


def trimmed(
    image: NDArray[Any], grid: Grid, reference: LabelMap, prediction: LabelMap
) -> tuple[NDArray[Any], Grid, LabelMap, LabelMap]:
    """Copies of that part of a scan (X, Y, Z) and of its label maps on the same grid which `planes` and `cropped`
    show, so that the rest need not be held."""
    part = _around(reference.values, prediction.values, grid.spacing, 0.0)
    start = [side.start or 0 for side in part]
    kept = np.array(image[part])
    window = grid.window(start, kept.shape)
    truth, guess = (LabelMap(np.array(m.values[part]), window, m.labels) for m in (reference, prediction))
    return kept, window, truth, guess


def planes(
    image: NDArray[Any],
    grid: Grid,
    reference: LabelMap,
    prediction: LabelMap | None = None,
    *,
    roomy: float = 0.0,
    window: tuple[float, float] | None = None,
) -> tuple[Plane, Plane, Plane]:
    """The axial, coronal and sagittal plane of ``image`` (X, Y, Z) that show most of the organs.

    Radiological convention: the patient's right is on the left of the picture, anterior on top of
    the axial and on the left of the sagittal plane, superior on top. However the voxels are
    stored, the picture is the same; an oblique grid is cut along its own axes. The pictures hold
    the labelled region and 30 mm around it, or ``roomy`` times its longest side where that is more. ``window`` holds
    the intensities that become black and white; unless given, the organs decide. Where there is one label map only, it
    is the prediction too.

    Raises InputError where the label maps do not lie on the image's grid.
    """
    part, values, truth, guess = _part(image, grid, reference, prediction or reference, roomy)
    low, high = window or _window(values, truth)
    shown = []
    for name, normal, letters in _VIEWS:
        at = _fullest(truth if truth.any() else guess, normal)
        centre = (np.asarray(part.shape) - 1) / 2
        centre[normal] = at
        across, up = (a for a in range(3) if a != normal)
        cut, true, guessed = (seen(v, normal, at) for v in (values, truth, guess))
        size = (part.spacing[up], part.spacing[across])
        where = float(part.to_world(centre)[normal])
        shown.append(Plane(name, _grey(cut, low, high), true, guessed, size, letters, where))
    return shown[0], shown[1], shown[2]


def _part(
    image: NDArray[Any], grid: Grid, reference: LabelMap, prediction: LabelMap, roomy: float
) -> tuple[Grid, NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The upright grid of what is to be seen, and its intensities and both label maps' numbers (X, Y, Z), which share
    the memory of what was given."""
    for which, labels in (("reference", reference), ("prediction", prediction)):
        if not labels.grid.matches(grid):
            raise InputError(f"the {which} does not lie on the image's grid", "Give maps on the scan's own grid")
    upright = grid.reoriented()
    values, truth, guess = (
        crop(Volume(one[None], grid), upright).values[0] for one in (image, reference.values, prediction.values)
    )
    box = _around(truth, guess, upright.spacing, roomy)
    part = upright.window([one.start or 0 for one in box], values[box].shape)
    return part, values[box], truth[box], guess[box]


def _around(truth: NDArray[Any], guess: NDArray[Any], spacing: Sequence[float], roomy: float) -> tuple[slice, ...]:
    """The part of label maps (X, Y, Z) that holds both foregrounds and a margin; all where there is none."""
    labelled = (truth > 0) | (guess > 0)
    hits = [np.flatnonzero(labelled.any(axis=tuple(b for b in range(3) if b != a))) for a in range(3)]
    if not len(hits[0]):
        return (slice(None),) * 3
    ends = [(int(hit[0]), int(hit[-1]) + 1) for hit in hits]
    margin = max(
        _MARGIN_MM, roomy * max((end - first) * step for (first, end), step in zip(ends, spacing, strict=True))
    )
    room = [math.ceil(margin / step) for step in spacing]
    return tuple(slice(max(first - more, 0), end + more) for (first, end), more in zip(ends, room, strict=True))


def _fullest(labels: NDArray[Any], normal: int) -> int:
    """The plane that shows most of the organs: the sum, over labels, of their area in the plane by
    their largest area in any, so that a small organ weighs as much as a large one."""
    stack = np.moveaxis(labels, normal, 0)
    most = int(labels.max(initial=0)) + 1
    areas = np.stack([np.bincount(plane.ravel(order="K").astype(np.intp), minlength=most)[1:] for plane in stack])
    if not areas.any():
        return len(stack) // 2
    return int(np.argmax((areas / np.maximum(areas.max(axis=0), 1)).sum(axis=1)))


def _window(values: NDArray[Any], labels: NDArray[Any]) -> tuple[float, float]:
    """The intensities that become black and white: the range of the organs and as much on either side, so that
    soft tissue keeps its contrast beside air, bone and metal. Of a large scan some voxels speak for all."""
    step = max(1, math.ceil((values.size / _ENOUGH) ** (1 / 3)))
    some = (slice(None, None, step),) * 3
    known, where = np.nan_to_num(np.asarray(values[some], dtype=np.float32)), labels[some] > 0
    organs = known[where]
    low, high = np.percentile(organs if organs.size >= _FEW else known, (1, 99))
    if organs.size >= _FEW:
        low, high = low - (high - low), high + (high - low)
    return max(float(low), float(known.min())), min(float(high), float(known.max()))


def _grey(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Intensities as grey, from black at ``low`` to white at ``high``."""
    known = np.nan_to_num(np.asarray(values, dtype=np.float32))
    scaled = (known - low) / (high - low) if high > low else np.zeros_like(known)
    return np.asarray(np.rint(np.clip(scaled, 0, 1) * 255), dtype=np.uint8)


def outline(mask: NDArray[np.bool_]) -> str:
    """SVG path of the border of a mask (rows, columns), in half pixels from the upper left corner;
    empty where the mask is. Holes are part of it (fill rule even-odd)."""
    if not mask.any():
        return ""
    from skimage.measure import find_contours

    parts = []
    for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        # On a mask the contour runs between voxel centres: whole numbers, counted in halves.
        points = np.rint(2 * contour - 1).astype(int)[:, ::-1]
        steps = np.diff(points, axis=0)
        turns = np.flatnonzero(np.any(steps[1:] != steps[:-1], axis=1)) + 1
        runs = np.split(steps, turns)
        parts.append(f"M{points[0][0]} {points[0][1]}" + "".join(f"l{x} {y}" for x, y in (r.sum(axis=0) for r in runs)))
    return "z".join(parts) + "z"


def shrunk(grey: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], int]:
    """``grey`` with no side longer than ``side``, by averaging blocks of n x n pixels, and n. The
    last block is filled up with the edge."""
    n = max(math.ceil(max(grey.shape) / side), 1)
    rows, columns = (math.ceil(size / n) for size in grey.shape)
    full = np.pad(grey, ((0, rows * n - grey.shape[0]), (0, columns * n - grey.shape[1])), mode="edge")
    means = full.reshape(rows, n, columns, n).mean(axis=(1, 3))
    return np.asarray(np.rint(means), dtype=np.uint8), n


def png(grey: NDArray[np.uint8]) -> str:
    """A grey picture (rows, columns) as the data URI of an 8-bit PNG."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(grey, tight=True)).decode("ascii")


def png_bytes(picture: NDArray[np.uint8], *, tight: bool = False) -> bytes:
    """A grey picture (rows, columns) or one of colours (rows, columns, 3) as an 8-bit PNG, and nothing beside it.
    ``tight`` takes five times as long to save a twentieth."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG", optimize=tight)
    return data.getvalue()
