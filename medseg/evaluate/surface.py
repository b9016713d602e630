"""Distances between the surfaces of two masks, in mm.

A surface element sits at each corner where eight voxels meet that are not all inside or all
outside. Its area in mm2 is that of the triangles which marching cubes would put there, so that a
distance counts as much as the surface it was measured on. Everything beyond the image is outside:
a mask that touches the border has a surface there.

Distances are measured once per pair of masks; each metric is a short function of them.

Lorensen & Cline, "Marching cubes", 1987. Nikolov et al., "Deep learning to achieve clinically
applicable segmentation of head and neck anatomy for radiotherapy", 2018, arXiv:1809.04430.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid

Mask = NDArray[np.bool_]
Float64 = NDArray[np.float64]
Index = NDArray[np.intp]

# How far around an element others are looked for one by one: farther, a tree is as quick.
_STEPS = 2

# Rounding of an affine must not decide whether a distance of one voxel is within a tolerance of
# one voxel.
_ROUNDING_MM = 1e-4

# The same for shares of a surface: 19 of 20 equal elements are 95 %.
_ROUNDING_SHARE = 1e-9


@dataclass(frozen=True, eq=False)
class Directed:
    """From each surface element of one mask to the nearest one of the other: ``distances`` (n,) in
    mm, ascending, infinite where the other mask is empty, and the elements' ``areas`` (n,) in mm2."""

    distances: Float64
    areas: Float64


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """What lies between two surfaces: from the first mask to the second, and back."""

    there: Directed
    back: Directed


def surface_distances(first: Mask, second: Mask, grid: Grid) -> SurfaceDistances:
    """Distances between the surfaces of two masks (X, Y, Z) on one grid.

    Any grid will do: the nearest element is searched among positions in mm, and areas are those of the triangles
    on the grid, oblique or sheared (as of a tilted CT gantry). The work is confined to the box around both masks.

    Raises ValueError where the masks do not have the grid's shape.
    """
    masks = [np.asarray(mask, dtype=bool) for mask in (first, second)]
    for mask in masks:
        if mask.shape != grid.shape:
            raise ValueError(f"a mask of shape {mask.shape} on a grid of shape {grid.shape}")
    box = _box(masks[0] | masks[1])
    codes = [_codes(mask[box]) for mask in masks]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    elements = [np.argwhere(surface) for surface in surfaces]
    weights, axes = element_areas(grid), grid.affine[:3, :3]
    areas = [weights[code[surface]] for code, surface in zip(codes, surfaces, strict=True)]
    return SurfaceDistances(
        Directed(*_ascending(_nearest(elements[0], elements[1], surfaces[1], axes), areas[0])),
        Directed(*_ascending(_nearest(elements[1], elements[0], surfaces[0], axes), areas[1])),
    )


def surface_area(mask: Mask, grid: Grid) -> float:
    """Area of the surface of a mask (X, Y, Z) in mm2; 0 where it is empty."""
    inside = np.asarray(mask, dtype=bool)
    return float(element_areas(grid)[_codes(inside[_box(inside)])].sum())


def hausdorff(between: SurfaceDistances, percent: float = 100.0) -> float:
    """The distance in mm within which ``percent`` of the surface lies, the larger of both directions.

    100 gives the Hausdorff distance, 95 the robust one (HD95). A share is of surface area, and the
    answer is always a distance that was measured, never one in between. Infinite where one mask is
    empty, NaN where both are.
    """
    if _both_empty(between):
        return float("nan")
    return max(_reach(way, percent / 100) for way in (between.there, between.back))


def assd(between: SurfaceDistances) -> float:
    """Average symmetric surface distance in mm: the mean over both surfaces together, weighted by
    area. Infinite where one mask is empty, NaN where both are.

    Heimann et al., "Comparison and evaluation of methods for liver segmentation from CT datasets",
    2009, with areas in place of counts.
    """
    if _both_empty(between):
        return float("nan")
    distances, areas = _together(between)
    return float(distances @ areas / areas.sum())


def nsd(between: SurfaceDistances, tolerance_mm: float) -> float:
    """Normalised surface Dice: the share, 0 to 1, of both surfaces' area that lies within
    ``tolerance_mm`` of the other surface, the limit included (up to 1e-4 mm of rounding). 0 where
    one mask is empty, NaN where both are."""
    if _both_empty(between):
        return float("nan")
    distances, areas = _together(between)
    return float(areas[distances <= tolerance_mm + _ROUNDING_MM].sum() / areas.sum())


def element_areas(grid: Grid) -> Float64:
    """Area (256,) in mm2 of the surface element of each neighbour code on a grid.

    Bit 4i + 2j + k of a code says whether the voxel at (i, j, k) of the eight around a corner is
    inside.
    """
    codes, vectors = _triangles()
    axes = grid.affine[:3, :3]
    # Areas are vectors across the surface: they go with the cofactors of the matrix that places it.
    cofactors = np.linalg.det(axes) * np.linalg.inv(axes).T
    areas = np.bincount(codes, np.linalg.norm(vectors @ cofactors.T, axis=1), minlength=256)
    return np.asarray(areas, dtype=np.float64)


@cache
def _triangles() -> tuple[Index, Float64]:
    """The triangles of all neighbour codes: the code (t,) of each, and its area vector (t, 3) in voxels.

    A code and its complement share their triangles, as with the fifteen cases of Lorensen & Cline:
    the fewer corners are cut off from the many. So inside and outside may trade places.
    """
    from skimage.measure import marching_cubes

    codes, vectors = [], []
    for code in range(1, 255):
        inside = (code >> np.arange(8) & 1).reshape(2, 2, 2)
        few = inside if inside.sum() <= 4 else 1 - inside
        corners, faces, _, _ = marching_cubes(few.astype(np.float32), 0.5, method="lorensen")
        a, b, c = np.asarray(corners, dtype=np.float64)[faces].transpose(1, 0, 2)
        vectors.append(np.cross(b - a, c - a) / 2)
        codes.append(np.full(len(faces), code))
    return np.concatenate(codes), np.concatenate(vectors)


def _codes(mask: Mask) -> NDArray[np.uint8]:
    """The neighbour code of each corner: (X, Y, Z) voxels have (X + 1, Y + 1, Z + 1) corners."""
    padded = np.pad(mask, 1).view(np.uint8)
    shape = tuple(n + 1 for n in mask.shape)
    codes = np.zeros(shape, dtype=np.uint8)
    for bit, corner in enumerate(product((0, 1), repeat=3)):
        codes |= padded[tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))] << np.uint8(bit)
    return codes


def _box(mask: Mask) -> tuple[slice, ...]:
    from scipy.ndimage import find_objects

    found = find_objects(mask.view(np.uint8), max_label=1)[0]
    return found if found is not None else (slice(0, 0),) * mask.ndim


def _nearest(elements: Index, goals: Index, surface: Mask, axes: Float64) -> Float64:
    """From elements (n, 3) the distance (n,) in mm to the nearest of the ``goals`` (m, 3), which make up a ``surface``,
    all in indices of corners; axes (columns, mm) may lie at any angle.

    Most surfaces lie within a step or two of each other: the places around each element are looked at, the nearest
    first, and what has found nothing by then asks a tree."""
    from scipy.spatial import cKDTree

    distances = np.full(len(elements), np.inf)
    if not len(goals):
        return distances
    near = np.pad(surface, _STEPS)
    steps, lengths = _around(axes)
    strides = np.array([near.shape[1] * near.shape[2], near.shape[2], 1])
    places, flat = (elements + _STEPS) @ strides, near.ravel()
    left = np.arange(len(elements))
    for step, length in zip(steps @ strides, lengths, strict=True):
        found = flat[places + step]
        distances[left[found]] = length
        left, places = left[~found], places[~found]
        if not len(left):
            return distances
    tree = cKDTree(goals @ axes.T, balanced_tree=False, compact_nodes=False)
    distances[left] = tree.query(elements[left] @ axes.T)[0]
    return distances


def _around(axes: Float64) -> tuple[Index, Float64]:
    """Steps (k, 3) along the axes of a grid, and their lengths (k,) in mm, ascending: all that are shorter than any of
    more than `_STEPS` along some axis."""
    reach = np.arange(-_STEPS - 1, _STEPS + 2)
    steps = np.stack(np.meshgrid(reach, reach, reach, indexing="ij"), axis=-1).reshape(-1, 3)
    lengths = np.linalg.norm(steps @ axes.T, axis=1)
    # Between two parallel planes of corners nothing is nearer than they are.
    apart = 1 / np.linalg.norm(np.linalg.inv(axes), axis=1)
    inner = (lengths < (_STEPS + 1) * apart.min()) & (np.abs(steps).max(axis=1) <= _STEPS)
    order = np.argsort(lengths[inner], kind="stable")
    return steps[inner][order], lengths[inner][order]


def _ascending(distances: Float64, areas: Float64) -> tuple[Float64, Float64]:
    order = np.argsort(distances, kind="stable")
    return distances[order], areas[order]


def _both_empty(between: SurfaceDistances) -> bool:
    return not len(between.there.areas) and not len(between.back.areas)


def _reach(way: Directed, share: float) -> float:
    if not len(way.areas):
        return 0.0  # an empty mask has nothing to be far away with; the other direction is infinite
    covered = np.cumsum(way.areas)
    place = int(np.searchsorted(covered, (share - _ROUNDING_SHARE) * covered[-1]))
    return float(way.distances[min(place, len(covered) - 1)])


def _together(between: SurfaceDistances) -> tuple[Float64, Float64]:
    ways = (between.there, between.back)
    return np.concatenate([w.distances for w in ways]), np.concatenate([w.areas for w in ways])
