"""From where DICOM slices say they are to one grid, or to the reason why there is none.

DICOM gives each slice the position of its first pixel's centre and the directions of its rows and
columns, in millimetres, x to the patient's left and y to the back (LPS; PS3.3 C.7.6.2.1.1). Grids
here are RAS+, so x and y change sign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.io.sources import Source

Float64 = NDArray[np.float64]

# Positions are written with few decimals, so that honest steps vary by some 0.01 mm. A slice this
# close to its place on an even grid is on it, but never by more than a fifth of a step.
EVEN_MM = 0.1
# Slices closer than this are at one position.
_SAME_MM = 0.01
# What moves further sideways than forward is no tilted stack.
_LARGEST_TILT = 45.0
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice as its header describes it: a file, or a frame (from 0) of a multi-frame file.

    ``position`` (3,), ``rows`` and ``columns`` (the unit directions (3,) in which a row and a
    column run) are LPS; ``spacing`` is the distance in mm between columns, between rows; ``size``
    the number of columns, of rows. None where the file does not say.
    """

    source: Source = field(repr=False)
    index: int
    size: tuple[int, int]
    position: Float64 | None
    rows: Float64 | None
    columns: Float64 | None
    spacing: tuple[float, float] | None
    thickness: float | None
    slope: float
    intercept: float

    def at(self, normal: Float64) -> float:
        """Distance along the normal in mm."""
        return float(self.position @ normal) if self.position is not None else float("nan")


@dataclass(frozen=True)
class Stack:
    """Frames in the order of their positions along k, and their grid. ``straight`` is the grid to
    resample onto where the gantry was tilted, so that ``grid`` is sheared."""

    frames: tuple[Frame, ...]
    grid: Grid
    straight: Grid | None
    notes: tuple[str, ...]


def arrange(frames: Sequence[Frame], *, own_slopes: bool = False) -> Stack:
    """Order slices along their normal, and find their grid.

    ``own_slopes``: each slice may have its own rescale slope (PET, where all come to the same unit).

    Raises InputError, with positions in mm along the normal, where a slice does not say where it
    is, and for slices of several sizes, pixel spacings, orientations or slopes, two at one
    position, missing ones, uneven steps, and slices shifted sideways.
    """
    where = _located(frames)
    plane = _majority(where, lambda f: tuple(np.round(np.r_[f.rows, f.columns], 3)))  # type: ignore[arg-type]
    rows, columns = np.asarray(plane.rows), np.asarray(plane.columns)
    normal = np.cross(rows, columns)
    normal /= np.linalg.norm(normal)
    where.sort(key=lambda f: f.at(normal))
    _alike(where, normal, plane, own_slopes)
    spacing = np.asarray(plane.spacing)
    along = np.array([f.at(normal) for f in where])
    _steps(along)
    step, notes = _step(where, normal, along)
    lateral = step - normal * (normal @ step)
    count = len(where)
    first = np.asarray(where[0].position)
    shape = (*plane.size, count)
    directions = np.stack([rows * spacing[0], columns * spacing[1]], axis=1)
    if np.linalg.norm(lateral) * (count - 1) <= max(EVEN_MM, 0.1 * spacing.min()):
        return Stack(tuple(where), _grid(shape, directions, normal * (normal @ step), first), None, notes)
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(lateral), normal @ step)))
    if tilt > _LARGEST_TILT:
        raise InputError(
            f"each slice lies {np.linalg.norm(lateral):.2f} mm beside the one before it, {normal @ step:.2f} mm on",
            "These are no parallel slices of one volume; choose another series",
        )
    # Slice k lies k * drift pixels off, along columns and rows.
    drift = np.array([lateral @ rows, lateral @ columns]) / spacing
    ends = np.floor(np.minimum(drift * (count - 1), 0)), np.ceil(np.maximum(drift * (count - 1), 0))
    grown = np.asarray(plane.size) + (ends[1] - ends[0]).astype(int)
    straight = _grid((*grown, count), directions, normal * (normal @ step), first + directions @ ends[0])
    note = f"the gantry was tilted by {tilt:.1f} degrees; the slices were resampled onto a straight grid"
    return Stack(tuple(where), _grid(shape, directions, step, first), straight, (*notes, note))


def _grid(shape: Sequence[int], directions: Float64, step: Float64, first: Float64) -> Grid:
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2], affine[:3, 3] = directions, step, first
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), _LPS_TO_RAS @ affine)


def _located(frames: Sequence[Frame]) -> list[Frame]:
    """The frames, all of which say where they are."""
    for what, missing in (
        ("where it is (Image Position)", [f for f in frames if f.position is None]),
        ("how it lies (Image Orientation)", [f for f in frames if f.rows is None]),
        ("how large its pixels are (Pixel Spacing)", [f for f in frames if f.spacing is None]),
    ):
        if missing:
            raise InputError(
                f"{len(missing)} of {len(frames)} slices: the file does not say {what}",
                "Export the series again with its geometry; it is not made up here",
            )
    for frame in frames:
        rows, columns = np.asarray(frame.rows), np.asarray(frame.columns)
        lengths = np.linalg.norm(rows), np.linalg.norm(columns)
        if max(abs(n - 1) for n in lengths) > 1e-3 or abs(rows @ columns) > 1e-3:
            raise InputError(
                "Image Orientation does not hold two perpendicular unit vectors", "Export the series again"
            )
    return list(frames)


def _majority(frames: Sequence[Frame], key: Callable[[Frame], Hashable]) -> Frame:
    common = Counter(key(f) for f in frames).most_common(1)[0][0]
    return next(f for f in frames if key(f) == common)


def _alike(frames: Sequence[Frame], normal: Float64, plane: Frame, own_slopes: bool) -> None:
    """Refuse slices that differ in more than their position."""
    size = _majority(frames, lambda f: f.size).size
    _refuse(frames, normal, lambda f: f.size != size, f"have another size than {size[0]}x{size[1]} pixels")
    reach = np.asarray(size, dtype=float)
    spacing = np.asarray(plane.spacing)

    def corner(f: Frame, which: str) -> float:
        """How far the slice's last pixel would be off with its own spacing or directions, in mm."""
        own = np.asarray(f.spacing) if which == "spacing" else spacing
        directions = (f.rows, f.columns) if which == "directions" else (plane.rows, plane.columns)
        shift = [
            np.linalg.norm(np.asarray(d) * o - np.asarray(p) * s) * n
            for d, p, o, s, n in zip(directions, (plane.rows, plane.columns), own, spacing, reach, strict=True)
        ]
        return float(max(shift))

    _refuse(frames, normal, lambda f: corner(f, "directions") > EVEN_MM, "have another orientation than the rest")
    _refuse(
        frames,
        normal,
        lambda f: corner(f, "spacing") > EVEN_MM,
        f"have another pixel spacing than {spacing[0]:.4g}x{spacing[1]:.4g} mm",
    )
    if not own_slopes:
        scale = _majority(frames, lambda f: (f.slope, f.intercept))
        _refuse(
            frames,
            normal,
            lambda f: (f.slope, f.intercept) != (scale.slope, scale.intercept),
            f"have another rescale slope or intercept than {scale.slope:g}, {scale.intercept:g}",
        )


def _refuse(frames: Sequence[Frame], normal: Float64, odd: Callable[[Frame], bool], fault: str) -> None:
    strange = [f.at(normal) for f in frames if odd(f)]
    if strange:
        raise InputError(
            f"{len(strange)} of {len(frames)} slices {fault}: at {_mm(strange)}",
            "Take these slices out, or export them as a series of their own",
        )


def _steps(along: Float64) -> None:
    """Refuse positions (n,), ascending, that are not evenly apart."""
    if len(along) < 2:
        return
    steps = np.diff(along)
    if (double := along[1:][steps < _SAME_MM]).size:
        raise InputError(
            f"two slices lie at one position: at {_mm(double)}", "Remove copies; split what was scanned twice"
        )
    usual = float(np.median(steps))
    leeway = min(EVEN_MM, 0.2 * usual)
    if np.abs(along - np.linspace(along[0], along[-1], len(along))).max() <= leeway:
        return
    times = np.rint(steps / usual)
    if (np.abs(steps - times * usual) <= leeway).all() and times.min() >= 1:
        gaps = [
            f"{times[i] - 1:.0f} between {along[i]:.2f} and {along[i + 1]:.2f} mm" for i in np.flatnonzero(times > 1)
        ]
        raise InputError(
            f"slices are missing, the others being {usual:.4g} mm apart: {_some(gaps)}", "Export the whole series again"
        )
    changes = np.flatnonzero(np.abs(np.diff(steps)) > leeway) + 1
    runs = [f"{steps[i]:.4g} mm from {along[i]:.2f} mm" for i in (0, *changes)]
    raise InputError(f"the slices are unevenly spaced: steps of {_some(runs)}", "Export a series with even steps")


def _step(frames: Sequence[Frame], normal: Float64, along: Float64) -> tuple[Float64, tuple[str, ...]]:
    """The vector from slice to slice (mm, LPS), and what to say of it."""
    positions = np.stack([np.asarray(f.position) for f in frames])
    count = len(frames)
    if count == 1:
        thickness = frames[0].thickness
        if thickness is None:
            raise InputError("a single slice that does not say how thick it is", "Export the whole series")
        return normal * thickness, (f"a single slice, {thickness:g} mm thick",)
    step = (positions[-1] - positions[0]) / (count - 1)
    off = np.linalg.norm(positions - positions[0] - np.arange(count)[:, None] * step, axis=1)
    if off.max() > 2 * EVEN_MM:
        strange = along[off > 2 * EVEN_MM]
        raise InputError(
            f"{len(strange)} of {count} slices are shifted sideways by up to {off.max():.2f} mm: at {_mm(strange)}",
            "They are not of one volume; export them as series of their own",
        )
    return step, ()


def _mm(values: Any) -> str:
    return _some([f"{v:.2f}" for v in values]) + " mm"


def _some(words: Sequence[str], most: int = 6) -> str:
    return ", ".join(words[:most]) + (f", ... ({len(words)} in all)" if len(words) > most else "")
