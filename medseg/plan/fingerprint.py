"""What the data look like: sizes, spacings, intensities, label volumes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import cc3d
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.progress import Progress, silent
from medseg.core.provenance import digest
from medseg.core.shape import cut, pieces
from medseg.core.volume import LabelMap, Volume
from medseg.dataset.task import Case, Task, load_case
from medseg.io.files import read_json
from medseg.plan.plan import Count, Finite, Millimetres, Share, Strict, Three

# Voxels per case and channel that intensity statistics stand on; nnU-Net takes as many.
_SAMPLES = 10_000
# Percentiles of a whole scan's intensities that are kept, and about how many voxels they stand on.
PERCENTILES = (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0)
_SCAN_SAMPLES = 50_000
# The axis along which each letter of an orientation points.
_AXES = {"L": "x", "R": "x", "P": "y", "A": "y", "I": "z", "S": "z"}
Shares = tuple[float, float, float]


class ChannelPrint(Strict):
    """The intensities of one channel of a whole scan: its `PERCENTILES`, and the share of voxels
    that are zero and below zero."""

    percentiles: tuple[Finite, Finite, Finite, Finite, Finite, Finite, Finite]
    zero_share: Share
    negative_share: Share


class LabelPlace(Strict):
    """Where a label lies in a scan: its centre of mass and the size of its bounding box, as shares of
    the field of view along x, y, z (from left to right, back to front, foot to head)."""

    centre: tuple[Share, Share, Share]
    extent: tuple[Share, Share, Share]


class CasePrint(Strict):
    """One case, axes turned to run along x, y, z: voxels, those of the box that holds all that is not
    zero, spacing in mm, where the file's own axes pointed ("LPS"), label volumes in mm3, places and
    far-apart pieces by number, labels that the scan's border cuts, the whole scan's intensities by
    channel, and a hash of its image."""

    id: str
    shape: Three
    box: Three
    spacing: tuple[Millimetres, Millimetres, Millimetres]
    orientation: str
    label_mm3: dict[int, Finite]
    label_places: dict[int, LabelPlace]
    label_pieces: dict[int, Count]
    label_cut: tuple[int, ...]
    channels: tuple[ChannelPrint, ...]
    nonzero_share: Finite
    image_hash: str


class Intensities(Strict):
    """A channel's intensities within the foreground of all training cases."""

    channel: str
    mean: Finite
    std: Finite
    percentile_00_5: Finite
    percentile_99_5: Finite
    minimum: Finite
    maximum: Finite


Told = Annotated[str, Field(max_length=300)]


class Source(Strict):
    """Where the data come from, as their owner says it in ``dataset.json``; empty where it is silent."""

    description: Told = ""
    licence: Told = ""
    reference: Told = ""
    release: Told = ""


class Fingerprint(Strict):
    """What was measured of a task, and where it comes from."""

    format: Literal[3] = 3
    task: str
    cases: tuple[CasePrint, ...]
    intensities: tuple[Intensities, ...]
    source: Source | None = None

    @property
    def shapes(self) -> NDArray[np.float64]:
        """(cases, 3) voxels."""
        return np.array([c.shape for c in self.cases], dtype=np.float64)

    @property
    def boxes(self) -> NDArray[np.float64]:
        """(cases, 3) voxels: what is left of a scan once its empty surroundings are cut away."""
        return np.array([c.box for c in self.cases], dtype=np.float64)

    @property
    def spacings(self) -> NDArray[np.float64]:
        """(cases, 3) mm."""
        return np.array([c.spacing for c in self.cases])

    def shapes_at(self, spacing: tuple[float, float, float]) -> NDArray[np.float64]:
        """(cases, 3) voxels of the boxes at a spacing in mm."""
        return np.maximum(self.boxes * self.spacings / np.array(spacing), 1)

    def typical_shape(self, spacing: tuple[float, float, float]) -> NDArray[np.float64]:
        """(3,) voxels: the median of the boxes at a spacing."""
        return np.asarray(np.median(self.shapes_at(spacing), axis=0))

    @property
    def duplicates(self) -> dict[str, str]:
        """For each case whose image equals an earlier one's, that earlier case."""
        first: dict[str, str] = {}
        found = {}
        for case in self.cases:
            if first.setdefault(case.image_hash, case.id) != case.id:
                found[case.id] = first[case.image_hash]
        return found

    def digest(self) -> str:
        """SHA-256 of the measurements."""
        return digest(self.model_dump(mode="json", exclude={"source"}))


def fingerprint(task: Task, *, progress: Progress = silent) -> Fingerprint:
    """Measure every training case. Raises InputError for the first one that is not sound, and where
    no case has a labelled voxel."""
    with ThreadPoolExecutor(max(1, min(8, len(os.sched_getaffinity(0))))) as pool:
        measured = pool.map(lambda case: _measure(task, case), task.cases)
        rows = list(progress(measured, len(task.cases)))
    if not any(row.label_mm3 for row, _ in rows):
        raise InputError(f"the label maps of {task.name} are all empty", "Add cases in which something is outlined")
    intensities = []
    for number, channel in enumerate(task.channels):
        values = np.concatenate([samples[number] for _, samples in rows])
        low, high = np.percentile(values, (0.5, 99.5))
        intensities.append(
            Intensities(
                channel=channel,
                mean=float(values.mean()),
                std=float(values.std()),
                percentile_00_5=float(low),
                percentile_99_5=float(high),
                minimum=float(values.min()),
                maximum=float(values.max()),
            )
        )
    return Fingerprint(
        task=task.name,
        cases=tuple(row for row, _ in rows),
        intensities=tuple(intensities),
        source=Source(
            description=task.description, licence=task.licence, reference=task.reference, release=task.release
        ),
    )


def read_fingerprint(path: Path) -> Fingerprint:
    """The fingerprint in a file. Raises InputError where it is missing or of another format."""
    found = read_json(path, "Make it with `medseg plan`")
    try:
        return Fingerprint.model_validate(found)
    except ValidationError:
        raise InputError(f"{path} has another format", "Plan anew") from None


def image_hash(volume: Volume) -> str:
    """SHA-256 of a scan's values, whatever file they come from."""
    return digest(np.ascontiguousarray(volume.values).tobytes())


def _measure(task: Task, case: Case) -> tuple[CasePrint, NDArray[np.float64]]:
    """The case's row, and intensities (channels, n) sampled from its foreground."""
    volume, labels = load_case(task, case)
    grid = volume.grid.reoriented()
    numbers, counts = np.unique(labels.values, return_counts=True)
    filled = np.asarray(volume.values.any(axis=0))
    row = CasePrint(
        id=case.id,
        shape=grid.shape,
        box=_box(filled, volume.grid),
        spacing=grid.spacing,
        orientation=volume.grid.orientation,
        label_mm3={int(n): float(c * grid.voxel_volume) for n, c in zip(numbers, counts, strict=True) if n != 0},
        label_places=label_places(labels),
        label_pieces=pieces(labels),
        label_cut=tuple(sorted(cut(labels))),
        channels=channel_prints(volume),
        nonzero_share=float(np.count_nonzero(filled) / labels.values.size),
        image_hash=image_hash(volume),
    )
    return row, _sample(volume, labels)


def _box(filled: NDArray[np.bool_], grid: Grid) -> Three:
    """Voxels along x, y, z of the smallest box around what is filled; of the whole grid where nothing is."""
    shape = []
    for axis, whole in enumerate(filled.shape):
        planes = np.flatnonzero(filled.any(axis=tuple(a for a in range(3) if a != axis)))
        shape.append(int(planes[-1] - planes[0] + 1) if planes.size else whole)
    return grid.with_shape((shape[0], shape[1], shape[2])).reoriented().shape


def label_places(labels: LabelMap) -> dict[int, LabelPlace]:
    """Where each structure lies, by number; those that are absent are left out."""
    values = labels.values if labels.values.dtype == np.uint8 else labels.values.astype(np.uint16)
    found = cc3d.statistics(values)
    shape = np.array(values.shape)
    places = {}
    for number in labels.labels.numbers:
        if number >= len(found["voxel_counts"]) or not found["voxel_counts"][number]:
            continue
        centre = (found["centroids"][number] + 0.5) / shape
        extent = [(s.stop - s.start) / n for s, n in zip(found["bounding_boxes"][number], shape, strict=True)]
        turned = _turned(labels.grid.orientation, centre, np.array(extent))
        places[number] = LabelPlace(centre=turned[0], extent=turned[1])
    return places


def _turned(orientation: str, centre: NDArray[np.float64], extent: NDArray[np.float64]) -> tuple[Shares, Shares]:
    """Shares along a file's axes as shares along x, y, z."""
    along = {"xyz".index(_AXES[letter]): n for n, letter in enumerate(orientation)}
    middle = [1 - centre[n] if orientation[n] in "LPI" else centre[n] for n in (along[a] for a in range(3))]
    size = [extent[along[a]] for a in range(3)]
    return (
        (round(float(middle[0]), 4), round(float(middle[1]), 4), round(float(middle[2]), 4)),
        (round(float(size[0]), 4), round(float(size[1]), 4), round(float(size[2]), 4)),
    )


def channel_prints(volume: Volume) -> tuple[ChannelPrint, ...]:
    """What each channel's intensities look like over the whole scan, measured on an even lattice of
    its voxels (all of them in a small scan)."""
    step = max(1, round((np.prod(volume.grid.shape) / _SCAN_SAMPLES) ** (1 / 3)))
    # A thin axis keeps at least some sixteen of its slices.
    steps = [max(1, min(step, n // 16)) for n in volume.grid.shape]
    lattice = volume.values[(slice(None), *(slice(s // 2, None, s) for s in steps))]
    prints = []
    for values in lattice.reshape(volume.channels, -1):
        points = [float(v) for v in np.percentile(values, PERCENTILES)]
        prints.append(
            ChannelPrint(
                percentiles=(points[0], points[1], points[2], points[3], points[4], points[5], points[6]),
                zero_share=float(np.count_nonzero(values == 0) / values.size),
                negative_share=float(np.count_nonzero(values < 0) / values.size),
            )
        )
    return tuple(prints)


def _sample(volume: Volume, labels: LabelMap) -> NDArray[np.float64]:
    inside = np.flatnonzero(labels.values)
    step = max(1, len(inside) // _SAMPLES)
    values = volume.values.reshape(volume.channels, -1)[:, inside[::step]]
    return np.asarray(values, dtype=np.float64)
