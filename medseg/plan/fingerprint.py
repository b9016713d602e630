"""What the data look like: sizes, spacings, intensities, label volumes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from medseg.core.errors import InputError
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


class ChannelPrint(Strict):
    """The intensities of one channel of a whole scan: its `PERCENTILES`, and the share of voxels
    that are zero and below zero."""

    percentiles: tuple[Finite, Finite, Finite, Finite, Finite, Finite, Finite]
    zero_share: Share
    negative_share: Share


class CasePrint(Strict):
    """One case, axes turned to run along x, y, z: voxels, spacing in mm, where the file's own axes
    pointed ("LPS"), label volumes in mm3 and far-apart pieces by number, labels that the scan's border
    cuts, the whole scan's intensities by channel, and a hash of its image."""

    id: str
    shape: Three
    spacing: tuple[Millimetres, Millimetres, Millimetres]
    orientation: str
    label_mm3: dict[int, Finite]
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


class Fingerprint(Strict):
    """What was measured of a task."""

    format: Literal[2] = 2
    task: str
    cases: tuple[CasePrint, ...]
    intensities: tuple[Intensities, ...]

    @property
    def shapes(self) -> NDArray[np.float64]:
        """(cases, 3) voxels."""
        return np.array([c.shape for c in self.cases], dtype=np.float64)

    @property
    def spacings(self) -> NDArray[np.float64]:
        """(cases, 3) mm."""
        return np.array([c.spacing for c in self.cases])

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
        return digest(self.model_dump(mode="json"))


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
    return Fingerprint(task=task.name, cases=tuple(row for row, _ in rows), intensities=tuple(intensities))


def read_fingerprint(path: Path) -> Fingerprint:
    """The fingerprint in a file. Raises InputError where it is missing or of another format."""
    found = read_json(path, "Make it with `medseg plan`")
    try:
        return Fingerprint.model_validate(found)
    except ValidationError:
        raise InputError(f"{path} has another format", "Plan anew") from None


def _measure(task: Task, case: Case) -> tuple[CasePrint, NDArray[np.float64]]:
    """The case's row, and intensities (channels, n) sampled from its foreground."""
    volume, labels = load_case(task, case)
    grid = volume.grid.reoriented()
    numbers, counts = np.unique(labels.values, return_counts=True)
    row = CasePrint(
        id=case.id,
        shape=grid.shape,
        spacing=grid.spacing,
        orientation=volume.grid.orientation,
        label_mm3={int(n): float(c * grid.voxel_volume) for n, c in zip(numbers, counts, strict=True) if n != 0},
        label_pieces=pieces(labels),
        label_cut=tuple(sorted(cut(labels))),
        channels=channel_prints(volume),
        nonzero_share=float(np.count_nonzero(volume.values.any(axis=0)) / labels.values.size),
        image_hash=digest(np.ascontiguousarray(volume.values).tobytes()),
    )
    return row, _sample(volume, labels)


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
