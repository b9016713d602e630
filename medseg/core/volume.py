"""What is in the voxels: intensities, or labels. Two types, so that labels are never averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet


@dataclass(frozen=True, eq=False)
class Volume:
    """Intensities: ``values`` (C, X, Y, Z), any real dtype, C channels on one ``grid``. ``modality``
    is DICOM's word ("CT", "MR", "PT") where the scan's own file says what made it.

    Raises InputError where the values do not have the grid's shape.
    """

    values: NDArray[Any]
    grid: Grid
    modality: str | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 4 or self.values.shape[1:] != self.grid.shape:
            raise InputError(
                f"values of shape {self.values.shape} on a grid of shape {self.grid.shape}",
                "Give values of shape (channels, x, y, z)",
            )

    @property
    def channels(self) -> int:
        return int(self.values.shape[0])


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Labels: integer ``values`` (X, Y, Z) on a ``grid``, and what the numbers mean.

    Raises InputError where the values are not integers or do not have the grid's shape.
    """

    values: NDArray[Any]
    grid: Grid
    labels: LabelSet

    def __post_init__(self) -> None:
        if self.values.shape != self.grid.shape:
            raise InputError(
                f"labels of shape {self.values.shape} on a grid of shape {self.grid.shape}",
                "Give labels of shape (x, y, z)",
            )
        if not np.issubdtype(self.values.dtype, np.integer):
            raise InputError(f"labels of type {self.values.dtype}", "Give integers")

    def volume_of(self, number: int) -> float:
        """Volume of a label in mm3, by counting voxels."""
        return float(np.count_nonzero(self.values == number) * self.grid.voxel_volume)
