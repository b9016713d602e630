"""Structures as bodies: smooth surfaces lit from the upper left, seen from the front and a little to the side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]

# The eye is turned so far towards the patient's left, and upwards.
_ASIDE, _ABOVE = math.radians(25), math.radians(12)
# Where the light comes from: x to the right of the picture, y up, z towards the eye.
_LIGHT = np.array([-0.45, 0.6, 0.66])
# Surfaces are made of so many cells along the longest side of all, and smoothed by so much of a voxel.
_CELLS, _SMOOTH = 150, 1.0
# So many voxels of nothing lie around a structure.
_PAD = 2
# Cells whose depths differ by no more than this, in cells, lie in one layer.
_STEP = 0.05
# Samples on a triangle lie no further apart than this, in pixels, so that no pixel between them stays empty.
_APART = 0.7
_MARGIN = 0.03
# What lies furthest back is darker by so much, and what lies behind its surroundings (a share of the side) too.
_FADED, _SHADED, _AROUND = 0.25, 0.6, 0.015
# What lies within others, as this share of its surface does, and of which no more than so much is seen shines through
# them, this strongly.
_WITHIN, _HIDDEN, _THROUGH = 0.5, 0.15, 0.5
# A sample is one number, so that the nearest is the largest: its nearness, its structure, its light (0 to 2).
_NEAR, _STRUCTURE = 30, 14
# Samples that are computed at one time.
_AT_ONCE = 2**16


@dataclass(frozen=True)
class _Mesh:
    """Surfaces before the eye: ``points`` (n, 3) in mm, x to the right, y up, z towards the eye; what ``light`` (n,)
    each throws back, 1 being its own colour and 2 white; triangles of points, ``faces`` (m, 3), and the ``structure``
    (m,) that each is of. ``within`` are the structures that lie within others, and which those are."""

    points: Float64
    light: Float64
    faces: Integers
    structure: NDArray[np.int64]
    within: dict[int, Integers]


def render(labels: Integers, grid: Grid, colours: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Structures 1, 2, ... of ``labels`` (X, Y, Z) as a square picture (side, side, 4): red, green, blue, opacity.

    Structure k has the colour ``colours[k - 1]`` (0 to 255). Orthographic, the head up and the patient's right on the
    left, also where the grid is oblique. What is nearer hides what is behind it; but a structure that lies within
    another, as a tumour in its organ, shines through. The same labels give the same picture.
    """
    mesh = _mesh(labels, grid)
    if mesh is None:
        return np.zeros((side, side, 4), dtype=np.uint8)
    low, high = mesh.points.min(axis=0), mesh.points.max(axis=0)
    scale = (1 - 2 * _MARGIN) * side / max(high[:2] - low[:2])
    columns, rows = side / 2 + (mesh.points[:, :2] - (low + high)[:2] / 2).T * [[scale], [-scale]]
    corners = np.stack([columns, rows, (mesh.points[:, 2] - low[2]) / (high[2] - low[2]), mesh.light]).astype(
        np.float32
    )
    front = _drawn(corners, mesh.faces, mesh.structure, side)
    rgb = _painted(front, colours) * _shade(front, side, scale * (high[2] - low[2]))
    areas = np.bincount(mesh.structure, _areas(corners[:2, mesh.faces]))
    hidden = [k for k in mesh.within if np.count_nonzero(_structure(front) == k) <= _HIDDEN * areas[k]]
    if hidden:
        of_them = np.isin(mesh.structure, hidden)
        behind = _drawn(corners, mesh.faces[of_them], mesh.structure[of_them], side)
        hosts = np.zeros((len(colours) + 1,) * 2, dtype=bool)
        for k in hidden:
            hosts[k, mesh.within[k]] = True
        through = hosts[_structure(behind), _structure(front)]
        rgb[through] += _THROUGH * (_painted(behind, colours) - rgb)[through]
    picture = np.concatenate([np.rint(rgb), 255 * (front > 0)[:, None]], axis=1)
    return picture.astype(np.uint8).reshape(side, side, 4)


def _mesh(labels: Integers, grid: Grid) -> _Mesh | None:
    """The surfaces of all structures that are there, as far as they face the eye; None where there is none."""
    from scipy.ndimage import find_objects

    # Turned round, since voxels that come from a file have x varying fastest.
    boxes = {k: box[::-1] for k, box in enumerate(find_objects(labels.T), start=1) if box is not None}
    if not boxes:
        return None
    ends = np.array([[(s.start, s.stop) for s in box] for box in boxes.values()])
    cell = max((ends[..., 1].max(axis=0) - ends[..., 0].min(axis=0) + 2 * _PAD) * grid.spacing) / _CELLS
    (s, c), (t, d) = ((math.sin(a), math.cos(a)) for a in (_ASIDE, _ABOVE))
    # Rows: from left to right in the picture, up, and towards the eye, in RAS.
    view = np.array([[-c, -s, 0], [s * t, -c * t, d], [-s * d, c * d, t]])
    source = _LIGHT / np.linalg.norm(_LIGHT)
    mirror = source + np.array([0, 0, 1])
    mirror /= np.linalg.norm(mirror)
    points, light, faces, structure, count = [], [], [], [], 0
    within = {}
    for k, box in boxes.items():
        index, triangles, normals = _surface(labels[box] == k, np.array(grid.spacing), cell)
        index += [one.start for one in box]
        outside = np.rint(index + 1.5 * normals * np.maximum(1, cell / np.array(grid.spacing))).astype(int)
        beyond = labels[tuple(np.clip(outside, 0, np.array(labels.shape) - 1).T)]
        others = beyond[(beyond > 0) & (beyond != k)]
        if len(others) >= _WITHIN * len(beyond):
            within[k] = np.unique(others)
        normals = normals @ (view @ grid.direction).T
        triangles = triangles[(normals[triangles, 2] > 0).any(axis=1)]
        points.append(grid.to_world(index) @ view.T)
        light.append(0.25 + 0.75 * ((1 + normals @ source) / 2) ** 2 + 0.3 * np.clip(normals @ mirror, 0, 1) ** 40)
        faces.append(triangles + count)
        structure.append(np.full(len(triangles), k, dtype=np.int64))
        count += len(index)
    joined = [np.concatenate(one) for one in (points, light, faces, structure)]
    return _Mesh(joined[0], joined[1], joined[2], joined[3], within)


def _surface(mask: NDArray[np.bool_], spacing: Float64, cell: float) -> tuple[Float64, Integers, Float64]:
    """The smoothed surface of a mask (X, Y, Z) in triangles of about a cell (mm): points (n, 3) in voxels, faces (m, 3)
    that index them, and unit normals (n, 3) along the mask's axes. It holds about the volume that the mask has."""
    import edt
    from scipy.ndimage import affine_transform, gaussian_filter
    from skimage.measure import marching_cubes

    steps = np.maximum(1, cell / spacing).astype(int)
    blocks = mask
    for axis, step in enumerate(steps):
        blocks = np.logical_or.reduceat(blocks, np.arange(0, blocks.shape[axis], step), axis=axis)
    blocks, block = np.pad(blocks, _PAD), steps * spacing
    # Between slices that lie far apart the distance to the border runs evenly, where a mask would be a staircase.
    depth = edt.edt(blocks, anisotropy=block) - edt.edt(~blocks, anisotropy=block)
    ratio = cell / block
    shape = tuple(np.ceil((np.array(blocks.shape) - 1) / ratio).astype(int) + 1)
    field = affine_transform(depth, ratio, output_shape=shape, order=1, mode="nearest")
    field = gaussian_filter(field, _SMOOTH * np.maximum(1, 1 / ratio))
    # Halfway between the cells that hold the volume and the next ones, so that what is thinner than a cell stays too.
    cells = min(max(round(np.count_nonzero(mask) * spacing.prod() / cell**3), 1), field.size - 1)
    least = np.partition(field, field.size - cells, axis=None)[field.size - cells]
    level = float(least + field[field < least - _STEP * cell].max()) / 2
    points, faces, normals, _ = marching_cubes(field, level)
    return (points * ratio - _PAD) * steps + (steps - 1) / 2, faces, normals


def _drawn(corners: Float32, faces: Integers, structure: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """The nearest sample of triangles in each pixel (side * side,), 0 where there is none. ``corners`` (4, n) are
    column, row, nearness (0 to 1) and light of the points."""
    out = np.zeros(side * side, dtype=np.int64)
    x, y = corners[:2, faces]
    longest = np.hypot(x - np.roll(x, 1, axis=1), y - np.roll(y, 1, axis=1)).max(axis=1)
    pieces = np.maximum(1, np.ceil(longest / _APART)).astype(int)
    for n in np.unique(pieces):
        some = np.flatnonzero(pieces == n)
        i, j = np.nonzero(np.tri(n + 1, dtype=bool)[::-1])
        weights = np.stack([i, j, n - i - j]).astype(np.float32)[..., None] / n
        base = structure[some] << _STRUCTURE
        a, b, c = corners[:, None, faces[some].T].transpose(2, 0, 1, 3)  # each (4, 1, triangles)
        at_once = max(1, _AT_ONCE // len(some))
        for first in range(0, len(i), at_once):
            u, v, w = weights[:, first : first + at_once]
            column, row, near, light = a * u + b * v + c * w
            sample = 1 + (near * (2**_NEAR - 128)).astype(np.int64) << _NEAR
            sample |= base | (light * 2 ** (_STRUCTURE - 1)).astype(np.int64)
            np.maximum.at(out, row.astype(np.int64) * side + column.astype(np.int64), sample)
    return out


def _structure(samples: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray(samples >> _STRUCTURE & 2 ** (_NEAR - _STRUCTURE) - 1)


def _areas(corners: Float32) -> Float32:
    """Of triangles (m,) in a plane, from their corners (2, m, 3)."""
    (a, b, c), (d, e, f) = corners.transpose(0, 2, 1)
    return np.asarray(np.abs((b - a) * (f - d) - (c - a) * (e - d)) / 2)


def _painted(samples: NDArray[np.int64], colours: NDArray[np.uint8]) -> Float64:
    """Red, green and blue (n, 3) of samples (n,)."""
    light = ((samples & 2**_STRUCTURE - 1) / 2 ** (_STRUCTURE - 1))[:, None]
    own = np.concatenate([np.zeros((1, 3)), colours])[_structure(samples)] * np.minimum(light, 1)
    return np.asarray(own + (255 - own) * np.clip(light - 1, 0, 1))


def _shade(samples: NDArray[np.int64], side: int, deep: float) -> Float64:
    """How bright samples (side * side, 1) are for where they lie, 0 to 1; their depths span ``deep`` pixels.

    Luft, Colditz and Deussen, "Image enhancement by unsharp masking the depth buffer", 2006.
    """
    from scipy.ndimage import gaussian_filter

    near = ((samples >> _NEAR) / 2**_NEAR).astype(np.float32).reshape(side, side)
    there = np.asarray(near > 0, dtype=np.float32)
    around = gaussian_filter(near, _AROUND * side) / np.maximum(gaussian_filter(there, _AROUND * side), 1e-6)
    behind = np.clip((around - near) * deep / (0.1 * side), 0, 1)
    return np.asarray((1 - _FADED * (1 - near)) * (1 - _SHADED * behind), dtype=np.float64).reshape(-1, 1)
