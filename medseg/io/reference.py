"""The DICOM series that labels belong to: its slices' headers, and the grid that they lie on."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from medseg.core.errors import InputError, MedsegError
from medseg.core.grid import Grid
from medseg.core.resample import resample
from medseg.core.volume import LabelMap
from medseg.io.dicom import Series, read_headers
from medseg.io.dicom_grid import Stack, arrange
from medseg.io.dicom_header import items_of, quiet
from medseg.io.dicom_limits import require_sound_deflation
from medseg.io.nifti import turned
from medseg.io.sources import Source

# DICOM measures towards the patient's left and back (LPS), medseg towards right and front (RAS).
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_OTHER_SERIES = "Name the folder of the one series that the labels were drawn on"


@dataclass(frozen=True, eq=False)
class Reference:
    """One series: the datasets of its slices in the order of the grid's third axis, or one enhanced
    multi-frame dataset with the ``frames`` (counted from 0) that stand for those slices.

    The grid's first axis runs along the pixel rows (column index), the second down the columns
    (row index), the third along their cross product. ``straight`` is the grid that a tilted series
    was read onto; its slices are the same, moved sideways.
    """

    datasets: tuple[Dataset, ...]
    grid: Grid
    frames: tuple[int, ...] = ()
    straight: Grid | None = None

    @property
    def first(self) -> Dataset:
        return self.datasets[0]

    def slices_of(self, label_map: LabelMap) -> NDArray[Any]:
        """Labels (slices, rows, columns; C-contiguous) of the series, from a map on its grid, flipped or permuted
        as it may be. Raises InputError, with the distance in mm, for a map on another grid.

        A map on the straight grid of a tilted series is moved onto the slices, by less than a voxel.
        """
        there = _settled(label_map.grid, self.grid)
        if there is None and self.straight is not None:
            there = _settled(label_map.grid, self.straight)
        if there is None:
            raise InputError(
                f"the label map does not lie on the grid of the series: {_apart(label_map.grid, self.grid)}",
                "Name the series that it was drawn on; labels are not moved to another grid here",
            )
        moved = resample(LabelMap(label_map.values, there, label_map.labels), self.grid)
        if moved.values.flags.c_contiguous:
            return np.concatenate(list(turned(moved.values)))
        return np.ascontiguousarray(moved.values.transpose(2, 1, 0))


@quiet()
def reference_of(series: Series) -> Reference:
    """What `find_series` found, as a series that labels belong to. Raises InputError for a series
    that is not usable, and for one of several multi-frame files."""
    if series.problem is not None or series.stack is None:
        raise series.problem or InputError("the series has no slices", _OTHER_SERIES)
    return _reference(series.stack, read_headers(series))


@quiet()
def read_reference(sources: Sequence[Dataset | Path]) -> Reference:
    """The headers of a series, from datasets or files (pixels are not read), and its grid.

    Slices are ordered by position. Raises InputError where files are no DICOM images or belong to
    several series, and as `arrange` does where they make no volume.
    """
    datasets = [_header(source) for source in sources]
    if not datasets:
        raise InputError("the series has no images", _OTHER_SERIES)
    for keyword, what in (("StudyInstanceUID", "study"), ("SeriesInstanceUID", "series"), ("SOPClassUID", "kind")):
        if len({str(d.get(keyword, "")) for d in datasets}) > 1:
            raise InputError(f"the images are of more than one {what}", _OTHER_SERIES)
    if len({str(d.get("FrameOfReferenceUID", "")) for d in datasets}) > 1:
        raise InputError("the images have more than one frame of reference", _OTHER_SERIES)
    places = {Source(Path(str(n))): dataset for n, dataset in enumerate(datasets)}
    frames = [item.frame for place, dataset in places.items() for item in items_of(dataset, place, ())]
    stack = arrange(frames, own_slopes=True)
    return _reference(stack, [places[place] for place in dict.fromkeys(f.source for f in stack.frames)])


def _reference(stack: Stack, datasets: Sequence[Dataset]) -> Reference:
    many = "PerFrameFunctionalGroupsSequence" in datasets[0]
    if many and len(datasets) > 1:
        raise InputError("the series has several multi-frame files", "Name one of them")
    frames = tuple(f.index for f in stack.frames) if many else ()
    return Reference(tuple(datasets), stack.grid, frames, stack.straight)


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


def _header(source: Dataset | Path) -> Dataset:
    dataset = source if isinstance(source, Dataset) else read_dataset(source, stop_before_pixels=True)
    missing = [k for k in ("SOPInstanceUID", "SOPClassUID", "Rows", "Columns") if not dataset.get(k)]
    if missing:
        raise InputError(f"a file of the series is no image ({missing[0]} is missing)", _OTHER_SERIES)
    return dataset


def read_dataset(path: Path, *, stop_before_pixels: bool = False) -> Dataset:
    """A DICOM file. Raises InputError where it is missing or none; the text holds no value of it."""
    try:
        with quiet(), path.open("rb") as file:
            require_sound_deflation(file)
            return pydicom.dcmread(file, stop_before_pixels=stop_before_pixels)
    except InputError:
        raise
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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """InputErrors name the file; what else a damaged object leads to becomes one that quotes nothing."""
    try:
        yield
    except InputError as error:
        raise InputError(f"in {path.name} {error.fault}", error.remedy) from None
    except (MedsegError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 pydicom reads values when they are used, and then meets anything
        raise InputError(f"{path.name} is a broken object ({type(error).__name__})", "Export it again") from None


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
