"""Numbers and label maps as pictures: strips of points, curves, and planes through a scan.

A picture is described here and drawn as SVG by the template: positions come in percent of the
drawing, so that it stretches with the page, takes the page's colours and prints sharply. Only the
grey values of a scan become an image (PNG); what is outlined on it stays a path.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.look import seen
from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume

# A strip as wide as on a common screen (px), on which points of this radius must not overlap.
_STRIP_WIDTH, _RADIUS = 640, 3.5
_LANES = (0.0, 5.0, -5.0, 10.0, -10.0)
_CURVE_POINTS = 300
# What surrounds the organs in a picture, in mm: enough to know the place.
_MARGIN_MM = 30.0
_VIEWS = (("axial", 2, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 0, "APSI"))


@dataclass(frozen=True)
class Axis:
    """A range of values and the round numbers written along it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def percent(self, value: float) -> float:
        """Where a value lies between low (0) and high (100); what lies beyond stays at the end."""
        return round(min(max(100 * (value - self.low) / (self.high - self.low), 0.0), 100.0), 2)


def axis(values: Iterable[float], *, low: float | None = None, high: float | None = None, count: int = 5) -> Axis:
    """An axis of about ``count`` round steps (1, 2 or 5 times a power of ten) that holds all
    ``values``; ``low`` and ``high`` widen it, and are kept where they are round."""
    known = [v for v in (*values, low, high) if v is not None and math.isfinite(v)] or [0.0, 1.0]
    first, last = min(known), max(known)
    if last - first < 1e-9 * max(abs(first), abs(last), 1e-9):
        last = first + (abs(first) or 1.0)
    rough = (last - first) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    start, stop = math.floor(first / step + 1e-9), math.ceil(last / step - 1e-9)
    ticks = tuple(float(f"{n * step:.10g}") for n in range(start, stop + 1))
    return Axis(ticks[0], ticks[-1], ticks)


@dataclass(frozen=True)
class Dot:
    """One point: ``x`` in percent of the axis, ``y`` in px from the middle, and what it stands for."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Strip:
    """Every value as a point over a box (quartiles, median) with whiskers, all in percent.

    The whiskers reach to the outermost value within 1.5 box lengths of the box (Tukey 1977).
    """

    dots: tuple[Dot, ...]
    whisker_low: float
    quartile_low: float
    median: float
    quartile_high: float
    whisker_high: float


def strip(values: Sequence[tuple[str, float]], along: Axis) -> Strip | None:
    """The strip of (text, value) pairs on an axis; None where there is no value.

    Points are moved sideways until they no longer cover each other, as far as there is room. The
    same values always give the same places.
    """
    if not values:
        return None
    numbers = np.array([v for _, v in values])
    q1, median, q3 = (float(q) for q in np.percentile(numbers, (25, 50, 75)))
    reach = 1.5 * (q3 - q1)
    inner = numbers[(numbers >= q1 - reach) & (numbers <= q3 + reach)]
    dots, taken = [], [-math.inf] * len(_LANES)
    for text, value in sorted(values, key=lambda pair: (pair[1], pair[0])):
        x = along.percent(value)
        left = x / 100 * _STRIP_WIDTH
        lane = next((n for n, last in enumerate(taken) if left - last >= 2 * _RADIUS), int(np.argmin(taken)))
        taken[lane] = left
        dots.append(Dot(x, _LANES[lane], text))
    ends = (float(inner.min()), q1, median, q3, float(inner.max()))
    return Strip(tuple(dots), *(along.percent(v) for v in ends))


def thinned(points: Sequence[tuple[float, float]], most: int = _CURVE_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points (x, y): means of neighbours. Values that are not finite are left out."""
    finite = np.array([p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]).reshape(-1, 2)
    groups = np.array_split(finite, min(most, max(len(finite), 1)))
    return [(float(g[:, 0].mean()), float(g[:, 1].mean())) for g in groups if len(g)]


def line(points: Sequence[tuple[float, float]], across: Axis, up: Axis) -> str:
    """SVG path of a curve through points (x, y), in percent from the upper left corner."""
    return "M" + "L".join(f"{across.percent(x):g} {round(100 - up.percent(y), 2):g}" for x, y in points)


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


def planes(image: NDArray[Any], grid: Grid, reference: LabelMap, prediction: LabelMap) -> tuple[Plane, Plane, Plane]:
    """The axial, coronal and sagittal plane of ``image`` (X, Y, Z) that show most of the organs.

    Radiological convention: the patient's right is on the left of the picture, anterior on top of
    the axial and on the left of the sagittal plane, superior on top. However the voxels are
    stored, the picture is the same; an oblique grid is cut along its own axes. The pictures hold
    the labelled region and 30 mm around it.

    Raises InputError where the label maps do not lie on the image's grid.
    """
    for which, labels in (("reference", reference), ("prediction", prediction)):
        if not labels.grid.matches(grid):
            raise InputError(f"the {which} does not lie on the image's grid", "Give maps on the scan's own grid")
    upright = grid.reoriented()
    window = _around(resample(reference, upright), resample(prediction, upright), upright)
    truth, guess = resample(reference, window).values, resample(prediction, window).values
    values = resample(Volume(image[None], grid), window).values[0]
    grey = _grey(values, truth)
    shown = []
    for name, normal, letters in _VIEWS:
        at = _fullest(truth if truth.any() else guess, normal)
        centre = (np.asarray(window.shape) - 1) / 2
        centre[normal] = at
        across, up = (a for a in range(3) if a != normal)
        cut, true, guessed = (seen(v, normal, at) for v in (grey, truth, guess))
        size = (window.spacing[up], window.spacing[across])
        shown.append(Plane(name, cut, true, guessed, size, letters, float(window.to_world(centre)[normal])))
    return shown[0], shown[1], shown[2]


def _around(reference: LabelMap, prediction: LabelMap, grid: Grid) -> Grid:
    """The part of ``grid`` that holds both foregrounds and a margin; all of it where there is none."""
    labelled = (reference.values > 0) | (prediction.values > 0)
    if not labelled.any():
        return grid
    start, shape = [], []
    for a in range(3):
        hit = np.flatnonzero(labelled.any(axis=tuple(b for b in range(3) if b != a)))
        margin = math.ceil(_MARGIN_MM / grid.spacing[a])
        first, end = max(int(hit[0]) - margin, 0), min(int(hit[-1]) + 1 + margin, grid.shape[a])
        start.append(first)
        shape.append(end - first)
    return grid.window(start, (shape[0], shape[1], shape[2]))


def _fullest(labels: NDArray[Any], normal: int) -> int:
    """The plane that shows most of the organs: the sum, over labels, of their area in the plane by
    their largest area in any, so that a small organ weighs as much as a large one."""
    stack = np.moveaxis(labels, normal, 0)
    most = int(labels.max(initial=0)) + 1
    areas = np.stack([np.bincount(plane.ravel().astype(np.intp), minlength=most)[1:] for plane in stack])
    if not areas.any():
        return len(stack) // 2
    return int(np.argmax((areas / np.maximum(areas.max(axis=0), 1)).sum(axis=1)))


def _grey(values: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Intensities as grey: the range of the organs and as much on either side, so that soft tissue
    keeps its contrast beside air, bone and metal."""
    known = np.nan_to_num(np.asarray(values, dtype=np.float32))
    organs = known[labels > 0]
    low, high = np.percentile(organs if organs.size else known, (1, 99))
    if organs.size:
        low, high = low - (high - low), high + (high - low)
    low, high = max(float(low), float(known.min())), min(float(high), float(known.max()))
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
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(grey).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")
