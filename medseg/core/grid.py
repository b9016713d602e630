"""Where the voxels are: a shape and an affine, in RAS+ millimetres."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.core.errors import InputError

Float64 = NDArray[np.float64]

# Two grids whose corners lie closer than this are the same grid. Decathlon and hospital files hold
# affines rounded to float32 or to a few decimals; 0.013 mm has been seen in valid pairs.
SAME_GRID_MM = 0.05

# What lies beyond these was not measured in millimetres, and products of it vanish or overflow.
_SMALLEST_MM = 1e-6
_LARGEST_MM = 1e9


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular grid of voxels in space.

    ``shape`` is the number of voxels along the axes i, j, k. ``affine`` (4, 4) takes voxel indices
    (i, j, k, 1) to millimetres (x, y, z, 1), where x grows to the patient's right, y to the
    anterior and z to the superior (RAS+). Index (0, 0, 0) is the centre of the first voxel.

    Raises InputError for an affine that is not finite, that folds space flat or whose last row is
    not 0 0 0 1, and for a shape with an axis below one.
    """

    shape: tuple[int, int, int]
    affine: Float64

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        # Adding zero copies, and makes 0.0 of -0.0, so that equal grids hash alike.
        with np.errstate(invalid="ignore"):
            affine = np.asarray(self.affine, dtype=np.float64) + 0.0
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"a grid of shape {shape}", "A grid needs three axes of at least one voxel")
        if affine.shape != (4, 4) or not (np.abs(affine) < _LARGEST_MM).all():
            raise InputError(
                "the affine is not a 4x4 matrix of finite numbers", "Write the file anew with a valid header"
            )
        if (affine[3] != (0, 0, 0, 1)).any():
            raise InputError(f"the affine ends in the row {affine[3]}", "Its last row must be 0 0 0 1")
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if spacing.min() < _SMALLEST_MM or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * spacing.prod():
            raise InputError(
                f"the affine is singular (voxel spacing {_numbers(spacing)} mm)",
                "Write the file anew with a valid header",
            )
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def from_spacing(
        cls,
        shape: tuple[int, int, int],
        spacing: ArrayLike,
        origin: ArrayLike = (0.0, 0.0, 0.0),
        direction: ArrayLike | None = None,
    ) -> Grid:
        """A grid from voxel spacing (mm), the position of the first voxel's centre (mm, RAS+) and
        unit axis directions as the columns of a 3x3 matrix (the identity unless given)."""
        affine = np.eye(4)
        directions = np.eye(3) if direction is None else np.asarray(direction, dtype=np.float64)
        affine[:3, :3] = directions * np.asarray(spacing, dtype=np.float64)
        affine[:3, 3] = np.asarray(origin, dtype=np.float64)
        return cls(shape, affine)

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along i, j, k in mm."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(lengths[0]), float(lengths[1]), float(lengths[2])

    @cached_property
    def direction(self) -> Float64:
        """Unit vectors of the axes i, j, k as columns (3, 3)."""
        directions: Float64 = self.affine[:3, :3] / np.asarray(self.spacing)
        return directions

    @property
    def origin(self) -> Float64:
        """Position (3,) of voxel (0, 0, 0) in mm."""
        return self.affine[:3, 3]

    @property
    def voxel_volume(self) -> float:
        """Volume of one voxel in mm3, shear included."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @cached_property
    def axes(self) -> tuple[int, int, int]:
        """For each of x, y, z the voxel axis that runs closest to it (a permutation of 0, 1, 2)."""
        remaining = np.abs(self.direction)
        order = [0, 0, 0]
        for _ in range(3):
            world, voxel = np.unravel_index(int(np.argmax(remaining)), (3, 3))
            order[int(world)] = int(voxel)
            remaining = remaining.copy()
            remaining[world, :] = -1
            remaining[:, voxel] = -1
        return order[0], order[1], order[2]

    @property
    def orientation(self) -> str:
        """Where the axes i, j, k point, as in nibabel: 'RAS', 'LPS', 'PIR', ..."""
        letters = [""] * 3
        for world, voxel in enumerate(self.axes):
            letters[voxel] = ("LPI", "RAS")[int(self.direction[world, voxel] > 0)][world]
        return "".join(letters)

    def to_world(self, index: ArrayLike) -> Float64:
        """Voxel indices (..., 3) to millimetres (..., 3)."""
        points: Float64 = np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]
        return points

    def to_index(self, world: ArrayLike) -> Float64:
        """Millimetres (..., 3) to voxel indices (..., 3), not rounded."""
        inverse = np.linalg.inv(self.affine)
        index: Float64 = np.asarray(world, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]
        return index

    def corners(self) -> Float64:
        """Centres (8, 3) of the corner voxels in mm."""
        last = [(0, n - 1) for n in self.shape]
        return self.to_world([(i, j, k) for i in last[0] for j in last[1] for k in last[2]])

    def distance(self, other: Grid) -> float:
        """The largest distance between corners that should coincide, in mm; infinite when the
        shapes differ."""
        if self.shape != other.shape:
            return float("inf")
        return float(np.linalg.norm(self.corners() - other.corners(), axis=1).max())

    def matches(self, other: Grid, tolerance: float = SAME_GRID_MM) -> bool:
        """Whether both are the same grid, up to rounding of the affine (tolerance in mm)."""
        return self.distance(other) <= tolerance

    def reoriented(self) -> Grid:
        """The same voxels with axes permuted and flipped so that i, j, k run closest to +x, +y, +z.

        An oblique grid stays oblique: no voxel moves.
        """
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        for world, voxel in enumerate(self.axes):
            forward = self.direction[world, voxel] > 0
            matrix[voxel, world] = 1 if forward else -1
            matrix[voxel, 3] = 0 if forward else self.shape[voxel] - 1
        shape = tuple(self.shape[voxel] for voxel in self.axes)
        return Grid((shape[0], shape[1], shape[2]), self.affine @ matrix)

    def with_spacing(self, spacing: ArrayLike) -> Grid:
        """Another spacing (mm) over the whole field of view.

        The field of view reaches from the outer edge of the first voxel to that of the last. The
        number of voxels is rounded up (but for a twentieth of one), so that no slice is lost, and
        the new voxels are centred on the old field of view, so that no side is favoured.

        Raises InputError for a spacing that is not a positive number.
        """
        wanted = np.asarray(spacing, dtype=np.float64)
        if not (np.isfinite(wanted).all() and wanted.min() > 0):
            raise InputError(f"a voxel spacing of {_numbers(np.atleast_1d(wanted))} mm", "Give positive numbers")
        old = np.asarray(self.spacing)
        extent = old * self.shape
        shape = np.maximum(np.ceil(extent / wanted - 0.05), 1).astype(int)
        step = wanted / old
        first = (np.asarray(self.shape) - 1) / 2 - (shape - 1) / 2 * step
        matrix = np.diag([*step, 1.0])
        matrix[:3, 3] = first
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), self.affine @ matrix)

    def with_shape(self, shape: tuple[int, int, int]) -> Grid:
        """So many voxels over the same field of view, edge to edge."""
        step = np.asarray(self.shape) / np.asarray(shape)
        matrix = np.diag([*step, 1.0])
        matrix[:3, 3] = (step - 1) / 2
        return Grid(shape, self.affine @ matrix)

    def window(self, start: ArrayLike, shape: tuple[int, int, int]) -> Grid:
        """The grid of a box of voxels, from index ``start`` on. The box may reach outside."""
        matrix = np.eye(4)
        matrix[:3, 3] = np.asarray(start, dtype=np.float64)
        return Grid(shape, self.affine @ matrix)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.shape == other.shape and bool(np.array_equal(self.affine, other.affine))

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    def __repr__(self) -> str:
        size = "x".join(str(n) for n in self.shape)
        return (
            f"Grid({size}, {_numbers(self.spacing)} mm, {self.orientation}, first voxel at {_numbers(self.origin)} mm)"
        )


def _numbers(values: Any) -> str:
    return "x".join(f"{float(v):.4g}" for v in values)
