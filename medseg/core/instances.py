"""Things that are counted: which voxels belong to which lesion, nodule, cell or vertebra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.shape import connected
from medseg.core.volume import LabelMap


@dataclass(frozen=True)
class Instance:
    """One thing: its ``number`` in the instance map, the ``label`` that it is one of, how sure a model is
    of it (``score``, 0 to 1; 1 of a reference), its volume and the middle of its voxels, x, y, z in RAS+ mm."""

    number: int
    label: int
    score: float
    voxels: int
    volume_ml: float
    centre_mm: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class InstanceMap:
    """Integer ``values`` (X, Y, Z) on a ``grid``, 0 where there is nothing, and a row for each other number.

    Raises InputError where the values do not have the grid's shape.
    """

    values: NDArray[Any]
    grid: Grid
    instances: tuple[Instance, ...]

    def __post_init__(self) -> None:
        if self.values.shape != self.grid.shape:
            raise InputError(
                f"instances of shape {self.values.shape} on a grid of shape {self.grid.shape}",
                "Give instances of shape (x, y, z)",
            )

    def semantic(self, labels: LabelSet) -> LabelMap:
        """The label of each voxel's instance."""
        table = np.zeros(max((one.number for one in self.instances), default=0) + 1, dtype=np.uint16)
        for one in self.instances:
            table[one.number] = one.label
        found = table[self.values]
        return LabelMap(found.astype(np.uint8) if max(labels.numbers) < 256 else found, self.grid, labels)


def described(values: NDArray[Any], grid: Grid, label_of: dict[int, int], score_of: dict[int, float]) -> InstanceMap:
    """An instance map out of its values, each number's label and its score (1 where none is given). Numbers
    that no voxel has are left out."""
    flat = values.ravel(order="K")
    most = int(flat.max(initial=0))
    sizes = np.bincount(flat, minlength=most + 1)
    where = np.stack(np.nonzero(values))
    numbers = values[tuple(where)]
    sums = np.stack([np.bincount(numbers, weights=axis, minlength=most + 1) for axis in where], axis=1)
    rows = []
    for number in np.flatnonzero(sizes[1:]) + 1:
        middle = grid.affine[:3, :3] @ (sums[number] / sizes[number]) + grid.affine[:3, 3]
        x, y, z = (float(v) for v in middle)
        rows.append(
            Instance(
                number=int(number),
                label=label_of[int(number)],
                score=score_of.get(int(number), 1.0),
                voxels=int(sizes[number]),
                volume_ml=float(sizes[number] * grid.voxel_volume / 1000),
                centre_mm=(x, y, z),
            )
        )
    return InstanceMap(values, grid, tuple(rows))


def numbered(labels: NDArray[Any], things: NDArray[Any], step: int) -> NDArray[Any]:
    """Label and thing of each voxel as one number: label + ``step`` x thing, labels being below ``step`` and things
    numbered from 1, or 0. `parted` takes them apart."""
    codes = labels.astype(np.int64) + step * things.astype(np.int64)
    return codes.astype(np.min_scalar_type(int(codes.max(initial=0))))


def parted(codes: NDArray[Any], step: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels and things, out of what `numbered` makes of them."""
    things, labels = np.divmod(codes, step)
    return labels, things


def components(labels: LabelMap) -> InstanceMap:
    """The instances of a label map that has none of its own: what touches by faces, edges or corners and
    has one label is one thing."""
    parts = connected(labels.values)
    label_of = {number: int(label) for number, label in enumerate(parts.numbers) if number}
    return described(np.asarray(parts.index), labels.grid, label_of, {})
