"""The DICOM series that labels belong to: its slices' headers, and the grid that they lie on."""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from medseg.core.errors import InputError
from medseg.core.grid import SAME_GRID_MM, Grid
from medseg.core.resample import resample
from medseg.core.volume import LabelMap

# DICOM measures towards the patient's left and back (LPS), medseg towards right and front (RAS).
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_RAS = LPS[:3, :3]
_OTHER_SERIES = "Name the folder of the one series that the labels were drawn on"


@dataclass(frozen=True, eq=False)
class Reference:
    """One series: the datasets of its slices in the order of the grid's third axis, or one enhanced
    multi-frame dataset with the ``frames`` (counted from 0) that stand for those slices.

    The grid's first axis runs along the pixel rows (column index), the second down the columns
    (row index), the third along their cross product.
    """

    datasets: tuple[Dataset, ...]
    grid: Grid
    frames: tuple[int, ...] = ()

    @property
    def first(self) -> Dataset:
        return self.datasets[0]

    def slices_of(self, label_map: LabelMap) -> NDArray[Any]:
        """Labels (slices, rows, columns) of the series, from a map on its grid, flipped or permuted
        as it may be. Raises InputError, with the distance in mm, for a map on another grid."""
        there = _settled(label_map.grid, self.grid)
        if there is None:
            raise InputError(
                f"the label map does not lie on the grid of the series: {_apart(label_map.grid, self.grid)}",
                "Name the series that it was drawn on; labels are not moved to another grid here",
            )
        moved = resample(LabelMap(label_map.values, there, label_map.labels), self.grid)
        return moved.values.transpose(2, 1, 0)


def read_reference(sources: Sequence[Dataset | Path]) -> Reference:
    """The headers of a series, from datasets or files (pixels are not read), and its grid.

    Slices are ordered by position. Raises InputError where files are no DICOM images, belong to
    several series, do not say where they are, or are not evenly stacked.
    """
    datasets = [_header(source) for source in sources]
    if not datasets:
        raise InputError("the series has no images", _OTHER_SERIES)
    for keyword, what in (("StudyInstanceUID", "study"), ("SeriesInstanceUID", "series"), ("SOPClassUID", "kind")):
        if len({str(d.get(keyword, "")) for d in datasets}) > 1:
            raise InputError(f"the images are of more than one {what}", _OTHER_SERIES)
    if len({str(d.get("FrameOfReferenceUID", "")) for d in datasets}) > 1:
        raise InputError("the images have more than one frame of reference", _OTHER_SERIES)
    if "PerFrameFunctionalGroupsSequence" in datasets[0]:
        if len(datasets) > 1:
            raise InputError("the series has several multi-frame images", "Name one of them")
        frames = plane_of_frames(datasets[0])
        grid, order = stack(frames, int(datasets[0].Rows), int(datasets[0].Columns))
        return Reference((datasets[0],), grid, tuple(order))
    if len({(d.get("Rows"), d.get("Columns")) for d in datasets}) > 1:
        raise InputError("the images of the series have different sizes", _OTHER_SERIES)
    grid, order = stack([_plane_of(d) for d in datasets], int(datasets[0].Rows), int(datasets[0].Columns))
    return Reference(tuple(datasets[i] for i in order), grid)


@dataclass(frozen=True)
class Plane:
    """Where a frame lies: ImagePositionPatient (mm, LPS), ImageOrientationPatient, PixelSpacing (mm
    between rows, mm between columns), and the distance to the next slice in mm where it is said."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    step: float | None = None

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def depth(self) -> float:
        """Position along the normal in mm."""
        return float(np.dot(self.position, self.normal))


def stack(planes: Sequence[Plane], rows: int, columns: int) -> tuple[Grid, list[int]]:
    """The grid of evenly stacked planes, and their order along its third axis.

    Planes that shift sideways by the same amount each make a sheared grid. Raises InputError for
    planes that are not parallel, lie at one place, or have uneven steps (with the steps in mm).
    """
    require_parallel(planes)
    order = sorted(range(len(planes)), key=lambda i: planes[i].depth)
    positions = np.array([planes[i].position for i in order])
    if len(planes) == 1:
        step = planes[0].normal * _thickness(planes[0])
    else:
        step = (positions[-1] - positions[0]) / (len(planes) - 1)
        steps = np.diff([planes[i].depth for i in order])
        if steps.min() < SAME_GRID_MM:
            raise InputError("the series has two images at one position", _OTHER_SERIES)
        wrong = np.linalg.norm(positions - positions[0] - np.arange(len(planes))[:, None] * step, axis=1).max()
        if wrong > SAME_GRID_MM:
            raise InputError(
                f"the series is not evenly stacked (steps of {steps.min():.4g} to {steps.max():.4g} mm)",
                "Labels belong to an evenly stacked series; look for missing slices",
            )
    return frame_grid(planes[order[0]], step, (columns, rows, len(planes))), order


def require_parallel(planes: Sequence[Plane]) -> None:
    """InputError unless all planes have the same orientation and pixel spacing, and sound ones."""
    first = planes[0]
    for plane in planes:
        u, v = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
        if max(abs(np.linalg.norm(u) - 1), abs(np.linalg.norm(v) - 1), abs(u @ v)) > 1e-3:
            raise InputError("an image has an invalid orientation", "Its direction cosines must be unit and square")
        if np.abs(np.subtract(plane.orientation, first.orientation)).max() > 1e-4:
            raise InputError("the images are not parallel", _OTHER_SERIES)
        if np.abs(np.subtract(plane.spacing, first.spacing)).max() > 1e-4 * max(first.spacing):
            raise InputError("the images have different pixel spacings", _OTHER_SERIES)


def frame_grid(first: Plane, step: NDArray[np.float64], shape: tuple[int, int, int]) -> Grid:
    """The grid of (columns, rows, slices) voxels whose first slice is ``first``, the others
    following by ``step`` (mm, LPS)."""
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * first.spacing[1]
    affine[:3, 1] = np.array(first.orientation[3:]) * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    return Grid(shape, LPS @ affine)


def settled(source: Grid, onto: Grid) -> Grid:
    """``source`` with its jitter removed: its voxels exactly on those of ``onto``'s lattice.

    Raises InputError, with the distance in mm, where a voxel would move by more than
    `SAME_GRID_MM`. The lattice reaches beyond ``onto`` on all sides.
    """
    there = _settled(source, onto, beyond=True)
    if there is None:
        raise InputError(
            f"the labels do not lie on the grid of the scan: {_apart(source, onto)}",
            "Name the scan that they were drawn on",
        )
    return there


def _settled(source: Grid, onto: Grid, beyond: bool = False) -> Grid | None:
    matrix = np.linalg.inv(onto.affine) @ source.affine
    whole = np.rint(matrix)
    if not (np.abs(whole[:3, :3]).sum(axis=0) == 1).all() or not (np.abs(whole[:3, :3]).sum(axis=1) == 1).all():
        return None
    exact = Grid(source.shape, onto.affine @ whole)
    if not exact.matches(source):
        return None
    corners = np.sort(np.rint(onto.to_index(exact.corners())), axis=0)
    whole_grid = (corners[0] == 0).all() and (corners[-1] == np.array(onto.shape) - 1).all()
    return exact if beyond or whole_grid else None


def _apart(one: Grid, other: Grid) -> str:
    """How two grids differ, in words."""
    best = min(
        (_flipped(one, axes, signs).distance(other) for axes in itertools.permutations(range(3)) for signs in _SIGNS),
    )
    if np.isfinite(best):
        return f"their corners are {best:.3g} mm apart"
    centres = [g.to_world((np.array(g.shape) - 1) / 2) for g in (one, other)]
    size, spacing = (
        " and ".join("x".join(f"{n:.4g}" for n in value) for value in values)
        for values in ((one.shape, other.shape), (one.spacing, other.spacing))
    )
    distance = float(np.linalg.norm(centres[0] - centres[1]))
    return f"{size} voxels of {spacing} mm, their centres {distance:.3g} mm apart"


_SIGNS = tuple(itertools.product((1, -1), repeat=3))


def _flipped(grid: Grid, axes: tuple[int, ...], signs: tuple[int, ...]) -> Grid:
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, (old, sign) in enumerate(zip(axes, signs, strict=True)):
        matrix[old, new] = sign
        matrix[old, 3] = 0 if sign > 0 else grid.shape[old] - 1
    shape = tuple(grid.shape[a] for a in axes)
    return Grid((shape[0], shape[1], shape[2]), grid.affine @ matrix)


def plane_of_frames(dataset: Dataset) -> list[Plane]:
    """Where each frame of an enhanced multi-frame object lies, from its own functional groups or
    the shared ones. Raises InputError where one of the three macros is missing."""
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), Dataset())
    planes = []
    for frame in dataset.get("PerFrameFunctionalGroupsSequence") or []:
        position = _macro(frame, shared, "PlanePositionSequence")
        orientation = _macro(frame, shared, "PlaneOrientationSequence")
        measures = _macro(frame, shared, "PixelMeasuresSequence")
        planes.append(_plane(position, orientation, measures))
    return planes


def _macro(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    found = frame.get(keyword) or shared.get(keyword)
    if not found:
        raise InputError(f"the object does not say where its frames are ({keyword} is missing)", _OTHER_SERIES)
    return found[0]


def _plane_of(dataset: Dataset) -> Plane:
    return _plane(dataset, dataset, dataset)


def _plane(position: Dataset, orientation: Dataset, measures: Dataset) -> Plane:
    place = _numbers(position, "ImagePositionPatient", 3)
    direction = _numbers(orientation, "ImageOrientationPatient", 6)
    spacing = _numbers(measures, "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise InputError("an image has a pixel spacing that is not above zero", _OTHER_SERIES)
    step = None
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        if step is None and measures.get(keyword):
            step = abs(float(measures[keyword].value)) or None
    return Plane(place, direction, spacing, step)


def _numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in dataset[keyword].value)
    except (KeyError, TypeError, ValueError):
        values = ()
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"an image does not say where it is ({keyword} is missing or broken)", _OTHER_SERIES)
    return values


def _thickness(plane: Plane) -> float:
    if plane.step is None:
        raise InputError("the one image of the series does not say how thick it is", _OTHER_SERIES)
    return plane.step


def _header(source: Dataset | Path) -> Dataset:
    dataset = source if isinstance(source, Dataset) else read_dataset(source, stop_before_pixels=True)
    missing = [k for k in ("SOPInstanceUID", "SOPClassUID", "Rows", "Columns") if not dataset.get(k)]
    if missing:
        raise InputError(f"a file of the series is no image ({missing[0]} is missing)", _OTHER_SERIES)
    return dataset


def read_dataset(path: Path, *, stop_before_pixels: bool = False) -> Dataset:
    """A DICOM file. Raises InputError where it is missing or none; the text holds no value of it."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing", "Name a file that is there") from None
    except InvalidDicomError:
        raise InputError(f"{path.name} is not a DICOM file", "Name a DICOM file") from None
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror})", "Name a file that can be read") from None
    except Exception as error:  # noqa: BLE001 pydicom raises what a broken file happens to meet
        raise InputError(
            f"{path.name} is a broken DICOM file ({type(error).__name__})", "Export the file again"
        ) from None


def series_number(source: Dataset) -> int:
    """For a series made from another: far from the scanner's numbers, and telling which."""
    return 1000 + int(source.get("SeriesNumber") or 0) % 1000


def uid_of(*parts: str | bytes) -> UID:
    """A UID (2.25, from a UUID) that depends on nothing but the parts."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "big") + data)
    return UID(f"2.25.{uuid.UUID(bytes=hashed.digest()[:16], version=5).int}")
